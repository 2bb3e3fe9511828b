"""Generators with known answers. The rows are made on the spot; nothing is fetched."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from mtl_jax.data.dataset import Dataset
from mtl_jax.data.schema import Numeric, Schema
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

RECIPES = ("task_correlation",)


@dataclasses.dataclass(frozen=True)
class SyntheticData:
    """N rows for T tasks, with the truth behind them.

    Attributes:
      x: f64[N, dim] inputs, standard normal.
      y: f64[N, T] labels.
      mean: f64[N, T] labels without noise, the best possible prediction; its mean squared error is ``noise ** 2``.
      directions: f64[T, dim], w_k; their inner products are ``c ** 2`` times the task correlation.
      alpha: f64[num_sines] factors a_i.
      beta: f64[num_sines] phases b_i.
    """

    x: np.ndarray
    y: np.ndarray
    mean: np.ndarray
    directions: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray


def task_correlation(
    p: float | np.ndarray,
    *,
    num_rows: int,
    dim: int = 100,
    c: float = 1.0,
    num_sines: int = 5,
    noise: float = 0.1,
    seed: int,
    alpha: np.ndarray | None = None,
    beta: np.ndarray | None = None,
) -> SyntheticData:
    r"""Regression tasks that are as related as asked.

    .. math::
        y_k = z_k + \sum_i \sin(a_i z_k + b_i) + e_k \qquad z_k = w_k^\top x \qquad x \sim N(0, I)
        \qquad e_k \sim N(0, \text{noise}^2)

    with :math:`w_1 = c\,u_1` and :math:`w_2 = c\,(p\,u_1 + \sqrt{1 - p^2}\,u_2)` for orthonormal :math:`u_1, u_2`, so
    that the cosine of the two directions is :math:`p`. The correlation of the labels follows in closed form:
    :func:`label_correlation`.

    Args:
      p: Cosine of the two tasks in [-1, 1], or a correlation matrix [T, T] for T tasks, whose Cholesky factor then
        takes the place of the two rows above.
      num_rows: N.
      dim: Inputs, >= T.
      c: Scale of the directions, > 0. At .3 the sines hardly bend and labels are nearly linear.
      num_sines: Number of sine terms.
      noise: Standard deviation of the label noise, >= 0.
      seed: Of everything that is drawn.
      alpha: a_i, [num_sines]; drawn from N(0, 1), the same for all tasks, when None.
      beta: b_i, the same.

    Returns:
      Rows and truth.

    Raises:
      ConfigError: ``p`` is not a correlation, or ``dim`` is smaller than the number of tasks.

    References:
      Ma, Zhao, Yi, Chen, Hong, Chi, *Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts*, KDD 2018, section 3. The paper states neither a, b nor c; we draw a and b, and take c = 1.
    """
    factor = _correlation_factor(p)
    num_tasks = len(factor)
    if dim < num_tasks:
        raise ConfigError(f"dim is {dim} for {num_tasks} tasks; expected at least {num_tasks}. Raise dim")
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn_alpha, drawn_beta = rng.normal(size=num_sines), rng.normal(size=num_sines)
    alpha = drawn_alpha if alpha is None else np.asarray(alpha, float)
    beta = drawn_beta if beta is None else np.asarray(beta, float)
    orthonormal = np.linalg.qr(rng.normal(size=(dim, num_tasks)))[0].T
    directions = c * factor @ orthonormal
    x = rng.normal(size=(num_rows, dim))
    z = x @ directions.T
    mean = z + sum(np.sin(a * z + b) for a, b in zip(alpha, beta, strict=True))
    y = mean + noise * rng.normal(size=mean.shape)
    return SyntheticData(x, y, mean, directions, alpha, beta)


def label_correlation(p: float, *, alpha: np.ndarray, beta: np.ndarray, c: float = 1.0, noise: float = 0.1) -> float:
    r"""Correlation of the labels of two tasks of :func:`task_correlation` with cosine p.

    With :math:`E_i = \exp(-a_i^2 c^2 / 2)`,

    .. math::
        \mathrm{Cov}(r) = c^2 r &+ 2 c^2 r \sum_i a_i \cos(b_i) E_i - \Big(\sum_i \sin(b_i) E_i\Big)^2 \\
        &+ \tfrac12 \sum_{ij} \big[ e^{-c^2 (a_i^2 + a_j^2 - 2 r a_i a_j) / 2} \cos(b_i - b_j)
        - e^{-c^2 (a_i^2 + a_j^2 + 2 r a_i a_j) / 2} \cos(b_i + b_j) \big]

    and the correlation is :math:`\mathrm{Cov}(p) / (\mathrm{Cov}(1) + \text{noise}^2)`.

    Args:
      p: Cosine of the directions.
      alpha: a_i of the sines.
      beta: b_i of the sines.
      c: Scale of the directions.
      noise: Standard deviation of the label noise.

    Returns:
      The correlation, in [-1, 1].
    """
    a, b = np.asarray(alpha, float), np.asarray(beta, float)
    damped = np.exp(-(a**2) * c**2 / 2)
    squares = a[:, None] ** 2 + a**2
    products = np.outer(a, a)

    def covariance(r: float) -> float:
        pairs = np.exp(-(c**2) * (squares - 2 * r * products) / 2) * np.cos(b[:, None] - b)
        pairs -= np.exp(-(c**2) * (squares + 2 * r * products) / 2) * np.cos(b[:, None] + b)
        linear = c**2 * r * (1 + 2 * (a * np.cos(b) * damped).sum())
        return float(linear + pairs.sum() / 2 - (np.sin(b) * damped).sum() ** 2)

    return covariance(p) / (covariance(1.0) + noise**2)


def load(
    *,
    recipe: str = "task_correlation",
    p: float = 0.8,
    num_rows: int = 12_000,
    dim: int = 100,
    c: float = 1.0,
    num_sines: int = 5,
    noise: float = 0.1,
    seed: int = 0,
    split: str = "rows",
    split_seed: int = 0,
    tasks: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """Two regression tasks ``y1`` and ``y2`` with cosine ``p`` over numeric features ``x000``, ``x001``, ...

    Args:
      recipe: ``task_correlation``.
      p, num_rows, dim, c, num_sines, noise, seed: See :func:`task_correlation`.
      split: ``rows``, in shares of 10 / 1 / 1.
      split_seed: Of the split.
      tasks: Those to keep; all when None.
      cache_dir: Without effect, like ``download``: there is nothing to fetch.
      download: See ``cache_dir``.

    Returns:
      The data set.
    """
    del cache_dir, download
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe '{recipe}' of 'synthetic'; expected one of {list(RECIPES)}. Set data.recipe")
    parameters = {
        "p": p,
        "num_rows": num_rows,
        "dim": dim,
        "c": c,
        "num_sines": num_sines,
        "noise": noise,
        "seed": seed,
    }
    data = task_correlation(**parameters)
    names = [f"x{i:03d}" for i in range(dim)]
    columns = dict(zip(names, data.x.T.astype(np.float32), strict=True))
    frame = pl.DataFrame(columns | {"y1": data.y[:, 0], "y2": data.y[:, 1]})
    schema = Schema(
        features=tuple(Numeric(name) for name in names),
        vocabularies=(),
        tasks=(Task("y1", "regression"), Task("y2", "regression")),
        # With few inputs one of them may rightly be most of a label.
        allow_leak=dict.fromkeys(names, "an input of the generator"),
    )
    dataset = Dataset.from_frame(
        frame,
        schema,
        split,
        name="synthetic",
        recipe=recipe,
        seed=split_seed,
        fractions=(10 / 12, 1 / 12, 1 / 12),
        licence="made on the spot",
        identity=parameters,
        info={"bayes_mse": noise**2},
    )
    return dataset if tasks is None else dataset.with_tasks(tasks)


def _correlation_factor(p: float | np.ndarray) -> np.ndarray:
    """L with L L' = R. Row by row, since a correlation of exactly 1 makes R singular, which a library would refuse."""
    matrix = np.array([[1.0, p], [p, 1.0]]) if np.ndim(p) == 0 else np.asarray(p, float)
    factor = np.zeros_like(matrix)
    for i in range(len(matrix)):
        for j in range(i):
            rest = matrix[i, j] - factor[i, :j] @ factor[j, :j]
            factor[i, j] = rest / factor[j, j] if factor[j, j] > 0 else 0.0
        factor[i, i] = math.sqrt(max(matrix[i, i] - factor[i, :i] @ factor[i, :i], 0.0))
    if not np.allclose(factor @ factor.T, matrix, atol=1e-9) or not np.allclose(np.diagonal(matrix), 1.0):
        raise ConfigError(
            f"p is {np.asarray(p).tolist()}; expected a number in [-1, 1] or a positive semi-definite correlation "
            "matrix. Change p"
        )
    return factor
