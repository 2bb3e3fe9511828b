"""Weighted sums over rows, the one place where missing weights and empty inputs are settled."""

import numpy as np


def row_weights(weights: np.ndarray | None, num_rows: int) -> np.ndarray:
    """float64[N] weights; ones for None.

    Raises:
      ValueError: Another length, or a weight that is negative or not finite.
    """
    if weights is None:
        return np.ones(num_rows)
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_rows,):
        raise ValueError(f"weights have shape {weights.shape}; expected ({num_rows},), one a row. Pass one a row")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(
            f"weights lie in [{weights.min()}, {weights.max()}]; expected finite values >= 0. Mask the rows"
        )
    return weights


def weighted_mean(values: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Σ w v / Σ w in float64, or None where the weights sum to 0."""
    values = np.asarray(values, np.float64)
    weights = row_weights(weights, values.shape[0])
    total = weights.sum()
    return float(weights @ values / total) if total > 0 else None
