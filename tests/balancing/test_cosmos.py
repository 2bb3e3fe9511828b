"""COSMOS: its golden, its derivative, its limits, negative weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.cosmos import cosmos
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def objective(losses, preference, lambda_):
    dot = preference @ losses
    return dot - lambda_ * dot / (np.linalg.norm(preference) * np.linalg.norm(losses))


def weights_of(balancer, losses, active=None):
    losses = jnp.asarray(losses, float)
    return np.asarray(call(balancer, losses, balancer.init(len(losses)), active)[0])


def test_goldens(cosmos_case, dtype, assert_golden):
    case = cosmos_case
    balancer = cosmos(**case["params"])
    losses = jnp.asarray(case["losses"], dtype)
    weights = call(balancer, losses, balancer.init(2))[0]
    direction, _ = jax.jit(aggregate)(balancer, jnp.asarray(case["jacobian"], dtype), balancer.init(2), losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)
    found = objective(np.array(case["losses"]), np.array(case["params"]["preference"]), case["params"]["lambda_"])
    np.testing.assert_allclose(found, case["objective"], rtol=1e-10)


@pytest.mark.parametrize("lambda_", [0.0, 1.0, 30.0])
def test_weights_are_the_derivative_of_the_objective(lambda_):
    losses, preference = np.array([0.7, 0.2, 1.5, -0.4]), np.array([0.1, 0.0, 2.0, 0.5])
    with jax.enable_x64(True):
        weights = weights_of(cosmos(lambda_=lambda_, preference=preference), losses)
    for weight, shift in zip(weights, 1e-6 * np.eye(4), strict=True):
        rise = objective(losses + shift, preference, lambda_) - objective(losses - shift, preference, lambda_)
        np.testing.assert_allclose(weight, rise / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        pytest.param({"lambda_": 0.0}, [3.0, 0.1, 0.2], id="no penalty"),
        pytest.param({"lambda_": 5.0}, [0.6, 0.4, 1.0], id="losses along the preference"),
        pytest.param({"lambda_": 5.0}, [0.0, 0.0, 0.0], id="all losses zero"),
    ],
)
def test_limits_in_which_the_weights_are_the_preference(options, losses):
    weights = weights_of(cosmos(preference=[0.3, 0.2, 0.5], **options), losses)
    np.testing.assert_allclose(weights, [0.3, 0.2, 0.5], rtol=1e-5)


def test_the_penalty_turns_towards_the_preference():
    """A step against w ends at a larger cosine with r than a step against r."""
    losses = np.array([2.0, 0.5])

    def cosine(lambda_):
        moved = losses - 0.01 * weights_of(cosmos(lambda_=lambda_), losses)
        return moved.sum() / (np.sqrt(2) * np.linalg.norm(moved))

    assert cosine(0.0) + 1e-4 < cosine(1.0) < cosine(10.0) - 1e-4


def test_losses_of_any_size_are_finite():
    for size in (1e-30, 1e30):
        assert np.all(np.isfinite(weights_of(cosmos(), size * np.array([1.0, 2.0]))))


def test_without_a_preference_it_is_the_mean_over_the_present_tasks():
    weights = weights_of(cosmos(), [0.5, np.nan, 2.0], jnp.array([True, False, True]))
    np.testing.assert_allclose(weights, [0.257884350387, 0, 0.560528912403], rtol=1e-5)


def test_negative_weights_are_counted_not_clipped():
    balancer = cosmos(lambda_=20.0)
    weights, state = call(balancer, jnp.array([0.1, 1.0, 2.0]), balancer.init(3))
    assert np.any(weights < 0)
    assert balancer.diagnostics(state)["negative_weights"] == np.sum(np.asarray(weights) < 0)


def test_preferences_go_by_task_name():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    bound = cosmos(lambda_=0.0, preference={"spend": 0.7, "click": 0.3}).for_tasks(tasks)
    np.testing.assert_allclose(weights_of(bound, [1.0, 1.0]), [0.3, 0.7], rtol=1e-6)
    assert cosmos().for_tasks(tasks) == cosmos()
    with pytest.raises(ConfigError, match=r"cosmos\(preference\) has 3 values"):
        cosmos(preference=[1.0, 1.0, 1.0]).init(2)


@pytest.mark.parametrize("options", [{"lambda_": -1.0}, {"preference": [1.0, -1.0]}, {"preference": np.nan}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"cosmos\\({next(iter(options))}\\)"):
        cosmos(**options)
