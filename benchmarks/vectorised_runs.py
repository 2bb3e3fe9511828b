"""Many seeds of one model: on the run axis, by calls of fit in one process, and in processes of their own.

    python benchmarks/vectorised_runs.py              # 1, 4, 8, 16 seeds of a small and of a medium model: 45 minutes
    python benchmarks/vectorised_runs.py --quick      # 1 and 4 seeds, shorter training: a few minutes on two cores
    python benchmarks/vectorised_runs.py --models small --seeds 1 16 --json OUT.json

Every measurement starts from fresh processes, so that no compiled program is left over. All ways make the same steps with
the same data orders. benchmarks/README.md says what the columns mean and which numbers are to be reached.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine
from benchmarks.train_throughput import limit_threads, machine_facts, schedule
from benchmarks.vectorised_summary import PROCESSES, WAYS, combined, show, summary
from benchmarks.vectorised_worker import CASES, generate

QUICK = {"seeds": [1, 4], "epochs": {"small": 5, "medium": 1}, "rows": {"small": 9_600, "medium": 50_000}}


def main() -> None:
    options = parse(sys.argv[1:])
    limit_threads(options.threads)
    runs, settings = [], {}
    with tempfile.TemporaryDirectory() as folder:
        facts = [machine_facts()]
        for model in options.models:
            path, epochs = data_of(model, options, Path(folder)), epochs_of(model, options)
            settings[model] = {"train_rows": num_rows(path), "epochs": epochs, "batch_size": CASES[model].batch_size}
            for count, turn, way in measurements(options):
                run = measure(way, model, path, range(count), epochs, Path(folder))
                runs.append({"model": model, "seeds": count, "way": way, "round": turn, **run})
                print(progress(runs[-1]), file=sys.stderr, flush=True)
        facts.append(machine_facts())
    record = summary(runs) | {
        "benchmark": "vectorised_runs",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/vectorised_runs.py", *sys.argv[1:]]),
        "commit": facts[0]["commit"],
        "machine": facts[0]["machine"],
        "device": runs[0]["device"],
        "versions": runs[0]["versions"],
        "gemm_gflops": max(fact["gemm_gflops"] for fact in facts),
        "threads": options.threads,
        "settings": settings,
        "runs": runs,
    }
    show(record)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 4 seeds, few epochs")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="numbers of seeds (default: 1 4 8 16)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--repeats", type=int, default=1, help="rounds, of which medians are shown (default: 1)")
    parser.add_argument("--epochs", type=int, help="of every seed (default: small 20, medium 3)")
    parser.add_argument(
        "--rows", type=int, help="training rows that are generated (default: small 9,600, medium 200,000)"
    )
    parser.add_argument(
        "--data", type=Path, help="arrays for the medium model (.npz), as train_throughput.py takes them"
    )
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="cores to use (default: all)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or (QUICK["seeds"] if options.quick else [1, 4, 8, 16])
    for name in ("repeats", "threads", "epochs", "rows"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}; expected a number >= 1")
    if min(options.seeds) < 1:
        parser.error(f"--seeds is {options.seeds}; expected numbers >= 1")
    return options


def data_of(model: str, options: argparse.Namespace, folder: Path) -> Path:
    """The arrays of a model, which are generated where no file was given."""
    if model == "medium" and options.data:
        return options.data.resolve()
    rows = options.rows or (QUICK["rows"][model] if options.quick else CASES[model].num_rows)
    path = folder / f"{model}.npz"
    np.savez(path, **generate(CASES[model], rows))
    return path


def num_rows(path: Path) -> int:
    with np.load(path) as arrays:
        return len(arrays["train_ids"])


def epochs_of(model: str, options: argparse.Namespace) -> int:
    return options.epochs or (QUICK["epochs"][model] if options.quick else CASES[model].epochs)


def measurements(options: argparse.Namespace) -> Iterator[tuple[int, int, str]]:
    """Number of seeds, round and way, in an order that lets no way always run first."""
    for count in options.seeds:
        # One process is one at a time.
        ways = [way for way in options.ways if PROCESSES.get(way, 1) <= count]
        for turn, order in enumerate(schedule(ways, options.repeats)):
            for way in order:
                yield count, turn, way


def measure(way: str, model: str, data: Path, seeds: Sequence[int], epochs: int, folder: Path) -> dict[str, Any]:
    """One way, from the start of its first process to the end of its last one."""
    groups = [[seed] for seed in seeds] if way in PROCESSES else [list(seeds)]
    at_a_time = PROCESSES.get(way, 1)
    # Else the first process on a GPU would leave no memory for the second.
    env = os.environ | ({"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.75 / at_a_time}"} if at_a_time > 1 else {})

    def train(group: Sequence[int]) -> dict[str, Any]:
        out = folder / f"{group[0]}.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.vectorised_worker",
            str(data),
            "--model",
            model,
            "--json",
            str(out),
        ]
        command += ["--way", "fit" if way in PROCESSES else way, "--epochs", str(epochs), "--seeds", *map(str, group)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        if done.returncode:
            raise SystemExit(
                f"{shlex.join(command)} ended with {done.returncode}; its last lines:\n{done.stderr[-2000:]}"
            )
        return json.loads(out.read_text())

    start, busy, ours = time.perf_counter(), machine.busy_seconds(), machine.children_seconds()
    with ThreadPoolExecutor(at_a_time) as pool:
        parts = list(pool.map(train, groups))
    seconds = time.perf_counter() - start
    elsewhere = None
    if busy is not None:
        others = machine.busy_seconds() - busy - machine.children_seconds() + ours
        elsewhere = max(0.0, others / (seconds * machine.usable_cores()))
    return combined(parts, at_a_time) | {"whole_seconds": seconds, "busy_elsewhere": elsewhere}


def progress(run: Mapping[str, Any]) -> str:
    return (
        f"{run['model']:7} {run['seeds']:3} seeds  round {run['round'] + 1}  {WAYS[run['way']]:28}"
        f"{run['whole_seconds']:8.1f} s, compiling {run['compile_seconds']:.1f} s, training {run['train_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
