"""A comparison in the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtl_jax.report.rows import Comparison
from mtl_jax.report.tables import LEGEND, Cell, Grid, tables


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints the tables of one data set, then what must be known to read them."""
    for grid in tables(comparison):
        console.print(rich_table(grid))
    console.print(Text(LEGEND, style="dim"))
    for note in comparison.notes:
        console.print(Text(f"- {note}", style="yellow" if note in comparison.refused else ""))


def rich_table(grid: Grid) -> Table:
    """The table with the best in bold and failures in red."""
    table = Table(title=Text(grid.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(grid.header):
        table.add_column(Text(name), justify="left" if index < grid.text_columns else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(_text(cell) for cell in row))
    return table


def _text(cell: Cell) -> Text:
    return Text(cell.text, style="bold red" if cell.failed else "bold" if cell.bold else "")
