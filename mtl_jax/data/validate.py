"""Validation: what is wrong with a table, its labels or its parts, before anything is encoded.

Errors raise; all problems of one kind are in one message with the value, the expectation and the fix. What only needs
care is returned as warnings. Labels are checked in :mod:`mtl_jax.data.label_checks`, leaks in
:mod:`mtl_jax.data.leakage`.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from mtl_jax.data import label_checks, leakage
from mtl_jax.data.dataset import PARTS, Dataset
from mtl_jax.data.encode import flat_values
from mtl_jax.data.labels import as_guarded, fit_classes, labels
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

UNSEEN_ERROR = 0.95
MIN_DISTINCT = 20
"""Fewer distinct values than this prove nothing about the splits."""

_COLD_SPLITS = ("cold_user", "cold_start")


class Report(NamedTuple):
    """What validation found that is not an error: warnings, and the leakage scores as plain JSON types."""

    warnings: list[str]
    leakage: dict[str, Any]


def validate(dataset: Dataset) -> list[str]:
    """Checks a data set, fitted or not.

    Returns:
      Warnings.

    Raises:
      SchemaError: missing columns, wrong types, NaN or infinite features, bad weights, empty or overlapping parts,
        unknown domains, duplicate keys, parts that share no ids.
      LabelError: values out of range, constant labels, broken nesting.
      LeakageError: labels or excluded columns among the features, a feature that tells the label, an id as a feature,
        units or times that cross parts.
    """
    return inspect(dataset).warnings


def inspect(dataset: Dataset) -> Report:
    """:func:`validate`, with the leakage scores."""
    schema = dataset.schema
    check_columns(dataset.frame, schema, name=dataset.name)
    _check_parts(dataset)
    frames = {part: dataset.part(part) for part in PARTS}
    _check_numbers(frames, schema)
    _check_weights(frames, schema)
    _check_domains(frames, schema)
    _check_keys(frames, dataset.info.get("key", ()))
    schema = fit_classes(schema, frames["train"])
    found = {part: labels(frame, schema) for part, frame in frames.items()}
    warnings = label_checks.check_labels(frames, found, schema)
    warnings += leakage.check_parts(dataset, frames)
    guarded, label = as_guarded(schema, found["train"])
    scores = leakage.single_feature_scores(dataclasses.replace(dataset, schema=guarded), frames["train"], label)
    warnings += leakage.check_scores(scores, guarded)
    warnings += _unseen_categories(dataset, frames)
    top = {task: sorted(of.items(), key=lambda item: -item[1])[:5] for task, of in scores.items()}
    flagged = {task: [name for name, score in of.items() if score >= leakage.WARN] for task, of in scores.items()}
    plain = {"top": {task: [list(item) for item in best] for task, best in top.items()}, "flagged": flagged}
    return Report(warnings, plain | {"allowed": dict(schema.allow_leak)})


def check_columns(frame: pl.DataFrame, schema: Schema, *, name: str = "table") -> None:
    """Raises SchemaError for missing columns and wrong types, LeakageError for columns that must not be features."""
    _check_present(frame, schema, name)
    _check_types(frame, schema)
    leakage.check_names(as_guarded(schema)[0], name)


def wanted_columns(schema: Schema) -> list[tuple[str, str, str]]:
    """Every use of a column as (role, who, column)."""
    uses = [("features", f.name, f.name) for f in schema.features]
    uses += [("features", f.name, f.weights) for f in schema.bags if f.weights]
    for task in schema.tasks:
        weight = task.weight if isinstance(task.weight, str) else None
        uses += [("tasks", task.name, column) for column in (*task.columns, task.mask, weight) if column]
    roles = ("domain", "user", "item", "group", "time", "weight")
    return uses + [("keys", role, getattr(schema, role)) for role in roles if getattr(schema, role)]


def _check_present(frame: pl.DataFrame, schema: Schema, name: str) -> None:
    missing = [use for use in wanted_columns(schema) if use[2] not in frame.columns]
    if not missing:
        return
    by_role = collections.defaultdict(list)
    for role, who, _ in missing:
        by_role[role].append(who)
    expected = " and ".join(f"{role} {', '.join(dict.fromkeys(who))}" for role, who in by_role.items())
    columns = frame.columns if len(frame.columns) <= 30 else [*frame.columns[:30], "..."]
    raise SchemaError(
        f"columns {list(dict.fromkeys(column for *_, column in missing))} not in table '{name}' (has {columns}); "
        f"expected by {expected}. Rename them or drop the {' and '.join(by_role)}"
    )


def _check_types(frame: pl.DataFrame, schema: Schema) -> None:
    wrong = []

    def expect(column: str, fits: bool, what: str) -> None:
        if not fits:
            wrong.append(f"'{column}' has type {frame[column].dtype}, expected {what}")

    for feature in schema.features:
        dtype = frame[feature.name].dtype
        if isinstance(feature, Numeric):
            expect(feature.name, _is_number(dtype), "a number for Numeric")
        elif isinstance(feature, Categorical):
            expect(feature.name, _reads_as_text(dtype), "one value a row for Categorical")
        elif isinstance(feature, MultiHot | Sequence):
            fits = isinstance(dtype, pl.List | pl.Array) and _reads_as_text(dtype.inner)
            expect(feature.name, fits, f"a list column for {type(feature).__name__}")
    for feature in schema.bags:
        if feature.weights:
            dtype = frame[feature.weights].dtype
            expect(
                feature.weights, isinstance(dtype, pl.List | pl.Array) and _is_number(dtype.inner), "a list of numbers"
            )
    for task in schema.tasks:
        for column in task.columns:
            expect(column, *_label_type(task, frame[column].dtype))
        if task.mask:
            expect(task.mask, frame[task.mask].dtype.is_integer() or frame[task.mask].dtype == pl.Boolean, "a boolean")
    for role in ("domain", "user", "item", "group", "time"):
        if column := getattr(schema, role):
            expect(column, _reads_as_text(frame[column].dtype), f"one value a row for the {role}")
    for column in _weight_columns(schema):
        expect(column, _is_number(frame[column].dtype), "a number for a weight")
    if wrong:
        raise SchemaError(f"{'; '.join(wrong)}. Cast the column or declare it as what it is")


def _label_type(task: Task, dtype: pl.DataType) -> tuple[bool, str]:
    """Whether a label column has a type that the task can read, and which that would be."""
    if task.kind == "multiclass":
        return _reads_as_text(dtype), f"one value a row for task '{task.name}'"
    if task.kind == "ordinal":
        ordered = _is_number(dtype) or isinstance(dtype, pl.Enum) or dtype.is_temporal()
        fits = ordered or (task.classes is not None and _reads_as_text(dtype))
        return (
            fits,
            f"an order for ordinal task '{task.name}': numbers, an Enum, or Task.classes from lowest to highest",
        )
    if task.kind == "multilabel" and isinstance(task.column, str):
        fits = isinstance(dtype, pl.List | pl.Array) and _reads_as_text(dtype.inner)
        return fits, f"a list of label names, or several 0/1 columns, for multilabel task '{task.name}'"
    return _is_number(dtype), f"a number for {task.kind} task '{task.name}'"


def _check_parts(dataset: Dataset) -> None:
    sizes = {part: len(dataset.splits.get(part, ())) for part in PARTS}
    empty = [part for part, size in sizes.items() if size == 0]
    if empty:
        raise SchemaError(
            f"splits {empty} have 0 of {dataset.frame.height} rows; expected at least 1 in each of {list(PARTS)}. "
            "Change the split or its fractions"
        )
    rows = np.concatenate([dataset.splits[part] for part in PARTS])
    if rows.min() < 0 or rows.max() >= dataset.frame.height:
        raise SchemaError(
            f"splits have row numbers {rows.min()} to {rows.max()}; expected 0 to {dataset.frame.height - 1}. Fix them"
        )
    repeated = int((np.bincount(rows) > 1).sum())
    if repeated:
        raise SchemaError(
            f"{repeated} row numbers occur twice in {list(PARTS)}; expected disjoint splits. Correct them"
        )


def _check_numbers(frames: dict[str, pl.DataFrame], schema: Schema) -> None:
    wrong, negative = [], []
    for feature in schema.numerics:
        for part, frame in frames.items():
            series = frame[feature.name]
            if series.dtype.is_float():
                nan, infinite = series.is_nan().sum(), series.is_infinite().sum()
                if nan and feature.fill is None:
                    wrong.append(f"'{feature.name}' has {nan} NaN in {part}")
                if infinite:
                    wrong.append(f"'{feature.name}' has {infinite} infinite values in {part}")
            if feature.transform == "log1p" and (below := (series.cast(pl.Float64) < 0).sum()):
                negative.append(f"'{feature.name}' has {below} values below 0 in {part}")
    if wrong:
        raise SchemaError(f"{', '.join(wrong)}; expected numbers. Convert them to null or set Numeric.fill for NaN")
    if negative:
        raise SchemaError(f"{', '.join(negative)}; expected none for transform 'log1p'. Use 'signed_log1p'")


def _check_weights(frames: dict[str, pl.DataFrame], schema: Schema) -> None:
    wrong = []
    for column in _weight_columns(schema):
        values = pl.concat([frame[column] for frame in frames.values()]).cast(pl.Float64)
        for count, what in (
            ((values < 0).sum(), "negative values"),
            (len(values) - values.is_finite().fill_null(False).sum(), "null, NaN or infinite values"),
        ):
            if count:
                wrong.append(f"weight column '{column}' has {count} {what}")
    if wrong:
        raise SchemaError(f"{', '.join(wrong)}; expected finite numbers >= 0. Drop these rows or weight them 0")


def _check_domains(frames: dict[str, pl.DataFrame], schema: Schema) -> None:
    if schema.domain is None or schema.default_domain is not None:
        return
    present = pl.concat([frame[schema.domain].cast(pl.String) for frame in frames.values()]).unique().to_list()
    nulls = None in present
    unknown = sorted(set(present) - {None} - set(schema.domains)) if schema.domains else []
    if nulls or unknown:
        raise SchemaError(
            f"unknown domains {unknown + ['null'] * nulls} in column '{schema.domain}'; the schema has "
            f"{list(schema.domains) or 'none and takes those of the column'}. Set Schema.domains or Schema.default_domain, "
            "or drop these rows"
        )


def _check_keys(frames: dict[str, pl.DataFrame], key: Iterable[str]) -> None:
    key = list(key)
    for part, frame in frames.items() if key else ():
        repeated = frame.height - frame.select(key).n_unique()
        if repeated:
            raise SchemaError(
                f"{repeated} rows of {part} repeat another's key {key}; expected one row a key. Aggregate or drop them"
            )


def _unseen_categories(dataset: Dataset, frames: dict[str, pl.DataFrame]) -> list[str]:
    schema = dataset.schema
    distinct = {
        (f.name, part): _distinct(frames[part], f)
        for f in schema.features
        for part in PARTS
        if not isinstance(f, Numeric)
    }
    known: dict[str, pl.Series] = {
        v.name: pl.concat(
            [distinct[f.name, "train"] for f in schema.features if getattr(f, "vocabulary", None) == v.name]
        )
        for v in schema.vocabularies
        if any(getattr(f, "vocabulary", None) == v.name for f in schema.features)
    }
    unseen, apart = [], []
    for feature in schema.features:
        if isinstance(feature, Numeric):
            continue
        vocabulary = schema.vocabulary(feature.vocabulary)
        row_is_trained = vocabulary.min_count > 1 or vocabulary.hash_buckets
        for part in ("valid", "test"):
            values = distinct[feature.name, part]
            missing = len(values) - values.is_in(known[feature.vocabulary].unique().implode()).sum()
            share = missing / max(len(values), 1)
            text = f"{missing:,} of {len(values):,} {part} values of '{feature.name}' ({share:.1%})".replace(
                "%)", " %)"
            )
            if share > UNSEEN_ERROR and len(values) >= MIN_DISTINCT and feature.name not in _cold_columns(dataset):
                apart.append(text)
            elif missing and not row_is_trained:
                unseen.append(text)
    if apart:
        raise SchemaError(
            f"{', '.join(apart)} are not in train: the splits do not share ids; expected at most 95 %. "
            "Drop the feature or use another split"
        )
    if not unseen:
        return []
    return [
        f"{', '.join(unseen)} are not in train; expected few. They share id 1: set min_count=2 or id_dropout so that "
        "row is trained"
    ]


def _distinct(frame: pl.DataFrame, feature: Categorical | MultiHot | Sequence) -> pl.Series:
    series = frame[feature.name]
    values = series if isinstance(feature, Categorical) else flat_values(series)[0]
    return values.drop_nulls().unique().cast(pl.String)


def _cold_columns(dataset: Dataset) -> set[str | None]:
    """Columns whose values differ between parts by the design of the split."""
    split, options = dataset.info.get("split"), dataset.info.get("split_options", {})
    by_fold = {(options.get("folds") or {}).get("group"), dataset.schema.group} if "folds" in options else set()
    if split in _COLD_SPLITS:
        return {dataset.schema.user, dataset.schema.group, options.get("column")} | by_fold
    return by_fold | ({dataset.schema.domain} if split == "domain_holdout" else set())


def _weight_columns(schema: Schema) -> list[str]:
    return [w for w in (schema.weight, *(task.weight for task in schema.tasks)) if isinstance(w, str)]


def _is_number(dtype: pl.DataType) -> bool:
    return dtype.is_numeric() or dtype == pl.Boolean


def _reads_as_text(dtype: pl.DataType) -> bool:
    """Whether values can be told apart by their text, as categories are: no lists, structs, bytes or spans of time."""
    return not (dtype.is_nested() or dtype in (pl.Binary, pl.Duration, pl.Object))
