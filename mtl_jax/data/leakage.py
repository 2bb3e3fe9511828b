"""The leakage guard: features and parts that would give the answer away."""

from typing import Any

import numpy as np
import polars as pl

from mtl_jax.data.dataset import PARTS, Dataset
from mtl_jax.data.encode import appearance_codes
from mtl_jax.data.hash_order import mixed
from mtl_jax.data.labels import Label
from mtl_jax.data.schema import Categorical, Numeric, Schema
from mtl_jax.errors import LeakageError

FAIL = 0.95
WARN = 0.90
MAX_ROWS = 200_000
MIN_LABELS = 10
"""Positives, and negatives, below which a high AUC is chance: with 10 of each, .95 is 3.4 standard errors from .5."""
ID_SHARE = 0.98
MIN_ID_ROWS = 50
DUPLICATE_SHARE = 0.01


def check_names(schema: Schema, name: str) -> None:
    """Raises LeakageError where a label or an excluded column is a feature."""
    columns = {f.name for f in schema.features} | {f.weights for f in schema.bags if f.weights}
    wrong = [
        f"feature '{task.column}' is the label of task '{task.name}'" for task in schema.tasks if task.column in columns
    ]
    if wrong:
        raise LeakageError(f"{', '.join(wrong)}; expected no label among the features. Remove it from the features")
    wrong = [
        f"feature '{column}' is an excluded column of {name} ({reason})"
        for column, reason in schema.excluded.items()
        if column in columns and column not in schema.allow_leak
    ]
    if wrong:
        raise LeakageError(f"{', '.join(wrong)}. Remove it, or state a reason in allow_leak")


def single_feature_scores(
    dataset: Dataset, train: pl.DataFrame, found: dict[str, Label]
) -> dict[str, dict[str, float]]:
    """How well each feature alone tells each binary or regression label on training rows.

    Numeric features by value and, as ``<name>__missing``, by their missing flag; categorical ones by a two-fold
    out-of-fold target mean, since in-sample means would flag every high-cardinality column. At most 200,000 rows, those
    with the lowest hashes of their row numbers. Ranks are made once a feature and serve all tasks.

    Args:
      dataset: For its schema and the row numbers of train.
      train: The rows of train.
      found: Task -> label of these rows.

    Returns:
      Task -> feature -> max(AUC, 1 - AUC), or |Spearman correlation| for regression, in [0, 1]. Tasks with fewer than
      10 positives or negatives (20 values for regression) where the feature is present are left out.
    """
    hashes = _row_hashes(dataset.splits["train"])
    rows = np.arange(len(hashes))
    if len(rows) > MAX_ROWS:
        rows = np.sort(np.argpartition(hashes, MAX_ROWS)[:MAX_ROWS])
        train = train[rows]
    fold = (hashes[rows] & np.uint64(1)).astype(np.int64)
    targets = {}
    for task in dataset.schema.tasks:
        if task.kind != "multiclass":
            values = found[task.name].values.to_numpy()[rows]
            targets[task.name] = (values, found[task.name].mask[rows], task.kind)
    scores: dict[str, dict[str, float]] = {task: {} for task in targets}
    for feature in dataset.schema.features:
        if not isinstance(feature, Numeric | Categorical):
            continue
        for name, codes, by_mean in _views(feature, train[feature.name]):
            for task, (values, mask, kind) in targets.items():
                keep = mask & (codes >= 0)
                score = _score(codes[keep], values[keep], fold[keep] if by_mean else None, kind)
                if score is not None:
                    scores[task][name] = score
    return scores


def check_scores(scores: dict[str, dict[str, float]], schema: Schema) -> list[str]:
    """Raises LeakageError above .95, warns from .90, except for features in ``allow_leak``."""
    kinds = {task.name: "|Spearman|" if task.kind == "regression" else "AUC" for task in schema.tasks}
    fail, warn = [], []
    for task, of in scores.items():
        for name, score in of.items():
            if name in schema.allow_leak or name.removesuffix("__missing") in schema.allow_leak:
                continue
            text = f"feature '{name}' alone has {kinds[task]} {score:.3f} for '{task}'"
            if score > FAIL:
                fail.append(text)
            elif score >= WARN:
                warn.append(text)
    if fail:
        raise LeakageError(
            f"{', '.join(fail)} on train; expected < 0.95. It is probably an outcome: exclude it, or state a reason in "
            "allow_leak"
        )
    return [f"{', '.join(warn)} on train; expected < 0.90. Check that it is known before the label"] if warn else []


def check_parts(dataset: Dataset, frames: dict[str, pl.DataFrame]) -> list[str]:
    """Ids as features, label codes, units and times that cross parts, repeated rows; returns warnings."""
    warnings = _id_like(frames["train"], dataset.schema)
    _label_codes(frames["train"], dataset.schema)
    _check_overlap(dataset, frames)
    warnings += _check_time(dataset, frames)
    return warnings + _duplicates(frames, dataset.schema)


def _id_like(train: pl.DataFrame, schema: Schema) -> list[str]:
    """Categorical features with almost as many values as rows fail; integers among the numeric ones may be amounts."""
    shares = {}
    for feature in schema.features if train.height >= MIN_ID_ROWS else ():
        if isinstance(feature, Categorical) or (
            isinstance(feature, Numeric) and train[feature.name].dtype.is_integer()
        ):
            share = train[feature.name].n_unique() / train.height
            if share > ID_SHARE and feature.name not in schema.allow_leak:
                shares[feature] = f"'{feature.name}' has {share:.0%} distinct values".replace("%", " %")
    fail = [text for feature, text in shares.items() if isinstance(feature, Categorical)]
    if fail:
        raise LeakageError(f"{', '.join(fail)}; expected a feature. Use it as group or user")
    return [f"{', '.join(shares.values())}; if it is an id, remove it from the features"] if shares else []


def _label_codes(train: pl.DataFrame, schema: Schema) -> None:
    """A feature that renames the classes of a multiclass task; the scores find the other kinds."""
    wrong = []
    for task in schema.tasks:
        if task.kind != "multiclass":
            continue
        for feature in (*schema.categoricals, *schema.numerics):
            if feature.name in schema.allow_leak:
                continue
            pair = train.select(feature.name, task.column).drop_nulls()
            counts = {pair[feature.name].n_unique(), pair[task.column].n_unique()}
            if len(counts) == 1 and counts.pop() > 1 and pair.n_unique() == pair[task.column].n_unique():
                wrong.append(f"feature '{feature.name}' is a one-to-one code of the label of '{task.name}'")
    if wrong:
        raise LeakageError(
            f"{', '.join(wrong)}; expected features known before it. Remove it, or state a reason in allow_leak"
        )


def _check_overlap(dataset: Dataset, frames: dict[str, pl.DataFrame]) -> None:
    split = dataset.info.get("split", "given")
    units = {dataset.schema.group}
    if split == "cold_user":
        units.add(dataset.info.get("split_options", {}).get("column") or dataset.schema.user or dataset.schema.group)
    wrong = []
    for unit in sorted(unit for unit in units if unit is not None):
        values = {part: frame.select(pl.col(unit).drop_nulls().unique()) for part, frame in frames.items()}
        for first, second in (("train", "valid"), ("train", "test"), ("valid", "test")):
            shared = values[first].join(values[second], on=unit, how="semi").height
            if shared:
                wrong.append(f"{shared} values of '{unit}' are in {first} and {second}")
    if wrong:
        raise LeakageError(f"{', '.join(wrong)}; expected none for split '{split}'. Split by the group column")


def _check_time(dataset: Dataset, frames: dict[str, pl.DataFrame]) -> list[str]:
    """Rows in time order for split ``time``; and ``info["windows"]``: part -> feature_end, label_start, label_end.

    Folds mix the times of train and valid, which a group then keeps apart; test comes after both all the same.
    """
    wrong = []
    column = dataset.schema.time
    if dataset.info.get("split") == "time" and column is not None:
        spans = {part: (frame[column].min(), frame[column].max()) for part, frame in frames.items()}
        folded = "folds" in dataset.info.get("split_options", {})
        for first, second in (("train", "test" if folded else "valid"), ("valid", "test")):
            if spans[first][1] > spans[second][0]:
                wrong.append(
                    f"split '{first}' has rows up to {column} {spans[first][1]} and '{second}' from "
                    f"{spans[second][0]}; expected {first} to end first. Move the cut"
                )
    windows: dict[str, Any] = dataset.info.get("windows", {})
    for part, window in windows.items():
        if window["feature_end"] >= window["label_start"]:
            wrong.append(
                f"split '{part}' has features up to {column} {window['feature_end']} and labels from {column} "
                f"{window['label_start']}; expected features to end first. Move the cut"
            )
    if wrong:
        raise LeakageError("; ".join(wrong))
    parts = [part for part in PARTS if part in windows]
    overlaps = []
    for first, second in zip(parts[:-1], parts[1:], strict=True):
        start = max(windows[first]["label_start"], windows[second]["label_start"])
        end = min(windows[first]["label_end"], windows[second]["label_end"])
        if start <= end:
            overlaps.append(f"label windows of {first} and {second} overlap from {column} {start} to {end}")
    return [f"{', '.join(overlaps)}; set purge=true to drop these rows"] if overlaps else []


def _duplicates(frames: dict[str, pl.DataFrame], schema: Schema) -> list[str]:
    names = [f.name for f in schema.features]
    if not names:
        return []
    hashes = {part: frame.select(names).hash_rows() for part, frame in frames.items()}
    known = hashes["train"].unique().implode()
    shares = {part: hashes[part].is_in(known).mean() for part in ("valid", "test")}
    return [
        f"{share:.0%} of {part} rows equal a train row in all features".replace("%", " %")
        for part, share in shares.items()
        if share > DUPLICATE_SHARE
    ]


def _views(feature: Numeric | Categorical, series: pl.Series) -> list[tuple[str, np.ndarray, bool]]:
    """(name, codes, whether scored by target mean): codes i64[N] are ranks of the value or group numbers, -1 absent."""
    if isinstance(feature, Categorical):
        return [(feature.name, appearance_codes(series).astype(np.int64), True)]
    values = series.cast(pl.Float64)
    values = values.fill_nan(feature.fill)
    views = [(feature.name, values.rank("dense").fill_null(0).to_numpy().astype(np.int64) - 1, False)]
    if series.null_count():
        views.append((f"{feature.name}__missing", series.is_null().to_numpy().astype(np.int64), False))
    return views


def _score(codes: np.ndarray, values: np.ndarray, fold: np.ndarray | None, kind: str) -> float | None:
    enough = min(values.sum(), len(values) - values.sum()) if kind == "binary" else len(values) / 2
    if enough < MIN_LABELS:
        return None
    if fold is not None:
        codes = _out_of_fold_codes(codes, values, fold)
    return _auc(codes, values) if kind == "binary" else _spearman(codes, values)


def _auc(codes: np.ndarray, values: np.ndarray) -> float:
    positives = np.bincount(codes, weights=values)
    negatives = np.bincount(codes) - positives
    below = np.cumsum(negatives) - negatives
    area = (positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum())
    return float(max(area, 1 - area))


def _spearman(codes: np.ndarray, values: np.ndarray) -> float | None:
    ranks = _mid_ranks(codes), _mid_ranks(np.unique(values, return_inverse=True)[1])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return float(abs(np.corrcoef(*ranks)[0, 1]))


def _mid_ranks(codes: np.ndarray) -> np.ndarray:
    counts = np.bincount(codes)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def _out_of_fold_codes(groups: np.ndarray, values: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Ranks of the mean label of the row's group in the other fold, or of that fold where the group is absent there."""
    cell = 2 * groups + fold
    size = 2 * (int(groups.max()) + 1)
    counts = np.bincount(cell, minlength=size).reshape(-1, 2)[:, ::-1]
    sums = np.bincount(cell, weights=values, minlength=size).reshape(-1, 2)[:, ::-1]
    fallback = sums.sum(0) / np.maximum(counts.sum(0), 1)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), fallback)
    return np.unique(means.ravel(), return_inverse=True)[1][cell]


def _row_hashes(rows: np.ndarray) -> np.ndarray:
    """u64[N]: SplitMix64 of row numbers (Steele, Lea, Flood, OOPSLA 2014), the same everywhere."""
    return mixed(rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15))
