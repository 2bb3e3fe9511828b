"""What a column is, by its type and its training values."""

from collections.abc import Mapping

import polars as pl

from mtl_jax.data.leakage import ID_SHARE, MIN_ID_ROWS
from mtl_jax.data.schema import Categorical, Feature, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.data.validate import wanted_columns
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

MAX_CATEGORIES = 100
MAX_CLASSES = 20


def infer_schema(
    train: pl.DataFrame,
    *,
    tasks: tuple[Task, ...],
    listed: Mapping[str, tuple[str, ...]],
    roles: Mapping[str, str | None],
    exclude: Mapping[str, str],
    allow_leak: Mapping[str, str],
    min_count: int,
    max_len: int,
) -> Schema:
    """The unfitted schema of a table.

    Args:
      train: Training rows: no other row has a say in what a column is.
      tasks: Their columns, masks and weights are never features unless listed.
      listed: ``categorical``, ``numeric``, ``multihot``, ``sequence`` -> columns.
      roles: ``user``, ``item``, ``time``, ``domain``, ``group``, ``weight`` -> column or None.
      exclude: Column -> reason.
      allow_leak: Feature -> reason.
      min_count: Of every vocabulary.
      max_len: Of every list.

    Returns:
      Features in the order of the columns, one vocabulary for each that is not numeric.
    """
    chosen = {column: kind for kind, columns in listed.items() for column in columns}
    label_columns = {column for _, _, column in wanted_columns(Schema((), (), tasks))}
    keys = {column for role, column in roles.items() if role != "domain" and column is not None}
    features: list[Feature] = []
    excluded = dict(exclude)
    for column in train.columns:
        kind = chosen.get(column)
        if kind is None:
            if column in label_columns | keys | set(exclude):
                continue
            kind, reason = infer_feature(train[column])
            if kind is None:
                excluded[column] = reason
                continue
        features.append(_feature(kind, column, max_len))
    if not features:
        raise SchemaError(
            f"no column of {train.columns} is a feature; expected at least one (excluded: {excluded}). "
            "List some in data.categorical or data.numeric"
        )
    return Schema(
        features=tuple(features),
        vocabularies=tuple(Vocabulary(f.name, min_count=min_count) for f in features if not isinstance(f, Numeric)),
        tasks=tasks,
        excluded=excluded,
        allow_leak=dict(allow_leak),
        **roles,
    )


def infer_feature(column: pl.Series) -> tuple[str | None, str]:
    """(kind, ""), or (None, the reason why the column is no feature)."""
    dtype = column.dtype
    if isinstance(dtype, pl.List | pl.Array):
        return "multihot", ""
    if dtype.is_temporal():
        return None, "a date or time; derive features from it"
    is_text = dtype in (pl.String, pl.Categorical, pl.Enum)
    if not (is_text or dtype.is_numeric() or dtype == pl.Boolean):
        return None, f"type {dtype} is not supported"
    distinct = column.drop_nulls().n_unique()
    share = distinct / max(len(column), 1)
    # Real numbers are naturally distinct; few rows prove nothing.
    if (is_text or dtype.is_integer()) and len(column) >= MIN_ID_ROWS and share > ID_SHARE:
        return None, f"{share:.0%} distinct values".replace("%", " %")
    if is_text or dtype == pl.Boolean or (dtype.is_integer() and distinct <= MAX_CATEGORIES):
        return "categorical", ""
    return "numeric", ""


def infer_kind(column: pl.Series) -> str:
    """The kind of a task by its training labels; ordinal, count and zero_inflated are never guessed."""
    dtype = column.dtype
    if isinstance(dtype, pl.List | pl.Array):
        return "multilabel"
    values = column.drop_nulls().unique()
    if dtype == pl.Boolean or (dtype.is_numeric() and set(values.to_list()) <= {0, 1}):
        return "binary"
    if dtype in (pl.String, pl.Categorical, pl.Enum) or (dtype.is_integer() and len(values) <= MAX_CLASSES):
        return "multiclass"
    if dtype.is_numeric():
        return "regression"
    raise SchemaError(
        f"label column '{column.name}' has type {dtype}; expected numbers, booleans or text. "
        "Convert it or drop the task"
    )


def _feature(kind: str, column: str, max_len: int) -> Feature:
    if kind == "numeric":
        return Numeric(column)
    if kind == "categorical":
        return Categorical(column, column)
    return (MultiHot if kind == "multihot" else Sequence)(column, column, max_len)
