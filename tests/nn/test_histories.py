"""Histories against loops over rows and items, whichever side is padded."""

import functools

import jax
import numpy as np
import polars as pl
import pytest
from flax import nnx

import mtl_jax
from mtl_jax.data import Categorical, Dataset, Schema, Vocabulary
from mtl_jax.data.schema import Sequence
from mtl_jax.errors import ConfigError, SchemaError
from mtl_jax.nn import GRU, Context, Mean, TargetAttention, Transformer
from mtl_jax.sharing import MMoE, SingleTask
from mtl_jax.tasks import Task

WIDTH, LENGTH = 4, 5
LENGTHS = (5, 3, 1, 0)
EVERY = {
    "mean": Mean,
    "target_attention": TargetAttention,
    "target_attention, softmax": functools.partial(TargetAttention, softmax=True),
    "gru": GRU,
    "transformer": Transformer,
    "transformer, two blocks and heads": functools.partial(Transformer, num_blocks=2, num_heads=2),
}


def make(name):
    module = EVERY[name](WIDTH, LENGTH, rngs=nnx.Rngs(0))
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    generator = np.random.default_rng(1)
    drawn = [jax.device_put(np.float32(0.7 * generator.standard_normal(leaf.shape))) for leaf in leaves]
    nnx.update(module, jax.tree.unflatten(structure, drawn))
    return module


def histories(left):
    """Items of four rows, padded on one side, and the real ones of each."""
    generator = np.random.default_rng(0)
    items, mask = np.full((4, LENGTH, WIDTH), 7.0, np.float32), np.zeros((4, LENGTH), np.float32)
    real = [generator.standard_normal((length, WIDTH)).astype(np.float32) for length in LENGTHS]
    for row, found in enumerate(real):
        place = slice(LENGTH - len(found), LENGTH) if left else slice(len(found))
        items[row, place], mask[row, place] = found, 1.0
    return items, mask, real, generator.standard_normal((4, WIDTH)).astype(np.float32)


def array(variable):
    return np.asarray(variable[...], np.float64)


def linear(module, x):
    return x @ array(module.kernel) + (0 if module.bias is None else array(module.bias))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def normed(module, x):
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * array(module.scale) + array(module.bias)


def mean(module, items, target):
    return np.mean(items, axis=0)


def target_attention(module, items, target):
    scores = []
    for v in items:
        hidden = np.concatenate([v, target, v - target, v * target])
        for layer in module.hidden.layers:
            hidden = np.maximum(linear(layer, hidden), 0)
        scores.append(linear(module.score, hidden)[0])
    weights = softmax(np.array(scores)) if module.softmax else scores
    return sum(weight * v for weight, v in zip(weights, items, strict=True))


def gru(module, items, target):
    state = np.zeros(WIDTH)
    for v in items:
        reset, update, candidate = np.split(linear(module.of_item, v), 3)
        of_reset, of_update = np.split(linear(module.gates_of_state, state), 2)
        r, u = sigmoid(reset + of_reset), sigmoid(update + of_update)
        state = u * state + (1 - u) * np.tanh(candidate + linear(module.of_state, r * state))
    return state


def transformer(module, items, target):
    x = [v + array(module.positions)[len(items) - 1 - i] for i, v in enumerate(items.astype(np.float64))]
    for block in module.blocks:
        queries = [linear(block.query, normed(block.attention_norm, v)) for v in x]
        keys, values = ([linear(part, v) for v in x] for part in (block.key, block.value))
        attended, depth = [], WIDTH // block.num_heads
        for i, v in enumerate(x):
            parts = []
            for head in range(block.num_heads):
                at = slice(head * depth, (head + 1) * depth)
                weights = softmax(np.array([queries[i][at] @ keys[j][at] for j in range(i + 1)]) / depth**0.5)
                parts.append(sum(w * values[j][at] for j, w in enumerate(weights)))
            attended.append(v + np.concatenate(parts))
        x = [v + linear(block.second, np.maximum(linear(block.first, normed(block.ffn_norm, v)), 0)) for v in attended]
    return normed(module.norm, x[-1])


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", EVERY)
def test_equals_its_loop(name, left):
    module = make(name)
    items, mask, real, target = histories(left)
    found = jax.device_get(jax.jit(lambda *arrays: module(*arrays))(items, mask, target))
    reference = globals()[name.split(",")[0]]
    for row, own in enumerate(real):
        expected = reference(module, own, target[row].astype(np.float64)) if len(own) else np.zeros(WIDTH)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_padding_gets_no_gradient_and_an_empty_history_a_finite_one(name):
    module = make(name)
    items, mask, _, target = histories(left=False)
    graph, state = nnx.split(module)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(items, state):
        return (nnx.merge(graph, state)(items, mask, target) ** 2).sum()

    gradient, own = gradients(items, state)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[mask == 0].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("kind", [TargetAttention, Transformer])
def test_dropout_is_on_in_training_only(kind):
    module = kind(WIDTH, LENGTH, dropout=0.5, rngs=nnx.Rngs(0))
    items, mask, _, target = histories(left=False)
    one, two = (module(items, mask, target, Context(train=True, rngs=jax.random.key(seed))) for seed in (0, 1))
    assert not np.allclose(one, two)
    np.testing.assert_array_equal(module(items, mask, target), module(items, mask, target, Context()))


def shop(target=True):
    """What comes next depends on the newest item, which a mean cannot see."""
    generator = np.random.default_rng(0)
    lists = [generator.integers(0, 6, generator.integers(1, 6)).tolist() for _ in range(900)]
    items = generator.integers(0, 6, 900)
    labels = np.array([int(history[-1] == item) for history, item in zip(lists, items, strict=True)])
    frame = pl.DataFrame({"item": items, "history": lists, "buy": labels, "skip": 1 - labels})
    features = (Sequence("history", "item", LENGTH), *([Categorical("item", "item")] if target else []))
    schema = Schema(
        features=features,
        vocabularies=(Vocabulary("item"),),
        tasks=(Task("buy", "binary"), Task("skip", "binary")),
    )
    return Dataset.from_frame(frame, schema, "rows", name="shop")


SHARED, PRIVATE = functools.partial(MMoE, num_experts=2, expert_units=(16,)), functools.partial(SingleTask, units=(16,))


@pytest.mark.parametrize(("name", "sharing"), [("target_attention", SHARED), ("gru", PRIVATE), ("transformer", SHARED)])
def test_a_model_learns_from_the_history(name, sharing):
    data = shop()
    model = mtl_jax.MultiTaskModel(data.schema, history=EVERY[name], sharing=sharing, rngs=nnx.Rngs(0))
    before = mtl_jax.train.state.Functional.of(model)[1]
    result = mtl_jax.train.fit(model, data, epochs=2, batch_size=64)
    after = mtl_jax.train.state.Functional.of(result.model)[1]
    own = [path for path in before if "histories" in path.split("/")]
    assert own and all(np.any(before[path] != after[path]) for path in own)
    assert all(path.startswith("task/") for path in own) == (sharing.func is SingleTask)


def test_what_has_nothing_to_compare_with_is_refused():
    with pytest.raises(SchemaError, match="'TargetAttention' of sequence 'history'"):
        mtl_jax.MultiTaskModel(shop(target=False).schema, history=TargetAttention, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="divisor of the width"):
        Transformer(WIDTH, LENGTH, num_heads=3, rngs=nnx.Rngs(0))
