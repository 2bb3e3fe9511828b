"""Counts and amounts: the Poisson deviance, and the way from a head's outputs to a mean and back."""

import numpy as np

from mtl_jax.metrics.binary import sigmoid
from mtl_jax.metrics.weighted import weighted_mean
from mtl_jax.tasks import Task

LINEAR_FROM = 20.0
LEAST_SCALE = 1e-2


def poisson_deviance(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    r"""Mean Poisson deviance, 0 for perfect predictions.

    .. math:: \frac2n \sum_i \big( y_i \log(y_i/\mu_i) - (y_i - \mu_i) \big), \qquad 0 \log 0 = 0

    Args:
      labels: y >= 0.
      predictions: Means μ > 0.
      weights: [N] row weights.

    Returns:
      None without rows; inf where a mean is 0 and its label is not.

    Example:
      >>> from mtl_jax.metrics import poisson_deviance
      >>> round(poisson_deviance([0, 1, 3], [0.5, 1, 2]), 6)
      0.477597
    """
    y, mean = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    if (mean < 0).any():
        raise ValueError(f"predictions go down to {mean.min()}; expected means > 0. Pass means, not their logarithms")
    positive = y > 0
    with np.errstate(divide="ignore"):
        ratios = np.log(np.where(positive, y, 1)) - np.log(np.where(positive, mean, 1))
    return weighted_mean(2 * (np.where(positive, y * ratios, 0) - (y - mean)), weights)


def exp_plus(a: np.ndarray) -> np.ndarray:
    """e^a up to a = 20, its tangent beyond, as in the losses."""
    a = np.asarray(a, np.float64)
    return np.exp(np.minimum(a, LINEAR_FROM)) * (1 + np.maximum(a - LINEAR_FROM, 0))


def log_plus(mean: np.ndarray) -> np.ndarray:
    """The inverse of :func:`exp_plus`, for means > 0."""
    scaled = np.asarray(mean, np.float64) * np.exp(-LINEAR_FROM)
    return LINEAR_FROM + np.where(scaled > 1, scaled - 1, np.log(np.minimum(scaled, 1)))


def mean_amounts(task: Task, outputs: np.ndarray) -> np.ndarray:
    """Predicted mean [N] of a count or zero_inflated task, from its outputs."""
    outputs = np.asarray(outputs, np.float64)
    if task.kind == "count":
        return exp_plus(outputs[:, 0] if outputs.ndim == 2 else outputs)
    scale = LEAST_SCALE + np.logaddexp(0, outputs[:, 2])
    return sigmoid(outputs[:, 0]) * exp_plus(outputs[:, 1] + np.square(scale) / 2)


def outputs_of_mean(task: Task, mean: np.ndarray, share: np.ndarray | None = None) -> np.ndarray:
    """Outputs of a count or zero_inflated task that predict these means > 0.

    Args:
      task: Its loss decides the shape; sizes and scales are 1 and the like, which no metric reads.
      mean: [N].
      share: [N] probabilities of y > 0, inside (0, 1), of a zero_inflated task.
    """
    if task.kind == "count":
        log_mean = log_plus(mean)
        return np.stack([log_mean, np.zeros_like(log_mean)], axis=1) if task.output_shape else log_mean
    scale = LEAST_SCALE + np.log(2)
    log_amount = log_plus(mean / share) - np.square(scale) / 2
    return np.stack([np.log(share) - np.log1p(-share), log_amount, np.zeros_like(share)], axis=1)
