r"""Exponential moving average of the parameters (Polyak and Juditsky, SIAM J. Control Optim. 1992, with forgetting).

With decay d and parameters after t steps, the average is that of Adam's moments, free of the initial values. A step that
was skipped counts too, with the parameters as they stayed:

.. math::
    a_t = a_{t-1} + \frac{1 - d}{1 - d^t} (\theta_t - a_{t-1}), \qquad a_1 = \theta_1

Rows of a table that a step does not touch keep their value, so their average can wait: before a row is touched in step t
again, and before it is read, it is brought forward over the n steps that it missed in closed form.

.. math::
    a_{s+n} = \theta + \frac{d^n (1 - d^s)}{1 - d^{s+n}} (a_s - \theta)
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.train.tables import Compact


class RowAverage(NamedTuple):
    """Average of a table that is updated by rows.

    Attributes:
      rows: The average of each row, as of ``seen``.
      seen: The step until which it is that.
    """

    rows: Float[Array, "row width"]
    seen: Int[Array, " row"]

    @classmethod
    def of(cls, table: Float[Array, "row width"], step: int) -> "RowAverage":
        """The average that begins at ``step``: the table itself."""
        return cls(jnp.copy(table), jnp.full(table.shape[0], step, jnp.int32))


def update(average: Array, new: Array, step: Int[Array, ""], decay: float) -> Array:
    """The average after update number ``step`` (from 1), which led to ``new``."""
    return average + _rest(decay, 1) / _rest(decay, step) * (new - average)


def update_rows(
    average: RowAverage,
    old: Float[Array, "row width"],
    new: Float[Array, "row width"],
    rows: Compact,
    step: Int[Array, ""],
    decay: float,
    live: Bool[Array, ""],
) -> RowAverage:
    """The same for the touched rows of a table, ``old`` before the update and ``new`` after it."""
    num_rows = new.shape[0]
    touched = jnp.where(live, rows.touched, num_rows)

    def take(array):
        return array.at[touched].get(mode="fill", fill_value=0)

    before = forward(take(average.rows), take(average.seen), take(old), step - 1, decay)
    after = update(before, take(new), step, decay)
    return RowAverage(
        average.rows.at[touched].set(after, mode="drop", unique_indices=True),
        average.seen.at[touched].set(step, mode="drop", unique_indices=True),
    )


def forward(
    average: Float[Array, "row width"],
    seen: Int[Array, " row"],
    values: Float[Array, "row width"],
    step: Int[Array, ""],
    decay: float,
) -> Float[Array, "row width"]:
    """Averages at ``step`` of rows that have had ``values`` since their averages were ``seen``."""
    kept = (1 - _rest(decay, step - seen)) * _rest(decay, seen) / _rest(decay, jnp.maximum(step, 1))
    return values + kept[:, None] * (average - values)


def _rest(decay, steps):
    """1 - d^steps, to the last digit also where d is nearly 1."""
    return -jnp.expm1(steps * math.log(decay))
