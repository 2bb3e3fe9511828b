"""A report as one Markdown file."""

from collections.abc import Sequence

from tabulate import tabulate

from mtl_jax.report.ablation import Ablation
from mtl_jax.report.rows import Comparison
from mtl_jax.report.tables import LEGEND, Cell, Grid, spanning, tables

MARKUP = str.maketrans({c: f"\\{c}" for c in "\\|*_`<>[]$"})


def document(ablation: Ablation, comparisons: Sequence[Comparison]) -> str:
    """Where the numbers come from, then sentences and tables for each data set."""
    facts = ablation.facts
    parts = [f"# Ablation {escape(str(facts.get('id', ablation.folder.name)))}"]
    commits = sorted({str(record["commit"]) for record in ablation.records.values() if record["commit"]})
    lines = [f"- command: `{facts.get('command')}`", f"- started: {facts.get('created')}"]
    lines += [f"- commit: {', '.join(commits)}"] if commits else []
    done = [record for record in ablation.records.values() if record["status"] == "completed"]
    versions = {", ".join(f"{name} {v}" for name, v in record["versions"].items() if v) for record in done}
    devices = {f"{record['device']['count']} x {record['device']['kind']}" for record in done}
    lines += [f"- versions: {escape(text)}" for text in sorted(versions)]
    lines += [f"- device: {escape(text)}" for text in sorted(devices)]
    parts.append("\n".join(lines))
    parts += [f"**{escape(grid.title)}**\n\n{markdown_table(grid)}" for grid in spanning(comparisons)]
    for comparison in comparisons:
        parts.append(f"## {escape(comparison.data)}")
        parts.append("\n".join(f"- {escape(note)}" for note in comparison.notes))
        parts += [f"**{escape(grid.title)}**\n\n{markdown_table(grid)}" for grid in tables(comparison)]
    return "\n\n".join([*(part for part in parts if part), LEGEND]) + "\n"


def markdown_table(grid: Grid) -> str:
    """A pipe table; the best is bold, and text that means something to Markdown is escaped."""
    align = ["left"] * grid.text_columns + ["right"] * (len(grid.header) - grid.text_columns)
    rows = [[_cell(cell) for cell in row] for row in grid.rows]
    header = [escape(name) for name in grid.header]
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=align)


def escape(text: str) -> str:
    """``text`` on one line, in which nothing is markup."""
    return " ".join(text.split()).translate(MARKUP)


def _cell(cell: Cell) -> str:
    return f"**{escape(cell.text)}**" if cell.bold else escape(cell.text)
