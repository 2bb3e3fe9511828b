"""How arms fare as a number of the data changes (relatedness of tasks, share of the training rows): one static figure."""

import io
import math
from collections.abc import Iterable
from typing import NamedTuple

import polars as pl

from mtl_jax.report.drawing import Mark
from mtl_jax.report.plot import DPI, FAINT, INK
from mtl_jax.report.rows import Comparison

WIDTH, HEIGHT = 4.4, 3.4  # inches of a panel
MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "cross": "X", "pentagon": "p", "star": "*"
}  # fmt: skip
LINES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
SPREAD = 100
"""Largest over smallest value from which the axis is logarithmic."""


class Axis(NamedTuple):
    """A number of the data that comparisons differ in.

    Attributes:
      name: Its key, like ``data.p``.
      points: One row for each arm, task and value: ``data, arm, task, metric, direction, value, mean, low, high``.
    """

    name: str
    points: pl.DataFrame


def axis_of(comparisons: Iterable[Comparison]) -> Axis | None:
    """The number of the data that differs between comparisons; None where none does, or more than one."""
    rows, values = [], {}
    for comparison in comparisons:
        for row in comparison.rows:
            numbers = {
                key: float(value)
                for key, value in row.values.items()
                if key.startswith("data.") and isinstance(value, int | float) and not isinstance(value, bool)
            }
            for key, value in numbers.items():
                values.setdefault(key, set()).add(value)
            for task, summary in row.metrics.items():
                low, high = summary.interval or (None, None)
                facts = comparison.tasks[task]
                found = (comparison.data.split(", ")[0], row.arm, task, facts["metric"], facts["direction"])
                rows.append((found, numbers, summary.mean, low, high))
    names = [name for name, found in values.items() if len(found) > 1]
    if len(names) != 1:
        return None
    (name,) = names
    points = [(*found, numbers[name], mean, low, high) for found, numbers, mean, low, high in rows if name in numbers]
    columns = ("data", "arm", "task", "metric", "direction", "value", "mean", "low", "high")
    return Axis(name, pl.DataFrame(points, schema=columns, orient="row").drop_nulls("mean"))


def draw(axis: Axis, marks: dict[str, Mark]) -> bytes:
    """A PNG: a panel for each data set and task, in which every arm is a line through its means with 95 % intervals."""
    # Imported here: reading records must not wait for matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = axis.points.select("data", "task", "metric", "direction").unique(maintain_order=True).rows()
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = Figure(figsize=(columns * WIDTH, rows * HEIGHT + 0.5), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(keys) :]:
        panel.set_axis_off()
    arms = [arm for arm in marks if arm in set(axis.points["arm"])]
    for panel, (data, task, metric, direction) in zip(panels, keys, strict=False):
        panel.set_title(f"{data}, {task}: {metric} ({direction} is better)", fontsize=9, loc="left", color=INK)
        panel.set_xlabel(axis.name, fontsize=8.5, color=INK)
        panel.tick_params(labelsize=8, colors=FAINT)
        panel.grid(axis="y", color="#E6E6E6", linewidth=0.8)
        panel.spines[["top", "right"]].set_visible(False)
        of_panel = axis.points.filter(data=data, task=task)
        if of_panel["value"].min() > 0 and of_panel["value"].max() >= SPREAD * of_panel["value"].min():
            panel.set_xscale("log")
        for arm in arms:
            line, mark = of_panel.filter(arm=arm).sort("value"), marks[arm]
            if line.is_empty():
                continue
            mean = line["mean"].to_numpy()
            ends = [
                (sign * (line[end] - line["mean"])).fill_null(0).to_numpy() for sign, end in ((-1, "low"), (1, "high"))
            ]
            panel.errorbar(
                line["value"], mean, ends, label=arm, color=mark.colour, marker=MARKERS[mark.symbol], markersize=4.5,
                linestyle=LINES[mark.dash], linewidth=1.5, capsize=2.5, elinewidth=1,
            )  # fmt: skip
    handles, names = max((panel.get_legend_handles_labels() for panel in panels), key=lambda found: len(found[1]))
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8.5, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
