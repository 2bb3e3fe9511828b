"""What transfer costs: modes of the gradient-based update and whole train steps against a plain one, and MAML on sine
waves next to torch.func.

    python benchmarks/transfer_cost.py                                  # a minute
    python benchmarks/transfer_cost.py --peer-python PEERS/bin/python   # with MAML in PyTorch, in an environment of its own
    python benchmarks/transfer_cost.py --repeats 7 --json OUT.json

A step is one of Adam on a network of 191 numbers with 2 or 8 binary tasks, batches of 2048 rows of source and target. The
plain step sees the target alone. Whole train steps are those of `fit`: with `constrained` and `first_order` they have 2048
rows of the source beside the target's, over four domains (`maml`, `fomaml`, `mldg`, `reptile`) 2048 in all. To be reached,
on a CPU with two cores:

- `constrained`, one inner step: at most 4.5 x the plain step; `first_order`: at most 2.3 x; with 8 tasks as with 2;
- MAML with 40 inner tasks, 1 and 5 inner steps: at least 3 x as fast as PyTorch.
"""

import argparse
import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine
from benchmarks.balancing_cost import Busy, Worker, interpreter
from benchmarks.balancing_summary import QUIET, print_table
from benchmarks.train_throughput import limit_threads, machine_facts, schedule
from benchmarks.transfer_worker import BATCH, DOMAINS, IMPLICIT, MODES, PLAIN, STEPS, STRATEGIES

OURS = [sys.executable, "-m", "benchmarks.transfer_worker"]
PEER = ["-m", "benchmarks.transfer_torch"]
TASKS, ENCODERS, INNER_STEPS = (2, 8), ((64, 32), (256, 128)), (1, 5)
MOST = {"constrained": 4.5, "first_order": 2.3}
LEAST = 3.0


def main() -> None:
    options = parse(sys.argv[1:])
    limit_threads(options.threads)
    before = machine_facts()
    with Busy() as clock:
        measured = measure(options)
    record = measured | {
        "benchmark": "transfer_cost",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/transfer_cost.py", *sys.argv[1:]]),
        "commit": before["commit"],
        "machine": before["machine"],
        "gemm_gflops": max(before["gemm_gflops"], machine_facts()["gemm_gflops"]),
        "busy_elsewhere": clock.share,
        "settings": {
            "batch_size": BATCH,
            "steps": STEPS,
            "repeats": options.repeats,
            "threads": options.threads,
            "implicit": IMPLICIT,
            "domains": DOMAINS,
        },
    }
    record |= summary(record)
    show(record)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which medians are shown (default: 5)")
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="cores to use (default: all)")
    parser.add_argument("--peer-python", type=Path, help="interpreter with torch")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected a number >= 1")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What the processes say: one line a round and measurement."""
    peer = [str(interpreter(options.peer_python)), *PEER] if options.peer_python else None
    steps, trained, waves = [], [], []
    cases = {f"{tasks} {units}": (tasks, units) for tasks in TASKS for units in ENCODERS}
    with Worker(OURS) as ours, Worker(peer) as theirs:
        for turn, order in enumerate(schedule(list(cases), options.repeats)):
            for tasks, units in map(cases.get, order):
                asked = {"part": "step", "tasks": tasks, "encoder": units}
                seconds = {mode: ours.ask(mode=mode, **asked)["seconds"] for mode in (PLAIN, *MODES)}
                steps.append({"tasks": tasks, "encoder": list(units), "round": turn, "seconds": seconds})
                asked["part"] = "train"
                seconds = {name: ours.ask(strategy=name, **asked)["seconds"] for name in (PLAIN, *STRATEGIES)}
                trained.append({"tasks": tasks, "encoder": list(units), "round": turn, "seconds": seconds})
            for number in INNER_STEPS:
                seconds = {"ours": ours.ask(part="maml", inner_steps=number)["seconds"]}
                if peer:
                    seconds["torch"] = theirs.ask(inner_steps=number)["seconds"]
                waves.append({"inner_steps": number, "round": turn, "seconds": seconds})
            print(f"round {turn + 1} of {options.repeats}", file=sys.stderr, flush=True)
        facts = {
            "device": ours.facts["device"],
            "versions": theirs.facts.get("versions", {}) | ours.facts["versions"],
        }
    return facts | {"step_runs": steps, "train_runs": trained, "maml_runs": waves}


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Medians over the rounds of seconds and of quotients within a round, and the goals."""

    def medians(runs: Sequence[Mapping[str, Any]], reference: str) -> dict[str, Any]:
        seconds = {name: statistics.median(run["seconds"][name] for run in runs) for name in runs[0]["seconds"]}
        ratios = {
            name: statistics.median(run["seconds"][name] / run["seconds"][reference] for run in runs)
            for name in seconds
        }
        return {"seconds": seconds, "ratios": ratios}

    def by_case(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {"tasks": tasks, "encoder": list(units)}
            | medians([run for run in runs if (run["tasks"], tuple(run["encoder"])) == (tasks, units)], PLAIN)
            for tasks in TASKS
            for units in ENCODERS
        ]

    steps, trained = by_case(record["step_runs"]), by_case(record["train_runs"])
    waves = [
        {"inner_steps": number} | medians([run for run in record["maml_runs"] if run["inner_steps"] == number], "ours")
        for number in INNER_STEPS
    ]
    goals = []
    for mode, limit in MOST.items():
        worst = max(steps, key=lambda row, mode=mode: row["ratios"][mode])
        ratio = worst["ratios"][mode]
        where = f"{worst['tasks']} tasks, {worst['encoder']}"
        text = f"{mode} costs at most {limit} x a plain step"
        goals.append({"text": text, "worst": ratio, "where": where, "met": ratio <= limit})
    for row in waves:
        speed = row["ratios"].get("torch")
        text = f"MAML with {row['inner_steps']} inner steps is at least {LEAST:g} x as fast as torch.func"
        goals.append({"text": text, "worst": speed, "where": "sines", "met": None if speed is None else speed >= LEAST})
    return {"steps": steps, "trained": trained, "maml": waves, "goals": goals}


def show(record: Mapping[str, Any]) -> None:
    """Prints the tables, then what they mean."""
    for part, names in (("steps", (PLAIN, *MODES)), ("trained", (PLAIN, *STRATEGIES))):
        rows = [("tasks", "encoder", *(f"{name}, ms" for name in names))]
        for row in record[part]:
            cells = [f"{1e3 * row['seconds'][name]:.2f} ({row['ratios'][name]:.2f} x)" for name in names]
            rows.append((str(row["tasks"]), "-".join(map(str, row["encoder"])), *cells))
        print_table(rows, left=("encoder",))
        print()
    rows = [("MAML, inner steps", "ms", "torch.func, ms", "ours is")]
    for row in record["maml"]:
        seconds, speed = row["seconds"], row["ratios"].get("torch")
        theirs = ("", "") if speed is None else (f"{1e3 * seconds['torch']:.2f}", f"{speed:.2f} x")
        rows.append((str(row["inner_steps"]), f"{1e3 * seconds['ours']:.2f}", *theirs))
    print_table(rows, left=())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    print(
        f"\n{record['machine']['cpu']}, {record['settings']['threads']} cores; {record['device']}; {versions}; "
        f"{record['date']}"
    )
    if (busy := record["busy_elsewhere"] or 0.0) > QUIET:
        print(f"Other processes took up to {busy:.0%} of the cores. Measure again on a quiet machine")
    for goal in record["goals"]:
        verdict = (
            "not measured" if goal["met"] is None else f"{'met' if goal['met'] else 'missed'}, {goal['worst']:.2f} x"
        )
        print(f"{goal['text']}: {verdict} ({goal['where']}).")


if __name__ == "__main__":
    main()
