"""Encoders against loops over rows, layers and pairs of features."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import mtl_jax
from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.nn import CrossEncoder, FMEncoder
from mtl_jax.sharing import MMoE, SingleTask


def inputs(number=4):
    generator = np.random.default_rng(0)
    values = [generator.standard_normal((5, 3)).astype(np.float32) for _ in range(number)]
    return values, generator.standard_normal((5, 2)).astype(np.float32)


@pytest.mark.parametrize("rank", [None, 2])
def test_cross_layers_multiply_with_the_input(rank):
    values, dense = inputs()
    encoder = CrossEncoder(4, 2, num_layers=3, rank=rank, embedding_dim=3, rngs=nnx.Rngs(0))
    assert encoder.out_features == 14
    expected = []
    for row in np.concatenate([*values, dense], axis=1).astype(np.float64):
        x = row
        for layer in encoder.layers:
            crossed = x
            for part in layer:
                crossed = crossed @ np.asarray(part.kernel[...], np.float64)
                crossed = crossed if part.bias is None else crossed + np.asarray(part.bias[...])
            x = row * crossed + x
        expected.append(x)
    np.testing.assert_allclose(encoder(values, dense), expected, rtol=1e-5, atol=1e-5)


def test_fm_adds_the_products_of_all_pairs():
    values, dense = inputs()
    encoder = FMEncoder(4, 2, embedding_dim=3, rngs=nnx.Rngs(0))
    pairs = sum(values[i].astype(np.float64) * values[j] for i in range(4) for j in range(i))
    expected = np.concatenate([*values, dense, pairs], axis=1)
    np.testing.assert_allclose(encoder(values, dense), expected, rtol=1e-5, atol=1e-5)
    assert encoder.out_features == expected.shape[1]


def test_without_tables_there_are_no_pairs():
    encoder = FMEncoder(0, 2, embedding_dim=3, rngs=nnx.Rngs(0))
    assert encoder.out_features == 2 and encoder([], inputs()[1]).shape == (5, 2)


def test_impossible_numbers_are_refused():
    for options in ({"num_layers": 0}, {"rank": 0}):
        with pytest.raises(ConfigError, match="encoder"):
            CrossEncoder(4, 2, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("encoder", "private"),
    [
        pytest.param(FMEncoder, False, marks=pytest.mark.slow),
        (CrossEncoder, False),
        pytest.param(CrossEncoder, True, marks=pytest.mark.slow),
    ],
)
def test_an_encoder_is_shared_exactly_if_the_tables_are(encoder, private):
    """With private tables each task's outputs depend on its own encoder alone."""
    data = mtl_jax.data.load("synthetic", recipe="kinds", num_rows=120, dim=3)
    sharing = (
        functools.partial(SingleTask, units=(4,))
        if private
        else functools.partial(MMoE, num_experts=2, expert_units=(4,))
    )
    model = mtl_jax.MultiTaskModel(
        data.schema, encoder=functools.partial(encoder, embedding_dim=2), sharing=sharing, rngs=nnx.Rngs(0)
    )
    functional, params, rest = mtl_jax.train.state.Functional.of(model)
    kinds = {label(path) for path in params if "encoder" in path.split("/")}
    has_parameters = encoder is CrossEncoder
    own = {f"task/{task}" for task in data.schema.task_names}
    assert kinds == ((own if private else {"shared"}) if has_parameters else set())
    batch = mtl_jax.data.batching.as_batch(data.for_training().valid)

    def loss(params):
        return (functional.merge(params, rest)(batch)["click"] ** 2).sum()

    reached = {path for path, g in jax.jit(jax.grad(loss))(params).items() if np.abs(g).max() > 0}
    assert {label(path) for path in reached} <= ({"task/click"} if private else {"task/click", "shared", "embedding"})
    result = mtl_jax.train.fit(model, data, epochs=1, batch_size=50)
    assert np.isfinite(result.monitor["value"])
    if has_parameters:
        moved = mtl_jax.train.state.Functional.of(result.model)[1]
        assert all(np.any(moved[path] != params[path]) for path in params if "encoder" in path.split("/"))
