"""Metrics of several 0/1 labels a row, over the observed cells of [N, C] arrays."""

from typing import NamedTuple

import numpy as np

from mtl_jax.metrics import binary
from mtl_jax.metrics.weighted import weighted_mean


class LabelMean(NamedTuple):
    """A mean over labels; None where no label has a value.

    Attributes:
      value: The mean.
      used: Labels that have a value.
      skipped: Labels that have none.
    """

    value: float | None
    used: int
    skipped: int


def multilabel_auc(labels: np.ndarray, logits: np.ndarray, cell_weights: np.ndarray) -> LabelMean:
    """Mean AUC over the labels with both classes.

    Args:
      labels: [N, C] of 0/1.
      logits: [N, C].
      cell_weights: [N, C] weights >= 0; 0 where the cell is not observed.
    """
    return _mean(
        binary.auc(labels[seen, c], logits[seen, c], cell_weights[seen, c]) for c, seen in _cells(cell_weights)
    )


def multilabel_f1(labels: np.ndarray, logits: np.ndarray, cell_weights: np.ndarray) -> LabelMean:
    """Mean over labels of 2TP/(2TP + FP + FN) of the positive class, predicted at p ≥ ½.

    A label that is neither labelled nor predicted in an observed cell is left out.
    """
    scores = []
    for c, seen in _cells(cell_weights):
        y, predicted, weights = labels[seen, c] > 0, logits[seen, c] >= 0, cell_weights[seen, c]
        total = weights @ y + weights @ predicted
        scores.append(2 * float(weights @ (y & predicted)) / float(total) if total > 0 else None)
    return _mean(scores)


def multilabel_accuracy(labels: np.ndarray, logits: np.ndarray, cell_weights: np.ndarray) -> float | None:
    """Weighted share of observed cells whose label is predicted at p ≥ ½."""
    seen = cell_weights > 0
    return weighted_mean((logits[seen] >= 0) == (labels[seen] > 0), cell_weights[seen])


def multilabel_logloss(labels: np.ndarray, logits: np.ndarray, cell_weights: np.ndarray) -> float | None:
    """Binary log loss over observed cells, so that a row counts with its observed labels."""
    seen = cell_weights > 0
    return binary.logloss(labels[seen], logits[seen], cell_weights[seen])


def _cells(cell_weights: np.ndarray):
    return ((c, cell_weights[:, c] > 0) for c in range(cell_weights.shape[1]))


def _mean(values) -> LabelMean:
    values = list(values)
    known = [value for value in values if value is not None]
    return LabelMean(float(np.mean(known)) if known else None, len(known), len(values) - len(known))
