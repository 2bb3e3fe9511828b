"""Figures of a comparison: differences from the baseline, the grid of methods, the use of experts, the ranks.

Each is a function that returns a plotly figure, or one sentence that says why there is none. What is
drawn are numbers of the comparison; none is computed here.
"""

import math
from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from mtl_jax.report.ablation import Ablation
from mtl_jax.report.drawing import FAINT, INK, Mark, label, mean_text, menu, name_rows, padded, panels, styled
from mtl_jax.report.notes import ALPHA
from mtl_jax.report.rows import Comparison, Row
from mtl_jax.report.statistics import Difference, Summary

ROW_HEIGHT = 40
MOST_TEXTS = 16
"""Columns of a heat map up to which its cells say their number."""
BETTER, NOISE, WORSE = "better", "within noise", "worse"
# Told apart by shape as well.
VERDICTS = {BETTER: ("#0072B2", "triangle-right"), NOISE: ("#8A8A8A", "circle"), WORSE: ("#D55E00", "triangle-left")}


def differences(comparison: Comparison, marks: Mapping[str, Mark]) -> go.Figure | str:
    """Forest plot: the paired difference of every arm from the baseline with its interval, a panel for each task.

    Right of the line at 0 is better, whatever the direction of the metric. The colour follows :func:`verdict`.
    """
    found = {
        task: [row for row in comparison.rows if row.differences.get(task) and row.differences[task].n]
        for task in comparison.tasks
    }
    found = {task: rows for task, rows in found.items() if rows}
    if not found:
        lacking = "no arm shares a seed with the baseline, or gains are withheld for the reason above"
        lacking = "there is no baseline" if comparison.baseline is None else lacking
        return f"There are no paired differences: {lacking}."
    titles = [
        f"{label(task)}: difference in {label(comparison.tasks[task]['metric'])}, positive = better" for task in found
    ]
    figure = panels(titles, [ROW_HEIGHT * len(rows) + 16 for rows in found.values()], legend=VERDICTS)
    for place, (task, rows) in enumerate(found.items(), start=1):
        verdicts = [verdict(row.differences[task]) for row in rows]
        for name, (colour, symbol) in VERDICTS.items():
            chosen = [row for row, of_row in zip(rows, verdicts, strict=True) if of_row == name]
            figure.add_trace(_forest_trace(chosen, task, name, colour, symbol, legend=place == 1), row=place, col=1)
        figure.add_vline(x=0, line={"color": INK, "width": 1}, row=place, col=1)
        name_rows(figure, [row.arm for row in rows], marks, place=place)
        ends = [end for row in rows for end in (row.differences[task].interval or (row.differences[task].mean,))]
        figure.update_xaxes(range=padded(min(0.0, *ends), max(0.0, *ends)), row=place, col=1)
    return figure


def verdict(difference: Difference) -> str:
    """``better`` or ``worse`` where the paired test rejects at 5 % after Holm's correction, else ``within noise``.

    The interval then leaves 0 out as well; the reverse does not hold.
    """
    if difference.p_holm is None or difference.p_holm > ALPHA:
        return NOISE
    return BETTER if difference.mean > 0 else WORSE


def heat_maps(comparison: Comparison) -> go.Figure | str:
    """Grid of what is shared against what balances: mean delta_m, and in a menu the metric of each task.

    Every other part of the method that varies is named with the sharing. The baseline is no cell of the grid.
    """
    rows = [row for row in comparison.rows if row.arm != comparison.baseline and row.metrics]
    groups = ("sharing", "link", "pretraining", "transfer", "alignment")
    parts = [part for part in groups if len({row.method.get(part) for row in rows}) > 1]
    places = {row.arm: ("+".join(str(row.method.get(p)) for p in parts), str(row.method["balancing"])) for row in rows}
    across, down = (list(dict.fromkeys(place[axis] for place in places.values())) for axis in (1, 0))
    if "sharing" not in parts or len(across) < 2:
        return "There is no grid of sharing and balancing: only one of the two varies, or neither."
    if len(set(places.values())) < len(rows):
        return "There is no grid of sharing and balancing: arms with the same methods differ in something else."
    quantities = []
    if any(row.delta_m for row in rows):
        look = {"colorscale": "RdBu", "zmid": 0}
        quantities.append(("delta_m, %", [row.delta_m for row in rows], look))
    for task, facts in comparison.tasks.items():
        look = {"colorscale": "Cividis", "reversescale": facts["direction"] == "lower"}
        text = f"{label(task)}: {label(facts['metric'])} ({facts['direction']} is better)"
        quantities.append((text, [row.metrics.get(task) for row in rows], look))
    figure, choices = go.Figure(), {}
    for text, summaries, look in quantities:
        choices[text] = [len(figure.data)]
        cells = dict(zip(places.values(), summaries, strict=True))
        figure.add_trace(_heat_map(cells, across, down, look))
    styled(figure, 56 * len(down) + 20, menu=True)
    figure.update_xaxes(title_text="balancing", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    menu(figure, choices)
    return figure


def gate_use(ablation: Ablation, comparison: Comparison) -> go.Figure | str:
    """Mean weight of every member (an expert, a task's network, a unit) in every gate over the seeds, a menu for the arm.

    Read from ``diagnostics.gate_use`` of the records.
    """
    figure, choices = go.Figure(), {}
    for row in comparison.rows:
        found: dict[str, dict[str, list[float]]] = {}
        for run_id in row.run_ids:
            use = ablation.records[run_id].get("diagnostics", {}).get("gate_use", {})
            for gate, shares in use.get("all", {}).items():
                for member, share in shares.items():
                    found.setdefault(gate, {}).setdefault(member, []).append(share)
        if not found:
            continue
        members = list(dict.fromkeys(member for shares in found.values() for member in shares))
        choices[label(row.arm)] = [len(figure.data)]
        figure.add_trace(
            go.Heatmap(
                x=[label(member) for member in members],
                y=[label(gate) for gate in found],
                z=[[np.mean(shares.get(member, math.nan)) for member in members] for shares in found.values()],
                texttemplate="%{z:.2f}" if len(members) <= MOST_TEXTS else None,
                hovertemplate=f"{label(row.arm)}<br>%{{y}}, %{{x}}: %{{z:.3f}}, n = {len(row.run_ids)}<extra></extra>",
                colorscale="Cividis",
                zmin=0,
                zmax=1,
                xgap=2,
                ygap=2,
                colorbar={"thickness": 12, "outlinewidth": 0},
            )
        )
    if not choices:
        return "There is no use of gates: no finished run has recorded any."
    styled(figure, 40 * max(len(trace.y) for trace in figure.data) + 60, menu=len(choices) > 1)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(showgrid=False)
    menu(figure, choices)
    return figure


def ranks(comparison: Comparison, marks: Mapping[str, Mark]) -> go.Figure | str:
    """Rank of every arm within a seed, mean over seeds: arms whose bars overlap are not told apart.

    A bar is one critical difference wide, so the bars of two arms overlap exactly when their ranks differ by less than
    that (Nemenyi's test as in Demšar, JMLR 2006). Nothing is drawn unless Friedman's test tells the arms apart first.
    """
    rows = sorted((row for row in comparison.rows if row.seed_rank is not None), key=lambda row: row.seed_rank)
    width = comparison.critical_difference
    if len(rows) < 3 or width is None or comparison.friedman_p is None:
        return "There are no ranks with a critical difference: they need three ranked arms or more that share seeds."
    if comparison.friedman_p > ALPHA:
        return (
            f"The ranks are not drawn: Friedman's test does not tell the arms apart (p = {comparison.friedman_p:.2g})."
        )
    figure = go.Figure()
    for row in rows:
        mark = marks[row.arm]
        figure.add_trace(
            go.Scatter(
                x=[row.seed_rank],
                y=[row.arm],
                error_x={"array": [width / 2], "color": mark.colour, "thickness": 3, "width": 0},
                mode="markers",
                marker={"color": mark.colour, "symbol": mark.symbol, "size": 11},
                name=label(row.arm),
                hovertemplate=f"{label(row.arm)}<br>mean rank %{{x:.2f}}, n = {len(row.run_ids)}<extra></extra>",
            )
        )
    styled(figure, ROW_HEIGHT * len(rows) + 16)
    best = rows[0].seed_rank
    figure.add_vrect(x0=best - width / 2, x1=best + width / 2, fillcolor=FAINT, opacity=0.1, line_width=0)
    figure.update_xaxes(title_text=f"mean rank (1 is best); critical difference {width:.2f}")
    name_rows(figure, [row.arm for row in rows], marks)
    figure.update_xaxes(range=padded(best - width / 2, rows[-1].seed_rank + width / 2))
    return figure


def _forest_trace(rows: list[Row], task: str, name: str, colour: str, symbol: str, *, legend: bool) -> go.Scatter:
    found = [row.differences[task] for row in rows]
    bounds = [difference.interval or (math.nan, math.nan) for difference in found]
    return go.Scatter(
        # A legend entry needs a point; a verdict without arms keeps its place in the legend.
        x=[difference.mean for difference in found] or [None],
        y=[row.arm for row in rows] or [None],
        error_x={
            "array": [high - d.mean for d, (_, high) in zip(found, bounds, strict=True)],
            "arrayminus": [d.mean - low for d, (low, _) in zip(found, bounds, strict=True)],
            "color": colour,
            "thickness": 2,
            "width": 0,
        },
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 10},
        name=name,
        legendgroup=name,
        showlegend=legend,
        hovertext=[_difference_text(row, task) for row in rows],
        hoverinfo="text",
    )


def _difference_text(row: Row, task: str) -> str:
    found = row.differences[task]
    interval = (
        "no interval"
        if found.interval is None
        else f"95 % interval {found.interval[0]:+.4g} to {found.interval[1]:+.4g}"
    )
    bootstrap = "" if found.bootstrap is None else "<br>bootstrap {:+.4g} to {:+.4g}".format(*found.bootstrap)
    p = "not tested" if found.p_holm is None else f"p = {found.p_holm:.3g} after Holm"
    return f"{label(row.arm)}<br>{found.mean:+.4g}, {interval}{bootstrap}<br>n = {found.n}, {p}"


def _heat_map(
    summaries: Mapping[tuple[str, str], Summary | None], across: list[str], down: list[str], look: dict
) -> go.Heatmap:
    cells = [[summaries.get((row, column)) for column in across] for row in down]
    return go.Heatmap(
        x=[label(name) for name in across],
        y=[label(name) for name in down],
        z=[[math.nan if cell is None or cell.mean is None else cell.mean for cell in row] for row in cells],
        text=[[_cell_text(cell) for cell in row] for row in cells],
        texttemplate="%{text}",
        hovertemplate="%{y} + %{x}<br>%{text}<extra></extra>",
        xgap=2,
        ygap=2,
        colorbar={"thickness": 12, "outlinewidth": 0},
        **look,
    )


def _cell_text(summary: Summary | None) -> str:
    return "" if summary is None or summary.mean is None else f"{mean_text(summary)}<br>n = {summary.n}"
