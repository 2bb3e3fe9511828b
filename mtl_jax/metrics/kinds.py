"""The metrics of each kind of task, from outputs and labels of its observed rows."""

from typing import NamedTuple

import numpy as np

from mtl_jax.metrics import amounts, binary, multiclass, multilabel, ordinal, regression
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
    "multilabel": ("auc", "logloss", "accuracy", "macro_f1"),
    "regression": ("rmse", "mae"),
    "ordinal": ("qwk", "accuracy", "macro_f1", "mae", "logloss"),
    "count": ("poisson_deviance", "rmse", "mae"),
    "zero_inflated": ("rmse", "mae", "auc"),
}
LOWER_IS_BETTER = ("logloss", "ne", "ece_width_10", "ece_mass_20", "rmse", "mae", "poisson_deviance")


class Value(NamedTuple):
    """A metric, and what it was computed from where that is not all observed rows."""

    value: float | None
    reason: str = ""
    groups_used: int | None = None
    groups_skipped: int | None = None
    n: int | None = None
    positives: int | None = None


def values_of(
    task: Task,
    outputs: np.ndarray,
    labels: np.ndarray,
    weight: np.ndarray,
    *,
    cells: np.ndarray,
    user: np.ndarray | None = None,
) -> dict[str, Value]:
    """The metrics of :data:`METRICS`, for rows of positive weight with finite outputs and an observed label.

    Args:
      task: Fitted task.
      outputs: [N] and the axes of ``Task.output_shape``.
      labels: [N], or [N, C] of a multilabel task.
      weight: [N], > 0.
      cells: bool[N, C], the observed labels of a multilabel task; all True, C = 1, for others.
      user: int[N] user codes.
    """
    match task.kind:
        case "binary":
            return _binary(outputs, labels, weight, user)
        case "multiclass":
            return _multiclass(outputs, labels, weight)
        case "multilabel":
            return _multilabel(outputs, labels, np.where(cells, weight[:, None], 0.0))
        case "ordinal":
            return _ordinal(task, outputs, labels, weight)
        case "count":
            return _count(task, outputs, labels, weight)
        case "zero_inflated":
            return _zero_inflated(task, outputs, labels, weight)
    return _regression(task, outputs, labels, weight)


def _binary(logits, labels, weight, user) -> dict[str, Value]:
    probabilities = binary.sigmoid(logits)
    classes = (logits >= 0).astype(np.int64)
    one_class = "one class only"
    return {
        "auc": Value(binary.auc(labels, logits, weight), one_class),
        "gauc_impr": _gauc(logits, labels, weight, user),
        "pr_auc": Value(binary.pr_auc(labels, logits, weight), "no positive"),
        "logloss": Value(binary.logloss(labels, logits, weight)),
        "ne": Value(binary.ne(labels, logits, weight), one_class),
        "pcoc": Value(binary.pcoc(labels, probabilities, weight), "no positive"),
        "ece_width_10": Value(binary.ece_width_10(labels, probabilities, weight)),
        "ece_mass_20": Value(binary.ece_mass_20(labels, probabilities, weight)),
        "accuracy": Value(multiclass.accuracy(labels, classes, weight)),
        "macro_f1": _macro_f1(labels, classes, weight, 2),
    }


def _gauc(logits, labels, weight, user) -> Value:
    if user is None:
        return Value(None, "no user column")
    pairs = binary.grouped_pairs(labels, logits, user, weight)
    return Value(
        pairs.mean_auc("impr"),
        "no user has both labels",
        groups_used=int(pairs.usable.sum()),
        groups_skipped=int((~pairs.usable).sum()),
        n=int(pairs.rows[pairs.usable].sum()),
        positives=int(pairs.positive_rows[pairs.usable].sum()),
    )


def _multiclass(logits, labels, weight) -> dict[str, Value]:
    classes = logits.argmax(axis=1)
    return {
        "accuracy": Value(multiclass.accuracy(labels, classes, weight)),
        "macro_f1": _macro_f1(labels, classes, weight, logits.shape[1]),
        "logloss": Value(multiclass.class_logloss(labels, logits, weight)),
    }


def _multilabel(logits, labels, weight) -> dict[str, Value]:
    auc = multilabel.multilabel_auc(labels, logits, weight)
    f1 = multilabel.multilabel_f1(labels, logits, weight)
    return {
        "auc": Value(auc.value, "no label has both classes", auc.used, auc.skipped),
        "logloss": Value(multilabel.multilabel_logloss(labels, logits, weight)),
        "accuracy": Value(multilabel.multilabel_accuracy(labels, logits, weight)),
        "macro_f1": Value(f1.value, "no label is labelled or predicted", f1.used, f1.skipped),
    }


def _ordinal(task, cumulative, labels, weight) -> dict[str, Value]:
    classes = ordinal.ordinal_classes(cumulative)
    return {
        "qwk": Value(ordinal.qwk(labels, classes, task.num_classes, weight), "one class only"),
        "accuracy": Value(multiclass.accuracy(labels, classes, weight)),
        "macro_f1": _macro_f1(labels, classes, weight, task.num_classes),
        "mae": Value(regression.mae(labels, classes, weight)),
        "logloss": Value(ordinal.ordinal_logloss(labels, cumulative, weight)),
    }


def _count(task, outputs, labels, weight) -> dict[str, Value]:
    means = amounts.mean_amounts(task, outputs)
    return {"poisson_deviance": Value(amounts.poisson_deviance(labels, means, weight))} | _errors(labels, means, weight)


def _zero_inflated(task, outputs, labels, weight) -> dict[str, Value]:
    with np.errstate(over="ignore"):
        errors = _errors(labels, amounts.mean_amounts(task, outputs), weight)
    return errors | {"auc": Value(binary.auc(labels > 0, outputs[:, 0], weight), "one class only")}


def _regression(task, outputs, labels, weight) -> dict[str, Value]:
    # A prediction may overflow in original units (expm1 of a wild output): not finite, which is a reason of its own.
    with np.errstate(over="ignore"):
        targets, predictions = regression.to_original(task, labels), regression.to_original(task, outputs)
        return _errors(targets, predictions, weight)


def _errors(targets, predictions, weight) -> dict[str, Value]:
    return {
        "rmse": Value(regression.rmse(targets, predictions, weight)),
        "mae": Value(regression.mae(targets, predictions, weight)),
    }


def _macro_f1(labels, classes, weight, num_classes) -> Value:
    present = multiclass.present_classes(labels, classes, weight).size
    value = multiclass.macro_f1(labels, classes, weight)
    return Value(value, groups_used=present, groups_skipped=num_classes - present)
