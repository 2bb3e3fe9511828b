"""One number for several tasks: relative gains, ranks, and the monitor of model selection."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mtl_jax.errors import LabelError
from mtl_jax.tasks import Task


def mean_gain(
    tasks: Sequence[Task],
    metrics: Mapping[str, Mapping[str, float | None]],
    baseline_metrics: Mapping[str, Mapping[str, float | None]],
) -> float:
    r"""Mean over tasks of the relative gain of the monitored metric over the trivial predictor; the default monitor.

    .. math:: \frac1K \sum_k \sigma_k \frac{M_k - B_k}{|B_k|}

    Args:
      tasks: The tasks; each names its monitored metric and its direction.
      metrics: Task -> metric -> value of the model.
      baseline_metrics: The same of ``global_mean`` on the same part.

    Returns:
      0 for the trivial predictor, above 0 for a better model.

    Raises:
      LabelError: No task has a value of ``global_mean`` on this part.

    Edge cases:
      =================================== ==========================================================================
      B_k = 0                             the denominator is 1
      B_k None (no label, one class only) the task is left out, for every model alike: the labels decide it
      M_k None though B_k has a value     -inf: the outputs are not finite, and such a model must not be selected
      =================================== ==========================================================================
    """
    gains = []
    for task in tasks:
        value, base = metrics[task.name].get(task.metric), baseline_metrics[task.name].get(task.metric)
        if base is None:
            continue
        if value is None:
            return -math.inf
        gains.append((value - base) * (1 if task.higher_is_better else -1) / (abs(base) or 1.0))
    if not gains:
        raise LabelError(
            f"no task of {[task.name for task in tasks]} has a monitored metric on this part; expected rows of both "
            "classes for at least one. Enlarge the validation part"
        )
    return float(np.mean(gains))


def delta_m(
    values: Sequence[float | None], baseline: Sequence[float | None], higher_is_better: Sequence[bool]
) -> float | None:
    r"""Mean relative improvement over the single-task models, in percent; positive = better.

    .. math:: \Delta_m = \frac{100}{K} \sum_k \sigma_k \frac{M_k - B_k}{|B_k|}

    Args:
      values: M_k, one metric a task.
      baseline: B_k of the tuned single-task models on the same split and seed.
      higher_is_better: Whether σ_k is +1 (else -1).

    Returns:
      Percent, or None where a value is missing or some B_k is 0.

    References:
      Maninis, Radosavovic, Kokkinos, *Attentive Single-Tasking of Multiple Tasks*, CVPR 2019. The papers around
      Nash-MTL print the opposite sign.
    """
    _same_length(values, baseline, higher_is_better)
    if not len(values) or any(v is None for v in (*values, *baseline)) or 0 in baseline:
        return None
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    return float(100 * np.mean(np.where(higher_is_better, 1, -1) * (values - baseline) / np.abs(baseline)))


def delta_m_c(
    values: Sequence[float | None],
    baseline: Sequence[float | None],
    higher_is_better: Sequence[bool],
    *,
    is_auc: Sequence[bool] | None = None,
) -> float | None:
    """:func:`delta_m` with AUC - ½ in place of AUC: relative to what ranking at random leaves to gain.

    Args:
      values: As in :func:`delta_m`.
      baseline: As in :func:`delta_m`.
      higher_is_better: As in :func:`delta_m`.
      is_auc: Which metrics are AUCs; None: all. The others enter as they are.
    """
    centre = [0.5 if auc else 0.0 for auc in (is_auc if is_auc is not None else [True] * len(values))]
    _same_length(values, baseline, centre)
    values, baseline = (
        [None if value is None else value - middle for value, middle in zip(row, centre, strict=True)]
        for row in (values, baseline)
    )
    return delta_m(values, baseline, higher_is_better)


def mean_rank(values: Sequence[Sequence[float | None]], higher_is_better: Sequence[bool]) -> list[float | None]:
    """Mean over tasks of each method's rank: best = 1, ties averaged.

    Ranks depend on who takes part: recompute them whenever the set of methods changes and print their number.

    Args:
      values: One row a method, one (seed-mean) metric a task.
      higher_is_better: One a task.

    Returns:
      One mean rank a method. A method with a missing value takes no part: its rank is None, and the others are ranked
      among themselves.
    """
    for row in values:
        _same_length(row, higher_is_better, row)
    complete = [i for i, row in enumerate(values) if all(value is not None for value in row)]
    ranks: list[float | None] = [None] * len(values)
    if not complete:
        return ranks
    table = np.asarray([values[i] for i in complete], np.float64) * np.where(higher_is_better, -1, 1)
    ahead = (table[None] < table[:, None]).sum(axis=1)
    tied = (table[None] == table[:, None]).sum(axis=1)
    for i, rank in zip(complete, (ahead + (tied + 1) / 2).mean(axis=1), strict=True):
        ranks[i] = float(rank)
    return ranks


def _same_length(*rows: Sequence) -> None:
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"lengths {[len(row) for row in rows]}; expected one entry a task in each. Pass one a task")
