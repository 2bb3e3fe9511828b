"""A small world built from arrays: two kinds of schema, rows with learnable labels, models without dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.data.dataset import Encoded, TrainingData
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import MMoE, SharedBottom, SingleTask
from mtl_jax.tasks import Task
from mtl_jax.train import BalancingOptions, balanced_gradients
from mtl_jax.train.objective import TaskLoss


def vocabulary(name, size):
    """A vocabulary of so many rows, the two reserved ones included."""
    return Vocabulary(name, tuple(map(str, range(size - 2))))


@pytest.fixture(scope="session")
def small_schema():
    """One categorical and one number; a binary and a regression task."""
    return Schema(
        (Categorical("user", "user"), Numeric("price")),
        (vocabulary("user", 20),),
        (Task("click", "binary"), Task("spend", "regression")),
    )


@pytest.fixture(scope="session")
def rich_schema():
    """Every kind of feature and task. Four features read one vocabulary, in three ways."""
    return Schema(
        (
            Categorical("user", "user"),
            Categorical("item", "item"),
            Categorical("last", "item"),
            MultiHot("basket", "item", 3),
            Sequence("history", "item", 4),
            Numeric("price"),
        ),
        (vocabulary("user", 9), vocabulary("item", 40)),
        (
            Task("click", "binary"),
            Task("spend", "regression", weight=0.7),
            Task("kind", "multiclass", classes=("a", "b", "c")),
        ),
    )


@pytest.fixture(scope="session")
def three_task_schema(rich_schema):
    """Two features of one vocabulary and a number, with the three kinds of task."""
    features = (Categorical("item", "item"), Categorical("last", "item"), Numeric("price"))
    return dataclasses.replace(rich_schema, features=features, vocabularies=(vocabulary("item", 9),))


@pytest.fixture(scope="session")
def make_rows():
    """(schema, num_rows, seed) -> Encoded. Labels follow the first id and the number; some are unobserved, and NaN."""

    def build(schema, num_rows, *, seed=0, observed=0.8):
        rng = np.random.default_rng(seed)
        sizes = {v.name: v.size for v in schema.vocabularies}
        draw = lambda feature, *shape: rng.integers(1, sizes[feature.vocabulary], shape).astype(np.int32)  # noqa: E731

        def padded(feature):
            ids = draw(feature, num_rows, feature.max_len)
            lengths = rng.integers(0, feature.max_len + 1, num_rows)  # sets and histories may be empty
            return np.where(np.arange(feature.max_len) < lengths[:, None], ids, 0).astype(np.int32)

        columns = [draw(f, num_rows) for f in schema.categoricals]
        ids = np.stack(columns, axis=1) if columns else np.zeros((num_rows, 0), np.int32)
        dense = rng.normal(size=(num_rows, len(schema.dense_names))).astype(np.float32)
        bags = {f.name: padded(f) for f in schema.bags}
        signal = dense.sum(1) + (np.sin(ids[:, 0]) if columns else 0)
        labels, mask = {}, {}
        for number, task in enumerate(schema.tasks):
            mask[task.name] = rng.random(num_rows) < observed - 0.1 * number
            value = signal + 0.3 * number + 0.1 * rng.normal(size=num_rows)
            if task.kind == "multiclass":
                labels[task.name] = np.digitize(value, [-0.5, 0.5]).astype(np.int32)
            else:
                value = value > 0 if task.kind == "binary" else value
                labels[task.name] = np.where(mask[task.name], value, np.nan).astype(np.float32)
        return Encoded(
            ids=ids,
            dense=dense,
            bags={name: (b, ((b > 0) * rng.uniform(0.5, 2, b.shape)).astype(np.float32)) for name, b in bags.items()},
            sequences={f.name: padded(f) for f in schema.sequences},
            labels=labels,
            mask=mask,
            task_weight={},
            weight=rng.uniform(0.5, 1.5, num_rows).astype(np.float32),
        )

    return build


@pytest.fixture(scope="session")
def make_data(make_rows):
    """(schema, num_train, num_valid) -> TrainingData."""

    def build(schema, num_train=50, num_valid=40):
        return TrainingData(
            "world", schema, make_rows(schema, num_train), make_rows(schema, num_valid, seed=1), "0" * 64
        )

    return build


@pytest.fixture(scope="session")
def make_model():
    """(schema, sharing) -> a model of a few dozen parameters; ``sharing`` is a name or a constructor."""
    kinds = {
        "shared_bottom": functools.partial(SharedBottom, units=(5,)),
        "mmoe": functools.partial(MMoE, num_experts=2, expert_units=(5,)),
        "single_task": functools.partial(SingleTask, units=(5,)),
        "single_task_shared": functools.partial(SingleTask, units=(5,), share_embeddings=True),
    }

    def build(schema, sharing="shared_bottom", *, seed=0, dropout=0.0, dim=3, towers=(4,)):
        sharing = kinds.get(sharing, sharing)
        if isinstance(sharing, functools.partial):
            sharing = functools.partial(sharing, dropout=dropout)
        return MultiTaskModel(
            schema,
            encoder=functools.partial(Encoder, embedding_dim=dim, stddev=0.5),
            sharing=sharing,
            towers=functools.partial(Tower, units=towers, dropout=dropout),
            rngs=nnx.Rngs(seed),
        )

    return build


@pytest.fixture(scope="session")
def as_float64():
    """The model or batch with every float array in float64; call it where float64 is on."""

    def cast(tree):
        def widen(leaf):
            return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

        if isinstance(tree, nnx.Module):
            graphdef, state = nnx.split(tree)
            return nnx.merge(graphdef, jax.tree.map(widen, state))
        return jax.tree.map(widen, tree)

    return cast


@pytest.fixture(scope="session")
def with_columns():
    """(Encoded, field=...) -> Encoded with those fields replaced."""
    return dataclasses.replace


@dataclasses.dataclass(frozen=True)
class Plane:
    """Tasks over one shared vector x, each with a vector of its own: L_i = |x - c_i|^2 / 2 + |h_i - B_i x|^2 / 2.

    A part of a step has centres c [task, 3] and a share of the loss; a task that is absent has no labels.
    """

    centres: np.ndarray
    mixers: np.ndarray
    absent: tuple[int, ...] = ()

    @property
    def tasks(self):
        return [f"t{number}" for number in range(len(self.centres))]

    @property
    def params(self):
        start = {"shared/x": jnp.array([0.3, -0.2, 0.5])}
        return start | {f"task/{name}/h": jnp.full(2, 0.1 * (i + 1)) for i, name in enumerate(self.tasks)}

    def part(self, *, share=1.0, shift=0.0):
        return {"centres": jnp.asarray(self.centres) + shift, "share": jnp.asarray(share)}

    def common(self, below, part):
        return {"x": below["shared/x"], "centres": part["centres"]}

    def heads(self):
        return {name: self._head(number, name) for number, name in enumerate(self.tasks)}

    def _head(self, number, name):
        def loss(own, cut, part):
            away = cut["x"] - cut["centres"][number]
            rest = own[f"task/{name}/h"] - self.mixers[number] @ cut["x"]
            present = part["share"] * (number not in self.absent)
            return TaskLoss(present * (away @ away + rest @ rest) / 2, present, present)

        return loss

    def losses(self, params, part):
        cut = self.common(params, part)
        return jnp.stack([head(params, cut, part).loss for head in self.heads().values()])

    def looked_ahead(self, halves, weights, rate, tasks):
        """Summed held-out losses of some tasks after a step with these weights."""
        train, held_out = (jax.tree.map(lambda leaf, n=n: leaf[n], halves) for n in range(2))
        slope = jax.grad(lambda params: weights @ self.losses(params, train))(self.params)
        ahead = jax.tree.map(lambda value, g: value - rate * g, self.params, slope)
        return self.losses(ahead, held_out)[np.array(tasks)].sum()

    def balanced(self, balancer, part=None, *, key=0, state=None, learning_rate=0.1, options=None, **parts):
        """One step of the balancer, compiled, with its state before the first step by default."""
        state = balancer.init(len(self.tasks), {"shared/x": self.params["shared/x"]}) if state is None else state
        return jax.jit(
            lambda params, part, parts: balanced_gradients(
                self.common,
                self.heads(),
                params,
                part,
                parts=parts,
                balancer=balancer,
                state=state,
                key=jax.random.key(key),
                options=options or BalancingOptions(),
                learning_rate=lambda path: learning_rate,
            )
        )(self.params, part, parts.get("parts"))


@pytest.fixture
def plane():
    """Builds such a problem in float64; with copies, all tasks are the same."""

    def build(num_tasks=3, *, absent=(), copies=False):
        rng = np.random.default_rng(0)
        centres, mixers = rng.normal(size=(num_tasks, 3)), rng.normal(size=(num_tasks, 2, 3))
        if copies:
            centres[1:], mixers[1:] = centres[:1], 0
            mixers[0] = 0
        return Plane(centres, mixers, absent)

    with jax.enable_x64(True):
        yield build


def stack(*parts):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


@pytest.fixture
def halves():
    """Two parts of a plane, one to train on and one held out."""
    return lambda plane: stack(plane.part(), plane.part(shift=0.7))
