"""Tasks: kinds, options and the comparison that derives a binary label."""

import dataclasses

import pytest

from mtl_jax.errors import SchemaError
from mtl_jax.tasks import KINDS, Comparison, Task, parse_positive


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("> 3", Comparison(None, ">", 3.0)),
        (">=3", Comparison(None, ">=", 3.0)),
        ("rating > 3", Comparison("rating", ">", 3.0)),
        ("  star rating != -1.5e2 ", Comparison("star rating", "!=", -150.0)),
    ],
)
def test_comparisons_are_read(text, expected):
    assert parse_positive(text) == expected


@pytest.mark.parametrize(
    "text", ["", "3", "rating", "rating > high", "> inf", "1 < rating < 3", "__import__('os') > 0 > 1"]
)
def test_other_text_is_refused(text):
    with pytest.raises(SchemaError, match="is not a comparison; expected"):
        parse_positive(text)


def test_column_of_a_task():
    assert Task("buy", "binary").column == "buy"
    assert Task("click", "binary", "rating", positive="> 3").column == "rating"
    click = Task("click", "binary", positive="rating > 3")
    assert click.column == "rating"
    assert dataclasses.replace(click, weight=2.0).column == "rating"
    with pytest.raises(SchemaError, match="column 'stars' and positive 'rating > 3'; expected one column"):
        Task("click", "binary", "stars", positive="rating > 3")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("clicks", {}, "kind 'clicks'; expected one of"),
        ("binary", {"loss": "squared"}, "loss 'squared'; expected one of"),
        ("regression", {"transform": "sqrt"}, "transform 'sqrt'"),
        ("regression", {"loss": "huber", "delta": 0.0}, "delta 0.0; expected a number > 0"),
        ("multiclass", {"smoothing": 1.0}, "smoothing 1.0"),
        ("multiclass", {"loss": "sampled_softmax"}, "num_sampled 0 with loss 'sampled_softmax'"),
        ("regression", {"positive": "> 3"}, "positive '> 3'; expected it only for kind 'binary'"),
        ("binary", {"weight": float("nan")}, "weight nan"),
    ],
)
def test_wrong_options_are_refused(kind, options, message):
    with pytest.raises(SchemaError, match=message):
        Task("t", kind, **options)


def test_head_width():
    assert Task("a", "binary").width == Task("b", "regression").width == 1
    assert Task("c", "multiclass", classes=(1, 2, 3)).width == 3
    assert Task("c", "multiclass", classes=(1, 2, 3)).classes == ("1", "2", "3")
    with pytest.raises(SchemaError, match="has no classes yet"):
        _ = Task("c", "multiclass").width


def test_only_errors_are_better_when_lower():
    assert {name for name, kind in KINDS.items() if not kind.higher_is_better} == {"regression"}


def test_a_weight_column_leaves_the_loss_factor_at_one():
    assert Task("a", "binary", weight="w").loss_weight == 1.0
    assert Task("a", "binary", weight=3).loss_weight == 3.0
