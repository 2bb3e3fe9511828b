"""What holds around every method: absent rows, skipped steps, stopped gradients, refusals."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import Balancer, NoState, aggregate, equal, krum, pcgrad, trimmed_mean, uncertainty
from mtl_jax.balancing.base import gramian, weigh
from mtl_jax.errors import ConfigError

J3 = jnp.array([[1.0, 2, 0, 1], [-1, 1, 1, 0], [6, -3, 3, -9]])
KEY = jax.random.key(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reciprocal(Balancer):
    """Weights 1/L and a count of its steps: a method that a loss of 0 breaks."""

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True
    min_tasks: ClassVar = 2

    def init(self, num_tasks, params=None):
        return jnp.zeros([], jnp.int32)

    def weigh(self, gramian, losses, state, key, *, active=None):
        return 1 / losses, state + 1


@pytest.mark.parametrize("factor", [0.0, 0.9e-8, 1.1e-8])
def test_rows_below_1e8_of_the_longest_are_null(factor):
    """Task 1 opposes task 0: it is projected on above the threshold and absent below it."""
    rows = jnp.array([[1.0, 0.0], [-factor, 0.0], [0.0, 1.0]])
    weights, _, info = weigh(pcgrad(), gramian(rows), jnp.zeros(3), NoState(), KEY)
    if factor < 1e-8:
        assert info["null_rows"] == 1
        np.testing.assert_array_equal(weights, [1.0, 0.0, 1.0])
    else:
        assert info["null_rows"] == 0
        np.testing.assert_allclose(weights, [1.0, 1 + 1 / factor, 1.0], rtol=1e-5)


def test_null_rows_are_relative_to_the_active_rows():
    rows = jnp.array([[1e10, 0.0], [1.0, 0.0], [0.0, 2.0]])
    weights, _, info = weigh(pcgrad(), gramian(rows), jnp.zeros(3), NoState(), KEY, jnp.array([False, True, True]))
    assert info["null_rows"] == 0
    np.testing.assert_array_equal(weights, [0.0, 1.0, 1.0])


def test_methods_of_losses_do_not_look_for_null_rows():
    weights, _, info = weigh(equal(), jnp.diag(jnp.array([1.0, 0.0])), jnp.ones(2), NoState(), None)
    assert info["null_rows"] == 0
    np.testing.assert_array_equal(weights, [1.0, 1.0])


def test_without_gradients_nothing_moves():
    weights, _, info = weigh(pcgrad(), jnp.zeros((3, 3)), jnp.ones(3), NoState(), KEY)
    np.testing.assert_array_equal(weights, np.zeros(3))
    assert info["null_rows"] == 3
    assert not info["nonfinite"]


def test_without_active_tasks_the_state_stays():
    """A count of steps, too, which no task owns."""
    _, steps, info = weigh(Reciprocal(), None, jnp.array([2.0, 4.0]), Reciprocal().init(2), None, jnp.zeros(2, bool))
    assert steps == 0
    assert not info["nonfinite"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_loss_skips_the_step(bad):
    balancer = uncertainty(weight_lr=0.1)
    state = balancer.init(2)
    weights, kept, info = weigh(balancer, None, jnp.array([1.0, bad]), state, None)
    assert info["nonfinite"]
    np.testing.assert_array_equal(weights, np.zeros(2))
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_a_non_finite_gradient_skips_the_step():
    direction, _ = aggregate(pcgrad(), J3.at[1, 2].set(jnp.nan), NoState(), key=KEY)
    np.testing.assert_array_equal(direction, np.zeros(4))


def test_a_non_finite_entry_of_an_inactive_task_is_not_seen():
    active = [True, False, True]
    direction, _ = aggregate(
        pcgrad(), J3.at[1].set(jnp.nan), NoState(), losses=[1.0, np.nan, 1.0], key=KEY, active=active
    )
    expected, _ = aggregate(pcgrad(), J3[jnp.array([0, 2])], NoState(), key=KEY)
    np.testing.assert_allclose(direction, expected, rtol=1e-6)


def test_a_weight_that_is_not_finite_skips_the_step():
    weights, steps, info = weigh(Reciprocal(), None, jnp.array([2.0, 0.0]), Reciprocal().init(2), None)
    assert info["nonfinite"]
    np.testing.assert_array_equal(weights, np.zeros(2))
    assert steps == 0
    weights, steps, info = weigh(Reciprocal(), None, jnp.array([2.0, 4.0]), steps, None)
    assert not info["nonfinite"]
    np.testing.assert_array_equal(weights, [0.5, 0.25])
    assert steps == 1


@pytest.mark.parametrize("balancer", [equal(), pcgrad()], ids=["losses", "gramian"])
def test_a_pytree_is_as_its_concatenated_rows(balancer):
    tree = {"kernel": J3[:, :2].reshape(3, 2, 1), "bias": J3[:, 2:]}
    direction, _ = aggregate(balancer, tree, balancer.init(3), key=KEY)
    expected, _ = aggregate(balancer, J3, balancer.init(3), key=KEY)
    assert direction["kernel"].shape == (2, 1)
    np.testing.assert_allclose(direction["kernel"][:, 0], expected[:2], rtol=1e-5)
    np.testing.assert_allclose(direction["bias"], expected[2:], rtol=1e-5)


@pytest.mark.parametrize("balancer", [pcgrad(), Reciprocal()], ids=["gramian", "losses"])
def test_no_gradient_flows_through_the_weights(balancer):
    """Rows and losses move with x; d/dx of (d . v) counts the rows' motion M alone: w . (M v)."""
    v, motion = jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.arange(12.0).reshape(3, 4)

    def rows_and_losses(x):
        return J3 + x * motion, 2.0 + x * jnp.arange(3)

    def probe(x):
        jacobian, losses = rows_and_losses(x)
        direction, _ = aggregate(balancer, jacobian, balancer.init(3), losses=losses, key=KEY)
        return direction @ v

    jacobian, losses = rows_and_losses(0.1)
    weights, _, _ = weigh(balancer, gramian(jacobian), losses, balancer.init(3), KEY)
    np.testing.assert_allclose(jax.grad(probe)(0.1), weights @ (motion @ v), rtol=1e-5)


def test_what_a_method_needs_is_asked_for():
    with pytest.raises(ConfigError, match=r"loss.*losses="):
        aggregate(uncertainty(), J3, uncertainty().init(3))
    with pytest.raises(ConfigError, match="key="):
        aggregate(pcgrad(), J3, pcgrad().init(3))
    with pytest.raises(ConfigError, match="losses has shape"):
        aggregate(uncertainty(), J3, uncertainty().init(3), losses=[1.0, 2.0])
    with pytest.raises(ConfigError, match="active has shape"):
        aggregate(equal(), J3, equal().init(3), active=[True])


def test_too_few_tasks_are_refused():
    with pytest.raises(ConfigError, match="at least 2"):
        aggregate(Reciprocal(), J3[:1], 0, losses=[1.0])
    with pytest.raises(ConfigError, match="at least 1"):
        pcgrad().for_tasks([])


@pytest.mark.parametrize("balancer", [krum(num_selected=2), trimmed_mean()], ids=["krum", "trimmed_mean"])
def test_an_outlier_of_any_length_leaves_robust_methods_the_others(balancer):
    """Else the one gradient that they are to leave out would make all the others absent."""
    rows = np.random.default_rng(0).normal(1.0, 0.3, size=(4, 6))
    rows[2] *= 1e9
    direction, _ = aggregate(balancer, jnp.asarray(rows, jnp.float32), balancer.init(4))
    assert 0.3 < np.min(direction) and np.max(direction) < 3
    rows[0] = 0  # and one that is absent is absent
    without = jnp.asarray(rows, jnp.float32), jnp.array([False, True, True, True])
    absent, _ = aggregate(balancer, without[0], balancer.init(4))
    inactive, _ = aggregate(balancer, without[0], balancer.init(4), active=without[1])
    np.testing.assert_allclose(absent, inactive)
