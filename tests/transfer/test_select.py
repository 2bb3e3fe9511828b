"""Which of several sources is taken over from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from mtl_jax.data.batching import as_batch
from mtl_jax.data.dataset import Encoded
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.tasks import Task
from mtl_jax.train.state import Functional
from mtl_jax.transfer import select
from mtl_jax.transfer.select import SELECTS, choose, gradient_cosine

SCORED = ("largest", "best_source_metric", "gradient_cosine")
SCHEMA = Schema(
    (Categorical("item", "item"), Numeric("price")),
    (Vocabulary("item", tuple("abcdef")),),
    (Task("click", "binary"), Task("spend", "regression")),
)


def refuse(name):
    pytest.fail(f"'{name}' was scored")


def rows_of(num_rows=64, seed=0, sign=1.0):
    rng = np.random.default_rng(seed)
    price = rng.normal(size=(num_rows, 1)).astype(np.float32)
    value = sign * price[:, 0]
    labels = {"click": (value > 0).astype(np.float32), "spend": value}
    mask = dict.fromkeys(labels, np.ones(num_rows, bool))
    ids = rng.integers(2, 8, (num_rows, 1)).astype(np.int32)
    return Encoded(ids, price, {}, {}, labels, mask, {}, np.ones(num_rows, np.float32))


@pytest.fixture(scope="module")
def model():
    return MultiTaskModel(
        SCHEMA,
        encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5),
        sharing=functools.partial(SharedBottom, units=(6,), dropout=0.0),
        towers=functools.partial(Tower, units=(4,), dropout=0.0),
        rngs=nnx.Rngs(0),
    )


def test_given_takes_all_of_them_and_scores_none():
    assert choose(["a", "b", "c"], "given", seed=0, score=refuse) == ["a", "b", "c"]


@pytest.mark.parametrize("how", SELECTS)
def test_one_candidate_needs_no_score(how):
    assert choose(["a"], how, seed=0, score=refuse) == ["a"]


def test_random_draws_one_by_the_seed_alone():
    candidates = ["a", "b", "c"]
    found = [choose(candidates, "random", seed=seed, score=refuse) for seed in range(40)]
    assert all(len(one) == 1 for one in found)
    assert {name for (name,) in found} == set(candidates)
    assert found == [choose(candidates, "random", seed=seed, score=refuse) for seed in range(40)]


@pytest.mark.parametrize("how", SCORED)
@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({"a": 1.0, "b": 3.0, "c": 2.0}, "b"),
        ({"a": -2.0, "b": -3.0, "c": None}, "a"),
        ({"a": 1.0, "b": 2.0, "c": 2.0}, "b"),
        ({"a": None, "b": None, "c": -1e9}, "c"),
        ({"a": None, "b": None}, "a"),
    ],
)
def test_the_highest_score_is_chosen_the_first_of_several_and_none_last(how, scores, chosen):
    assert choose(list(scores), how, seed=0, score=scores.__getitem__) == [chosen]


@pytest.mark.parametrize("how", SCORED)
def test_every_candidate_is_scored_once(how):
    asked = []
    choose(["a", "b"], how, seed=0, score=lambda name: asked.append(name) or 0.0)
    assert asked == ["a", "b"]


def test_another_way_is_refused():
    with pytest.raises(ConfigError, match=r"select is 'nonsense'; expected one of \['given', 'largest', 'random'"):
        choose(["a", "b"], "nonsense", seed=0, score=refuse)


def test_the_gradient_of_the_same_rows_points_the_same_way(model):
    assert gradient_cosine(model, SCHEMA.tasks, rows_of(), rows_of()) == pytest.approx(1.0, abs=1e-5)


def test_gradients_of_related_rows_are_nearer_than_those_of_contrary_ones(model):
    related = gradient_cosine(model, SCHEMA.tasks, rows_of(), rows_of(seed=1))
    contrary = gradient_cosine(model, SCHEMA.tasks, rows_of(), rows_of(seed=1, sign=-1.0))
    assert related > contrary + 0.3


def test_the_cosine_is_that_of_the_losses_written_out(model):
    """By every parameter but the tables."""
    functional, params, rest = Functional.of(model)
    tables = {path: array for path, array in params.items() if path.endswith("/rows")}
    layers = {path: array for path, array in params.items() if path not in tables}

    def loss(layers, rows):
        outputs = functional.merge(layers, tables, rest)(as_batch(rows))
        click, label = outputs["click"], rows.labels["click"]
        bce = jnp.logaddexp(0, click) - label * click
        return bce.mean() + jnp.square(outputs["spend"] - rows.labels["spend"]).mean()

    sides = rows_of(40), rows_of(24, seed=1, sign=-0.5)
    one, other = (ravel_pytree(jax.grad(loss)(layers, rows))[0] for rows in sides)
    expected = one @ other / jnp.linalg.norm(one) / jnp.linalg.norm(other)
    assert gradient_cosine(model, SCHEMA.tasks, *sides) == pytest.approx(float(expected), abs=1e-5)


def test_rows_without_a_label_have_no_direction(model):
    unlabelled = dataclasses.replace(rows_of(), mask=dict.fromkeys(SCHEMA.task_names, np.zeros(64, bool)))
    assert gradient_cosine(model, SCHEMA.tasks, unlabelled, rows_of()) == 0.0


def test_many_rows_are_compared_on_some_of_them(model, monkeypatch):
    monkeypatch.setattr(select, "MOST_ROWS", 32)
    found = [gradient_cosine(model, SCHEMA.tasks, rows_of(200), rows_of(48, seed=1)) for _ in range(2)]
    assert found[0] == found[1], "drawn once"
    whole = np.sort(select._some(200))
    assert len(np.unique(whole)) == 32 and whole.max() > 100
