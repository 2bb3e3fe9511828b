"""Trivial predictors, fitted on the training part and scored by the same code as every model.

=================== ================================================================================================
global_mean         p = mean y: the rate, the rate of each class or label, the mean target. Its AUC is ½; the predicted
                    class of an ordinal task is the median class
median              the training median, the reference of ``mae`` (regression tasks)
item_mean           p + b_i with b_i = Σ_{r in i} (y_r - p) / (n_i + 5)
user_mean           the same by user
user_item_mean      p + b_i + b_u with b_u = Σ_{r in u} (y_r - p - b_i) / (n_u + 5), clipped
base_rate_by_domain mean y of the domain
logistic            logistic, Poisson or ridge regression on the features, see :mod:`mtl_jax.metrics.logistic`
=================== ================================================================================================
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtl_jax.errors import ConfigError, LabelError
from mtl_jax.metrics.amounts import outputs_of_mean
from mtl_jax.metrics.logistic import LINEAR_KINDS, logistic
from mtl_jax.metrics.ordinal import cumulative_logits
from mtl_jax.metrics.regression import from_original, to_original
from mtl_jax.metrics.tasks import Metrics, evaluate, task_row_weights
from mtl_jax.tasks import Task

SMOOTHING = 5.0
PROBABILITY_FLOOR = 1e-7
USER_ITEM_FLOOR = 0.01
MEAN_FLOOR = 0.01
"""Least predicted count or amount, in units of the global mean: a mean of 0 has no logarithm."""

# The groups whose effects are added to the mean, in the order in which they are fitted.
GROUPS: dict[str, tuple[str, ...]] = {
    "global_mean": (),
    "item_mean": ("item",),
    "user_mean": ("user",),
    "user_item_mean": ("item", "user"),
    "base_rate_by_domain": ("domain",),
}
KINDS_OF: dict[str, tuple[str, ...]] = {"median": ("regression",), "logistic": LINEAR_KINDS}
"""Kinds of the baselines that not every task has."""
NAMES = (
    "global_mean",
    "median",
    "item_mean",
    "user_mean",
    "user_item_mean",
    "base_rate_by_domain",
    "logistic",
)


def evaluate_baselines(
    training: Any, part: Any, *, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, dict[str, Metrics]]:
    """``baselines[name][task][metric]`` on one part.

    Args:
      training: A ``TrainingData``: schema, train and valid.
      part: The ``Encoded`` rows to score: valid, or test once it was opened.
      seed: See :func:`fit_predict`.
      names: See :func:`fit_predict`; ``("global_mean",)`` gives the reference of ``mean_gain`` at little cost.
    """
    metrics = {}
    for name, outputs in fit_predict(training, part, seed=seed, names=names).items():
        tasks = [task for task in training.schema.tasks if task.name in outputs]
        metrics[name] = evaluate(tasks, outputs, part)[0]
    return metrics


def fit_predict(
    training: Any, part: Any, *, seed: int = 0, names: Sequence[str] | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Outputs of each baseline for the rows of a part, in the form of a model's outputs.

    Args:
      training: A ``TrainingData``: schema, train and valid. Only ``logistic`` reads valid, to choose its penalty.
      part: The ``Encoded`` rows to predict; their labels are not read.
      seed: Draws the rows of ``logistic`` where train is too long for it.
      names: Which of :data:`NAMES`; None: all that the schema allows (user, item and domain baselines need the column).

    Returns:
      ``outputs[name][task]``, float64, like those of a model (:func:`mtl_jax.metrics.evaluate_task`). ``median`` has
      regression tasks only, ``logistic`` all but ordinal and zero_inflated ones. Probabilities stay in
      [1e-7, 1 - 1e-7], those of ``user_item_mean`` in [.01, .99] (classes: at least .02/C, then renormalised); predicted
      numbers stay in the range of the training labels, and those of counts and amounts above 1 % of their mean.

    Raises:
      ConfigError: A name that is unknown or that the schema does not allow.
      LabelError: A task without an observed training row.
    """
    allowed = _allowed(training.schema, training.train, part)
    unknown = [name for name in names or () if name not in allowed]
    if unknown:
        raise ConfigError(f"unknown baselines {unknown}; this data has {list(allowed)}. Name some of these")
    for task in training.schema.tasks:
        if not _observed(training.train, task).any():
            raise LabelError(
                f"task '{task.name}' has no observed training row; expected at least one. "
                "Drop the task or change the split"
            )
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for name in allowed if names is None else names:
        if name == "logistic":
            outputs[name] = logistic(training, part, seed=seed)
        elif name == "median":
            tasks = [task for task in training.schema.tasks if task.kind == "regression"]
            outputs[name] = {task.name: _median(task, training.train, part.num_rows) for task in tasks}
        else:
            outputs[name] = {task.name: _mean(name, task, training.train, part) for task in training.schema.tasks}
    return outputs


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """The value below and above which half of the weight lies; the middle of two where the half falls between them."""
    order = np.argsort(values)
    values, below = np.asarray(values)[order], np.cumsum(np.asarray(weights, np.float64)[order])
    low, high = (np.searchsorted(below, below[-1] / 2, side=side) for side in ("left", "right"))
    return float((values[low] + values[min(high, len(values) - 1)]) / 2)


def _allowed(schema, train, part) -> tuple[str, ...]:
    present = {
        key for key in ("user", "item", "domain") if getattr(train, key) is not None and getattr(part, key) is not None
    }
    return tuple(
        name
        for name in NAMES
        if set(GROUPS.get(name, ())) <= present
        and any(task.kind in KINDS_OF.get(name, (task.kind,)) for task in schema.tasks)
    )


def _mean(name: str, task: Task, train, part) -> np.ndarray:
    weights, mask = task_row_weights(train, task), np.asarray(train.mask[task.name], bool)
    labels = train.labels[task.name]
    groups = [(getattr(train, key), getattr(part, key)) for key in GROUPS[name]]
    smoothing = 0.0 if name == "base_rate_by_domain" else SMOOTHING
    floor = USER_ITEM_FLOOR if name == "user_item_mean" else PROBABILITY_FLOOR

    def predictor(mask):
        """(targets of the observed rows -> predictions, these rows)"""
        rows = np.flatnonzero(mask & (weights > 0))
        seen = [(codes[rows], of_part) for codes, of_part in groups]
        return lambda targets: _additive(np.float64(targets), weights[rows], seen, part.num_rows, smoothing), rows

    if task.kind == "multilabel":
        columns = [(*predictor(mask[:, c]), labels[:, c]) for c in range(task.width)]
        rates = [
            predict(column[rows]) if rows.size else np.full(part.num_rows, 0.5) for predict, rows, column in columns
        ]
        return _logits(np.stack(rates, axis=1), floor)
    predict, rows = predictor(mask)
    labels = labels[rows]
    match task.kind:
        case "binary":
            return _logits(predict(labels), floor)
        case "multiclass":
            return np.log(_class_rates(predict, labels, task.num_classes, floor))
        case "ordinal":
            return cumulative_logits(_class_rates(predict, labels, task.num_classes, floor))
        case "count" | "zero_inflated":
            least = MEAN_FLOOR * max(np.average(labels, weights=weights[rows]), PROBABILITY_FLOOR)
            mean = np.clip(predict(labels), least, labels.max(initial=least))
            share = np.clip(predict(labels > 0), floor, 1 - floor) if task.kind == "zero_inflated" else None
            return outputs_of_mean(task, mean, share)
    targets = to_original(task, labels)
    return from_original(task, np.clip(predict(targets), targets.min(), targets.max()))


def _logits(rates: np.ndarray, floor: float) -> np.ndarray:
    probabilities = np.clip(rates, floor, 1 - floor)
    return np.log(probabilities) - np.log1p(-probabilities)


def _class_rates(predict: Callable, labels: np.ndarray, num_classes: int, floor: float) -> np.ndarray:
    # One class at a time: a one-hot matrix of all training rows would not fit for many classes.
    probabilities = np.stack([predict(labels == number) for number in range(num_classes)], axis=1)
    probabilities = np.maximum(probabilities, 2 * floor / num_classes)
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def _additive(
    targets: np.ndarray,
    weights: np.ndarray,
    groups: Sequence[tuple[np.ndarray, np.ndarray]],
    num_rows: int,
    smoothing: float,
) -> np.ndarray:
    """The mean plus the effect of each group in turn, each fitted to what is left; unseen groups have effect 0."""
    mean = weights @ targets / weights.sum()
    predictions, residuals = np.full(num_rows, mean), targets - mean
    for train_codes, part_codes in groups:
        effect = _effects(
            residuals, weights, train_codes, max(part_codes.max(initial=-1), train_codes.max()), smoothing
        )
        predictions = predictions + effect[part_codes]
        residuals = residuals - effect[train_codes]
    return predictions


def _effects(residuals, weights, codes, largest, smoothing) -> np.ndarray:
    # The last entry, which code -1 (no group) indexes, keeps effect 0.
    known = codes >= 0
    sums = np.bincount(codes[known], (weights * residuals)[known], largest + 2)
    counts = np.bincount(codes[known], weights[known], largest + 2) + smoothing
    return np.divide(sums, counts, out=np.zeros(largest + 2), where=counts > 0)


def _median(task: Task, train, num_rows: int) -> np.ndarray:
    rows = np.flatnonzero(_observed(train, task))
    targets = to_original(task, train.labels[task.name][rows])
    median = weighted_median(targets, task_row_weights(train, task)[rows])
    return np.full(num_rows, from_original(task, median))


def _observed(rows, task: Task) -> np.ndarray:
    mask = np.asarray(rows.mask[task.name], bool)
    return mask.reshape(len(mask), -1).any(axis=1) & (task_row_weights(rows, task) > 0)
