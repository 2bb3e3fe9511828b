"""Weights that learn: a vector in the balancer's state with an Adam of its own for each task."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float


class Learnable(NamedTuple):
    """One learnable number per task.

    Attributes:
      value: f[T].
      adam: Moments and step counts, each with a task axis: a task's bias correction counts its own steps.
    """

    value: Float[Array, " task"]
    adam: optax.ScaleByAdamState


def learnable(value: Float[Array, " task"]) -> Learnable:
    """A learnable vector before its first step."""
    return Learnable(value, jax.vmap(_ADAM.init)(value))


def adam_step(
    state: Learnable,
    gradient: Float[Array, " task"],
    learning_rate: float | Float[Array, ""],
    *,
    active: Bool[Array, " task"] | None = None,
) -> Learnable:
    """One step of Adam (0.9, 0.999, 1e-8) without weight decay; inactive tasks keep value, moments and count."""
    updates, adam = jax.vmap(lambda g, s: _ADAM.update(g, s))(gradient.astype(state.value.dtype), state.adam)
    step = jnp.asarray(learning_rate, state.value.dtype) * updates
    new = Learnable(state.value - step, adam)
    return new if active is None else jax.tree.map(lambda a, b: jnp.where(active, a, b), new, state)


_ADAM = optax.scale_by_adam()
