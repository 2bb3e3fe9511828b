"""The table that a user reads at the end of a run."""

import io

import pytest
from rich.console import Console

from mtl_jax.report.terminal import print_result


@pytest.fixture
def printed():
    def render(record, *, width=100, **options):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        print_result(record, console, **options)
        return console.file.getvalue()

    return render


def row(text, task):
    """The two lines of a task's row."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:1] == [task])
    return lines[start : start + 2]


def test_every_task_stands_beside_what_it_has_to_beat(printed, record, reference):
    text = printed(record, reference=reference, folder="outputs/runs/x")
    first, second = row(text, "buy")
    assert first.split() == ["buy", "auc", "0.8046", "0.5000", "0.7712", "0.7992", "0.8031", "+0.68", "%"]
    assert second.split() == ["binary", "49,725", "/", "212,732", "higher", "over", "logistic"]
    first, second = row(text, "spend")
    assert first.split() == ["spend", "rmse", "1.0214", "1.1846", "1.0655", "1.0463", "1.0297", "+2.38", "%"]
    assert second.split() == ["regression", "212,732", "lower", "over", "logistic"]
    # Exact values of the means: tests/report/test_compare.py.
    assert "+0.66 % over the best trivial baseline of each task, mean of 4 (test)" in text
    assert "+0.75 % against single task, positive = better" in text
    assert "182,346 examples/s, compile 11.8 s, wall 74.2 s" in text
    assert "one seed has no interval. Run more seeds" in text
    assert "outputs/runs/x" in text


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("repurchase", " (repurchase)"),
        ("cross_department", " (cross_department)"),
        ("complete_journey", ""),
        (None, ""),
    ],
)
def test_the_title_says_data_set_and_recipe(printed, record, recipe, said):
    """Recipes of one data set have other rows and tasks. A recipe without a name of its own is not repeated."""
    record["data"]["recipe"] = recipe
    assert f" on complete_journey{said}, test part" in printed(record)


def test_below_baseline_is_marked_in_the_row_itself(printed, record):
    text = printed(record)
    assert "below baseline" in row(text, "coupon")[1]
    assert all("below baseline" not in line for task in ("buy", "promo", "spend") for line in row(text, task))


def test_lines_fit_a_terminal_of_100_columns(printed, record, reference):
    assert max(map(len, printed(record, reference=reference).splitlines())) <= 100


def test_the_command_of_a_missing_reference_can_be_copied(printed, record):
    command = (
        "python -m experiments.train data.tasks='{" + "x: binary, " * 12 + "}' sharing=single_task balancing=equal"
    )
    text = printed(record, reference_command=command)
    assert f"  {command}" in text.splitlines()
    assert "n/a: no single-task run" in text
    assert "single\n" not in text and "delta_m_c" not in text


def test_a_single_task_run_needs_no_reference(printed, reference):
    text = printed(reference, reference_command="python -m experiments.train")
    assert "this is a single-task run" in text and "python -m" not in text


def test_null_is_na_with_its_reason(printed, record):
    record["metrics"]["test"]["coupon"]["auc"] = None
    record["support"]["test"]["coupon"]["auc"]["reason"] = "one class only"
    del record["baselines"]["user_item_mean"]["spend"]
    record["timing"]["compile_seconds"] = None
    text = printed(record)
    assert row(text, "coupon")[0].split() == ["coupon", "auc", "n/a", "0.5000", "0.7603", "0.8397", "n/a"]
    assert "n/a: coupon auc: one class only" in text
    assert "n/a: spend has no rmse for user_item_mean" in text
    assert "compile n/a" in text
    assert "mean gain       n/a" in text


def test_a_gain_without_all_baselines_says_so(printed, record):
    del record["baselines"]["logistic"]
    assert "the record has no logistic baseline" in printed(record)


def test_failed_run_shows_what_is_known(printed, record):
    record |= {"status": "failed", "error": {"class": "TrainingError", "message": "loss [of] coupon is nan"}}
    record["metrics"] = {"valid": record["metrics"]["valid"], "test": {}}
    text = printed(record)
    assert "run failed: TrainingError: loss [of] coupon is nan" in text
    assert "valid part (the test part is unopened)" in text
    record["metrics"]["valid"] = {}
    assert "nothing evaluated" in printed(record)


@pytest.mark.parametrize("flag", ["reopened", "oracle", "leak", "transductive"])
def test_flags_that_spoil_a_number_are_printed(printed, record, flag):
    assert f"{flag}:" not in printed(record)
    record["flags"][flag] = True
    assert f"{flag}:" in printed(record)


def test_plain_ascii_terminal(record, reference):
    """A table must not die on a terminal without Unicode."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_result(record, Console(file=stream, width=100), reference=reference)
    stream.flush()
    assert b"below baseline" in stream.buffer.getvalue()
