"""Validation of columns, numbers and labels: each check on a table that breaks it, and on one that does not."""

import dataclasses
import math

import numpy as np
import polars as pl
import pytest

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.label_checks import auc_standard_error
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.data.validate import validate
from mtl_jax.errors import LabelError, SchemaError
from mtl_jax.tasks import Task

PARTS = {"train": np.arange(600), "valid": np.arange(600, 900), "test": np.arange(900, 1200)}


def table(**columns) -> pl.DataFrame:
    """1,200 sound rows, with these columns replaced or added."""
    rng = np.random.default_rng(0)
    click = rng.random(1200) < 0.5
    frame = pl.DataFrame(
        {
            "shop": [f"s{i}" for i in rng.integers(0, 30, 1200)],
            "price": rng.gamma(2.0, 1.0, 1200),
            "tags": [[f"t{i}" for i in rng.integers(0, 5, 2)] for _ in range(1200)],
            "click": click.astype(int),
            "buy": (click & (rng.random(1200) < 0.85)).astype(int),
            "spend": rng.gamma(1.0, 1.0, 1200),
            "stars": rng.integers(1, 6, 1200),
            "country": rng.choice(["es", "nl"], 1200).tolist(),
            "w": rng.random(1200),
        }
    )
    return frame.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


SCHEMA = Schema(
    features=(Categorical("shop", "shop"), Numeric("price", "log1p"), MultiHot("tags", "tags", 2)),
    vocabularies=(Vocabulary("shop"), Vocabulary("tags")),
    tasks=(
        Task("click", "binary"),
        Task("buy", "binary", implies="click"),
        Task("spend", "regression", transform="log1p", space="buy"),
        Task("stars", "multiclass"),
    ),
    domain="country",
    weight="w",
)


def dataset(frame=None, schema=SCHEMA, parts=PARTS, **info) -> Dataset:
    frame = table() if frame is None else frame
    return Dataset("lines", "own", frame, schema, parts, "id", "none", info)


def edited(column: str, edits: dict) -> pl.DataFrame:
    """The sound table with row -> value replaced in one column."""
    values = table()[column].to_list()
    for row, value in edits.items():
        values[row] = value
    return table(**{column: values})


def changed(**fields) -> Schema:
    return dataclasses.replace(SCHEMA, **fields)


def test_a_sound_table_has_nothing_to_say():
    assert validate(dataset()) == []


@pytest.mark.parametrize(
    ("frame", "schema", "message"),
    [
        pytest.param(
            table().drop("price", "tags", "buy"),
            SCHEMA,
            r"columns \['price', 'tags', 'buy'\] not in table 'lines' \(has \['shop', 'click'.*\]\); expected by "
            "features price, tags and tasks buy. Rename them or drop the features and tasks",
            id="missing columns",
        ),
        pytest.param(
            table(price=["dear"] * 1200, shop=[["a"]] * 1200, tags=["t"] * 1200),
            SCHEMA,
            r"'shop' has type List\(String\), expected one value a row.*'price' has type String, expected a number for "
            "Numeric; 'tags' has type String, expected a list column for MultiHot",
            id="wrong types",
        ),
        pytest.param(
            table(click=["yes"] * 1200),
            SCHEMA,
            "'click' has type String, expected a number for binary",
            id="text label",
        ),
        pytest.param(
            edited("price", {0: math.nan, 5: math.nan, 700: math.inf}),
            SCHEMA,
            "'price' has 2 NaN in train, 'price' has 1 infinite values in valid; expected numbers. Convert them "
            "to null or set Numeric.fill",
            id="NaN and infinite features",
        ),
        pytest.param(
            edited("price", {3: -0.5}),
            SCHEMA,
            "'price' has 1 values below 0 in train; expected none for transform 'log1p'. Use 'signed_log1p'",
            id="log of negative numbers",
        ),
        pytest.param(
            edited("w", {3: -1.0, 8: None}),
            SCHEMA,
            "weight column 'w' has 1 negative values, weight column 'w' has 1 null.*expected finite numbers >= 0",
            id="negative weights",
        ),
        pytest.param(
            edited("country", {3: "us"}),
            changed(domains=("es", "nl")),
            r"unknown domains \['us'\] in column 'country'; the schema has \['es', 'nl'\]",
            id="unknown domain",
        ),
        pytest.param(edited("country", {3: None}), SCHEMA, r"unknown domains \['null'\]", id="null domain"),
    ],
)
def test_schema_errors(frame, schema, message):
    with pytest.raises(SchemaError, match=message):
        validate(dataset(frame, schema))


def test_what_the_schema_errors_allow():
    """Nulls, a declared fill, a signed logarithm, all domains declared, weights of zero."""
    frame = edited("price", {0: math.nan, 1: None, 2: -3.0})
    features = (SCHEMA.features[0], Numeric("price", "signed_log1p", fill=0.0), SCHEMA.features[2])
    assert validate(dataset(frame, changed(features=features))) == []
    assert validate(dataset(edited("w", {3: 0.0}), changed(domains=("us", "nl", "es")))) == []


def test_parts_must_have_rows_of_the_table_once():
    with pytest.raises(SchemaError, match=r"splits \['test'\] have 0 of 1200 rows; expected at least 1 in each"):
        validate(dataset(parts=PARTS | {"test": np.array([], int)}))
    with pytest.raises(SchemaError, match="row numbers 0 to 1200; expected 0 to 1199"):
        validate(dataset(parts=PARTS | {"test": np.arange(900, 1201)}))
    with pytest.raises(SchemaError, match=r"100 row numbers occur twice in \['train', 'valid', 'test'\]"):
        validate(dataset(parts=PARTS | {"test": np.arange(800, 1200)}))
    assert validate(dataset(parts=PARTS | {"train": np.arange(0, 600, 2)})) == []


def test_keys_may_not_repeat_within_a_part():
    numbered = table(number=np.arange(1200) % 600)
    assert validate(dataset(numbered, key=["number"])) == []
    with pytest.raises(SchemaError, match=r"300 rows of train repeat another's key \['number'\]"):
        validate(dataset(table(number=np.arange(1200) % 300), key=["number"]))


def test_unseen_categories():
    frame = edited("shop", {1000: "new", 1001: "newer", 700: "new"})
    warning = (
        "1 of 31 valid values of 'shop' (3.2 %), 2 of 32 test values of 'shop' (6.2 %) are not in train; expected few. "
        "They share id 1: set min_count=2 or id_dropout so that row is trained"
    )
    assert validate(dataset(frame)) == [warning]
    assert validate(dataset(frame, changed(vocabularies=(Vocabulary("shop", min_count=2), Vocabulary("tags"))))) == []


def test_a_shared_vocabulary_knows_the_values_of_all_its_features():
    frame = edited("shop", {1000: "t0"})
    shared = changed(
        features=(Categorical("shop", "all"), Numeric("price"), Sequence("tags", "all", 2)),
        vocabularies=(Vocabulary("all"),),
    )
    assert validate(dataset(frame, shared)) == []


def test_parts_without_common_ids():
    shops = np.where(np.arange(1200) < 600, "a", "b").tolist()
    frame = table(shop=[f"{half}{i % 30}" for i, half in enumerate(shops)])
    with pytest.raises(
        SchemaError, match=r"30 of 30 test values of 'shop' \(100.0 %\) are not in train: the splits do not"
    ):
        validate(dataset(frame))
    cold = dataset(frame, changed(user="shop"), PARTS | {"valid": np.arange(600, 615), "test": np.arange(615, 630)})
    [warning, *_] = [w for w in validate(dataclasses.replace(cold, info={"split": "cold_user"})) if "in train" in w]
    assert "15 of 15 test values of 'shop'" in warning


@pytest.mark.parametrize(
    ("frame", "schema", "message"),
    [
        pytest.param(
            edited("click", {0: 2, 1000: 2}),
            SCHEMA,
            r"task 'click' has values \[0, 1, 2\]; expected 0 or 1 for kind 'binary'. Use kind='multiclass' or map 2",
            id="binary",
        ),
        pytest.param(
            table(click=[math.nan, *table()["click"].to_list()[1:]]),
            SCHEMA,
            r"values \[0, 1, nan\]; expected 0 or 1",
            id="NaN",
        ),
        pytest.param(
            table(rating=[math.nan, *[4.0, 2.0] * 599, 1.0]),
            changed(tasks=(Task("liked", "binary", positive="rating > 3"),)),
            r"task 'liked' has values \[0, 1, nan\]",
            id="NaN in a comparison",
        ),
        pytest.param(
            table(spend=[-2.0, math.inf] * 600),
            changed(tasks=(Task("spend", "regression", transform="log1p"),)),
            "task 'spend' has 600 NaN or infinite values after log1p in train; expected finite numbers",
            id="regression",
        ),
        pytest.param(
            edited("stars", {1000: 9}),
            SCHEMA,
            r"task 'stars' has values \['9'\] in test; expected its classes \['1', '2', '3', '4', '5'\]",
            id="multiclass",
        ),
        pytest.param(
            table(click=[1] * 1200),
            SCHEMA,
            "task 'click' has 0 negatives of 600 in train; expected both",
            id="constant train",
        ),
        pytest.param(
            table(buy=[*table()["buy"][:900], *[0] * 300]),
            SCHEMA,
            "task 'buy' has 0 positives of 300 in test; expected both labels, AUC is undefined",
            id="constant test",
        ),
        pytest.param(
            table(stars=[3] * 1200), SCHEMA, "task 'stars' has one value in train, 3; expected several", id="one class"
        ),
        pytest.param(
            table(click=[None] * 600 + table()["click"].to_list()[600:]),
            changed(tasks=(Task("click", "binary"),)),
            "task 'click' has no observed label in train",
            id="nothing observed",
        ),
        pytest.param(
            table(buy=[1] * 3 + table()["buy"].to_list()[3:], click=[0] * 3 + table()["click"].to_list()[3:]),
            SCHEMA,
            "3 rows have buy=1 and click=0, but buy implies click. Fix the labels or remove Task.implies",
            id="nesting",
        ),
    ],
)
def test_label_errors(frame, schema, message):
    with pytest.raises(LabelError, match=message):
        validate(dataset(frame, schema))


def test_what_the_label_errors_allow():
    """Odd values where the label is unobserved or out of space, declared classes, labels without declared nesting."""
    masked = table(click=[2, *table()["click"].to_list()[1:]], seen=[False, *[True] * 1199])
    assert validate(dataset(masked, changed(tasks=(Task("click", "binary", mask="seen"),)))) == []
    outside = table(spend=np.where(table()["buy"].to_numpy() == 1, 1.0 + np.arange(1200), np.nan))
    assert validate(dataset(outside)) == []
    declared = changed(tasks=(Task("stars", "multiclass", classes=tuple("123459")),))
    assert validate(dataset(edited("stars", {1000: 9}), declared)) == []
    free = changed(tasks=(Task("click", "binary"), Task("buy", "binary")))
    assert validate(dataset(table(buy=1 - table()["click"].to_numpy()), free)) == []


def test_a_constant_label_in_one_domain_is_a_warning():
    frame = table(
        country=["nl"] * 890 + ["es"] * 20 + ["nl"] * 290, buy=[*table()["buy"][:900], *[0] * 10, *table()["buy"][910:]]
    )
    [warning] = [w for w in validate(dataset(frame)) if "domain" in w]
    assert (
        warning == "task 'buy' in domain 'es' has 0 positives of 10 in test: AUC is undefined there and reported as n/a"
    )


def test_labels_observed_in_train_only_are_a_warning():
    schema = changed(tasks=(Task("click", "binary", mask="seen"),))
    assert validate(dataset(table(seen=np.arange(1200) < 900), schema)) == [
        "task 'click' has no observed label in test; its metrics are reported as n/a there"
    ]


def test_few_positives_are_a_warning():
    few = np.zeros(1200, int)
    few[::7] = 1
    [warning] = validate(dataset(table(click=few), changed(tasks=(Task("click", "binary"),))))
    assert "task 'click' has 43 positives in test: standard error of AUC is about 0.03; do not rank methods" == warning


def test_auc_standard_error_equals_simulation():
    """Exponential scores with AUC .9, for which Hanley and McNeil's formula is exact."""
    rng = np.random.default_rng(0)
    positive, negative = rng.exponential(9, (4000, 43)), np.sort(rng.exponential(1, (4000, 257)), axis=1)
    areas = [np.searchsorted(n, p).mean() / 257 for p, n in zip(positive, negative, strict=True)]
    assert np.mean(areas) == pytest.approx(0.9, abs=0.002)
    assert np.std(areas) == pytest.approx(auc_standard_error(43, 257), rel=0.05)
