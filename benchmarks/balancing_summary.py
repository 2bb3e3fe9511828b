"""The record of benchmarks/balancing_cost.py: medians and ratios of what was measured, as tables and in sentences."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

QUIET = 0.05
"""Share of the cores' time that others may take before the last lines say so."""
COLUMNS = (
    "tasks", "encoder", "method", "scope", "ms", "x equal", "TorchJD ms", "x its sum", "quickest ms", "x its sum",
    "ours is",
)  # fmt: skip
TIMES = ("ours", "equal", "peer_sum", "documented", "quickest")
"""Of a step: under the method, under ``equal`` beside it, and TorchJD's (see benchmarks/balancing_torch.py)."""
COMPARED = ("pcgrad", "mgda", "upgrad", "cagrad")


def by_one_gramian(row: Mapping[str, Any]) -> bool:
    """Whether a row is of a method that weighs by the Gramian of one batch, and leaves the step as it is."""
    return row["needs"] == "gramian" and row["batches"] == 1 and not row["owns_step"]


# Of each kind: how it reads, tasks -> limit, the rows it is about, their number, and which of several is the worst.
GOALS = (
    (
        "At scope representation a step takes at most {limit} x that of equal",
        {2: 1.4, 4: 1.4, 8: 1.5},
        lambda row: by_one_gramian(row) and row["scope"] == "representation",
        "ratio",
        max,
    ),
    (
        "At scope encoder pcgrad, mgda, upgrad and cagrad are at least {limit} x as fast as TorchJD",
        {2: 1.5, 4: 1.0, 8: 1.0},
        lambda row: row["scope"] == "encoder" and row["method"] in COMPARED,
        "speed",
        min,
    ),
    (
        "At scope encoder nash_mtl is at least {limit} x as fast as TorchJD",
        {2: 5.0, 4: 5.0, 8: 2.0},
        lambda row: row["scope"] == "encoder" and row["method"] == "nash_mtl",
        "speed",
        min,
    ),
)


def summary(runs: Sequence[Mapping[str, Any]], solvers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the goals.

    Args:
      runs: A line a round, method and scope, with the seconds of a step in :data:`TIMES`, None where not measured.
      solvers: A line a round, method and number of tasks, with ``seconds``.

    Returns:
      ``rows``: one a method, scope, number of tasks and encoder: medians of the seconds, and of quotients within a round:
      ``ratio`` (to ``equal``), ``documented_ratio`` and ``quickest_ratio`` (to TorchJD's sum of losses), and ``speed``,
      the better one of TorchJD's ways over ours (above 1 ours is faster).
      ``solvers``: one a method and number of tasks, with the median ``seconds``.
      ``goals``: one a goal and number of tasks that was measured: its ``text``, ``limit``, ``worst`` and ``where``, both
      None where nothing was measured, and ``met``.
    """
    rows = [_row(same) for same in groups(runs, "tasks", "encoder", "method", "scope")]
    of_solvers = [
        {
            "method": same[0]["method"],
            "tasks": same[0]["tasks"],
            "seconds": statistics.median(r["seconds"] for r in same),
        }
        for same in groups(solvers, "method", "tasks")
    ]
    return {"rows": rows, "solvers": of_solvers, "goals": list(_goals(rows))}


def groups(runs: Sequence[Mapping[str, Any]], *names: str) -> Iterable[list[Mapping[str, Any]]]:
    """The lines that have the same values under the names, together."""
    found: dict[tuple, list] = {}
    for run in runs:
        found.setdefault(tuple(run[name] for name in names), []).append(run)
    return found.values()


def _row(same: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def median(of: Callable[[Mapping[str, Any]], float], *needed: str) -> float | None:
        values = [of(run) for run in same if all(run[name] is not None for name in needed)]
        return statistics.median(values) if values else None

    names = ("tasks", "encoder", "method", "scope", "needs", "batches", "owns_step")
    return {name: same[0][name] for name in names} | {
        "seconds": {name: median(lambda run, name=name: run[name], name) for name in TIMES},
        "ratio": median(lambda run: run["ours"] / run["equal"], "ours", "equal"),
        "documented_ratio": median(lambda run: run["documented"] / run["peer_sum"], "documented", "peer_sum"),
        "quickest_ratio": median(lambda run: run["quickest"] / run["peer_sum"], "quickest", "peer_sum"),
        "speed": median(lambda run: min(run["documented"], run["quickest"]) / run["ours"], "documented", "quickest"),
    }


def _goals(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for text, limits, concerns, number, worst_of in GOALS:
        for tasks in dict.fromkeys(row["tasks"] for row in rows if row["tasks"] in limits):
            found = [row for row in rows if row["tasks"] == tasks and concerns(row) and row[number] is not None]
            goal = {"text": text.format(limit=limits[tasks]), "tasks": tasks, "limit": limits[tasks]}
            if not found:
                yield goal | {"worst": None, "where": None, "met": None}
                continue
            worst = worst_of(found, key=lambda row: row[number])
            met = worst[number] <= limits[tasks] if worst_of is max else worst[number] >= limits[tasks]
            yield goal | {"worst": worst[number], "where": f"{worst['method']}, {worst['encoder']}", "met": met}


def table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a method, scope, number of tasks and encoder, under ``COLUMNS``."""
    return [
        (
            str(row["tasks"]),
            row["encoder"],
            row["method"],
            row["scope"],
            _milliseconds(row["seconds"]["ours"]),
            _times(row["ratio"]),
            _milliseconds(row["seconds"]["documented"]),
            _times(row["documented_ratio"]),
            _milliseconds(row["seconds"]["quickest"]),
            _times(row["quickest_ratio"]),
            _times(row["speed"]),
        )
        for row in record["rows"]
    ]


def solver_table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Microseconds a call: a header, then one row of text a method with a column a number of tasks."""
    known = {(row["method"], row["tasks"]): row["seconds"] for row in record["solvers"]}
    counts = sorted({tasks for _, tasks in known})

    def microseconds(value: float | None) -> str:
        return "" if value is None else f"{1e6 * value:.2f}"

    header = ("solver, us", *(f"{tasks} tasks" for tasks in counts))
    methods = dict.fromkeys(method for method, _ in known)
    return [header, *((method, *(microseconds(known.get((method, k))) for k in counts)) for method in methods)]


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.2f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def caption(record: Mapping[str, Any]) -> list[str]:
    """What was measured where, and whether the machine was quiet."""
    settings, lines = record["settings"], [record["peer"]]
    lines += [f"TorchJD lacks {name} there: {reason}" for name, reason in record["peer_missing"].items()]
    if (busy := record["busy_elsewhere"] or 0.0) > QUIET:
        lines.append(
            f"Other processes took up to {busy:.0%} of the cores, under which threads that wait for each other lose far "
            "more than that: the comparison with TorchJD says nothing. Measure again on a quiet machine"
        )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines.append(
        f"{record['machine']['cpu']}, {settings['threads']} cores, matrix product {record['gemm_gflops']:.0f} GFLOP/s; "
        f"{record['device']}; batches of {settings['batch_size']:,}, {settings['steps']} steps a measurement, "
        f"{settings['repeats']} rounds; {versions}; commit {record['commit']}, {record['date']}"
    )
    return lines


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Of each goal, whether it is met."""

    def verdict(goal: Mapping[str, Any]) -> str:
        if goal["met"] is None:
            return "not measured"
        return f"{'met' if goal['met'] else 'missed'}, {goal['worst']:.2f} x ({goal['where']})"

    return [f"{goal['text']} with {goal['tasks']} tasks: {verdict(goal)}." for goal in record["goals"]]


def show(record: Mapping[str, Any]) -> None:
    """Prints the tables, then the sentences."""
    print_table([COLUMNS, *table(record)], left=("encoder", "method", "scope"))
    if record["solvers"]:
        print()
        print_table(solver_table(record), left=("solver, us",))
    print("\n".join(["", *caption(record), "", *sentences(record)]))


def print_table(rows: Sequence[Sequence[str]], left: Sequence[str]) -> None:
    """Prints rows of text, the first of which are the columns' names; those in ``left`` begin at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, rows[0], strict=True)
        print(
            "  ".join(cell.ljust(width) if name in left else cell.rjust(width) for cell, width, name in cells).rstrip()
        )
