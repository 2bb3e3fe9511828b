"""The record of benchmarks/vectorised_runs.py: medians and ratios of what was measured, as a table and in sentences."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

WAYS = {
    "vmap": "run axis, vmap",
    "map": "run axis, map",
    "fit": "fit after fit",
    "process": "a process each",
    "process_2": "a process each, 2 at a time",
}
PROCESSES = {"process": 1, "process_2": 2}
"""Way -> processes at a time, for the ways with a process a seed."""
QUIET = 0.05
"""Share of the cores' time that others may take before the table says so."""
COLUMNS = (
    "model", "seeds", "way", "whole s", "work s", "compiling s", "training s", "memory", "on device",
    "speed, whole", "of work", "of training", "busy",
)  # fmt: skip


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and what the goals are about.

    Returns:
      ``rows``: one a model, number of seeds and way, with ``speed_whole``, ``speed_work`` and ``speed_training`` relative
      to ``fit`` after ``fit`` (medians of the quotients within a round; above 1 is faster).
      ``better_axis``: for each model and number of seeds, the faster of the two axes and its speeds.
      ``growth``: for each model, the time of the most seeds under ``vmap`` over that of one seed.
      ``largest_difference``: of a seed's monitor between ``fit`` and another way.

    Raises:
      ValueError: Seeds of one model made different numbers of steps.
    """
    groups: dict[tuple, dict[str, dict[int, Mapping]]] = {}
    for run in runs:
        groups.setdefault((run["model"], run["seeds"]), {}).setdefault(run["way"], {})[run["round"]] = run
    rows, better = [], []
    for (model, count), ways in groups.items():
        own = {way: _row(by_round, ways.get("fit", {})) for way, by_round in ways.items()}
        rows += [{"model": model, "seeds": count, "way": way, **row} for way, row in own.items()]
        axes = {way: row for way, row in own.items() if way in ("vmap", "map")}
        if axes and count > 1:
            best = min(axes, key=lambda way: axes[way]["seconds"])
            process = own.get("process", {}).get("whole_seconds")
            better.append(
                {"model": model, "seeds": count, "axis": best}
                | {name: axes[best][name] for name in ("speed_whole", "speed_work", "speed_training")}
                | {"speed_of_processes": process and process / axes[best]["whole_seconds"]}
            )
    _check_steps(runs)
    difference = max(_differences(groups), default=0.0)
    return {"rows": rows, "better_axis": better, "growth": _growth(rows), "largest_difference": difference}


def _differences(groups: Mapping[tuple, Mapping[str, Mapping[int, Mapping]]]) -> Iterator[float]:
    for ways in groups.values():
        for by_round in ways.values():
            for turn in by_round.keys() & ways.get("fit", {}).keys():
                pairs = zip(by_round[turn]["values"], ways["fit"][turn]["values"], strict=True)
                yield from (abs(value - other) for value, other in pairs)


def _check_steps(runs: Sequence[Mapping[str, Any]]) -> None:
    for model in {run["model"] for run in runs}:
        steps = {step for run in runs if run["model"] == model for step in run["steps"]}
        if len(steps) > 1:
            raise ValueError(
                f"the runs of '{model}' made {sorted(steps)} steps; expected one number. Do not compare them"
            )


def _row(by_round: Mapping[int, Mapping], fits: Mapping[int, Mapping]) -> dict[str, Any]:
    def median(name: str) -> float | None:
        values = [run[name] for run in by_round.values() if run[name] is not None]
        return statistics.median(values) if values else None

    def speed(name: str) -> float | None:
        quotients = [fits[turn][name] / run[name] for turn, run in by_round.items() if turn in fits]
        return statistics.median(quotients) if quotients else None

    names = ("whole_seconds", "seconds", "compile_seconds", "train_seconds", "peak_rss_bytes", "device_peak_bytes")
    busy = max((run["busy_elsewhere"] or 0.0 for run in by_round.values()), default=0.0)
    speeds = {"whole": "whole_seconds", "work": "seconds", "training": "train_seconds"}
    speeds = {f"speed_{name}": speed(seconds) for name, seconds in speeds.items()}
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


def combined(parts: Sequence[Mapping[str, Any]], at_a_time: int) -> dict[str, Any]:
    """What processes measured, as one: times add up, and so does the memory of those that run together."""

    def together(name: str) -> int | None:
        peaks = sorted((part[name] for part in parts if part[name] is not None), reverse=True)
        return sum(peaks[:at_a_time]) if peaks else None

    times = {name: sum(part[name] for part in parts) for name in ("seconds", "compile_seconds", "train_seconds")}
    lists = {name: [value for part in parts for value in part[name]] for name in ("steps", "values")}
    peaks = {name: together(name) for name in ("peak_rss_bytes", "device_peak_bytes")}
    return times | lists | peaks | {name: parts[0][name] for name in ("device", "versions")}


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
            *(times(None if row["way"] in PROCESSES else row[name]) for name in ("speed_work", "speed_training")),
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
    names = (COLUMNS.index("model"), COLUMNS.index("way"))
    for row in (COLUMNS, *rows):
        cells = [cell.ljust(widths[k]) if k in names else cell.rjust(widths[k]) for k, cell in enumerate(row)]
        print("  ".join(cells))
    print("\n".join(["", *caption(record)]))
