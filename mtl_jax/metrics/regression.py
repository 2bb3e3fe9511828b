"""Errors of regression tasks in original units, and the way from a head's output to these units and back."""

import numpy as np

from mtl_jax.metrics.weighted import weighted_mean
from mtl_jax.tasks import Task


def rmse(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Root of the weighted mean squared error; None without rows."""
    mean = weighted_mean(np.square(_errors(targets, predictions)), weights)
    return None if mean is None else float(np.sqrt(mean))


def mae(targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Weighted mean absolute error; None without rows."""
    return weighted_mean(np.abs(_errors(targets, predictions)), weights)


def rmse_clip(
    targets: np.ndarray, predictions: np.ndarray, low: float, high: float, weights: np.ndarray | None = None
) -> float | None:
    """:func:`rmse` of predictions clipped to the rating range [low, high]; never reported as ``rmse``."""
    return rmse(targets, np.clip(predictions, low, high), weights)


def mae_clip(
    targets: np.ndarray, predictions: np.ndarray, low: float, high: float, weights: np.ndarray | None = None
) -> float | None:
    """:func:`mae` of predictions clipped to the rating range [low, high]; never reported as ``mae``."""
    return mae(targets, np.clip(predictions, low, high), weights)


def to_original(task: Task, values: np.ndarray) -> np.ndarray:
    """Standardised, transformed values (labels of a part, outputs of a head) in the units of the task's column."""
    transformed = np.asarray(values, np.float64) * task.std + task.mean
    return np.expm1(transformed) if task.transform == "log1p" else transformed


def from_original(task: Task, values: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_original`."""
    values = np.asarray(values, np.float64)
    transformed = np.log1p(values) if task.transform == "log1p" else values
    return (transformed - task.mean) / task.std


def _errors(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return np.asarray(predictions, np.float64) - np.asarray(targets, np.float64)
