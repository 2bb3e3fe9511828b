"""A small world for strategies of transfer: one kind of schema, rows, models, and steps of an adaptation."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.balancing import equal
from mtl_jax.data.batching import as_batch
from mtl_jax.data.dataset import Encoded, TrainingData
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.tasks import Task
from mtl_jax.train import Step
from mtl_jax.train.state import Functional

IDS = 10
"""Rows of the one table, the two reserved ones included."""


@pytest.fixture(scope="session")
def schema():
    """One categorical and two numbers; a binary and a regression task."""
    return Schema(
        (Categorical("user", "user"), Numeric("price"), Numeric("age")),
        (Vocabulary("user", tuple(map(str, range(IDS - 2)))),),
        (Task("click", "binary"), Task("spend", "regression")),
    )


@pytest.fixture(scope="session")
def make_rows(schema):
    """(num_rows, seed) -> Encoded. The first rows name every id once; some labels are unobserved, and NaN. Of several
    domains the last one has twice the rows of the others."""

    def build(num_rows, seed=0, *, tasks=schema.tasks, share=0.8, domains=0):
        rng = np.random.default_rng(seed)
        ids = np.resize(np.arange(IDS), num_rows).astype(np.int32)
        dense = rng.normal(size=(num_rows, 2)).astype(np.float32)
        labels, mask = {}, {}
        for number, task in enumerate(tasks):
            value = dense @ [1.0, -0.5 * number] + np.sin(ids + number + seed) + 0.1 * rng.normal(size=num_rows)
            observed = mask[task.name] = rng.random(num_rows) < share
            if task.kind == "multiclass":
                labels[task.name] = np.digitize(value, [-0.5, 0.5]).astype(np.int32)
            else:
                value = value > 0 if task.kind == "binary" else value
                labels[task.name] = np.where(observed, value, np.nan).astype(np.float32)
        weight = rng.uniform(0.5, 1.5, num_rows).astype(np.float32)
        domain = np.minimum(np.arange(num_rows) % (domains + 1), domains - 1).astype(np.int32) if domains else None
        return Encoded(ids[:, None], dense, {}, {}, labels, mask, {}, weight, domain)

    return build


@pytest.fixture(scope="session")
def make_batch(make_rows):
    """(num_rows, seed) -> batch on the device."""
    return lambda *args, **options: as_batch(make_rows(*args, **options))


@pytest.fixture(scope="session")
def make_data(schema, make_rows):
    """(num_train, seed, domains=...) -> TrainingData."""
    return lambda num_train=22, seed=0, **options: TrainingData(
        "world", schema, make_rows(num_train, seed, **options), make_rows(20, seed + 50, **options), "0" * 64
    )


@pytest.fixture(scope="session")
def make_model(schema):
    """(seed, sharing=..., towers=...) -> a model of a few dozen parameters."""

    def build(seed=0, *, sharing=SharedBottom, towers=(), dropout=0.0, of=schema, **options):
        if sharing is SharedBottom:
            options = {"units": (5, 4), "dropout": dropout} | options
        return MultiTaskModel(
            of,
            encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5),
            sharing=functools.partial(sharing, **options),
            towers=functools.partial(Tower, units=towers, dropout=dropout),
            rngs=nnx.Rngs(seed),
        )

    return build


@pytest.fixture(scope="session")
def arrays_of():
    """Model -> path -> NumPy array, of what is trained."""
    return lambda model: {path: np.asarray(array) for path, array in Functional.of(model)[1].items()}


@pytest.fixture(scope="session")
def make_step(schema, arrays_of):
    """(model, adaptation, ...) -> (step, state) in a phase of the adaptation; all of the model is a source's."""

    def build(model, adaptation, *, phase=0, origin=None, tasks=schema.tasks, balancer=None, key=0, **options):
        origin = dict.fromkeys(arrays_of(model), True) if origin is None else origin
        if adaptation is not None:
            model = adaptation.prepared(model, jax.random.key(key))
            options["trainable"] = adaptation.phases()[phase]
            adaptation = adaptation.in_phase(phase)
        return Step.of(
            model,
            tasks,
            key=jax.random.key(key),
            balancer=equal() if balancer is None else balancer,
            adaptation=adaptation,
            origin=origin,
            **options,
        )

    return build


@pytest.fixture(scope="session")
def studied():
    """(step, state, batch) -> the state, once the rows of a batch have been looked at, a few at a time."""

    def look(step, state, batch, size=8):
        if not step.adaptation.studies:
            return state
        rows = len(batch["weight"])
        order = np.pad(np.arange(rows), (0, -rows % size), constant_values=-1).reshape(-1, size)
        found = jax.jit(step.study)(state, batch, order)
        return state._replace(kept=state.kept._replace(arrays=state.kept.arrays | found))

    return look


@pytest.fixture(scope="session")
def in_turn():
    """Batches of equal size -> one, in which their rows take turns."""

    def mix(*batches):
        return jax.tree.map(lambda *columns: jnp.stack(columns, axis=1).reshape(-1, *columns[0].shape[1:]), *batches)

    return mix


@pytest.fixture(scope="session")
def perturbed():
    """State -> the same with noise on every trained number: a point where no factor is zero."""

    def move(state, scale=0.01):
        def noisy(arrays):
            return {path: array + scale * noise(path, array.shape) for path, array in arrays.items()}

        def noise(path, shape):
            rng = np.random.default_rng(zlib.crc32(path.encode()))
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        return state._replace(params=noisy(state.params), tables=noisy(state.tables))

    return move


@pytest.fixture(scope="session")
def assert_same():
    """Two dicts path -> array are equal to the last bit."""

    def compare(found, expected):
        assert found.keys() == expected.keys()
        for path in expected:
            np.testing.assert_array_equal(found[path], expected[path], err_msg=path)

    return compare
