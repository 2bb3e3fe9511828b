"""python -m experiments.report DIR: an ablation as tables, files for a paper, and one HTML page (see --help)."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from experiments.cli import FAILURE, USAGE
from mtl_jax.errors import ConfigError, MissingFile, MtlJaxError, RunFolderError
from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.comparison import compare
from mtl_jax.report.files import FORMATS, write_report
from mtl_jax.report.printed import print_comparison, rich_table
from mtl_jax.report.tables import spanning

PLAIN_WIDTH = 160


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables and writes the files; 0, or 2 where the folder or the baseline is a mistake."""
    options = _parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        ablation = read_ablation(options.folder)
        comparisons = compare(ablation, baseline=options.baseline)
    except (ConfigError, MissingFile, RunFolderError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return USAGE
    for grid in spanning(comparisons):
        console.print(rich_table(grid))
    for comparison in comparisons:
        print_comparison(comparison, console)
    try:
        written = write_report(ablation, comparisons, options.out or options.folder / "report", options.formats)
    except MtlJaxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILURE
    for path in written:
        console.print(f"written {path}", highlight=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of an ablation, with ablation.json")
    parser.add_argument("--baseline", metavar="NAME", help="arm to compare with (default: that of the ablation)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where files go (default: DIR/report)")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS), help="default: all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
