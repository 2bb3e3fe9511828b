"""The report as one HTML file that opens without a network: a table, its notes, and figures that answer to the mouse."""

import base64
import html
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from mtl_jax.report import curves, figures, sweep
from mtl_jax.report.ablation import Ablation
from mtl_jax.report.drawing import Mark, marks
from mtl_jax.report.pareto import pareto
from mtl_jax.report.record import data_text
from mtl_jax.report.rows import Comparison
from mtl_jax.report.tables import LEGEND, Cell, Grid, spanning, tables

# The browser itself refuses every request to anywhere; the empty icon keeps it from asking a server for one.
HEAD = """<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,">"""
STYLE = """
body { margin: 0 auto; max-width: 1120px; padding: 16px; font: 15px/1.5 system-ui, sans-serif; color: #222;
  background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.6em; line-height: 1.2; margin: .4em 0; }
h2 { font-size: 1.3em; margin: 1.8em 0 .4em; border-top: 1px solid #ccc; padding-top: .8em; }
h3 { font-size: 1.05em; margin: 1.6em 0 .2em; }
p, ul { max-width: 76ch; margin: .3em 0 .6em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88em; }
th, td { padding: 4px 10px 4px 0; text-align: right; vertical-align: top; white-space: nowrap; }
thead th { white-space: normal; overflow-wrap: normal; vertical-align: bottom; }
th.text, td.text { text-align: left; }
thead th { border-bottom: 1px solid #222; }
tbody tr { border-bottom: 1px solid #e6e6e6; }
.faint { color: #6b6b6b; }
.failed { color: #b03a00; display: inline-block; max-width: 20ch; white-space: normal; }
details { margin: .5em 0; }
summary { cursor: pointer; }
code { font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
dd { margin: 0; }
"""
# Among the buttons that plotly would show is one that sends the figure to a server: these are all there are.
CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    "showSendToCloud": False,
    "showAxisRangeEntryBoxes": False,
}


def page(ablation: Ablation, comparisons: Iterable[Comparison], *, title: str | None = None) -> str:
    """One self-contained HTML file of an ablation.

    It holds plotly.js (about 4.8 MB) once and asks no network for anything. A figure without data gives way to a
    sentence that says why.

    Args:
      ablation: What was planned and recorded; curves are read from its run folders.
      comparisons: One for each data set.
      title: Of the page, default Ablation and its id.

    Returns:
      The text of the file.
    """
    comparisons = tuple(comparisons)
    title = title or f"Ablation {ablation.facts['id']}"
    look = marks(comparisons)
    sections = "\n".join(
        _section(ablation, comparison, look, index) for index, comparison in enumerate(comparisons, start=1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
{HEAD}
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<h1>{html.escape(title)}</h1>
{_opening(ablation)}
{_sweep(comparisons, look)}
{sections}
<h2>Where the numbers come from</h2>
{_provenance(ablation)}
</body>
</html>
"""


def _opening(ablation: Ablation) -> str:
    planned = [member["run_id"] for member in ablation.facts["members"]]
    finished = sum(ablation.records.get(run_id, {}).get("status") == "completed" for run_id in planned)
    command = html.escape(ablation.facts["command"])
    return f"<p>{finished} of {len(planned)} planned runs have finished.</p>\n<p><code>{command}</code></p>"


def _sweep(comparisons: tuple[Comparison, ...], look: Mapping[str, Mark]) -> str:
    """All comparisons in one picture, where they differ in a number of the data."""
    axis = sweep.axis_of(comparisons)
    if axis is None:
        return ""
    more = "\n".join(map(_more, spanning(comparisons)))
    picture = base64.b64encode(sweep.draw(axis, look)).decode()
    name = html.escape(axis.name)
    return (
        f"<h3>Over {name}</h3>\n"
        f"<p>Means over seeds with 95 % intervals. The sections below have one value of {name} each.</p>\n"
        f'<img style="max-width: 100%" alt="Metrics of all arms over {name}" src="data:image/png;base64,{picture}">\n{more}'
    )


def _section(ablation: Ablation, comparison: Comparison, look: Mapping[str, Mark], index: int) -> str:
    results, *more = tables(comparison)
    drawn, left_out = [], []
    for name, heading, caption, figure in _figures(ablation, comparison, look):
        if isinstance(figure, str):
            left_out.append(figure)
            continue
        plot = to_html(figure, config=CONFIG, include_plotlyjs=False, full_html=False, div_id=f"{name}-{index}")
        drawn.append(f"<section>\n<h3>{html.escape(heading)}</h3>\n<p>{html.escape(caption)}</p>\n{plot}\n</section>")
    parts = [
        f"<h2>{html.escape(comparison.data)}</h2>",
        _table(results),
        f'<p class="faint">{html.escape(LEGEND)}.</p>',
        _sentences(comparison.notes),
        *map(_more, more),
        *drawn,
        f"<h3>Not drawn</h3>{_sentences(left_out)}" if left_out else "",
    ]
    return "\n".join(part for part in parts if part)


def _figures(
    ablation: Ablation, comparison: Comparison, look: Mapping[str, Mark]
) -> Iterator[tuple[str, str, str, go.Figure | str]]:
    """Name, heading, caption and figure, in the order of reading: the answer first, then how it came about."""
    histories = curves.read_histories(ablation, comparison)
    yield (
        "differences",
        f"How much each arm differs from {comparison.baseline}, seed by seed",
        "Mean of the differences between runs of the same seed, with its 95 % interval; right of the line is better. An "
        "arm is called better or worse where the paired test rejects at 5 % after Holm's correction for all comparisons "
        "of the table: an interval without 0 is not enough.",
        figures.differences(comparison, look),
    )
    yield (
        "pareto",
        "Whether one task gains at the cost of another",
        "Means over seeds with 95 % intervals; up and to the right is better. The dashed line joins the arms whose means "
        "no other arm beats in both tasks, where all arms have an interval; neighbours with overlapping intervals may "
        "change places. Open marks are below a trivial predictor; predictors far from all arms are off the scale.",
        pareto(comparison, look),
    )
    yield (
        "grid",
        "Which sharing goes with which balancing",
        "Mean over seeds ± half the width of its 95 % interval, and the number of seeds.",
        figures.heat_maps(comparison),
    )
    yield (
        "ranks",
        "Which ranks differ",
        "Rank among the arms within a seed, mean over seeds (not the rank of the table, which ranks the means). Each bar "
        "is as long as Nemenyi's critical difference: arms whose bars overlap are not told apart. The grey field is the "
        "bar of the best.",
        figures.ranks(comparison, look),
    )
    yield (
        "curves",
        "How the validation metrics moved while training",
        "Mean over seeds with its 95 % band; where seeds stop at different steps the rest are averaged, and the number is "
        "shown under the mouse. A click in the legend hides an arm, two clicks leave it alone.",
        curves.learning_curves(histories, comparison, look),
    )
    yield (
        "weights",
        "What weight the balancing gave each task",
        "Mean over the steps of an epoch, then over seeds, with a 95 % band.",
        curves.task_weights(histories, look),
    )
    yield (
        "cosines",
        "Whether the gradients of the tasks agree",
        "Cosine of the angle between gradients of tasks, mean over seeds with a 95 % band; below 0 they conflict.",
        curves.gradient_cosines(histories, look),
    )
    yield (
        "gates",
        "Which experts each task uses",
        "Share of every expert in the gate, mean over seeds.",
        figures.gate_use(ablation, comparison),
    )


def _table(grid: Grid) -> str:
    head = "".join(f"<th{_left(grid, index)}>{html.escape(name)}</th>" for index, name in enumerate(grid.header))
    rows = "\n".join(
        f"<tr>{''.join(f'<td{_left(grid, index)}>{_cell(cell)}</td>' for index, cell in enumerate(row))}</tr>"
        for row in grid.rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _left(grid: Grid, index: int) -> str:
    return ' class="text"' if index < grid.text_columns else ""


def _cell(cell: Cell) -> str:
    text = html.escape(cell.text)
    text = f"<b>{text}</b>" if cell.bold else text
    return f'<span class="failed">{text}</span>' if cell.failed else text


def _more(grid: Grid) -> str:
    """A table behind a line that opens it."""
    return f"<details><summary>{html.escape(grid.title)}</summary>{_table(grid)}</details>"


def _sentences(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _provenance(ablation: Ablation) -> str:
    records = [record for record in ablation.records.values() if record["status"] == "completed"]
    started = sorted(text for record in records if (text := record["timing"].get("started")))
    versions = {name: [record["versions"].get(name) for record in records] for name in _names(records)}
    facts = {
        "ablation": ablation.facts["id"],
        "created": ablation.facts["created"],
        "runs started": " to ".join(dict.fromkeys([started[0], started[-1]])) if started else "not recorded",
        "commit": _distinct(_commit(record) for record in records),
        "device": _distinct(_device(record) for record in records),
        "precision": _distinct(record["precision"] for record in records),
        **{name: _distinct(found) for name, found in versions.items()},
        "data": _distinct(
            f"{data_text(r['data'])}, split {r['data']['split']}, sha256 {r['data']['sha256']}" for r in records
        ),
    }
    items = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return f"<dl>{items}</dl>"


def _names(records: list[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record["versions"]))


def _commit(record: Mapping[str, Any]) -> str | None:
    return None if record["commit"] is None else record["commit"] + (" with changes" if record["dirty"] else "")


def _device(record: Mapping[str, Any]) -> str | None:
    device = record["device"]
    return None if device["kind"] is None else f"{device['kind']}, {device['count'] or 1} used"


def _distinct(values: Iterable[str | None]) -> str:
    """The one value of all runs, or all of them: runs that differ here were not made alike."""
    found = list(dict.fromkeys(value or "not recorded" for value in values))
    return "; ".join(found) if found else "not recorded"
