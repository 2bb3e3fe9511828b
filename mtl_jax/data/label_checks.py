"""Checks of the labels of a table that has been split."""

import math

import numpy as np
import polars as pl

from mtl_jax.data.labels import Label, class_text, flat_values
from mtl_jax.data.schema import Schema
from mtl_jax.errors import LabelError
from mtl_jax.tasks import Task

FEW = 100
"""Positives (or negatives) of a test part below which methods cannot be ranked."""

Found = dict[str, dict[str, Label]]


def check_labels(frames: dict[str, pl.DataFrame], found: Found, schema: Schema) -> list[str]:
    """Raises LabelError for labels out of range, constant or not nested as declared; returns warnings.

    Args:
      frames: Part -> rows.
      found: Part -> task -> label.
      schema: Its tasks have their classes; nothing else need be fitted.
    """
    _check_range(found, schema)
    _check_nesting(frames, schema, found)
    _check_constant(found, schema)
    warnings = _empty_parts(found, schema) + _constant_domains(frames, found, schema) + _few_positives(found, schema)
    return warnings + _constant_cells(found, schema) + _unknown_entries(frames, schema)


def auc_standard_error(num_positives: int, num_negatives: int, auc: float = 0.9) -> float:
    """Standard error of an AUC (Hanley, McNeil, *Meaning and use of the area under a ROC curve*, Radiology 1982)."""
    both_positive, both_negative = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc)
    variance += (num_positives - 1) * (both_positive - auc**2) + (num_negatives - 1) * (both_negative - auc**2)
    return math.sqrt(variance / (num_positives * num_negatives))


def _check_range(found: Found, schema: Schema) -> None:
    wrong = []
    for task in schema.tasks:
        observed = {part: labels[task.name].observed for part, labels in found.items()}
        if task.kind in ("binary", "multilabel"):
            values = sorted(pl.concat(list(observed.values())).unique().to_list())
            others = [_short(v) for v in values if v not in (0, 1)]
            if others:
                instead = "Use kind='multiclass' or m" if task.kind == "binary" else "M"
                shown = ", ".join(map(_short, values[:10])) + (", ..." if len(values) > 10 else "")
                wrong.append(
                    f"task '{task.name}' has values [{shown}]; expected 0 or 1 for kind '{task.kind}'. "
                    f"{instead}ap {', '.join(others[:10])}"
                )
        elif not task.has_classes:
            for part, values in observed.items():
                bad = len(values) - int(values.is_finite().sum())
                if bad:
                    after = f" after {task.transform}" if task.transform != "none" else ""
                    wrong.append(
                        f"task '{task.name}' has {bad} NaN or infinite values{after} in {part}; expected finite "
                        "numbers. Convert them to null"
                    )
                if task.kind != "regression" and (below := int((values < 0).sum())):
                    wrong.append(
                        f"task '{task.name}' has {below} values below 0 in {part}; expected numbers >= 0 for kind "
                        f"'{task.kind}'. Use kind='regression', or convert them to null"
                    )
        else:
            classes = set(task.classes)
            for part, values in observed.items():
                unknown = sorted(set(values.unique()) - classes)
                if unknown:
                    wrong.append(
                        f"task '{task.name}' has values {unknown} in {part}; expected its classes {sorted(classes)}. "
                        "Set Task.classes to all of them, or mask these rows"
                    )
    _raise(wrong)


def _check_nesting(frames: dict[str, pl.DataFrame], schema: Schema, found: Found) -> None:
    wrong = []
    for task in schema.tasks:
        if task.implies is None:
            continue
        count = 0
        for labels in found.values():
            inner, outer = labels[task.name], labels[task.implies]
            one_without = (inner.values == 1) & (outer.values == 0)
            count += int((one_without.fill_null(False).to_numpy() & inner.mask & outer.mask).sum())
        if count:
            wrong.append(
                f"{count} rows have {task.name}=1 and {task.implies}=0, but {task.name} implies {task.implies}. "
                "Fix the labels or remove Task.implies"
            )
    _raise(wrong)


def _check_constant(found: Found, schema: Schema) -> None:
    wrong = []
    for task in schema.tasks:
        for part, labels in found.items():
            observed = labels[task.name].observed
            if part == "train" and len(observed) == 0:
                wrong.append(f"task '{task.name}' has no observed label in train; expected some. Check mask and space")
            elif task.kind == "binary" and len(observed) and (constant := _constant(observed)):
                wrong.append(
                    f"task '{task.name}' has {constant} in {part}; expected both labels, AUC is undefined. "
                    "Drop the task or use another split"
                )
            elif part == "train" and task.kind == "multilabel":
                if constant := _constant_labels(task, labels[task.name]):
                    wrong.append(
                        f"task '{task.name}' has no positive or no negative of {constant} in train; expected both of "
                        "every label. Drop these from Task.classes or Task.column"
                    )
            elif part == "train" and task.kind != "binary" and observed.n_unique() < 2:
                wrong.append(
                    f"task '{task.name}' has one value in train, {observed[0]}; expected several. Drop the task"
                )
    _raise(wrong)


def _empty_parts(found: Found, schema: Schema) -> list[str]:
    return [
        f"task '{task.name}' has no observed label in {part}; its metrics are reported as n/a there"
        for part in ("valid", "test")
        for task in schema.tasks
        if not found[part][task.name].mask.any()
    ]


def _constant_domains(frames: dict[str, pl.DataFrame], found: Found, schema: Schema) -> list[str]:
    if schema.domain is None:
        return []
    cells = []
    for part, labels in found.items():
        domain = frames[part][schema.domain].cast(pl.String)
        if schema.default_domain is not None:
            domain = domain.fill_null(schema.default_domain)
        for value in sorted(domain.unique()):
            here = (domain == value).to_numpy()
            for task in schema.tasks:
                observed = labels[task.name].values.filter(pl.Series(here & labels[task.name].mask))
                if task.kind == "binary" and len(observed) and (constant := _constant(observed)):
                    cells.append(f"task '{task.name}' in domain '{value}' has {constant} in {part}")
    return [f"{'; '.join(cells)}: AUC is undefined there and reported as n/a"] if cells else []


def _few_positives(found: Found, schema: Schema) -> list[str]:
    few = []
    for task in schema.tasks:
        observed = found["test"][task.name].observed
        if task.kind != "binary" or len(observed) == 0:
            continue
        positives = int(observed.sum())
        negatives = len(observed) - positives
        if 0 < min(positives, negatives) < FEW:
            error = auc_standard_error(positives, negatives)
            kind = "positives" if positives <= negatives else "negatives"
            few.append(
                f"task '{task.name}' has {min(positives, negatives)} {kind} in test: standard error of AUC is about "
                f"{error:.2f}; do not rank methods"
            )
    return few


def _constant_cells(found: Found, schema: Schema) -> list[str]:
    return [
        f"task '{task.name}' has no positive or no negative of {constant} in {part}; its auc is over the other labels"
        for part in ("valid", "test")
        for task in schema.tasks
        if task.kind == "multilabel" and (constant := _constant_labels(task, found[part][task.name]))
    ]


def _unknown_entries(frames: dict[str, pl.DataFrame], schema: Schema) -> list[str]:
    warnings = []
    for task in schema.tasks:
        if task.kind != "multilabel" or not isinstance(task.column, str):
            continue
        for part, frame in frames.items():
            entries = class_text(flat_values(frame[task.column])[0].drop_nulls())
            unknown = entries.filter(~entries.is_in(list(task.classes)))
            if len(unknown):
                names = sorted(unknown.unique())
                shown = f"{names[:10]}{', ...' if len(names) > 10 else ''}"
                warnings.append(
                    f"{len(unknown):,} of {len(entries):,} entries of task '{task.name}' in {part} are none of its "
                    f"{task.num_classes} labels and are left out: {shown}"
                )
    return warnings


def _constant_labels(task: Task, label: Label) -> list[str]:
    """Names of the labels of a multilabel task whose observed cells are all equal, or that have none."""
    ones = ((label.values == 1) & label.mask).any(axis=0)
    zeros = ((label.values == 0) & label.mask).any(axis=0)
    return [name for name, both in zip(task.classes, ones & zeros, strict=True) if not both]


def _constant(observed: pl.Series) -> str | None:
    """``0 positives of n`` or ``0 negatives of n``; None where both labels occur."""
    positives = int(observed.sum())
    if 0 < positives < len(observed):
        return None
    return f"0 {'negatives' if positives else 'positives'} of {len(observed):,}"


def _short(value: float) -> str:
    return str(int(value)) if np.isfinite(value) and value == int(value) else str(value)


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise LabelError("; ".join(wrong))
