"""Towers of domains in a model: in a step they are heads like others, and rows train those of their domain."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from mtl_jax.balancing import equal, pcgrad
from mtl_jax.data.batching import as_batch
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import DomainTower, Encoder
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import BalancingOptions, Optimizer, Step

SHOPS, ROWS = ("north", "south", "west"), 30


def model_of(schema, **parts):
    return MultiTaskModel(
        schema,
        encoder=functools.partial(Encoder, embedding_dim=3),
        sharing=functools.partial(SharedBottom, units=(4,), dropout=0.0),
        towers=functools.partial(DomainTower, units=(4,), dropout=0.0),
        rngs=nnx.Rngs(0),
        **parts,
    )


@pytest.fixture
def schema(small_schema):
    return dataclasses.replace(small_schema, domain="shop", domains=SHOPS)


@pytest.fixture
def batch(schema, make_rows):
    domain = np.arange(ROWS, dtype=np.int32) % 2  # none of the third
    return as_batch(dataclasses.replace(make_rows(schema, ROWS), domain=domain))


@pytest.mark.parametrize(
    "options",
    [
        {"balancer": equal()},
        {"balancer": equal(), "micro_batches": 3},
        {"balancer": pcgrad(), "options": BalancingOptions(scope="representation")},
        {"balancer": pcgrad()},
    ],
    ids=["equal", "micro-batches", "representation", "encoder"],
)
def test_rows_train_the_towers_of_their_domain(schema, batch, options):
    step, state = Step.of(
        model_of(schema), schema.tasks, key=jax.random.key(0), optimizer=Optimizer(learning_rate=1e-2), **options
    )
    after, _ = jax.jit(step)(state, batch)
    for path, before in state.params.items():
        if "tower" in path:
            moved = np.any(np.asarray(after.params[path] != before), axis=tuple(range(1, before.ndim)))
            np.testing.assert_array_equal(moved, [True, True, False], err_msg=path)


def test_outputs_do_not_depend_on_the_towers_of_others(schema, batch):
    model = model_of(schema)
    before = model(batch)
    kernel = model.task["click"]["tower"].head.kernel
    kernel[...] = kernel[...].at[1].add(1.0)
    after = model(batch)
    np.testing.assert_array_equal(after["click"][::2], before["click"][::2])
    assert np.all(np.asarray(after["click"][1::2] != before["click"][1::2]))
    np.testing.assert_array_equal(after["spend"], before["spend"])


def test_without_domains_they_are_refused(small_schema):
    with pytest.raises(ConfigError, match=r"towers needs domains and the data have none"):
        model_of(small_schema)
