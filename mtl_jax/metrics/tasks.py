"""Evaluation of tasks: every metric of a task's kind over one part, with what it was computed from."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mtl_jax.metrics import binary, multiclass, regression
from mtl_jax.metrics.weighted import row_weights
from mtl_jax.tasks import Task

METRICS: dict[str, tuple[str, ...]] = {
    "binary": (
        "auc",
        "gauc_impr",
        "pr_auc",
        "logloss",
        "ne",
        "pcoc",
        "ece_width_10",
        "ece_mass_20",
        "accuracy",
        "macro_f1",
    ),
    "multiclass": ("accuracy", "macro_f1", "logloss"),
    "regression": ("rmse", "mae"),
}

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
      outputs: Task -> what its head gives: logits [N] or [N, C], standardised predictions [N] for regression.
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
                np.asarray(rows.mask[task.name]) & inside,
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
      outputs: Logits [N] (or [N, 1]) of a binary task, [N, C] of a multiclass one; the standardised, transformed
        prediction [N] of a regression task.
      labels: [N] as in an encoded part; regression targets are standardised and transformed, and its metrics are in
        the column's units.
      mask: bool[N], observed labels. What stands in other rows is not read.
      weight: [N] row weights >= 0; they enter every sum.
      user: int[N] user codes for ``gauc_impr``.

    Returns:
      ``metrics[name]``, a finite float or None; and ``support[name]``: ``n`` and ``positives`` (rows used; positives
      for binary tasks), ``groups_used`` and ``groups_skipped`` (users of ``gauc_impr``, classes of ``macro_f1``), and
      ``reason``, why a value is None. Outputs that are not finite make every metric None.

    Raises:
      ValueError: Shapes that do not fit the task or each other; bad weights.
    """
    outputs, labels, mask = np.asarray(outputs, np.float64), np.asarray(labels), np.asarray(mask, bool)
    if task.kind != "multiclass" and outputs.shape == (*mask.shape, 1):
        outputs = outputs[:, 0]
    expected = (*mask.shape, task.width) if task.kind == "multiclass" else mask.shape
    if outputs.shape != expected or labels.shape != mask.shape:
        raise ValueError(
            f"task '{task.name}' has outputs {outputs.shape} and labels {labels.shape}; expected {expected} and "
            f"{mask.shape}. Pass the outputs of all rows of the part"
        )
    weight = row_weights(weight, mask.shape[0])
    used = mask & (weight > 0)
    outputs, labels, weight = outputs[used], labels[used], weight[used]
    user = None if user is None else np.asarray(user)[used]

    not_finite = int((~np.isfinite(outputs)).any(axis=tuple(range(1, outputs.ndim))).sum())
    if not len(labels):
        values = {name: _Value(None, "no observed row") for name in METRICS[task.kind]}
    elif not_finite:
        reason = f"{not_finite} of {len(labels)} outputs are not finite"
        values = {name: _Value(None, reason) for name in METRICS[task.kind]}
    elif task.kind == "binary":
        values = _binary(outputs, labels, weight, user)
    elif task.kind == "multiclass":
        values = _multiclass(outputs, labels, weight)
    else:
        values = _regression(task, outputs, labels, weight)
    positives = int((labels > 0).sum()) if task.kind == "binary" else None
    return _split({name: _finite(values[name]) for name in METRICS[task.kind]}, len(labels), positives)


def task_row_weights(rows: Rows, task: Task) -> np.ndarray:
    """f64[N]: the row weights of a part times those of the task, where it has a weight column."""
    weight = np.asarray(rows.weight, np.float64)
    return weight * rows.task_weight[task.name] if task.name in rows.task_weight else weight


class _Value(NamedTuple):
    value: float | None
    reason: str = ""
    groups_used: int | None = None
    groups_skipped: int | None = None
    n: int | None = None
    positives: int | None = None


def _binary(logits, labels, weight, user) -> dict[str, _Value]:
    probabilities = binary.sigmoid(logits)
    classes = (logits >= 0).astype(np.int64)
    one_class = "one class only"
    return {
        "auc": _Value(binary.auc(labels, logits, weight), one_class),
        "gauc_impr": _gauc(logits, labels, weight, user),
        "pr_auc": _Value(binary.pr_auc(labels, logits, weight), "no positive"),
        "logloss": _Value(binary.logloss(labels, logits, weight)),
        "ne": _Value(binary.ne(labels, logits, weight), one_class),
        "pcoc": _Value(binary.pcoc(labels, probabilities, weight), "no positive"),
        "ece_width_10": _Value(binary.ece_width_10(labels, probabilities, weight)),
        "ece_mass_20": _Value(binary.ece_mass_20(labels, probabilities, weight)),
        "accuracy": _Value(multiclass.accuracy(labels, classes, weight)),
        "macro_f1": _macro_f1(labels, classes, weight, 2),
    }


def _gauc(logits, labels, weight, user) -> _Value:
    if user is None:
        return _Value(None, "no user column")
    pairs = binary.grouped_pairs(labels, logits, user, weight)
    return _Value(
        pairs.mean_auc("impr"),
        "no user has both labels",
        groups_used=int(pairs.usable.sum()),
        groups_skipped=int((~pairs.usable).sum()),
        n=int(pairs.rows[pairs.usable].sum()),
        positives=int(pairs.positive_rows[pairs.usable].sum()),
    )


def _multiclass(logits, labels, weight) -> dict[str, _Value]:
    classes = logits.argmax(axis=1)
    return {
        "accuracy": _Value(multiclass.accuracy(labels, classes, weight)),
        "macro_f1": _macro_f1(labels, classes, weight, logits.shape[1]),
        "logloss": _Value(multiclass.class_logloss(labels, logits, weight)),
    }


def _macro_f1(labels, classes, weight, num_classes) -> _Value:
    present = multiclass.present_classes(labels, classes, weight).size
    value = multiclass.macro_f1(labels, classes, weight)
    return _Value(value, groups_used=present, groups_skipped=num_classes - present)


def _regression(task, outputs, labels, weight) -> dict[str, _Value]:
    # A prediction may overflow in original units (expm1 of a wild output); _finite turns that into a reason.
    with np.errstate(over="ignore"):
        targets, predictions = regression.to_original(task, labels), regression.to_original(task, outputs)
        return {
            "rmse": _Value(regression.rmse(targets, predictions, weight)),
            "mae": _Value(regression.mae(targets, predictions, weight)),
        }


def _finite(value: _Value) -> _Value:
    if value.value is None or np.isfinite(value.value):
        return value
    return value._replace(value=None, reason="the value is not finite")


def _split(values: dict[str, _Value], n: int, positives: int | None) -> tuple[Metrics, dict[str, Support]]:
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
