"""Dynamic weight average: goldens from epoch means, its derivative, absent tasks, resuming within an epoch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.dwa import dwa
from mtl_jax.errors import ConfigError

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def after_epochs(balancer, epochs, num_tasks, active=None):
    """The state after epochs of batches of losses."""
    state = balancer.init(num_tasks)
    for batches in epochs:
        for number, losses in enumerate(batches):
            present = None if active is None else jnp.asarray(active[number])
            _, state = call(balancer, jnp.asarray(losses), state, present)
        state = balancer.end_epoch(state)
    return state


def weights_of(balancer, state, num_tasks=2, active=None):
    return np.asarray(call(balancer, jnp.ones(num_tasks), state, active)[0])


def test_goldens(dwa_case, dtype, assert_golden):
    """Each epoch of two batches whose mean is the given one."""
    case = dwa_case
    balancer, num_tasks = dwa(**case["params"]), len(case["losses"])
    means = [np.array(epoch["epoch_mean"], dtype) for epoch in case["history"]]
    state = after_epochs(balancer, [[0.5 * mean, 1.5 * mean] for mean in means], num_tasks)
    losses = jnp.asarray(case["losses"], dtype)
    weights, _ = call(balancer, losses, state)
    direction, _ = jax.jit(aggregate)(balancer, jnp.asarray(case["jacobian"], dtype), state, losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)
    if "objective" in case:
        np.testing.assert_allclose(weights @ losses, case["objective"], rtol=1e-5)


def test_weights_are_the_derivative_of_the_objective():
    """O = sum_i w_i L_i with w of the two epochs before, whatever the losses of this one."""

    def objective(losses, last, before):
        exponentials = np.exp(np.divide(last, before) / 2.0)
        return len(losses) * exponentials @ losses / exponentials.sum()

    before, last, losses, step = [0.9, 0.1, 1.5], [0.7, 0.2, 1.5], np.array([3.0, 5.0, 1.0]), 1e-6
    with jax.enable_x64(True):
        weights, _ = call(dwa(), jnp.asarray(losses), after_epochs(dwa(), [[before], [last]], 3))
        weights = np.asarray(weights)
    for weight, shift in zip(weights, step * np.eye(3), strict=True):
        rise = objective(losses + shift, last, before) - objective(losses - shift, last, before)
        np.testing.assert_allclose(weight, rise / (2 * step), rtol=1e-7)


def test_a_slowly_falling_loss_counts_more_and_the_weights_sum_to_the_number_of_tasks():
    weights = weights_of(dwa(temperature=0.5), after_epochs(dwa(), [[[1.0, 10.0]], [[0.9, 5.0]]], 2))
    assert weights[0] > 1 > weights[1]
    np.testing.assert_allclose(weights.sum(), 2, rtol=1e-6)


def test_a_hot_temperature_gives_equal_weights():
    state = after_epochs(dwa(), [[[1.0, 10.0]], [[0.9, 0.5]]], 2)
    np.testing.assert_allclose(weights_of(dwa(temperature=1e6), state), [1, 1], atol=1e-5)


def test_periods_of_calls_are_epochs_of_as_many_batches():
    losses = np.random.default_rng(0).uniform(0.1, 3.0, size=(6, 2)).astype(np.float32)
    by_calls, state = dwa(period=3), dwa(period=3).init(2)
    rows = []
    for loss in losses:
        weights, state = call(by_calls, jnp.asarray(loss), state)
        rows.append(np.asarray(weights))
    np.testing.assert_allclose(rows, np.ones((6, 2)), rtol=1e-6)  # until two periods have ended
    expected = weights_of(dwa(), after_epochs(dwa(), [losses[:3], losses[3:]], 2))
    np.testing.assert_allclose(weights_of(by_calls, state), expected, rtol=1e-6)
    assert np.ptp(expected) > 0.01
    assert dwa().by_epoch and not by_calls.by_epoch
    jax.tree.map(np.testing.assert_array_equal, by_calls.end_epoch(state), state)


def test_a_mean_counts_the_batches_with_the_tasks_labels():
    """The second task is absent from every other batch, whose entries are nonsense."""
    active = [[True, True], [True, False]]
    epochs = [[[1.0, 2.0], [3.0, np.nan]], [[2.0, 3.0], [2.0, np.nan]]]
    expected = after_epochs(dwa(), [[[2.0, 2.0]], [[2.0, 3.0]]], 2)
    state = after_epochs(dwa(), epochs, 2, active)
    np.testing.assert_allclose(weights_of(dwa(), state), weights_of(dwa(), expected), rtol=1e-6)


def test_a_task_without_labels_for_an_epoch_has_a_rate_of_1_until_it_has_two_in_a_row():
    state, rates = dwa().init(2), []
    for epoch, first in enumerate([4.0, 2.0, 1.0, 0.5, 0.25]):
        present = jnp.array([True, epoch != 2])
        _, state = call(dwa(), jnp.array([first, first]), state, present)
        state = dwa().end_epoch(state)
        rates.append(np.asarray(state.ratios))
    np.testing.assert_array_equal(rates, [[1, 1], [0.5, 0.5], [0.5, 1], [0.5, 1], [0.5, 0.5]])


def test_an_absent_task_is_no_part_of_the_softmax():
    state = after_epochs(dwa(), [[[1.0, 1.0, 1.0]], [[1.0, 4.0, 9.0]]], 3)
    weights = weights_of(dwa(), state, 3, jnp.array([True, True, False]))
    np.testing.assert_allclose(weights, [0.364851047613, 1.63514895239, 0], rtol=1e-5)


@pytest.mark.parametrize(
    ("before", "last", "rate"), [(0.0, 1.0, 1e3), (1.0, 0.0, 1e-3), (0.0, 0.0, 1.0), (1.0, -1.0, 1e-3)]
)
def test_rates_of_losses_around_zero_are_bounded(before, last, rate):
    state = after_epochs(dwa(), [[[before, 1.0]], [[last, 1.0]]], 2)
    np.testing.assert_allclose(state.ratios, [rate, 1.0], rtol=1e-6)
    assert np.all(np.isfinite(weights_of(dwa(), state)))


def test_a_run_resumed_within_an_epoch_is_the_same_run():
    """The state as bytes in the middle of the second epoch."""
    losses = np.random.default_rng(1).uniform(0.1, 3.0, size=(2, 4, 2)).astype(np.float32)
    state = after_epochs(dwa(), losses, 2)
    resumed = after_epochs(dwa(), losses[:1], 2)
    for number, loss in enumerate(losses[1]):
        if number == 2:
            leaves, tree = jax.tree.flatten(resumed)
            stored = [(np.asarray(leaf).tobytes(), leaf.dtype, leaf.shape) for leaf in leaves]
            copies = [jnp.asarray(np.frombuffer(raw, kind).reshape(shape)) for raw, kind, shape in stored]
            resumed = jax.tree.unflatten(tree, copies)
        _, resumed = call(dwa(), jnp.asarray(loss), resumed)
    jax.tree.map(np.testing.assert_array_equal, dwa().end_epoch(resumed), state)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"period": "step"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"dwa\\({next(iter(options))}\\)"):
        dwa(**options)
