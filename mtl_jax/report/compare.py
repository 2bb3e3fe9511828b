"""A record against what it has to beat: its trivial baselines, and single-task training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mtl_jax.metrics import delta_m, delta_m_c

Record = Mapping[str, Any]
AUCS = ("auc", "gauc_impr", "gauc_pos", "gauc_pair", "gauc_user")


class Gain(NamedTuple):
    """A task against one baseline.

    Attributes:
      value: Relative gain, σ(M − B)/|B|, positive = better; the denominator is 1 where B is 0.
      baseline: Name of the baseline.
    """

    value: float
    baseline: str


def reported_part(record: Record) -> str | None:
    """``test`` once the test part was evaluated, else ``valid``, None where nothing was evaluated."""
    return next((part for part in ("test", "valid") if record["metrics"][part]), None)


def task_value(record: Record, task: str) -> float | None:
    """The monitored metric of a task on the reported part."""
    part = reported_part(record)
    metric = record["tasks"][task]["metric"]
    return record["metrics"][part].get(task, {}).get(metric) if part else None


def baseline_value(record: Record, name: str, task: str) -> float | None:
    """The monitored metric of a task for one baseline, None where the record lacks it."""
    return record["baselines"].get(name, {}).get(task, {}).get(record["tasks"][task]["metric"])


def gain_over(record: Record, task: str, baseline: float | None, value: float | None) -> float | None:
    """Relative gain of ``value`` over ``baseline`` in the direction of the task's metric, None where one is missing."""
    if baseline is None or value is None:
        return None
    sign = 1.0 if record["tasks"][task]["direction"] == "higher" else -1.0
    return sign * (value - baseline) / (abs(baseline) or 1.0)


def shown_baselines(record: Record) -> list[str]:
    """The baselines of the record that tables and figures name, from the weakest to the strongest.

    ``item_mean`` stands in where the data has no users; the median is shown where a task is monitored by ``mae``.
    """
    means = "user_item_mean" if "user_item_mean" in record["baselines"] else "item_mean"
    names = ["global_mean", *(["median"] if "mae" in _metrics(record) else []), means, "logistic"]
    return [name for name in names if name in record["baselines"]]


def best_gain(record: Record, task: str) -> Gain | None:
    """Gain of a task over the best of the record's trivial baselines, which is the smallest gain."""
    value = task_value(record, task)
    gains = [
        Gain(gain, name)
        for name in record["baselines"]
        if (gain := gain_over(record, task, baseline_value(record, name, task), value)) is not None
    ]
    return min(gains, default=None)


def below_baseline(record: Record) -> list[str]:
    """Tasks in which a trivial baseline is better than the model."""
    gains = {task: best_gain(record, task) for task in record["tasks"]}
    return [task for task, gain in gains.items() if gain is not None and gain.value < 0]


def mean_best_gain(record: Record) -> float | None:
    """Mean over the tasks of the gain over each task's best trivial baseline; None where a task has none."""
    gains = [best_gain(record, task) for task in record["tasks"]]
    if not gains or any(gain is None for gain in gains):
        return None
    return sum(gain.value for gain in gains) / len(gains)


def delta_m_against(record: Record, reference: Record) -> float | None:
    """Mean relative gain in percent over a reference run of the same tasks, positive = better.

    The definition is that of :func:`mtl_jax.metrics.delta_m`; None where a value is missing.
    """
    return delta_m(*_paired(record, reference))


def delta_m_c_against(record: Record, reference: Record) -> float | None:
    """The same relative to AUC − ½ for the tasks with an AUC (:func:`mtl_jax.metrics.delta_m_c`)."""
    return delta_m_c(*_paired(record, reference), is_auc=[metric in AUCS for metric in _metrics(record)])


def _paired(record: Record, reference: Record) -> tuple[list[float | None], list[float | None], list[bool]]:
    """Values of both runs on the part that both were evaluated on, and the directions."""
    same_part = reported_part(record) == reported_part(reference)
    values = [task_value(record, task) for task in record["tasks"]]
    baseline = [task_value(reference, task) if same_part else None for task in record["tasks"]]
    return values, baseline, [facts["direction"] == "higher" for facts in record["tasks"].values()]


def _metrics(record: Record) -> list[str]:
    return [facts["metric"] for facts in record["tasks"].values()]
