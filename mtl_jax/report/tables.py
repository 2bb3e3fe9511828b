"""The tables of a comparison, before they are drawn: for the terminal, Markdown and LaTeX alike."""

import dataclasses
from collections.abc import Sequence

from mtl_jax.report.comparison import SCRATCH
from mtl_jax.report.notes import interval, number, probability, status
from mtl_jax.report.rows import Comparison, Row
from mtl_jax.report.selection import settings
from mtl_jax.report.statistics import Difference, Summary
from mtl_jax.report.transfer import QUANTITIES, fraction_to_scratch

TIED = "≈"
FRACTION = "data.target_fraction"
LEGEND = (
    "mean ± half the width of its 95 % interval over n seeds; bold: best mean of the ranked arms; "
    f"{TIED}: not told apart from the best by seed-paired differences; differences and delta_m: positive = better"
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One entry: its text, and whether it stands out.

    Attributes:
      text: Without any markup.
      bold: The best of its column.
      failed: Below a trivial predictor.
      tied: Not told apart from the best of its column.
    """

    text: str
    bold: bool = False
    failed: bool = False
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
      name: Short, for file names and labels.
      title: What it shows.
      header: One text a column.
      rows: Of one cell a column.
      text_columns: How many columns on the left hold names; the others hold numbers.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    text_columns: int = 1


def tables(comparison: Comparison) -> tuple[Grid, ...]:
    """Results, details by task, differences to the baseline, what a source was worth, and what was tried; those that have
    rows."""
    grids = (
        results(comparison),
        details(comparison),
        differences(comparison),
        transfer(comparison),
        candidates(comparison),
    )
    return tuple(grid for grid in grids if grid.rows)


def results(comparison: Comparison) -> Grid:
    """One row an arm and one a trivial predictor."""
    tasks = comparison.tasks
    ranked = sum(row.mean_rank is not None for row in comparison.rows)
    gains = [name for name in ("delta_m", "delta_m_c") if any(getattr(row, name) for row in comparison.rows)]
    header = ["arm", *(f"{task} ({facts['metric']}, {facts['direction']})" for task, facts in tasks.items())]
    header += [f"{name} %" for name in gains]
    header += [f"mean rank of {ranked}"] if ranked else []
    header += ["rank by seed"] if comparison.critical_difference else []
    trained = any(row.trainable is not None for row in comparison.rows)
    header += ["seeds", "parameters", *(["trained"] if trained else []), "examples/s", "compile s"]
    rows = []
    for row in comparison.rows:
        cells = [Cell(_arm(row)), *(_value(comparison, row, task) for task in tasks)]
        cells += [Cell(_summary(getattr(row, name), digits=2, sign="+")) for name in gains]
        cells += [Cell(_rank(row.mean_rank))] if ranked else []
        cells += [Cell(_rank(row.seed_rank))] if comparison.critical_difference else []
        cells += [Cell(status(row)), Cell(_count(row.parameters))]
        cells += [Cell(_count(row.trainable))] if trained else []
        cells += [Cell(_count(row.examples_per_second))]
        rows.append((*cells, Cell("" if row.compile_seconds is None else f"{row.compile_seconds:.1f}")))
    for name, values in comparison.trivial.items():
        cells = [Cell(f"{name} (trivial)"), *(Cell(number(values[t]) if t in values else "") for t in tasks)]
        rows.append((*cells, *[Cell("")] * (len(header) - len(cells))))
    return Grid("results", f"Results on {comparison.data}, test part", tuple(header), tuple(rows))


def details(comparison: Comparison) -> Grid:
    """Mean, standard deviation, interval and n by task and arm."""
    rows = tuple(
        (
            *(Cell(text) for text in (task, row.arm, number(found.mean), number(found.std), interval(found.interval))),
            Cell(f"{found.n} / {row.planned}"),
        )
        for task in comparison.tasks
        for row in comparison.rows
        if (found := row.metrics.get(task))
    )
    header = ("task", "arm", "mean", "std", "95 % interval", "n / planned")
    return Grid("details", f"Mean and spread over seeds on {comparison.data}", header, rows, text_columns=2)


def differences(comparison: Comparison) -> Grid:
    """Paired differences to the baseline with their intervals and tests."""
    rows = tuple(
        (Cell(task), Cell(row.arm), *_difference(found))
        for task in comparison.tasks
        for row in comparison.rows
        if (found := row.differences.get(task))
    )
    header = ("task", "arm", "difference", "95 % interval", "bootstrap", "p", "p Holm", "p exact", "n")
    count = sum(one.p is not None for row in comparison.rows for one in row.differences.values())
    title = (
        f"Differences to {comparison.baseline} on {comparison.data}, positive = better; Holm over {count} comparisons"
    )
    return Grid("differences", title, header, rows, text_columns=2)


def transfer(comparison: Comparison) -> Grid:
    """What a source was worth on validation, against runs of the same seeds from scratch."""
    rows = tuple(
        (Cell(task), Cell(row.arm), *(Cell(_summary(row.transfer[task].get(name), sign="+")) for name in QUANTITIES))
        for task in comparison.tasks
        for row in comparison.rows
        if task in row.transfer
    )
    header = ("task", "arm", *(name.replace("_", " ") for name in QUANTITIES))
    title = (
        f"Validation curves against scratch on {comparison.data}: gain before any step, at the first evaluation after 1 % "
        "of the steps, on average, steps to scratch's best as a share of its own, and what was lost on the source"
    )
    return Grid("transfer", title, header, rows, text_columns=2)


def spanning(comparisons: Sequence[Comparison]) -> tuple[Grid, ...]:
    """Tables over all comparisons: how many rows of the target each strategy of transfer takes."""
    of_data: dict[str, list[tuple[float, Comparison]]] = {}
    for comparison in comparisons:
        shares = {row.values.get(FRACTION) for row in comparison.rows}
        if comparison.single_task == SCRATCH and len(shares) == 1 and None not in shares:
            of_data.setdefault(comparison.data.split(", ")[0], []).append((float(shares.pop()), comparison))
    return tuple(
        _to_scratch(data, sorted(found, key=lambda one: one[0]))
        for data, found in of_data.items()
        if len(found) > 1 and found[-1][1].row(SCRATCH) is not None
    )


def _to_scratch(data: str, found: list[tuple[float, Comparison]]) -> Grid:
    most, whole = found[-1]
    rows = []
    for arm in (row.arm for row in whole.rows if row.arm != SCRATCH):
        cells = [Cell(arm)]
        for task in whole.tasks:
            means = {share: row.mean(task) for share, one in found if (row := one.row(arm)) is not None}
            known, goal = (
                {share: mean for share, mean in means.items() if mean is not None},
                whole.row(SCRATCH).mean(task),
            )
            higher = whole.higher(task)
            reached = None if goal is None else fraction_to_scratch(known, goal, higher_is_better=higher)
            cells.append(Cell("never" if reached is None else f"{reached:.3g}"))
        rows.append(tuple(cells))
    title = (
        f"Share of the target's rows at which the mean is that of scratch with {most:g} of them, on {data}, test part; "
        "interpolated over the logarithm of the share"
    )
    return Grid("fraction_to_scratch", title, ("arm", *whole.tasks), tuple(rows))


def candidates(comparison: Comparison) -> Grid:
    """What was tried for the arms with several settings: validation numbers only."""
    rows = tuple(
        (
            Cell(one.arm),
            Cell(settings(one.values)),
            Cell(one.monitor or ""),
            Cell(f"{_summary(one.value)} (n = {one.value.n})" if one.value.n else "", bold=one.chosen),
            Cell(f"{one.finished} / {one.planned}"),
            Cell("chosen" if one.chosen else ""),
        )
        for one in comparison.candidates
    )
    header = ("arm", "settings", "monitor", "on validation", "seeds", "")
    return Grid("candidates", f"Settings tried on {comparison.data}, validation part", header, rows, text_columns=3)


def _value(comparison: Comparison, row: Row, task: str) -> Cell:
    if task not in row.metrics:
        return Cell("n/a")
    tied, best = row.tied_with_best.get(task, False), row.best.get(task, False)
    text = _summary(row.metrics[task])
    if row.metrics[task].n < len(row.run_ids):
        text += f" (n = {row.metrics[task].n})"
    if task in row.below_trivial:
        return Cell(f"{text} FAILED: below {row.below_trivial[task]}", failed=True)
    return Cell(f"{text} {TIED}" if tied else text, bold=best, tied=tied)


def _arm(row: Row) -> str:
    notes = [settings(row.values)] if row.values else []
    notes += [f"best of {row.trials} on validation"] if row.trials > 1 else []
    notes += [f"not ranked: {', '.join(row.flags)}"] if row.flags else []
    return f"{row.arm} ({'; '.join(notes)})" if notes else row.arm


def _difference(found: Difference) -> list[Cell]:
    signed = [
        "" if ends is None else f"{_signed(ends[0])} to {_signed(ends[1])}"
        for ends in (found.interval, found.bootstrap)
    ]
    ps = ["" if p is None else probability(p) for p in (found.p, found.p_holm, found.p_exact)]
    return [Cell(text) for text in (_signed(found.mean), *signed, *ps, str(found.n))]


def _summary(found: Summary | None, *, digits: int = 4, sign: str = "") -> str:
    if found is None or found.mean is None:
        return ""
    digits = digits if abs(found.mean) < 100 else 1
    mean = f"{found.mean:{sign}.{digits}f}"
    if found.interval is None:
        return f"{mean} (n = {found.n}, no interval)"
    return f"{mean} ± {(found.interval[1] - found.interval[0]) / 2:.{digits}f}"


def _rank(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 100 else f"{value:+,.1f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
