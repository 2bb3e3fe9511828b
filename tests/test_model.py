"""MultiTaskModel: its labels by autodiff, its initial values, its cut, and what it reads of a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.errors import SchemaError
from mtl_jax.model import MultiTaskModel, decays, is_table, label
from mtl_jax.nn import Context, Encoder, Tower
from mtl_jax.sharing import ESMM, CrossStitch, Link, MMoE, SharedBottom, SingleTask
from mtl_jax.tasks import Task
from mtl_jax.train.state import Functional, count_parameters

TASKS = (Task("click", "binary"), Task("spend", "regression"), Task("kind", "multiclass", classes=("a", "b", "c")))
STRATEGIES = {
    "shared_bottom": functools.partial(SharedBottom, units=(4,)),
    "mmoe": functools.partial(MMoE, num_experts=2, expert_units=(4,)),
    "single_task": functools.partial(SingleTask, units=(4,)),
    "single_task_shared": functools.partial(SingleTask, units=(4,), share_embeddings=True),
}


def make_schema(tasks=TASKS, *, item="item"):
    """Two tables, one of them read by a column, a set and a history; one number. ``item`` names that vocabulary."""
    features = (
        Categorical("user", "user"),
        Categorical("item", item),
        MultiHot("basket", item, 2),
        Sequence("history", item, 3),
        Numeric("price"),
    )
    return Schema(features, (Vocabulary("user", ("u", "v")), Vocabulary(item, ("a", "b", "c"))), tasks)


def make_model(schema, sharing="shared_bottom", *, seed=0, dropout=0.0):
    return MultiTaskModel(
        schema,
        encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5),
        sharing=functools.partial(STRATEGIES[sharing], dropout=dropout),
        towers=functools.partial(Tower, units=(4,), dropout=dropout),
        rngs=nnx.Rngs(seed),
    )


def make_batch(num_rows=6):
    rng = np.random.default_rng(0)
    basket, history = rng.integers(0, 5, (num_rows, 2)), rng.integers(0, 5, (num_rows, 3))
    return {
        "ids": jnp.asarray(np.stack([rng.integers(1, 4, num_rows), rng.integers(1, 5, num_rows)], axis=1)),
        "dense": jnp.asarray(rng.normal(size=(num_rows, 1)), jnp.float32),
        "bags": {"basket": (jnp.asarray(basket), jnp.asarray((basket > 0) * 1.0))},
        "sequences": {"history": jnp.asarray(history)},
    }


def arrays(model):
    return {path: np.asarray(array) for path, array in Functional.of(model)[1].items()}


@pytest.mark.parametrize("sharing", STRATEGIES)
def test_labels_are_what_gradients_say(sharing):
    """An array is ``task/<name>`` exactly if the output of no other task depends on it; counts go by these labels."""
    functional, params, _ = Functional.of(make_model(make_schema(), sharing))
    batch = make_batch()
    squares = lambda p: {t: (z**2).sum() for t, z in functional.merge(p)(batch).items()}  # noqa: E731
    jacobian = jax.device_get(jax.jit(jax.jacrev(squares))(params))
    reached = {
        path: {task for task in jacobian if np.any(jacobian[task][path] != 0)}
        for path in params
        if "bias" not in path or "head" in path  # a hidden unit may be dead, and its bias with it
    }
    for path, tasks in reached.items():
        expected = (
            {label(path).removeprefix("task/")} if label(path).startswith("task/") else {"click", "spend", "kind"}
        )
        assert tasks == expected, path
    assert {label(path) for path in params if is_table(path)} == (
        {"task/click", "task/spend", "task/kind"} if sharing == "single_task" else {"embedding"}
    )
    table_size = (4 + 5) * 3
    counts = count_parameters(params)
    assert counts["embedding"] == (0 if sharing == "single_task" else table_size)
    width = 4 * 3 + 1
    towers = 3 * (4 * 4 + 4) + (4 + 1) + (4 + 1) + (4 * 3 + 3)
    own = {
        "shared_bottom": 0,
        "mmoe": 3 * width * 2,
        "single_task": 3 * (width * 4 + 4 + table_size),
        "single_task_shared": 3 * (width * 4 + 4),
    }
    assert counts["task"] == towers + own[sharing]
    assert counts["total"] == sum(array.size for array in params.values())


@pytest.mark.parametrize("sharing", STRATEGIES)
def test_a_task_starts_from_the_same_values_whatever_the_others_are(sharing):
    """Its tower, private tables and own parts of the strategy, alone, among others, and in another order."""
    among = arrays(make_model(make_schema(), sharing))
    for tasks in (TASKS[1:2], TASKS[::-1]):
        other = arrays(make_model(make_schema(tasks), sharing))
        assert set(other) <= set(among)
        for path, array in other.items():
            np.testing.assert_array_equal(array, among[path], err_msg=path)
    seeded = arrays(make_model(make_schema(), sharing, seed=1))
    assert all(np.any(seeded[path] != array) for path, array in among.items() if not path.endswith("bias"))


@pytest.mark.parametrize("sharing", ["mmoe", "single_task"])
def test_order_of_tasks_does_not_matter(sharing):
    batch = make_batch()
    one = make_model(make_schema(), sharing)(batch)
    other = make_model(make_schema(TASKS[::-1]), sharing)(batch)
    assert list(one) == ["click", "spend", "kind"] and list(other) == ["kind", "spend", "click"]
    for task, outputs in one.items():
        np.testing.assert_allclose(outputs, other[task], rtol=1e-6)


@pytest.mark.parametrize("sharing", STRATEGIES)
def test_the_cut_is_complete(sharing):
    """The gradient of all arrays below the cut passes through it: heads at the cut, then one pull, is the whole."""
    functional, params, _ = Functional.of(make_model(make_schema(), sharing))
    batch = make_batch()
    total = lambda outputs: sum((z**2).sum() for z in outputs)  # noqa: E731

    def common(params):
        model = functional.merge(params)
        return jax.tree.leaves(model.common(model.inputs(batch)))

    def heads(leaves):
        model = functional.merge(params)
        structure = jax.tree.structure(model.common(model.inputs(batch)))
        return total(model.head(task, jax.tree.unflatten(structure, leaves)) for task in model.task_names)

    @jax.jit
    def through_the_cut(params):
        leaves, pull = jax.vjp(common, params)
        return pull(jax.grad(heads)(leaves))[0]

    through = through_the_cut(params)
    whole = jax.jit(jax.grad(lambda params: total(functional.merge(params)(batch).values())))(params)
    for path in params:
        if is_table(path) or not label(path).startswith("task/"):
            np.testing.assert_allclose(through[path], whole[path], rtol=1e-5, atol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(through[path], 0, err_msg=path)


CUTS = {"shared_bottom": STRATEGIES["shared_bottom"], "mmoe": STRATEGIES["mmoe"]} | {
    "cross_stitch": functools.partial(CrossStitch, units=(4,)),
}


@pytest.mark.parametrize("link", [Link, functools.partial(ESMM, order=("click", "buy"))], ids=["plain", "esmm"])
@pytest.mark.parametrize("sharing", CUTS.values(), ids=CUTS)
def test_factors_of_features_are_factors_of_what_towers_read(sharing, link):
    """Whatever the layout of the cut, features lead with rows. In ESMM the first tower reaches the second task, too."""
    schema = make_schema((Task("click", "binary"), Task("buy", "binary")))
    towers = functools.partial(Tower, units=())
    model, batch = MultiTaskModel(schema, sharing=sharing, towers=towers, link=link, rngs=nnx.Rngs(0)), make_batch()
    inputs = model.inputs(batch)
    cut = model.common(inputs)
    features = model.features_of(cut)
    assert features.shape == (6, 4 if sharing is CUTS["shared_bottom"] else 8)
    factors = jnp.asarray(np.random.default_rng(1).uniform(size=features.shape[1]), jnp.float32)

    def outputs(context):
        cut = model.common(inputs, context)
        return {task: model.head(task, cut, context) for task in model.task_names}

    found = outputs(Context(units=factors))
    read = dict(zip(model.task_names, jnp.split(features * factors, features.shape[1] // 4, axis=1) * 2, strict=False))
    logits = {task: model.task[task]["tower"](read[task]) for task in model.task_names}
    expected = logits if link is Link else model.link(logits).logits
    for task in model.task_names:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-5)
        np.testing.assert_array_equal(outputs(Context())[task], outputs(Context(units=jnp.ones_like(factors)))[task])


def test_outputs_by_hand():
    """Tables looked up, sets and histories averaged without padding, everything concatenated, then the networks."""
    model, batch = make_model(make_schema()), make_batch()
    table = {name: np.asarray(model.tables[name].rows[...]) for name in ("user", "item")}

    def mean(ids):
        return np.stack([table["item"][row[row > 0]].mean(0) if np.any(row > 0) else np.zeros(3) for row in ids])

    ids, basket, history = (np.asarray(part) for part in (
        batch["ids"], batch["bags"]["basket"][0], batch["sequences"]["history"]
    ))  # fmt: skip
    x = [table["user"][ids[:, 0]], table["item"][ids[:, 1]], mean(basket), mean(history), np.asarray(batch["dense"])]
    z = np.concatenate(x, axis=1)
    for layer in (*model.sharing.bottom.layers, *model.task["kind"].tower.hidden.layers):
        z = np.maximum(z @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]), 0)
    head = model.task["kind"].tower.head
    outputs = model(batch)
    np.testing.assert_allclose(
        outputs["kind"], z @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...]), rtol=1e-5, atol=1e-6
    )
    assert {task: out.shape for task, out in outputs.items()} == {"click": (6,), "spend": (6,), "kind": (6, 3)}


def test_parts_draw_their_own_dropout():
    """Under one key, towers of different tasks drop different units; the key decides, and evaluation drops nothing."""
    model, batch = make_model(make_schema((Task("a", "binary"), Task("b", "binary"))), dropout=0.5), make_batch(40)
    nnx.update(model.task["b"].tower, nnx.state(model.task["a"].tower))
    equal = lambda one, other: bool(jnp.all(one == other))  # noqa: E731
    quiet = model(batch)
    assert equal(quiet["a"], quiet["b"])
    key = jax.random.key(0)
    noisy = model(batch, Context(train=True, rngs=key))
    assert not equal(noisy["a"], noisy["b"]) and not equal(noisy["a"], quiet["a"])
    assert equal(noisy["a"], model(batch, Context(train=True, rngs=key))["a"])
    assert not equal(noisy["a"], model(batch, Context(train=True, rngs=jax.random.key(1)))["a"])


@pytest.mark.parametrize("name", ["task", "aux", "tables", "rows", "items", "a b.c"])
def test_any_name_of_a_vocabulary_is_a_table(name):
    """Also one that is a word of the labelling itself."""
    paths = [path for path in arrays(make_model(make_schema(item=name))) if is_table(path)]
    assert {label(path) for path in paths} == {"embedding"} and len(paths) == 2


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tables/user/rows", "embedding"),
        ("task/buy/tables/task/rows", "task/buy"),
        ("task/task/tower/head/kernel", "task/task"),
        ("sharing/task/aux/kernel", "task/aux"),
        ("sharing/experts/layers/0/kernel", "shared"),
        ("aux/domain/kernel", "aux/domain"),
    ],
)
def test_labels_go_by_path(path, expected):
    assert label(path) == expected


ORDERED = (
    Task("stars", "ordinal", classes=("1", "2", "3"), frequencies=(0.2, 0.3, 0.5)),
    Task("visits", "count", loss="negative_binomial"),
    Task("calls", "count"),
    Task("value", "zero_inflated"),
    Task("tags", "multilabel", classes=("a", "b", "c", "d")),
)


def test_parameters_of_losses_lie_beside_the_tower():
    """They belong to the task and do not decay; the ordinal head has no bias, since cutpoints take its place."""
    model, batch = make_model(make_schema(ORDERED)), make_batch()
    outputs = model(batch)
    assert {task.name: outputs[task.name].shape[1:] for task in ORDERED} == {t.name: t.output_shape for t in ORDERED}
    paths = {path for path in arrays(model) if not decays(path)}
    assert paths == {"task/stars/outputs/beta", "task/visits/outputs/kappa"}
    assert {label(path) for path in paths} == {"task/stars", "task/visits"}
    assert "task/stars/tower/head/bias" not in arrays(model) and "task/visits/tower/head/bias" in arrays(model)
    score = model.task["stars"].tower(model.sharing.head("stars", model.common(model.inputs(batch))))
    np.testing.assert_allclose(outputs["stars"], score[:, None] - model.task["stars"].outputs.cutpoints, rtol=1e-6)


@pytest.mark.parametrize("name", ["outputs", "task"])
def test_other_paths_decay_whatever_the_names(name):
    schema = make_schema((Task(name, "binary"), Task("buy", "binary")), item=name)
    for sharing in ("single_task", "mmoe"):
        assert all(map(decays, arrays(make_model(schema, sharing))))


def test_an_ordinal_task_of_a_schema_that_is_not_fitted():
    """Classes without rates: all alike. Neither: refused."""
    model = make_model(make_schema((Task("stars", "ordinal", classes="abcd"),)))
    np.testing.assert_allclose(model.task["stars"].outputs.cutpoints, [-np.log(3), 0, np.log(3)], atol=1e-6)
    with pytest.raises(SchemaError, match="task 'stars' has no classes yet"):
        make_model(make_schema((Task("stars", "ordinal"),)))


def test_what_cannot_be_built_is_refused():
    with pytest.raises(SchemaError, match="no features; expected at least one"):
        make_model(Schema((), (), TASKS))
    with pytest.raises(SchemaError, match=r"\['price/unit'\] have a '/'.*Rename"):
        make_model(make_schema((Task("price/unit", "binary"),)))
    with pytest.raises(SchemaError, match=r"\['a/b'\]"):
        make_model(make_schema(item="a/b"))


def test_tables_that_nothing_reads_are_not_made():
    schema = make_schema()
    unused = Schema(schema.features, (*schema.vocabularies, Vocabulary("shop", ("x",))), TASKS)
    assert set(arrays(make_model(unused))) == set(arrays(make_model(schema)))
