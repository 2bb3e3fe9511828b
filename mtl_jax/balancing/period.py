"""Periods of a schedule, an epoch or n calls, and means over the calls of one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_jax.errors import ConfigError

Period = str | int


def checked_period(period: Period, option: str) -> Period:
    """``epoch``, or a number of calls.

    Raises:
      ConfigError: It is neither.
    """
    is_count = isinstance(period, int) and not isinstance(period, bool) and period >= 1
    if period != "epoch" and not is_count:
        expectation = "expected 'epoch' or a whole number of steps, at least 1"
        raise ConfigError(f"{option} is {period!r}; {expectation}. Set one of them")
    return period


def count_call(state: Any, period: Period, end: Callable[[Any], Any]) -> Any:
    """A state with ``calls`` after one more of them, and after ``end`` where they fill a period of n calls."""
    if period == "epoch":
        return state
    state = state._replace(calls=state.calls + 1)
    ended = end(state)._replace(calls=jnp.zeros_like(state.calls))
    return jax.tree.map(lambda new, old: jnp.where(state.calls >= period, new, old), ended, state)


class Means(NamedTuple):
    """Mean loss of each task over the calls of a period that had its labels, and how many those were."""

    value: Float[Array, " task"]
    count: Int[Array, " task"]


def no_means(num_tasks: int) -> Means:
    """Means before the first call."""
    return Means(jnp.zeros(num_tasks), jnp.zeros(num_tasks, jnp.int32))


def add_losses(means: Means, losses: Float[Array, " task"], active: Bool[Array, " task"] | None) -> Means:
    """The means with the losses of one more call; inactive tasks keep theirs."""
    count = means.count + 1
    value = means.value + (losses.astype(means.value.dtype) - means.value) / count
    new = Means(value, count)
    return new if active is None else jax.tree.map(lambda a, b: jnp.where(active, a, b), new, means)
