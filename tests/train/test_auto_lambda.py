"""Auto-Lambda against finite differences of what it looks ahead to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import aggregate
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task
from mtl_jax.train import BalancingOptions, auto_lambda
from mtl_jax.train.gradients import check_scope

FIRST_MOMENT = 0.1  # what Adam takes of the first gradient


@pytest.mark.parametrize(("primary", "positions"), [(None, [0, 1, 2]), (["t1"], [1])])
@pytest.mark.parametrize("inner_lr", [None, 0.3])
def test_the_slope_of_every_weight_is_a_finite_difference(plane, halves, primary, positions, inner_lr):
    problem = plane()
    parts, weights = halves(problem), np.full(3, 0.1)
    found = problem.balanced(
        auto_lambda(primary=primary, inner_lr=inner_lr), parts=parts, learning_rate=0.05 if inner_lr is None else 9.0
    )
    rate = inner_lr or 0.05
    for number, slope in enumerate(found.state.weights.adam.mu / FIRST_MOMENT):
        step = 1e-6 * np.eye(3)[number]
        ahead, behind = (problem.looked_ahead(parts, weights + s * step, rate, positions) for s in (1, -1))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6)


def test_the_step_is_that_of_the_new_weights_on_the_first_half(plane, halves):
    problem = plane()
    parts = halves(problem)
    found = problem.balanced(auto_lambda(meta_lr=0.01), parts=parts)
    assert np.all(np.abs(np.asarray(found.weights) - 0.1) > 0.009)
    np.testing.assert_allclose(found.weights, found.state.weights.value)
    train = jax.tree.map(lambda leaf: leaf[0], parts)
    expected = jax.grad(lambda params: found.weights @ problem.losses(params, train))(problem.params)
    for path, gradient in expected.items():
        np.testing.assert_allclose(found.gradients[path], gradient, rtol=1e-9)


def test_plain_heads(plane, halves):
    problem = plane()
    parts = halves(problem)
    found = problem.balanced(auto_lambda(), parts=parts, options=BalancingOptions(head_gradient="plain"))
    train = jax.tree.map(lambda leaf: leaf[0], parts)
    plain = jax.grad(lambda params: problem.losses(params, train).sum())(problem.params)
    np.testing.assert_allclose(found.gradients["task/t1/h"], plain["task/t1/h"], rtol=1e-9)


def test_a_task_without_labels_keeps_its_weight(plane, halves):
    problem = plane(absent=(1,))
    found = problem.balanced(auto_lambda(initial=0.5, meta_lr=0.1), parts=halves(problem))
    assert found.weights[1] == 0 and found.state.weights.value[1] == 0.5
    assert np.all(np.asarray(found.weights)[[0, 2]] != 0.5)


def test_a_loss_that_is_not_finite_moves_nothing(plane, halves):
    problem = plane()
    parts = halves(problem)
    parts["centres"] = parts["centres"].at[0, 1].set(jnp.inf)
    found = problem.balanced(auto_lambda(), parts=parts)
    assert bool(found.info["nonfinite"]) and np.all(np.asarray(found.state.weights.value) == 0.1)


def test_refusals(plane):
    with pytest.raises(ConfigError, match="names the task 'view'; expected some of"):
        auto_lambda(primary=["view"]).for_tasks([Task("click", "binary")])
    for wrong in ("click", []):
        with pytest.raises(ConfigError, match="expected a list of task names"):
            auto_lambda(primary=wrong)
    with pytest.raises(ConfigError, match="takes gradients at points of its own"):
        aggregate(auto_lambda(), jnp.ones((2, 3)), auto_lambda().init(2))
    with pytest.raises(ConfigError, match="expected trainer.micro_batches=1"):
        check_scope(plane().params, auto_lambda(), BalancingOptions(), micro_batches=2)
