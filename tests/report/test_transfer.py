"""What a source was worth, from validation curves and over shares of the target's rows."""

import math

import numpy as np
import pytest

from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.comparison import compare
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.markdown import document
from mtl_jax.report.page import page
from mtl_jax.report.tables import spanning
from mtl_jax.report.transfer import fraction_to_scratch, paired

SHARES = (0.01, 0.1, 1.0)
CLICKS = {"scratch": (0.60, 0.65, 0.70), "fine_tune": (0.66, 0.72, 0.74), "zero_shot": (0.66, 0.66, 0.66)}


def test_quantities_of_two_curves():
    """Gains of .1, .06, .02 and 0 at steps 0, 10, 30 and 100."""
    scratch, curve = {0: 0.5, 10: 0.6, 30: 0.7, 100: 0.8}, {0: 0.6, 10: 0.66, 30: 0.72, 100: 0.8}
    found = paired(curve, scratch, higher_is_better=True)
    assert found["forward_transfer"] == pytest.approx(0.1) and found["jump_start"] == pytest.approx(0.06)
    assert found["area"] == pytest.approx((10 * 0.08 + 20 * 0.04 + 70 * 0.01) / 100)
    assert found["steps_to_scratch"] == 1.0
    early = paired(curve | {30: 0.85}, scratch, higher_is_better=True)
    assert early["steps_to_scratch"] == pytest.approx(0.3)


def test_a_lower_metric_is_better_where_it_is_an_error():
    scratch, curve = {0: 1.0, 10: 0.8, 20: 0.7}, {0: 0.9, 10: 0.9, 20: 0.75}
    found = paired(curve, scratch, higher_is_better=False)
    assert found["forward_transfer"] == pytest.approx(0.1) and found["jump_start"] == pytest.approx(-0.1)
    assert found["steps_to_scratch"] is None
    negated = paired(*({s: -v for s, v in one.items()} for one in (curve, scratch)), higher_is_better=True)
    assert {name: value and round(value, 12) for name, value in negated.items()} == {
        name: value and round(value, 12) for name, value in found.items()
    }


def test_curves_that_do_not_meet_say_nothing():
    assert set(paired({5: 0.7}, {0: 0.5}, higher_is_better=True).values()) == {None}


@pytest.mark.parametrize(
    ("values", "goal", "higher", "expected"),
    [
        ({0.01: 0.5, 0.1: 0.6, 1.0: 0.8}, 0.7, True, math.sqrt(0.1)),
        ({0.01: 0.5, 0.1: 0.6, 1.0: 0.8}, 0.6, True, 0.1),
        ({0.01: 0.5, 0.1: 0.6, 1.0: 0.8}, 0.4, True, 0.01),
        ({0.01: 0.5, 0.1: 0.6, 1.0: 0.8}, 0.9, True, None),
        ({0.05: 1.2, 0.2: 0.9}, 1.0, False, 0.05 * 4 ** (2 / 3)),
        ({0.01: 0.7, 0.1: 0.5, 1.0: 0.8}, 0.65, True, 0.01),
        ({}, 0.5, True, None),
    ],
)
def test_the_share_of_rows_that_is_as_good_as_scratch_with_all(values, goal, higher, expected):
    found = fraction_to_scratch(values, goal, higher_is_better=higher)
    assert found is None if expected is None else found == pytest.approx(expected)


@pytest.fixture
def comparisons(write_ablation):
    """Three strategies over three shares of the rows; errors of the rating never reach scratch's best."""

    def members(arm, value):
        rating = 1.0 if arm == "scratch" else 1.1
        return [{"click": value + seed, "rating": rating - seed} for seed in (-0.01, 0.0, 0.01)]

    arms = {arm: [members(arm, value) for value in values] for arm, values in CLICKS.items()}
    points = {arm: [{"data.target_fraction": share} for share in SHARES] for arm in arms}
    folder = write_ablation(arms, points=points, baseline="scratch")
    ablation = read_ablation(folder)
    for run in (folder / "runs").iterdir():
        rows = [
            {"step": step, "part": "valid", "task": "click", "name": "auc", "value": 0.5 + step / 1000}
            for step in (0, 10)
        ]
        RunFolder(run).write_history(rows)
    return ablation, compare(ablation)


def test_a_table_over_all_shares_says_how_many_rows_each_strategy_takes(comparisons):
    ablation, found = comparisons
    (grid,) = spanning(found)
    assert grid.header == ("arm", "click", "rating")
    by_arm = {row[0].text: [cell.text for cell in row[1:]] for row in grid.rows}
    assert by_arm.keys() == {"fine_tune", "zero_shot"}
    share = 10 ** np.interp(0.70, [0.66, 0.72], [-2, -1])
    assert by_arm["fine_tune"] == [f"{share:.3g}", "never"] and by_arm["zero_shot"] == ["never", "never"]
    for text in (document(ablation, found), page(ablation, found)):
        assert "rows at which the mean is that of scratch" in text and f"{share:.3g}" in text


def test_without_shares_or_without_scratch_there_is_no_such_table(comparisons, write_ablation):
    _, found = comparisons
    assert spanning(found[:1]) == () and spanning(()) == ()
    arms = {arm: [{"click": 0.6, "rating": 1.0}] * 3 for arm in ("single_task", "mmoe")}
    assert spanning(compare(read_ablation(write_ablation(arms, name="other")))) == ()
