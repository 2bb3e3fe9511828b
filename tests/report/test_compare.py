"""Gains with their sign and their denominator; the numbers are worked out by hand from the fixture."""

import pytest

from mtl_jax.report import compare


def test_gain_is_over_the_best_baseline(record):
    assert compare.best_gain(record, "buy") == (pytest.approx((0.8046 - 0.7992) / 0.7992), "logistic")
    assert compare.best_gain(record, "spend") == (pytest.approx((1.0463 - 1.0214) / 1.0463), "logistic")
    record["baselines"]["logistic"]["buy"]["auc"] = 0.6
    assert compare.best_gain(record, "buy").baseline == "user_item_mean"


def test_zero_baseline_is_an_absolute_gain(record):
    """A constant has a quadratic weighted kappa of 0."""
    assert compare.gain_over(record, "buy", 0.0, 0.25) == 0.25
    assert compare.gain_over(record, "spend", 0.0, 0.25) == -0.25


def test_negative_metrics_keep_the_sign(record):
    assert compare.gain_over(record, "buy", -0.5, -0.25) == 0.5


def test_below_baseline_names_the_task(record):
    assert compare.below_baseline(record) == ["coupon"]
    record["metrics"]["test"]["coupon"]["auc"] = 0.84
    assert compare.below_baseline(record) == []


def test_mean_of_the_gains(record):
    gains = [0.0054 / 0.7992, 0.0061 / 0.8261, -0.0096 / 0.8397, 0.0249 / 1.0463]
    assert compare.mean_best_gain(record) == pytest.approx(sum(gains) / 4)
    record["metrics"]["test"]["buy"]["auc"] = None
    assert compare.mean_best_gain(record) is None
    assert compare.best_gain(record, "buy") is None


def test_delta_m_is_positive_when_better_and_paired_by_part(record, reference):
    terms = [0.0015 / 0.8031, -0.0012 / 0.8334, 0.0174 / 0.8127, 0.0083 / 1.0297]
    assert compare.delta_m_against(record, reference) == pytest.approx(25 * sum(terms))
    centred = [0.0015 / 0.3031, -0.0012 / 0.3334, 0.0174 / 0.3127, 0.0083 / 1.0297]
    assert compare.delta_m_c_against(record, reference) == pytest.approx(25 * sum(centred))
    assert compare.delta_m_against(record, record) == 0
    reference["metrics"]["test"] = {}
    assert compare.delta_m_against(record, reference) is None


def test_validation_stands_in_until_the_test_part_is_opened(record):
    record["metrics"]["valid"]["buy"]["auc"] = 0.9
    assert (compare.reported_part(record), compare.task_value(record, "buy")) == ("test", 0.8046)
    record["metrics"]["test"] = {}
    assert (compare.reported_part(record), compare.task_value(record, "buy")) == ("valid", 0.9)
    record["metrics"]["valid"] = {}
    assert (compare.reported_part(record), compare.task_value(record, "buy")) == (None, None)


def test_item_mean_stands_in_for_data_without_users(record):
    assert compare.shown_baselines(record) == ["global_mean", "user_item_mean", "logistic"]
    record["baselines"]["item_mean"] = record["baselines"].pop("user_item_mean")
    assert compare.shown_baselines(record) == ["global_mean", "item_mean", "logistic"]
