"""Encoding against a plain Python loop, and its invariances."""

import dataclasses
import math
import warnings

import numpy as np
import polars as pl
import pytest

from mtl_jax.data.encode import encode, fit_schema
from mtl_jax.data.hash_order import key_hash
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

SHOPS = pl.Enum(["north", "south", "west", "shut"])


def make_frame(num_rows: int, seed: int = 0) -> pl.DataFrame:
    """Every type of column, with nulls, unseen values, empty and null lists."""
    rng = np.random.default_rng(seed)

    def maybe(values, share=0.15):
        return [None if rng.random() < share else value for value in values]

    def lists(choices):
        drawn = [list(rng.choice(choices, size=rng.integers(0, 6))) for _ in range(num_rows)]
        return maybe([maybe(entries, 0.1) for entries in drawn], 0.1)

    rating = maybe([float(value) for value in rng.integers(1, 6, num_rows)])
    tags = lists([3, 14, 15])
    return pl.DataFrame(
        {
            "item": maybe(rng.integers(0, 9, num_rows).tolist()),
            "shop": pl.Series(maybe(rng.choice(["north", "south", "west"], num_rows).tolist()), dtype=SHOPS),
            "member": maybe((rng.random(num_rows) < 0.5).tolist()),
            "price": maybe(rng.gamma(2.0, 5.0, num_rows).tolist()),
            "balance": rng.normal(0, 50, num_rows),
            "tags": pl.Series(tags, dtype=pl.List(pl.Int64)),
            "tag_weights": pl.Series(
                [None if t is None else rng.random(len(t)).tolist() for t in tags], dtype=pl.List(pl.Float64)
            ),
            "recent": pl.Series(lists(["north", "south"]), dtype=pl.List(SHOPS)),
            "rating": rating,
            "click": maybe(rng.integers(0, 2, num_rows).tolist()),
            "buy": pl.Series(rng.random(num_rows) < 0.5),
            "spend": rng.gamma(1.0, 10.0, num_rows),
            "seen": pl.Series(rng.random(num_rows) < 0.8),
            "kind": rng.choice(["b", "a", "c"], num_rows).tolist(),
            "w": rng.random(num_rows),
            "country": rng.choice(["nl", "es"], num_rows).tolist(),
            "user": [f"u{i}" for i in rng.integers(0, 7, num_rows)],
        }
    )


SCHEMA = Schema(
    features=(
        Categorical("item", "item"),
        Categorical("shop", "shop"),
        Categorical("member", "member"),
        Numeric("price", "log1p"),
        Numeric("balance", "signed_log1p", clip=1.2),
        MultiHot("tags", "tags", 3, "tag_weights"),
        Sequence("recent", "shop", 2),
    ),
    vocabularies=(Vocabulary("item", min_count=3), Vocabulary("shop"), Vocabulary("member"), Vocabulary("tags")),
    tasks=(
        Task("click", "binary", weight="w"),
        Task("conversion", "binary", "buy", space="click", mask="seen"),
        Task("spend", "regression", transform="log1p", space="conversion"),
        Task("liked", "binary", positive="rating > 3"),
        Task("stars", "multiclass", "rating"),
        Task("kind", "multiclass"),
    ),
    domain="country",
    user="user",
    weight="w",
)


def text(value) -> str:
    return "<null>" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def loop_vocabulary(columns, min_count=1) -> list[str]:
    counts: dict[str, int] = {}
    for column in columns:
        for value in column:
            for entry in value if isinstance(value, list) else [value]:
                counts[text(entry)] = counts.get(text(entry), 0) + 1
    return sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))


def loop_id(value, vocabulary) -> int:
    return vocabulary.index(text(value)) + 2 if text(value) in vocabulary else 1


def loop_standardised(train, values, transform, clip):
    transformed = [None if v is None else transform(v) for v in train]
    known = [v for v in transformed if v is not None]
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / len(known))
    return [0.0 if v is None else min(max((transform(v) - mean) / std, -clip), clip) for v in values]


@pytest.fixture(scope="module")
def frames():
    return make_frame(150), make_frame(60, seed=1)


@pytest.fixture(scope="module")
def fitted(frames):
    return fit_schema(SCHEMA, frames[0])


@pytest.fixture(scope="module")
def encoded(frames, fitted):
    return encode(frames[1], fitted)


def test_vocabularies_are_sorted_by_count_then_value(frames, fitted):
    train = frames[0].to_dict(as_series=False)
    lists = [value for value in train["recent"] if value is not None]
    assert list(fitted.vocabulary("item").values) == loop_vocabulary([train["item"]], 3)
    assert list(fitted.vocabulary("shop").values) == loop_vocabulary([train["shop"], lists])
    assert "<null>" in fitted.vocabulary("item").values
    assert "shut" not in fitted.vocabulary("shop").values


def test_ids_equal_the_loop(frames, fitted, encoded):
    for column, name in enumerate(("item", "shop", "member")):
        vocabulary = list(fitted.vocabulary(name).values)
        expected = [loop_id(value, vocabulary) for value in frames[1][name].to_list()]
        assert encoded.ids[:, column].tolist() == expected
    assert encoded.ids.dtype == np.int32


def test_numbers_equal_the_loop(frames, fitted, encoded):
    assert fitted.dense_names == ("price", "price__missing", "balance")
    train, rows = (frame.to_dict(as_series=False) for frame in frames)
    price = loop_standardised(train["price"], rows["price"], math.log1p, 10.0)
    balance = loop_standardised(train["balance"], rows["balance"], lambda v: math.copysign(math.log1p(abs(v)), v), 1.2)
    missing = [float(value is None) for value in rows["price"]]
    np.testing.assert_allclose(encoded.dense, np.transpose([price, missing, balance]), rtol=1e-5, atol=1e-6)
    assert encoded.dense.dtype == np.float32
    assert np.abs(encoded.dense[:, 2]).max() == np.float32(1.2)


def test_lists_equal_the_loop(frames, fitted, encoded):
    rows = frames[1].to_dict(as_series=False)
    tags, shops = (list(fitted.vocabulary(name).values) for name in ("tags", "shop"))
    for row in range(frames[1].height):
        entries, weights = rows["tags"][row] or [], rows["tag_weights"][row] or []
        ids = [loop_id(value, tags) for value in entries][:3]
        np.testing.assert_array_equal(encoded.bags["tags"][0][row], ids + [0] * (3 - len(ids)))
        np.testing.assert_allclose(encoded.bags["tags"][1][row], weights[:3] + [0.0] * (3 - len(ids)), rtol=1e-6)
        history = [loop_id(value, shops) for value in rows["recent"][row] or []][-2:]
        np.testing.assert_array_equal(encoded.sequences["recent"][row], history + [0] * (2 - len(history)))


def test_labels_and_masks_equal_the_loop(frames, fitted, encoded):
    train, rows = (list(frame.iter_rows(named=True)) for frame in frames)

    def in_space(row, task):
        clicked = row["click"] is not None
        bought = clicked and row["click"] == 1 and row["seen"]
        return {
            "click": clicked,
            "conversion": bought,
            "spend": bought and row["buy"],
            "liked": row["rating"] is not None,
            "stars": row["rating"] is not None,
            "kind": True,
        }[task]

    spends = [math.log1p(row["spend"]) for row in train if in_space(row, "spend")]
    mean, std = np.mean(spends), np.std(spends)
    value = {
        "click": lambda row: row["click"],
        "conversion": lambda row: row["buy"],
        "spend": lambda row: (math.log1p(row["spend"]) - mean) / std,
        "liked": lambda row: row["rating"] > 3,
        "stars": lambda row: int(row["rating"]) - 1,
        "kind": lambda row: "abc".index(row["kind"]),
    }
    assert fitted.task("stars").classes == ("1", "2", "3", "4", "5")
    for task in SCHEMA.task_names:
        mask = [in_space(row, task) for row in rows]
        expected = [float(value[task](row)) if seen else 0.0 for row, seen in zip(rows, mask, strict=True)]
        np.testing.assert_array_equal(encoded.mask[task], mask)
        np.testing.assert_allclose(encoded.labels[task], expected, rtol=1e-5, atol=1e-6)
    assert encoded.labels["kind"].dtype == np.int32
    assert encoded.labels["click"].dtype == np.float32


def test_class_frequencies_are_shares_of_observed_train_labels(frames, fitted):
    stars = [value for value in frames[0]["rating"].to_list() if value is not None]
    np.testing.assert_allclose(fitted.task("stars").frequencies, [stars.count(v) / len(stars) for v in range(1, 6)])


def test_weights_domains_and_users(frames, fitted, encoded):
    rows = frames[1]
    np.testing.assert_allclose(encoded.weight, rows["w"].to_numpy(), rtol=1e-6)
    assert set(encoded.task_weight) == {"click"}
    np.testing.assert_allclose(encoded.task_weight["click"], rows["w"].to_numpy(), rtol=1e-6)
    assert fitted.domains == ("es", "nl")
    assert [fitted.domains[d] for d in encoded.domain] == rows["country"].to_list()
    users = rows["user"].to_list()
    assert (
        len(set(zip(users, encoded.user.tolist(), strict=True))) == len(set(users)) == len(set(encoded.user.tolist()))
    )
    assert encoded.item is None


def test_permuted_rows_give_permuted_arrays(frames, fitted, encoded):
    order = np.random.default_rng(2).permutation(frames[1].height)
    permuted = encode(frames[1][order], fitted, user_codes=encoded.user[order])
    for name in ("ids", "dense", "weight", "domain", "user"):
        np.testing.assert_array_equal(getattr(permuted, name), getattr(encoded, name)[order])
    for name in ("labels", "mask", "sequences"):
        for key, array in getattr(encoded, name).items():
            np.testing.assert_array_equal(getattr(permuted, name)[key], array[order])
    np.testing.assert_array_equal(permuted.bags["tags"][1], encoded.bags["tags"][1][order])


def test_an_unused_column_changes_nothing(frames, fitted, encoded):
    more = frames[1].with_columns(noise=pl.Series(np.arange(frames[1].height)))
    assert fit_schema(SCHEMA, frames[0].with_columns(noise=pl.lit("x"))) == fitted
    np.testing.assert_array_equal(encode(more, fitted).ids, encoded.ids)


def test_known_categories_decode_to_themselves(frames):
    frame = frames[0].select("shop", "click").drop_nulls()
    schema = fit_schema(Schema((Categorical("shop", "v"),), (Vocabulary("v"),), (Task("click", "binary"),)), frame)
    values = ("pad", "oov", *schema.vocabulary("v").values)
    assert [values[i] for i in encode(frame, schema).ids[:, 0]] == frame["shop"].to_list()


def test_hash_buckets_need_no_values():
    frame = pl.DataFrame({"x": ["a", "b", None, "z"], "y": [0, 1, 0, 1]})
    schema = Schema((Categorical("x", "v"),), (Vocabulary("v", hash_buckets=5),), (Task("y", "binary"),))
    fitted = fit_schema(schema, frame)
    assert fitted.vocabulary("v").values == ()
    expected = [2 + key_hash(value) % 5 for value in ("a", "b", "<null>", "z")]
    assert encode(frame, fitted).ids[:, 0].tolist() == expected


def test_null_that_train_never_had_is_out_of_vocabulary_and_the_mean():
    schema = Schema((Categorical("x", "v"), Numeric("z")), (Vocabulary("v"),), (Task("y", "binary"),))
    fitted = fit_schema(schema, pl.DataFrame({"x": ["a", "b"], "z": [1.0, 3.0], "y": [0, 1]}))
    rows = encode(
        pl.DataFrame({"x": [None, "a"], "z": [None, 3.0], "y": [0, None]}, schema_overrides={"x": pl.String}), fitted
    )
    assert rows.ids[:, 0].tolist() == [1, 2]
    assert rows.dense.tolist() == [[0.0], [1.0]]
    assert rows.mask["y"].tolist() == [True, False]


def test_fill_stands_in_for_nan_before_the_transform():
    frame = pl.DataFrame({"z": [0.0, math.nan, math.e - 1], "y": [0, 1, 1]})
    fitted = fit_schema(Schema((Numeric("z", "log1p", fill=0.0),), (), (Task("y", "binary"),)), frame)
    assert fitted.numerics[0].mean == pytest.approx(1 / 3)
    np.testing.assert_allclose(encode(frame, fitted).dense[:, 0], np.array([-1, -1, 2]) / math.sqrt(2), rtol=1e-6)


def test_infinite_values_do_not_enter_moments_and_are_clipped():
    frame = pl.DataFrame({"z": [-1.0, 1.0, math.inf], "y": [0, 1, 1]})
    fitted = fit_schema(Schema((Numeric("z"),), (), (Task("y", "binary"),)), frame)
    assert (fitted.numerics[0].mean, fitted.numerics[0].std) == (0.0, 1.0)
    assert encode(frame, fitted).dense[:, 0].tolist() == [-1.0, 1.0, 10.0]


def test_constant_numbers_get_std_one_and_a_warning():
    frame = pl.DataFrame({"z": [5.0, 5.0], "y": [0, 1]})
    with pytest.warns(UserWarning, match="feature 'z' is constant in train"):
        fitted = fit_schema(Schema((Numeric("z"),), (), (Task("y", "binary"),)), frame)
    assert encode(frame, fitted).dense[:, 0].tolist() == [0.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_schema(Schema((Numeric("z"),), (), (Task("y", "binary"),)), frame.with_columns(z=pl.Series([5.0, 6.0])))


def test_regression_may_stay_in_its_units():
    frame = pl.DataFrame({"z": [1.0, 2.0], "y": [3.0, 7.0]})
    schema = Schema((Numeric("z"),), (), (Task("y", "regression", standardise=False),))
    assert encode(frame, fit_schema(schema, frame)).labels["y"].tolist() == [3.0, 7.0]


def test_given_domains_and_classes_keep_their_order():
    frame = pl.DataFrame({"z": [1.0, 2.0], "c": ["x", "y"], "d": ["nl", "es"]})
    task = Task("c", "multiclass", classes=("y", "w", "x"))
    fitted = fit_schema(Schema((Numeric("z"),), (), (task,), domain="d", domains=("nl", "fr", "es")), frame)
    assert fitted.task("c").frequencies == (0.5, 0.0, 0.5)
    rows = encode(frame, fitted)
    assert rows.labels["c"].tolist() == [2, 0]
    assert rows.domain.tolist() == [0, 2]


def test_unknown_domain_and_uneven_weights_are_refused():
    frame = pl.DataFrame({"t": [["a"], ["b"]], "w": [[1.0], [1.0]], "y": [0, 1], "d": ["nl", "es"]})
    schema = Schema((MultiHot("t", "t", 2, "w"),), (Vocabulary("t"),), (Task("y", "binary"),), domain="d")
    fitted = fit_schema(schema, frame)
    with pytest.raises(SchemaError, match=r"unknown domains \['us'\] in column 'd'; the schema has \['es', 'nl'\]"):
        encode(frame.with_columns(d=pl.lit("us")), fitted)
    with pytest.raises(SchemaError, match="1 rows have lists of other lengths in 'w' than in 't'"):
        encode(frame.with_columns(w=pl.Series([[1.0], [1.0, 2.0]])), fitted)


def test_rows_of_unseen_domains_count_as_the_default_one():
    train = pl.DataFrame({"z": [1.0, 2.0], "y": [0, 1], "d": ["nl", "es"]})
    schema = Schema((Numeric("z"),), (), (Task("y", "binary"),), domain="d", default_domain="nl")
    fitted = fit_schema(schema, train)
    assert fitted.domains == ("es", "nl")
    unseen = pl.DataFrame({"z": [1.0, 2.0, 3.0], "y": [0, 1, 0], "d": ["us", "es", None]})
    assert encode(unseen, fitted).domain.tolist() == [1, 0, 1]
    assert Schema.from_dict(fitted.to_dict()) == fitted
    with pytest.raises(SchemaError, match=r"default_domain is 'us'; expected one of the domains \['es', 'nl'\]"):
        fit_schema(dataclasses.replace(schema, default_domain="us"), train)


def test_circular_spaces_are_refused():
    tasks = (Task("a", "binary", space="b"), Task("b", "binary", space="a"))
    with pytest.raises(SchemaError, match="form a circle"):
        fit_schema(Schema((Numeric("z"),), (), tasks), pl.DataFrame({"z": [1.0, 2.0], "a": [0, 1], "b": [0, 1]}))
