"""Schema: what it refuses, and that JSON keeps all of it."""

import json

import pytest

from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

SCHEMA = Schema(
    features=(
        Categorical("item", "item"),
        Numeric("price", "log1p", mean=1.5, std=2.0, fill=0.0, missing_indicator=True),
        Numeric("age"),
        MultiHot("tags", "tag", 4, "tag_weights"),
        Sequence("history", "item", 3),
    ),
    vocabularies=(Vocabulary("item", ("a", "b"), 2), Vocabulary("tag", hash_buckets=16)),
    tasks=(
        Task("click", "binary", positive="rating > 3"),
        Task("spend", "regression", transform="log1p", space="click", mean=0.5, std=2.0),
        Task("stars", "multiclass", "rating", classes=("1", "2"), frequencies=(0.25, 0.75)),
    ),
    domain="country",
    domains=("nl", "es"),
    user="u",
    time="day",
    logistic_features=("price",),
    excluded={"later": "an outcome"},
    allow_leak={"age": "known before"},
)


def test_json_keeps_the_schema():
    text = json.dumps(SCHEMA.to_dict())
    assert Schema.from_dict(json.loads(text)) == SCHEMA


def test_columns_of_the_arrays():
    assert SCHEMA.dense_names == ("price", "price__missing", "age")
    assert [v.size for v in SCHEMA.vocabularies] == [4, 18]
    assert SCHEMA.with_tasks(["stars", "click"]).task_names == ("stars", "click")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Schema((Numeric("x"), Numeric("x")), (), ()), r"feature names \['x'\] occur twice"),
        (lambda: Schema((Categorical("x", "v"),), (), ()), "points to vocabulary 'v'"),
        (lambda: Schema((), (), (Task("a", "binary", space="b"),)), "space='b'; expected a binary task"),
        (
            lambda: Schema((), (), (Task("a", "binary", implies="b"), Task("b", "regression"))),
            "implies='b'; expected a binary task",
        ),
        (lambda: SCHEMA.task("ctr"), r"unknown task 'ctr'; the schema has \['click', 'spend', 'stars'\]"),
        (lambda: SCHEMA.vocabulary("shop"), "unknown vocabulary 'shop'"),
        (lambda: Numeric("x", "sqrt"), "transform 'sqrt'"),
    ],
)
def test_refused(build, message):
    with pytest.raises(SchemaError, match=message):
        build()
