"""Data sets: the sealed test part, codes, fitting on train only, identity, tasks, summary."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from mtl_jax.data.dataset import Dataset, Encoded
from mtl_jax.data.schema import Categorical, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.errors import LabelError, SchemaError
from mtl_jax.tasks import Task

SCHEMA = Schema(
    features=(Categorical("item", "item"), Numeric("price"), Sequence("recent", "item", 3)),
    vocabularies=(Vocabulary("item"),),
    tasks=(
        Task("click", "binary"),
        Task("buy", "binary", space="click", implies="click"),
        Task("spend", "regression", space="buy"),
        Task("stars", "multiclass"),
    ),
    domain="country",
    user="customer",
    item="item",
    time="day",
)


def make_frame(num_rows: int = 400) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    click = rng.random(num_rows) < 0.6
    return pl.DataFrame(
        {
            "item": [f"i{i}" for i in rng.integers(0, 12, num_rows)],
            "price": rng.normal(size=num_rows),
            "recent": [[f"i{i}" for i in rng.integers(0, 12, rng.integers(0, 5))] for _ in range(num_rows)],
            "click": click.astype(int),
            "buy": (click & (rng.random(num_rows) < 0.5)).astype(int),
            "spend": rng.normal(3, 2, num_rows),
            "stars": rng.integers(1, 4, num_rows),
            "country": rng.choice(["nl", "es"], num_rows).tolist(),
            "customer": [f"c{i}" for i in rng.integers(0, 60, num_rows)],
            "day": np.sort(rng.integers(0, 50, num_rows)),
        }
    )


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_frame(make_frame(), SCHEMA, "rows")


def assert_equal(one: Encoded, other: Encoded) -> None:
    """Bitwise, NaN included."""
    for field in dataclasses.fields(Encoded):
        first, second = getattr(one, field.name), getattr(other, field.name)
        pairs = [(first, second)] if not hasattr(first, "keys") else [(first[key], second[key]) for key in first]
        for a, b in pairs:
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), field.name


def test_parts_cover_the_rows_in_the_shares_of_the_split(dataset):
    assert [len(dataset.splits[part]) for part in ("train", "valid", "test")] == [320, 40, 40]
    training = dataset.for_training()
    assert (training.train.num_rows, training.valid.num_rows, dataset.open_test().num_rows) == (320, 40, 40)
    assert dataset.for_training() is training
    assert (training.identity, training.schema) == (dataset.identity, dataset.schema)


def test_training_data_has_no_test_rows(dataset):
    """Poisoned test rows: NaN features, flipped and new labels, new items and users. Training does not notice."""
    frame = dataset.frame.with_row_index("row")
    is_test = pl.col("row").is_in(dataset.splits["test"].tolist())
    poison = {"item": "poison", "price": np.nan, "customer": "nobody", "spend": np.inf}
    frame = frame.with_columns(
        *(pl.when(is_test).then(pl.lit(value)).otherwise(name).alias(name) for name, value in poison.items()),
        *(pl.when(is_test).then(1 - pl.col(name)).otherwise(name).alias(name) for name in ("click", "buy")),
    ).drop("row")
    poisoned = dataclasses.replace(dataset, frame=frame)
    assert np.isnan(poisoned.open_test().dense).all()
    assert_equal(dataset.for_training().train, poisoned.for_training().train)
    assert_equal(dataset.for_training().valid, poisoned.for_training().valid)


def test_fitting_sees_train_rows_only(dataset):
    frame = dataset.frame.with_row_index("row")
    in_train = pl.col("row").is_in(dataset.splits["train"].tolist())
    other = frame.with_columns(
        price=pl.when(in_train).then("price").otherwise(pl.col("price") * 100),
        item=pl.when(in_train).then("item").otherwise(pl.lit("i3")),
        spend=pl.when(in_train).then("spend").otherwise(-1.0),
    ).drop("row")
    assert Dataset.from_frame(other, SCHEMA, "rows").schema == dataset.schema


def test_codes_compare_between_parts(dataset):
    training, test = dataset.for_training(), dataset.open_test()
    encoded = {"train": training.train, "valid": training.valid, "test": test}
    for column, codes in (("customer", "user"), ("item", "item")):
        values = np.concatenate([dataset.part(part)[column].to_numpy() for part in encoded])
        numbers = np.concatenate([getattr(rows, codes) for rows in encoded.values()])
        pairs = len(set(zip(values, numbers, strict=True)))
        assert pairs == len(set(values)) == len(set(numbers)) == numbers.max() + 1


@pytest.mark.parametrize("split", ["rows", "time", "cold_user"])
def test_named_splits(split):
    dataset = Dataset.from_frame(make_frame(), SCHEMA, split)
    assert dataset.info["split"] == split
    train, test = dataset.part("train"), dataset.part("test")
    if split == "time":
        assert train["day"].max() <= test["day"].min()
    if split == "cold_user":
        assert not set(train["customer"]) & set(test["customer"])


def test_rows_given_for_each_part():
    parts = {"train": np.arange(300), "valid": np.arange(300, 350), "test": np.arange(350, 400)}
    dataset = Dataset.from_frame(make_frame(), SCHEMA, parts, split_name="time")
    assert dataset.info["split"] == "time"
    np.testing.assert_array_equal(dataset.splits["test"], parts["test"])
    assert Dataset.from_frame(make_frame(), SCHEMA, parts).info["split"] == "given"


def test_the_held_out_domain_gets_an_id_after_the_others():
    frame = make_frame().with_columns(country=pl.Series(np.resize(["nl", "at", "es"], 400)))
    dataset = Dataset.from_frame(frame, SCHEMA, "domain_holdout", split_options={"held": "at"})
    assert dataset.schema.domains == ("es", "nl", "at")
    assert set(dataset.open_test().domain) == {2}
    assert set(dataset.for_training().valid.domain) == {0, 1}


def test_problems_raise_before_anything_is_fitted():
    with pytest.raises(SchemaError, match=r"columns \['price'\] not in table 'table'"):
        Dataset.from_frame(make_frame().drop("price"), SCHEMA)
    with pytest.raises(LabelError, match=r"task 'click' has values \[0, 1, 2\]"):
        Dataset.from_frame(make_frame().with_columns(click=pl.Series([2, *make_frame()["click"][1:]])), SCHEMA)
    with pytest.raises(SchemaError, match=r"repeat another's key \['customer'\]"):
        Dataset.from_frame(make_frame(), SCHEMA, key=["customer"])


def test_identity_covers_rows_recipe_and_split(dataset):
    def identity(frame=None, **options):
        return Dataset.from_frame(make_frame() if frame is None else frame, SCHEMA, **options).identity

    other_row = make_frame().with_columns(price=pl.Series([9.0, *make_frame()["price"][1:]]))
    assert identity() == dataset.identity
    identities = {dataset.identity, identity(seed=1), identity(recipe="b"), identity(split="time"), identity(other_row)}
    assert len(identities) == 5
    assert identity(identity={"file": "a"}) == identity(other_row, identity={"file": "a"}) not in identities


def test_fewer_tasks_keep_their_labels(dataset):
    fewer = dataset.with_tasks(["stars", "spend"])
    assert fewer.schema.task_names == ("stars", "spend")
    assert fewer.identity == dataset.identity
    both, one = dataset.for_training().train, fewer.for_training().train
    assert set(one.labels) == {"stars", "spend"}
    for task in ("stars", "spend"):
        np.testing.assert_array_equal(one.labels[task], both.labels[task])
        np.testing.assert_array_equal(one.mask[task], both.mask[task])
    assert dataset.with_tasks(["buy"]).schema.task("buy").implies is None
    kept = dataset.with_tasks(["buy", "click"])
    assert kept.schema.task("buy").space == kept.schema.task("buy").implies == "click"
    with pytest.raises(SchemaError, match="unknown task 'ctr'"):
        dataset.with_tasks(["ctr"])


def test_summary_counts(dataset):
    summary = dataset.summary()
    train, test = dataset.part("train"), dataset.part("test")
    assert summary["rows"] == {"train": 320, "valid": 40, "test": 40}
    clicks = train.filter(pl.col("click") == 1)
    assert summary["tasks"]["click"]["train"] == {"observed": 320, "positives": clicks.height}
    assert summary["tasks"]["buy"]["train"] == {"observed": clicks.height, "positives": clicks["buy"].sum()}
    spend = clicks.filter(pl.col("buy") == 1)["spend"]
    assert summary["tasks"]["spend"]["train"] == {"observed": len(spend), "mean": pytest.approx(spend.mean())}
    assert sum(summary["tasks"]["stars"]["test"]["classes"].values()) == 40
    assert summary["domains"]["nl"]["test"]["rows"] == (test["country"] == "nl").sum()
    assert summary["domains"]["nl"]["test"]["click"] == test.filter(pl.col("country") == "nl")["click"].sum()
    known = [customer in set(train["customer"]) for customer in test["customer"]]
    assert summary["known_in_train"]["user"]["rows"] == pytest.approx(np.mean(known))
    assert summary["truncated"]["recent"] == pytest.approx((train["recent"].list.len() > 3).mean())
    assert summary["nulls"] == {}
