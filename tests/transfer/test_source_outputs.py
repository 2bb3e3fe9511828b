"""Outputs of the source's model: as features of the target, and as a part of what is deployed."""

import dataclasses
import functools

import numpy as np
import polars as pl
import pytest
from flax import nnx
from scipy.special import expit

from mtl_jax.data import Dataset
from mtl_jax.data.batching import as_batch
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import MMoE, SharedBottom
from mtl_jax.tasks import Task
from mtl_jax.train import Optimizer, fit
from mtl_jax.transfer import Interpolation, LinInt, Scratch, interpolated, with_outputs

SCHEMA = Schema(
    (Categorical("city", "city"), Numeric("price")),
    (Vocabulary("city"),),
    (Task("click", "binary"), Task("kind", "multiclass"), Task("spend", "regression")),
)
COLUMNS = ["click__source", *(f"kind__source_{index}" for index in range(3)), "spend__source"]


@pytest.fixture(scope="module")
def dataset():
    """Rows in no order; of some there is no label, and some are in no part."""
    rng = np.random.default_rng(0)
    city, price = rng.integers(0, 5, 160), rng.normal(size=160).astype(np.float32)
    value = np.sin(2 * city) + price + 0.3 * rng.normal(size=160)
    frame = pl.DataFrame(
        {
            "city": [f"c{number}" for number in city],
            "price": price,
            "click": pl.Series((value > 0).astype(int)).set(pl.Series(rng.random(160) < 0.1), None),
            "kind": np.digitize(value, [-0.5, 0.8]),
            "spend": 3 * value - price + 10,
        }
    )
    parts = dict(zip(("train", "valid", "test"), np.split(rng.permutation(160)[:150], [90, 120]), strict=True))
    return Dataset.from_frame(frame, SCHEMA, parts)


def model_of(schema, seed=0, sharing=SharedBottom, **options):
    return MultiTaskModel(
        schema,
        encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5),
        sharing=functools.partial(sharing, **options or {"units": (4,), "dropout": 0.0}),
        towers=functools.partial(Tower, units=()),
        rngs=nnx.Rngs(seed),
    )


@pytest.fixture(scope="module")
def source(dataset):
    return model_of(dataset.schema, 7)


def said_of(model, schema, city, price):
    """Outputs for one row, from its values."""
    values = list(schema.vocabulary("city").values)
    of_price = schema.numerics[0]
    batch = {
        "ids": np.array([[2 + values.index(city)]], np.int32),
        "dense": np.array([[(price - of_price.mean) / of_price.std]], np.float32),
    }
    outputs = model({key: np.asarray(array) for key, array in batch.items()} | {"bags": {}, "sequences": {}})
    return np.concatenate([np.ravel(outputs[task]) for task in ("click", "kind", "spend")])


def test_the_features_of_a_row_are_what_the_model_says_of_its_values(dataset, source):
    wider = with_outputs(dataset, source)
    assert [f.name for f in wider.schema.features] == ["city", "price", *COLUMNS]
    assert wider.schema.tasks == dataset.schema.tasks and wider.schema.vocabularies == dataset.schema.vocabularies
    assert wider.schema.features[:2] == dataset.schema.features and wider.identity == dataset.identity
    for part in dataset.splits:
        rows = wider.part(part)
        assert rows.select(dataset.frame.columns).equals(dataset.part(part))
        expected = [said_of(source, dataset.schema, *row) for row in rows.select("city", "price").iter_rows()]
        np.testing.assert_allclose(rows.select(COLUMNS).to_numpy(), expected, rtol=1e-5, atol=1e-6)
    train = wider.part("train").select(COLUMNS).to_numpy().astype(np.float64)
    encoded = {"train": wider.for_training().train, "valid": wider.for_training().valid, "test": wider.open_test()}
    for part, rows in encoded.items():
        plain = wider.part(part).select(COLUMNS).to_numpy()
        np.testing.assert_allclose(rows.dense[:, 1:], (plain - train.mean(axis=0)) / train.std(axis=0), atol=1e-5)


def test_a_share_of_the_rows_in_another_order_says_the_same_of_each(dataset, source):
    rng = np.random.default_rng(3)
    some = {part: rng.permutation(rows)[: len(rows) // 2] for part, rows in dataset.splits.items()}
    whole, part = with_outputs(dataset, source), with_outputs(dataclasses.replace(dataset, splits=some), source)
    for rows in some.values():
        np.testing.assert_allclose(
            part.frame[rows].select(COLUMNS).to_numpy(), whole.frame[rows].select(COLUMNS).to_numpy(), rtol=1e-6
        )


# --- interpolation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_outputs_lie_between_those_of_the_two_models_and_at_the_ends_are_theirs(dataset, source, share):
    target, batch = model_of(dataset.schema, 1), as_batch(dataset.open_test())
    one, other = source(batch), target(batch)
    found = Interpolation(source, target, {"click": share, "kind": 1 - share, "spend": 0.5})(batch)
    for task, a in (("click", share), ("kind", 1 - share), ("spend", 0.5)):
        z_s, z_t = (np.asarray(outputs[task], np.float64) for outputs in (one, other))
        if a in (0, 1):
            np.testing.assert_array_equal(found[task], z_s if a == 1 else z_t)
        np.testing.assert_allclose(found[task], a * z_s + (1 - a) * z_t, rtol=1e-5, atol=1e-6)


def test_at_the_ends_the_other_model_may_say_what_is_not_finite(dataset, source):
    broken, batch = model_of(dataset.schema, 1), as_batch(dataset.open_test())
    broken.task["spend"]["tower"].head.bias[...] = np.full(1, np.nan, np.float32)
    for pair, share in (((source, broken), 1.0), ((broken, source), 0.0)):
        found = Interpolation(*pair, {"spend": share})(batch)
        np.testing.assert_array_equal(found["spend"], source(batch)["spend"])


@pytest.fixture(scope="module")
def trained(dataset):
    options = {"epochs": 2, "batch_size": 30, "optimizer": Optimizer(learning_rate=0.03)}
    return fit(model_of(dataset.schema), dataset, adaptation=LinInt(), seed=0, **options)


def rows_with_label(rows, task):
    return rows.mask[task] & (rows.weight > 0)


def auc(labels, scores):
    """The share of pairs of a positive and a negative that are in order."""
    above = scores[labels > 0][:, None] - scores[labels == 0]
    return np.mean((above > 0) + 0.5 * (above == 0))


def test_shares_are_those_with_the_best_metric_on_validation(dataset, source, trained):
    """Area under the curve of clicks, share of right classes, error of spending; each from its definition."""
    found = interpolated(trained, source, dataset.for_training())
    rows = dataset.for_training().valid
    one, other = source(as_batch(rows)), trained.model(as_batch(rows))

    def score(task, share):
        z = share * np.asarray(one[task], np.float64) + (1 - share) * np.asarray(other[task], np.float64)
        seen = rows_with_label(rows, task)
        z, labels = z[seen], rows.labels[task][seen]
        if task == "click":
            return auc(labels, expit(z))
        if task == "spend":
            return -np.sqrt(np.mean((z - labels) ** 2))
        return np.mean(z.argmax(axis=1) == labels)

    grid = np.linspace(0, 1, 11)
    metric = {task.name: task.metric for task in dataset.schema.tasks}
    assert metric == {"click": "auc", "kind": "accuracy", "spend": "rmse"}
    expected = {task: grid[np.argmax([round(score(task, share), 9) for share in grid])] for task in metric}
    assert found.diagnostics["source_share"] == pytest.approx(expected)
    assert 0 < min(expected.values()) + max(expected.values()) < 2, "not all at one end"
    spend = found.metrics["valid"]["spend"]["rmse"] / dataset.schema.task("spend").std
    assert spend == pytest.approx(-score("spend", expected["spend"]), rel=1e-5)
    assert found.monitor["value"] >= trained.monitor["value"]
    assert found.history == trained.history
    outputs = found.predict(rows)
    np.testing.assert_allclose(outputs["click"], found.model(as_batch(rows))["click"], rtol=1e-5, atol=1e-6)


def test_training_is_that_from_scratch(dataset, trained, assert_same, arrays_of):
    options = {"epochs": 2, "batch_size": 30, "optimizer": Optimizer(learning_rate=0.03)}
    alone = fit(model_of(dataset.schema), dataset, adaptation=Scratch(), seed=0, **options)
    assert alone.history == trained.history
    assert_same(arrays_of(alone.model), arrays_of(trained.model))


def test_gates_are_those_of_the_target(dataset):
    options = {"sharing": MMoE, "num_experts": 2, "expert_units": (4,)}
    one, other = (model_of(dataset.schema, seed, **options) for seed in range(2))
    both, batch = Interpolation(one, other, {"click": 0.5}), as_batch(dataset.open_test())
    for name, weights in other.gates(batch).items():
        np.testing.assert_array_equal(both.gates(batch)[name], weights)
    assert both.sharing.gate_members() == other.sharing.gate_members() != {}
