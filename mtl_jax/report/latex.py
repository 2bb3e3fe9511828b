r"""A report as LaTeX tables, to be read with ``\input``; the preamble needs ``\usepackage{booktabs}``."""

from collections.abc import Sequence

from tabulate import tabulate

from mtl_jax.report.rows import Comparison
from mtl_jax.report.tables import LEGEND, TIED, Cell, Grid, spanning, tables

SYMBOLS = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    TIED: r"$^{\approx}$",
}
SPECIAL = str.maketrans(SYMBOLS)
RULES = (r"\toprule", r"\midrule", r"\bottomrule")


def document(comparisons: Sequence[Comparison]) -> str:
    """All tables of all data sets, one ``table`` environment each, the sentences as comments above them."""
    parts = [r"% \usepackage{booktabs} and \usepackage{graphicx} in the preamble"]
    parts += [_environment(grid, f"tab:{grid.name}-{index}") for index, grid in enumerate(spanning(comparisons))]
    for index, comparison in enumerate(comparisons):
        parts += [f"% {' '.join(note.split())}" for note in comparison.notes]
        parts += [_environment(grid, f"tab:{grid.name}-{index}") for grid in tables(comparison)]
    return "\n".join(parts) + "\n"


def latex_table(grid: Grid) -> str:
    r"""The ``tabular`` with the rules of booktabs; the best is bold, ties carry a raised \approx."""
    align = ["left"] * grid.text_columns + ["right"] * (len(grid.header) - grid.text_columns)
    rows = [[_cell(cell) for cell in row] for row in grid.rows]
    header = [escape(name) for name in grid.header]
    text = tabulate(rows, header, tablefmt="latex_raw", disable_numparse=True, colalign=align)
    # latex_booktabs would escape the cells, in which bold and symbols are commands.
    for rule in RULES:
        text = text.replace(r"\hline", rule, 1)
    return text


def escape(text: str) -> str:
    """``text`` on one line, in which nothing is a command."""
    return " ".join(text.split()).translate(SPECIAL)


def _environment(grid: Grid, label: str) -> str:
    caption = escape(f"{grid.title}; {LEGEND}" if grid.name == "results" else grid.title)
    # Wide tables are set smaller instead of running off the page.
    body = f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{latex_table(grid)}}}"
    return f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\label{{{label}}}\n{body}\n\\end{{table}}"


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    return f"\\textbf{{{text}}}" if cell.bold else text
