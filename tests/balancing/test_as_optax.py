"""A balancer as a link of an optax chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing import (
    aggregate,
    as_optax,
    db_mtl,
    dwa,
    equal,
    famo,
    fixed,
    graddrop,
    modo,
    nash_mtl,
    pcgrad,
    uncertainty,
)
from mtl_jax.errors import ConfigError

PARAMS = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.3]]), "bias": jnp.array([0.1, -0.2])}


def task_losses(params):
    """Three quadratics with different minima and curvatures."""
    kernel, bias = params["kernel"], params["bias"]
    return jnp.stack(
        [
            jnp.sum((kernel - 1) ** 2),
            jnp.sum((kernel + 1) ** 2) + jnp.sum(bias**2),
            3 * jnp.sum((bias - kernel[0]) ** 2),
        ]
    )


def test_equal_is_the_gradient_of_the_summed_loss():
    transform = as_optax(equal(), 3)
    updates, _ = transform.update(jax.jacobian(task_losses)(PARAMS), transform.init(PARAMS))
    expected = jax.jit(jax.grad(lambda p: jnp.sum(task_losses(p))))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


@pytest.mark.parametrize(
    "balancer",
    [pcgrad(), uncertainty(weight_lr=0.1), nash_mtl(), graddrop(), dwa(period=2), db_mtl()],
    ids=lambda balancer: type(balancer).__name__,
)
def test_in_a_chain_it_is_the_loop_by_hand(balancer):
    """Five jitted steps of clipping and Adam behind it; links of the chain ignore arguments of the others."""
    tail = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    optimizer = optax.chain(as_optax(balancer, 3, seed=4), tail)

    @jax.jit
    def step(params, state):
        losses, jacobian = task_losses(params), jax.jacobian(task_losses)(params)
        updates, state = optimizer.update(jacobian, state, params, losses=losses, value=jnp.sum(losses))
        return optax.apply_updates(params, updates), state

    @jax.jit
    def balance(params, state, key):
        losses, jacobian = task_losses(params), jax.jacobian(task_losses)(params)
        return aggregate(balancer, jacobian, state, losses=losses, key=key)

    params, state = PARAMS, optimizer.init(PARAMS)
    by_hand, inner, tail_state = PARAMS, balancer.init(3, PARAMS), tail.init(PARAMS)
    for number in range(5):
        params, state = step(params, state)
        key = jax.random.fold_in(jax.random.key(4), number)
        direction, inner = balance(by_hand, inner, key)
        updates, tail_state = tail.update(direction, tail_state, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, by_hand)
    assert task_losses(params)[2] < task_losses(PARAMS)[2]


def test_tasks_without_labels_are_left_out():
    transform = as_optax(equal(), 3)
    jacobian = jax.jacobian(task_losses)(PARAMS)
    updates, _ = transform.update(jacobian, transform.init(PARAMS), active=jnp.array([False, True, False]))
    np.testing.assert_array_equal(updates["kernel"], jacobian["kernel"][1])


def test_what_cannot_work_is_refused_with_the_reason():
    jacobian = jax.jacobian(task_losses)(PARAMS)
    with pytest.raises(ConfigError, match=r"pcgrad\(\)"):
        as_optax(pcgrad, 3)
    with pytest.raises(ConfigError, match="at least 1"):
        as_optax(pcgrad(), 0)
    with pytest.raises(ConfigError, match="losses="):
        as_optax(uncertainty(), 3).update(jacobian, as_optax(uncertainty(), 3).init(PARAMS))
    with pytest.raises(ConfigError, match="not the gradient of their sum"):
        as_optax(pcgrad(), 3).update(PARAMS, as_optax(pcgrad(), 3).init(PARAMS))
    with pytest.raises(ConfigError, match="for_tasks"):
        as_optax(fixed(weights={"a": 1.0, "b": 1.0, "c": 1.0}), 3).init(PARAMS)


def test_what_an_update_did_is_observed_by_the_next_call():
    """FAMO's logits move by how the losses of one batch fell under the update, and not before anybody says so."""
    transform = as_optax(famo(), 3)
    jacobian, losses = jax.jacobian(task_losses)(PARAMS), task_losses(PARAMS)
    _, state = transform.update(jacobian, transform.init(PARAMS), losses=losses, losses_after=None)
    after = 0.5 * losses + jnp.array([0.0, 0.1, 0.0])
    expected = famo().observe(after, state.balancer)
    _, told = transform.update(jacobian, state, losses=losses, losses_after=after)
    _, untold = transform.update(jacobian, state, losses=losses)
    np.testing.assert_allclose(told.balancer.logits.value, expected.logits.value, rtol=1e-6)
    assert told.balancer.logits.value[1] > told.balancer.logits.value[0]  # the slower task gains weight
    np.testing.assert_array_equal(untold.balancer.logits.value, np.zeros(3))


def test_three_batches_lead_the_task_axis():
    transform = as_optax(modo(gamma=0.0, rho=0.0), 3)
    jacobian = jax.tree.map(lambda rows: jnp.stack([rows, 2 * rows, 3 * rows]), jax.jacobian(task_losses)(PARAMS))
    updates, _ = transform.update(jacobian, transform.init(PARAMS))
    mean_of_last = jax.tree.map(lambda rows: jnp.mean(rows[2], axis=0), jacobian)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, mean_of_last)
    with pytest.raises(ConfigError, match="jacobian with leading axis 2"):
        transform.update(jax.tree.map(lambda leaf: leaf[:2], jacobian), transform.init(PARAMS))


def test_what_waits_for_an_epoch_is_refused():
    with pytest.raises(ConfigError, match="waits for the end of an epoch.*period=n"):
        as_optax(dwa(), 3)
