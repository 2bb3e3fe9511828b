"""What is printed of a comparison, in every format: numbers as computed, best in bold, ties and failures marked."""

import io
import json
import re
import shutil
import subprocess

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from mtl_jax.report import latex, markdown
from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.aggregate import aggregate, differences_frame, results_frame
from mtl_jax.report.comparison import compare
from mtl_jax.report.printed import print_comparison
from mtl_jax.report.tables import TIED, results, tables

NOISE = np.array([0.0, 0.0010, -0.0008, 0.0004, -0.0006])
SHIFTS = {
    "single_task": (0.0, 0.0),
    "mmoe+equal": (0.01, 0.0),
    "mmoe+pcgrad": (0.0108, 0.0),
    "a_b & 50 % | c": (-0.2, 0.01),
}
COMPILER = shutil.which("pdflatex")


@pytest.fixture
def ablation(write_ablation):
    """4 arms, 5 seeds, 2 tasks, one failed run; one arm is far below the trivial predictor in ``click``."""
    arms = {
        arm: [{"click": 0.8 + click + noise, "rating": 0.9 - rating + noise} for noise in np.roll(NOISE, 2 * place)]
        for place, (arm, (click, rating)) in enumerate(SHIFTS.items())
    }
    arms["mmoe+equal"][4] = FloatingPointError("loss is nan")
    return read_ablation(write_ablation(arms))


@pytest.fixture
def comparison(ablation):
    (found,) = compare(ablation)
    return found


def cell(comparison, arm, task):
    grid = results(comparison)
    (row,) = (row for row in grid.rows if row[0].text == arm)
    return row[[name.startswith(task) for name in grid.header].index(True)]


def test_cells_say_mean_interval_and_standing(comparison):
    best = comparison.row("mmoe+pcgrad")
    found = best.metrics["click"]
    half = (found.interval[1] - found.interval[0]) / 2
    assert cell(comparison, "mmoe+pcgrad", "click").text == f"{found.mean:.4f} ± {half:.4f}"
    assert cell(comparison, "mmoe+pcgrad", "click").bold
    tied = cell(comparison, "mmoe+equal", "click")
    assert tied.tied and not tied.bold and tied.text.endswith(TIED)
    failed = cell(comparison, "a_b & 50 % | c", "click")
    assert failed.failed and failed.text.endswith("FAILED: below item_mean")
    assert cell(comparison, "item_mean (trivial)", "click").text == "0.7000"


def test_exactly_one_bold_a_task(comparison):
    grid = results(comparison)
    assert [sum(row[column].bold for row in grid.rows) for column in range(len(grid.header))][1:3] == [1, 1]


def test_every_row_is_as_wide_as_its_header(comparison):
    for grid in tables(comparison):
        assert {len(row) for row in grid.rows} == {len(grid.header)}


def test_one_seed_shows_no_bold_and_no_rank(write_ablation):
    arms = {arm: [{"click": 0.8 + click, "rating": 0.9}] for arm, (click, _) in SHIFTS.items()}
    (comparison,) = compare(read_ablation(write_ablation(arms)))
    grid = results(comparison)
    assert not any(cell.bold or cell.tied for row in grid.rows for cell in row)
    assert not any("rank" in name for name in grid.header)
    assert "no interval" in cell(comparison, "mmoe+equal", "click").text


def test_terminal_prints_every_table_and_sentence(comparison):
    console = Console(width=180, file=io.StringIO())
    print_comparison(comparison, console)
    text = " ".join(console.file.getvalue().split())
    for expected in (*(grid.title for grid in tables(comparison)), *comparison.notes):
        assert " ".join(expected.split()) in text
    assert "4 / 5" in text and "FloatingPointError: loss is nan" in text


def test_markdown_is_a_table_whatever_the_names(comparison, ablation):
    text = markdown.document(ablation, [comparison])
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    best = comparison.row("mmoe+pcgrad").metrics["click"].mean
    assert f"**{best:.4f} ±" in text
    assert "a\\_b & 50 % \\| c" in text
    assert ablation.facts["command"] in text


def test_latex_has_rules_bold_and_ties(comparison):
    text = latex.document([comparison])
    grids = tables(comparison)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert text.count(rule) == len(grids)
    assert r"\hline" not in text
    best = comparison.row("mmoe+pcgrad").metrics["click"].mean
    assert re.search(rf"\\textbf{{{best:.4f} \$\\pm\$ [.\d]+}}", text)
    assert r"$^{\approx}$" in text
    assert r"a\_b \& 50 \% | c" in text


def test_latex_escapes_what_would_be_a_command():
    assert latex.escape(r"\input{/etc/passwd} ~^#$") == (
        r"\textbackslash{}input\{/etc/passwd\} \textasciitilde{}\textasciicircum{}\#\$"
    )


@pytest.mark.skipif(COMPILER is None, reason="pdflatex is not installed")
def test_latex_compiles(comparison, tmp_path):
    (tmp_path / "tables.tex").write_text(latex.document([comparison]))
    preamble = (
        r"\documentclass{article}\usepackage{booktabs}\usepackage{graphicx}\begin{document}\input{tables}\end{document}"
    )
    (tmp_path / "main.tex").write_text(preamble)
    command = [COMPILER, "-no-shell-escape", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_csv_has_the_numbers_at_full_precision(comparison):
    frame = pl.read_csv(results_frame([comparison]).write_csv().encode())
    row = frame.filter(arm="mmoe+equal", task="rating").row(0, named=True)
    found = comparison.row("mmoe+equal").metrics["rating"]
    assert (row["mean"], row["std"], row["low"], row["high"]) == (found.mean, found.std, *found.interval)
    assert (row["n"], row["planned"], row["metric"]) == (4, 5, "rmse")
    assert frame.filter(arm="a_b & 50 % | c", task="click")["below_trivial"].to_list() == ["item_mean"]
    differences = differences_frame([comparison])
    assert len(differences) == 6
    assert differences["p_holm"].to_list() == [
        row.differences[task].p_holm for row in comparison.rows for task in row.differences
    ]


def test_aggregate_record_is_json_and_names_its_runs(comparison, ablation):
    record = json.loads(json.dumps(aggregate(ablation, [comparison]), allow_nan=False))
    (table,) = record["comparisons"]
    row = next(row for row in table["rows"] if row["arm"] == "mmoe+equal")
    assert (row["finished"], row["planned"], len(row["run_ids"])) == (4, 5, 4)
    assert set(row["run_ids"]) <= ablation.records.keys()
    values = [ablation.records[run]["metrics"]["test"]["click"]["auc"] for run in row["run_ids"]]
    assert row["metrics"]["click"]["mean"] == pytest.approx(np.mean(values))
    assert row["differences"]["click"]["p_holm"] >= row["differences"]["click"]["p"]
    assert (row["tied_with_best"]["click"], table["checks"]["identical"]) == (True, [])


def test_tried_settings_show_validation_numbers_only(write_ablation):
    seeds = [{"click": 0.8 + n, "rating": 0.9 + n} for n in NOISE]
    better = [{"click": 0.85 + n, "rating": 0.9} for n in NOISE]
    points = {"mmoe": [{"optimizer.learning_rate": 0.1}, {"optimizer.learning_rate": 0.01}]}
    (comparison,) = compare(
        read_ablation(write_ablation({"single_task": seeds, "mmoe": [seeds, better]}, points=points))
    )
    grid = tables(comparison)[-1]
    assert [[cell.text for cell in row[:2]] for row in grid.rows] == [
        ["mmoe", "optimizer.learning_rate=0.1"],
        ["mmoe", "optimizer.learning_rate=0.01"],
    ]
    assert [row[-1].text for row in grid.rows] == ["", "chosen"]
    assert "mmoe (optimizer.learning_rate=0.01; best of 2 on validation)" in [
        row[0].text for row in results(comparison).rows
    ]
