"""Folds: a partition of train and valid in hash order, the test part untouched, nothing fitted outside train."""

import dataclasses

import numpy as np
import polars as pl
import pytest

import mtl_jax
from mtl_jax.data import Categorical, Dataset, Numeric, Schema, Vocabulary, splits
from mtl_jax.data.folds import Folds
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

NUM_ROWS = 300
KEYS = {"user": "user", "time": "time", "domain": "domain"}


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    amount = rng.normal(size=NUM_ROWS)
    return pl.DataFrame(
        {
            "user": [f"u{code}" for code in rng.integers(0, 40, NUM_ROWS)],
            "time": rng.permutation(NUM_ROWS),
            "domain": rng.choice(["nl", "es", "fr"], NUM_ROWS),
            "household": [f"h{code}" for code in rng.integers(0, 25, NUM_ROWS)],
            "amount": amount,
            "buy": (amount + rng.normal(size=NUM_ROWS) > 0).astype(np.int8),
        }
    )


@pytest.fixture(scope="module")
def schema():
    return Schema(
        (Categorical("user", "user"), Numeric("amount")), (Vocabulary("user"),), (Task("buy", "binary"),), user="user"
    )


@pytest.mark.parametrize(
    ("name", "options", "unit"),
    [
        ("rows", {}, None),
        ("cold_user", {}, "user"),
        ("cold_user", {"column": "household"}, "household"),
        ("rows", {"group": "household"}, "household"),
        ("domain_holdout", {"held": "fr"}, None),
        ("domain_holdout", {"held": "fr", "by": "cold_user"}, "user"),
        ("given", {"parts": np.arange(NUM_ROWS), "column": "household"}, "household"),
    ],
)
def test_folds_partition_train_and_valid_by_the_unit_of_the_split(frame, name, options, unit):
    base = splits.split(frame, name, **KEYS, **options)
    every = [splits.split(frame, name, **KEYS, **options, folds=Folds(4, held)) for held in range(4)]
    pool = np.sort(np.concatenate([base["train"], base["valid"]]))
    assert np.array_equal(np.sort(np.concatenate([parts["valid"] for parts in every])), pool)
    for parts in every:
        assert list(parts) == ["train", "valid", "test"]
        assert np.array_equal(parts["test"], base["test"])
        assert np.array_equal(np.sort(np.concatenate([parts["train"], parts["valid"]])), pool)
        assert np.all(np.diff(parts["train"]) > 0) and np.all(np.diff(parts["valid"]) > 0)
        if unit is not None:
            assert not set(frame[unit][parts["train"]]) & set(frame[unit][parts["valid"]])
    sizes = [len(set(frame[unit][p["valid"]])) if unit else len(p["valid"]) for p in every]
    assert max(sizes) - min(sizes) <= 1


def test_folds_are_stretches_of_the_hash_order(frame):
    parts = splits.rows(frame, seed=3)
    pool = np.concatenate([parts["train"], parts["valid"]]).tolist()
    order = sorted(pool, key=lambda row: splits.key_hash(row, 3))
    found = splits.split(frame, "rows", seed=3, folds=Folds(7, 2))
    start, end = len(pool) * 2 // 7, len(pool) * 3 // 7
    assert found["valid"].tolist() == sorted(order[start:end])


@pytest.mark.parametrize("name", ["time", "user_time", "leave_last"])
def test_splits_by_time_need_a_group(frame, name):
    with pytest.raises(SchemaError, match=rf"split '{name}' cut into 3 folds .* expected .* data\.split_group"):
        splits.split(frame, name, **KEYS, folds=Folds(3, 0))
    parts = splits.split(frame, name, **KEYS, folds=Folds(3, 0, "household"))
    assert np.array_equal(parts["test"], splits.split(frame, name, **KEYS)["test"])
    assert not set(frame["household"][parts["train"]]) & set(frame["household"][parts["valid"]])


def test_a_grouped_fold_of_a_temporal_split_passes_validation(frame, schema):
    """Its test part comes after train and valid, whose times are mixed."""
    timed = dataclasses.replace(schema, time="time")
    options = {"folds": Folds(3, 1, "household")}
    dataset = Dataset.from_frame(frame, timed, "time", split_options=options)
    time = frame["time"].to_numpy()
    last = {part: time[rows].max() for part, rows in dataset.splits.items()}
    assert last["train"] > time[dataset.splits["valid"]].min()
    assert max(last["train"], last["valid"]) < time[dataset.splits["test"]].min()


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ((1, 0, None), "split_folds is 1; expected a whole number >= 2"),
        ((2.5, 0, None), r"split_folds is 2\.5"),
        ((True, 0, None), "split_folds is True"),
        ((3, 3, None), "split_fold is 3 of 3 folds; expected one of 0 to 2"),
        ((3, None, None), "split_fold is None of 3 folds"),
        ((None, 1, None), r"split_fold is 1 without folds; .* Set data\.split_folds"),
        ((None, None, "user"), "split_group is 'user' without folds"),
    ],
)
def test_numbers_out_of_range_are_refused(folds, message):
    number, held, group = folds
    with pytest.raises(SchemaError, match=message):
        mtl_jax.data.load("synthetic", num_rows=60, dim=3, split_folds=number, split_fold=held, split_group=group)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        (Folds(3, 0, "shop"), r"group column 'shop' is not in the table; expected one of \['user'"),
        (Folds(400, 0), "27[0-9] rows for 400 folds; expected at least one a fold"),
        (Folds(40, 0, "household"), "25 values of 'household' for 40 folds"),
        (Folds(3, 0, "hole"), "group column 'hole' has 30[0-9]* nulls|group column 'hole' has 2[0-9]+ nulls"),
    ],
)
def test_columns_that_cannot_be_units_are_refused(frame, folds, message):
    with_hole = frame.with_columns(hole=pl.lit(None, pl.String))
    with pytest.raises(SchemaError, match=message):
        splits.split(with_hole, "rows", folds=folds)


def test_everything_is_fitted_on_the_training_rows_of_the_fold(frame, schema):
    sets = [Dataset.from_frame(frame, schema, "cold_user", split_options={"folds": Folds(4, i)}) for i in range(4)]
    for dataset in sets:
        train = frame[dataset.splits["train"]]
        assert set(dataset.schema.vocabulary("user").values) == set(train["user"])
        (numeric,) = dataset.schema.numerics
        assert numeric.mean == pytest.approx(train["amount"].mean(), abs=1e-12)
    assert len({dataset.identity for dataset in sets}) == 4


def test_a_feature_by_which_rows_are_grouped_is_new_in_every_fold(frame):
    """As with a cold split: a warning, and not the error about parts that share no ids."""
    grouped = Schema((Categorical("household", "h"), Numeric("amount")), (Vocabulary("h"),), (Task("buy", "binary"),))
    wide = frame.with_columns(household=pl.Series([f"h{i % 150}" for i in range(NUM_ROWS)]))
    dataset = Dataset.from_frame(wide, grouped, "rows", split_options={"folds": Folds(4, 0, "household")})
    assert any("valid values of 'household' (100.0 %)" in warning for warning in dataset.info["warnings"])
    assert dataset.info["split_options"] == {"folds": {"number": 4, "held": 0, "group": "household"}}


def test_without_folds_the_identity_is_that_of_before():
    plain = mtl_jax.data.load("synthetic", num_rows=120, dim=3)
    asked = mtl_jax.data.load("synthetic", num_rows=120, dim=3, split_folds=None, split_fold=None)
    assert plain.identity == asked.identity and "folds" not in plain.info["split_options"]
    folded = mtl_jax.data.load("synthetic", num_rows=120, dim=3, split_folds=3, split_fold=1)
    assert folded.identity != plain.identity
    assert np.array_equal(folded.splits["test"], plain.splits["test"])


def test_what_the_test_rows_hold_reaches_no_training_array(frame, schema):
    """NaN features and flipped labels in the test part: not one bit of the training data moves."""
    options = {"folds": Folds(4, 2)}
    clean = Dataset.from_frame(frame, schema, "cold_user", split_options=options)
    is_test = pl.Series(np.isin(np.arange(NUM_ROWS), clean.splits["test"]))
    poisoned_frame = frame.with_columns(
        amount=pl.when(is_test).then(float("nan")).otherwise(pl.col("amount")),
        buy=pl.when(is_test).then(1 - pl.col("buy")).otherwise(pl.col("buy")),
    )
    poisoned = dataclasses.replace(clean, frame=poisoned_frame)
    refitted = mtl_jax.data.fit_schema(schema, poisoned.part("train"))
    assert refitted == dataclasses.replace(clean.schema, domains=refitted.domains)
    for part in ("train", "valid"):
        one, two = (getattr(dataset.for_training(), part) for dataset in (clean, poisoned))
        for name in ("ids", "dense", "weight", "user"):
            assert np.array_equal(getattr(one, name), getattr(two, name))
        assert np.array_equal(one.labels["buy"], two.labels["buy"])
    assert np.isnan(poisoned.open_test().dense).any() or not np.array_equal(
        poisoned.open_test().dense, clean.open_test().dense
    )
