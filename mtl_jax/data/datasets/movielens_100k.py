"""MovieLens 100K: 100,000 ratings of 1,682 films by 943 users, at least 20 by each (Harper and Konstan, TiiS 2015).

Tasks, recipes and splits are those of :mod:`mtl_jax.data.datasets.movielens`, so that it takes the place of
``movielens_1m`` at a tenth of the rows. A film is named by the publisher's number, since 18 titles belong to two. Age is
in years. Two films have no year of release.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets.movielens import DOMAINS, films, join, load_ratings, schema_of, users
from mtl_jax.data.folds import Folds
from mtl_jax.data.reduction import Reduction
from mtl_jax.data.schema import Numeric, Schema

SOURCE = "recbole"


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
        "movielens_100k",
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
    age = pl.col("age")
    domain = (
        pl.when(age < 25).then(pl.lit(DOMAINS[0])).when(age < 35).then(pl.lit(DOMAINS[1])).otherwise(pl.lit(DOMAINS[2]))
    )
    # The file has all of these as text, and no number for the year of two films.
    user = user.with_columns(age.cast(pl.Int64))
    item = item.with_columns(pl.col("release_year").cast(pl.Int64, strict=False))
    known = users(user, domain=domain.cast(pl.Enum(DOMAINS)))
    return join(inter, known, films(item, name="item", genre="class"), item="item")


def ratings_schema(*, with_domain: bool = True, with_age: bool = False) -> Schema:
    """Unfitted schema of all three tasks; age, in years, is a number."""
    return schema_of(item="item", age=Numeric("age"), with_domain=with_domain, with_age=with_age)
