"""Parameters of losses: where they start, what they give, and that cutpoints stay in order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtl_jax import losses
from mtl_jax.nn import Cutpoints, Dispersion


def test_cutpoints_start_from_the_class_rates():
    """Counts (1, 2, 5), smoothed by one each; a score of 0 then predicts these rates, whatever they are."""
    cutpoints = Cutpoints((2 / 11, 3 / 11, 6 / 11)).cutpoints
    np.testing.assert_allclose(cutpoints, [-1.50407740, -0.18232156], rtol=1e-6)
    for rates in ((0.5, 0.5), (0.6, 0.01, 0.09, 0.3)):
        cumulative = jax.nn.sigmoid(Cutpoints(rates)(jnp.zeros(1))[0])
        np.testing.assert_allclose(-np.diff([1, *cumulative, 0]), rates, rtol=1e-4)


def test_outputs_are_score_minus_cutpoints():
    module = Cutpoints((0.2, 0.3, 0.5))
    np.testing.assert_allclose(module(jnp.array([1.5]))[0], 1.5 - module.cutpoints, rtol=1e-6)
    assert module(jnp.zeros((2, 3))).shape == (2, 3, 2)


def test_a_class_that_hardly_occurs_leaves_them_in_order():
    cutpoints = Cutpoints((0.5, 1e-9, 0.5)).cutpoints
    assert 1e-4 <= cutpoints[1] - cutpoints[0] < 2e-4


@pytest.mark.parametrize("rates", [(1.0,), (0.5, 0.0, 0.5)])
def test_rates_that_have_no_cutpoints_are_refused(rates):
    with pytest.raises(ValueError, match="expected at least two numbers > 0"):
        Cutpoints(rates)


def test_cutpoints_stay_in_order_on_random_labels():
    """A thousand steps of Adam at a rate that throws them about; the class of a row follows its score."""
    graphdef, params = nnx.split(Cutpoints((0.25, 0.25, 0.25, 0.25)))
    optimizer = optax.adam(0.3)

    def step(carry, key):
        params, state = carry
        scores, labels = 5 * jax.random.normal(key, (16,)), jax.random.randint(key, (16,), 0, 4)
        gradient = jax.grad(lambda p: losses.cumulative(nnx.merge(graphdef, p)(scores), labels).mean())(params)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        return (params, state), nnx.merge(graphdef, params).cutpoints

    _, cutpoints = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(
        (params, optimizer.init(params)), jax.random.split(jax.random.key(0), 1000)
    )
    assert np.isfinite(cutpoints).all() and (np.diff(cutpoints, axis=1) > 5e-5).all()
    assert np.ptp(cutpoints, axis=0).min() > 0.1


def test_dispersion_starts_at_one_and_is_one_number():
    module = Dispersion()
    assert float(module.alpha) == pytest.approx(1, rel=1e-6)
    np.testing.assert_allclose(module(jnp.array([0.3, -2.0])), [[0.3, 0.0], [-2.0, 0.0]], atol=1e-6)
    module.kappa[...] = jnp.float32(-50)
    assert float(module.alpha) == pytest.approx(1e-3, rel=1e-6)
