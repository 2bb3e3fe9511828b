"""SAMO against closed forms on quadratic losses, where a gradient tells at which point it was taken."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import aggregate, as_optax, equal, famo, fixed, mgda, modo, trimmed_mean
from mtl_jax.errors import ConfigError
from mtl_jax.train import BalancingOptions, samo
from mtl_jax.train.gradients import check_scope


def slopes(plane):
    """Gradients of all tasks in x and in their own vectors, at the start."""
    x = np.asarray(plane.params["shared/x"])
    own = [np.asarray(plane.params[f"task/{name}/h"]) for name in plane.tasks]
    rests = [h - mixer @ x for h, mixer in zip(own, plane.mixers, strict=True)]
    of_x = [x - c - mixer.T @ r for c, mixer, r in zip(plane.centres, plane.mixers, rests, strict=True)]
    return np.array(of_x), np.array(rests)


def unit(vector):
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    "base", [equal(), mgda(), trimmed_mean(), famo()], ids=["equal", "mgda", "trimmed_mean", "famo"]
)
def test_at_distance_0_it_is_the_other_method(plane, base):
    problem, options = plane(), BalancingOptions(head_gradient="plain")
    found = problem.balanced(samo(base, rho=0.0), problem.part(), options=options)
    other = problem.balanced(base, problem.part(), options=options)
    np.testing.assert_allclose(found.weights, other.weights, rtol=1e-9)
    for path, gradient in other.gradients.items():
        np.testing.assert_allclose(found.gradients[path], gradient, rtol=1e-9, atol=1e-12)


def test_of_one_task_without_its_own_direction_it_is_sam(plane):
    problem, rho = plane(1), 0.05
    found = problem.balanced(samo(equal(), rho=rho, beta=0.0), problem.part())
    (of_x,), (of_own,) = slopes(problem)
    x, own, mixer = problem.params["shared/x"] + rho * unit(of_x), problem.params["task/t0/h"], problem.mixers[0]
    own = own + rho * unit(of_own)
    np.testing.assert_allclose(found.gradients["task/t0/h"], own - mixer @ x, rtol=1e-9)
    np.testing.assert_allclose(
        found.gradients["shared/x"], x - problem.centres[0] - mixer.T @ (own - mixer @ x), rtol=1e-9
    )


def directions(problem, *, beta, rho=0.1):
    """Where each task's gradient was taken, read off from its gradient: with its own vector fixed it is linear in x."""
    of_x, of_own = slopes(problem)
    for number in range(len(problem.tasks)):
        weights = np.eye(len(problem.tasks))[number]
        found = problem.balanced(samo(fixed(weights=weights), rho=rho, beta=beta), problem.part())
        mixer = problem.mixers[number]
        moved_own = mixer.T @ (rho * unit(of_own[number]))
        change = np.asarray(found.gradients["shared/x"]) - of_x[number] + moved_own
        yield np.linalg.solve(np.eye(3) + mixer.T @ mixer, change) / rho


def test_every_task_goes_its_own_way_up(plane):
    """With its own direction alone a point lies at the given distance, where this task's loss is higher."""
    problem = plane()
    (of_x, _), found = slopes(problem), list(directions(problem, beta=1.0))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-8)
    assert all(direction @ slope > 0 for direction, slope in zip(found, of_x, strict=True))
    assert np.abs(np.array(found) @ np.array(found).T)[np.triu_indices(3, 1)].max() < 0.99


def test_the_mixture_of_the_two_directions(plane):
    problem = plane()
    mean = slopes(problem)[0].mean(axis=0)
    for own, found in zip(directions(problem, beta=1.0), directions(problem, beta=0.3), strict=True):
        np.testing.assert_allclose(found, unit(0.7 * mean + 0.3 * np.linalg.norm(mean) * own), rtol=1e-7)


def test_parts_of_a_step_add_up(plane):
    problem = plane(absent=(1,))
    parts = {name: jnp.stack([leaf, leaf]) for name, leaf in problem.part().items()}
    parts["share"] = jnp.array([0.25, 0.75])
    whole = problem.balanced(samo(mgda(), rho=0.1), problem.part())
    cut = problem.balanced(samo(mgda(), rho=0.1), parts=parts)
    assert whole.weights[1] == 0 and np.all(np.asarray(whole.gradients["task/t1/h"]) == 0)
    for path, gradient in whole.gradients.items():
        np.testing.assert_allclose(cut.gradients[path], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", [modo(), samo(mgda()), "mgda", None])
def test_a_base_that_cannot_be_is_refused(base):
    with pytest.raises(ConfigError, match="expected a balancer of one batch a step"):
        samo(base)


def test_it_works_in_the_train_step_only(plane):
    with pytest.raises(ConfigError, match="'Samo' takes gradients at points of its own"):
        aggregate(samo(mgda()), jnp.ones((2, 3)), samo(mgda()).init(2))
    with pytest.raises(ConfigError, match="'Samo' takes gradients at points of its own"):
        as_optax(samo(mgda()), 2)
    for scope in ("representation", "all"):
        with pytest.raises(ConfigError, match="expected balancing.scope one of \\['encoder', 'shared'\\]"):
            check_scope(plane().params, samo(equal()), BalancingOptions(scope=scope))
