"""Numbers over several tasks against worked values."""

import math

import pytest
import scipy.stats

from mtl_jax import metrics
from mtl_jax.errors import LabelError
from mtl_jax.tasks import Task

TASKS = (Task("click", "binary"), Task("rating", "regression"))
BASE = {"click": {"auc": 0.5}, "rating": {"rmse": 1.2, "mae": 1.0}}


def test_mean_gain():
    """AUC .6 over .5 gains .2, rmse .9 under 1.2 gains .25; the trivial predictor itself gains 0."""
    assert metrics.mean_gain(TASKS, {"click": {"auc": 0.6}, "rating": {"rmse": 0.9}}, BASE) == pytest.approx(0.225)
    assert metrics.mean_gain(TASKS, {"click": {"auc": 0.4}, "rating": {"rmse": 1.5}}, BASE) == pytest.approx(-0.225)
    assert metrics.mean_gain(TASKS, BASE, BASE) == 0


def test_mean_gain_divides_by_one_where_the_baseline_is_zero():
    base = {"click": {"auc": 0.5}, "rating": {"rmse": 0.0}}
    assert metrics.mean_gain(TASKS, {"click": {"auc": 0.5}, "rating": {"rmse": 0.3}}, base) == pytest.approx(-0.15)


def test_mean_gain_with_missing_values():
    """Without labels a task is left out; a model without a value is below every model with one."""
    no_labels = {"click": {"auc": None}, "rating": {"rmse": 1.2}}
    model = {"click": {"auc": None}, "rating": {"rmse": 0.9}}
    assert metrics.mean_gain(TASKS, model, no_labels) == pytest.approx(0.25)
    assert metrics.mean_gain(TASKS, model, BASE) == -math.inf
    with pytest.raises(LabelError, match=r"no task of \['click'\]"):
        metrics.mean_gain(TASKS[:1], model, no_labels)


def test_delta_m():
    values, baseline, higher = (0.73, 0.86, 0.110), (0.72, 0.87, 0.108), (True, True, False)
    assert metrics.delta_m(values, baseline, higher) == pytest.approx(-0.53746275, abs=1e-8)
    assert metrics.delta_m(baseline, baseline, higher) == 0
    assert metrics.delta_m((0.7, None), (0.7, 0.7), (True, True)) is None
    assert metrics.delta_m((0.7, 0.1), (0.7, 0.0), (True, True)) is None
    assert metrics.delta_m((), (), ()) is None
    with pytest.raises(ValueError, match=r"lengths \[2, 1, 2\]"):
        metrics.delta_m((0.7, 0.1), (0.7,), (True, True))


def test_delta_m_of_a_negative_baseline_keeps_its_sign():
    """|B| in the denominator: from -.5 to -.25 is better where higher is better."""
    assert metrics.delta_m([-0.25], [-0.5], [True]) == 50


def test_delta_m_c_measures_from_one_half():
    """AUC .55 over .525 doubles what is above chance; a loss beside it stays relative to itself."""
    assert metrics.delta_m_c([0.55], [0.525], [True]) == pytest.approx(100)
    both = metrics.delta_m_c([0.55, 0.9], [0.525, 1.0], [True, False], is_auc=[True, False])
    assert both == pytest.approx((100 + 10) / 2)
    assert metrics.delta_m_c([0.6], [0.5], [True]) is None
    assert metrics.delta_m_c([None], [0.6], [True]) is None


def test_mean_rank():
    assert metrics.mean_rank([[0.73], [0.73], [0.70]], [True]) == [1.5, 1.5, 3]
    values = [[0.8, 0.30, 2.0], [0.7, 0.25, 2.0], [0.9, 0.40, 1.0], [0.7, 0.10, 3.0]]
    columns = [scipy.stats.rankdata([sign * row[k] for row in values]) for k, sign in enumerate((-1, 1, 1))]
    assert metrics.mean_rank(values, [True, False, False]) == pytest.approx(
        [sum(r) / 3 for r in zip(*columns, strict=True)]
    )


def test_mean_rank_leaves_incomplete_methods_out():
    assert metrics.mean_rank([[0.9, 0.9], [1.0, None], [0.8, 0.8]], [True, True]) == [1, None, 2]
    assert metrics.mean_rank([[None]], [True]) == [None]
