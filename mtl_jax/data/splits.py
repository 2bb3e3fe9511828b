"""Splits: which rows are train, valid and test.

Every function takes a table and returns part -> sorted int64 row numbers. Random splits order their units (rows, users)
by a keyed hash, so the seed and the keys alone decide where a unit goes, on every platform and NumPy version.

| name | unit | protocol |
|---|---|---|
| ``rows`` | row number | random rows: a user's rows are on both sides, optimistic |
| ``time`` | position in time, a date, or a window | the future is predicted from the past |
| ``user_time`` | the rows of each user in time order | other users' future is visible |
| ``leave_last`` | the last rows of each user | sequences |
| ``cold_user`` | user, or any other entity | no test user was seen in training |
| ``domain_holdout`` | domain | one domain is never seen, neither in training nor in selection |
| ``given`` | as the publisher did it | to reproduce a published protocol |
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from mtl_jax.arguments import check_arguments
from mtl_jax.data.dataset import PARTS
from mtl_jax.data.folds import Folds, refold, unit_of
from mtl_jax.data.hash_order import FRACTIONS, cut, hash_order, hash_ranking, key_hash
from mtl_jax.data.hash_order import cuts as cuts_of
from mtl_jax.data.reduction import Reduction, reduce
from mtl_jax.errors import SchemaError

__all__ = [
    "FRACTIONS",
    "SPLITS",
    "Folds",
    "cold_user",
    "domain_holdout",
    "given",
    "hash_order",
    "key_hash",
    "leave_last",
    "rows",
    "split",
    "time",
    "user_time",
]

MIN_USER_ROWS = 5
TIES = ("split", "together")
FROM_ELSEWHERE = ("frame", "name", "user", "time", "domain", "group", "fractions", "seed")
"""Parameters of :func:`split` that are not among a data set's ``split_options``."""

Parts = dict[str, np.ndarray]


def split(
    frame: pl.DataFrame,
    name: str,
    *,
    user: str | None = None,
    time: str | None = None,
    domain: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
    column: str | None = None,
    cuts: Sequence[Any] | None = None,
    windows: Mapping[str, Any] | None = None,
    ties: str = "split",
    k: int = 1,
    held: str | None = None,
    by: str = "rows",
    parts: Any = None,
    group: str | None = None,
    folds: Folds | None = None,
    reduction: Reduction | None = None,
) -> Parts:
    """The split of that name.

    Args:
      frame: All rows.
      name: One of :data:`SPLITS`.
      user: User column, for ``user_time``, ``leave_last``, ``cold_user`` and ``domain_holdout`` by users.
      time: Time column, for ``time``, ``user_time`` and ``leave_last``.
      domain: Domain column, for ``domain_holdout``.
      fractions: Shares of train, valid and test; they sum to 1.
      seed: Of the hash order; another seed is another split.
      column: Entity of ``cold_user`` instead of the user.
      cuts, windows, ties: See :func:`time`.
      k: See :func:`leave_last`.
      held, by: See :func:`domain_holdout`.
      parts: See :func:`given`.
      group: Column of the unit that no fold may cut, if the table has one.
      folds: Train and valid are cut again for cross-validation, by ``folds.group``, ``group``, the unit of the split, or
        rows; test stays.
      reduction: What is then kept of train and valid.

    Returns:
      Part -> int64 row numbers, sorted and disjoint.

    Raises:
      SchemaError: Unknown name, missing column, or a parameter that the split needs and did not get; folds of a split
        by time without a group.
    """
    options = {"user": user, "time": time, "domain": domain, "fractions": fractions, "seed": seed, "column": column}
    options |= {"cuts": cuts, "windows": windows, "ties": ties, "k": k, "held": held, "by": by, "parts": parts}
    if reduction is not None:
        return reduce(split(frame, name, group=group, folds=folds, **options), reduction, seed=seed)
    if folds is not None:
        entity = {"cold_user": column or user, "given": column, "domain_holdout": user if by == "cold_user" else None}
        unit = unit_of(name, folds, entity=entity.get(name), group=group)
        return refold(frame, split(frame, name, **options), folds, unit=unit, seed=seed)
    if name == "rows":
        return rows(frame, fractions=fractions, seed=seed)
    if name == "time":
        return SPLITS[name](
            frame, column=_needed(name, "time", time), fractions=fractions, cuts=cuts, windows=windows, ties=ties
        )
    if name == "user_time":
        return user_time(frame, user=_needed(name, "user", user), time=_needed(name, "time", time), fractions=fractions)
    if name == "leave_last":
        return leave_last(frame, user=_needed(name, "user", user), time=_needed(name, "time", time), k=k)
    if name == "cold_user":
        return cold_user(frame, column=_needed(name, "user", column or user), fractions=fractions, seed=seed)
    if name == "domain_holdout":
        domain = _needed(name, "domain", domain)
        return domain_holdout(frame, column=domain, held=_needed(name, "held", held), by=by, user=user, seed=seed)
    if name == "given":
        return given(frame, parts=_needed(name, "parts", parts), fractions=fractions, group=column, seed=seed)
    raise SchemaError(f"unknown split '{name}'; expected one of {list(SPLITS)}. Set data.split to one of these")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises where the further parameters of a split have a name that no split reads, or a value of another type."""
    known = set(inspect.signature(split).parameters) - set(FROM_ELSEWHERE)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise SchemaError(f"split_options has {unknown}; expected some of {sorted(known)}. Remove or rename them")
    check_arguments(split, options, place="data.split_options")


def rows(frame: pl.DataFrame, *, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Parts:
    """Random rows: the hash order of the row numbers."""
    return _rows_in_hash_order(np.arange(frame.height), fractions, seed)


def time(
    frame: pl.DataFrame,
    *,
    column: str,
    fractions: Sequence[float] = FRACTIONS,
    cuts: Sequence[Any] | None = None,
    windows: Mapping[str, Any] | None = None,
    ties: str = "split",
) -> Parts:
    """The past is train, the future is test.

    Args:
      frame: All rows.
      column: Time: a number or a date.
      fractions: Shares of the positions in (time, row) order.
      cuts: Instead of fractions: the first time of valid and the first time of test.
      windows: Instead of fractions: part -> the value of ``column`` of all its rows, for tables that describe the same
        entities at three dates.
      ties: ``split`` cuts inside equal times, ``together`` moves them to the earlier part.

    Returns:
      Part -> int64 row numbers.

    Raises:
      SchemaError: Unknown column or ``ties``, nulls, cuts that do not ascend, or rows outside the windows.
    """
    if ties not in TIES:
        raise SchemaError(f"ties is '{ties}'; expected one of {list(TIES)}. Set data.split_ties")
    values = _key_column(frame, column, "time")
    if windows is not None:
        return _by_window(values, windows)
    if cuts is not None:
        return _bycuts(values, cuts)
    order = pl.DataFrame({"time": values}).with_row_index("row").sort("time", "row")["row"].to_numpy()
    starts = cuts_of(len(order), fractions)
    if ties == "together":
        ordered = values.gather(order).rank("max").cast(pl.Int64).to_numpy()
        starts = [int(ordered[start - 1]) if start else 0 for start in starts]
    return _sorted(dict(zip(PARTS, np.split(order, starts), strict=True)))


def user_time(frame: pl.DataFrame, *, user: str, time: str, fractions: Sequence[float] = FRACTIONS) -> Parts:
    """Each user's rows in (time, row) order, cut at floor(n_u * fraction); users with fewer than 5 rows all train."""
    position, count = _positions(frame, user, time)
    first, second = cuts_of(count, fractions)
    short = count < MIN_USER_ROWS
    train = short | (position < first)
    valid = ~train & (position < second)
    return _by_mask(train, valid)


def leave_last(frame: pl.DataFrame, *, user: str, time: str, k: int = 1) -> Parts:
    """Each user's last ``k`` rows are test, the ``k`` before valid; users with fewer than 2k + 1 rows all train."""
    if k < 1:
        raise SchemaError(f"k is {k}; expected a number >= 1. Set data.split_k")
    position, count = _positions(frame, user, time)
    left = count - position
    train = (count < 2 * k + 1) | (left > 2 * k)
    return _by_mask(train, ~train & (left > k))


def cold_user(frame: pl.DataFrame, *, column: str, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Parts:
    """Entities in hash order; all rows of an entity follow it, so no test entity was seen in training."""
    return _rows_of_groups(np.arange(frame.height), _key_column(frame, column, "user"), fractions, seed)


def domain_holdout(
    frame: pl.DataFrame, *, column: str, held: str, by: str = "rows", user: str | None = None, seed: int = 0
) -> Parts:
    """One domain is test; valid is 10 % of the rest, so selection never sees the held domain.

    Args:
      frame: All rows.
      column: Domain column.
      held: The domain that becomes test.
      by: ``rows`` or ``cold_user``: the unit of the validation part.
      user: User column, for ``by="cold_user"``.
      seed: Of the hash order.

    Returns:
      Part -> int64 row numbers.
    """
    values = _key_column(frame, column, "domain").cast(pl.String)
    is_held = (values == held).to_numpy()
    if not is_held.any() or is_held.all():
        raise SchemaError(
            f"domain '{held}' has {int(is_held.sum())} of {len(values)} rows; expected some, and some of others. "
            f"Column '{column}' has {values.unique().sort().to_list()}"
        )
    rest = np.flatnonzero(~is_held)
    if by == "rows":
        parts = _rows_in_hash_order(rest, (0.9, 0.1), seed)
    elif by == "cold_user":
        users = _key_column(frame, _needed("domain_holdout", "user", user), "user")
        parts = _rows_of_groups(rest, users.gather(rest), (0.9, 0.1), seed)
    else:
        raise SchemaError(f"by is '{by}'; expected 'rows' or 'cold_user'. Set data.split_by")
    return {**parts, "test": np.flatnonzero(is_held)}


def given(
    frame: pl.DataFrame,
    *,
    parts: str | Mapping[str, Any] | Sequence[int] | np.ndarray,
    fractions: Sequence[float] = FRACTIONS,
    group: str | None = None,
    seed: int = 0,
) -> Parts:
    """The publisher's parts.

    Args:
      frame: All rows.
      parts: A column that holds ``train``, ``valid`` or ``test``; or part -> row numbers; or an order of all row
        numbers, which is cut by ``fractions``. Without valid rows, 10 % of train become valid.
      fractions: Shares, for a row order only.
      group: Column of the unit by which valid is carved out of train; rows otherwise.
      seed: Of the hash order by which valid is carved.

    Returns:
      Part -> int64 row numbers.
    """
    if isinstance(parts, str):
        values = _key_column(frame, parts, "part").cast(pl.String)
        unknown = sorted(set(values.unique()) - set(PARTS))
        if unknown:
            raise SchemaError(f"column '{parts}' has parts {unknown}; expected only {list(PARTS)}. Rename its values")
        found = {part: (values == part).arg_true().to_numpy() for part in PARTS}
    elif isinstance(parts, Mapping):
        found = {part: np.asarray(parts.get(part, ()), dtype=np.int64) for part in PARTS}
    else:
        order = np.asarray(parts, dtype=np.int64)
        found = cut(order, fractions)
    _check_rows(found, frame.height)
    if not len(found["valid"]):
        train = found["train"]
        if group is None:
            carved = _rows_in_hash_order(train, (0.9, 0.1), seed)
        else:
            carved = _rows_of_groups(train, _key_column(frame, group, "group").gather(train), (0.9, 0.1), seed)
        found |= {part: carved[part] for part in ("train", "valid")}
    return _sorted(found)


SPLITS = {
    "rows": rows,
    "time": time,
    "user_time": user_time,
    "leave_last": leave_last,
    "cold_user": cold_user,
    "domain_holdout": domain_holdout,
    "given": given,
}


def _needed(split_name: str, what: str, value: Any) -> Any:
    if value is None:
        raise SchemaError(f"split '{split_name}' has no '{what}'; expected one. Pass {what}= or choose another split")
    return value


def _key_column(frame: pl.DataFrame, column: str, role: str) -> pl.Series:
    if column not in frame.columns:
        raise SchemaError(
            f"{role} column '{column}' is not in the table; expected one of {frame.columns}. Name the {role} column"
        )
    values = frame[column]
    if values.dtype.is_nested() or values.dtype in (pl.Binary, pl.Duration, pl.Object):
        raise SchemaError(
            f"{role} column '{column}' has type {values.dtype}; expected one value a row in a column that splits rows. "
            "Name another column"
        )
    if values.null_count():
        raise SchemaError(
            f"{role} column '{column}' has {values.null_count()} nulls; expected none in a column that splits rows. "
            "Drop or fill those rows"
        )
    return values


def _rows_in_hash_order(numbers: np.ndarray, fractions: Sequence[float], seed: int) -> Parts:
    ranking = hash_ranking(numbers.tolist(), seed)
    return _sorted(cut(numbers[ranking], fractions))


def _rows_of_groups(numbers: np.ndarray, groups: pl.Series, fractions: Sequence[float], seed: int) -> Parts:
    table = pl.DataFrame({"row": numbers, "key": groups.cast(pl.String)})
    order = hash_order(table["key"].unique().to_list(), fractions, seed)
    return {
        part: table.filter(pl.col("key").is_in(keys))["row"].to_numpy().astype(np.int64) for part, keys in order.items()
    }


def _positions(frame: pl.DataFrame, user: str, time: str) -> tuple[np.ndarray, np.ndarray]:
    """Position of each row in its user's (time, row) order, and the number of rows of that user."""
    table = pl.DataFrame({"user": _key_column(frame, user, "user"), "time": _key_column(frame, time, "time")})
    ranked = table.select(
        pl.col("time").rank("ordinal").over("user").cast(pl.Int64) - 1,
        pl.len().over("user").cast(pl.Int64).alias("count"),
    )
    return ranked["time"].to_numpy(), ranked["count"].to_numpy()


def _by_window(values: pl.Series, windows: Mapping[str, Any]) -> Parts:
    if set(windows) != set(PARTS) or len(set(windows.values())) != len(PARTS):
        raise SchemaError(f"windows are {dict(windows)}; expected one distinct value for each of {list(PARTS)}")
    parts = {part: (values == windows[part]).arg_true().to_numpy().astype(np.int64) for part in PARTS}
    outside = len(values) - sum(map(len, parts.values()))
    if outside:
        raise SchemaError(
            f"{outside} rows are in none of the windows {dict(windows)}; expected every row in one of them"
        )
    return parts


def _bycuts(values: pl.Series, cuts: Sequence[Any]) -> Parts:
    if len(cuts) != 2 or not cuts[0] <= cuts[1]:
        raise SchemaError(f"cuts are {list(cuts)}; expected the first time of valid and of test. Set data.splitcuts")
    train = (values < cuts[0]).to_numpy()
    return _by_mask(train, ~train & (values < cuts[1]).to_numpy())


def _by_mask(train: np.ndarray, valid: np.ndarray) -> Parts:
    return {
        "train": np.flatnonzero(train),
        "valid": np.flatnonzero(valid),
        "test": np.flatnonzero(~train & ~valid),
    }


def _sorted(parts: Parts) -> Parts:
    return {part: np.sort(rows).astype(np.int64) for part, rows in parts.items()}


def _check_rows(parts: Parts, height: int) -> None:
    numbers = np.concatenate([parts[part] for part in PARTS])
    if len(np.unique(numbers)) != len(numbers) or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < height):
        raise SchemaError(
            f"parts have {len(numbers)} row numbers, {len(np.unique(numbers))} of them distinct, for {height} rows; "
            "expected each row at most once, from 0 on. Correct the parts"
        )
