"""What every balancer keeps to: one suite over all methods, each against a NumPy loop written from its formula.

A new method is one row of ``METHODS``. All cases share one shape (8 rows masked by ``active``, 50 columns, zero where a
case has fewer), so that a method compiles a handful of times, however many cases there are.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import Balancer, aggregate, equal, fixed, pcgrad, uncertainty
from mtl_jax.balancing.base import gramian, weigh
from mtl_jax.balancing.pcgrad import draw_orders

NUM_TASKS, NUM_PARAMS, NUM_CASES = 8, 50, 200
FIXED = np.array([0.5, 1.0, 0.0, 2.0, 0.25, 4.0, 1.5, 3.0])
INITIAL = np.linspace(-1.0, 1.0, NUM_TASKS)


def direction_of_pcgrad(jacobian, losses, tasks, key):
    """The paper's loop on explicit gradients, over the active tasks; returns the direction."""
    orders = np.asarray(draw_orders(key, NUM_TASKS))
    projected = {task: jacobian[task].copy() for task in tasks}
    for task in tasks:
        for other in orders[task]:
            dot = projected[task] @ jacobian[other]
            if other in tasks and other != task and dot < 0:
                projected[task] -= dot / (jacobian[other] @ jacobian[other]) * jacobian[other]
    return sum(projected.values())


def direction_of_uncertainty(jacobian, losses, tasks, key):
    """After one step on the same losses: Adam's first step is the sign of its gradient times the rate (0.3)."""
    direction = np.zeros(NUM_PARAMS)
    for task in tasks:
        gradient = 0.5 - 0.5 * np.exp(-INITIAL[task]) * losses[task]
        log_var = INITIAL[task] - 0.3 * gradient / (abs(gradient) + 1e-8)
        direction += 0.5 * np.exp(-log_var) * jacobian[task]
    return direction


@dataclasses.dataclass(frozen=True)
class Method:
    """One balancer under test.

    Attributes:
      run_axis: Balancers that differ in numeric hyperparameters only; the first is the one that the suite tests.
      reference: (jacobian, losses, active task numbers, key) -> the direction of a second step on the same batch.
      linear: Whether the direction is linear in positive factors of the rows.
    """

    run_axis: tuple[Balancer, ...]
    reference: Callable
    linear: bool = False


METHODS = {
    "equal": Method(
        (equal(), equal()),
        lambda jacobian, losses, tasks, key: sum(jacobian[task] for task in tasks),
        linear=True,
    ),
    "equal_mean": Method(
        (equal(reduction="mean"), equal(reduction="mean")),
        lambda jacobian, losses, tasks, key: np.mean([jacobian[task] for task in tasks], axis=0),
        linear=True,
    ),
    "fixed": Method(
        (fixed(weights=FIXED), fixed(weights=2 * FIXED + 1)),
        lambda jacobian, losses, tasks, key: sum(FIXED[task] * jacobian[task] for task in tasks),
        linear=True,
    ),
    "uncertainty": Method(
        (
            uncertainty(likelihood="regression", initial=INITIAL, weight_lr=0.3),
            uncertainty(likelihood="regression", initial=-INITIAL, weight_lr=0.01),
        ),
        direction_of_uncertainty,
        linear=True,
    ),
    "pcgrad": Method((pcgrad(), pcgrad()), direction_of_pcgrad, linear=True),
}


@functools.cache
def cases():
    """Jacobians of all ranks with norm ratios to 1e3, their losses, and which of the 8 rows are tasks."""
    rng = np.random.default_rng(0)
    jacobians = np.zeros((NUM_CASES, NUM_TASKS, NUM_PARAMS))
    active = np.zeros((NUM_CASES, NUM_TASKS), bool)
    for jacobian, present in zip(jacobians, active, strict=True):
        num_tasks = rng.choice([1, 2, 3, 5, 8])
        num_params = rng.choice([2, num_tasks, NUM_PARAMS])
        rank = rng.integers(1, min(num_tasks, num_params) + 1)
        rows = rng.normal(size=(num_tasks, rank)) @ rng.normal(size=(rank, num_params))
        rows *= 10 ** rng.uniform(-1.5, 1.5, size=(num_tasks, 1))
        tasks = np.sort(rng.permutation(NUM_TASKS)[:num_tasks])
        jacobian[tasks, :num_params] = rows
        present[tasks] = True
    losses = 10 ** rng.uniform(-2, 1, size=(NUM_CASES, NUM_TASKS))
    return jacobians, losses, active


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@functools.cache
def keys(num_keys=NUM_CASES):
    return jax.random.split(jax.random.key(0), num_keys)


def two_steps(balancer, jacobian, losses, active, key):
    """Weights, direction and state of a second step on one batch, so that the state is not the initial one."""
    draw = key if balancer.stochastic else None
    products = gramian(jacobian) if balancer.needs == "gramian" else None
    _, state, _ = weigh(balancer, products, losses, balancer.init(NUM_TASKS), draw, active)
    weights, _, _ = weigh(balancer, products, losses, state, draw, active)
    direction, state = aggregate(balancer, jacobian, state, losses=losses, key=draw, active=active)
    return weights, direction, state


jitted = jax.jit(jax.vmap(two_steps, in_axes=(None, 0, 0, 0, 0)))


def evaluate(method, jacobians, losses, active, *, balancer=None, dtype=np.float32):
    arrays = (jnp.asarray(jacobians, dtype), jnp.asarray(losses, dtype), jnp.asarray(active), keys())
    return jax.tree.map(np.asarray, jitted(balancer or method.run_axis[0], *arrays))


def assert_close(actual, expected, scale, tolerance):
    """Case by case, relative to ``scale``."""
    excess = np.abs(actual - expected).max(axis=-1) - tolerance * scale
    assert np.max(excess) <= 0, f"case {np.argmax(excess)} is off by more than {tolerance}"


def largest_term(weights, jacobians):
    """Largest entry of any w_i g_i: where tasks cancel, their sum is known to its rounding only."""
    return np.max(np.abs(weights[:, :, None] * jacobians), axis=(1, 2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-3), (np.float64, 1e-8)], ids=["f32", "f64"])
def test_direction_is_that_of_the_numpy_loop(method, dtype, tolerance):
    jacobians, losses, active = cases()
    with jax.enable_x64(dtype == np.float64):
        weights, directions, _ = evaluate(method, jacobians, losses, active, dtype=dtype)
        assert weights.dtype == directions.dtype == dtype
    expected = [
        method.reference(jacobian, loss, np.flatnonzero(present), key)
        for jacobian, loss, present, key in zip(jacobians, losses, active, keys(), strict=True)
    ]
    assert_close(directions, expected, largest_term(weights, jacobians), tolerance)


def test_results_are_finite_and_absent_tasks_weigh_nothing(method):
    jacobians, losses, active = cases()
    weights, directions, _ = evaluate(method, jacobians, losses, active)
    assert weights.shape == (NUM_CASES, NUM_TASKS)
    assert directions.shape == (NUM_CASES, NUM_PARAMS)
    assert np.all(np.isfinite(weights)) and np.all(np.isfinite(directions))
    assert np.all(weights[~active] == 0)
    assert np.any(weights[active] != 0)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_homogeneity(method, factor):
    jacobians, losses, active = cases()
    degree = method.run_axis[0].homogeneity
    weights, directions, _ = evaluate(method, jacobians, losses, active)
    _, scaled, _ = evaluate(method, factor * jacobians, losses, active)
    assert_close(scaled / factor**degree, directions, largest_term(weights, jacobians), 1e-3)


def test_order_of_the_tasks_does_not_matter(method):
    """Permuting rows, losses and per-task options permutes the weights; in the mean over keys where it draws."""
    jacobians, losses, active = cases()
    order = np.random.default_rng(1).permutation(NUM_TASKS)
    balancer = method.run_axis[0]
    permuted = jax.tree.map(lambda leaf: leaf[order] if np.shape(leaf) == (NUM_TASKS,) else leaf, balancer)
    if balancer.stochastic:
        case = np.flatnonzero(active.sum(axis=1) == 3)[0]
        repeats = [np.repeat(array[case : case + 1], NUM_CASES, axis=0) for array in cases()]
        weights, _, _ = evaluate(method, *repeats)
        moved, _, _ = evaluate(method, *(array[:, order] for array in repeats), balancer=permuted)
        difference = np.mean(moved, axis=0) - np.mean(weights, axis=0)[order]
        error = np.sqrt((np.var(moved, axis=0) + np.var(weights, axis=0)[order]) / NUM_CASES)
        assert np.all(np.abs(difference) <= 4 * error + 1e-5 * np.max(np.abs(weights)))
    else:
        weights, _, _ = evaluate(method, jacobians, losses, active)
        moved, _, _ = evaluate(method, jacobians[:, order], losses[:, order], active[:, order], balancer=permuted)
        assert_close(moved, weights[:, order], np.max(np.abs(weights), axis=1), 1e-5)


def test_linear_in_positive_factors_of_the_rows(method):
    if not method.linear:
        pytest.skip("the method is not linear under row scaling")
    jacobians, losses, active = cases()
    rng = np.random.default_rng(2)
    first, second = rng.uniform(0.1, 2.0, size=(2, NUM_TASKS, 1))
    _, one, _ = evaluate(method, first * jacobians, losses, active)
    _, other, _ = evaluate(method, second * jacobians, losses, active)
    weights, both, _ = evaluate(method, (first + second) * jacobians, losses, active)
    assert_close(one + other, both, largest_term(weights, (first + second) * jacobians), 1e-3)


def test_absent_tasks_are_not_read_and_keep_their_state(method):
    """Called directly, too: garbage in their entries changes no weight, and their entries of the state stay."""
    jacobians, losses, active = cases()
    case = np.flatnonzero(active.sum(axis=1) == 3)[0]
    present = jnp.asarray(active[case])
    balancer, state = method.run_axis[0], method.run_axis[0].init(NUM_TASKS)
    products = jnp.asarray(jacobians[case] @ jacobians[case].T, jnp.float32)
    garbage = jnp.where(present[:, None] & present, products, -7.0)
    loss = jnp.asarray(losses[case], jnp.float32)
    expected, _ = balancer.weigh(products, loss, state, keys()[0], active=present)
    weights, after = balancer.weigh(garbage, jnp.where(present, loss, 1e9), state, keys()[0], active=present)
    np.testing.assert_array_equal(weights, expected)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        if np.shape(old)[:1] == (NUM_TASKS,):
            np.testing.assert_array_equal(np.asarray(new)[~active[case]], np.asarray(old)[~active[case]])


def test_without_active_tasks_nothing_happens(method):
    jacobians, losses, active = cases()
    weights, directions, state = evaluate(method, jacobians, losses, np.zeros_like(active))
    assert not np.any(weights) and not np.any(directions)
    initial = method.run_axis[0].init(NUM_TASKS)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, np.stack([old] * NUM_CASES)), state, initial)


def test_null_rows_are_as_inactive_for_methods_of_gradients(method):
    """Methods of losses do not see them."""
    jacobians, losses, active = cases()
    first = np.argmax(active, axis=1)
    nulled, without = jacobians.copy(), active.copy()
    nulled[np.arange(NUM_CASES), first] = 0
    weights, directions, _ = evaluate(method, nulled, losses, active)
    if method.run_axis[0].needs == "losses":
        expected, _, _ = evaluate(method, jacobians, losses, active)
    else:
        without[np.arange(NUM_CASES), first] = False
        expected, expected_directions, _ = evaluate(method, jacobians, losses, without)
        np.testing.assert_array_equal(directions, expected_directions)
    np.testing.assert_array_equal(weights, expected)


def test_only_methods_that_say_so_read_the_losses(method):
    jacobians, losses, active = cases()
    weights, _, _ = evaluate(method, jacobians, losses, active)
    others, _, _ = evaluate(method, jacobians, losses[:, ::-1] + 3.0, active)
    assert np.array_equal(weights, others) != method.run_axis[0].reads_losses


def test_one_key_gives_one_result_and_only_methods_that_say_so_draw(method):
    jacobians, losses, active = cases()
    weights, directions, _ = evaluate(method, jacobians, losses, active)
    again, again_directions, _ = evaluate(method, jacobians, losses, active)
    np.testing.assert_array_equal(again, weights)
    np.testing.assert_array_equal(again_directions, directions)
    arrays = (jnp.asarray(array) for array in (jacobians.astype("f"), losses.astype("f"), active))
    redrawn, _, _ = jitted(method.run_axis[0], *arrays, keys()[::-1])
    assert np.array_equal(redrawn, weights) != method.run_axis[0].stochastic


def three_steps(balancer, key):
    """Directions and final state of three steps on three batches."""
    jacobians, losses, active = (array[:3] for array in cases())

    def step(state, batch):
        jacobian, loss, present, number = batch
        draw = jax.random.fold_in(key, number) if balancer.stochastic else None
        return aggregate(balancer, jacobian, state, losses=loss, key=draw, active=present)[::-1]

    batches = (
        jnp.asarray(jacobians, jnp.float32),
        jnp.asarray(losses, jnp.float32),
        jnp.asarray(active),
        jnp.arange(3),
    )
    return jax.lax.scan(step, balancer.init(NUM_TASKS), batches)


def test_a_run_axis_over_hyperparameters_and_keys_is_a_loop(method):
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, float) for leaf in leaves]), *method.run_axis)
    run_keys = keys()[: len(method.run_axis)]
    mapped = jax.jit(jax.vmap(three_steps))(stacked, run_keys)
    loop = [jax.jit(three_steps)(balancer, key) for balancer, key in zip(method.run_axis, run_keys, strict=True)]
    for together, *alone in zip(*map(jax.tree.leaves, (mapped, *loop)), strict=True):
        np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-5)
    if jax.tree.leaves(stacked):
        assert not np.array_equal(loop[0][1], loop[1][1])


def test_compiled_and_not_agree(method):
    jacobians, losses, active = cases()
    case = np.flatnonzero(active.sum(axis=1) == 3)[0]
    arrays = (
        jnp.asarray(jacobians[case], jnp.float32),
        jnp.asarray(losses[case], jnp.float32),
        jnp.asarray(active[case]),
    )
    weights, directions, _ = evaluate(method, jacobians, losses, active)
    with jax.disable_jit():
        _, direction, _ = two_steps(method.run_axis[0], *arrays, keys()[case])
    assert_close(direction, directions[case], largest_term(weights, jacobians)[case], 1e-5)


def test_one_trace_serves_all_steps_and_hyperparameters(method):
    traces = []

    @jax.jit
    def step(balancer, jacobian, losses, state, key):
        traces.append(1)
        draw = key if balancer.stochastic else None
        return aggregate(balancer, jacobian, state, losses=losses, key=draw)

    jacobians, losses, _ = cases()
    for balancer in method.run_axis:
        state = balancer.init(NUM_TASKS)
        for number in range(2):
            batch = jnp.asarray(jacobians[number], jnp.float32), jnp.asarray(losses[number], jnp.float32)
            _, state = step(balancer, *batch, state, keys()[number])
    assert len(traces) == 1
