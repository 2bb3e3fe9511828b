"""GO4Align: goldens, the partition against all partitions, the shares over steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.go4align import go4align, group_means
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def weights_of(balancer, losses, active=None):
    losses = jnp.asarray(losses, float)
    return np.asarray(call(balancer, losses, balancer.init(len(losses)), active)[0])


def best_cost(values, num_groups):
    """Least sum of squares around the means of the groups, over all ways to put the values into groups."""
    costs = []
    for labels in itertools.product(range(num_groups), repeat=len(values)):
        groups = [values[np.array(labels) == group] for group in set(labels)]
        costs.append(sum(np.sum((group - group.mean()) ** 2) for group in groups))
    return min(costs)


def test_goldens(go4align_case, dtype, assert_golden):
    case = go4align_case
    balancer, losses = go4align(**case["params"]), jnp.asarray(case["losses"], dtype)
    state = balancer.init(len(losses))
    weights, _ = call(balancer, losses, state)
    direction, _ = jax.jit(aggregate)(balancer, jnp.asarray(case["jacobian"], dtype), state, losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_no_partition_into_any_groups_is_better(num_groups):
    """30 draws of five values and an absent one, some of them equal: the cost of the means is the least of all."""
    rng = np.random.default_rng(num_groups)
    values = np.exp(rng.normal(size=(30, 6))).round(1)
    active = np.ones((30, 6), bool)
    active[np.arange(30), rng.integers(6, size=30)] = False
    means = jax.vmap(lambda v, a: group_means(v, a, num_groups))(jnp.asarray(values, jnp.float32), jnp.asarray(active))
    for value, present, mean in zip(values, active, np.asarray(means), strict=True):
        cost = np.sum((value[present] - mean[present]) ** 2)
        np.testing.assert_allclose(cost, best_cost(value[present], num_groups), rtol=1e-4, atol=1e-6)
        assert len(set(mean[present])) <= num_groups and np.all(mean[~present] == 0)
        np.testing.assert_allclose(mean.sum(), value[present].sum(), rtol=1e-5)  # means of groups keep the sum


def test_as_many_groups_as_tasks_is_no_grouping():
    losses = np.array([0.7, 0.2, 1.5])
    shares = np.exp(-0.3 * losses) / np.sum(np.exp(-0.3 * losses))
    expected = shares * losses.sum() / losses
    np.testing.assert_allclose(weights_of(go4align(num_groups=3, eta=0.3), losses), expected, rtol=1e-5)
    one = weights_of(go4align(num_groups=1, eta=0.3), losses)
    np.testing.assert_allclose(one, np.full(3, expected.mean()), rtol=1e-5)


def test_more_groups_than_present_tasks_is_no_grouping():
    weights = weights_of(go4align(num_groups=3), [0.7, 0.2, 1.5], jnp.array([True, False, True]))
    np.testing.assert_allclose(weights[::2], weights_of(go4align(num_groups=2), [0.7, 1.5]), rtol=1e-6)
    assert weights[1] == 0


def test_weights_are_the_derivative_of_their_weighted_sum():
    """O = sum_i w_i L_i with w of this step held constant, in groups by a reference of two groups."""
    losses = np.array([0.7, 0.2, 1.5])
    shares = np.exp(-1e-4 * losses) / np.sum(np.exp(-1e-4 * losses))
    risks = shares * losses.sum() / losses
    constants = np.array([(risks[0] + risks[2]) / 2, risks[1], (risks[0] + risks[2]) / 2])
    with jax.enable_x64(True):
        weights = weights_of(go4align(num_groups=2), losses)
    for weight, shift in zip(weights, 0.25 * np.eye(3), strict=True):
        np.testing.assert_allclose(weight, (constants @ (losses + shift) - constants @ (losses - shift)) / 0.5)


def test_the_order_of_the_tasks_does_not_matter():
    losses, order = np.array([0.7, 0.2, 1.5, 0.65, 3.0]), np.array([3, 0, 4, 2, 1])
    balancer = go4align(num_groups=2, eta=0.1)
    np.testing.assert_allclose(weights_of(balancer, losses[order]), weights_of(balancer, losses)[order], rtol=1e-6)


def test_shares_remember_all_losses():
    """p after many steps is a softmax of minus eta times the summed losses."""
    losses = np.random.default_rng(0).uniform(0, 2, size=(50, 3)).astype(np.float32)
    balancer = go4align(eta=0.05)
    state, _ = jax.lax.scan(lambda s, loss: (call(balancer, loss, s)[1], None), balancer.init(3), jnp.asarray(losses))
    expected = np.exp(-0.05 * losses.sum(axis=0))
    np.testing.assert_allclose(np.exp(state.log_shares), expected / expected.sum(), rtol=1e-4)


def test_absent_tasks_keep_their_share_and_the_others_theirs_together():
    balancer = go4align(eta=0.5)
    _, before = call(balancer, jnp.array([1.0, 2.0, 3.0]), balancer.init(3))
    active = jnp.array([True, False, True])
    _, after = call(balancer, jnp.array([1.0, np.nan, 3.0]), before, active)
    old, new = np.exp(before.log_shares), np.exp(after.log_shares)
    assert after.log_shares[1] == before.log_shares[1]
    np.testing.assert_allclose(new.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(new[2] / new[0], old[2] / old[0] * np.exp(-0.5 * 2), rtol=1e-5)


def test_losses_at_or_below_zero():
    weights = weights_of(go4align(num_groups=2), [0.0, 1.0])
    np.testing.assert_allclose(weights[0], 0.5e12, rtol=1e-3)
    np.testing.assert_allclose(weights_of(go4align(num_groups=2), [0.0, 0.0]), [1, 1], rtol=1e-6)
    assert np.all(np.isfinite(weights_of(go4align(), [-1.0, 1.0])))
    assert np.isnan(weights_of(go4align(num_groups=2), [np.nan, 1.0])).any()


@pytest.mark.parametrize("options", [{"eta": -1.0}, {"num_groups": 0}, {"num_groups": 1.5}, {"num_groups": True}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"go4align\\({next(iter(options))}\\)"):
        go4align(**options)


def test_more_groups_than_tasks_are_refused():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    for build in (lambda b: b.init(2), lambda b: b.for_tasks(tasks)):
        with pytest.raises(ConfigError, match=r"go4align\(num_groups\) is 3; expected at most 2"):
            build(go4align(num_groups=3))
