"""What the MovieLens data sets share: tasks, recipes, splits and features (Harper and Konstan, TiiS 2015).

Two nested binary tasks, ``click`` (rating > 3) and ``like`` (rating > 4), and the ``rating`` itself as a regression.

Recipe ``scenario_wise`` (default) has three age groups as domains, as in Scenario-Wise Rec (Li et al., 2024,
arXiv:2412.17374). Age is then no feature, since the domain is a function of it; ``keep_age=True`` keeps it, as the
published code does. Recipe ``plain`` has no domain, and age is a feature.

With split ``cold_user`` the user is no feature: no user of valid or test is in train. Rows keep the order of the
publisher's file.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets.public import check_known, make, read_tables, select_tasks
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Vocabulary
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

TABLES = ("inter", "user", "item")
RECIPES = ("scenario_wise", "plain")
SPLITS = ("rows", "cold_user", "time")
DOMAINS = ("under_25", "25_to_34", "35_and_over")
GENRES_LENGTH = 6
"""The most genres of any film, in each of the data sets."""


def load_ratings(
    name: str,
    *,
    source: str,
    ratings: Callable[..., pl.DataFrame],
    schema: Callable[..., Schema],
    recipe: str,
    split: str,
    tasks: Sequence[str],
    cache_dir: str | Path | None,
    download: bool,
    split_seed: int,
    split_folds: Folds | None,
    reduction: Reduction | None,
    keep_age: bool,
) -> Dataset:
    """A fetched MovieLens as a data set.

    Args:
      name: Of the data set.
      source: Of its tables, in the catalogue.
      ratings: Makes the rows of the three tables.
      schema: Makes the unfitted schema of ``with_domain`` and ``with_age``.
      recipe: ``scenario_wise`` or ``plain``.
      split: ``rows``, ``cold_user`` or ``time``.
      tasks: Some of ``click``, ``like``, ``like_click`` and ``rating``.
      cache_dir: Folder of the fetched tables; ``~/.cache/mtl_jax`` by default.
      download: Whether they are fetched if they are not there.
      split_seed: Of the hash order of rows or users.
      split_folds: Cross-validation inside train and valid.
      reduction: What is kept of train and valid.
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
    unfitted = schema(with_domain=recipe == "scenario_wise", with_age=keep_age or recipe == "plain")
    unfitted = select_tasks(_without_user(unfitted) if split == "cold_user" else unfitted, tasks)
    read = read_tables(source, TABLES, cache_dir=cache_dir, download=download)
    return make(
        ratings(**read),
        unfitted,
        name=name,
        recipe=recipe,
        source=source,
        table_names=TABLES,
        parameters={"keep_age": keep_age},
        key=(unfitted.user, unfitted.item),
        split=split,
        split_seed=split_seed,
        split_options=fold_options(split_folds) | reduction_options(reduction),
    )


def join(inter: pl.DataFrame, users: pl.DataFrame, films: pl.DataFrame, *, item: str) -> pl.DataFrame:
    """One row a rating, in file order, with the facts of its ``user`` and of its film, whose column is ``item``."""
    rows = inter.select(
        pl.col("user_id").cast(users.schema["user"]).alias("user"),
        pl.col("item_id").cast(films.schema[item]).alias(item),
        "rating",
        "timestamp",
    )
    return rows.join(users, on="user", how="left", maintain_order="left").join(
        films, on=item, how="left", maintain_order="left"
    )


def users(user: pl.DataFrame, *, domain: pl.Expr) -> pl.DataFrame:
    """The facts of each user; ``domain`` is a function of the column ``age``."""
    return user.select(
        pl.col("user_id").cast(categories(user["user_id"])).alias("user"),
        "age",
        pl.col("gender").cast(categories(user["gender"])),
        "occupation",
        pl.col("zip_code").cast(categories(user["zip_code"])).alias("zip"),
        domain.alias("domain"),
    )


def films(item: pl.DataFrame, *, name: str, genre: str) -> pl.DataFrame:
    """The facts of each film: its id, called ``name``, its genres, split at spaces, and the year of its release."""
    genres = pl.col(genre).str.split(" ")
    known = categories(item.select(genres.list.explode())[genre])
    return item.select(
        pl.col("item_id").cast(categories(item["item_id"])).alias(name),
        genres.list.first().cast(known).alias("first_genre"),
        genres.cast(pl.List(known)).alias("genres"),
        "release_year",
    )


def categories(values: pl.Series) -> pl.Enum:
    """The type whose values are those of the column, sorted."""
    return pl.Enum(values.unique().sort())


def schema_of(*, item: str, age: Categorical | Numeric, with_domain: bool, with_age: bool) -> Schema:
    """Unfitted schema of all tasks; ``like_click`` is ``like`` among clicked rows only.

    Args:
      item: Column of the film's id.
      age: The feature of the user's age.
      with_domain: Whether the age groups are domains and an input.
      with_age: Whether age is an input.
    """
    names = ["user", item, "gender", "occupation", "zip", "first_genre"] + (["domain"] if with_domain else [])
    single = [*(Categorical(name, name) for name in names), *([age] if with_age else [])]
    return Schema(
        features=(*single, MultiHot("genres", "first_genre", GENRES_LENGTH), Numeric("release_year")),
        vocabularies=tuple(Vocabulary(feature.name) for feature in single if isinstance(feature, Categorical)),
        tasks=(
            Task("click", "binary", "rating", positive="> 3"),
            Task("like", "binary", "rating", positive="> 4", implies="click"),
            Task("like_click", "binary", "rating", positive="> 4", space="click"),
            Task("rating", "regression"),
        ),
        domain="domain" if with_domain else None,
        domains=DOMAINS if with_domain else (),
        user="user",
        item=item,
        time="timestamp",
        excluded={} if with_age else {"age": "the domain is a function of it"},
    )


def _without_user(schema: Schema) -> Schema:
    # An embedding that no test row has seen would add noise only.
    return dataclasses.replace(
        schema,
        features=tuple(feature for feature in schema.features if feature.name != "user"),
        vocabularies=tuple(vocabulary for vocabulary in schema.vocabularies if vocabulary.name != "user"),
        excluded={**schema.excluded, "user": "no user of valid or test is in train"},
    )
