"""Schedules of the learning rate that optax does not have."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtl_jax.arguments import check_count, check_number


@dataclasses.dataclass(frozen=True)
class SlantedTriangular:
    r"""The slanted triangular learning rate: a short rise to the peak, a long linear way down.

    .. math::
        c = \max(1, \lfloor S f \rfloor), \qquad
        p = \begin{cases} t / c & t < c \\ 1 - \frac{t - c}{c (1/f - 1)} & \text{otherwise,} \end{cases} \qquad
        \eta_t = \eta_{\max} \frac{1 + \max(p, 0) (r - 1)}{r}

    It begins at :math:`\eta_{\max} / r`, is the peak after c updates, and is at :math:`\eta_{\max} / r` again after c / f
    of them: S, where S f is a whole number, and for a larger S less than 1 / f before it. There it stays.

    Equal arguments make equal schedules, so that optimizers that have them share compiled programs.

    Attributes:
      peak_value: :math:`\eta_{\max} > 0`.
      decay_steps: S, updates of the whole run.
      cut_frac: f in (0, 1), the share of them that the rise takes.
      ratio: :math:`r \ge 1`, how much smaller the least rate is than the peak; 1 is a constant rate.

    Raises:
      ConfigError: A value is out of its range.

    References:
      Howard, Ruder, *Universal Language Model Fine-tuning for Text Classification*, ACL 2018.

    Example:
      >>> from mtl_jax.train import SlantedTriangular
      >>> rate = SlantedTriangular(0.01, 100)
      >>> [round(float(rate(step)), 8) for step in (0, 10, 55, 100)]
      [0.0003125, 0.01, 0.00515625, 0.0003125]
    """

    peak_value: float
    decay_steps: int
    cut_frac: float = 0.1
    ratio: float = 32.0

    def __post_init__(self):
        check_number(self.peak_value, "optimizer.learning_rate.peak_value", above=0)
        check_count(self.decay_steps, "optimizer.learning_rate.decay_steps", most=2**31 - 1)
        check_number(self.cut_frac, "optimizer.learning_rate.cut_frac", above=0, below=1)
        check_number(self.ratio, "optimizer.learning_rate.ratio", least=1)

    def __call__(self, step: Int[Array, ""] | int) -> Float[Array, ""]:
        """The rate of the update that comes after ``step`` others."""
        step = jnp.asarray(step, jnp.float32)
        cut = max(1, math.floor(self.decay_steps * self.cut_frac))
        down = 1 - (step - cut) / (cut * (1 / self.cut_frac - 1))
        share = jnp.maximum(jnp.where(step < cut, step / cut, down), 0)
        return self.peak_value * (1 + share * (self.ratio - 1)) / self.ratio
