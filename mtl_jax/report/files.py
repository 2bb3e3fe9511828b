"""The files of a report."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from mtl_jax.errors import RunFolderError
from mtl_jax.report import latex, markdown
from mtl_jax.report.ablation import Ablation, members_frame
from mtl_jax.report.aggregate import aggregate, candidates_frame, differences_frame, results_frame
from mtl_jax.report.folder import write_atomically
from mtl_jax.report.rows import Comparison

FORMATS = ("md", "tex", "csv", "json", "parquet", "png", "html")


def write_report(
    ablation: Ablation, comparisons: Sequence[Comparison], folder: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Writes what is asked for, each file as a whole, and returns the paths.

    =========  ==========================================================================================
    md         ``report.md``
    tex        ``tables.tex``
    csv        ``results.csv``, ``differences.csv``, ``candidates.csv``; those that have rows
    json       ``table.json``, the aggregate record
    parquet    ``members.parquet``, every metric of every run
    png        ``sweep.png``, metrics over a number of the data (``axis.data.*``); where one varies
    html       ``report.html``, one page that opens offline
    =========  ==========================================================================================

    Raises:
      RunFolderError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"cannot make '{folder}' ({error.strerror}); expected a folder to write to. Choose another with --out"
        ) from error
    made: dict[str, Callable[[], dict[str, bytes]]] = {
        "md": lambda: {"report.md": markdown.document(ablation, comparisons).encode()},
        "tex": lambda: {"tables.tex": latex.document(comparisons).encode()},
        "csv": lambda: _csv(comparisons),
        "json": lambda: {"table.json": f"{json.dumps(aggregate(ablation, comparisons), indent=2)}\n".encode()},
        "parquet": lambda: {"members.parquet": _parquet(members_frame(ablation))},
        "png": lambda: _sweep(comparisons),
        "html": lambda: {"report.html": _page(ablation, comparisons).encode()},
    }
    written = []
    for name in formats:
        for file, content in made[name]().items():
            write_atomically(folder / file, content)
            written.append(folder / file)
    return written


def _csv(comparisons: Sequence[Comparison]) -> dict[str, bytes]:
    frames = {
        "results.csv": results_frame(comparisons),
        "differences.csv": differences_frame(comparisons),
        "candidates.csv": candidates_frame(comparisons),
    }
    return {name: frame.write_csv().encode() for name, frame in frames.items() if len(frame)}


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _sweep(comparisons: Sequence[Comparison]) -> dict[str, bytes]:
    # Here and not above, as below.
    from mtl_jax.report import sweep
    from mtl_jax.report.drawing import marks

    axis = sweep.axis_of(comparisons)
    return {} if axis is None else {"sweep.png": sweep.draw(axis, marks(comparisons))}


def _page(ablation: Ablation, comparisons: Sequence[Comparison]) -> str:
    # Here and not above: plotly is slow to import, and only this format needs it.
    from mtl_jax.report.page import page

    return page(ablation, comparisons)
