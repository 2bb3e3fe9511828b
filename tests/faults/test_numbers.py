"""Data that goes wrong without being wrong: missing labels, one class only, values that training never saw."""

import dataclasses
import functools

import numpy as np
import polars as pl
import pytest
from flax import nnx

import mtl_jax
from mtl_jax.errors import LabelError
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import fit
from mtl_jax.train.state import Functional

UNKNOWN = 1  # id of every value that the training part lacks


@pytest.fixture
def table(tmp_path):
    """(**columns) -> the data set of 200 orders over 100 days, split by time, with some columns given."""

    def load(**columns):
        rng = np.random.default_rng(0)
        price = rng.gamma(2.0, 10.0, 200)
        frame = {
            "shop": [f"s{number}" for number in rng.integers(0, 6, 200)],
            "price": price,
            "day": np.arange(200) // 2,
            "buy": (price + 12 * rng.normal(size=200) > 18).astype(int),
            "spend": price * rng.gamma(5.0, 0.2, 200),
        }
        path = tmp_path / "orders.parquet"
        pl.DataFrame(frame | columns).write_parquet(path)
        return mtl_jax.data.load(
            "table", path=path, tasks={"buy": "binary", "spend": "regression"}, categorical=["shop"], numeric=["price"],
            time="day",
        )  # fmt: skip

    return load


def train(data, **options):
    model = mtl_jax.MultiTaskModel(
        data.schema,
        encoder=functools.partial(Encoder, embedding_dim=3),
        sharing=functools.partial(SharedBottom, units=(4,), dropout=0.0),
        towers=functools.partial(Tower, units=(3,), dropout=0.0),
        rngs=nnx.Rngs(0),
    )
    return fit(model, data, **{"epochs": 2, "batch_size": 20, "patience": 0} | options)


def arrays(result):
    return {path: np.asarray(array) for path, array in Functional.of(result.model)[1].items()}


def test_values_that_training_never_saw_are_one_value(table):
    """Shops that opened later: all have id 1, whose row no step touches, and predictions differ by nothing else."""
    new = np.arange(200) // 2 % 2 * (np.arange(200) >= 180) == 1
    shops = [f"new{number}" if new[number] else f"s{number % 6}" for number in range(200)]
    data = table(shop=shops, price=np.full(200, 20.0) + np.arange(200) % 2)
    train_ids, test = data.for_training().train.ids, data.open_test()
    assert train_ids.min() > UNKNOWN
    np.testing.assert_array_equal(test.ids[:, 0] == UNKNOWN, new[-test.num_rows :])
    result = train(data)
    (path,) = (path for path in arrays(result) if path.startswith("tables/"))
    fresh = mtl_jax.MultiTaskModel(data.schema, encoder=functools.partial(Encoder, embedding_dim=3), rngs=nnx.Rngs(0))
    before = np.asarray(Functional.of(fresh)[1][path])
    trained = arrays(result)[path]
    np.testing.assert_array_equal(trained[UNKNOWN], before[UNKNOWN])
    assert np.all(np.any(trained[UNKNOWN + 1 :] != before[UNKNOWN + 1 :], axis=1))
    for outputs in result.predict(test).values():
        assert np.all(np.isfinite(outputs))
        assert len(np.unique(outputs[test.ids[:, 0] == UNKNOWN])) == 2, "one value for each price"


def test_one_class_only_in_validation_is_refused_with_the_way_out(table):
    """By the loader, which knows which part it is."""
    whole = table()
    rows = {part: len(whole.splits[part]) for part in ("train", "valid")}
    buy = np.arange(200) % 2
    buy[rows["train"] : rows["train"] + rows["valid"]] = 1
    with pytest.raises(
        LabelError, match="task 'buy' has .* in valid; expected both labels, AUC is undefined. Drop the task"
    ):
        table(buy=buy)


def one_class(part):
    return dataclasses.replace(part, labels=part.labels | {"buy": np.ones_like(part.labels["buy"])})


def test_one_class_only_in_validation_leaves_the_task_out_of_the_selection(table):
    """Arrays of one's own come past the loader: no AUC, with the reason; the other task selects."""
    data = table().for_training()
    result = train(dataclasses.replace(data, valid=one_class(data.valid)))
    assert result.metrics["valid"]["buy"]["auc"] is None and result.support["valid"]["buy"]["auc"]["reason"]
    gain = [row["value"] for row in result.history if row["name"] == "mean_gain"]
    errors = [row["value"] for row in result.history if row["name"] == "rmse"]
    assert all(np.isfinite(gain)) and np.argmax(gain) == np.argmin(errors)
    assert result.monitor["value"] == max(gain)


def test_a_monitor_that_has_no_value_selects_the_first_epoch(table):
    data = table().for_training()
    result = train(dataclasses.replace(data, valid=one_class(data.valid)), monitor="buy/auc", epochs=3)
    assert result.monitor == {"name": "buy/auc", "value": None, "step": 8}


def test_batches_without_a_label_of_a_task(table):
    """Two observed labels in eight batches: the loss is their mean, nothing is skipped, nothing becomes NaN."""
    data = table().for_training()
    mask = np.zeros(data.train.num_rows, bool)
    mask[[3, 70]] = True
    labels = np.where(mask, data.train.labels["buy"], np.nan).astype(np.float32)
    sparse = dataclasses.replace(
        data.train, mask=data.train.mask | {"buy": mask}, labels=data.train.labels | {"buy": labels}
    )
    result = train(
        dataclasses.replace(data, train=sparse), epochs=1, optimizer=mtl_jax.train.Optimizer(learning_rate=1e-9)
    )
    assert result.diagnostics["skipped_steps"] == 0
    assert all(np.all(np.isfinite(array)) for array in arrays(result).values())
    logits = result.predict(data.train)["buy"].ravel()[mask]
    expected = np.mean(np.logaddexp(0, logits) - labels[mask] * logits)
    (loss,) = (row["value"] for row in result.history if row["name"] == "loss" and row["task"] == "buy")
    assert loss == pytest.approx(expected, rel=1e-4)
