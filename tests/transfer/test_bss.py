"""Batch spectral shrinkage: values by hand, the gradient of singular values, and batches that it leaves out."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.train import Optimizer
from mtl_jax.transfer import BSS, FineTune

EXAMPLE = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1]])
"""Its squared singular values are 1 and 3."""


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def shrinkage(strategy, features, weight=None):
    """Value and gradient by the features."""
    weight = jnp.ones(len(features)) if weight is None else jnp.asarray(weight)
    view = types.SimpleNamespace(axis=None, weight=weight, features=lambda params, train: params["h"])
    value, gradient = jax.value_and_grad(lambda h: strategy.penalty({"h": h}, {}, view))(jnp.asarray(features))
    return float(value), np.asarray(gradient)


@pytest.mark.parametrize(("k", "energy"), [(1, 1.0), (2, 4.0)])
def test_the_energy_of_the_smallest_singular_values_by_hand(float64, k, energy):
    np.testing.assert_allclose(shrinkage(BSS(0.1, k), EXAMPLE)[0], 0.1 * energy, rtol=1e-12)


def test_the_gradient_is_that_of_the_smallest_direction(float64):
    direction = np.array([1.0, -1.0]) / np.sqrt(2)
    expected = 2 * EXAMPLE @ np.outer(direction, direction)
    np.testing.assert_allclose(shrinkage(BSS(1.0), EXAMPLE)[1], expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_values_and_gradients_are_those_of_singular_values(float64, k):
    features = np.random.default_rng(0).normal(size=(7, 4))
    value, gradient = shrinkage(BSS(0.3, k), features)
    assert value == pytest.approx(0.3 * np.sum(np.sort(np.linalg.svd(features, compute_uv=False) ** 2)[:k]), rel=1e-6)
    differences = np.zeros_like(features)
    for index in np.ndindex(features.shape):
        step = np.zeros_like(features)
        step[index] = 1e-5
        up, down = (np.linalg.svd(features + s, compute_uv=False)[-k:] ** 2 for s in (step, -step))
        differences[index] = 0.3 * (up.sum() - down.sum()) / 2e-5
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("features", [np.eye(4), np.zeros((4, 2)), np.ones((5, 3))], ids=["equal", "zero", "rank one"])
def test_equal_singular_values_have_a_finite_gradient(features):
    value, gradient = shrinkage(BSS(1.0), features.astype(np.float32))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_padding_adds_no_singular_value():
    features = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    padded = np.concatenate([features, np.full((2, 3), 7.0, np.float32)])
    value, gradient = shrinkage(BSS(1.0), padded, weight=[1, 0.2, 3, 1, 1, 1, 0, 0])
    expected = shrinkage(BSS(1.0), features)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient[:6], expected[1], rtol=1e-4, atol=1e-5)
    assert not np.any(gradient[6:])


def test_a_batch_of_too_few_rows_is_left_out():
    """Padded down to fewer rows than features have entries, every one would have singular values of 0."""
    value, gradient = shrinkage(BSS(1.0), np.ones((4, 3), np.float32), weight=[1, 1, 0, 0])
    assert value == 0 and not np.any(gradient)


def test_batches_that_never_have_enough_rows_are_refused():
    with pytest.raises(ConfigError, match="BSS"):
        shrinkage(BSS(1.0), np.ones((2, 3), np.float32))


def test_a_step_is_that_of_fine_tuning_and_a_pull_on_what_towers_read(make_model, make_step, make_batch, perturbed):
    """Towers get none of it, and the features shrink."""
    model, batch, found = make_model(units=(3,)), make_batch(20), {}
    for strategy in (FineTune(), BSS(0.5)):
        step, state = make_step(model, strategy, optimizer=Optimizer(optax.identity(), 0.1))
        before = perturbed(state, 0.1)
        found[type(strategy)] = jax.jit(step)(before, batch)[0].params

    def energy(params):
        model = step.functional.merge(params, before.rest)
        return np.linalg.svd(model.common(model.inputs(batch)), compute_uv=False)[-1] ** 2

    differ = {path for path in before.params if np.any(found[BSS][path] != found[FineTune][path])}
    assert {path.split("/")[0] for path in differ} == {"tables", "sharing"}
    assert energy(found[BSS]) < energy(found[FineTune])
