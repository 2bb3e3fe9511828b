"""The monitored number: its value by hand, its direction, its names."""

import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task
from mtl_jax.train.monitor import Monitor, check_monitor

TASKS = (
    Task("buy", "binary"),
    Task("spend", "regression"),
    Task("a/b", "multiclass", classes=("x", "y")),
)
ORDERED = (Task("stars", "ordinal", classes="xyz"), Task("visits", "count"))
TRIVIAL = {"buy": {"auc": 0.5}, "spend": {"rmse": 2.0}, "a/b": {"accuracy": 0.25}}
VALUES = {
    "buy": {"auc": 0.75, "logloss": 0.4, "pr_auc": None},
    "spend": {"rmse": 1.5, "mae": 1.0},
    "a/b": {"accuracy": 0.5},
}


def test_mean_gain_by_hand():
    """(0.25/0.5 + 0.5/2 + 0.25/0.25) / 3."""
    monitor = Monitor("mean_gain", TASKS, TRIVIAL)
    assert monitor.value(VALUES) == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert monitor.score(monitor.value(VALUES)) == monitor.value(VALUES)


@pytest.mark.parametrize(
    ("name", "value", "better"),
    [
        ("buy/auc", 0.75, 0.76),
        ("buy/logloss", 0.4, 0.39),
        ("spend/rmse", 1.5, 1.4),
        ("spend/mae", 1.0, 0.9),
        ("a/b/accuracy", 0.5, 0.6),
    ],
)
def test_direction(name, value, better):
    """The value keeps its units; a better one has the higher score."""
    monitor = Monitor(name, TASKS, TRIVIAL)
    assert monitor.value(VALUES) == value
    assert monitor.score(better) > monitor.score(value) > monitor.score(None)


def test_a_missing_value_is_never_the_best():
    monitor = Monitor("buy/pr_auc", TASKS, TRIVIAL)
    assert monitor.value(VALUES) is None
    assert monitor.score(None) == float("-inf")


@pytest.mark.parametrize("name", ["auc", "buy/rmse", "sell/auc", "spend/auc", "buy/pcoc", ""])
def test_unknown_names_are_refused(name):
    """pcoc is best at 1, neither high nor low: nothing to select by."""
    with pytest.raises(ConfigError, match=f"trainer.monitor is '{name}'.*'mean_gain', 'buy/auc'.*'spend/mae'"):
        check_monitor(name, TASKS)


def test_kinds_whose_trivial_predictor_scores_zero():
    """qwk of the trivial predictor is 0: the gain is then the value itself; a lower deviance is a gain."""
    monitor = Monitor("mean_gain", ORDERED, {"stars": {"qwk": 0.0}, "visits": {"poisson_deviance": 2.0}})
    values = {"stars": {"qwk": 0.4}, "visits": {"poisson_deviance": 1.5}}
    assert monitor.value(values) == pytest.approx((0.4 + 0.25) / 2)
    deviance = Monitor("visits/poisson_deviance", ORDERED, {})
    assert deviance.score(1.5) > deviance.score(2.0)
