"""The generator of related tasks against its closed forms."""

import numpy as np
import polars as pl
import pytest

from mtl_jax.data import synthetic
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import KINDS

MATRIX = np.array([[1.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 1.0]])


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
def test_label_correlation_is_the_closed_form(p):
    """400,000 rows; labels depend on x through two projections, so few inputs are enough."""
    data = synthetic.task_correlation(p, num_rows=400_000, dim=2, seed=3)
    expected = synthetic.label_correlation(p, alpha=data.alpha, beta=data.beta)
    assert np.corrcoef(data.y.T)[0, 1] == pytest.approx(expected, abs=5e-3)


def test_correlation_is_one_for_equal_tasks_without_noise_and_independent_of_sines_without_any():
    alpha, beta = np.array([0.7, -1.2]), np.array([0.3, 2.0])
    assert synthetic.label_correlation(1.0, alpha=alpha, beta=beta, noise=0.0) == pytest.approx(1.0)
    assert synthetic.label_correlation(0.3, alpha=[], beta=[], noise=0.0) == pytest.approx(0.3)
    assert synthetic.label_correlation(0.0, alpha=alpha, beta=beta) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("p", [-1.0, 0.8, MATRIX])
def test_directions_have_the_asked_cosines(p):
    data = synthetic.task_correlation(p, num_rows=1, dim=30, c=0.3, seed=0)
    expected = p if np.ndim(p) else np.array([[1.0, p], [p, 1.0]])
    np.testing.assert_allclose(data.directions @ data.directions.T, 0.09 * expected, atol=1e-12)


def test_labels_are_the_mean_plus_noise():
    data = synthetic.task_correlation(MATRIX, num_rows=100_000, dim=5, noise=0.2, seed=1)
    noise = data.y - data.mean
    np.testing.assert_allclose(noise.std(0), 0.2, rtol=0.01)
    assert abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.015
    z = data.x @ data.directions.T
    np.testing.assert_allclose(data.mean, z + np.sin(z[..., None] * data.alpha + data.beta).sum(-1), atol=1e-12)


def test_equal_tasks_have_equal_means_and_other_seeds_other_data():
    data = synthetic.task_correlation(1.0, num_rows=10, dim=4, seed=0)
    np.testing.assert_allclose(data.mean[:, 0], data.mean[:, 1], atol=1e-12)
    again, other = (synthetic.task_correlation(1.0, num_rows=10, dim=4, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(data.y, again.y)
    assert not np.array_equal(data.alpha, other.alpha)


def test_sines_may_be_given():
    data = synthetic.task_correlation(0.0, num_rows=50, dim=3, seed=0, alpha=[0.0], beta=[0.0], num_sines=1)
    np.testing.assert_allclose(data.mean, data.x @ data.directions.T, atol=1e-12)


@pytest.mark.parametrize("p", [1.5, np.array([[1.0, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]]), 2 * np.eye(2)])
def test_no_such_correlation(p):
    with pytest.raises(
        ConfigError, match="expected a number in .-1, 1. or a positive semi-definite correlation matrix"
    ):
        synthetic.task_correlation(p, num_rows=1, seed=0)


def test_more_tasks_than_inputs():
    with pytest.raises(ConfigError, match="dim is 2 for 3 tasks"):
        synthetic.task_correlation(MATRIX, num_rows=1, dim=2, seed=0)


def test_data_set():
    dataset = synthetic.load(num_rows=1200, dim=3)
    assert [len(dataset.splits[part]) for part in ("train", "valid", "test")] == [1000, 100, 100]
    assert [f.name for f in dataset.schema.features] == ["x000", "x001", "x002"]
    truth = synthetic.task_correlation(0.8, num_rows=1200, dim=3, seed=0)
    labels, task = dataset.open_test().labels["y2"], dataset.schema.task("y2")
    np.testing.assert_allclose(labels * task.std + task.mean, truth.y[dataset.splits["test"], 1], atol=1e-5)
    assert dataset.info["bayes_mse"] == pytest.approx(0.01)
    assert synthetic.load(num_rows=1200, dim=3, tasks=["y2"]).schema.task_names == ("y2",)
    assert synthetic.load(num_rows=1200, dim=3, p=0.5).identity != dataset.identity
    with pytest.raises(ConfigError, match="unknown recipe 'countries'"):
        synthetic.load(recipe="countries")


def test_every_kind_follows_the_one_direction():
    """All labels rise or fall with z, recovered here by regressing the rating; its noise variance is 1/4, and so is
    that of the user effect."""
    frame = synthetic.kinds(num_rows=20_000, dim=3, seed=0)
    x = frame.select("x000", "x001", "x002").to_numpy().astype(float)
    direction, *_ = np.linalg.lstsq(x, frame["rating"].to_numpy(), rcond=None)
    assert np.linalg.norm(direction) == pytest.approx(1, abs=0.03)
    z = x @ direction
    assert (frame["rating"] - z).var() == pytest.approx(0.5, abs=0.05)
    labels = {name: frame[name].cast(pl.Float64) for name in ("click", "stars", "spend")}
    labels |= {name: frame["tags"].list.contains(name).cast(pl.Float64) for name in synthetic.TAGS}
    labels["log visits"] = (frame["visits"].cast(pl.Float64) + 0.5).log()
    for name, label in labels.items():
        seen = label.is_not_null().to_numpy()
        sign = -1 if name == "gift" else 1
        assert sign * np.corrcoef(z[seen], label.drop_nulls())[0, 1] > 0.3, name
    assert frame["visits"].null_count() / 20_000 == pytest.approx(0.1, abs=0.01)
    assert frame["tags"].list.len().drop_nulls().min() == 0


def test_the_recipe_of_all_kinds():
    dataset = synthetic.load(recipe="kinds", num_rows=600, dim=2)
    assert {task.kind for task in dataset.schema.tasks} == set(KINDS)
    assert dataset.recipe == "kinds" and dataset.schema.user == "user"
    assert synthetic.load(recipe="kinds", num_rows=600, dim=2, tasks=["tags"]).schema.task_names == ("tags",)
