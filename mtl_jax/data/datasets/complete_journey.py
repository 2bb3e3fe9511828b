"""Complete Journey: a year of supermarket baskets of 2,469 households (84.51°), in two recipes.

``repurchase``: **what will a household buy again in the next four weeks?** A row is a pair (household, category) bought at
least once in weeks 1..H; its labels come from weeks H+1..H+4. The table stacks three such blocks: H = 40 train, 44 valid,
48 test.

``cross_department``: **which product of a department will a household buy for the first time?** A row is a pair
(household, product), bought or sampled; see :mod:`mtl_jax.data.datasets.complete_journey_cross_department`.

Weeks are trusted, not timestamps, which are hours ahead of store time; week 53 is cut short and unused. Features sum
money in whole cents, so that none depends on the order of rows or on the number of threads; the label ``spend`` sums
the dollars as published.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets.complete_journey_cross_department import (
    LABEL_ENDS,
    NEGATIVES,
    TARGETS,
    cross_department,
    cross_department_schema,
)
from mtl_jax.data.datasets.complete_journey_lines import category_domains, category_visits, merchandise_lines
from mtl_jax.data.datasets.complete_journey_repurchase import LAST_WEEKS, block, repurchase_schema
from mtl_jax.data.datasets.public import check_known, make, read_tables, select_tasks
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options
from mtl_jax.errors import SchemaError

SOURCE = "completejourney"
TABLES = ("transactions", "products", "demographics")
SPLITS = {"repurchase": ("time",), "cross_department": ("time", "cold_start")}
"""Recipe -> its splits."""


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
    negatives: int | None = None,
    target_domain: str | None = None,
    beta: float | None = None,
) -> Dataset:
    """The fetched tables as a data set.

    Args:
      recipe: ``repurchase`` or ``cross_department``.
      split: ``time``; of ``cross_department`` also ``cold_start``.
      tasks: Some of ``buy``, ``promo``, ``private``, ``coupon`` and ``spend``, all when None; of ``cross_department`` some
        of ``buy`` and ``rebuy``, ``buy`` when None.
      cache_dir: Folder of the fetched tables; ``~/.cache/mtl_jax`` by default.
      download: Whether they are fetched if they are not there.
      split_seed: Of the folds, of what is kept, of sampled pairs and of the order of households.
      split_folds: Cross-validation inside the blocks of train and valid; it needs a group, such as ``household``.
      reduction: What is kept of train and valid.
      merchandise_only: Whether coupons, fuel and miscellaneous lines are left out.
      negatives: Sampled pairs of ``cross_department`` for each bought one of train and valid, >= 1; 4 when None.
      target_domain: The department from which ``cold_start`` withholds what the held-out households bought.
      beta: Share of the households of ``cold_start`` that is test, in (0, 1).

    Returns:
      The data set.

    Raises:
      SchemaError: Unknown recipe, split or task, or an option that the recipe or the split lacks or needs.
      NotCached: The tables are not in the cache.
    """
    check_known("recipe", recipe, SPLITS)
    check_known("split", split, SPLITS[recipe])
    own = _own_options(recipe, split, negatives=negatives, target_domain=target_domain, beta=beta)
    if split == "cold_start" and split_folds is not None:
        raise SchemaError(
            "split 'cold_start' has folds, and they would take what households bought in grocery away as well; expected "
            "none. Remove data.split_folds, or set data.split=time"
        )
    crosses = recipe == "cross_department"
    schema = cross_department_schema(target_domain) if crosses else repurchase_schema()
    schema = select_tasks(schema, tasks if tasks is not None else ("buy",) if crosses else schema.task_names)
    read = read_tables(SOURCE, TABLES, cache_dir=cache_dir, download=download)
    read |= {"merchandise_only": merchandise_only}
    parts = {"parts": "part"} if split == "cold_start" else {"windows": LABEL_ENDS if crosses else LAST_WEEKS}
    return make(
        cross_department(**read, **own, seed=split_seed) if crosses else repurchase(**read),
        schema,
        name="complete_journey",
        recipe=recipe,
        source=SOURCE,
        table_names=TABLES,
        parameters={"merchandise_only": merchandise_only} | own,
        key=(schema.user, schema.item),
        split="given" if split == "cold_start" else split,
        split_name=split,
        split_seed=split_seed,
        split_options=parts | fold_options(split_folds) | reduction_options(reduction),
    )


def repurchase(
    transactions: pl.DataFrame, products: pl.DataFrame, demographics: pl.DataFrame, *, merchandise_only: bool = True
) -> pl.DataFrame:
    """The blocks of train, valid and test, each sorted by (household, category); ``week`` is the last feature week."""
    lines = merchandise_lines(transactions, products, merchandise_only=merchandise_only)
    domains = category_domains(lines, last_week=LAST_WEEKS["train"])
    visits = category_visits(lines)
    return pl.concat([block(visits, domains, demographics, last_week=week) for week in LAST_WEEKS.values()])


def _own_options(recipe: str, split: str, **options: Any) -> dict[str, Any]:
    """Those of the recipe and the split, with defaults.

    Raises:
      SchemaError: One is given that they lack, missing, or out of range.
    """
    known = {"repurchase": (), "cross_department": ("negatives",)}[recipe]
    known += ("target_domain", "beta") if split == "cold_start" else ()
    for name, value in options.items():
        if value is not None and name not in known:
            raise SchemaError(
                f"{name} is {value!r} with recipe '{recipe}' and split '{split}', which have no such option; expected "
                f"null. Remove data.{name}"
            )
    own = {name: options[name] for name in known}
    if own.get("negatives", 0) is None:
        own["negatives"] = NEGATIVES
    checks = (
        ("negatives", own.get("negatives", 1) >= 1, "a whole number >= 1"),
        ("target_domain", own.get("target_domain", TARGETS[0]) in TARGETS, f"one of {list(TARGETS)}"),
        ("beta", "beta" not in own or 0 < (own["beta"] or 0) < 1, "a number between 0 and 1"),
    )
    for name, fits, expected in checks:
        if not fits:
            raise SchemaError(f"{name} is {own[name]!r} with split '{split}'; expected {expected}. Set data.{name}")
    return own
