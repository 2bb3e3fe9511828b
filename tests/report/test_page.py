"""The HTML report: what it says, that it asks nobody for anything, and that a browser without a network draws it."""

import dataclasses
import html.parser
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtl_jax
from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.comparison import compare
from mtl_jax.report.page import page
from mtl_jax.report.tables import tables

SCREENSHOT = Path(mtl_jax.__file__).parents[1] / "docs" / "screenshot.py"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FIGURES = ("differences", "pareto", "grid", "ranks", "curves", "weights", "cosines", "gates")


@pytest.fixture(scope="module")
def ablation(grid_folder):
    return read_ablation(grid_folder)


@pytest.fixture(scope="module")
def written(ablation):
    return page(ablation, compare(ablation))


class Reader(html.parser.HTMLParser):
    """Elements, attributes that fetch, visible text, and the text of each table cell."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text, self.cells = [], [], "", []
        self._open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "poster")]
        if tag in ("td", "th"):
            self.cells.append("")
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._open):
            self.text += data
            if {"td", "th"} & set(self._open):
                self.cells[-1] += data


def test_the_file_holds_plotly_once_and_no_address_outside(written):
    read = Reader(written)
    assert read.addresses == ["data:,"]
    assert not {"a", "iframe", "img", "form", "object", "embed"} & set(read.tags)
    assert written.count("plotly.js v") == 1
    assert "default-src 'none'" in written
    # plotly would offer a button that sends the figure to a server.
    assert written.count('"showSendToCloud": false') == len(FIGURES)
    assert len(written) < 6_000_000  # 4.8 MB of it are plotly.js


def test_texts_from_records_are_escaped(written):
    assert "<script>alert(1)" not in written and "<at step 12>" not in written and "sharing=<all>" not in written
    text = Reader(written).text
    assert "<script>alert(1)</script> $x$ %{y}" in text and "sharing=<all>" in text


def test_the_table_has_means_intervals_counts_and_differences(ablation, written):
    (comparison,) = compare(ablation)
    cells = Reader(written).cells
    for grid in tables(comparison):
        header = list(grid.header)
        at = next(i for i in range(len(cells)) if cells[i : i + len(header)] == header)
        for index, row in enumerate(grid.rows, start=1):
            shown = cells[at + index * len(header) : at + (index + 1) * len(header)]
            assert shown == [cell.text for cell in row]
    row, at = comparison.row("mmoe+equal"), cells.index("mmoe+equal")
    mean, _, half = cells[at + 1].split()[:3]
    low, high = row.metrics["buy"].interval
    assert float(mean) == pytest.approx(row.metrics["buy"].mean, abs=5.1e-5)
    assert float(half) == pytest.approx((high - low) / 2, abs=5.1e-5)
    assert "FAILED: below logistic" in cells[cells.index("ple+equal") + 1]


def test_notes_failures_and_origin_are_told(ablation, written):
    (comparison,) = compare(ablation)
    text = Reader(written).text
    for note in comparison.notes:
        assert note in text
    assert "FloatingPointError: loss is nan <at step 12>" in text
    assert "34 of 35 planned runs have finished" in text
    assert "2026-03-01T10:00:00+00:00" in text and "0123abcd" in text


def test_commit_device_and_versions_come_from_the_records(ablation):
    def made(record, version, dirty):
        facts = {"commit": "c0ffee", "dirty": dirty, "device": {"kind": "TPU <v5>", "count": 4, "memory_bytes": None}}
        return record | facts | {"versions": record["versions"] | {"jax": version}}

    records = {
        run: made(record, "0.10.2" if index % 2 else "0.11.0", index == 0)
        for index, (run, record) in enumerate(ablation.records.items())
    }
    text = Reader(page(dataclasses.replace(ablation, records=records), ())).text
    assert "c0ffee with changes; c0ffee" in text
    assert "TPU <v5>, 4 used" in text
    assert "0.11.0; 0.10.2" in text  # runs that were made by different versions are told apart


def test_a_figure_without_data_gives_way_to_a_sentence(ablation):
    (comparison,) = compare(ablation)
    few = tuple(row for row in comparison.rows if row.arm in ("single_task", "mmoe+equal"))
    written = page(ablation, [dataclasses.replace(comparison, rows=few)], title="Two <arms>")
    assert "There is no grid of sharing and balancing" in written
    assert "There are no gradient cosines" in written
    assert 'id="cosines-1"' not in written and 'id="curves-1"' in written
    assert "<h1>Two &lt;arms&gt;</h1>" in written


def test_two_data_sets_are_two_sections_with_figures_of_their_own(ablation):
    (comparison,) = compare(ablation)
    written = page(ablation, [comparison, dataclasses.replace(comparison, data="other")])
    assert 'id="differences-1"' in written and 'id="differences-2"' in written
    assert written.count("plotly.js v") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
@pytest.mark.parametrize("width", [1200, 390])
def test_chromium_draws_every_figure_without_a_network(written, tmp_path, width):
    """At the width of a desk and of a phone: no message, no request, nothing wider than the window."""
    (tmp_path / "report.html").write_text(written, encoding="utf-8")
    arguments = [tmp_path / "report.html", tmp_path / "report.png", "--width", str(width)]
    done = subprocess.run([sys.executable, SCREENSHOT, *arguments], capture_output=True, text=True, timeout=180)
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["requests"] == []
    assert found["figures"].keys() == {f"{name}-1" for name in FIGURES}
    assert all(found["figures"].values()), found["figures"]
    assert found["width"] == width
    assert done.returncode == 0
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")
def test_the_look_at_a_page_sees_what_is_wrong_with_it(tmp_path):
    """A page with an exception, a message and a request: the test above would not pass over them."""
    (tmp_path / "bad.html").write_text(
        '<img src="http://localhost:9/x.png"><script>console.error("said"); throw Error("thrown")</script>'
    )
    done = subprocess.run(
        [sys.executable, SCREENSHOT, tmp_path / "bad.html"], capture_output=True, text=True, timeout=180
    )
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["requests"] == ["http://localhost:9/x.png"]
    assert any("said" in text for text in found["problems"]) and any("thrown" in text for text in found["problems"])
