"""Penalty-based boundary intersection: goldens, its derivative, its limits, the ray itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.pbi import pbi
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

# Compiled whole, because each operation alone costs a compilation of its own.
call = jax.jit(lambda balancer, losses, state, active=None: balancer.weigh(None, losses, state, None, active=active))


def objective(losses, preference, reference, theta):
    ray = preference / np.linalg.norm(preference)
    along = (losses - reference) @ ray
    return along + theta * np.linalg.norm(losses - reference - along * ray)


def weights_of(balancer, losses, active=None):
    losses = jnp.asarray(losses, float)
    return np.asarray(call(balancer, losses, balancer.init(len(losses)), active)[0])


def test_goldens(pbi_case, dtype, assert_golden):
    case = pbi_case
    balancer, num_tasks = pbi(**case["params"]), len(case["losses"])
    losses = jnp.asarray(case["losses"], dtype)
    weights = call(balancer, losses, balancer.init(num_tasks))[0]
    jacobian = jnp.asarray(case["jacobian"], dtype)
    direction, _ = jax.jit(aggregate)(balancer, jacobian, balancer.init(num_tasks), losses=losses)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(direction, case["direction"], case, dtype)
    options = {"reference": 0.0, **{name: np.array(value) for name, value in case["params"].items()}}
    np.testing.assert_allclose(objective(np.array(case["losses"]), **options), case["objective"], rtol=1e-10)


@pytest.mark.parametrize("theta", [0.0, 1.0, 30.0])
def test_weights_are_the_derivative_of_the_objective(theta):
    losses, preference = np.array([0.7, 0.2, 1.5, -0.4]), np.array([0.1, 0.0, 2.0, 0.5])
    reference = np.array([0.5, 0.0, -1.0, 0.3])
    with jax.enable_x64(True):
        weights = weights_of(pbi(theta=theta, preference=preference, reference=reference), losses)
    for weight, shift in zip(weights, 1e-6 * np.eye(4), strict=True):
        above, below = (objective(losses + sign * shift, preference, reference, theta) for sign in (1, -1))
        np.testing.assert_allclose(weight, (above - below) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("theta", "losses"),
    [
        pytest.param(0.0, [3.0, 0.1], id="no penalty"),
        pytest.param(5.0, [6.0, 8.0], id="on the ray"),
        pytest.param(5.0, [0.0, 0.0], id="all losses zero"),
    ],
)
def test_limits_in_which_the_weights_are_the_ray(theta, losses):
    balancer = pbi(theta=theta, preference=[3.0, 4.0])
    with jax.enable_x64(True):
        np.testing.assert_allclose(weights_of(balancer, losses), [0.6, 0.8], atol=1e-5)
    # The rounding of float32 moves losses off the ray by some hundredths of the smoothing.
    np.testing.assert_allclose(weights_of(balancer, losses), [0.6, 0.8], atol=0.1 * theta + 1e-5)


def test_the_length_of_the_preference_does_not_matter():
    losses = [0.7, 0.2, 1.5]
    weights = weights_of(pbi(preference=[0.5, 0.3, 0.2]), losses)
    np.testing.assert_allclose(weights_of(pbi(preference=[5.0, 3.0, 2.0]), losses), weights, rtol=1e-5)


def test_weights_have_the_length_of_their_two_perpendicular_parts():
    """Off the ray: one along it, theta across it."""
    weights = weights_of(pbi(theta=5.0), [0.7, 0.2, 1.5])
    np.testing.assert_allclose(np.sum(weights**2), 1 + 25, rtol=1e-5)
    np.testing.assert_allclose(weights.sum() / np.sqrt(3), 1, rtol=1e-5)


def test_losses_of_any_size_are_finite_and_give_the_same_weights():
    expected = weights_of(pbi(), [1.0, 2.0])
    for size in (1e-30, 1e30):
        np.testing.assert_allclose(weights_of(pbi(), size * np.array([1.0, 2.0])), expected, rtol=1e-4)


def test_an_absent_task_is_no_part_of_the_ray():
    weights = weights_of(pbi(), [0.7, np.nan, 1.5], jnp.array([True, False, True]))
    np.testing.assert_allclose(weights[::2], weights_of(pbi(), [0.7, 1.5]), rtol=1e-5)
    assert weights[1] == 0
    np.testing.assert_array_equal(weights_of(pbi(), [0.7, 2.0], jnp.array([True, False])), [1, 0])


def test_negative_weights_are_counted_not_clipped():
    balancer = pbi()
    weights, state = call(balancer, jnp.array([0.1, 1.0, 2.0]), balancer.init(3))
    assert np.any(weights < 0)
    assert balancer.diagnostics(state)["negative_weights"] == np.sum(np.asarray(weights) < 0)


def test_options_go_by_task_name():
    tasks = [Task("click", "binary"), Task("spend", "regression")]
    bound = pbi(preference={"spend": 4.0, "click": 3.0}, reference={"spend": 1.0, "click": 0.0}).for_tasks(tasks)
    by_position = pbi(preference=[3.0, 4.0], reference=[0.0, 1.0])
    np.testing.assert_array_equal(weights_of(bound, [0.3, 2.0]), weights_of(by_position, [0.3, 2.0]))
    with pytest.raises(ConfigError, match=r"pbi\(reference\)"):
        pbi(reference=[0.0, 0.0, 0.0]).for_tasks(tasks)


@pytest.mark.parametrize("options", [{"theta": -1.0}, {"preference": [1.0, -1.0]}, {"reference": np.inf}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"pbi\\({next(iter(options))}\\)"):
        pbi(**options)
