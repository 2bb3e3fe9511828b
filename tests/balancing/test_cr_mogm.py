"""CR-MOGM: goldens, its average over methods of losses and gradients, and what it hands through."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import Balancer, NoState, aggregate, weigh
from mtl_jax.balancing.cr_mogm import cr_mogm
from mtl_jax.balancing.famo import famo
from mtl_jax.balancing.fixed import fixed
from mtl_jax.balancing.graddrop import graddrop
from mtl_jax.balancing.krum import krum
from mtl_jax.balancing.mgda import mgda
from mtl_jax.balancing.modo import modo
from mtl_jax.balancing.ntkmtl import ntkmtl
from mtl_jax.balancing.pcgrad import pcgrad
from mtl_jax.balancing.ple_schedule import ple_schedule
from mtl_jax.balancing.uncertainty import uncertainty
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

BASES = {"mgda": mgda}


@pytest.fixture
def gramians():
    rows = np.random.default_rng(0).normal(size=(5, 3, 6)) * np.array([[1.0], [4.0], [0.3]])
    return [jnp.asarray(row @ row.T, jnp.float32) for row in rows]


def run(balancer, gramians, active=None):
    state, weights, losses = balancer.init(3), [], jnp.array([0.5, 1.0, 2.0])
    for number, gramian in enumerate(gramians):
        present = None if active is None else jnp.asarray(active[number])
        key = jax.random.key(number)
        now, state = balancer.weigh(gramian, losses, state, key, active=present)
        weights.append(np.asarray(now))
    return np.stack(weights), state


def test_goldens(cr_mogm_case, dtype, assert_golden):
    case = cr_mogm_case
    balancer = cr_mogm(BASES[case["params"]["base"]](), alpha=case["params"]["alpha"])
    state = balancer.init(len(case["jacobian"]))
    for call in [*case.get("history", []), case]:
        jacobian = jnp.asarray(call["jacobian"], dtype)
        weights, state = balancer.weigh(jacobian @ jacobian.T, jnp.zeros(len(jacobian), dtype), state, None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jacobian, case["direction"], case, dtype)


@pytest.mark.parametrize("base", [ntkmtl(), pcgrad(), uncertainty(weight_lr=0.3)], ids=["gramian", "drawn", "learned"])
def test_is_the_moving_average_of_the_bases_weights(base, gramians):
    """Whose own state goes on as if it were alone."""
    alone, base_state = run(base, gramians)
    average, expected = alone[0], []
    for weights in alone:
        average = 0.7 * average + 0.3 * weights
        expected.append(average)
    weights, state = run(cr_mogm(base, alpha=0.7), gramians)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.base, base_state)


def test_limits(gramians):
    alone, _ = run(ntkmtl(), gramians)
    np.testing.assert_array_equal(run(cr_mogm(ntkmtl(), alpha=0.0), gramians)[0], alone)
    np.testing.assert_array_equal(run(cr_mogm(ntkmtl(), alpha=1.0), gramians)[0], np.tile(alone[0], (5, 1)))


def test_constant_weights_are_their_own_average(gramians):
    weights, _ = run(cr_mogm(fixed(weights=[1.0, 0.0, 2.5])), gramians)
    np.testing.assert_allclose(weights, np.tile([1.0, 0.0, 2.5], (5, 1)), rtol=1e-6)


def test_inactive_tasks_pause(gramians):
    """The third comes in the second step, with the weight that the base gives then; the first is missing once."""
    active = [[True, True, False], [True, True, True], [False, True, True], [True, True, True], [True, True, True]]
    alone, _ = run(ntkmtl(), gramians, active)
    weights, state = run(cr_mogm(ntkmtl(), alpha=0.5), gramians, active)
    assert weights[0, 2] == weights[2, 0] == 0
    np.testing.assert_allclose(weights[1, 2], alone[1, 2])
    second = 0.5 * alone[0, 0] + 0.5 * alone[1, 0]
    np.testing.assert_allclose(weights[3, 0], 0.5 * second + 0.5 * alone[3, 0], rtol=1e-5)
    np.testing.assert_allclose(state.average, weights[4])


def test_hands_through_what_the_base_is():
    for base in (ntkmtl(), pcgrad(), uncertainty(), modo(), krum(num_byzantine=2), famo(), ple_schedule()):
        wrapped = cr_mogm(base)
        for name in ("needs", "reads_losses", "stochastic", "min_tasks", "num_batches", "homogeneity", "observes"):
            assert getattr(wrapped, name) == getattr(base, name)
        for name in ("has_parameter_state", "weighted_heads", "by_epoch", "scaling"):
            assert getattr(wrapped, name) == getattr(base, name)


def test_products_and_lengths_are_those_of_the_base():
    jacobians = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 5)), jnp.float32)
    balancer = cr_mogm(modo(), alpha=0.0)
    direction, _ = aggregate(balancer, jacobians, balancer.init(4))
    np.testing.assert_array_equal(direction, aggregate(modo(), jacobians, modo().init(4))[0])


def test_epochs_and_observations_reach_the_base():
    base = famo(weight_lr=0.3)
    balancer, losses = cr_mogm(base, alpha=0.0), jnp.array([1.0, 2.0])
    _, base_state = base.weigh(None, losses, base.init(2), None)
    _, state = balancer.weigh(None, losses, balancer.init(2), None)
    observed = balancer.observe(jnp.array([0.5, 2.0]), state)
    expected = base.observe(jnp.array([0.5, 2.0]), base_state)
    jax.tree.map(np.testing.assert_array_equal, observed.base, expected)
    schedule = ple_schedule(decay=0.5)
    balancer = cr_mogm(schedule, alpha=0.0)
    weights, _ = balancer.weigh(None, losses, balancer.end_epoch(balancer.init(2)), None)
    np.testing.assert_allclose(weights, [0.5, 0.5])


def test_diagnostics_are_those_of_the_base(gramians):
    _, base_state = run(mgda(), gramians)
    _, state = run(cr_mogm(mgda()), gramians)
    assert cr_mogm(mgda()).diagnostics(state) == mgda().diagnostics(base_state)


def test_names_of_tasks_reach_the_base():
    tasks = [Task("click", "binary"), Task("buy", "binary")]
    bound = cr_mogm(fixed(weights={"buy": 3.0, "click": 1.0})).for_tasks(tasks)
    np.testing.assert_array_equal(bound.weigh(None, jnp.ones(2), bound.init(2), None)[0], [1, 3])
    with pytest.raises(ConfigError, match="expected at least 5"):
        cr_mogm(krum(num_byzantine=2)).for_tasks(tasks)


def test_a_step_that_the_base_cannot_take_leaves_no_trace():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Undefined(Balancer):
        needs: ClassVar = "losses"

        def weigh(self, gramian, losses, state, key, *, active=None):
            return jnp.full_like(losses, jnp.nan), state

    balancer = cr_mogm(Undefined())
    state = balancer.init(2)._replace(average=jnp.array([1.0, 2.0]))
    weights, after, info = weigh(balancer, None, jnp.ones(2), state, None)
    assert info["nonfinite"] and not np.any(weights)
    np.testing.assert_array_equal(after.average, state.average)
    assert isinstance(after.base, NoState)


@pytest.mark.parametrize(
    ("base", "alpha", "option"), [(graddrop(), 0.9, "base"), ("mgda", 0.9, "base"), (ntkmtl(), 1.1, "alpha")]
)
def test_options_out_of_range_are_refused(base, alpha, option):
    with pytest.raises(ConfigError, match=f"cr_mogm\\({option}\\)"):
        cr_mogm(base, alpha=alpha)
