"""MetaBalance: goldens, the published recursion tensor by tensor, its strategies and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.metabalance import metabalance
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

step = jax.jit(lambda balancer, jacobian, state, active=None: aggregate(balancer, jacobian, state, active=active))


def test_goldens(metabalance_case, dtype, assert_golden):
    case = metabalance_case
    jacobian = np.asarray(case["jacobian"], dtype)
    groups = case.get("tensors", [range(jacobian.shape[1])])
    tensors = [jnp.asarray(jacobian[:, list(group)]) for group in groups]
    balancer = metabalance(**case["params"])
    state = balancer.init(len(jacobian), [tensor[0] for tensor in tensors])
    directions, _ = step(balancer, tensors, state)
    assert directions[0].dtype == dtype
    direction = np.zeros(jacobian.shape[1])
    for group, part in zip(groups, directions, strict=True):
        direction[list(group)] = part
    assert_golden(direction, case["direction"], case, dtype)


@pytest.mark.parametrize("strategy", ["both", "shrink", "enlarge"])
def test_equals_the_published_recursion(strategy):
    """Which does not correct m; with all tasks in every batch the ratio is the same."""
    rng, relax, beta = np.random.default_rng(0), 0.6, 0.8
    balancer = metabalance(relax=relax, beta=beta, strategy=strategy, main=1)
    usual = {"a": np.zeros(3), "b": np.zeros(3)}
    scales = {"a": [1, 3, 20], "b": [5, 2, 0.1]}
    with jax.enable_x64(True):
        state = balancer.init(3, {"a": jnp.zeros((2, 2)), "b": jnp.zeros(4)})
        for _ in range(4):
            flat = {name: rng.normal(size=(3, 4)) * np.array(scales[name])[:, None] for name in usual}
            direction, state = step(
                balancer, {"a": jnp.asarray(flat["a"].reshape(3, 2, 2)), "b": jnp.asarray(flat["b"])}, state
            )
            for name, rows in flat.items():
                usual[name] = beta * usual[name] + (1 - beta) * np.linalg.norm(rows, axis=1)
                expected = np.zeros(4)
                for row, length in zip(rows, usual[name], strict=True):
                    target = usual[name][1]
                    acts = {"both": True, "shrink": length > target, "enlarge": length < target}[strategy]
                    expected += (relax * target / length + 1 - relax) * row if acts else row
                np.testing.assert_allclose(np.ravel(direction[name]), expected, rtol=1e-9)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=(3, 5)) * scale, jnp.float32) for name, scale in (("a", 1), ("b", 100))}


def params_of(tensors):
    return jax.tree.map(lambda rows: rows[0], tensors)


def test_relax_zero_is_the_sum(tensors):
    balancer = metabalance(relax=0.0)
    direction, _ = step(balancer, tensors, balancer.init(3, params_of(tensors)))
    for name, rows in tensors.items():
        np.testing.assert_allclose(direction[name], np.sum(rows, axis=0), rtol=1e-5, atol=1e-4)


def test_relax_one_gives_all_rows_the_main_length(tensors):
    """In the first step m is the length of the row itself; orthogonal rows let each be read off the direction."""
    rows = jnp.diag(jnp.array([2.0, 50.0, 0.01]))
    balancer = metabalance(relax=1.0)
    direction, _ = step(balancer, rows, balancer.init(3, jnp.zeros(3)))
    np.testing.assert_allclose(direction, [2, 2, 2], rtol=1e-5)


@pytest.mark.parametrize(("strategy", "expected"), [("shrink", [2, 2, 0.01]), ("enlarge", [2, 50, 2])])
def test_strategies_act_on_one_side(strategy, expected):
    balancer = metabalance(relax=1.0, strategy=strategy)
    direction, _ = step(balancer, jnp.diag(jnp.array([2.0, 50.0, 0.01])), balancer.init(3, jnp.zeros(3)))
    np.testing.assert_allclose(direction, expected, rtol=1e-5)


def test_the_main_gradient_passes_unchanged(tensors):
    """To the last bit: the direction minus that of a batch in which the main task alone changes."""
    balancer = metabalance()
    state = balancer.init(3, params_of(tensors))
    for _ in range(3):
        _, state = step(balancer, tensors, state)
    direction, _ = step(balancer, tensors, state, jnp.array([True, False, False]))
    jax.tree.map(lambda leaf, rows: np.testing.assert_array_equal(leaf, rows[0]), direction, tensors)


def test_tasks_that_miss_batches_compare_by_their_usual_length():
    """A task with a third of the steps, of gradients as long as the main ones, keeps them as they are."""
    balancer, rows = metabalance(relax=1.0), jnp.array([[3.0, 4.0], [5.0, 0.0]])
    state = balancer.init(2, jnp.zeros(2))
    for number in range(6):
        _, state = step(balancer, rows, state, jnp.array([True, number % 3 == 0]))
    direction, _ = step(balancer, rows, state)
    np.testing.assert_allclose(direction, [8, 4], rtol=1e-5)


def test_tensors_that_a_task_does_not_reach():
    """Zeros of a helper stay zeros; where the main task has none, the others keep 1 - r."""
    tensors = {"helper": jnp.array([[1.0, 2.0], [0.0, 0.0]]), "own": jnp.array([[0.0, 0.0], [5.0, 5.0]])}
    balancer = metabalance(relax=0.7)
    direction, _ = step(balancer, tensors, balancer.init(2, params_of(tensors)))
    np.testing.assert_allclose(direction["helper"], [1, 2], rtol=1e-6)
    np.testing.assert_allclose(direction["own"], [1.5, 1.5], rtol=1e-5)


def test_before_the_main_task_was_seen_it_is_the_sum():
    balancer, rows = metabalance(), jnp.array([[1e9, 1e9], [1.0, 2.0], [3.0, 3.0]])
    direction, state = step(balancer, rows, balancer.init(3, jnp.zeros(2)), jnp.array([False, True, True]))
    np.testing.assert_allclose(direction, [4, 5], rtol=1e-6)
    np.testing.assert_array_equal(state.steps, [0, 1, 1])
    np.testing.assert_array_equal(state.lengths[0], 0)


def test_the_main_task_goes_by_name_or_position():
    tasks = [Task("view", "binary"), Task("buy", "binary")]
    rows = jnp.diag(jnp.array([1.0, 4.0]))
    bound = metabalance(relax=1.0, main="buy").for_tasks(tasks)
    direction, _ = step(bound, rows, bound.init(2, jnp.zeros(2)))
    np.testing.assert_allclose(direction, [4, 4], rtol=1e-5)
    for main in ("click", 2):
        with pytest.raises(ConfigError, match=r"metabalance\(main\)"):
            metabalance(main=main).for_tasks(tasks)
    with pytest.raises(ConfigError, match="for_tasks"):
        metabalance(main="buy").init(2, jnp.zeros(2))


@pytest.mark.parametrize("options", [{"relax": 1.5}, {"beta": -0.1}, {"strategy": "grow"}, {"main": -1}, {"main": 0.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"metabalance\\({next(iter(options))}\\)"):
        metabalance(**options)
