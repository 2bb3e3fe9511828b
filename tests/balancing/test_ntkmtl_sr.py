"""NTKMTL-SR: goldens, kernels of explicit micro-batches, NTKMTL as its limit."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate, weigh
from mtl_jax.balancing.ntkmtl import ntkmtl
from mtl_jax.balancing.ntkmtl_sr import ntkmtl_sr
from mtl_jax.errors import ConfigError


def weights_of(balancer, jacobian, active=None):
    products = balancer.products(jnp.asarray(jacobian, jnp.float32))
    return weigh(balancer, products, jnp.zeros(len(jacobian)), NoState(), None, active)[0]


@pytest.fixture
def jacobian():
    """Three tasks, eight rows, five units."""
    return np.random.default_rng(0).normal(size=(3, 8, 5)) * np.array([1, 0.05, 30])[:, None, None]


def test_goldens(ntkmtl_sr_case, dtype, assert_golden):
    case = ntkmtl_sr_case
    rows = jnp.asarray(case["representation_gradients"], dtype)
    balancer = ntkmtl_sr(**case["params"])
    products = balancer.products(rows)
    np.testing.assert_allclose(products, np.einsum("tmp,tnp->tmn", rows, rows), rtol=1e-6)
    weights, _ = balancer.weigh(products, jnp.zeros(len(rows), dtype), NoState(), None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jnp.asarray(case["jacobian"], dtype), case["direction"], case, dtype)


@pytest.mark.parametrize("num_micro", [2, 4, 8])
def test_largest_singular_values_of_the_micro_batches_decide(jacobian, num_micro):
    """Consecutive rows make a micro-batch; lambda is the square of the spectral norm of their gradients."""
    spectral = [
        np.linalg.norm(np.stack([np.ravel(part) for part in np.split(rows, num_micro)]), ord=2) for rows in jacobian
    ]
    expected = np.sqrt(np.sum(np.square(spectral))) / np.array(spectral)
    np.testing.assert_allclose(weights_of(ntkmtl_sr(num_micro=num_micro), jacobian), expected, rtol=1e-4)


def test_one_micro_batch_is_ntkmtl_at_the_representation(jacobian):
    rows = jnp.asarray(jacobian, jnp.float32)
    direction, _ = aggregate(ntkmtl_sr(num_micro=1, exponent=0.7), rows, NoState())
    expected, _ = aggregate(ntkmtl(exponent=0.7), rows, NoState())
    np.testing.assert_allclose(direction, expected, rtol=1e-5)


def test_exponent_zero_is_the_sum(jacobian):
    direction, _ = aggregate(ntkmtl_sr(exponent=0.0), jnp.asarray(jacobian, jnp.float32), NoState())
    np.testing.assert_allclose(direction, np.sum(jacobian, axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_weights_do_not_change_with_the_scale(jacobian, factor):
    np.testing.assert_allclose(weights_of(ntkmtl_sr(), factor * jacobian), weights_of(ntkmtl_sr(), jacobian), rtol=1e-4)


def test_a_micro_batch_without_labels_is_one_left_out(jacobian):
    jacobian[1, 2:4] = 0
    kept = [jacobian[1, :2], jacobian[1, 4:6], jacobian[1, 6:]]
    own = np.linalg.norm(np.stack([np.ravel(part) for part in kept]), ord=2) ** 2
    others = [np.linalg.norm(jacobian[i].reshape(4, -1), ord=2) ** 2 for i in (0, 2)]
    weights = weights_of(ntkmtl_sr(), jacobian)
    np.testing.assert_allclose(weights[1], np.sqrt((own + sum(others)) / own), rtol=1e-4)


def test_absent_tasks_are_left_out_of_the_sum(jacobian):
    active = jnp.array([True, False, True])
    weights, small = weights_of(ntkmtl_sr(), jacobian, active), weights_of(ntkmtl_sr(), jacobian[[0, 2]])
    np.testing.assert_allclose(weights, [small[0], 0, small[1]], rtol=1e-5)
    products = ntkmtl_sr().products(jnp.asarray(jacobian, jnp.float32)).at[1].set(1e9)
    direct, _ = ntkmtl_sr().weigh(products, jnp.zeros(3), NoState(), None, active=active)
    np.testing.assert_allclose(direct, weights, rtol=1e-5)
    jacobian[1] = 0
    np.testing.assert_allclose(weights_of(ntkmtl_sr(), jacobian), weights, rtol=1e-5)


def test_representations_in_several_leaves_add_up(jacobian):
    whole = jnp.asarray(jacobian, jnp.float32)
    leaves = {"deep": whole[:, :, :3], "wide": whole[:, :, 3:]}
    np.testing.assert_allclose(ntkmtl_sr().products(leaves), ntkmtl_sr().products(whole), rtol=1e-4, atol=1e-3)


def test_rows_that_cannot_be_cut_are_refused(jacobian):
    with pytest.raises(ConfigError, match="8 rows of a batch; expected a multiple of num_micro=3"):
        aggregate(ntkmtl_sr(num_micro=3), jnp.asarray(jacobian), NoState())


@pytest.mark.parametrize("options", [{"exponent": np.nan}, {"num_micro": 0}, {"num_micro": 2.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"ntkmtl_sr\\({next(iter(options))}\\)"):
        ntkmtl_sr(**options)
