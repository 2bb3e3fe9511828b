"""Evaluation of tasks: every metric of a task's kind over one part, with what it was computed from."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from mtl_jax.metrics.kinds import METRICS, Value, values_of
from mtl_jax.metrics.weighted import row_weights
from mtl_jax.tasks import Task

Metrics = dict[str, float | None]
Support = dict[str, int | str | None]


class Rows(Protocol):
    """What evaluation reads of a part (an ``Encoded`` fits)."""

    labels: Mapping[str, np.ndarray]
    mask: Mapping[str, np.ndarray]
    task_weight: Mapping[str, np.ndarray]
    weight: np.ndarray
    domain: np.ndarray | None
    user: np.ndarray | None


def evaluate(
    tasks: Sequence[Task], outputs: Mapping[str, np.ndarray], rows: Rows
) -> tuple[dict[str, Metrics], dict[str, dict[str, Support]]]:
    """Metrics and support of each task over all rows of a part.

    Args:
      tasks: Fitted tasks.
      outputs: Task -> what its head gives, see :func:`evaluate_task`.
      rows: The part that the outputs belong to.

    Returns:
      ``metrics[task][metric]`` and ``support[task][metric]``, as :func:`evaluate_task` gives them.
    """
    metrics, support = {}, {}
    for task in tasks:
        metrics[task.name], support[task.name] = evaluate_task(
            task,
            outputs[task.name],
            rows.labels[task.name],
            rows.mask[task.name],
            weight=task_row_weights(rows, task),
            user=rows.user,
        )
    return metrics, support


def evaluate_slices(
    tasks: Sequence[Task], outputs: Mapping[str, np.ndarray], rows: Rows, domains: Sequence[str]
) -> dict[str, dict[str, Metrics]]:
    """``slices["domain=<name>"][task][metric]``: the metrics within each domain; {} for rows without domains."""
    if rows.domain is None:
        return {}
    slices: dict[str, dict[str, Metrics]] = {}
    for number, domain in enumerate(domains):
        inside = np.asarray(rows.domain) == number
        slices[f"domain={domain}"] = {
            task.name: evaluate_task(
                task,
                outputs[task.name],
                rows.labels[task.name],
                (np.asarray(rows.mask[task.name]).T & inside).T,
                weight=task_row_weights(rows, task),
                user=rows.user,
            )[0]
            for task in tasks
        }
    return slices


def evaluate_task(
    task: Task,
    outputs: np.ndarray,
    labels: np.ndarray,
    mask: np.ndarray,
    *,
    weight: np.ndarray | None = None,
    user: np.ndarray | None = None,
) -> tuple[Metrics, dict[str, Support]]:
    """All metrics of the task's kind (:data:`METRICS`) over its observed rows of positive weight.

    Args:
      task: Fitted task.
      outputs: What the head gives, [N] and the axes of ``Task.output_shape`` ([N, 1] for [N], and the reverse, are
        accepted): logits of a binary task and of each class or label of multiclass and multilabel ones; the
        standardised, transformed prediction of a regression task; [N, C - 1] cumulative logits (ordinal); log means
        (count, in column 0 where there are two); the three outputs of ``ziln`` (zero_inflated).
      labels: [N], or [N, C] of a multilabel task, as in an encoded part; regression targets are standardised and
        transformed, and its metrics are in the column's units.
      mask: bool, observed labels, of the shape of ``labels`` or [N]. What stands elsewhere is not read.
      weight: [N] row weights >= 0; they enter every sum.
      user: int[N] user codes for ``gauc_impr``.

    Returns:
      ``metrics[name]``, a finite float or None; and ``support[name]``: ``n`` and ``positives`` (rows used, cells of
      multilabel tasks; labels above 0 among them for binary, multilabel and zero_inflated tasks), ``groups_used`` and
      ``groups_skipped`` (users of ``gauc_impr``, classes of ``macro_f1``, labels of a multilabel ``auc``), and
      ``reason``, why a value is None. Outputs that are not finite make every metric None.

    Raises:
      ValueError: Shapes that do not fit the task or each other; bad weights.
    """
    outputs, labels, mask = np.asarray(outputs, np.float64), np.asarray(labels), np.asarray(mask, bool)
    label_shape = (*mask.shape[:1], *(task.output_shape if task.kind == "multilabel" else ()))
    expected = (*mask.shape[:1], *task.output_shape)
    if outputs.shape[:1] == expected[:1] and outputs.size == np.prod(expected):
        outputs = outputs.reshape(expected)  # a width of 1 may have its axis or not
    if outputs.shape != expected or labels.shape != label_shape or mask.shape not in (label_shape, label_shape[:1]):
        raise ValueError(
            f"task '{task.name}' has outputs {outputs.shape} and labels {labels.shape}; expected {expected} and "
            f"{label_shape}. Pass the outputs of all rows of the part"
        )
    weight = row_weights(weight, mask.shape[0])
    cells = mask if mask.ndim == 2 else mask[:, None]
    cells = np.broadcast_to(cells & (weight > 0)[:, None], (len(mask), *(label_shape[1:] or (1,))))
    used = cells.any(axis=1)
    outputs, labels, weight, cells = outputs[used], labels[used], weight[used], cells[used]
    user = None if user is None else np.asarray(user)[used]

    not_finite = int((~np.isfinite(outputs)).any(axis=tuple(range(1, outputs.ndim))).sum())
    if not len(labels):
        values = {name: Value(None, "no observed row") for name in METRICS[task.kind]}
    elif not_finite:
        reason = f"{not_finite} of {len(labels)} outputs are not finite"
        values = {name: Value(None, reason) for name in METRICS[task.kind]}
    else:
        values = values_of(task, outputs, labels, weight, cells=cells, user=user)
    positives = None
    if task.kind in ("binary", "multilabel", "zero_inflated"):
        positives = int(((labels > 0).reshape(cells.shape) & cells).sum())
    return _split({name: _finite(values[name]) for name in METRICS[task.kind]}, int(cells.sum()), positives)


def task_row_weights(rows: Rows, task: Task) -> np.ndarray:
    """f64[N]: the row weights of a part times those of the task, where it has a weight column."""
    weight = np.asarray(rows.weight, np.float64)
    return weight * rows.task_weight[task.name] if task.name in rows.task_weight else weight


def _finite(value: Value) -> Value:
    if value.value is None or np.isfinite(value.value):
        return value
    return value._replace(value=None, reason="the value is not finite")


def _split(values: dict[str, Value], n: int, positives: int | None) -> tuple[Metrics, dict[str, Support]]:
    support = {
        name: {
            "n": n if value.n is None else value.n,
            "positives": positives if value.positives is None else value.positives,
            "groups_used": value.groups_used,
            "groups_skipped": value.groups_skipped,
            "reason": value.reason if value.value is None else None,
        }
        for name, value in values.items()
    }
    return {name: value.value for name, value in values.items()}, support
