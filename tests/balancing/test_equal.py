"""Equal weights against goldens and the gradient of the summed loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import aggregate, equal
from mtl_jax.errors import ConfigError


def test_goldens(equal_case, dtype, assert_golden):
    jacobian = jnp.asarray(equal_case["jacobian"], dtype)
    balancer = equal(**equal_case["params"])
    losses = jnp.ones(len(jacobian), dtype)
    active = jnp.asarray(equal_case.get("active", [True] * len(jacobian)))
    weights, _ = balancer.weigh(None, losses, balancer.init(len(jacobian)), None, active=active)
    direction, _ = aggregate(balancer, jacobian, balancer.init(len(jacobian)), active=active)
    assert weights.dtype == direction.dtype == dtype
    assert_golden(weights, equal_case["weights"], equal_case, dtype)
    assert_golden(direction, equal_case["direction"], equal_case, dtype)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_is_the_gradient_of_the_reduced_loss(reduction):
    def losses(x):
        return jnp.stack([jnp.sum(x**2), jnp.sum(jnp.sin(x)), x[0] * x[1]])

    x = jnp.array([0.3, -1.2])
    direction, _ = aggregate(equal(reduction=reduction), jax.jacobian(losses)(x), equal().init(3))
    expected = jax.grad(lambda x: getattr(jnp, reduction)(losses(x)))(x)
    np.testing.assert_allclose(direction, expected, rtol=1e-6)


def test_unknown_reduction_is_refused():
    with pytest.raises(ConfigError, match=r"'max'.*'sum', 'mean'"):
        equal(reduction="max")
