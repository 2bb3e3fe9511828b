"""Generators with known answers. The rows are made on the spot; nothing is fetched."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from mtl_jax.arguments import check_count, check_number
from mtl_jax.data.dataset import Dataset
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

RECIPES = ("task_correlation", "kinds")
KINDS_RECIPE = {
    "click": "binary",
    "channel": "multiclass",
    "rating": "regression",
    "stars": "ordinal",
    "visits": "count",
    "spend": "zero_inflated",
    "tags": "multilabel",
}
TAGS = {"fresh": 2.0, "gift": -1.0, "sale": 1.0}
"""Labels of ``tags`` and their slopes c_l."""
MAX_NUMBERS = 10**9
"""Most entries of a generated table."""


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
    _check_size(num_rows=num_rows, dim=dim, seed=seed)
    check_count(num_sines, "num_sines", least=0)
    check_number(c, "c", least=0.0, most=1e6)
    check_number(noise, "noise", least=0.0, most=1e6)
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


def kinds(*, num_rows: int, dim: int = 4, seed: int) -> pl.DataFrame:
    r"""One table with a label of every kind, all driven by one direction of the inputs.

    With :math:`x \sim N(0, I)`, a user effect :math:`v_u \sim N(0, 1/4)` and :math:`z = w^\top x + v_u`, |w| = 1:

    ============ ============== ==========================================================================
    click        binary         z + logistic noise / 2 > 0, that is Bernoulli(σ(2 z))
    channel      multiclass     ``app``, ``shop`` or ``web``, by z + logistic noise / 2 cut at ∓.7
    rating       regression     z + N(0, 1/4)
    stars        ordinal        1..5, by z + logistic noise / 2 cut at -1.5, -.5, .5, 1.2
    visits       count          Poisson with mean exp(.5 + .8 z); null in a tenth of the rows
    spend        zero_inflated  0 unless z + logistic noise / 2 > 0, else log-normal with log mean 2 + .5 z, scale .5
    tags         multilabel     the names for which c_l z + logistic noise > ½; null in a tenth of the rows
    ============ ============== ==========================================================================

    Args:
      num_rows: N; there is one user for every 20 rows.
      dim: Inputs ``x000``, ``x001``, ...
      seed: Of everything that is drawn.

    Returns:
      Columns ``user``, inputs and labels; tags are lists of text.
    """
    check_count(num_rows, "num_rows", most=MAX_NUMBERS)
    check_count(dim, "dim", most=MAX_NUMBERS // num_rows)
    check_count(seed, "seed", least=0, most=2**64 - 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    x = rng.normal(size=(num_rows, dim))
    user = rng.integers(0, max(num_rows // 20, 2), num_rows)
    direction = rng.normal(size=dim)
    z = x @ (direction / np.linalg.norm(direction)) + 0.5 * rng.normal(size=user.max() + 1)[user]

    def noisy(scale: float) -> np.ndarray:
        return z + scale * rng.logistic(size=num_rows)

    channel, stars = np.digitize(noisy(0.5), [-0.7, 0.7]), np.digitize(noisy(0.5), [-1.5, -0.5, 0.5, 1.2])
    amount = np.exp(2 + 0.5 * z + 0.5 * rng.normal(size=num_rows))
    has_tag = np.stack([slope * z + rng.logistic(size=num_rows) > 0.5 for slope in TAGS.values()], axis=1)
    hidden = rng.random((num_rows, 2)) < 0.1
    tags = [[name for name, has in zip(TAGS, row, strict=True) if has] for row in has_tag]
    visits = rng.poisson(np.exp(0.5 + 0.8 * z))
    return pl.DataFrame(
        {"user": [f"u{number}" for number in user]}
        | {f"x{column:03d}": values for column, values in enumerate(x.T.astype(np.float32))}
        | {
            "click": (noisy(0.5) > 0).astype(np.int64),
            "channel": np.array(["app", "shop", "web"])[channel].tolist(),
            "rating": z + 0.5 * rng.normal(size=num_rows),
            "stars": stars + 1,
            "visits": [None if hide else int(count) for hide, count in zip(hidden[:, 0], visits, strict=True)],
            "spend": np.where(noisy(0.5) > 0, amount, 0.0),
            "tags": pl.Series(
                [None if hide else names for hide, names in zip(hidden[:, 1], tags, strict=True)],
                dtype=pl.List(pl.String),
            ),
        }
    )


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
    split_folds: Folds | None = None,
    reduction: Reduction | None = None,
    tasks: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """Generated rows over numeric features ``x000``, ``x001``, ...

    Args:
      recipe: ``task_correlation``, two regression tasks ``y1`` and ``y2`` with cosine ``p``; or ``kinds``, a task of every
        kind (:func:`kinds`), which reads neither ``p`` nor ``c``, ``num_sines`` and ``noise``.
      p, num_rows, dim, c, num_sines, noise, seed: See :func:`task_correlation`.
      split: ``rows``, in shares of 10 / 1 / 1.
      split_seed: Of the split.
      split_folds: Cross-validation inside train and valid.
      reduction: What is kept of train and valid.
      tasks: Those to keep; all when None.
      cache_dir: Without effect, like ``download``: there is nothing to fetch.
      download: See ``cache_dir``.

    Returns:
      The data set.
    """
    del cache_dir, download
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe '{recipe}' of 'synthetic'; expected one of {list(RECIPES)}. Set data.recipe")
    parameters = {"num_rows": num_rows, "dim": dim, "seed": seed}
    _check_size(**parameters)
    names = [f"x{i:03d}" for i in range(dim)]
    features, info = tuple(Numeric(name) for name in names), {}
    if recipe == "kinds":
        frame, user = kinds(**parameters), "user"
        features = (Categorical("user", "user"), *features)
        labels = tuple(Task(name, kind) for name, kind in KINDS_RECIPE.items())
    else:
        parameters |= {"p": p, "c": c, "num_sines": num_sines, "noise": noise}
        data, user = task_correlation(**parameters), None
        columns = dict(zip(names, data.x.T.astype(np.float32), strict=True))
        frame = pl.DataFrame(columns | {"y1": data.y[:, 0], "y2": data.y[:, 1]})
        labels, info = (Task("y1", "regression"), Task("y2", "regression")), {"bayes_mse": noise**2}
    schema = Schema(
        features=features,
        vocabularies=tuple(Vocabulary(f.name) for f in features if isinstance(f, Categorical)),
        tasks=labels,
        user=user,
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
        split_options=fold_options(split_folds) | reduction_options(reduction),
        licence="made on the spot",
        identity=parameters,
        info=info,
    )
    return dataset if tasks is None else dataset.with_tasks(tasks)


def _check_size(*, num_rows: int, dim: int, seed: int) -> None:
    """Before anything of these lengths is made."""
    check_count(num_rows, "num_rows", most=MAX_NUMBERS)
    check_count(dim, "dim")
    check_count(seed, "seed", least=0, most=2**64 - 1)
    if num_rows * dim > MAX_NUMBERS:
        raise ConfigError(
            f"num_rows is {num_rows} for {dim} inputs; expected at most {MAX_NUMBERS:,} numbers. Lower num_rows or dim"
        )


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
