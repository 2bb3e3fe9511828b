"""What balancing costs: train steps under every method against the step of `equal`, next to TorchJD; and the solvers alone.

    python benchmarks/balancing_cost.py                                   # 2, 4, 8 tasks, two encoders, all methods
    python benchmarks/balancing_cost.py --peer-python PEERS/bin/python    # next to TorchJD, in an environment of its own
    python benchmarks/balancing_cost.py --quick                           # 2 and 4 tasks, the small encoder, few methods
    python benchmarks/balancing_cost.py --methods pcgrad nash_mtl --tasks 8 --encoders 64-32 --json OUT.json

To be reached, on a CPU with two cores:

- scope `representation`, methods that weigh by the Gramian of one batch: a step takes at most 1.4 x that of `equal` with 2
  and 4 tasks, 1.5 x with 8;
- scope `encoder`, `pcgrad`, `mgda`, `upgrad` and `cagrad`: steps are 1.5 x as fast as TorchJD's with 2 tasks, and as fast
  with 4 and 8;
- scope `encoder`, `nash_mtl`: 5 x as fast as TorchJD's with 2 and 4 tasks, 2 x with 8.

The sentences below the tables say of each whether it is met. Every number of tasks and encoder has fresh processes, one
of ours and one of TorchJD's, which wait for each other. benchmarks/README.md says what is equal between the two, how
TorchJD's environment is made and what the columns mean.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine
from benchmarks.balancing_summary import TIMES, show, summary
from benchmarks.balancing_worker import METHODS, Case
from benchmarks.train_throughput import limit_threads, machine_facts, schedule

TASKS, ENCODERS, SOLVER_TASKS = [2, 4, 8], ["64-32", "256-128"], [2, 4, 8, 16, 32, 64]
QUICK = {
    "tasks": [2, 4],
    "encoders": ["64-32"],
    "methods": ["famo", "pcgrad", "nash_mtl"],
    "solver_tasks": [2, 4],
    "repeats": 2,
}
OURS = [sys.executable, "-m", "benchmarks.balancing_worker"]
PEER = ["-m", "benchmarks.balancing_torch"]
NOT_ASKED = "TorchJD was not measured: no --peer-python was given"


def main() -> None:
    options = parse(sys.argv[1:])
    peer, told = peer_command(options.peer_python)
    print(told, file=sys.stderr)
    limit_threads(options.threads)
    facts, runs, busy, about = [machine_facts()], [], [], {}
    for tasks in options.tasks:
        for encoder in options.encoders:
            units = tuple(map(int, encoder.split("-")))
            given = {key: getattr(options, key) for key in ("batch_size", "steps", "row_stride", "update_every")}
            case = Case(tasks=tasks, units=units, **given)
            with Busy() as clock:
                runs += measured_steps(case, options, peer, about)
            busy.append(clock.share)
    with Busy() as clock:
        solvers = list(measured_solvers(options))
    facts.append(machine_facts())
    record = summary(runs, solvers) | {
        "benchmark": "balancing_cost",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/balancing_cost.py", *sys.argv[1:]]),
        "commit": facts[0]["commit"],
        "machine": facts[0]["machine"],
        "gemm_gflops": max(fact["gemm_gflops"] for fact in facts),
        "busy_elsewhere": max((share for share in [*busy, clock.share] if share is not None), default=None),
        "peer": told,
        **about,
        "settings": {
            "batch_size": options.batch_size,
            "steps": options.steps,
            "repeats": options.repeats,
            "threads": options.threads,
            "row_stride": options.row_stride,
            "update_every": options.update_every,
        },
        "runs": runs,
        "solver_runs": solvers,
    }
    show(record)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three methods, few sizes, two rounds")
    parser.add_argument("--tasks", nargs="+", type=int, help=f"numbers of tasks (default: {_listed(TASKS)})")
    parser.add_argument("--encoders", nargs="+", help=f"widths of the shared layers (default: {_listed(ENCODERS)})")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", help="default: all")
    parser.add_argument(
        "--solver-tasks", nargs="*", type=int, help=f"of the solvers alone (default: {_listed(SOLVER_TASKS)})"
    )
    parser.add_argument("--repeats", type=int, help="rounds, of which medians are shown (default: 5)")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32, help="of a measurement, in one compiled call (default: 32)")
    parser.add_argument(
        "--row-stride", type=int, default=1, help="ours compares gradients on every n-th row (balancing.row_stride)"
    )
    parser.add_argument(
        "--update-every", type=int, default=1, help="ours compares them every n-th step (balancing.update_every)"
    )
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="cores to use (default: all)")
    parser.add_argument("--peer-python", type=Path, help="interpreter with torch and torchjd[full]")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    full = {
        "tasks": TASKS, "encoders": ENCODERS, "methods": list(METHODS), "solver_tasks": SOLVER_TASKS, "repeats": 5
    }  # fmt: skip
    for name, value in (full | (QUICK if options.quick else {})).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in (
        "tasks", "solver_tasks", "repeats", "batch_size", "steps", "threads", "row_stride", "update_every"
    ):  # fmt: skip
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value], default=1) < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected numbers >= 1")
    for encoder in options.encoders:
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", encoder):
            parser.error(f"--encoders has '{encoder}'; expected widths such as 64-32")
    options.methods = list(dict.fromkeys(["equal", *options.methods]))
    return options


def peer_command(python: Path | None) -> tuple[list[str] | None, str]:
    """The command of TorchJD's process, or None; and a line about it."""
    if python is None:
        return None, NOT_ASKED
    python = interpreter(python)
    done = subprocess.run([python, "-c", "import torch, torchjd.autojac"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return None, f"TorchJD was not measured: {python} cannot import it ({reason})"
    return [str(python), *PEER], f"TorchJD is measured by {python}"


def interpreter(python: Path) -> Path:
    """The absolute path of a Python that can be run; not resolved, as an environment is known by the path of its link."""
    python = python.absolute()
    if not os.access(python, os.X_OK):
        raise SystemExit(
            f"--peer-python {python} cannot be run; expected a Python interpreter. Make an environment as "
            "benchmarks/README.md says"
        )
    return python


def measured_steps(
    case: Case, options: argparse.Namespace, peer: Sequence[str] | None, about: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One line a round, method and scope: seconds of a step, of that of ``equal`` beside it, and of TorchJD's."""
    arguments = case.arguments(options.methods)
    with Worker([*OURS, *arguments]) as ours, Worker([*peer, *arguments] if peer else None) as theirs:
        entries = {f"{entry['method']} {entry['scope']}": entry for entry in ours.facts["entries"]}
        about |= {"device": ours.facts["device"], "versions": ours.facts["versions"] | theirs.facts.get("versions", {})}
        about.setdefault("peer_missing", {}).update(theirs.facts.get("missing", {}))
        for turn, order in enumerate(schedule(list(entries), options.repeats)):
            for entry in map(entries.get, order):
                visit = visit_of(entry, ours, theirs)
                found = {name: visit[name]() for name in (list(visit) if turn % 2 == 0 else reversed(visit))}
                yield {
                    "tasks": case.tasks,
                    "encoder": case.name,
                    "round": turn,
                    **entry,
                    **{name: found[name]["seconds"] if name in found else None for name in TIMES},
                    "settings": found.get("quickest", {}).get("settings"),
                }
            told = f"{case.tasks} tasks, {case.name}: round {turn + 1} of {options.repeats}"
            print(told, file=sys.stderr, flush=True)


def visit_of(entry: Mapping[str, Any], ours: "Worker", theirs: "Worker") -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured together, so that a quotient is of times that lie close to each other."""
    method, scope = entry["method"], entry["scope"]
    visit = {
        "equal": lambda: ours.ask(method="equal"),
        "ours": lambda: ours.ask(method=method, scope=scope),
    }
    if method in theirs.facts.get("methods", ()) and scope != "representation":
        visit |= {
            "peer_sum": lambda: theirs.ask(method="equal", way="documented"),
            "documented": lambda: theirs.ask(method=method, way="documented"),
            "quickest": lambda: theirs.ask(method=method, way="quickest"),
        }
    return visit


def measured_solvers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One line a round, method and number of tasks: seconds of one call of the solver."""
    for tasks in options.solver_tasks:
        case = Case(tasks=tasks, units=(1,), batch_size=1, steps=1)
        with Worker([*OURS, *case.arguments(options.methods)]) as ours:
            by_gramian = [
                entry for entry in ours.facts["entries"] if entry["needs"] == "gramian" and not entry["owns_step"]
            ]
            names = list(dict.fromkeys(entry["method"] for entry in by_gramian))
            for turn, order in enumerate(schedule(names, options.repeats)):
                for name in order:
                    yield {"tasks": tasks, "method": name, "round": turn, **ours.ask(method=name, solver=tasks)}
            print(f"solvers of {tasks} tasks", file=sys.stderr, flush=True)


class Worker:
    """A process that answers one request at a time; without a command there is none, and it has no facts.

    Attributes:
      facts: What it says first.
    """

    def __init__(self, command: Sequence[str] | None):
        self.command, self.facts = command, {}

    def __enter__(self) -> "Worker":
        if self.command:
            self.errors = tempfile.TemporaryFile("w+")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
            # As train_throughput's loop in PyTorch has it: no step pays for fresh pages.
            kept = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
            self.process = subprocess.Popen(self.command, **pipes, text=True, cwd=ROOT, env=os.environ | kept)
            try:
                self.facts = self._read()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.command:
            try:
                self.process.stdin.close()
            except BrokenPipeError:
                pass  # it ended before it read the last request
            self.process.stdout.close()
            self.process.wait()
            self.errors.close()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # reading says why
        return self._read()

    def _read(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        last = self.errors.read()[-2000:]
        raise SystemExit(f"{shlex.join(self.command)} ended with {self.process.returncode}; its last lines:\n{last}")


class Busy:
    """The share of the usable cores' time that others took in a block, once its processes have ended; None: unknown."""

    share: float | None = None

    def __enter__(self) -> "Busy":
        self.start, self.busy, self.ours = time.perf_counter(), machine.busy_seconds(), own_seconds()
        return self

    def __exit__(self, *error: object) -> None:
        if self.busy is not None:
            available = (time.perf_counter() - self.start) * machine.usable_cores()
            others = machine.busy_seconds() - self.busy - own_seconds() + self.ours
            self.share = max(0.0, others / available)


def own_seconds() -> float:
    """Seconds that this process and its ended children have worked."""
    return machine.children_seconds() + time.process_time()


def _listed(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    main()
