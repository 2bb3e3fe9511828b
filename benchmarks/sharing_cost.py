"""What sharing costs: forward and backward passes of every strategy at equal size, next to two other libraries.

    python benchmarks/sharing_cost.py                                   # all strategies, our columns only
    python benchmarks/sharing_cost.py --peer-python PEERS/bin/python    # next to torch-rechub and DeepCTR-Torch
    python benchmarks/sharing_cost.py --quick                           # three strategies, few rounds
    python benchmarks/sharing_cost.py --strategies mmoe ple --json OUT.json

Measured is a strategy alone with its towers, for two binary tasks on 191 dense numbers: no tables, no optimizer, no
loader. To be reached, on a CPU with two cores:

- `shared_bottom`, `mmoe`, `ple`, `esmm` and `aitm` are faster than the modules of torch-rechub and of DeepCTR-Torch at the
  same sizes, where these have them (DeepCTR-Torch has no AITM);
- `mmoe` and `ple` are at least 1.5 x as fast;
- experts with stacked weights are at least as fast as a loop over 4 or more separate ones.

The sentences below the tables say of each whether it is met. benchmarks/README.md says what is equal between the
libraries and what is not, how their environment is made and what the columns mean.
"""

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine
from benchmarks.balancing_cost import Busy, Worker, interpreter
from benchmarks.sharing_summary import show, summary
from benchmarks.sharing_worker import EXPERTS, REFERENCE, STRATEGIES, WAYS, Case
from benchmarks.train_throughput import OURS, limit_threads, machine_facts, schedule

FULL = {"strategies": list(STRATEGIES), "experts": EXPERTS, "repeats": 7}
QUICK = {"strategies": ["shared_bottom", "mmoe", "ple"], "experts": EXPERTS[:2], "repeats": 3}
OUR_WORKER = [sys.executable, "-m", "benchmarks.sharing_worker"]
PEER_WORKER = ["-m", "benchmarks.sharing_torch"]
NOT_ASKED = "No other library was measured: no --peer-python was given"


def main() -> None:
    options = parse(sys.argv[1:])
    peer, told = peer_command(options.peer_python)
    print(told, file=sys.stderr)
    limit_threads(options.threads)
    case = Case(tuple(options.strategies), options.parameters, options.batch_size, options.steps)
    facts = [machine_facts()]
    with Busy() as clock:
        measured = measure(case, options, peer)
    facts.append(machine_facts())
    record = measured | {
        "benchmark": "sharing_cost",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/sharing_cost.py", *sys.argv[1:]]),
        "commit": facts[0]["commit"],
        "machine": facts[0]["machine"],
        "gemm_gflops": max(fact["gemm_gflops"] for fact in facts),
        "busy_elsewhere": clock.share,
        "peer": told,
        "settings": {
            "batch_size": options.batch_size,
            "steps": options.steps,
            "repeats": options.repeats,
            "threads": options.threads,
        },
    }
    record |= summary(record)
    show(record)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three strategies, fewer experts, three rounds")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, metavar="STRATEGY", help="default: all")
    parser.add_argument(
        "--parameters", type=int, help=f"of every strategy with its towers (default: those of {REFERENCE})"
    )
    parser.add_argument("--experts", nargs="*", type=int, help="numbers of experts in the layout's table")
    parser.add_argument("--repeats", type=int, help=f"rounds, of which medians are shown (default: {FULL['repeats']})")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32, help="passes of a measurement (default: 32)")
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="cores to use (default: all)")
    parser.add_argument("--peer-python", type=Path, help="interpreter with torch, torch-rechub and deepctr-torch")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    for name, value in (FULL | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("parameters", "experts", "repeats", "batch_size", "steps", "threads"):
        value = getattr(options, name)
        numbers = value if isinstance(value, list) else [value]
        if min((number for number in numbers if number is not None), default=1) < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected numbers >= 1")
    options.strategies = list(dict.fromkeys(options.strategies))
    return options


def peer_command(python: Path | None) -> tuple[list[str] | None, str]:
    """The command of the other libraries' process, or None; and a line about it."""
    if python is None:
        return None, NOT_ASKED
    python = interpreter(python)
    return [str(python), *PEER_WORKER], f"The other libraries are measured by {python}"


def measure(case: Case, options: argparse.Namespace, peer: Sequence[str] | None) -> dict[str, Any]:
    """Everything that the processes say, with one line a round and measurement."""
    arguments = case.arguments()
    with Worker([*OUR_WORKER, *arguments]) as ours, Worker([*peer, *arguments] if peer else None) as theirs:
        return {
            "target": ours.facts["target"],
            "widths": ours.facts["equal"],
            "unmatched": ours.facts["unmatched"],
            "missing": theirs.facts.get("missing", {}),
            "device": ours.facts["device"],
            "versions": theirs.facts.get("versions", {}) | ours.facts["versions"],
            "equal_runs": list(measured_equal(ours, options.repeats)),
            "compared_runs": list(measured_compared(case, ours, theirs, options.repeats)),
            "expert_runs": list(measured_experts(options.experts, ours, options.repeats)),
        }


def measured_equal(ours: Worker, repeats: int) -> Iterator[dict[str, Any]]:
    """One line a round and strategy."""
    for turn, order in enumerate(schedule(list(ours.facts["equal"]), repeats)):
        for name in order:
            yield {"name": name, "round": turn, **ours.ask(part="equal", name=name)}
        print(f"strategies: round {turn + 1} of {repeats}", file=sys.stderr, flush=True)


def measured_compared(case: Case, ours: Worker, theirs: Worker, repeats: int) -> Iterator[dict[str, Any]]:
    """One line a round and model, with what each library answers; they are asked in turns that lie close in time."""
    for turn, order in enumerate(schedule(list(case.compared()), repeats)):
        for name in order:
            asked = [OURS, *(peer for peer, names in theirs.facts.get("compared", {}).items() if name in names)]
            found = {who: ask(who, name, ours, theirs) for who in (asked if turn % 2 == 0 else reversed(asked))}
            by_fact = {fact: {who: found[who][fact] for who in asked} for fact in ("seconds", "parameters")}
            yield {"name": name, "round": turn, **by_fact}
        print(f"libraries: round {turn + 1} of {repeats}", file=sys.stderr, flush=True)


def ask(who: str, name: str, ours: Worker, theirs: Worker) -> Mapping[str, Any]:
    """The answer of one library."""
    return ours.ask(part="compared", name=name) if who == OURS else theirs.ask(peer=who, name=name)


def measured_experts(numbers: Sequence[int], ours: Worker, repeats: int) -> Iterator[dict[str, Any]]:
    """One line a round and number of experts, with the seconds of both layouts."""
    for turn, order in enumerate(schedule(list(dict.fromkeys(numbers)), repeats)):
        for number in order:
            ways = WAYS if turn % 2 == 0 else WAYS[::-1]
            found = {way: ours.ask(part="experts", number=number, way=way)["seconds"] for way in ways}
            yield {"number": number, "round": turn, "seconds": found}


if __name__ == "__main__":
    main()
