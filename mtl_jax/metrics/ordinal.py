"""Metrics of ordered classes, and the way from cumulative logits to classes, probabilities and back."""

import numpy as np

from mtl_jax.metrics.weighted import row_weights, weighted_mean


def qwk(
    labels: np.ndarray, predictions: np.ndarray, num_classes: int, weights: np.ndarray | None = None
) -> float | None:
    r"""Quadratic weighted kappa.

    .. math:: 1 - \frac{\sum_{ij} w_{ij} O_{ij}}{\sum_{ij} w_{ij} E_{ij}}, \qquad w_{ij} = \frac{(i - j)^2}{(C - 1)^2}

    O counts (label i, prediction j), E is the outer product of its margins over n. A constant prediction gives 0.

    Args:
      labels: int[N] class ids in [0, C).
      predictions: int[N], the same.
      num_classes: C of the task, not of the sample; the value does not depend on it while all ids are below it.
      weights: [N] row weights.

    Returns:
      At most 1; None where the denominator is 0 (no rows, or one class only).

    Example:
      >>> from mtl_jax.metrics import qwk
      >>> round(qwk([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], 3), 6)
      0.285714

    References:
      Cohen, *Weighted Kappa*, Psychological Bulletin 1968.
    """
    labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
    weights = row_weights(weights, labels.shape[0])
    for name, ids in (("labels", labels), ("predictions", predictions)):
        if ids.size and not (0 <= ids.min() and ids.max() < num_classes):
            raise ValueError(
                f"{name} lie in [{ids.min()}, {ids.max()}]; expected ids in [0, {num_classes}). Check them"
            )
    distance = (
        np.square(np.subtract.outer(np.arange(num_classes), np.arange(num_classes))) / max(num_classes - 1, 1) ** 2
    )
    observed = np.zeros((num_classes, num_classes))
    np.add.at(observed, (labels, predictions), weights)
    total = weights.sum()
    by_chance = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / total if total > 0 else observed
    denominator = (distance * by_chance).sum()
    return float(1 - (distance * observed).sum() / denominator) if denominator > 0 else None


def ordinal_classes(cumulative: np.ndarray) -> np.ndarray:
    """int[N]: the class #{j : a ≥ b_j}, where "at least class j" is at least as likely as not."""
    return (np.asarray(cumulative) >= 0).sum(axis=1)


def ordinal_logloss(labels: np.ndarray, cumulative: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Mean of -log P(y), with P(y = c) = σ(a - b_c) - σ(a - b_{c+1}), never formed; None without rows.

    Args:
      labels: int[N] class ids in [0, C).
      cumulative: [N, C - 1] logits of "at least class j", falling along a row.
      weights: [N] row weights.
    """
    ends = np.full((len(cumulative), 1), np.inf)
    bounded = np.concatenate([ends, np.asarray(cumulative, np.float64), -ends], axis=1)
    labels = np.asarray(labels, np.int64)[:, None]
    above, below = (np.take_along_axis(bounded, ids, axis=1)[:, 0] for ids in (labels, labels + 1))
    # A difference of float32 numbers may be 0 far out; two cutpoints of a model are never closer than 1e-4.
    distance = above - below
    distance = np.where(distance > 0, distance, 1e-4)
    losses = np.logaddexp(0, -above) + np.logaddexp(0, below) - np.log(-np.expm1(-distance))
    return weighted_mean(losses, weights)


def cumulative_logits(probabilities: np.ndarray) -> np.ndarray:
    """[N, C - 1] logits of "at least class j", from class probabilities [N, C] > 0."""
    below = np.cumsum(probabilities, axis=1)[:, :-1]
    above = np.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1][:, 1:]
    return np.log(above) - np.log(below)
