"""Complete Journey: a year of supermarket baskets of 2,469 households (84.51°), recipe ``repurchase``.

**What will a household buy again in the next four weeks?** A row is a pair (household, category) bought at least once
in weeks 1..H; its labels come from weeks H+1..H+4. The table stacks three such blocks: H = 40 train, 44 valid, 48 test.

Weeks are trusted, not timestamps, which are hours ahead of store time; week 53 is cut short and unused. Features sum
money in whole cents, so that none depends on the order of rows or on the number of threads; the label ``spend`` sums
the dollars as published.
"""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets.complete_journey_lines import category_domains, category_visits, merchandise_lines
from mtl_jax.data.datasets.complete_journey_repurchase import LAST_WEEKS, block, repurchase_schema
from mtl_jax.data.datasets.public import check_known, make, read_tables, select_tasks
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options

SOURCE = "completejourney"
TABLES = ("transactions", "products", "demographics")
RECIPES = ("repurchase",)
SPLITS = ("time",)


def load(
    *,
    recipe: str = "repurchase",
    split: str = "time",
    tasks: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    download: bool = False,
    split_seed: int = 0,
    split_folds: Folds | None = None,
    reduction: Reduction | None = None,
    merchandise_only: bool = True,
) -> Dataset:
    """The fetched tables as a data set.

    Args:
      recipe: ``repurchase``.
      split: ``time``: the three blocks.
      tasks: Some of ``buy``, ``promo``, ``private``, ``coupon`` and ``spend``; all when None.
      cache_dir: Folder of the fetched tables; ``~/.cache/mtl_jax`` by default.
      download: Whether they are fetched if they are not there.
      split_seed: Of the folds and of what is kept; nothing else is drawn.
      split_folds: Cross-validation inside the blocks of train and valid; it needs a group, such as ``household``.
      reduction: What is kept of train and valid.
      merchandise_only: Whether coupons, fuel and miscellaneous lines are left out.

    Returns:
      The data set.

    Raises:
      SchemaError: Unknown recipe, split or task.
      NotCached: The tables are not in the cache.
    """
    check_known("recipe", recipe, RECIPES)
    check_known("split", split, SPLITS)
    schema = repurchase_schema()
    schema = select_tasks(schema, schema.task_names if tasks is None else tasks)
    read = read_tables(SOURCE, TABLES, cache_dir=cache_dir, download=download)
    return make(
        repurchase(**read, merchandise_only=merchandise_only),
        schema,
        name="complete_journey",
        recipe=recipe,
        source=SOURCE,
        table_names=TABLES,
        parameters={"merchandise_only": merchandise_only},
        key=("household", "category", "week"),
        split=split,
        split_seed=split_seed,
        split_options={"windows": LAST_WEEKS} | fold_options(split_folds) | reduction_options(reduction),
    )


def repurchase(
    transactions: pl.DataFrame, products: pl.DataFrame, demographics: pl.DataFrame, *, merchandise_only: bool = True
) -> pl.DataFrame:
    """The blocks of train, valid and test, each sorted by (household, category); ``week`` is the last feature week."""
    lines = merchandise_lines(transactions, products, merchandise_only=merchandise_only)
    domains = category_domains(lines, last_week=LAST_WEEKS["train"])
    visits = category_visits(lines)
    return pl.concat([block(visits, domains, demographics, last_week=week) for week in LAST_WEEKS.values()])
