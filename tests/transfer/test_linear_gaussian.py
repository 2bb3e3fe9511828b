"""Transfer by the train step on a linear-Gaussian pair lands where algebra says, for which tests/data has the risks."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mtl_jax.balancing import equal
from mtl_jax.data import load
from mtl_jax.data.batching import as_batch
from mtl_jax.data.domains import of_domains
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import Optimizer, Step
from mtl_jax.transfer import L2SP, Artefact, FineTune, Pooled
from mtl_jax.transfer import load as load_artefact

KERNEL, BIAS = "task/y/tower/head/kernel", "task/y/tower/head/bias"
DELTA, DIM, SOURCE_ROWS, TARGET_ROWS = 0.3**0.5, 6, 60, 24


def domain(name, seed=0):
    sizes = {"source_rows": SOURCE_ROWS, "target_rows": TARGET_ROWS, "valid_rows": 20, "test_rows": 20}
    return of_domains(load("linear_gaussian", delta=DELTA, dim=DIM, seed=seed, **sizes), [name])


def least_squares(dataset):
    """X'X = n I and columns sum to 0: the coefficients are the mean of x y."""
    rows = dataset.for_training().train
    return rows.dense.T @ rows.labels["y"] / rows.num_rows, rows.labels["y"].mean()


def regression(schema, coefficients, intercept):
    """A linear model with these values."""
    model = MultiTaskModel(
        schema,
        sharing=functools.partial(SharedBottom, units=()),
        towers=functools.partial(Tower, units=()),
        rngs=nnx.Rngs(0),
    )
    head = model.task["y"]["tower"].head
    head.kernel[...], head.bias[...] = coefficients[:, None], np.array([intercept])
    return model


def trained(adaptation, *, steps, rate, seed=0, batch=None):
    """The coefficients after full-batch steps on the target, from those that least squares finds on the source."""
    source, target = domain("source", seed), domain("target", seed)
    artefact = Artefact.of(regression(source.schema, *least_squares(source)), source.schema)
    loading = load_artefact(regression(target.schema, np.zeros(DIM), 0.0), target.schema, artefact)
    step, state = Step.of(
        loading.model,
        target.schema.tasks,
        key=jax.random.key(0),
        balancer=equal(),
        optimizer=Optimizer(optax.identity(), rate),
        adaptation=adaptation,
        origin=loading.origin,
    )
    run = jax.jit(step)
    for _ in range(steps):
        state, _ = run(state, as_batch(target.for_training().train) if batch is None else batch)
    return step.evaluated(state)[KERNEL][:, 0], least_squares(source)[0], least_squares(target)[0]


@pytest.mark.parametrize("steps", [1, 5])
def test_each_step_on_the_target_takes_the_same_share_of_the_way(steps):
    """The gradient of the mean squared error is twice the distance to the least squares of the target."""
    found, source, target = trained(FineTune(), steps=steps, rate=0.1)
    np.testing.assert_allclose(found, target + 0.8**steps * (source - target), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_a_spring_ends_between_source_and_target(alpha):
    """2 (b - b_t) + alpha (b - b_s) = 0."""
    found, source, target = trained(L2SP(alpha=alpha), steps=150, rate=0.1)
    np.testing.assert_allclose(found, (2 * target + alpha * source) / (2 + alpha), rtol=1e-3, atol=1e-4)


def test_pooling_weighs_both_by_their_rows():
    source, target = domain("source"), domain("target")
    both = [as_batch(one.for_training().train) for one in (target, source)]
    batch = jax.tree.map(lambda *columns: np.concatenate(columns), *both)
    found, of_source, of_target = trained(Pooled(), steps=150, rate=0.1, batch=batch)
    share = SOURCE_ROWS / (SOURCE_ROWS + TARGET_ROWS)
    np.testing.assert_allclose(found, share * of_source + (1 - share) * of_target, rtol=1e-3, atol=1e-4)
