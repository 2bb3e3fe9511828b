"""Linear interpolation between what the source's model says and what a model of the target alone says."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax import metrics
from mtl_jax.balancing.base import register
from mtl_jax.data.dataset import TrainingData
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Context
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.train.monitor import Monitor
from mtl_jax.train.predict import outputs_of
from mtl_jax.train.result import Result

SHARES = tuple(number / 10 for number in range(11))


@register
@dataclasses.dataclass(frozen=True)
class LinInt(Adaptation):
    r"""Training from initial values on the target; what is deployed are, for each task, the outputs

    .. math:: a z_s + (1 - a) z_t, \qquad a \in \{0, 0.1, \dots, 1\}

    of the source's model and of the trained one, with the share a that is best on the target's validation part by the
    task's metric; the smallest of equals (see :func:`interpolated`).

    References:
      The baseline ``linint`` of Daumé III, *Frustratingly Easy Domain Adaptation*, ACL 2007.
    """

    needs_source: ClassVar[bool] = False
    mixes_outputs: ClassVar[bool] = True


class Interpolation(nnx.Module):
    """Two models of the same schema as one.

    Args:
      source: One of them.
      target: The other one, whose gates are those of both.
      shares: Task -> share of the source's outputs, in [0, 1]. At 0 and 1 the outputs are those of one model, to the last
        bit.
    """

    def __init__(self, source: MultiTaskModel, target: MultiTaskModel, shares: Mapping[str, float]):
        self.source, self.target = source, target
        self.shares = tuple(shares.items())

    @property
    def sharing(self) -> nnx.Module:
        return self.target.sharing

    def gates(self, batch: Mapping[str, Any]) -> dict[str, Float[Array, "..."]]:
        return self.target.gates(batch)

    def __call__(self, batch: Mapping[str, Any], context: Context = Context()) -> dict[str, Float[Array, "batch *out"]]:
        """Outputs of all tasks for a batch (see :func:`mtl_jax.data.batching.as_batch`)."""
        source, target = self.source(batch, context), self.target(batch, context)
        return {task: _between(source[task], target[task], share) for task, share in self.shares}


def interpolated(result: Result, source: MultiTaskModel, data: TrainingData) -> Result:
    """The result of a run with its model interpolated with another one, and the metrics of that.

    ``diagnostics["source_share"]`` has the share of each task. History, counts of parameters and operations stay those of
    the run.

    Args:
      result: Of training on ``data``.
      source: Of the same schema.
      data: The shares are chosen on its validation part.
    """
    rows, tasks = data.valid, data.schema.tasks
    one, other = outputs_of(source, rows), result.predict(rows)
    scores: dict[str, dict[float, float]] = {task.name: {} for task in tasks}
    for share in SHARES:
        values, _ = metrics.evaluate(tasks, {name: _between(one[name], other[name], share) for name in one}, rows)
        for task in tasks:
            value = values[task.name][task.metric]
            missing = value is None
            scores[task.name][share] = -math.inf if missing else value if task.higher_is_better else -value
    shares = {name: max(found, key=found.get) for name, found in scores.items()}
    model = Interpolation(source, result.model, shares)
    values, support = metrics.evaluate(tasks, outputs_of(model, rows), rows)
    trivial = metrics.baselines.evaluate_baselines(data, rows, names=("global_mean",))["global_mean"]
    monitor = Monitor(result.monitor["name"], tasks, trivial)
    return dataclasses.replace(
        result,
        model=model,
        metrics={"valid": values},
        support={"valid": support},
        monitor=result.monitor | {"value": monitor.value(values)},
        diagnostics=result.diagnostics | {"source_share": shares},
    )


def _between(one: Array | np.ndarray, other: Array | np.ndarray, share: float) -> Array | np.ndarray:
    """Without a product with 0, which does not remove what is not finite."""
    return other if share == 0 else one if share == 1 else share * one + (1 - share) * other
