r"""Transfer between two linear regressions, where the risk of every estimator is known in closed form.

.. math::
    y = X \beta + e \qquad e \sim N(0, \sigma^2 I) \qquad |\beta_t - \beta_s| = \delta \qquad X^\top X = n I

Designs are orthogonal, and their columns sum to zero, so that they have mean 0 and standard deviation 1 as they are: what
a schema fits on the training rows, of one domain or of both, leaves them unchanged, and models see what was drawn.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mtl_jax.arguments import check_count, check_number
from mtl_jax.data.dataset import PARTS, Dataset
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options
from mtl_jax.data.schema import Numeric, Schema
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

DOMAINS = ("source", "target")
OPTIONS: dict[str, tuple[str, ...]] = {
    "target": (),
    "source": (),
    "zero": (),
    "mix": ("share",),
    "pooled": (),
    "l2_sp": ("strength",),
    "gradient_steps": ("step_size", "num_steps"),
    "ascent": ("step_size", "num_steps"),
}
"""Estimator -> the options that it has."""
MAX_NUMBERS = 10**9
"""Most entries of a generated table."""
UNCLIPPED = 1e9


@dataclasses.dataclass(frozen=True)
class LinearGaussianData:
    """Training rows of a source (n_s) and a target (n_t), with the truth behind them.

    Attributes:
      x_source: f64[n_s, dim], columns orthogonal, of mean 0 and mean square 1.
      y_source: f64[n_s] labels.
      x_target: f64[n_t, dim], the same.
      y_target: f64[n_t] labels.
      beta_source: f64[dim] coefficients.
      beta_target: f64[dim] coefficients.
    """

    x_source: np.ndarray
    y_source: np.ndarray
    x_target: np.ndarray
    y_target: np.ndarray
    beta_source: np.ndarray
    beta_target: np.ndarray


def linear_gaussian(
    delta: float,
    *,
    dim: int,
    source_rows: int,
    target_rows: int,
    source_noise: float = 1.0,
    target_noise: float = 1.0,
    norm: float = 1.0,
    seed: int,
) -> LinearGaussianData:
    """Two linear regressions whose coefficients are ``delta`` apart, in a direction that is drawn.

    Args:
      delta: Distance of the two vectors of coefficients, >= 0.
      dim: Inputs.
      source_rows: Training rows n_s of the source, > ``dim``.
      target_rows: Training rows n_t of the target, > ``dim``.
      source_noise: Standard deviation of the label noise of the source.
      target_noise: The same of the target.
      norm: Length of the target's coefficients, whose direction is drawn.
      seed: Of everything that is drawn.

    Returns:
      Rows and truth.

    Raises:
      ConfigError: A value is out of its range, or there are too few rows for orthogonal columns.
    """
    _check_problem(delta, dim, source_rows, target_rows, source_noise, target_noise, norm)
    check_count(seed, "seed", least=0, most=2**64 - 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    return _draw(rng, delta, dim, source_rows, target_rows, source_noise, target_noise, norm)


def closed_form_risk(
    estimator: str,
    *,
    delta: float,
    dim: int,
    source_rows: int,
    target_rows: int,
    source_noise: float = 1.0,
    target_noise: float = 1.0,
    norm: float = 1.0,
    **options: float,
) -> float:
    r"""Expected squared distance of an estimate to the target's coefficients.

    With :math:`v_s = \sigma_s^2\, \text{dim} / n_s`, :math:`v_t = \sigma_t^2\, \text{dim} / n_t`, the least squares
    estimates :math:`\hat\beta_s, \hat\beta_t` and

    .. math:: R(a) = a^2 (\delta^2 + v_s) + (1 - a)^2 v_t \qquad a^* = \frac{v_t}{v_t + \delta^2 + v_s}

    the risk is R(a) of the share a with which :math:`\hat\beta_s` enters:

    ============== ============================================================================ ========================
    estimator      what it is                                                                   risk
    ============== ============================================================================ ========================
    target         :math:`\hat\beta_t`                                                          R(0) = v_t
    source         :math:`\hat\beta_s`                                                          R(1) = delta^2 + v_s
    zero           0                                                                            norm^2
    mix            :math:`a \hat\beta_s + (1 - a) \hat\beta_t`, ``share`` a                     R(a); a* by default
    pooled         least squares on the rows of both                                            R(n_s / (n_s + n_t))
    l2_sp          :math:`\min_b \frac12 |y_t - X_t b|^2 + \frac\lambda2 |b - \hat\beta_s|^2`,  R(lambda / (n_t +
                   ``strength`` lambda                                                          lambda)); R(a*) by default
    gradient_steps ``num_steps`` k (1 by default) steps of rate ``step_size`` eta down          R((1 - eta)^k)
                   :math:`\frac1{2 n_t} |y_t - X_t b|^2`, from :math:`\hat\beta_s`
    ascent         the same, up                                                                 R((1 + eta)^k)
    ============== ============================================================================ ========================

    On new rows with uncorrelated inputs of variance 1, the mean squared error is ``target_noise ** 2`` plus the risk.

    Args:
      estimator: One of the table.
      delta, dim, source_rows, target_rows, source_noise, target_noise, norm: See :func:`linear_gaussian`.
      **options: Of the estimator.

    Returns:
      The risk.

    Raises:
      ConfigError: An unknown estimator, an option that it does not have or lacks, or a value out of its range.

    Example:
      >>> from mtl_jax.data.linear_gaussian import closed_form_risk
      >>> facts = {"delta": 0.3**0.5, "dim": 20, "source_rows": 200, "target_rows": 40}
      >>> for estimator in ("target", "source", "pooled", "l2_sp"):
      ...     print(f"{estimator} {closed_form_risk(estimator, **facts):.4f}")
      target 0.5000
      source 0.4000
      pooled 0.2917
      l2_sp 0.2222
      >>> print(f"{closed_form_risk('gradient_steps', **facts, step_size=0.3, num_steps=3):.4f}")
      0.2629
    """
    _check_problem(delta, dim, source_rows, target_rows, source_noise, target_noise, norm)
    _check_options(estimator, options)
    if estimator == "zero":
        return float(norm) ** 2
    of_source, of_target = delta**2 + source_noise**2 * dim / source_rows, target_noise**2 * dim / target_rows
    total = of_source + of_target
    shares = {
        "target": lambda: 0.0,
        "source": lambda: 1.0,
        "mix": lambda share=of_target / total if total else 0.0: share,
        "pooled": lambda: source_rows / (source_rows + target_rows),
        "l2_sp": lambda strength=None: strength / (target_rows + strength),
        "gradient_steps": lambda step_size, num_steps=1: (1 - step_size) ** num_steps,
        "ascent": lambda step_size, num_steps=1: (1 + step_size) ** num_steps,
    }
    if estimator == "l2_sp" and not options:
        estimator = "mix"  # the best strength is n_t a* / (1 - a*), infinite where a* is 1
    share = shares[estimator](**options)
    return float(share**2 * of_source + (1 - share) ** 2 * of_target)


def best_strength(
    *,
    delta: float,
    dim: int,
    source_rows: int,
    target_rows: int,
    source_noise: float = 1.0,
    target_noise: float = 1.0,
) -> float:
    r"""The strength :math:`\lambda^* = n_t\, a^* / (1 - a^*) = n_t\, v_t / (\delta^2 + v_s)` at which L2-SP has least
    risk; infinite where the source's coefficients are the target's and without noise.

    Args:
      delta, dim, source_rows, target_rows, source_noise, target_noise: See :func:`linear_gaussian`.
    """
    _check_problem(delta, dim, source_rows, target_rows, source_noise, target_noise, 1.0)
    of_source = delta**2 + source_noise**2 * dim / source_rows
    return target_noise**2 * dim / of_source if of_source else math.inf


def transfer_is_negative(estimator: str, **facts: float) -> bool:
    r"""Whether an estimator is worse than least squares on the target alone.

    ``source``: :math:`\delta^2 + v_s > v_t`; with a share a in (0, 1], as of ``mix`` and ``pooled``:
    :math:`\delta^2 > v_t (2 - a) / a - v_s`.

    Args:
      estimator: See :func:`closed_form_risk`.
      **facts: Its other arguments.
    """
    alone = {name: value for name, value in facts.items() if name not in OPTIONS.get(estimator, ())}
    return closed_form_risk(estimator, **facts) > closed_form_risk("target", **alone)


def load(
    *,
    delta: float = 0.3**0.5,
    dim: int = 20,
    source_rows: int = 200,
    target_rows: int = 40,
    valid_rows: int = 1_000,
    test_rows: int = 10_000,
    source_noise: float = 1.0,
    target_noise: float = 1.0,
    norm: float = 1.0,
    seed: int = 0,
    recipe: str = "two_domains",
    split: str = "given",
    split_seed: int = 0,
    split_folds: Folds | None = None,
    reduction: Reduction | None = None,
    tasks: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """The rows of :func:`linear_gaussian` as a data set of two domains, ``source`` and ``target``.

    One regression task ``y``, neither centred nor scaled, over numeric features ``x000``, ``x001``, ... that reach a model
    as they were drawn; the domain is no feature. The rows of valid and test are orthogonal designs as well, so that the
    mean squared error of coefficients on test, apart from its label noise, is exactly their squared distance to the truth.

    Args:
      delta, dim, source_rows, target_rows, source_noise, target_noise, norm, seed: See :func:`linear_gaussian`.
      valid_rows: Validation rows of each domain, > ``dim``.
      test_rows: Test rows of each domain, > ``dim``.
      recipe: ``two_domains``, the only one.
      split: ``given``: the generator makes the parts.
      split_seed: Of folds and reduction.
      split_folds: Cross-validation inside train and valid.
      reduction: What is kept of train and valid. A part of an orthogonal design is none, and closed forms no longer hold:
        lower ``target_rows`` instead.
      tasks: ``["y"]``, or None.
      cache_dir: Without effect, like ``download``: there is nothing to fetch.
      download: See ``cache_dir``.

    Returns:
      The data set. ``info`` has ``parameters``, ``noise`` and ``coefficients`` by domain, and ``risk``: the closed form of
      each estimator without options.

    Raises:
      ConfigError: A value is out of its range.
    """
    del cache_dir, download
    for what, value, known in (("recipe", recipe, "two_domains"), ("split", split, "given")):
        if value != known:
            raise ConfigError(f"unknown {what} '{value}' of 'linear_gaussian'; expected '{known}'. Set data.{what}")
    facts = {"delta": delta, "dim": dim, "source_rows": source_rows, "target_rows": target_rows}
    facts |= {"source_noise": source_noise, "target_noise": target_noise, "norm": norm}
    _check_problem(**facts)
    for name, count in (("valid_rows", valid_rows), ("test_rows", test_rows)):
        _check_rows(name, count, dim)
    check_count(seed, "seed", least=0, most=2**64 - 1)
    rng = np.random.Generator(np.random.PCG64(seed))
    data = _draw(rng, **facts)
    coefficients = dict(zip(DOMAINS, (data.beta_source, data.beta_target), strict=True))
    noise = dict(zip(DOMAINS, (source_noise, target_noise), strict=True))
    blocks = [("train", "source", data.x_source, data.y_source), ("train", "target", data.x_target, data.y_target)]
    for part, count in (("valid", valid_rows), ("test", test_rows)):
        blocks += [(part, domain, *_rows(rng, coefficients[domain], count, noise[domain])) for domain in DOMAINS]
    names = [f"x{i:03d}" for i in range(dim)]
    parameters = facts | {"valid_rows": valid_rows, "test_rows": test_rows, "seed": seed}
    dataset = Dataset.from_frame(
        pl.concat([_table(part, domain, names, x, y) for part, domain, x, y in blocks]),
        Schema(
            features=tuple(Numeric(name, clip=UNCLIPPED) for name in names),
            vocabularies=(),
            tasks=(Task("y", "regression", standardise=False),),
            domain="domain",
            domains=DOMAINS,
            # With few inputs one of them may rightly be most of the label.
            allow_leak=dict.fromkeys(names, "an input of the generator"),
        ),
        "given",
        name="linear_gaussian",
        recipe=recipe,
        seed=split_seed,
        split_options={"parts": "part"} | fold_options(split_folds) | reduction_options(reduction),
        licence="made on the spot",
        identity=parameters,
        info={
            "parameters": parameters,
            "noise": noise,
            "coefficients": {domain: beta.tolist() for domain, beta in coefficients.items()},
            "risk": {name: closed_form_risk(name, **facts) for name in OPTIONS if "step_size" not in OPTIONS[name]},
        },
    )
    return dataset if tasks is None else dataset.with_tasks(tasks)


def _draw(
    rng: np.random.Generator,
    delta: float,
    dim: int,
    source_rows: int,
    target_rows: int,
    source_noise: float,
    target_noise: float,
    norm: float,
) -> LinearGaussianData:
    directions = rng.normal(size=(2, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    beta_target = norm * directions[0]
    beta_source = beta_target + delta * directions[1]
    x_source, y_source = _rows(rng, beta_source, source_rows, source_noise)
    x_target, y_target = _rows(rng, beta_target, target_rows, target_noise)
    return LinearGaussianData(x_source, y_source, x_target, y_target, beta_source, beta_target)


def _rows(rng: np.random.Generator, beta: np.ndarray, count: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """A design with X'X = n I and columns that sum to 0, uniform among them, and its labels."""
    x = rng.normal(size=(count, len(beta)))
    q, r = np.linalg.qr(x - x.mean(0))
    x = math.sqrt(count) * q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return x, x @ beta + noise * rng.normal(size=count)


def _table(part: str, domain: str, names: Sequence[str], x: np.ndarray, y: np.ndarray) -> pl.DataFrame:
    kinds = {"part": pl.Enum(PARTS), "domain": pl.Enum(DOMAINS)}
    columns = {"part": [part] * len(y), "domain": [domain] * len(y)} | dict(zip(names, x.T, strict=True)) | {"y": y}
    return pl.DataFrame(columns, schema_overrides=kinds)


def _check_problem(
    delta: Any, dim: Any, source_rows: Any, target_rows: Any, source_noise: Any, target_noise: Any, norm: Any
) -> None:
    check_count(dim, "dim")
    _check_rows("source_rows", source_rows, dim)
    _check_rows("target_rows", target_rows, dim)
    for name, value in (("delta", delta), ("source_noise", source_noise), ("target_noise", target_noise)):
        check_number(value, name, least=0.0, most=1e6)
    check_number(norm, "norm", least=0.0, most=1e6)


def _check_rows(name: str, count: Any, dim: int) -> None:
    check_count(count, name, most=MAX_NUMBERS // dim)
    if count <= dim:
        raise ConfigError(
            f"{name} is {count} for {dim} inputs; expected at least {dim + 1}, since columns are orthogonal and sum to 0. "
            f"Raise {name} or lower dim"
        )


def _check_options(estimator: str, options: dict[str, Any]) -> None:
    if estimator not in OPTIONS:
        raise ConfigError(f"unknown estimator '{estimator}'; expected one of {list(OPTIONS)}. Choose one of these")
    known = OPTIONS[estimator]
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"estimator '{estimator}' has no {unknown}; expected some of {list(known)}. Remove them")
    if "step_size" in known and "step_size" not in options:
        raise ConfigError(f"estimator '{estimator}' has no step_size; expected a number >= 0. Set it")
    for name, value in options.items():
        if name == "num_steps":
            check_count(value, name, least=0)
        else:
            check_number(value, name, least=-1e6 if name == "share" else 0.0, most=1e6)
