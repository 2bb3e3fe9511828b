"""Labels of ordinal, count, zero-inflated and multilabel tasks: from columns to arrays, and what is refused."""

import dataclasses
import datetime

import numpy as np
import polars as pl
import pytest

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.encode import encode, fit_schema
from mtl_jax.data.schema import MultiHot, Numeric, Schema, Vocabulary
from mtl_jax.data.validate import validate
from mtl_jax.errors import LabelError, LeakageError, SchemaError
from mtl_jax.tasks import Task

ROWS = 600
PARTS = {"train": np.arange(400), "valid": np.arange(400, 500), "test": np.arange(500, 600)}


def table(**columns) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    names = np.array(["gift", "new", "sale"])
    frame = {
        "price": rng.normal(size=ROWS),
        "buy": rng.integers(0, 2, ROWS),
        "stars": rng.choice([1, 2, 10], ROWS),
        "visits": rng.poisson(2.0, ROWS),
        "spend": np.where(rng.random(ROWS) < 0.5, rng.gamma(2.0, 5.0, ROWS), 0),
        "tags": [sorted(names[rng.random(3) < 0.4]) for _ in range(ROWS)],
        "is_gift": rng.integers(0, 2, ROWS),
        "is_new": rng.random(ROWS) < 0.5,
        "seen": rng.random(ROWS) < 0.7,
        "weight": rng.random(ROWS),
    }
    return pl.DataFrame(frame | columns, strict=False)


def edited(column, edits):
    values = table()[column].to_list()
    for row, value in edits.items():
        values[row] = value
    return table(**{column: pl.Series(values, dtype=table()[column].dtype, strict=False)})


SCHEMA = Schema(
    features=(Numeric("price"),),
    vocabularies=(),
    tasks=(
        Task("buy", "binary"),
        Task("stars", "ordinal"),
        Task("visits", "count", space="buy"),
        Task("spend", "zero_inflated"),
        Task("tags", "multilabel", mask="seen"),
        Task("flags", "multilabel", ("is_gift", "is_new"), space="buy", weight="weight"),
    ),
)


def dataset(frame=None, **tasks) -> Dataset:
    """The table with these tasks replaced."""
    replaced = tuple(tasks.get(task.name, task) for task in SCHEMA.tasks)
    schema = dataclasses.replace(SCHEMA, tasks=replaced)
    return Dataset("t", "own", table() if frame is None else frame, schema, PARTS, "id", "none", {})


def test_a_sound_table_has_nothing_to_say():
    assert [text for text in validate(dataset()) if "standard error" not in text] == []


def test_arrays_against_a_loop():
    """Nulls: in a list it hides the row, in one of several columns the cell; an empty list is a row of zeros."""
    frame = edited("tags", {0: None, 1: [], 2: ["sale", None, "gift", "sale"]})
    frame = frame.with_columns(is_gift=edited("is_gift", {0: None, 3: None})["is_gift"])
    frame = frame.with_columns(stars=edited("stars", {4: None})["stars"])
    schema = fit_schema(SCHEMA, frame[:400])
    encoded = encode(frame[400:].vstack(frame[:5]), schema)
    rows = frame[400:].vstack(frame[:5]).rows(named=True)

    assert schema.task("stars").classes == ("1", "2", "10")
    assert schema.task("tags").classes == ("gift", "new", "sale")
    assert schema.task("flags").classes == ("is_gift", "is_new")
    expected_tags = [[float(name in (row["tags"] or ())) for name in ("gift", "new", "sale")] for row in rows]
    tags_mask = np.array([[row["tags"] is not None and row["seen"]] * 3 for row in rows])
    flags = [[row["is_gift"], row["is_new"]] for row in rows]
    flags_mask = np.array(
        [[value is not None and row["buy"] == 1 for value in of] for row, of in zip(rows, flags, strict=True)]
    )
    expected = {
        "stars": (
            [{1: 0, 2: 1, 10: 2}.get(row["stars"], 0) for row in rows],
            [row["stars"] is not None for row in rows],
        ),
        "visits": ([row["visits"] * row["buy"] for row in rows], [row["buy"] == 1 for row in rows]),
        "spend": ([row["spend"] for row in rows], [True] * len(rows)),
        "tags": (np.where(tags_mask, expected_tags, 0), tags_mask),
        "flags": (np.where(flags_mask, [[value or 0 for value in of] for of in flags], 0), flags_mask),
    }
    for name, (labels, mask) in expected.items():
        np.testing.assert_array_equal(encoded.mask[name], mask, err_msg=name)
        np.testing.assert_array_equal(encoded.labels[name], np.float32(labels), err_msg=name)
    assert encoded.labels["stars"].dtype == np.int32 and encoded.labels["tags"].dtype == np.float32
    assert encoded.task_weight["flags"].shape == (205,)


def test_class_rates_of_ordinal_tasks_are_smoothed():
    schema = fit_schema(SCHEMA, table()[:400])
    counts = [(table()["stars"][:400] == value).sum() for value in (1, 2, 10)]
    np.testing.assert_allclose(schema.task("stars").frequencies, [(n + 1) / 403 for n in counts])


def test_classes_come_from_observed_training_labels():
    """Not from rows that the task's mask hides, and not from valid or test."""
    frame = edited("tags", {0: ["hidden"], 1: ["seen"], 550: ["late"]})
    frame = frame.with_columns(seen=pl.Series([False, *frame["seen"][1:]]) | (pl.int_range(pl.len()) == 1))
    assert fit_schema(SCHEMA, frame[:400]).task("tags").classes == ("gift", "new", "sale", "seen")


@pytest.mark.parametrize(
    ("dtype", "classes", "expected"),
    [
        (pl.Enum(["poor", "fair", "good"]), None, ("poor", "fair", "good")),
        (pl.String, ("poor", "fair", "good"), ("poor", "fair", "good")),
        (pl.Boolean, None, ("false", "true")),
    ],
)
def test_the_order_of_classes(dtype, classes, expected):
    values = np.array(["poor", "fair", "good"])[np.arange(ROWS) % 3].tolist()
    column = pl.Series(np.arange(ROWS) % 2 == 0) if dtype == pl.Boolean else pl.Series(values, dtype=dtype)
    found = dataset(table(stars=column), stars=Task("stars", "ordinal", classes=classes))
    validate(found)
    assert fit_schema(found.schema, found.part("train")).task("stars").classes == expected


@pytest.mark.parametrize(
    ("frame", "tasks", "error", "message"),
    [
        pytest.param(
            table(stars=["good", "bad"] * 300),
            {},
            SchemaError,
            "'stars' has type String, expected an order for ordinal task 'stars': numbers, an Enum, or Task.classes",
            id="text without an order",
        ),
        pytest.param(
            edited("stars", {450: 3}),
            {},
            LabelError,
            r"task 'stars' has values \['3'\] in valid; expected its classes \['1', '10', '2'\]",
            id="unknown class",
        ),
        pytest.param(
            edited("visits", {0: -1, 1: -2}).with_columns(buy=1),
            {"buy": Task("buy", "binary", "is_new")},
            LabelError,
            "task 'visits' has . values below 0 in train; expected numbers >= 0 for kind 'count'. Use kind='regression'",
            id="negative count",
        ),
        pytest.param(
            edited("spend", {500: float("nan"), 501: float("inf")}),
            {},
            LabelError,
            "task 'spend' has 2 NaN or infinite values in test; expected finite numbers",
            id="NaN amount",
        ),
        pytest.param(
            table(visits=["many"] * ROWS),
            {},
            SchemaError,
            "'visits' has type String, expected a number for count task 'visits'",
            id="text count",
        ),
        pytest.param(
            table(tags=["gift"] * ROWS),
            {},
            SchemaError,
            "'tags' has type String, expected a list of label names, or several 0/1 columns, for multilabel task 'tags'",
            id="text tags",
        ),
        pytest.param(
            table(is_gift=np.arange(ROWS) % 3),
            {},
            LabelError,
            r"task 'flags' has values \[0, 1, 2\]; expected 0 or 1 for kind 'multilabel'. Map 2",
            id="flag of two",
        ),
        pytest.param(
            table(is_gift=[1] * ROWS),
            {},
            LabelError,
            r"task 'flags' has no positive or no negative of \['is_gift'\] in train; expected both of every label",
            id="constant label",
        ),
        pytest.param(
            table(),
            {"tags": Task("tags", "multilabel", classes=("gift", "free"))},
            LabelError,
            r"no positive or no negative of \['free'\] in train; .*Drop these from Task.classes",
            id="label that never occurs",
        ),
        pytest.param(
            table(visits=[3] * ROWS),
            {},
            LabelError,
            "task 'visits' has one value in train, 3.0; expected several",
            id="constant count",
        ),
        pytest.param(
            table(),
            {"flags": Task("flags", "multilabel", ("is_gift", "is_old"))},
            SchemaError,
            r"columns \['is_old'\] not in table 't'.*expected by tasks flags",
            id="missing column",
        ),
    ],
)
def test_refused(frame, tasks, error, message):
    with pytest.raises(error, match=message):
        validate(dataset(frame, **tasks))


def test_dates_are_ordered_but_not_counted():
    days = [datetime.date(2024, 1, 1 + row % 3) for row in range(ROWS)]
    validate(dataset(table(stars=days)))
    with pytest.raises(SchemaError, match="'visits' has type Date, expected a number"):
        validate(dataset(table(visits=days)))


def test_entries_that_are_no_label_are_left_out_with_a_warning():
    frame = edited("tags", {410: ["odd", "gift"], 411: ["odd"]})
    (warning,) = (text for text in validate(dataset(frame)) if "entries" in text)
    assert warning.startswith("2 of ") and "of task 'tags' in valid are none of its 3 labels" in warning
    assert "['odd']" in warning


def test_a_label_that_is_constant_in_a_part_is_a_warning():
    frame = edited("is_gift", dict.fromkeys(range(500, 600), 0))
    warnings = validate(dataset(frame))
    expected = "task 'flags' has no positive or no negative of ['is_gift'] in test; its auc is over the other labels"
    assert expected in warnings


@pytest.mark.parametrize(
    ("column", "told", "values"),
    [
        ("code", r"\|Spearman\| 1.000 for 'stars'", lambda t: t["stars"] * 7),
        ("code", r"\|Spearman\| 1.000 for 'visits'", lambda t: t["visits"] + 0.5),
        ("code", r"\|Spearman\| 1.000 for 'spend'", lambda t: t["spend"] ** 2),
        ("code", "AUC 1.000 for 'tags:new'", lambda t: t["tags"].list.contains("new").cast(pl.Float64)),
        ("code", "AUC 1.000 for 'flags:is_new'", lambda t: t["is_new"].cast(pl.Float64)),
    ],
)
def test_a_feature_that_tells_a_label_is_found(column, told, values):
    frame = table().with_columns(values(table()).alias(column))
    leaky = dataset(frame)
    schema = dataclasses.replace(leaky.schema, features=(Numeric("price"), Numeric(column)))
    with pytest.raises(LeakageError, match=f"feature 'code' alone has {told}"):
        validate(dataclasses.replace(leaky, schema=schema))


def test_label_columns_are_no_features():
    schema = dataclasses.replace(SCHEMA, features=(Numeric("is_gift"), Numeric("price")))
    with pytest.raises(LeakageError, match="feature 'is_gift' is the label of task 'flags:is_gift'"):
        validate(dataclasses.replace(dataset(), schema=schema))
    bags = dataclasses.replace(SCHEMA, features=(MultiHot("tags", "v", 3),), vocabularies=(Vocabulary("v"),))
    with pytest.raises(LeakageError, match="feature 'tags' is the label of task 'tags:tags'"):
        validate(dataclasses.replace(dataset(), schema=bags))


def test_a_data_set_of_all_of_them():
    """Summary, JSON of the schema, and tasks of a space that is dropped."""
    built = Dataset.from_frame(table(), SCHEMA, PARTS)
    facts = built.summary()["tasks"]
    train = table()[:400]
    assert list(facts["stars"]["train"]["classes"]) == ["1", "2", "10"]
    assert facts["spend"]["train"]["positives"] == (train["spend"] > 0).sum()
    seen = train.filter("seen")["tags"]
    assert facts["tags"]["train"] == {
        "observed": 3 * len(seen),
        "classes": {name: seen.list.contains(name).sum() for name in ("gift", "new", "sale")},
    }
    assert Schema.from_dict(built.schema.to_dict()) == built.schema
    kept = built.with_tasks(["flags", "visits"])
    one, other = kept.for_training().train, built.for_training().train
    for name in ("flags", "visits"):
        np.testing.assert_array_equal(one.mask[name], other.mask[name])
        np.testing.assert_array_equal(one.labels[name], other.labels[name])
