"""What is in a data set: counts that belong next to every number computed on it."""

from typing import Any

import numpy as np
import polars as pl

from mtl_jax.data.dataset import PARTS, Dataset
from mtl_jax.data.encode import flat_values
from mtl_jax.data.labels import Label, labels
from mtl_jax.tasks import Task


def summarise(dataset: Dataset) -> dict[str, Any]:
    """Counts of a data set, plain JSON types.

    Returns:
      ``rows``: part -> rows. ``tasks``: task -> part -> ``observed`` (cells of multilabel tasks, else rows) and
      ``positives`` (binary, zero_inflated), ``mean`` (numbers, in original units) or ``classes`` (multiclass, ordinal:
      value -> rows; multilabel: label -> positives). ``domains``: domain -> part -> ``rows`` and the positives or mean
      of each task without classes. ``known_in_train``: ``user`` / ``item`` -> share of test ``rows`` and of distinct
      test ``values`` that train has. ``nulls`` and ``truncated``: feature -> share of train rows.
    """
    schema = dataset.schema
    frames = {part: dataset.part(part) for part in PARTS}
    found = {part: labels(frame, schema) for part, frame in frames.items()}
    return {
        "rows": {part: frame.height for part, frame in frames.items()},
        "tasks": {
            task.name: {part: _label_facts(task, found[part][task.name], frames[part]) for part in PARTS}
            for task in schema.tasks
        },
        "domains": _domains(dataset, frames, found),
        "known_in_train": {
            role: _known(frames["train"][column], frames["test"][column])
            for role, column in (("user", schema.user), ("item", schema.item))
            if column is not None
        },
        "nulls": {
            f.name: nulls / frames["train"].height
            for f in schema.features
            if (nulls := frames["train"][f.name].null_count())
        },
        "truncated": {
            f.name: float((flat_values(frames["train"][f.name])[1] > f.max_len).mean())
            for f in (*schema.bags, *schema.sequences)
        },
    }


def _label_facts(task: Task, label: Label, frame: pl.DataFrame) -> dict[str, Any]:
    observed = label.observed
    facts: dict[str, Any] = {"observed": len(observed)}
    if task.kind == "binary":
        facts["positives"] = int(observed.sum())
    elif task.kind == "multilabel":
        positives = ((label.values == 1) & label.mask).sum(axis=0)
        facts["classes"] = dict(zip(task.classes, map(int, positives), strict=True))
    elif task.kind == "ordinal":
        counts = dict(observed.value_counts(name="count").rows())
        facts["classes"] = {value: counts[value] for value in task.classes if value in counts}
    elif task.kind == "multiclass":
        facts["classes"] = dict(sorted(observed.value_counts(name="count").rows()))
    else:
        if task.kind == "zero_inflated":
            facts["positives"] = int((observed > 0).sum())
        facts["mean"] = frame[task.column].filter(pl.Series(label.mask)).cast(pl.Float64).mean()
    return facts


def _domains(dataset: Dataset, frames: dict, found: dict) -> dict[str, Any]:
    schema = dataset.schema
    if schema.domain is None:
        return {}
    table: dict[str, Any] = {domain: {} for domain in schema.domains}
    for part, frame in frames.items():
        column = frame[schema.domain].cast(pl.String)
        for domain in schema.domains:
            here = (column == domain).fill_null(False).to_numpy()
            facts: dict[str, Any] = {"rows": int(here.sum())}
            for task in schema.tasks:
                if not task.has_classes:
                    cell = _label_facts(task, found[part][task.name].within(here), frame)
                    facts[task.name] = cell.get("mean", cell.get("positives"))
            table[domain][part] = facts
    return table


def _known(train: pl.Series, test: pl.Series) -> dict[str, float]:
    known = train.unique().to_list()
    share = {}
    for what, series in (("rows", test), ("values", test.unique())):
        share[what] = float(np.mean(series.is_in(known, nulls_equal=True).to_numpy())) if len(series) else 0.0
    return share
