"""MovieLens 100K: the published counts of the recipes and splits, and the bias floors of each split."""

import polars as pl
import pytest

from mtl_jax.data import load, tables
from mtl_jax.data.datasets import movielens_1m, movielens_100k
from mtl_jax.data.datasets.movielens import DOMAINS, GENRES_LENGTH, TABLES
from mtl_jax.errors import SchemaError
from mtl_jax.metrics import baselines

# All columns but rating and timestamp are text in the file.
INTER = pl.DataFrame(
    {"user_id": ["12", "11", "12"], "item_id": ["20", "20", "31"], "rating": [4, 3, 1], "timestamp": [2, 1, 3]}
)
USER = pl.DataFrame(
    {
        "user_id": ["11", "12"],
        "age": ["24", "25"],
        "gender": ["M", "F"],
        "occupation": ["writer", "other"],
        "zip_code": ["10001", "02460"],
    }
)
ITEM = pl.DataFrame(
    {
        "item_id": ["20", "31"],
        "movie_title": ["Some Film", "Some Film"],
        "release_year": ["1990", "V"],
        "class": ["Drama Comedy", "Action"],
    }
)


def test_ratings_keep_the_order_of_the_file_and_gain_the_facts_of_user_and_film():
    rows = movielens_100k.ratings(INTER, USER, ITEM).to_dicts()
    assert [row["timestamp"] for row in rows] == [2, 1, 3]
    assert rows[1] == {
        "user": "11",
        "item": "20",
        "rating": 3,
        "timestamp": 1,
        "age": 24,
        "gender": "M",
        "occupation": "writer",
        "zip": "10001",
        "domain": "under_25",
        "first_genre": "Drama",
        "genres": ["Drama", "Comedy"],
        "release_year": 1990,
    }
    assert (rows[2]["domain"], rows[2]["first_genre"], rows[2]["release_year"]) == ("25_to_34", "Action", None)


@pytest.mark.parametrize(("age", "domain"), [("7", 0), ("24", 0), ("25", 1), ("34", 1), ("35", 2), ("73", 2)])
def test_age_groups_are_those_of_the_larger_set(age, domain):
    rows = movielens_100k.ratings(INTER, USER.with_columns(age=pl.lit(age)), ITEM)
    assert rows["domain"].unique().to_list() == [DOMAINS[domain]] and rows.schema["domain"] == pl.Enum(DOMAINS)


@pytest.mark.parametrize("options", [{}, {"with_age": True}, {"with_domain": False, "with_age": True}])
def test_it_takes_the_place_of_the_larger_set(options):
    small, large = (module.ratings_schema(**options) for module in (movielens_100k, movielens_1m))
    assert small.tasks == large.tasks and small.domains == large.domains and small.excluded == large.excluded
    assert names(small) == ["item" if name == "title" else name for name in names(large)]
    assert (small.user, small.time, small.domain) == (large.user, large.time, large.domain)


def names(schema):
    return [feature.name for feature in schema.features]


# The published facts about the pinned bytes.

RATINGS = {1: 6_110, 2: 11_370, 3: 27_145, 4: 34_174, 5: 21_201}
COUNTS = {
    # rows, users, clicks, likes
    "under_25": (26_551, 234, 14_237, 5_624),
    "25_to_34": (35_444, 310, 19_190, 7_092),
    "35_and_over": (38_005, 399, 21_948, 8_485),
}
SPLITS = {
    "rows": {
        "rows": (80_000, 10_000, 10_000),
        "click": (44_310, 5_497, 5_568),
        "like": (16_987, 2_095, 2_119),
        "known_users": 1.0,
        "floor": {"click": (0.7749, 0.5666), "like": (0.7957, 0.4213)},
    },
    "time": {
        "rows": (80_000, 10_000, 10_000),
        "click": (44_072, 5_674, 5_629),
        "known_users": 0.142,
        "floor": {"click": (0.7168, 0.6097)},
    },
    "cold_user": {"rows": (79_116, 9_995, 10_889), "known_users": 0.0, "floor": {"click": (0.7224, 0.6092)}},
}


@pytest.fixture(scope="module")
def frame():
    return movielens_100k.ratings(*(tables.read(movielens_100k.SOURCE, name) for name in TABLES))


@pytest.fixture(scope="module", params=SPLITS)
def dataset(request):
    return load("movielens_100k", split=request.param)


@pytest.mark.data
def test_counts(frame):
    assert frame.height == 100_000
    assert dict(frame["rating"].value_counts().rows()) == RATINGS
    assert frame.select(pl.col("user", "item").n_unique()).row(0) == (943, 1_682)
    assert frame["user"].value_counts()["count"].min() == 20
    assert frame.select("user", "item").n_unique() == frame.height
    assert frame["genres"].list.len().max() == GENRES_LENGTH
    nulls = frame.filter(pl.col("release_year").is_null())
    assert (
        set(nulls["item"]) == {"267", "1412"} and frame.drop("release_year").null_count().sum_horizontal().item() == 0
    )
    assert (frame["age"].min(), frame["age"].max()) == (7, 73)


@pytest.mark.data
def test_counts_by_domain(frame):
    counted = frame.group_by("domain").agg(
        pl.len(),
        pl.col("user").n_unique(),
        (pl.col("rating") > 3).sum().alias("click"),
        (pl.col("rating") > 4).sum().alias("like"),
    )
    assert {domain: tuple(counts) for domain, *counts in counted.iter_rows()} == COUNTS


@pytest.mark.data
def test_split_counts(dataset):
    facts, summary = SPLITS[dataset.info["split"]], dataset.summary()
    assert tuple(summary["rows"].values()) == facts["rows"]
    for task in facts.keys() & {"click", "like"}:
        assert tuple(part["positives"] for part in summary["tasks"][task].values()) == facts[task]
    assert summary["known_in_train"]["user"]["rows"] == pytest.approx(facts["known_users"], abs=5e-4)
    assert ("user" in names(dataset.schema)) == (facts["known_users"] > 0)


@pytest.mark.data
def test_bias_floors(dataset):
    found = baselines.evaluate_baselines(dataset.for_training(), dataset.open_test(), names=("user_item_mean",))
    for task, floor in SPLITS[dataset.info["split"]]["floor"].items():
        scores = found["user_item_mean"][task]
        assert (scores["auc"], scores["logloss"]) == pytest.approx(floor, abs=1e-4)


@pytest.mark.data
def test_info_recipe_and_seed():
    first, plain, other = (load("movielens_100k", **o) for o in ({}, {"recipe": "plain"}, {"split_seed": 1}))
    assert first.info["parameters"] == {"keep_age": False}
    assert first.info["files"]["recbole/dataset_example/ml-100k/ml-100k.inter"].startswith("4edb74e2")
    assert first.schema.task_names == ("click", "like") and "GroupLens" in first.licence
    assert "age" in names(plain.schema) and "age" not in names(first.schema)
    assert len({first.identity, plain.identity, other.identity}) == 3
    assert plain.splits["test"].tobytes() == first.splits["test"].tobytes() != other.splits["test"].tobytes()


@pytest.mark.data
def test_folds_leave_the_test_part():
    whole = load("movielens_100k", split="cold_user")
    folded = load("movielens_100k", split="cold_user", split_folds=4, split_fold=3)
    assert folded.splits["test"].tobytes() == whole.splits["test"].tobytes()
    assert not set(folded.part("train")["user"]) & set(folded.part("valid")["user"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "genres"}, r"unknown recipe 'genres'; expected one of \['scenario_wise', 'plain'\]"),
        ({"split": "leave_last"}, r"unknown split 'leave_last'; expected one of \['rows', 'cold_user', 'time'\]"),
        ({"recipe": "plain", "keep_age": True}, "keep_age is True with recipe 'plain'"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_does(options, message):
    with pytest.raises(SchemaError, match=message):
        load("movielens_100k", **options)
