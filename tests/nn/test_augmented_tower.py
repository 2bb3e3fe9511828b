"""An augmented tower is a linear head on features that are repeated by domain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.nn import AugmentedTower, Context, Tower

RNG = np.random.default_rng(0)
Z = RNG.standard_normal((9, 4)).astype(np.float32)
DOMAINS = np.array([2, 0, 0, 1, 2, 2, 1, 0, 2])


def tower_of(out_features=3, **options):
    """With values that are drawn, those of the domains too."""
    tower = AugmentedTower(4, out_features, rngs=nnx.Rngs(0), **{"num_domains": 3} | options)
    for part in (tower.common, tower.own):
        part.kernel[...] = jnp.asarray(RNG.standard_normal(part.kernel.shape), jnp.float32)
    return tower


def outputs_of(tower, domains=DOMAINS):
    return np.asarray(tower(jnp.asarray(Z), Context(domain=jnp.asarray(domains))))


def test_it_is_a_linear_head_on_the_augmented_features():
    """(h, 0, .., h, .., 0), with a block for all domains and one for each."""
    tower = tower_of()
    tower.common.bias[...] = jnp.array([1.0, -2.0, 0.5])
    augmented = np.zeros((9, 4, 4))
    augmented[:, 0] = augmented[np.arange(9), 1 + DOMAINS] = Z
    weights = np.concatenate([tower.common.kernel[...], *tower.own.kernel[...]])
    expected = augmented.reshape(9, 16) @ weights + [1.0, -2.0, 0.5]
    np.testing.assert_allclose(outputs_of(tower), expected, rtol=1e-6, atol=2e-6)


def test_with_one_domain_it_is_a_plain_tower_on_features_given_twice():
    tower, plain = tower_of(num_domains=1), Tower(8, 3, units=(), rngs=nnx.Rngs(1))
    plain.head.kernel[...] = jnp.concatenate([tower.common.kernel[...], tower.own.kernel[...][0]])
    expected = plain(jnp.concatenate([Z, Z], axis=1))
    np.testing.assert_allclose(outputs_of(tower, np.zeros(9, int)), expected, rtol=1e-6, atol=2e-6)


def test_unknown_domains_have_the_common_part_alone():
    tower = tower_of()
    expected = Z @ np.asarray(tower.common.kernel[...])
    for unknown in (-1, 3, 1000):
        np.testing.assert_allclose(outputs_of(tower, np.full(9, unknown)), expected, rtol=1e-5, atol=1e-6)


def test_domains_begin_alike_on_hidden_layers_that_they_share():
    tower = AugmentedTower(4, num_domains=3, units=(6, 5), rngs=nnx.Rngs(0))
    h = Z
    for layer in tower.hidden.layers:
        h = np.maximum(h @ np.asarray(layer.kernel[...]), 0)
    assert not np.any(tower.own.kernel[...]) and tower.own.kernel.shape == (3, 5, 1)
    np.testing.assert_allclose(
        outputs_of(tower), (h @ np.asarray(tower.common.kernel[...]))[:, 0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("decay", "alike"), [(1e9, True), (1e-9, False)])
def test_a_penalty_on_the_domains_parts_decides_between_pooling_and_a_model_each(decay, alike):
    """Ridge regression whose design is the derivative of the outputs by the weights."""
    rng = np.random.default_rng(1)
    z, domains, y = rng.standard_normal((40, 4)), np.arange(40) % 2, rng.standard_normal(40)

    def outputs(kernels):
        tower = AugmentedTower(4, num_domains=2, use_bias=False, rngs=nnx.Rngs(0))
        tower.common.kernel[...], tower.own.kernel[...] = kernels
        return tower(jnp.asarray(z), Context(domain=jnp.asarray(domains)))

    with jax.enable_x64(True):
        blocks = jax.jit(jax.jacobian(outputs))((np.zeros((4, 1)), np.zeros((2, 4, 1))))
        design = np.concatenate([np.asarray(block).reshape(40, -1) for block in blocks], axis=1)
    penalty = np.diag([0.0] * 4 + [decay] * 8)
    predicted = design @ np.linalg.solve(design.T @ design + penalty, design.T @ y)
    groups = [np.arange(40)] if alike else [np.flatnonzero(domains == domain) for domain in (0, 1)]
    for rows in groups:
        expected = z[rows] @ np.linalg.lstsq(z[rows], y[rows], rcond=None)[0]
        np.testing.assert_allclose(predicted[rows], expected, atol=1e-5)


def test_one_output_drops_its_axis_and_rows_without_a_domain_are_refused():
    tower = tower_of(1, use_bias=False)
    assert tower.common.bias is None and outputs_of(tower).shape == (9,)
    with pytest.raises(ConfigError, match=r"context\.domain is None"):
        tower(jnp.asarray(Z))
