"""Layers against loops in NumPy, and dropout against its definition."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.nn import MLP, Context, Encoder, Experts, Gate, Lookup, Table, Tower, dropout, stream


def test_experts_are_independent_networks():
    experts = Experts(5, (6, 3), num_experts=4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    for index, outputs in enumerate(experts(x)):
        hidden = x
        for layer in experts.layers:
            hidden = np.maximum(hidden @ np.asarray(layer.kernel[...])[index] + np.asarray(layer.bias[...])[index], 0)
        np.testing.assert_allclose(outputs, hidden, rtol=1e-5, atol=1e-6)


def test_an_expert_is_initialised_by_its_own_fan_in():
    """Glorot: uniform in +-sqrt(6 / (fan_in + fan_out)), whatever the number of experts."""
    kernel = np.asarray(Experts(30, (20,), num_experts=50, rngs=nnx.Rngs(0)).layers[0].kernel[...])
    bound = np.sqrt(6 / 50)
    assert np.abs(kernel).max() <= bound
    assert np.abs(kernel).max() > 0.99 * bound


def test_gate_rows_are_softmax():
    gate = Gate(4, 3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    scores = np.exp(x @ np.asarray(gate.kernel[...]))
    np.testing.assert_allclose(gate(x), scores / scores.sum(axis=1, keepdims=True), rtol=1e-5)


def test_layer_norm_makes_rows_standard_before_the_activation():
    network = MLP(8, (64,), norm="layer", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 8))
    assert 0.3 < float((network(x) ** 2).mean()) < 0.7  # half of the second moment of a standard variable
    with pytest.raises(ValueError, match="norm 'group' is unknown"):
        MLP(8, (4,), norm="group", rngs=nnx.Rngs(0))


def test_a_tower_drops_the_last_axis_of_one_output():
    x = jnp.ones((5, 8))
    assert Tower(8, 1, units=(4,), rngs=nnx.Rngs(0))(x).shape == (5,)
    assert Tower(8, 3, units=(4,), rngs=nnx.Rngs(0))(x).shape == (5, 3)
    assert Tower(8, 3, units=(), rngs=nnx.Rngs(0))(x).shape == (5, 3)


def test_lookups():
    rows = Table(6, 2, rngs=nnx.Rngs(0)).rows[...]
    table = np.asarray(rows)
    np.testing.assert_array_equal(Lookup(jnp.array([4, 2, 4]))(rows), table[[4, 2, 4]])
    ids = jnp.array([[2, 5, 0], [0, 0, 0], [3, 3, 4]])
    weight = jnp.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    expected = [(table[2] + 3 * table[5]) / 4, np.zeros(2), (2 * table[3] + table[4]) / 3]
    np.testing.assert_allclose(Lookup(ids, weight)(rows), expected, rtol=1e-5)
    gradient = jax.grad(lambda rows: Lookup(ids, weight)(rows).sum())(rows)
    assert bool(jnp.isfinite(gradient).all())
    np.testing.assert_array_equal(gradient[0], 0)  # padding is never trained


def test_the_encoder_concatenates():
    encoder = Encoder(2, 3, embedding_dim=4, rngs=nnx.Rngs(0))
    assert encoder.out_features == 11
    out = encoder([jnp.ones((5, 4)), 2 * jnp.ones((5, 4))], 3 * jnp.ones((5, 3)))
    np.testing.assert_array_equal(
        out, np.concatenate([np.ones((5, 4)), np.full((5, 4), 2), np.full((5, 3), 3)], axis=1)
    )


def test_dropout_keeps_the_mean_and_its_rate():
    x = jnp.ones(20_000)
    out = np.asarray(dropout(x, 0.3, Context(train=True, rngs=jax.random.key(0))))
    np.testing.assert_allclose(np.unique(out), [0, 1 / 0.7], rtol=1e-6)
    assert abs((out == 0).mean() - 0.3) < 0.02  # six standard errors
    np.testing.assert_array_equal(dropout(x, 0.3, Context()), x)
    with pytest.raises(ValueError, match="needs a key"):
        dropout(x, 0.3, Context(train=True))
    with pytest.raises(ConfigError, match=r"dropout is .*expected a number in .0, 1.."):
        MLP(2, (2,), dropout=1.0, rngs=nnx.Rngs(0))


def test_streams_go_by_name():
    key = jax.random.key(0)
    draw = lambda name: float(jax.random.uniform(stream(key, name)))  # noqa: E731
    assert draw("encoder") == draw("encoder")
    assert draw("encoder") != draw("sharing")
    context = Context(rngs=key)
    np.testing.assert_array_equal(
        jax.random.key_data(context.stream("a").stream("b").rngs), jax.random.key_data(stream(stream(key, "a"), "b"))
    )
    program = "import jax; from mtl_jax.nn import stream; key = stream(jax.random.key(0), 'encoder')\n"
    program += "print(float(jax.random.uniform(key)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"})
    assert float(done.stdout) == draw("encoder"), done.stderr
