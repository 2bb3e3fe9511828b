"""The use of experts in one run as a figure: what every gate weighs, over all rows and within each domain."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtl_jax.report.folder import write_atomically
from mtl_jax.report.plot import DPI, INK

MOST_PLACES = 6
"""Heat maps beside each other; further domains are left out, and the title says so."""
MOST_TEXTS = 10
"""Columns up to which cells say their number."""


def plot_gates(record: Mapping[str, Any], path: str | os.PathLike) -> bool:
    """Draws ``diagnostics.gate_use`` of a record into one PNG: a heat map for all rows, and one for each domain.

    Rows are gates, columns what they weigh: experts, tasks, units. The colour is the mean weight; a member that a gate does
    not weigh stays empty.

    Args:
      record: Of a run.
      path: Of the PNG; replaced as a whole.

    Returns:
      Whether there was anything to draw.
    """
    use = record.get("diagnostics", {}).get("gate_use")
    if not use:
        return False
    # Imported here: reading records must not wait for matplotlib.
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = list(use)[:MOST_PLACES]
    gates = list(use[places[0]])
    by_length = sorted(use[places[0]].values(), key=len, reverse=True)  # the longest has the members in their order
    members = list(dict.fromkeys(member for shares in by_length for member in shares))
    width = min(2.6 + 0.42 * len(members), 11.0)
    figure = Figure(
        figsize=(width * len(places), 1.6 + 0.32 * len(gates)), dpi=DPI, facecolor="white", layout="constrained"
    )
    hidden = f"; {len(use) - len(places)} domains are not shown" if len(use) > len(places) else ""
    figure.suptitle(
        f"{record['method']['sharing']}: mean weight in every gate{hidden}", x=0.01, ha="left", fontsize=11, color=INK
    )
    tables = {
        place: np.array([[use[place][gate].get(member, np.nan) for member in members] for gate in gates], float)
        for place in places
    }
    least, most = (function([function(table) for table in tables.values()]) for function in (np.nanmin, np.nanmax))
    low, high = min(0.0, least), max(1.0, most)
    panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    for panel, (place, table) in zip(panels, tables.items(), strict=True):
        image = panel.imshow(table, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        panel.set_title("all rows" if place == "all" else place, fontsize=9, color=INK)
        panel.set_yticks(range(len(gates)), gates, fontsize=8)
        if len(members) <= 40:
            panel.set_xticks(range(len(members)), members, fontsize=7, rotation=60, ha="right")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        if len(members) <= MOST_TEXTS:
            for (row, column), value in np.ndenumerate(table):
                if not np.isnan(value):
                    shade = "black" if value > (low + high) / 2 else "white"
                    panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    figure.colorbar(image, ax=list(panels), shrink=0.8).outline.set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(Path(path), buffer.getvalue())
    return True
