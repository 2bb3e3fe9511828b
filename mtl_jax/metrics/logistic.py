"""The linear baseline: logistic, softmax, Poisson or ridge regression on the encoded features.

Ordinal and zero_inflated tasks have none. The labels of a multilabel task are separate logistic regressions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.sparse

from mtl_jax.metrics.amounts import LINEAR_FROM, exp_plus, outputs_of_mean
from mtl_jax.metrics.tasks import evaluate_task, task_row_weights
from mtl_jax.tasks import Task

# λ of the penalty ½λ|w|² beside the *sum* of the row losses, strongest first. Numeric columns are few and seen in every
# row, so they start from scikit-learn's default 1; one-hot columns are many and each is seen in few rows.
NUMERIC_PENALTIES = (1.0, 0.1, 0.01, 0.001)
ONE_HOT_PENALTIES = (300.0, 30.0, 3.0, 0.3)
# What is minimised over penalties on validation, by kind.
VALIDATION_LOSSES = {
    "binary": "logloss",
    "multiclass": "logloss",
    "multilabel": "logloss",
    "regression": "rmse",
    "count": "poisson_deviance",
}
LINEAR_KINDS = tuple(VALIDATION_LOSSES)
HASH_BUCKETS = 2**18
MAX_ROWS = 1_000_000
LEAST_LOG_MEAN = -30.0
"""Smaller predicted log means of counts are raised to it, so that none underflows to a mean of 0."""


def logistic(training: Any, part: Any, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Outputs of a linear model per task, its penalty chosen on the validation part (:data:`VALIDATION_LOSSES`).

    Features: the dense columns of ``schema.logistic_features`` where it names some, else all dense columns and the
    categorical ids, hashed and one-hot.

    Args:
      training: A ``TrainingData``.
      part: The ``Encoded`` rows to predict.
      seed: Draws the training rows where there are more than a million.

    Returns:
      Task -> logits [N] or [N, C], class scores [N, C] (log-probabilities), standardised predictions [N], or log means
      (count), in the form of a model's outputs.
    """
    rows = np.arange(training.train.num_rows)
    if rows.size > MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_ROWS, replace=False))
    columns = _Columns(training.schema, training.train, rows)
    train, valid = columns.of(training.train, rows), columns.of(training.valid)
    scored = valid if part is training.valid else columns.of(part)
    parts = (training.train, rows, train), (training.valid, valid), scored
    return {
        task.name: _by_label(task, *parts) if task.kind == "multilabel" else _best(task, *parts)
        for task in training.schema.tasks
        if task.kind in LINEAR_KINDS
    }


def fit_linear(
    kind: str,
    features: np.ndarray | scipy.sparse.csr_matrix,
    targets: np.ndarray,
    weights: np.ndarray,
    penalty: float,
    *,
    start: np.ndarray | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 50,
) -> np.ndarray:
    r"""Minimises :math:`\sum_i s_i \ell(b + w^\top x_i, y_i) + \tfrac12 \lambda \lVert w \rVert^2` by L-BFGS.

    The problem is preconditioned by its curvature at the constant predictor: by the Cholesky factor of the Hessian for
    dense features, by the root of its diagonal for sparse ones. Dense columns are correlated and one-hot columns differ
    in frequency by orders of magnitude; without it either would need hundreds of iterations.

    Args:
      kind: ``binary``, ``multiclass``, ``count`` or ``regression`` (there the loss is ½(a - y)²).
      features: [N, D].
      targets: [N, K]; one-hot for ``multiclass``, else K = 1.
      weights: [N], s.
      penalty: λ; the intercept is free.
      start: Coefficients to start from; None: the constant predictor.
      tolerance: Decrease of the objective at which to stop, relative to the loss of the constant predictor.
      max_iterations: Where to stop at the latest. With weak penalties and separable classes the minimum is far away;
        stopping before it acts as a penalty, and is judged on validation like the others.

    Returns:
      [1 + D, K]: the intercepts, then the coefficients.
    """
    total = weights.sum()
    rates = weights @ targets / total
    constant = np.zeros((1 + features.shape[1], targets.shape[1]))
    constant[0] = _constant_scores(kind, rates)
    # The floors keep a constant target, which any scale fits, away from a division by zero.
    unit = max(abs(weights @ _losses(kind, constant[:1], targets)[0]), 1e-7 * total)
    curvature = np.maximum(
        {"regression": 1.0, "count": rates}.get(kind, rates * (1 - rates)) * np.ones_like(rates), 1e-7
    )
    decode, pull, encode = _preconditioner(features, weights, curvature, penalty)

    def objective(flat):
        coefficients = decode(flat.reshape(constant.shape))
        losses, residuals = _losses(kind, coefficients[0] + features @ coefficients[1:], targets)
        residuals *= weights[:, None]
        gradient = np.concatenate([residuals.sum(axis=0)[None], features.T @ residuals])
        gradient[1:] += penalty * coefficients[1:]
        value = weights @ losses + penalty / 2 * np.square(coefficients[1:]).sum()
        return value / unit, pull(gradient).ravel() / unit

    solution = scipy.optimize.minimize(
        objective,
        encode(constant if start is None else start).ravel(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "ftol": tolerance, "gtol": 0.0},
    )
    return decode(solution.x.reshape(constant.shape))


def _preconditioner(features, weights, curvature: np.ndarray, penalty: float) -> tuple[Callable, Callable, Callable]:
    """Maps v -> coefficients, gradient -> gradient by v, and coefficients -> v, all [1 + D, K].

    With H = R R^T the Hessian of one output at the constant predictor, the coefficients are R^-T v, and the Hessian by
    v is the identity there.
    """
    roots = np.sqrt(weights.sum() * curvature)
    if scipy.sparse.issparse(features):
        squares = features.multiply(features).T @ weights
        scale = np.concatenate([roots[None], np.sqrt(squares[:, None] * curvature + penalty)])
        return lambda v: v / scale, lambda gradient: gradient / scale, lambda coefficients: coefficients * scale

    extended = np.concatenate([np.ones((features.shape[0], 1)), features], axis=1)
    gram = (extended * weights[:, None]).T @ extended
    ridge = np.diag([0.0] + [penalty] * features.shape[1])
    factors = [np.linalg.cholesky(gram * c + ridge) for c in curvature]

    def by_output(solve):
        return lambda values: np.stack([solve(f, values[:, k]) for k, f in enumerate(factors)], axis=1)

    return (
        by_output(lambda factor, v: scipy.linalg.solve_triangular(factor.T, v, lower=False)),
        by_output(lambda factor, gradient: scipy.linalg.solve_triangular(factor, gradient, lower=True)),
        by_output(lambda factor, coefficients: factor.T @ coefficients),
    )


class _Column(NamedTuple):
    """One label of a multilabel task, as the part of a binary task."""

    labels: dict[str, np.ndarray]
    mask: dict[str, np.ndarray]
    task_weight: dict[str, np.ndarray]
    weight: np.ndarray


def _by_label(task: Task, fitted, chosen, scored) -> np.ndarray:
    label = Task(task.name, "binary")

    def column(part, index):
        arrays = ({task.name: of[task.name][:, index]} for of in (part.labels, part.mask))
        return _Column(*arrays, part.task_weight, part.weight)

    def one(index):
        train = column(fitted[0], index)
        if not (train.mask[task.name][fitted[1]] & (task_row_weights(train, label)[fitted[1]] > 0)).any():
            return np.zeros(scored.shape[0])
        return _best(label, (train, *fitted[1:]), (column(chosen[0], index), chosen[1]), scored)

    return np.stack([one(index) for index in range(task.width)], axis=1)


def _best(task: Task, fitted, chosen, scored) -> np.ndarray:
    """Outputs under the best penalty; weaker ones are no longer tried once the validation loss gets worse.

    Args:
      task: The task.
      fitted: The training part, the rows of it to fit, and their features.
      chosen: The validation part and its features.
      scored: Features of the rows to predict.
    """
    part, rows, train = fitted
    weights = task_row_weights(part, task)[rows]
    used = np.flatnonzero(np.asarray(part.mask[task.name], bool)[rows] & (weights > 0))
    features, weights, labels = train[used], weights[used], part.labels[task.name][rows][used]
    one_hot = task.kind == "multiclass"
    targets = (labels[:, None] == np.arange(task.width) if one_hot else labels[:, None]).astype(np.float64)
    best, outputs, coefficients = np.inf, None, None
    for penalty in ONE_HOT_PENALTIES if scipy.sparse.issparse(train) else NUMERIC_PENALTIES:
        coefficients = fit_linear(task.kind, features, targets, weights, penalty, start=coefficients)
        loss = _validation_loss(task, chosen[0], _outputs(task, coefficients, chosen[1]))
        if outputs is not None and not loss < best:
            break
        best, outputs = loss, _outputs(task, coefficients, scored)
    return outputs


def _outputs(task: Task, coefficients: np.ndarray, features) -> np.ndarray:
    scores = coefficients[0] + features @ coefficients[1:]
    if task.kind == "count":
        return outputs_of_mean(task, exp_plus(np.maximum(scores[:, 0], LEAST_LOG_MEAN)))
    if task.kind != "multiclass":
        return scores[:, 0]
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def _validation_loss(task: Task, valid, outputs) -> float:
    metrics, _ = evaluate_task(
        task, outputs, valid.labels[task.name], valid.mask[task.name], weight=task_row_weights(valid, task)
    )
    loss = metrics[VALIDATION_LOSSES[task.kind]]
    return np.inf if loss is None else loss


def _constant_scores(kind: str, rates: np.ndarray) -> np.ndarray:
    if kind == "regression":
        return rates
    if kind == "count":
        return np.log(np.maximum(rates, 1e-7))
    rates = np.clip(rates, 1e-7, 1 - 1e-7)
    return np.log(rates) if kind == "multiclass" else np.log(rates) - np.log1p(-rates)


def _losses(kind: str, scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses [N] and their derivatives [N, K] by the scores."""
    if kind == "regression":
        residuals = scores - targets
        return np.square(residuals).sum(axis=1) / 2, residuals
    if kind == "count":
        means = exp_plus(scores)
        return (means - targets * scores)[:, 0], np.where(scores > LINEAR_FROM, np.exp(LINEAR_FROM), means) - targets
    if kind == "binary":
        decay = np.exp(-np.abs(scores))
        losses = np.maximum(scores, 0) + np.log1p(decay) - targets * scores
        return losses[:, 0], np.where(scores >= 0, 1, decay) / (1 + decay) - targets
    scores = scores - scores.max(axis=1, keepdims=True)
    exponentials = np.exp(scores)
    sums = exponentials.sum(axis=1, keepdims=True)
    return np.log(sums[:, 0]) - (targets * scores).sum(axis=1), exponentials / sums - targets


class _Columns:
    """Which columns of a part are features, dense or sparse; fitted on the training rows."""

    def __init__(self, schema, train, rows):
        names = list(schema.dense_names)
        self.dense = [names.index(name) for name in schema.logistic_features or names]
        self.sparse = not schema.logistic_features and train.ids.shape[1] > 0
        # Only buckets that train fills become columns, so that the width follows the data.
        self.buckets = np.unique(_hashed(train.ids[rows])) if self.sparse else None

    def of(self, part, rows=slice(None)):
        dense = part.dense[rows][:, self.dense].astype(np.float64)
        if not self.sparse:
            return dense
        hashed = _hashed(part.ids[rows])
        position = np.minimum(np.searchsorted(self.buckets, hashed), self.buckets.size - 1).astype(np.int32)
        known = (self.buckets[position] == hashed).astype(np.float64)
        starts = np.arange(hashed.shape[0] + 1) * hashed.shape[1]
        shape = (hashed.shape[0], self.buckets.size)
        one_hot = scipy.sparse.csr_matrix((known.ravel(), position.ravel(), starts), shape)
        return scipy.sparse.hstack([scipy.sparse.csr_matrix(dense), one_hot], format="csr")


def _hashed(ids: np.ndarray) -> np.ndarray:
    """Buckets int64[N, F] of the pairs (feature, id), the same on every machine."""
    feature = np.arange(ids.shape[1], dtype=np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ feature
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.int64) % HASH_BUCKETS
