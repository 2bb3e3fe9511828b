"""Metrics of predicted classes, in float64 over whole arrays; binary tasks use the first two with classes 0 and 1."""

import numpy as np

from mtl_jax.metrics.weighted import row_weights, weighted_mean


def accuracy(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Weighted share of rows whose predicted class is the label; None without rows."""
    return weighted_mean(np.asarray(labels) == np.asarray(predictions), weights)


def macro_f1(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Mean over classes of 2TP/(2TP + FP + FN); None without rows.

    A class that is neither labelled nor predicted is left out (scikit-learn's default): see :func:`present_classes`.

    Args:
      labels: int[N] class ids >= 0.
      predictions: int[N] predicted class ids >= 0.
      weights: [N] row weights.
    """
    labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
    weights = row_weights(weights, labels.shape[0])
    present = present_classes(labels, predictions, weights)
    if not present.size:
        return None
    size = max(labels.max(), predictions.max()) + 1
    hits = np.bincount(labels, weights * (labels == predictions), size)[present]
    labelled, predicted = np.bincount(labels, weights, size), np.bincount(predictions, weights, size)
    return float(np.mean(2 * hits / (labelled + predicted)[present]))


def present_classes(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Sorted ids of the classes that occur, as label or prediction, in a row of positive weight."""
    labels, predictions = np.asarray(labels, np.int64), np.asarray(predictions, np.int64)
    keep = row_weights(weights, labels.shape[0]) > 0
    return np.union1d(labels[keep], predictions[keep])


def class_logloss(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Mean of LSE(a) - a_y, unsmoothed, over all classes; None without rows.

    Args:
      labels: int[N] class ids in [0, C).
      logits: [N, C]; log-probabilities are logits too.
      weights: [N] row weights.
    """
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(labels, np.int64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    of_label = np.take_along_axis(shifted, labels[:, None], axis=1)[:, 0]
    return weighted_mean(np.log(np.exp(shifted).sum(axis=1)) - of_label, weights)
