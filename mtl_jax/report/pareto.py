"""Two tasks against each other: what one gains, does the other lose?"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import plotly.graph_objects as go

from mtl_jax.report.drawing import FAINT, Mark, half_width, label, mean_text, menu, styled
from mtl_jax.report.rows import Comparison, Row

REFERENCE_DASHES = ("dot", "dash", "dashdot", "longdash")


def pareto(comparison: Comparison, marks: Mapping[str, Mark]) -> go.Figure | str:
    """Mean of one task against another with their intervals, a menu for the pair; better is up and to the right.

    Arms that no other arm dominates are joined, where every arm has an interval; levels of the trivial predictors are
    lines.
    """
    pairs = {
        pair: rows
        for pair in itertools.combinations(comparison.tasks, 2)
        if (rows := [row for row in comparison.rows if all(_mean(row, task) is not None for task in pair)])
    }
    if not pairs:
        few = len(comparison.tasks) < 2
        lacking = "the data has one task" if few else "no arm has finished runs in two tasks"
        return f"There is no Pareto front: {lacking}."
    figure, choices, changes = go.Figure(), {}, {}
    for pair, rows in pairs.items():
        start = len(figure.data)
        ranges = [_range(comparison, rows, task) for task in pair]
        figure.add_traces([_point(row, pair, marks[row.arm]) for row in rows])
        figure.add_trace(_front_trace(comparison, rows, pair))
        figure.add_traces(list(_reference_traces(comparison, pair, ranges)))
        text = f"{label(pair[0])} and {label(pair[1])}"
        choices[text] = range(start, len(figure.data))
        changes[text] = {
            f"{axis}.{key}": value
            for axis, task, limits in zip(("xaxis", "yaxis"), pair, ranges, strict=True)
            for key, value in {"title.text": _axis_title(comparison, task), "range": limits}.items()
        }
    names = [*(row.arm for row in comparison.rows), "non-dominated means", *comparison.trivial]
    styled(figure, 420, legend=names, menu=len(choices) > 1)
    menu(figure, choices, changes)
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other dominates, by their first coordinate; both coordinates: higher is better.

    A point dominates another when it is at least as good in both and better in one, so equal points stay together.
    """
    kept = [
        index
        for index, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
    ]
    return sorted(kept, key=lambda index: points[index])


def _mean(row: Row, task: str) -> float | None:
    summary = row.metrics.get(task)
    return summary.mean if summary is not None and summary.n else None


def _signed(comparison: Comparison, task: str, value: float) -> float:
    return value if comparison.tasks[task]["direction"] == "higher" else -value


def _axis_title(comparison: Comparison, task: str) -> str:
    facts = comparison.tasks[task]
    turned = "" if facts["direction"] == "higher" else " (turned round: lower is better)"
    return f"{label(task)}: {label(facts['metric'])}{turned}"


def _point(row: Row, pair: tuple[str, str], mark: Mark) -> go.Scatter:
    x, y = (row.metrics[task] for task in pair)
    bars = {"color": mark.colour, "thickness": 1.5, "width": 3}
    beaten = [f"{label(task)}: FAILED, below {label(name)}" for task, name in row.below_trivial.items() if task in pair]
    described = [
        f"{label(task)} {mean_text(summary)}, n = {summary.n}" for task, summary in zip(pair, (x, y), strict=True)
    ]
    return go.Scatter(
        x=[x.mean],
        y=[y.mean],
        error_x={"array": [half_width(x.interval)], **bars},
        error_y={"array": [half_width(y.interval)], **bars},
        mode="markers",
        marker={"color": mark.colour, "symbol": mark.symbol + ("-open" if beaten else ""), "size": 11},
        name=label(row.arm),
        hovertext="<br>".join([label(row.arm), *described, *beaten]),
        hoverinfo="text",
    )


def _front_trace(comparison: Comparison, rows: list[Row], pair: tuple[str, str]) -> go.Scatter:
    """Empty where winners are withheld or an arm has a single run: a front is a ranking. Flagged arms are not on it."""
    ranked = [] if comparison.refused else [row for row in rows if not row.flags]
    ranked = ranked if all(row.metrics[task].interval for row in ranked for task in pair) else []
    kept = front([tuple(_signed(comparison, task, _mean(row, task)) for task in pair) for row in ranked])
    x, y = ([_mean(ranked[index], task) for index in kept] for task in pair)
    line = {"color": FAINT, "width": 1.5, "dash": "dash"}
    return go.Scatter(x=x, y=y, mode="lines", line=line, name="non-dominated means", hoverinfo="skip", meta="front")


def _reference_traces(comparison: Comparison, pair: tuple[str, str], ranges: list[list[float]]) -> Iterator[go.Scatter]:
    """Two lines for each trivial predictor, at its level in either task."""
    for index, (name, levels) in enumerate(comparison.trivial.items()):
        across, up = (levels.get(task) for task in pair)
        (left, right), (bottom, top) = ranges
        if not any(
            level is not None and min(ends) <= level <= max(ends)
            for level, ends in zip((across, up), ranges, strict=True)
        ):
            continue  # off both scales
        dash = REFERENCE_DASHES[index % len(REFERENCE_DASHES)]
        known = ", ".join(
            f"{task} {level:.5g}" for task, level in zip(pair, (across, up), strict=True) if level is not None
        )
        yield go.Scatter(
            x=[across, across, None, left, right],
            y=[bottom, top, None, up, up],
            mode="lines",
            line={"color": FAINT, "width": 1, "dash": dash},
            name=label(name),
            hovertext=label(f"{name}: {known}"),
            hoverinfo="text",
            meta="trivial",
        )


def _range(comparison: Comparison, rows: list[Row], task: str) -> list[float]:
    """From the worst bound to the best; a trivial predictor farther off than the arms are wide stays off the scale."""
    bounds = [b for row in rows for b in (row.metrics[task].interval or (row.metrics[task].mean,))]
    low, high = min(bounds), max(bounds)
    span = high - low or 0.1 * abs(high) or 1.0
    levels = [levels[task] for levels in comparison.trivial.values() if levels.get(task) is not None]
    near = [level for level in levels if low - span <= level <= high + span]
    low, high = min(low, *near, high), max(high, *near, low)
    margin = 0.08 * span
    limits = [low - margin, high + margin]
    return limits if comparison.tasks[task]["direction"] == "higher" else limits[::-1]
