"""From a polars frame to arrays: fit the schema on training rows, then map any rows with it."""

import collections
import dataclasses
import warnings

import numpy as np
import polars as pl

from mtl_jax.data.dataset import Encoded
from mtl_jax.data.hash_order import key_hash
from mtl_jax.data.labels import fit_classes, flat_values, labels
from mtl_jax.data.schema import FIRST_ID, NULL_VALUE, OOV_ID, Categorical, MultiHot, Numeric, Schema, Vocabulary
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

MIN_STD = 1e-8


def fit_schema(schema: Schema, train: pl.DataFrame) -> Schema:
    """Fills in everything that is learned from rows: vocabularies, moments, classes, domain names.

    Args:
      schema: What to fit. Given ``domains`` and ``Task.classes`` are kept; all else is fitted anew.
      train: The training rows, and no others.

    Returns:
      The schema with vocabularies by (-count, value), a vocabulary of several features over the union of their values;
      numeric moments in float64 over the finite values after the transform; classes and domains in ascending order.

    Raises:
      SchemaError: The default domain is none of the domains.
    """
    schema = fit_classes(schema, train)
    label = labels(train, schema)
    domains = schema.domains
    if schema.domain is not None and not domains:
        domains = tuple(train[schema.domain].drop_nulls().unique().sort().cast(pl.String))
    if schema.default_domain is not None and schema.default_domain not in domains:
        raise SchemaError(
            f"default_domain is '{schema.default_domain}'; expected one of the domains {list(domains)}. Change it, or "
            "leave it out"
        )
    return dataclasses.replace(
        schema,
        vocabularies=tuple(_fit_vocabulary(v, schema, train) for v in schema.vocabularies),
        features=tuple(_fit_numeric(f, train[f.name]) if isinstance(f, Numeric) else f for f in schema.features),
        tasks=tuple(_fit_task(task, label[task.name].observed) for task in schema.tasks),
        domains=domains,
    )


def encode(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    user_codes: np.ndarray | None = None,
    item_codes: np.ndarray | None = None,
) -> Encoded:
    """Maps rows to arrays with a fitted schema.

    Args:
      frame: N rows.
      schema: Fitted.
      user_codes: int32[N] codes of ``schema.user``; None numbers the users of this frame in order of appearance, so
        that codes of two frames do not compare.
      item_codes: The same for ``schema.item``.

    Returns:
      The arrays; see :class:`~mtl_jax.data.dataset.Encoded`.

    Raises:
      SchemaError: a domain, or the length of a weight list, is not what the schema says.
    """
    tables = {v.name: v for v in schema.vocabularies}
    num_rows = frame.height
    ids = np.empty((num_rows, len(schema.categoricals)), np.int32)
    for column, feature in enumerate(schema.categoricals):
        ids[:, column] = _ids(frame[feature.name], tables[feature.vocabulary])
    label, mask, task_weight = _encode_tasks(frame, schema)
    return Encoded(
        ids=ids,
        dense=_encode_dense(frame, schema),
        bags={f.name: _encode_bag(frame, f, tables[f.vocabulary]) for f in schema.bags},
        sequences={
            f.name: _encode_list(frame[f.name], tables[f.vocabulary], f.max_len, keep_last=True)[0]
            for f in schema.sequences
        },
        labels=label,
        mask=mask,
        task_weight=task_weight,
        weight=_float32(frame[schema.weight]) if schema.weight else np.ones(num_rows, np.float32),
        domain=_encode_domain(frame, schema),
        user=_keys(frame, schema.user, user_codes),
        item=_keys(frame, schema.item, item_codes),
    )


def appearance_codes(series: pl.Series) -> np.ndarray:
    """int32[N]: distinct values numbered in order of first appearance; all nulls are one value."""
    distinct = series.unique(maintain_order=True)
    codes = np.arange(len(distinct), dtype=np.int32)
    return _replace(series, distinct, codes)


def transformed(feature: Numeric, series: pl.Series) -> np.ndarray:
    """f64[N]: NaN filled, then the feature's transform; null is NaN."""
    values = series.cast(pl.Float64)
    if feature.fill is not None:
        values = values.fill_nan(feature.fill)
    values = values.to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        if feature.transform == "log1p":
            return np.log1p(values)
        if feature.transform == "signed_log1p":
            return np.sign(values) * np.log1p(np.abs(values))
    return values


def _fit_vocabulary(vocabulary: Vocabulary, schema: Schema, train: pl.DataFrame) -> Vocabulary:
    if vocabulary.hash_buckets:
        return dataclasses.replace(vocabulary, values=())
    counts: collections.Counter[str] = collections.Counter()
    for feature in schema.features:
        if isinstance(feature, Numeric) or feature.vocabulary != vocabulary.name:
            continue
        series = train[feature.name]
        values = series if isinstance(feature, Categorical) else flat_values(series)[0]
        table = values.alias("value").value_counts(name="count")
        for value, count in zip(table["value"].cast(pl.String), table["count"], strict=True):
            counts[NULL_VALUE if value is None else value] += count
    kept = [value for value, count in counts.items() if count >= vocabulary.min_count]
    return dataclasses.replace(vocabulary, values=tuple(sorted(kept, key=lambda value: (-counts[value], value))))


def _fit_numeric(feature: Numeric, series: pl.Series) -> Numeric:
    values = transformed(feature, series)
    mean, std = _moments(values[np.isfinite(values)], f"feature '{feature.name}'")
    return dataclasses.replace(feature, mean=mean, std=std, missing_indicator=series.null_count() > 0)


def _fit_task(task: Task, observed: pl.Series) -> Task:
    if task.kind == "regression":
        mean, std = _moments(observed.to_numpy(), f"task '{task.name}'") if task.standardise else (0.0, 1.0)
        return dataclasses.replace(task, mean=mean, std=std)
    if task.kind in ("multiclass", "ordinal"):
        counts = dict(observed.value_counts(name="count").rows())
        add = 1 if task.kind == "ordinal" else 0  # so that every cutpoint starts at a finite place
        total = max(len(observed) + add * len(task.classes), 1)
        return dataclasses.replace(
            task, frequencies=tuple((counts.get(value, 0) + add) / total for value in task.classes)
        )
    return task


def _moments(values: np.ndarray, what: str) -> tuple[float, float]:
    if values.size == 0:
        return 0.0, 1.0
    mean, std = float(values.mean()), float(values.std())
    if std < MIN_STD:
        warnings.warn(f"{what} is constant in train (std {std:.1e}); expected it to vary. Std 1 is used", stacklevel=3)
        std = 1.0
    return mean, std


def _ids(series: pl.Series, vocabulary: Vocabulary) -> np.ndarray:
    """int32[N]. Only distinct values are turned into text; rows are mapped by their physical value."""
    distinct = series.unique()
    text = distinct.cast(pl.String).fill_null(NULL_VALUE)
    if vocabulary.hash_buckets:
        ids = np.array([FIRST_ID + key_hash(value) % vocabulary.hash_buckets for value in text], np.int32)
    else:
        known = {value: index for index, value in enumerate(vocabulary.values, start=FIRST_ID)}
        ids = np.array([known.get(value, OOV_ID) for value in text], np.int32)
    return _replace(series, distinct, ids)


def _replace(series: pl.Series, distinct: pl.Series, codes: np.ndarray) -> np.ndarray:
    if series.is_empty():
        return np.zeros(0, np.int32)
    return (
        series.to_physical().replace_strict(distinct.to_physical(), pl.Series(codes), return_dtype=pl.Int32).to_numpy()
    )


def _encode_dense(frame: pl.DataFrame, schema: Schema) -> np.ndarray:
    dense = np.empty((frame.height, len(schema.dense_names)), np.float32)
    column = 0
    for feature in schema.numerics:
        null = frame[feature.name].is_null().to_numpy()
        values = (transformed(feature, frame[feature.name]) - feature.mean) / feature.std
        values = np.clip(values, -feature.clip, feature.clip)
        dense[:, column] = np.where(null, 0.0, values)
        column += 1
        if feature.missing_indicator:
            dense[:, column] = null
            column += 1
    return dense


def _encode_bag(frame: pl.DataFrame, feature: MultiHot, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    ids, rows, places, kept = _encode_list(frame[feature.name], vocabulary, feature.max_len, keep_last=False)
    weights = np.zeros(ids.shape, np.float32)
    weights[rows, places] = 1.0
    if feature.weights is not None:
        lengths = flat_values(frame[feature.name])[1]
        given, given_lengths = flat_values(frame[feature.weights])
        if not np.array_equal(lengths, given_lengths):
            raise SchemaError(
                f"{int((lengths != given_lengths).sum())} rows have lists of other lengths in '{feature.weights}' than "
                f"in '{feature.name}'; expected one weight an entry. Make them equal"
            )
        weights[rows, places] = _float32(given)[kept]
    return ids, weights


def _encode_list(
    series: pl.Series, vocabulary: Vocabulary, max_len: int, *, keep_last: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """int32[N, max_len] right-padded, and for each entry that is kept: its row, its place, its index among all."""
    flat, lengths = flat_values(series)
    rows = np.repeat(np.arange(len(series)), lengths)
    places = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if keep_last:
        places = places - np.repeat(np.maximum(lengths - max_len, 0), lengths)
    kept = np.flatnonzero((places >= 0) & (places < max_len))
    ids = np.zeros((len(series), max_len), np.int32)
    ids[rows[kept], places[kept]] = _ids(flat, vocabulary)[kept]
    return ids, rows[kept], places[kept], kept


def _encode_tasks(frame: pl.DataFrame, schema: Schema) -> tuple[dict, dict, dict]:
    encoded, mask, task_weight = {}, {}, {}
    for name, label in labels(frame, schema).items():
        task = schema.task(name)
        mask[name] = label.mask
        if task.kind == "multilabel":
            encoded[name] = np.where(label.mask, label.values, 0.0).astype(np.float32)
        elif task.has_classes:
            known = {value: index for index, value in enumerate(task.classes or ())}
            distinct = label.values.unique()
            ids = np.array([known.get(value, 0) for value in distinct], np.int32)
            encoded[name] = np.where(label.mask, _replace(label.values, distinct, ids), 0).astype(np.int32)
        else:
            values = (label.values.to_numpy() - task.mean) / task.std
            encoded[name] = np.where(label.mask, values, 0.0).astype(np.float32)
        if isinstance(task.weight, str):
            task_weight[name] = _float32(frame[task.weight])
    return encoded, mask, task_weight


def _encode_domain(frame: pl.DataFrame, schema: Schema) -> np.ndarray | None:
    if schema.domain is None:
        return None
    column = frame[schema.domain]
    distinct = column.unique()
    known = {value: index for index, value in enumerate(schema.domains)}
    names = distinct.cast(pl.String)
    unknown = [value for value in names if value not in known]
    if unknown and schema.default_domain is None:
        raise SchemaError(
            f"unknown domains {sorted(map(str, unknown))} in column '{schema.domain}'; the schema has "
            f"{list(schema.domains)}. Set Schema.domains to all of them, or Schema.default_domain, or drop these rows"
        )
    default = known.get(schema.default_domain)
    return _replace(column, distinct, np.array([known.get(value, default) for value in names], np.int32))


def _keys(frame: pl.DataFrame, column: str | None, codes: np.ndarray | None) -> np.ndarray | None:
    if column is None:
        return None
    return appearance_codes(frame[column]) if codes is None else np.asarray(codes, np.int32)


def _float32(series: pl.Series) -> np.ndarray:
    return series.cast(pl.Float64).to_numpy().astype(np.float32)
