"""Feature augmentation: pooled rows train the common part of a tower, and rows of a domain the part of that domain."""

import functools

import numpy as np
import optax
import pytest
from flax import nnx

from mtl_jax.data import load
from mtl_jax.data.domains import joined, of_domains
from mtl_jax.data.encode import encode
from mtl_jax.data.linear_gaussian import DOMAINS
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import AugmentedTower
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import Optimizer, fit
from mtl_jax.transfer import Pooled

RATE, TOWER = 0.1, "task/y/tower"


@pytest.fixture(scope="module")
def domains():
    """Source and target, of which the schema of the latter says how both are read."""
    whole = load("linear_gaussian", delta=0.5, dim=3, source_rows=20, target_rows=12, valid_rows=8, test_rows=8)
    return [of_domains(whole, [name]) for name in ("source", "target")]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_a_step_moves_the_parts_by_the_rows_that_they_serve(domains, arrays_of, weight):
    """Of gradient descent on 2 w (f - y) x / sum w, from a common part alone."""
    source, target = domains
    schema = joined(target.schema, source.schema)
    source, data = encode(source.part("train"), schema), target.for_training()
    model = MultiTaskModel(
        schema,
        sharing=functools.partial(SharedBottom, units=()),
        towers=functools.partial(AugmentedTower, units=()),
        rngs=nnx.Rngs(0),
    )
    before = arrays_of(model)
    sgd = Optimizer(optax.identity(), learning_rate=RATE)
    result = fit(model, data, adaptation=Pooled(weight), source=source, optimizer=sgd, epochs=1, batch_size=99)
    found = arrays_of(result.model)

    slopes = {}
    for name, rows, each in (("source", source, weight), ("target", data.train, 1.0)):
        error = rows.dense @ before[f"{TOWER}/common/kernel"][:, 0] - rows.labels["y"]
        slopes[name] = 2 * each * rows.dense.T @ error / (weight * source.num_rows + data.train.num_rows)
    moved = (before[f"{TOWER}/common/kernel"] - found[f"{TOWER}/common/kernel"])[:, 0]
    np.testing.assert_allclose(moved, RATE * (slopes["source"] + slopes["target"]), rtol=1e-4, atol=1e-6)
    for number, name in enumerate(DOMAINS):
        own = found[f"{TOWER}/own/kernel"][number, :, 0]
        np.testing.assert_allclose(own, -RATE * slopes[name], rtol=1e-4, atol=1e-6)
