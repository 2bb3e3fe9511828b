"""DELTA: units that the target's losses need stay near to those of the source's model."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.train.adaptation import TEACHER, Adaptation, is_zero, mean_over_rows
from mtl_jax.transfer.linear_probe import LinearProbe

ATTENTION = "attention"
AT_ONCE = 16
"""Units that are silenced side by side."""


@register
@dataclasses.dataclass(frozen=True)
class Delta(Adaptation):
    r"""A probe, and then fine-tuning in which each unit is held as strongly as the probe needs it.

    .. math::
        \Omega = \frac{\lambda}{2} \, C \sum_{c=1}^{C} a_c \, \overline{(h_c - h^0_c)^2}
        + \frac{\beta}{2} \| \text{towers} \|^2, \qquad a = \mathrm{softmax}(\Delta / \tau)

    The first stage trains the tasks' own parameters on the frozen source, as :class:`mtl_jax.transfer.LinearProbe` does.
    Then :math:`\Delta_c` is by how much the sum of the tasks' losses rises where unit c is set to 0, on the training rows
    of up to ten batches; a unit that is always 0 has 0. The second stage trains everything, from the probe's towers, and
    :math:`h^0` is what the model says that it begins with: the source's, with the probe's own parts of the tasks.

    The paper holds maps of several convolutional layers. Here it is one layer, what the towers read: every sharing strategy
    has it, and what lies below is held through it. Its sum over positions of a map, divided by their number, has one
    term here, and the mean over rows is ours (the authors' code sums over a batch, whose size then is a strength). That
    code also standardises :math:`\Delta` and has :math:`\tau = 5`, where the paper has the softmax alone.

    Attributes:
      weight: :math:`\lambda \ge 0`.
      tau: :math:`\tau > 0`.
      beta: :math:`\beta \ge 0`, of the towers alone.
      standardise: Whether :math:`\Delta` is brought to mean 0 and standard deviation 1 first.

    References:
      Li, Xiong, Wang, Rao, Liu, Huan, *DELTA: Deep Learning Transfer Using Feature Map with Attention for Convolutional
      Networks*, ICLR 2019.
    """

    penalises: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True
    studies: ClassVar[float] = 10

    weight: float = 0.01
    tau: float = 1.0
    beta: float = 0.01
    standardise: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        check_number(self.weight, "transfer.weight", least=0)
        check_number(self.tau, "transfer.tau", above=0)
        check_number(self.beta, "transfer.beta", least=0)

    def simplified(self):
        return LinearProbe(then_all=True) if is_zero(self.weight, self.beta) else self

    def phases(self):
        return LinearProbe(then_all=True).phases()

    def in_phase(self, number):
        return LinearProbe() if number == 0 else self

    def init(self, params, origin, key):
        return params, {TEACHER: {path: jnp.copy(array) for path, array in params.items()}}

    def study(self, params, kept, add_up):
        def losses(view):
            units = jnp.arange(view.features(params, train=False).shape[1])
            silenced = jnp.arange(-1, len(units))  # the first is none of them
            return jax.lax.map(lambda unit: view.loss(params, units != unit), silenced, batch_size=AT_ONCE)

        whole, *without = add_up(losses)
        rise = jnp.stack(without) - whole
        if self.standardise:
            spread = jnp.std(rise)
            rise = (rise - jnp.mean(rise)) / jnp.where(spread > 0, spread, 1)
        return {ATTENTION: {"units": jax.nn.softmax(rise / self.tau)}}

    def penalty(self, params, kept, view):
        attention = kept[ATTENTION]["units"]
        before = jax.lax.stop_gradient(view.features(kept[TEACHER], train=False))
        moved = jnp.sum(attention * jnp.square(view.features(params, train=True) - before), axis=-1)
        towers = sum(jnp.sum(jnp.square(array)) for path, array in params.items() if "tower" in path.split("/")[2:3])
        return self.weight / 2 * attention.size * mean_over_rows(moved, view.weight, view.axis) + self.beta / 2 * towers
