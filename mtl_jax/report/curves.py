"""Figures over steps: validation metrics, weights of tasks and cosines of their gradients, each a mean over seeds."""

from collections.abc import Callable, Mapping

import numpy as np
import plotly.graph_objects as go
import polars as pl
from scipy import stats

from mtl_jax.errors import RunFolderError
from mtl_jax.report.ablation import Ablation
from mtl_jax.report.drawing import Mark, label, panels
from mtl_jax.report.folder import HISTORY_SCHEMA, RunFolder
from mtl_jax.report.rows import Comparison
from mtl_jax.report.statistics import LEVEL

MOST_POINTS = 200
PANEL_HEIGHT = 260


def learning_curves(histories: pl.DataFrame, comparison: Comparison, marks: Mapping[str, Mark]) -> go.Figure | str:
    """The monitored metric of every task on the validation part by step.

    Args:
      histories: Of :func:`read_histories`.
      comparison: Gives the tasks and their metrics.
      marks: Arm -> look.

    Returns:
      The figure: a line for each arm with the band of :func:`mean_curve`; or why there is none, in one sentence.
    """
    wanted = {task: facts["metric"] for task, facts in comparison.tasks.items()}
    rows = histories.filter(part="valid").filter(
        pl.any_horizontal([(pl.col("task") == task) & (pl.col("name") == name) for task, name in wanted.items()])
    )
    if rows.is_empty():
        return "There are no learning curves: no finished run has recorded a validation metric over steps."

    def title(task: str, name: str) -> str:
        return f"{label(task)}: {label(name)}, {comparison.tasks[task]['direction']} is better"

    return _draw(rows, marks, title)


def task_weights(histories: pl.DataFrame, marks: Mapping[str, Mark]) -> go.Figure | str:
    """The weight that the balancing gave each task, mean over the steps of an epoch; or why there is no figure."""
    rows = histories.filter(part="train", name="weight").drop_nulls("task")
    if rows.is_empty():
        return "There are no weights over time: no finished run has recorded any."
    return _draw(rows, marks, lambda task, name: f"weight of {label(task)}")


def gradient_cosines(histories: pl.DataFrame, marks: Mapping[str, Mark]) -> go.Figure | str:
    """Cosines between gradients of tasks (history names that begin with ``cosine``); or why there is no figure."""
    rows = histories.filter(pl.col("name").str.starts_with("cosine"))
    if rows.is_empty():
        return "There are no gradient cosines: no finished run has recorded any."

    def title(task: str | None, name: str) -> str:
        return label(name if task is None else f"{name} of {task}")

    return _draw(rows, marks, title)


def read_histories(ablation: Ablation, comparison: Comparison) -> pl.DataFrame:
    """The curves of all runs behind the rows of a comparison: the columns of a history, and ``arm`` and ``run_id``.

    A run whose curves are missing or damaged is left out, which the ``n`` of every point then says.
    """
    found = [pl.DataFrame(schema={**HISTORY_SCHEMA, "arm": pl.String, "run_id": pl.String})]
    for row in comparison.rows:
        for run_id in row.run_ids:
            try:
                history = RunFolder(ablation.folder / "runs" / run_id).read_history()
            except RunFolderError:
                continue
            if history is not None:
                found.append(history.with_columns(arm=pl.lit(row.arm), run_id=pl.lit(run_id)))
    return pl.concat(found)


def mean_curve(rows: pl.DataFrame) -> pl.DataFrame:
    r"""Mean over runs at every step with its t interval, :math:`\bar x \pm t_{.975, n-1}\, s / \sqrt n`.

    Args:
      rows: Columns ``step``, ``value``; a run that has stopped has no rows after its last step, and n falls.

    Returns:
      ``step, mean, half, n`` by step, at most :data:`MOST_POINTS` rows evenly picked with the first and the last;
      ``half`` is null where n = 1.
    """
    curve = (
        rows.drop_nulls("value")
        .group_by("step")
        .agg(mean=pl.col("value").mean(), std=pl.col("value").std(), n=pl.len())
        .sort("step")
    )
    if len(curve) > MOST_POINTS:
        curve = curve[np.unique(np.linspace(0, len(curve) - 1, MOST_POINTS).round().astype(int))]
    n = curve["n"].to_numpy().astype(float)
    factor = stats.t.ppf((1 + LEVEL) / 2, np.maximum(n - 1, 1)) / np.sqrt(n)
    half = pl.when(pl.col("n") > 1).then(pl.col("std") * pl.Series(factor))
    return curve.select("step", "mean", half.alias("half"), "n")


def _draw(rows: pl.DataFrame, marks: Mapping[str, Mark], title: Callable[[str | None, str], str]) -> go.Figure:
    """A panel for each (task, name), a line with its band for each arm; the legend turns an arm off in all panels."""
    keys = rows.select("task", "name").unique(maintain_order=True).rows()
    arms = [arm for arm in marks if arm in set(rows["arm"])]
    figure = panels([title(*key) for key in keys], [PANEL_HEIGHT] * len(keys), legend=arms, shared_xaxes=True)
    named = set()
    for place, (task, name) in enumerate(keys, start=1):
        of_panel = rows.filter(pl.col("task").eq_missing(task), name=name)
        limits = []
        for arm in arms:
            curve = mean_curve(of_panel.filter(arm=arm))
            if curve.is_empty():
                continue
            for trace in _traces(curve, arm, marks[arm], legend=arm not in named):
                figure.add_trace(trace, row=place, col=1)
            named.add(arm)
            limits.append(_limits(curve))
        figure.update_yaxes(range=_range(limits), row=place, col=1)
        figure.update_xaxes(showticklabels=True, row=place, col=1)
    figure.update_xaxes(title_text="step", row=len(keys), col=1)
    return figure


def _traces(curve: pl.DataFrame, arm: str, mark: Mark, *, legend: bool) -> list[go.Scatter]:
    name = label(arm)
    banded = curve.drop_nulls("half")
    step = banded["step"].to_numpy()
    low, high = ((banded["mean"] + sign * banded["half"]).to_numpy() for sign in (-1, 1))
    red, green, blue = (int(mark.colour[index : index + 2], 16) for index in (1, 3, 5))
    band = go.Scatter(
        x=np.concatenate([step, step[::-1]]),
        y=np.concatenate([high, low[::-1]]),
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.15)",
        line_width=0,
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=arm,
        name=name,
        meta="band",
    )
    line = go.Scatter(
        x=curve["step"].to_numpy(),
        y=curve["mean"].to_numpy(),
        customdata=curve.select(pl.col("half").fill_null(float("nan")), pl.col("n").cast(pl.Float64)).to_numpy(),
        hovertemplate=f"{name}<br>step %{{x}}: %{{y:.5g}} ± %{{customdata[0]:.2g}}, n = %{{customdata[1]}}<extra></extra>",
        mode="lines+markers" if len(curve) <= 30 else "lines",
        line={"color": mark.colour, "dash": mark.dash, "width": 2},
        marker={"symbol": mark.symbol, "size": 6},
        showlegend=legend,
        legendgroup=arm,
        name=name,
        meta="mean",
    )
    return [line] if banded.is_empty() else [band, line]


def _limits(curve: pl.DataFrame) -> tuple[float, float, float, float]:
    """Extremes of the means, and of the bands where all runs are present: two late runs have a band without bounds."""
    complete = curve.filter(pl.col("n") == pl.col("n").max())
    half = complete["half"].fill_null(0.0)
    means = curve["mean"]
    return means.min(), means.max(), (complete["mean"] - half).min(), (complete["mean"] + half).max()


def _range(limits: list[tuple[float, float, float, float]]) -> list[float]:
    """Shows all means, and of the bands at most three times as much on either side."""
    low, high = min(limit[0] for limit in limits), max(limit[1] for limit in limits)
    span = high - low or abs(high) * 0.1 or 1.0
    low = max(min(low, *(limit[2] for limit in limits)), low - 3 * span)
    high = min(max(high, *(limit[3] for limit in limits)), high + 3 * span)
    margin = 0.06 * (high - low) or 0.06 * span
    return [low - margin, high + margin]
