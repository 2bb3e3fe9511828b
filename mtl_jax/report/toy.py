"""The two-task toy as a figure and a table: where each method went, from every start."""

import io
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from mtl_jax.report.folder import RunFolder, plain, write_atomically
from mtl_jax.report.plot import INK

Content = Mapping[str, Any]
# One a start: of Okabe and Ito, without their yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
SET, CONTOUR = "#000000", "#C8C8C8"
LIMIT = 10.0
WIDTH, DPI = 3.0, 110  # inches of a panel, and dots of an inch
GRID = 161


def write_toy(content: Content, values_at: Callable[[np.ndarray, float], np.ndarray], home: RunFolder) -> None:
    """Writes ``toy.json`` and ``toy.png``; the arguments are those of :func:`plot_toy`."""
    text = json.dumps(plain(content), allow_nan=False)  # on one line: most of it are the points of trajectories
    write_atomically(home.path / "toy.json", f"{text}\n".encode())
    plot_toy(content, values_at, home.path / "toy.png")


def plot_toy(content: Content, values_at: Callable[[np.ndarray, float], np.ndarray], path: str | os.PathLike) -> None:
    """Draws all methods into one PNG, a row each.

    Left, for every kappa, the plane: contours of the mean loss, the Pareto set, and the way from each start to its end.
    Right the same ways in the space of the two losses, with the Pareto front. A dot is an end on the set, a ring one
    elsewhere, a cross the place of a step that the method could not take.

    Args:
      content: ``kappas``, ``pareto_set`` (points) and ``methods``: name -> ``outcomes``, ``points`` and ``losses``
        [kappa][start][kept][2].
      values_at: (points, kappa) -> both losses.
      path: Of the PNG; replaced as a whole.
    """
    # Imported here: reading records must not wait for matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kappas, methods = content["kappas"], content["methods"]
    columns, rows = 2 * len(kappas), len(methods)
    size = (max(2, columns) * WIDTH, rows * 0.9 * WIDTH + 0.6)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    front = np.asarray(content["pareto_set"])
    for row, (name, method) in zip(panels, methods.items(), strict=True):
        for index, kappa in enumerate(kappas):
            outcomes = [outcome for outcome in method["outcomes"] if outcome["kappa"] == kappa]
            plane, space = row[index], row[len(kappas) + index]
            _draw_plane(plane, front, values_at, kappa)
            _draw_ways(plane, method["points"][index], outcomes)
            space.plot(*values_at(front, kappa).T, color=SET, linewidth=3, solid_capstyle="round", zorder=2)
            _draw_ways(space, method["losses"][index], outcomes)
            for panel, names in ((plane, ("$x_1$", "$x_2$")), (space, ("$L_1$", "$L_2$"))):
                _style(panel, f"{name}, κ = {kappa:g}", names)
    _legend(figure, next(iter(methods.values()))["outcomes"], kappas[0])
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(Path(path), buffer.getvalue())


def toy_table(content: Content) -> Table:
    """One row a method, kappa and start: the end, and when it came to the Pareto set or what kept it from there."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "kappa", "start", "end", "losses at the end"):
        table.add_column(name, justify="left" if name == "method" else "right")
    table.add_column("Pareto set")
    table.add_column("steps", justify="right")
    for name, method in content["methods"].items():
        for outcome in method["outcomes"]:
            table.add_row(
                name,
                f"{outcome['kappa']:g}",
                _pair(outcome["start"], "g"),
                _pair(outcome["end"], ".3f"),
                _pair(outcome["losses"], ".3f"),
                *_ending(outcome, content["steps"]),
            )
        table.add_section()
    return table


def _ending(outcome: Mapping[str, Any], steps: int) -> tuple[str, str]:
    if outcome["nonfinite"] is not None:
        return "no: step not finite", f"{outcome['nonfinite']:,}"
    if outcome["arrived"] is not None:
        return "reached", f"{outcome['arrived']:,}"
    return f"no: {outcome['distance']:.3g} away", f"{steps:,}"


def _pair(numbers: Sequence[float], form: str) -> str:
    return "({})".format(", ".join(format(round(number, 6) + 0.0, form) for number in numbers))


def _draw_plane(panel, front: np.ndarray, values_at, kappa: float) -> None:
    axis = np.linspace(-LIMIT, LIMIT, GRID)
    mean = values_at(np.stack(np.meshgrid(axis, axis), axis=-1), kappa).mean(axis=-1)
    panel.contour(axis, axis, mean, levels=18, colors=CONTOUR, linewidths=0.7, linestyles="solid", zorder=1)
    panel.plot(*front.T, color=SET, linewidth=3, solid_capstyle="round", zorder=2)


def _draw_ways(panel, ways: Sequence[Any], outcomes: Sequence[Mapping[str, Any]]) -> None:
    for way, outcome, colour in zip(np.asarray(ways, float), outcomes, itertools.cycle(COLOURS), strict=False):
        panel.plot(*way.T, color=colour, linewidth=1.4, zorder=3)
        panel.plot(*way[0], marker="s", markersize=4, color=colour, zorder=4)
        if outcome["nonfinite"] is not None:
            panel.plot(*way[-1], marker="x", markersize=8, markeredgewidth=2, color=colour, zorder=5)
        else:
            face = colour if outcome["arrived"] is not None else "white"
            panel.plot(*way[-1], marker="o", markersize=6, markerfacecolor=face, markeredgecolor=colour, zorder=5)


def _style(panel, title: str, names: tuple[str, str]) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")
    panel.tick_params(labelsize=7, colors=INK, length=3)
    panel.set_title(title, fontsize=9, loc="left", color=INK)
    panel.set_xlabel(names[0], fontsize=8, color=INK, labelpad=1)
    panel.set_ylabel(names[1], fontsize=8, color=INK, labelpad=1)


def _legend(figure, outcomes: Sequence[Mapping[str, Any]], kappa: float) -> None:
    from matplotlib.lines import Line2D

    starts = [outcome["start"] for outcome in outcomes if outcome["kappa"] == kappa]
    entries = [
        Line2D([], [], color=colour, marker="s", markersize=4, label=f"from {_pair(start, 'g')}")
        for start, colour in zip(starts, itertools.cycle(COLOURS), strict=False)
    ]
    shapes = {"end on the set": ("o", INK), "end elsewhere": ("o", "white"), "step not finite": ("x", INK)}
    entries.append(Line2D([], [], color=SET, linewidth=3, label="Pareto set, front"))
    entries += [
        Line2D([], [], linestyle="", marker=marker, markerfacecolor=face, markeredgecolor=INK, label=name)
        for name, (marker, face) in shapes.items()
    ]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(len(entries), 5), fontsize=7.5, frameon=False)
