"""Many seeds of one model: on the run axis, by calls of fit in one process, and in processes of their own.

    python benchmarks/vectorised_runs.py              # 1, 4, 8, 16 seeds of a small and of a medium model: about an hour
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
import statistics
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

from benchmarks import machine  # noqa: E402  (runs as a script from anywhere)
from benchmarks.train_throughput import limit_threads, machine_facts, schedule  # noqa: E402
from benchmarks.vectorised_worker import CASES, generate  # noqa: E402

WAYS = {
    "vmap": "run axis, vmap",
    "map": "run axis, map",
    "fit": "fit after fit",
    "process": "a process each",
    "process_2": "a process each, 2 at a time",
}
PROCESSES = {"process": 1, "process_2": 2}
"""Way -> processes at a time, for the ways with a process a seed."""
QUICK = {"seeds": [1, 4], "epochs": {"small": 5, "medium": 1}, "rows": {"small": 9_600, "medium": 50_000}}
QUIET = 0.05
"""Share of the cores' time that others may take before the table says so."""
COLUMNS = (
    "model", "seeds", "", "whole s", "work s", "compiling s", "training s", "memory", "of the device",
    "speed, whole", "speed, work", "busy",
)  # fmt: skip


def main() -> None:
    options = parse(sys.argv[1:])
    limit_threads(options.threads)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        facts = [machine_facts()]
        for model in options.models:
            path = data_of(model, options, Path(folder))
            for count, turn, way in measurements(options):
                epochs = options.epochs or CASES[model].epochs
                if options.quick and not options.epochs:
                    epochs = QUICK["epochs"][model]
                run = measure(way, model, path, range(count), epochs, Path(folder))
                runs.append({"model": model, "seeds": count, "way": way, "round": turn, "epochs": epochs, **run})
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


def combined(parts: Sequence[Mapping[str, Any]], at_a_time: int) -> dict[str, Any]:
    """What processes measured, as one: times add up, and so does the memory of those that run together."""

    def together(name: str) -> int | None:
        peaks = sorted((part[name] for part in parts if part[name] is not None), reverse=True)
        return sum(peaks[:at_a_time]) if peaks else None

    times = {name: sum(part[name] for part in parts) for name in ("seconds", "compile_seconds", "train_seconds")}
    lists = {name: [value for part in parts for value in part[name]] for name in ("steps", "values")}
    peaks = {name: together(name) for name in ("peak_rss_bytes", "device_peak_bytes")}
    return times | lists | peaks | {name: parts[0][name] for name in ("device", "versions")}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and what the goals are about.

    Returns:
      ``rows``: one a model, number of seeds and way, with ``speed_whole`` and ``speed_work`` relative to ``fit`` after
      ``fit`` (medians of the quotients within a round; above 1 is faster).
      ``better_axis``: for each model and number of seeds, the faster of the two axes and its speeds.
      ``growth``: for each model, the time of the most seeds under ``vmap`` over that of one seed.
      ``largest_difference``: of a seed's monitor between ``fit`` and another way.

    Raises:
      ValueError: Seeds of one model made different numbers of steps.
    """
    groups: dict[tuple, dict[str, dict[int, Mapping]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["seeds"]), {}).setdefault(run["way"], {})[run["round"]] = run
    rows, better, difference = [], [], 0.0
    for (model, count), ways in groups.items():
        own = {way: _row(by_round, ways.get("fit", {})) for way, by_round in ways.items()}
        rows += [{"model": model, "seeds": count, "way": way, **row} for way, row in own.items()]
        axes = {way: row for way, row in own.items() if way in ("vmap", "map")}
        if axes and count > 1:
            best = min(axes, key=lambda way: axes[way]["seconds"])
            process = own.get("process", {}).get("whole_seconds")
            better.append(
                {"model": model, "seeds": count, "axis": best}
                | {name: axes[best][name] for name in ("speed_whole", "speed_work")}
                | {"speed_of_processes": process and process / axes[best]["whole_seconds"]}
            )
        for by_round in ways.values():
            for turn, run in by_round.items():
                known = ways.get("fit", {}).get(turn, run)
                pairs = zip(run["values"], known["values"], strict=True)
                difference = max([difference, *(abs(value - other) for value, other in pairs)])
    for model in {model for model, _ in groups}:
        steps = {step for run in runs if run["model"] == model for step in run["steps"]}
        if len(steps) > 1:
            raise ValueError(
                f"the runs of '{model}' made {sorted(steps)} steps; expected one number. Do not compare them"
            )
    return {"rows": rows, "better_axis": better, "growth": _growth(rows), "largest_difference": difference}


def _row(by_round: Mapping[int, Mapping], fits: Mapping[int, Mapping]) -> dict[str, Any]:
    def median(name: str) -> float | None:
        values = [run[name] for run in by_round.values() if run[name] is not None]
        return statistics.median(values) if values else None

    def speed(name: str) -> float | None:
        quotients = [fits[turn][name] / run[name] for turn, run in by_round.items() if turn in fits]
        return statistics.median(quotients) if quotients else None

    names = ("whole_seconds", "seconds", "compile_seconds", "train_seconds", "peak_rss_bytes", "device_peak_bytes")
    busy = max((run["busy_elsewhere"] or 0.0 for run in by_round.values()), default=0.0)
    speeds = {"speed_whole": speed("whole_seconds"), "speed_work": speed("seconds")}
    return {name: median(name) for name in names} | speeds | {"busy_elsewhere": busy}


def _growth(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    found = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        by_seeds = {row["seeds"]: row for row in rows if row["model"] == model and row["way"] == "vmap"}
        if 1 in by_seeds and len(by_seeds) > 1:
            most = by_seeds[max(by_seeds)]
            names = ("whole_seconds", "seconds", "train_seconds")
            found[model] = {"seeds": most["seeds"]} | {name: most[name] / by_seeds[1][name] for name in names}
    return found


def progress(run: Mapping[str, Any]) -> str:
    return (
        f"{run['model']:7} {run['seeds']:3} seeds  round {run['round'] + 1}  {WAYS[run['way']]:28}"
        f"{run['whole_seconds']:8.1f} s, compiling {run['compile_seconds']:.1f} s, training {run['train_seconds']:.1f} s"
    )


def table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a model, number of seeds and way, under ``COLUMNS``."""

    def mebibytes(value: float | None) -> str:
        return "" if value is None else f"{value / 2**20:,.0f} MiB"

    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f} x"

    return [
        (
            row["model"],
            str(row["seeds"]),
            WAYS[row["way"]],
            *(f"{row[name]:.1f}" for name in ("whole_seconds", "seconds", "compile_seconds", "train_seconds")),
            mebibytes(row["peak_rss_bytes"]),
            mebibytes(row["device_peak_bytes"]),
            times(row["speed_whole"]),
            # Work of processes that run together overlaps.
            times(None if row["way"] in PROCESSES else row["speed_work"]),
            f"{row['busy_elsewhere']:.0%}",
        )
        for row in record["rows"]
    ]


def caption(record: Mapping[str, Any]) -> list[str]:
    """What the goals are about, in sentences, and what was measured where."""
    lines = []
    for better in record["better_axis"]:
        compared = {"fit after fit": better["speed_work"], "a process each": better["speed_of_processes"]}
        shown = ", ".join(f"{value:.2f} x {name}" for name, value in compared.items() if value is not None)
        lines.append(f"{better['seeds']} seeds of the {better['model']} model, on {better['axis']}: {shown}")
    for model, growth in record["growth"].items():
        lines.append(
            f"{growth['seeds']} seeds of the {model} model under vmap take {growth['seconds']:.2f} x the work of one, "
            f"{growth['train_seconds']:.2f} x its training"
        )
    busy = max(row["busy_elsewhere"] for row in record["rows"])
    if busy > QUIET:
        lines.append(f"Other processes took up to {busy:.0%} of the cores: measure again on a quiet machine")
    lines.append(
        f"{record['machine']['cpu']}, {record['threads']} cores, matrix product {record['gemm_gflops']:.0f} GFLOP/s; "
        f"{record['device']}; monitors agree to {record['largest_difference']:.1e}; commit {record['commit']}, "
        f"{record['date']}"
    )
    return lines


def show(record: Mapping[str, Any]) -> None:
    rows = table(record)
    widths = [max(len(row[k]) for row in (COLUMNS, *rows)) for k in range(len(COLUMNS))]
    for row in (COLUMNS, *rows):
        print("  ".join(cell.ljust(width) if k in (0, 2) else cell.rjust(width)
                        for k, (cell, width) in enumerate(zip(row, widths, strict=True))))  # fmt: skip
    print("\n".join(["", *caption(record)]))


if __name__ == "__main__":
    main()
