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
        ("zero_inflated", {"transform": "log1p"}, "transform 'log1p'; expected it only for kind 'regression'"),
        ("ordinal", {"implies": "buy"}, "implies 'buy'; expected it only for kind 'binary'"),
        ("count", {"loss": "ziln"}, r"loss 'ziln'; expected one of \['poisson', 'negative_binomial'\]"),
        ("binary", {"column": ("a", "b")}, r"columns \('a', 'b'\); expected one column, except for 'multilabel'"),
        ("multilabel", {"column": ("a", "b"), "classes": ("x",)}, "expected one class a column"),
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


def test_what_losses_and_metrics_read_is_not_always_what_the_tower_gives():
    """(width of the tower, axes of the outputs): cutpoints and dispersion turn one score into several numbers."""
    shapes = {
        Task("a", "binary"): (1, ()),
        Task("b", "multiclass", classes="xyz"): (3, (3,)),
        Task("c", "multilabel", classes="x"): (1, (1,)),
        Task("d", "ordinal", classes="xyz"): (1, (2,)),
        Task("e", "count"): (1, ()),
        Task("f", "count", loss="negative_binomial"): (1, (2,)),
        Task("g", "zero_inflated"): (3, (3,)),
    }
    assert {task: (task.width, task.output_shape) for task in shapes} == shapes


def test_several_columns_of_a_multilabel_task_name_its_labels():
    task = Task("tags", "multilabel", ["is_new", "is_gift"])
    assert task.columns == task.classes == ("is_new", "is_gift")
    assert Task("tags", "multilabel", ["is_new", "is_gift"], classes=["new", "gift"]).classes == ("new", "gift")
    assert Task("tags", "multilabel").columns == ("tags",)


def test_only_errors_are_better_when_lower():
    errors = {name for name, kind in KINDS.items() if not kind.higher_is_better}
    assert errors == {"regression", "count", "zero_inflated"}


def test_a_weight_column_leaves_the_loss_factor_at_one():
    assert Task("a", "binary", weight="w").loss_weight == 1.0
    assert Task("a", "binary", weight=3).loss_weight == 3.0
