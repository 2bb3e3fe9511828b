"""Training speed of one MMoE on MovieLens 1M: mtl_jax, torch-rechub and a careful PyTorch loop, in alternation.

    python benchmarks/train_throughput.py                                        # our row only
    python benchmarks/train_throughput.py --peer-python PEERS/bin/python         # with the peers
    python benchmarks/train_throughput.py --peer-python PEERS/bin/python --quick # a quarter of the rows, one round

Every competitor runs in a process of its own, one at a time, on the same arrays. benchmarks/README.md says how the
peers' environment is made, what is equal between the competitors and what is not.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine, worker
from benchmarks.ours import run_ours

OURS = "mtl_jax"
PEERS = {"rechub": "rechub.py", "torch_loop": "torch_loop.py"}
QUIET = 0.05
"""Share of the cores' time that other processes may take before the table says so."""
COLUMNS = ("", "examples/s", "range", "ours is", "GFLOP/s", "of GEMM", "AUC click", "AUC like", "warm-up", "memory")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker.main(run_ours, run_ours.__doc__, sys.argv[2:])
        return
    options = parse(sys.argv[1:])
    competitors = commands(options.peer_python)
    limit_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = options.data or write_movielens(Path(folder) / "movielens_1m.npz")
        if options.quick:
            path = write_quarter(path, Path(folder) / "quarter.npz")
        facts, runs = [machine_facts()], []
        for turn, order in enumerate(schedule(list(competitors), options.repeats)):
            for name in order:
                result = run(competitors[name], path, Path(folder) / "result.json", options, seed=options.seed + turn)
                runs.append({"name": name, "round": turn, **result})
                print(f"round {turn + 1}  {name:12}{result['examples_per_second']:10,.0f} examples/s", file=sys.stderr)
            facts.append(machine_facts())
        data = worker.load(path)
    record = summary(
        runs,
        flop_per_example=worker.training_flop(worker.input_width(data)),
        gemm_gflops=max(fact["gemm_gflops"] for fact in facts),
    ) | {
        "benchmark": "train_throughput",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/train_throughput.py", *sys.argv[1:]]),
        "commit": facts[0]["commit"],
        "machine": facts[0]["machine"],
        "settings": {
            "train_rows": len(data["train_ids"]),
            "test_rows": len(data["test_ids"]),
            "batch_size": options.batch_size,
            "epochs": options.epochs,
            "repeats": options.repeats,
            "seed": options.seed,
            "threads": options.threads,
        },
        "runs": runs,
    }
    show(table(record), caption(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="interpreter with benchmarks/peers/requirements.txt installed")
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows and one round: under three minutes")
    parser.add_argument("--data", type=Path, help="arrays of an earlier run (.npz) instead of the downloaded data set")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs, after one that warms up (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, each with all competitors (default: 3)")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; round r has seed + r (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="of every competitor (default: 2)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(arguments)
    for name in ("epochs", "repeats", "batch_size", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; expected a number >= 1")
    if options.quick:
        options.repeats = 1
    return options


def commands(peer_python: Path | None) -> dict[str, list[str]]:
    """The command of every competitor's process; the peers only with an interpreter for them."""
    ours = {OURS: [sys.executable, str(ROOT / "benchmarks" / "train_throughput.py"), "--worker"]}
    if peer_python is None:
        return ours
    if not os.access(peer_python, os.X_OK):
        raise SystemExit(
            f"--peer-python {peer_python} cannot be run; expected a Python interpreter. Make an environment and "
            "install benchmarks/peers/requirements.txt into it"
        )
    return ours | {name: [str(peer_python), str(ROOT / "benchmarks" / "peers" / file)] for name, file in PEERS.items()}


def limit_threads(threads: int) -> None:
    """Bounds the cores of this process and its children; XLA goes by the cores, the others by the variables too."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)


def write_movielens(path: Path) -> Path:
    """Writes the benchmark's arrays from the data set, which is fetched if it is not in the cache."""
    from mtl_jax.data import load

    dataset = load("movielens_1m", recipe="plain", split="rows", download=True)
    schema, arrays = dataset.schema, {}
    for part, rows in (("train", dataset.for_training().train), ("test", dataset.open_test())):
        arrays[f"{part}_ids"], arrays[f"{part}_dense"] = rows.ids, rows.dense
        arrays[f"{part}_labels"] = np.stack([rows.labels[task] for task in worker.TASKS], axis=1)
    sizes = [schema.vocabulary(feature.vocabulary).size for feature in schema.categoricals]
    np.savez(path, table_sizes=np.array(sizes), **arrays)
    return path


def write_quarter(source: Path, path: Path) -> Path:
    """A random quarter of the training rows and of the test rows."""
    data = worker.load(source)
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        num_rows = len(data[f"{part}_ids"])
        chosen = generator.permutation(num_rows)[: num_rows // 4]
        data |= {f"{part}_{name}": data[f"{part}_{name}"][chosen] for name in ("ids", "dense", "labels")}
    np.savez(path, **data)
    return path


def schedule(names: Sequence[str], repeats: int) -> list[list[str]]:
    """The order in every round. It rotates, so that none always runs first or behind the same one's heat."""
    return [[names[(turn + k) % len(names)] for k in range(len(names))] for turn in range(repeats)]


def run(command: Sequence[str], data: Path, out: Path, options: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """The result of one competitor's process, and the share of the cores' time that others took meanwhile."""
    arguments = [str(data), "--epochs", str(options.epochs), "--batch-size", str(options.batch_size)]
    start, busy, ours = time.perf_counter(), machine.busy_seconds(), machine.children_seconds()
    output([*command, *arguments, "--seed", str(seed), "--json", str(out)])
    available = (time.perf_counter() - start) * machine.usable_cores()
    elsewhere = None
    if busy is not None:
        elsewhere = max(0.0, (machine.busy_seconds() - busy - machine.children_seconds() + ours) / available)
    return json.loads(out.read_text()) | {"busy_elsewhere": elsewhere}


def machine_facts() -> dict[str, Any]:
    """Of a process of its own, because NumPy's library counts its threads when it is loaded."""
    return json.loads(output([sys.executable, str(ROOT / "benchmarks" / "machine.py")]))


def output(command: Sequence[str]) -> str:
    """Standard output of a process that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode}; its last lines:\n{done.stderr[-2000:]}")
    return done.stdout


def summary(runs: Sequence[Mapping[str, Any]], *, flop_per_example: int, gemm_gflops: float) -> dict[str, Any]:
    """Medians over the rounds, by competitor.

    ``ratios`` are our speed over a peer's: the median of the quotients within a round, whose runs lie close in time.

    Args:
      runs: What the competitors' processes wrote, with ``name`` and ``round``.
      flop_per_example: See :func:`benchmarks.worker.training_flop`.
      gemm_gflops: The machine's rate of float32 matrix products.
    """
    names = list(dict.fromkeys(run["name"] for run in runs))
    by_name = {name: {run["round"]: run for run in runs if run["name"] == name} for name in names}

    def median(key: str) -> dict[str, float]:
        return {name: statistics.median(run[key] for run in by_name[name].values()) for name in names}

    speed = median("examples_per_second")
    gflops = {name: rate * flop_per_example / 1e9 for name, rate in speed.items()}
    return {
        "examples_per_second": speed,
        "ratios": {
            f"{OURS}/{name}": statistics.median(
                by_name[OURS][turn]["examples_per_second"] / peer["examples_per_second"]
                for turn, peer in by_name[name].items()
            )
            for name in names
            if name != OURS and OURS in by_name
        },
        "flop_per_example": flop_per_example,
        "gflops": gflops,
        "gemm_gflops": gemm_gflops,
        "share_of_gemm": {name: rate / gemm_gflops for name, rate in gflops.items()},
        "warmup_seconds": median("warmup_seconds"),
        "peak_rss_bytes": median("peak_rss_bytes"),
        "test_auc": {
            name: {
                task: statistics.median(run["test_auc"][task] for run in by_name[name].values())
                for task in worker.TASKS
            }
            for name in names
        },
        "versions": {name: next(iter(by_name[name].values()))["versions"] for name in names},
    }


def table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a competitor, under ``COLUMNS``."""
    rows = []
    for name, speed in record["examples_per_second"].items():
        rates = [run["examples_per_second"] for run in record["runs"] if run["name"] == name]
        ratio = record["ratios"].get(f"{OURS}/{name}")
        rows.append(
            (
                name,
                f"{speed:,.0f}",
                f"{min(rates):,.0f} - {max(rates):,.0f}",
                "" if ratio is None else f"{ratio:.2f} x",
                f"{record['gflops'][name]:.0f}",
                f"{record['share_of_gemm'][name]:.0%}",
                *(f"{record['test_auc'][name][task]:.4f}" for task in worker.TASKS),
                f"{record['warmup_seconds'][name]:.1f} s",
                f"{record['peak_rss_bytes'][name] / 2**20:,.0f} MiB",
            )
        )
    return rows


def caption(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    busy = max((run["busy_elsewhere"] or 0.0 for run in record["runs"]), default=0.0)
    warning = (
        f"Other processes took up to {busy:.0%} of the cores: threads that wait for each other in OpenMP then lose far "
        "more than that, and the ratios say nothing. Measure again on a quiet machine. "
    )
    return (warning if busy > QUIET else "") + (
        f"{record['machine']['cpu']}, {settings['threads']} threads, matrix product {record['gemm_gflops']:.0f} GFLOP/s; "
        f"{settings['train_rows']:,} rows, {settings['epochs']} epochs after one that warms up, "
        f"{settings['repeats']} rounds; {record['flop_per_example'] / 1e6:.2f} MFLOP an example; "
        f"commit {record['commit']}, {record['date']}"
    )


def show(rows: Sequence[Sequence[str]], note: str) -> None:
    """Prints the table, with rich where it is installed."""
    try:
        from rich import box, console, table
    except ImportError:
        widths = [max(len(row[k]) for row in (COLUMNS, *rows)) for k in range(len(COLUMNS))]
        for row in (COLUMNS, *rows):
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
        print(note)
        return
    grid = table.Table(box=box.SIMPLE, caption=note, caption_justify="left")
    for name in COLUMNS:
        grid.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    console.Console(width=None if sys.stdout.isatty() else 140).print(grid)


if __name__ == "__main__":
    main()
