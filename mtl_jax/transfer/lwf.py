"""Learning without forgetting: the source's towers keep saying of the target's rows what they said before."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.model import COPY, is_table, label
from mtl_jax.train.adaptation import TEACHER, Adaptation, Origin, Params, is_zero, mean_over_rows
from mtl_jax.transfer.distill import distance
from mtl_jax.transfer.fine_tune import FineTune
from mtl_jax.transfer.kernels import of_tasks


@register
@dataclasses.dataclass(frozen=True)
class LwF(Adaptation):
    r"""Fine-tuning with the source's towers kept beside the target's, on the layers that both share.

    .. math:: L_t + \lambda T^2 \, \overline{\mathrm{KL}(p^0(x_t) \,\|\, p(x_t))}

    p are the outputs of the source's towers, which go on being trained by this term alone, and p^0 what the source's model
    says of the same rows of the target. Distances of other kinds of tasks as in :class:`mtl_jax.transfer.Distill`, from
    which it differs in that the target's towers are free. The deployed model has the target's towers only.

    Attributes:
      weight: :math:`\lambda \ge 0`.
      temperature: :math:`T > 0`.
      t_squared: Whether the term has the factor :math:`T^2`, which the paper's loss lacks: with it the size of the gradient
        does not fall with T.

    Raises:
      ConfigError: By ``init``, where a task's tower did not come from the source; by ``penalty``, for a task of a kind
        without such a distance.

    References:
      Li, Hoiem, *Learning without Forgetting*, ECCV 2016.
    """

    adapts: ClassVar[bool] = True
    penalises: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True

    weight: float = 1.0
    temperature: float = 2.0
    t_squared: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self):
        check_number(self.weight, "transfer.weight", least=0)
        check_number(self.temperature, "transfer.temperature", above=0)

    def simplified(self):
        return FineTune() if is_zero(self.weight) else self

    def init(self, params, origin, key):
        return with_copies(params, origin, "LwF"), {TEACHER: {path: jnp.copy(array) for path, array in params.items()}}

    def adapt(self, params, kept, loss, batches):
        return deployed(params)

    def penalty(self, params, kept, view):
        before = jax.lax.stop_gradient(view.outputs(kept[TEACHER], train=False))
        now = view.outputs(of_source(params), train=True)
        distances = [distance(task, before[task.name], now[task.name], self.temperature) for task in view.tasks]
        scale = self.weight if self.t_squared else self.weight / self.temperature**2
        return scale * sum(mean_over_rows(rows, view.weight, view.axis) for rows in distances)


def with_copies(params: Params, origin: Origin, transfer: str) -> Params:
    """The parameters with copies of the tasks' own ones beside them.

    Raises:
      ConfigError: A task's own parameters did not all come from a source; the message names the transfer.
    """
    own = [path for path in params if of_tasks(path) and not is_table(path)]
    if new := sorted({label(path).removeprefix("task/") for path in own if not origin.get(path, False)}):
        raise ConfigError(
            f"transfer '{transfer}' asks towers of the source, and those of {new} did not come from there; expected "
            "towers of the source for all tasks. Leave the tasks out (data.tasks), or choose another transfer"
        )
    return params | {f"{COPY}/{path}": jnp.copy(array) for path, array in params.items() if of_tasks(path)}


def deployed(params: Params) -> Params:
    """The parameters without the copies."""
    return {path: array for path, array in params.items() if not path.startswith(f"{COPY}/")}


def of_source(params: Params) -> Params:
    """The parameters with the copies in place of what they are copies of."""
    return {path: params.get(f"{COPY}/{path}", array) for path, array in deployed(params).items()}
