"""One run as a figure: learning curves beside the gains over the trivial baselines."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from mtl_jax.report.compare import baseline_value, gain_over, reported_part, shown_baselines, task_value
from mtl_jax.report.folder import HISTORY_SCHEMA, write_atomically
from mtl_jax.report.record import data_text, domains_text, method_text

Record = Mapping[str, Any]
# Blue and orange of Okabe and Ito for what was trained, greys for what was not: also told apart in black and white.
MODEL, SINGLE = "#0072B2", "#E69F00"
BASELINES = {"median": "#E0E0E0", "user_item_mean": "#C4C4C4", "item_mean": "#C4C4C4", "logistic": "#7A7A7A"}
DASHES = {
    "global_mean": (0, (1, 2)),
    "median": (0, (1, 1)),
    "user_item_mean": (0, (4, 2)),
    "item_mean": (0, (4, 2)),
    "logistic": (0, (6, 2, 1, 2)),
}
INK, FAINT = "#222222", "#666666"
DPI = 160


def plot_run(
    record: Record,
    history: pl.DataFrame | Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
    *,
    reference: Record | None = None,
) -> None:
    """Draws a run into one PNG.

    Left: the monitored metric of every task on the validation part by step, with the levels of the baselines as dashed
    lines and the selected step marked. Right: gain in percent over ``global_mean`` of the other baselines, the
    single-task reference and the model.

    Args:
      record: Of the run.
      history: Columns or keys ``step, part, task, name, value``; the curve of a task is its rows of part ``valid``
        named like its metric.
      path: Of the PNG; replaced as a whole.
      reference: Record of the single-task run of the same data, split, tasks and seed.
    """
    # Imported here: reading records must not wait for matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    frame = history if isinstance(history, pl.DataFrame) else pl.DataFrame(list(history), schema=HISTORY_SCHEMA)
    tasks = list(record["tasks"])
    columns = 1 if len(tasks) <= 2 else 2
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(10.5, max(4.2, 1.2 + 1.75 * rows)), dpi=DPI, facecolor="white", layout="constrained")
    figure.suptitle(_title(record), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1), wspace=0.02)
    _draw_curves(left, record, frame, tasks, rows, columns)
    _draw_gains(right, record, tasks, reference)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(Path(path), buffer.getvalue())


def _draw_curves(figure, record: Record, frame: pl.DataFrame, tasks: list[str], rows: int, columns: int) -> None:
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    for index, (panel, task) in enumerate(zip(panels, tasks, strict=False)):
        facts = record["tasks"][task]
        curve = frame.filter(part="valid", task=task, name=facts["metric"]).drop_nulls("value").sort("step")
        _style(panel)
        panel.plot(curve["step"], curve["value"], color=MODEL, linewidth=1.8, marker="o", markersize=3, label="model")
        levels = {name: baseline_value(record, name, task) for name in shown_baselines(record)}
        off_scale = _zoom(panel, record, task, curve, levels)
        for name, level in levels.items():
            if level is not None and name != off_scale:
                panel.axhline(level, color=FAINT, linewidth=1.0, linestyle=DASHES[name], zorder=1, label=_label(name))
        _mark_selected(panel, record, curve)
        panel.set_title(
            f"{task}: {facts['metric']} ({facts['direction']} is better)", fontsize=9, loc="left", color=INK
        )
        if index + columns >= len(tasks):
            panel.set_xlabel("step", fontsize=8.5, color=INK)
            panel.tick_params(labelbottom=True)
    _legend(figure, panels[: len(tasks)])
    part = reported_part(record) or "valid"
    figure.suptitle(f"Validation by step (dashed: baselines on the {part} part)", fontsize=10, color=INK)


def _draw_gains(figure, record: Record, tasks: list[str], reference: Record | None) -> None:
    panel = figure.subplots()
    _style(panel)
    series = _gain_series(record, tasks, reference)
    height = 0.8 / max(len(series), 4)
    for rank, (label, colour, gains) in enumerate(series):
        for row, gain in enumerate(gains):
            y = row + (rank + 0.5 - len(series) / 2) * height
            if gain is None:
                panel.text(0, y, " n/a", va="center", fontsize=7.5, color=FAINT)
                continue
            panel.barh(y, gain, height=0.9 * height, color=colour, label=label)
            panel.annotate(
                f"{gain:+.1f}",
                (gain, y),
                xytext=(3 if gain >= 0 else -3, 0),
                textcoords="offset points",
                ha="left" if gain >= 0 else "right",
                va="center",
                fontsize=7.5,
                color=INK,
            )
    panel.axvline(0, color=INK, linewidth=0.8)
    panel.set_yticks(range(len(tasks)), tasks, fontsize=9)
    panel.set_ylim(len(tasks) - 0.45, -0.55)
    panel.margins(x=0.14)
    panel.set_xlabel("gain in percent, positive = better", fontsize=8.5, color=INK)
    panel.grid(axis="y", visible=False)
    _legend(figure, [panel])
    figure.suptitle(f"Gain over the global mean ({reported_part(record) or 'valid'} part)", fontsize=10, color=INK)


def _gain_series(record: Record, tasks: list[str], reference: Record | None) -> list[tuple[str, str, list]]:
    """Label, colour and the gain of every task in percent, for each bar that some task has."""

    def gains(values: list[float | None]) -> list[float | None]:
        floors = [baseline_value(record, "global_mean", task) for task in tasks]
        relative = [
            gain_over(record, task, floor, value) for task, floor, value in zip(tasks, floors, values, strict=True)
        ]
        return [None if gain is None else 100 * gain for gain in relative]

    series = [
        (_label(name), colour, gains([baseline_value(record, name, task) for task in tasks]))
        for name, colour in BASELINES.items()
        if name in shown_baselines(record)
    ]
    if reference is not None:
        name = "scratch" if record["method"].get("transfer") else "single task"
        series.append((name, SINGLE, gains([task_value(reference, task) for task in tasks])))
    return [*series, ("model", MODEL, gains([task_value(record, task) for task in tasks]))]


def _zoom(panel, record: Record, task: str, curve: pl.DataFrame, levels: Mapping[str, float | None]) -> str | None:
    """Fits the panel to the curve and the strong baselines; an AUC of one half would flatten all that matters.

    Returns:
      The name of the level that is left out, None where all fit.
    """
    near = [level for name, level in levels.items() if level is not None and name != "global_mean"]
    shown = [value for value in (*curve["value"], *near) if math.isfinite(value)]
    floor = levels.get("global_mean")
    if not shown or floor is None:
        return None
    low, high = min(shown), max(shown)
    margin = 0.12 * (high - low) or 0.05 * abs(high) or 0.05
    if low - 3 * margin <= floor <= high + 3 * margin:
        return None
    panel.set_ylim(low - margin, high + margin)
    # Below a rising curve and above a falling one the corner is free.
    better_is_up = record["tasks"][task]["direction"] == "higher"
    note = f"global mean {floor:.3f}, off the scale"
    y, side = (0.04, "bottom") if better_is_up else (0.96, "top")
    panel.text(0.99, y, note, transform=panel.transAxes, ha="right", va=side, fontsize=7.5, color=FAINT)
    return "global_mean"


def _mark_selected(panel, record: Record, curve: pl.DataFrame) -> None:
    selected = curve.filter(step=record["monitor"]["step"]) if record["monitor"]["step"] is not None else curve.clear()
    if not selected.is_empty():
        panel.plot(
            selected["step"],
            selected["value"],
            "o",
            markersize=8,
            markerfacecolor="none",
            color=MODEL,
            label="selected",
        )


def _title(record: Record) -> str:
    method, data = record["method"], record["data"]
    setting = f"{method_text(method)} on {data_text(data)}{domains_text(record)}"
    return f"{setting}, split {data['split']}, seed {record['seed']} (one seed: no interval)"


def _label(baseline: str) -> str:
    return {"user_item_mean": "user + item mean"}.get(baseline, baseline.replace("_", " "))


def _style(panel) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")
    panel.grid(color="#EBEBEB", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8, colors=INK, length=3)


def _legend(figure, panels) -> None:
    entries = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False
        )
