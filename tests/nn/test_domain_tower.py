"""A tower for each domain is that many towers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.nn import Context, DomainTower, Tower

Z = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)


def tower_of(domain_tower, domain):
    """The tower of one domain."""
    own = Tower(4, 3, units=(6, 5), dropout=0.0, rngs=nnx.Rngs(1))
    for layer, stacked in zip((*own.hidden.layers, own.head), (*domain_tower.layers, domain_tower.head), strict=True):
        layer.kernel[...], layer.bias[...] = stacked.kernel[...][domain], stacked.bias[...][domain]
    return own


def test_every_row_passes_through_the_tower_of_its_domain():
    domains = np.array([2, 0, 0, 1, 2, 2, 1, 0, 2])
    tower = DomainTower(4, 3, num_domains=3, units=(6, 5), dropout=0.0, rngs=nnx.Rngs(0))
    outputs = tower(jnp.asarray(Z), Context(domain=jnp.asarray(domains)))
    for row, domain in enumerate(domains):
        np.testing.assert_allclose(outputs[row], tower_of(tower, domain)(Z[row : row + 1])[0], rtol=1e-5, atol=1e-6)


def test_one_output_drops_its_axis_and_rows_without_a_domain_are_refused():
    tower = DomainTower(4, num_domains=2, units=(), rngs=nnx.Rngs(0))
    assert tower(jnp.asarray(Z), Context(domain=jnp.zeros(9, int))).shape == (9,)
    with pytest.raises(ConfigError, match=r"context\.domain is None"):
        tower(jnp.asarray(Z))
