"""Weights that are kept over some steps."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import aggregate, cr_mogm, equal, graddrop, mgda, modo, nash_mtl, ntkmtl
from mtl_jax.balancing.base import weigh
from mtl_jax.balancing.reuse import reuse
from mtl_jax.errors import ConfigError

RNG = np.random.default_rng(3)
GRADIENTS = [jnp.asarray(RNG.normal(size=(3, 7)), jnp.float32) for _ in range(5)]


def weights_over_steps(balancer, actives=None):
    state, seen = balancer.init(3), []
    for number, rows in enumerate(GRADIENTS):
        active = None if actives is None else jnp.array(actives[number])
        weights, state, _ = weigh(balancer, rows @ rows.T, jnp.ones(3), state, None, active)
        seen.append(np.asarray(weights))
    return seen


def test_weights_are_those_of_the_last_solve():
    alone = weights_over_steps(mgda())
    kept = weights_over_steps(reuse(mgda(), every=2))
    for number in range(5):
        np.testing.assert_allclose(kept[number], alone[number - number % 2], rtol=1e-6)


def test_at_every_step_it_is_the_other_method():
    np.testing.assert_allclose(weights_over_steps(reuse(ntkmtl(), every=1)), weights_over_steps(ntkmtl()), rtol=1e-6)


def test_the_other_method_takes_a_step_only_when_asked():
    """Its average is one over solves, not over steps."""
    state = reuse(cr_mogm(mgda()), every=2).init(3)
    for rows in GRADIENTS:
        _, state = aggregate(reuse(cr_mogm(mgda()), every=2), rows, state)
    inner = cr_mogm(mgda()).init(3)
    for rows in GRADIENTS[::2]:
        _, inner = aggregate(cr_mogm(mgda()), rows, inner)
    np.testing.assert_allclose(state.base.average, inner.average, rtol=1e-6)


def test_an_absent_task_keeps_its_weight_of_before():
    there, without = [True] * 3, [True, False, True]
    seen = weights_over_steps(reuse(ntkmtl(), every=2), [there, without, without, there, there])
    alone = weights_over_steps(ntkmtl())
    assert seen[1][1] == seen[2][1] == 0
    np.testing.assert_allclose(seen[3][1], alone[0][1], rtol=1e-6)


@pytest.mark.parametrize("base", [equal(), modo(), graddrop(), "mgda"])
def test_methods_that_compare_no_gradients_of_one_batch_are_refused(base):
    with pytest.raises(ConfigError, match="expected a method that compares the gradients of one batch"):
        reuse(base, every=2)


def test_what_stands_for_products_between_solves():
    for balancer in (reuse(mgda(), every=2), nash_mtl(update_every=2)):
        state = balancer.init(3)
        for number, rows in enumerate(GRADIENTS):
            due, products = balancer.kept(state)
            assert bool(due) == (number % 2 == 0)
            if not due:
                np.testing.assert_allclose(products, GRADIENTS[number - 1] @ GRADIENTS[number - 1].T, rtol=1e-6)
            _, state = aggregate(balancer, rows, state)
    assert mgda().kept(mgda().init(3)) is None and nash_mtl().kept(nash_mtl().init(3)) is None
