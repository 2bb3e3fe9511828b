"""Folds: train and valid of a split, cut again for cross-validation; the test part stays what the split made it."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import polars as pl

from mtl_jax.data.hash_order import hash_ranking
from mtl_jax.errors import SchemaError

TEMPORAL = ("time", "user_time", "leave_last")


@dataclasses.dataclass(frozen=True)
class Folds:
    """One of ``number`` ways to cut train and valid: the fold ``held`` is valid, the others are train.

    Attributes:
      number: k, >= 2.
      held: From 0 to k - 1.
      group: Column whose rows stay together; without it the unit of the split (an entity, or a row).

    Raises:
      SchemaError: A number is out of range.
    """

    number: int
    held: int
    group: str | None = None

    def __post_init__(self):
        if not _is_whole(self.number) or self.number < 2:
            raise SchemaError(f"split_folds is {self.number}; expected a whole number >= 2. Set data.split_folds")
        if not _is_whole(self.held) or not 0 <= self.held < self.number:
            raise SchemaError(
                f"split_fold is {self.held} of {self.number} folds; expected one of 0 to {self.number - 1}. "
                "Set data.split_fold"
            )

    @classmethod
    def of(cls, number: int | None, held: int | None, group: str | None) -> "Folds | None":
        """The folds that the options ``split_folds``, ``split_fold`` and ``split_group`` ask for; None for none.

        Raises:
          SchemaError: One of them needs another.
        """
        if number is not None:
            return cls(number, held, group)
        for name, value in (("split_fold", held), ("split_group", group)):
            if value is not None:
                raise SchemaError(
                    f"{name} is {value!r} without folds; expected the number of folds beside it. "
                    f"Set data.split_folds, or remove data.{name}"
                )
        return None


def fold_options(folds: Folds | None) -> dict[str, Folds]:
    """The split option of these folds; none without, so that the identity of a data set without folds stays."""
    return {} if folds is None else {"folds": folds}


def refold(
    frame: pl.DataFrame, parts: Mapping[str, np.ndarray], folds: Folds, *, unit: str | None, seed: int
) -> dict[str, np.ndarray]:
    """Cuts the rows of train and valid into k folds, in hash order of the units, at floor(n i / k).

    Args:
      frame: All rows.
      parts: Of the split. The rows of ``test`` are not looked at.
      folds: Which fold is held out.
      unit: Column whose values stay together; rows are the units if None.
      seed: Of the hash order.

    Returns:
      Part -> sorted int64 row numbers; train and valid cover what they covered before, ``test`` is the same.

    Raises:
      SchemaError: The column is absent or has nulls, or there are fewer units than folds.
    """
    pool = np.sort(np.concatenate([parts["train"], parts["valid"]])).astype(np.int64)
    if unit is None:
        codes, keys = np.arange(len(pool)), pool.tolist()
    else:
        codes, keys = _units(frame, pool, unit)
    if len(keys) < folds.number:
        what = "rows" if unit is None else f"values of '{unit}'"
        raise SchemaError(
            f"{len(keys)} {what} for {folds.number} folds; expected at least one a fold. Lower data.split_folds"
        )
    start, end = (len(keys) * i // folds.number for i in (folds.held, folds.held + 1))
    held = np.zeros(len(keys), bool)
    held[hash_ranking(keys, seed)[start:end]] = True
    is_valid = held[codes]
    return {"train": pool[~is_valid], "valid": pool[is_valid], "test": np.asarray(parts["test"], np.int64)}


def unit_of(split: str, folds: Folds, *, entity: str | None, group: str | None) -> str | None:
    """The column whose values may not be on both sides of a fold, None where rows are the units.

    Args:
      split: Its name.
      folds: Their ``group`` comes first.
      entity: The column by which the split keeps rows together, where it does.
      group: The schema's group.

    Raises:
      SchemaError: The split follows time, and no column is named.
    """
    unit = folds.group or group or entity
    if split in TEMPORAL and unit is None:
        raise SchemaError(
            f"split '{split}' cut into {folds.number} folds would train on the future of the rows it is validated on; "
            "expected a split without time, or a column whose rows stay together. Set data.split_group=<column>, such "
            "as the user, or data.split=rows or cold_user, or leave the folds out"
        )
    return unit


def _units(frame: pl.DataFrame, pool: np.ndarray, column: str) -> tuple[np.ndarray, list[str]]:
    """Code of each row of the pool, and the distinct values that the codes number."""
    if column not in frame.columns:
        raise SchemaError(
            f"group column '{column}' is not in the table; expected one of {frame.columns}. Set data.split_group"
        )
    values = frame[column][pool].cast(pl.String)
    if values.null_count():
        raise SchemaError(
            f"group column '{column}' has {values.null_count()} nulls; expected none in a column that splits rows. "
            "Drop or fill those rows"
        )
    keys = values.unique().sort()
    codes = values.replace_strict(keys, np.arange(len(keys)), return_dtype=pl.Int64)
    return codes.to_numpy(), keys.to_list()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
