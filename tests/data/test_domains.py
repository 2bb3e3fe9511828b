"""Domains as data sets of their own, schemas that continue another one's, and rows of both under one schema."""

import dataclasses
import itertools

import numpy as np
import polars as pl
import pytest

from mtl_jax.data.dataset import PARTS, Dataset, Encoded, concatenated
from mtl_jax.data.domains import joined, of_domains
from mtl_jax.data.encode import encode
from mtl_jax.data.reduction import Reduction
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.errors import ConfigError, LabelError, SchemaError
from mtl_jax.tasks import Task

AREAS = ("north", "south", "west")
SCHEMA = Schema(
    features=(
        Categorical("item", vocabulary="item"),
        MultiHot("basket", "item", max_len=3),
        Sequence("history", "item", max_len=3),
        Numeric("price", transform="log1p"),
        Categorical("area", vocabulary="area"),
    ),
    vocabularies=(Vocabulary("item"), Vocabulary("area")),
    tasks=(Task("buy", "binary"), Task("spend", "regression", space="buy"), Task("mood", "multiclass")),
    domain="area",
    user="customer",
)


def make_frame(num_rows=600, seed=0):
    """Items of each area are others, with some in common; only the north is ever "glad"."""
    rng = np.random.default_rng(seed)
    area = rng.choice(AREAS, num_rows, p=[0.5, 0.3, 0.2])
    first = np.array([{"north": 0, "south": 10, "west": 20}[name] for name in area])
    items = first[:, None] + rng.integers(0, 25, (num_rows, 4))
    mood = np.where((area == "north") & (rng.random(num_rows) < 0.4), "glad", rng.choice(["calm", "sad"], num_rows))
    price = rng.gamma(2.0, 10.0, num_rows) * np.where(area == "north", 1.0, 3.0)
    return pl.DataFrame(
        {
            "customer": rng.integers(0, 50, num_rows),
            "area": area,
            "item": [f"i{number}" for number in items[:, 0]],
            "basket": [[f"i{number}" for number in row] for row in items[:, 1:3]],
            "history": [[f"i{number}" for number in row] for row in items[:, 2:]],
            "price": price,
            "buy": rng.random(num_rows) < 0.5,
            "spend": price * rng.gamma(2.0, 1.0, num_rows),
            "mood": mood,
        }
    )


@pytest.fixture(scope="module")
def whole():
    return Dataset.from_frame(make_frame(), SCHEMA, "rows", name="areas", seed=4)


@pytest.fixture(scope="module")
def north(whole):
    return of_domains(whole, ["north"])


@pytest.fixture(scope="module")
def west(whole):
    return of_domains(whole, ["west"])


def rows_of(dataset):
    return {part: dataset.splits[part].tolist() for part in PARTS}


def in_area(dataset, part, *areas):
    rows = dataset.splits[part]
    return rows[dataset.frame["area"][rows].is_in(list(areas)).to_numpy()].tolist()


@pytest.mark.parametrize("names", [("north",), ("west",), ("south", "west"), AREAS])
def test_rows_stay_in_the_parts_where_they_are(whole, names):
    own = of_domains(whole, names)
    assert rows_of(own) == {part: in_area(whole, part, *names) for part in PARTS}
    assert set(own.part("test")["area"]) == set(names)
    assert own.info["split"] == "rows" and own.info["split_seed"] == 4
    assert own.info["domains"] == sorted(names) and own.info["target_fraction"] == 1.0


def test_the_identity_tells_domains_and_fractions_apart_and_calls_not(whole):
    given = [("north",), ("west",), ("south", "west"), AREAS]
    fractions = [None, 0.5, 0.25]
    found = [
        of_domains(whole, names, reduction=fraction and Reduction(fraction)).identity
        for names, fraction in itertools.product(given, fractions)
    ]
    assert len({*found, whole.identity}) == len(found) + 1
    assert of_domains(whole, ["west", "south"]).identity == of_domains(whole, ("south", "west")).identity
    assert of_domains(whole, ["north"], reduction=Reduction(0.5)).identity == found[1]


def test_the_identity_follows_the_whole_set(whole, north):
    """The same rows of other files, or by another split, are other data."""
    frame = whole.frame.with_columns(
        pl.when(pl.col("area") == "west").then(1.0).otherwise(pl.col("price")).alias("price")
    )
    other = Dataset.from_frame(frame, SCHEMA, "rows", name="areas", seed=4)
    assert of_domains(other, ["north"]).identity != north.identity
    again = Dataset.from_frame(whole.frame, SCHEMA, "rows", name="areas", seed=4)
    assert of_domains(again, ["north"]).identity == north.identity


def test_smaller_fractions_are_among_larger_ones_and_the_test_part_stays(whole, west):
    sets = [of_domains(whole, ["west"], reduction=Reduction(f, "full")) for f in (0.1, 0.3, 0.8)] + [west]
    for small, large in itertools.pairwise(sets):
        assert set(small.splits["train"]) < set(large.splits["train"])
        for part in ("valid", "test"):
            assert small.splits[part].tolist() == large.splits[part].tolist()
    count = len(west.splits["train"])
    assert [len(one.splits["train"]) for one in sets] == [int(0.1 * count), int(0.3 * count), int(0.8 * count), count]
    assert [one.info["target_fraction"] for one in sets] == [0.1, 0.3, 0.8, 1.0]


def test_everything_is_fitted_on_the_rows_that_train(whole):
    own = of_domains(whole, ["west"], reduction=Reduction(0.4))
    train = own.part("train")
    assert set(own.schema.vocabulary("item").values) == {
        *train["item"], *train["basket"].explode(), *train["history"].explode()
    }  # fmt: skip
    assert own.schema.vocabulary("area").values == ("west",)
    price = np.log1p(train["price"].to_numpy())
    (feature,) = own.schema.numerics
    assert (feature.mean, feature.std) == (pytest.approx(price.mean()), pytest.approx(price.std()))
    spend = train.filter(pl.col("buy"))["spend"].to_numpy()
    assert own.schema.task("spend").mean == pytest.approx(spend.mean())


def test_numbers_of_domains_and_classes_are_those_of_the_whole_set(whole, west):
    assert west.schema.domains == whole.schema.domains == AREAS
    assert west.schema.task("mood").classes == whole.schema.task("mood").classes == ("calm", "glad", "sad")
    assert set(west.for_training().train.domain) == {AREAS.index("west")}


@pytest.mark.parametrize("stray", ["moon", None])
def test_rows_of_no_domain_count_to_the_default_one(whole, stray):
    lost = pl.int_range(pl.len()) % 10 == 0
    frame = whole.frame.with_columns(area=pl.when(lost).then(pl.lit(stray)).otherwise(pl.col("area")))
    schema = dataclasses.replace(SCHEMA, features=SCHEMA.features[:4], vocabularies=SCHEMA.vocabularies[:1])
    schema = dataclasses.replace(schema, domains=AREAS, default_domain="south")
    dataset = Dataset.from_frame(frame, schema, "rows", seed=4)
    own = {name: of_domains(dataset, [name]) for name in AREAS}
    assert set(own["south"].part("train")["area"]) == {stray, "south"}
    assert set(own["west"].part("train")["area"]) == {"west"}
    total = sum(len(rows) for one in own.values() for rows in one.splits.values())
    assert total == len(frame), "every row is of one domain"
    assert set(own["south"].for_training().train.domain) == {AREAS.index("south")}


def test_domains_may_be_numbers(whole):
    number = {"north": 1, "south": 2, "west": 3}
    frame = whole.frame.with_columns(pl.col("area").replace_strict(number, return_dtype=pl.Int64))
    schema = dataclasses.replace(SCHEMA, features=SCHEMA.features[:4], vocabularies=SCHEMA.vocabularies[:1])
    own = of_domains(Dataset.from_frame(frame, schema, "rows", seed=4), ["3"])
    assert own.splits["train"].tolist() == in_area(whole, "train", "west")


def test_tasks_may_have_been_left_out_before(whole):
    own = of_domains(whole.with_tasks(["spend"]), ["north"])
    assert own.schema.task_names == ("spend",)
    mask = own.for_training().train.mask["spend"]
    assert mask.tolist() == own.part("train")["buy"].to_list()


def test_unknown_domains_are_refused_by_name(whole):
    with pytest.raises(
        ConfigError, match=r"'areas' has no domains \['east'\]; expected some of \['north', 'south', 'w"
    ):
        of_domains(whole, ["north", "east"])


def test_data_without_domains_are_refused():
    schema = dataclasses.replace(SCHEMA, domain=None)
    plain = Dataset.from_frame(make_frame(), schema, "rows")
    with pytest.raises(ConfigError, match="has no domains to be source or target; expected data with a domain column"):
        of_domains(plain, ["north"])


def test_too_little_to_learn_from_is_refused(whole):
    with pytest.raises(SchemaError, match="which is none; expected at"):
        of_domains(whole, ["west"], reduction=Reduction(0.001))
    never = whole.frame.with_columns(buy=pl.col("buy") & (pl.col("area") != "west"))
    schema = dataclasses.replace(SCHEMA, tasks=SCHEMA.tasks[:1])
    with pytest.raises(LabelError, match="buy"):
        of_domains(Dataset.from_frame(never, schema, "rows", seed=4), ["west"])


def test_a_joined_schema_keeps_the_ids_of_the_source_and_appends_new_ones(north, west):
    both = joined(west.schema, north.schema)
    old, own = (one.schema.vocabulary("item").values for one in (north, west))
    values = both.vocabulary("item").values
    assert values[: len(old)] == old
    assert values[len(old) :] == tuple(value for value in own if value not in old)
    assert 0 < len(values) - len(old) < len(own), "some are new and some are not"
    assert len(set(values)) == len(values)
    assert both.vocabulary("area").values == ("north", "west")


def test_rows_of_the_source_are_encoded_as_by_its_own_schema(north, west):
    both = encode(north.part("train"), joined(west.schema, north.schema))
    alone = encode(north.part("train"), north.schema)
    np.testing.assert_array_equal(both.ids, alone.ids)
    np.testing.assert_array_equal(both.dense, alone.dense)
    for name in ("buy", "spend", "mood"):
        np.testing.assert_array_equal(both.labels[name], alone.labels[name])
        np.testing.assert_array_equal(both.mask[name], alone.mask[name])
    np.testing.assert_array_equal(both.bags["basket"][0], alone.bags["basket"][0])
    np.testing.assert_array_equal(both.sequences["history"], alone.sequences["history"])


def test_a_joined_schema_has_the_moments_of_the_source_and_all_else_of_the_target(north, west):
    both = joined(west.schema, north.schema)
    assert both.numerics == north.schema.numerics != west.schema.numerics
    assert (both.task("spend").mean, both.task("spend").std) == (
        north.schema.task("spend").mean,
        north.schema.task("spend").std,
    )
    assert both.task("buy") == west.schema.task("buy")
    assert [feature.name for feature in both.features] == [feature.name for feature in west.schema.features]
    assert (both.domains, both.user) == (west.schema.domains, west.schema.user)
    raw = np.log1p(west.part("train")["price"].to_numpy())
    (feature,) = north.schema.numerics
    encoded = encode(west.part("train"), both).dense[:, 0]
    np.testing.assert_allclose(encoded, (raw - feature.mean) / feature.std, rtol=1e-4, atol=1e-5)


def test_what_the_source_lacks_stays_the_targets(north, west):
    poorer = dataclasses.replace(
        north.schema,
        features=north.schema.features[:1],
        vocabularies=(Vocabulary("item", ("i1", "i2")),),
        tasks=north.schema.tasks[:1],
    )
    both = joined(west.schema, poorer)
    assert both.numerics == west.schema.numerics and both.tasks == west.schema.tasks
    assert both.vocabulary("area") == west.schema.vocabulary("area")
    assert both.vocabulary("item").values[:2] == ("i1", "i2")


def test_hashed_ids_have_no_numbers_to_keep(north, west):
    hashed = dataclasses.replace(west.schema, vocabularies=(Vocabulary("item", hash_buckets=8), Vocabulary("area")))
    assert joined(hashed, north.schema).vocabulary("item") == hashed.vocabulary("item")


def test_joining_with_itself_changes_nothing(west):
    assert joined(west.schema, west.schema) == west.schema


def test_rows_of_both_stand_one_after_the_other(north, west):
    schema = joined(west.schema, north.schema)
    first, second = west.for_training().train, encode(north.part("train"), schema)
    first = dataclasses.replace(encode(west.part("train"), schema), user=first.user, item=first.item)
    both = concatenated(first, second, 0.25)
    assert both.num_rows == first.num_rows + second.num_rows
    place = first.num_rows
    for name in ("ids", "dense", "domain"):
        np.testing.assert_array_equal(getattr(both, name)[:place], getattr(first, name))
        np.testing.assert_array_equal(getattr(both, name)[place:], getattr(second, name))
    for name in ("labels", "mask", "sequences"):
        for key, value in getattr(both, name).items():
            np.testing.assert_array_equal(value[:place], getattr(first, name)[key])
            np.testing.assert_array_equal(value[place:], getattr(second, name)[key])
            assert value.dtype == getattr(first, name)[key].dtype
    ids, weights = both.bags["basket"]
    np.testing.assert_array_equal(ids, np.concatenate([first.bags["basket"][0], second.bags["basket"][0]]))
    np.testing.assert_array_equal(weights, np.concatenate([first.bags["basket"][1], second.bags["basket"][1]]))
    assert both.weight.dtype == np.float32
    np.testing.assert_allclose(both.weight, np.concatenate([first.weight, 0.25 * second.weight]))
    assert both.user is None and both.item is None, "codes of two data sets do not compare"


def test_rows_without_domains_and_of_weight_one():
    def rows(count):
        ones = np.ones(count, np.float32)
        return Encoded(
            np.ones((count, 1), np.int32), ones[:, None], {}, {}, {"y": ones}, {"y": ones > 0}, {"y": ones}, ones
        )

    both = concatenated(rows(2), rows(3))
    assert both.domain is None and both.weight.tolist() == 5 * [1.0] and both.task_weight["y"].shape == (5,)
