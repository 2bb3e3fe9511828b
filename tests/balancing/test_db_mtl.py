"""DB-MTL: goldens, the paper's recursion on explicit gradients, its lengths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate
from mtl_jax.balancing.db_mtl import db_mtl
from mtl_jax.balancing.ntkmtl import ntkmtl
from mtl_jax.errors import ConfigError

step = jax.jit(lambda *args, active=None: aggregate(*args[:3], losses=args[3], active=active))


def test_goldens(db_mtl_case, dtype, assert_golden):
    case = db_mtl_case
    balancer = db_mtl(**case["params"])
    state = balancer.init(len(case["jacobian"]), jnp.zeros(len(case["jacobian"][0]), dtype))
    for call in [*case.get("history", []), case]:
        jacobian, losses = jnp.asarray(call["jacobian"], dtype), jnp.asarray(call["losses"], dtype)
        direction, state = step(balancer, jacobian, state, losses)
    assert direction.dtype == dtype
    assert_golden(direction, case["direction"], case, dtype)


@pytest.mark.parametrize(("beta", "sigma"), [(0.9, 0.0), (0.8, 0.5)])
def test_equals_the_papers_recursion(beta, sigma):
    """And every term of its direction has the length of the longest average."""
    rng = np.random.default_rng(0)
    balancer = db_mtl(beta=beta, sigma=sigma)
    with jax.enable_x64(True):
        state, y = balancer.init(3, jnp.zeros(8)), np.zeros((3, 8))
        for t in range(1, 6):
            jacobian = rng.normal(size=(3, 8)) * np.array([[1], [10], [0.1]])
            losses = rng.uniform(0.1, 3, 3)
            logs = jacobian / (losses[:, None] + 1e-8)
            y = logs + beta / t**sigma * (y - logs)
            norms = np.linalg.norm(y, axis=1, keepdims=True)
            terms = np.max(norms) / norms * y
            direction, state = step(balancer, jnp.asarray(jacobian), state, jnp.asarray(losses))
            np.testing.assert_allclose(direction, np.sum(terms, axis=0), rtol=1e-9)
            np.testing.assert_allclose(state.average, y, rtol=1e-9)


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_without_an_average_it_is_parallel_to_ntkmtl(num_tasks):
    """On the same gradients: lengths are equalised, so that losses do not change the direction."""
    rng = np.random.default_rng(num_tasks)
    jacobian = jnp.asarray(rng.normal(size=(num_tasks, 9)), jnp.float32)
    balancer = db_mtl(beta=0.0)
    losses = jnp.asarray(rng.uniform(0.1, 3, num_tasks), jnp.float32)
    direction, _ = step(balancer, jacobian, balancer.init(num_tasks, jnp.zeros(9)), losses)
    other, _ = aggregate(ntkmtl(), jacobian, NoState())
    np.testing.assert_allclose(direction / np.linalg.norm(direction), other / np.linalg.norm(other), atol=1e-6)


def test_a_constant_batch_fills_the_average():
    """With no correction the direction after n steps is 1 - beta^n of its limit."""
    balancer, jacobian = db_mtl(beta=0.5), jnp.array([[-4.0, 1, 1], [6, 1, 1]])
    state = balancer.init(2, jnp.zeros(3))
    losses = jnp.array([0.5, 2.0])
    limit, _ = step(db_mtl(beta=0.0), jacobian, state, losses)
    for n in (1, 2, 3):
        direction, state = step(balancer, jacobian, state, losses)
        np.testing.assert_allclose(direction, (1 - 0.5**n) * limit, rtol=1e-5)


def test_an_inactive_task_keeps_its_average_and_has_no_part():
    balancer, jacobian = db_mtl(beta=0.5), jnp.array([[-4.0, 1, 1], [6, 1, 1]])
    losses = jnp.array([0.5, 2.0])
    _, state = step(balancer, jacobian, balancer.init(2, jnp.zeros(3)), losses)
    active = jnp.array([True, False])
    _, with_garbage = balancer.combine(jacobian.at[1].set(1e9), losses, state, None, active=active)
    direction, after = step(balancer, jacobian, state, losses, active=active)
    np.testing.assert_array_equal(after.average[1], state.average[1])
    np.testing.assert_array_equal(with_garbage.average, after.average)
    np.testing.assert_allclose(direction, after.average[0], rtol=1e-6)


def test_leaves_keep_their_shape_and_type():
    params = {"kernel": jnp.zeros((4, 2), jnp.bfloat16), "scale": jnp.zeros(())}
    jacobian = {"kernel": jnp.ones((3, 4, 2), jnp.bfloat16), "scale": jnp.array([1.0, 2.0, 3.0])}
    balancer = db_mtl()
    state = balancer.init(3, params)
    direction, after = step(balancer, jacobian, state, jnp.ones(3))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), direction) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), params
    )
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [jnp.float32, jnp.float32, jnp.int32]


def test_heads_descend_the_log_loss():
    """The derivative of log(L + 1e-8)."""
    losses = jnp.array([0.5, 2.0, 1e-3])
    slope = jax.grad(lambda loss: jnp.sum(jnp.log(loss + 1e-8)))(losses)
    np.testing.assert_allclose(
        db_mtl().head_weights(jnp.ones(3), losses, db_mtl().init(3, jnp.zeros(1))), slope, rtol=1e-6
    )


def test_a_negative_loss_skips_the_step_and_a_zero_loss_does_not():
    balancer, jacobian = db_mtl(), jnp.array([[-4.0, 1, 1], [6, 1, 1]])
    state = balancer.init(2, jnp.zeros(3))
    direction, after = step(balancer, jacobian, state, jnp.array([-0.5, 2.0]))
    assert not np.any(direction)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    direction, _ = step(balancer, jacobian, state, jnp.array([0.0, 2.0]))
    assert np.all(np.isfinite(direction)) and np.any(direction)


@pytest.mark.parametrize("options", [{"beta": 1.1}, {"beta": -0.1}, {"sigma": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"db_mtl\\({next(iter(options))}\\)"):
        db_mtl(**options)
