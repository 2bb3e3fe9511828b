"""Smooth Tchebycheff: goldens, its derivative, its limits, the warm-up and the nadir."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate, weigh
from mtl_jax.balancing.scale_invariant import scale_invariant
from mtl_jax.balancing.stch import stch
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def soft_maximum(values, mu):
    return mu * np.log(np.sum(np.exp(values / mu)))


def weights_of(balancer, losses, state=None, active=None):
    losses = jnp.asarray(losses, float)
    state = balancer.init(len(losses)) if state is None else state
    return np.asarray(call(balancer, losses, state, active)[0])


def warmed(balancer, nadir):
    """The state after a warm-up whose last period ended with these mean losses."""
    state = balancer.init(len(nadir))
    return state._replace(nadir=jnp.asarray(nadir, float), periods=jnp.asarray(balancer.warmup, jnp.int32))


def run(balancer, epochs, num_tasks, active=None):
    state = balancer.init(num_tasks)
    for batches in epochs:
        for losses in batches:
            _, state = call(balancer, jnp.asarray(losses), state, active)
        state = balancer.end_epoch(state)
    return state


def test_goldens(stch_case, dtype, assert_golden):
    case = stch_case
    balancer, losses = stch(**case["params"]), jnp.asarray(case["losses"], dtype)
    state = warmed(balancer, case["state"]["nadir"]) if "state" in case else NoState()
    weights, _ = call(balancer, losses, state)
    direction, _ = jax.jit(aggregate)(balancer, jnp.asarray(case["jacobian"], dtype), state, losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)


@pytest.mark.parametrize("transform", ["none", "log_nadir"])
def test_weights_are_the_derivative_of_the_objective(transform):
    losses, others = np.array([0.7, 0.2, 1.5]), np.array([0.5, 0.3, 2.0])
    plain = transform == "none"
    balancer = stch(mu=0.5, preference=others, reference=others / 5) if plain else stch(mu=0.5, transform=transform)

    def objective(values):
        if plain:
            return soft_maximum(others * (values - others / 5), 0.5)
        return 3 * soft_maximum(np.log(values / others), 0.5)

    with jax.enable_x64(True):
        weights = weights_of(balancer, losses, NoState() if plain else warmed(balancer, others))
    for weight, shift in zip(weights, 1e-6 * np.eye(3), strict=True):
        np.testing.assert_allclose(weight, (objective(losses + shift) - objective(losses - shift)) / 2e-6, rtol=1e-6)


def test_objectives_of_the_goldens_are_the_soft_maximum(stch_case):
    case = stch_case
    losses, num_tasks = np.array(case["losses"]), len(case["losses"])
    if "state" in case:
        found = num_tasks * soft_maximum(np.log(losses / case["state"]["nadir"]), case["params"]["mu"])
    else:
        preference = np.array(case["params"].get("preference", np.full(num_tasks, 1 / num_tasks)))
        found = soft_maximum(preference * losses, case["params"]["mu"])
    np.testing.assert_allclose(found, case["objective"], atol=1e-10)


@pytest.mark.parametrize("mu", [1e-10, 1.0, 1e10])
def test_losses_of_any_size_are_finite(mu):
    np.testing.assert_allclose(weights_of(stch(mu=mu), [1e30, 2e30, 3e30]), [0, 0, 1 / 3], atol=1e-6)


def test_a_small_mu_is_the_largest_weighted_term_and_a_large_one_the_weighted_sum():
    preference = [0.2, 1.0, 0.5]
    cold = stch(mu=1e-4, preference=preference, reference=[0.0, 1.0, 0.0])
    np.testing.assert_allclose(weights_of(cold, [2.0, 1.1, 1.5]), [0, 0, 0.5], atol=1e-6)
    hot = stch(mu=1e6, preference=preference)
    np.testing.assert_allclose(weights_of(hot, [2.0, 1.1, 1.5]), np.array(preference) / 3, rtol=1e-4)


def test_an_absent_task_is_no_part_of_the_maximum():
    weights = weights_of(stch(), [0.5, np.nan, 2.0], active=jnp.array([True, False, True]))
    np.testing.assert_allclose(weights, [0.160410650412, 0, 0.339589349588], rtol=1e-5)


def test_the_warm_up_is_the_sum_of_logarithms():
    balancer = stch(transform="log_nadir", warmup=2, period=2)
    state, losses = balancer.init(3), np.random.default_rng(0).uniform(0.1, 3, size=(5, 3)).astype(np.float32)
    rows = []
    for loss in losses:
        weights, state = call(balancer, jnp.asarray(loss), state)
        rows.append(np.asarray(weights))
    expected = np.stack([weights_of(scale_invariant(), loss, NoState()) for loss in losses])
    np.testing.assert_array_equal(rows[:4], expected[:4])
    nadir = losses[2:4].mean(axis=0)  # of the last period of the warm-up
    np.testing.assert_allclose(state.nadir, nadir, rtol=1e-6)
    ratios = losses[4] / nadir  # mu = 1: the soft maximum of logarithms has their ratios as its shares
    np.testing.assert_allclose(rows[4], 3 * ratios / ratios.sum() / losses[4], rtol=1e-5)


def test_epochs_count_where_the_period_is_an_epoch_and_the_nadir_stays():
    balancer = stch(transform="log_nadir", warmup=2)
    assert balancer.by_epoch and not stch().by_epoch and not stch(transform="log_nadir", period=5).by_epoch
    epochs = [np.float32([[4.0, 3.0]]), np.float32([[1.0, 2.0], [3.0, 2.0]]), np.float32([[9.0, 9.0]])]
    np.testing.assert_array_equal(run(balancer, epochs[:1], 2).periods, 1)
    for num_epochs in (2, 3):
        np.testing.assert_array_equal(run(balancer, epochs[:num_epochs], 2).nadir, [2, 2])


def test_a_task_without_labels_in_the_last_period_keeps_its_older_mean():
    balancer = stch(transform="log_nadir", warmup=2, period=1)
    state = balancer.init(3)
    for losses, active in (([4.0, 3.0, 9.0], [True, True, False]), ([2.0, 1.0, 9.0], [True, False, False])):
        _, state = call(balancer, jnp.array(losses), state, jnp.array(active))
    np.testing.assert_array_equal(state.nadir, [2, 3, 0])
    weights, state = call(balancer, jnp.array([1.0, 1.0, 5.0]), state)
    np.testing.assert_array_equal(state.nadir, [2, 3, 5])  # the first loss of the third
    shares = np.array([1 / 2, 1 / 3, 1.0])
    np.testing.assert_allclose(weights, 3 * shares / shares.sum() / [1, 1, 5], rtol=1e-5)


def test_logarithms_skip_negative_losses_and_take_zeros():
    balancer = stch(transform="log_nadir", warmup=1, period=1)
    for state in (balancer.init(2), warmed(balancer, [1.0, 1.0])):
        assert jax.jit(weigh)(balancer, None, jnp.array([1.0, -0.1]), state, None)[2]["nonfinite"]
        assert not jax.jit(weigh)(balancer, None, jnp.array([1.0, 0.0]), state, None)[2]["nonfinite"]


def test_options_go_by_task_name():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    bound = stch(preference={"spend": 2.0, "click": 1.0}, reference={"spend": 1.0, "click": 0.0}).for_tasks(tasks)
    np.testing.assert_allclose(weights_of(bound, [2.0, 2.0]), [0.5, 1.0], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"stch\(preference\)"):
        stch(preference={"spend": 2.0}).for_tasks(tasks)


@pytest.mark.parametrize(
    "options",
    [{"mu": 0.0}, {"preference": -1.0}, {"reference": np.nan}, {"transform": "log"}, {"warmup": 0}, {"period": 0}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"stch\\({next(iter(options))}\\)"):
        stch(**options)


@pytest.mark.parametrize("options", [{"preference": 1.0}, {"reference": 1.0}, {"reference": [0.0, 0.0]}])
def test_the_nadir_takes_the_place_of_preference_and_reference(options):
    with pytest.raises(ConfigError, match="expected neither with transform 'log_nadir'"):
        stch(transform="log_nadir", **options)
