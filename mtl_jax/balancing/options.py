"""Options that are one number for all tasks, one number per task, or numbers by task name."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtl_jax.errors import ConfigError

PerTask = float | Sequence[float] | Mapping[str, float] | Array | np.ndarray


def checked(value: PerTask, option: str, *, at_least: float = -np.inf, at_most: float = np.inf) -> PerTask:
    """The option as leaves of a pytree: a number, an array, or numbers by name; traced values pass unchecked.

    Raises:
      ConfigError: A value is not a finite number in the range.
    """
    if isinstance(value, Mapping):
        numbers = list(value.values())
    else:
        numbers = value if isinstance(value, Sequence) else [value]
    if not all(_in_range(number, at_least, at_most) for number in numbers):
        expectation = f"finite numbers in [{at_least:g}, {at_most:g}]"
        raise ConfigError(f"{option} is {value}; expected {expectation}. Change the value outside of them")
    if isinstance(value, Mapping):
        return dict(value)
    return np.asarray(value, float) if isinstance(value, Sequence) else value


def checked_count(value: int, option: str, *, at_least: int) -> int:
    """A whole number that shapes or loop lengths may depend on.

    Raises:
      ConfigError: It is not one, or too low.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        expectation = f"expected a whole number, at least {at_least}"
        raise ConfigError(f"{option} is {value!r}; {expectation}. Change it")
    return value


def by_position(value: PerTask, names: Sequence[str], option: str) -> PerTask:
    """The option in the order of the tasks: names are resolved, the length is checked.

    Raises:
      ConfigError: The names or the number of values are not those of the tasks.
    """
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ConfigError(f"{option} names {sorted(value)}; the tasks are {list(names)}. Give each task one value")
        return np.array([value[name] for name in names], float)
    vector(value, len(names), option)
    return value


def vector(value: PerTask, num_tasks: int, option: str) -> Float[Array, " task"]:
    """The option as one value per task.

    Raises:
      ConfigError: The number of values is not that of the tasks, or they still go by task name.
    """
    if isinstance(value, Mapping):
        fix = "Call balancer.for_tasks(tasks) first, or give one value per task in their order"
        raise ConfigError(
            f"{option} goes by the task names {sorted(value)}, and only a number of tasks is known. {fix}"
        )
    value = jnp.asarray(value, float)
    if value.shape not in ((), (num_tasks,)):
        expectation = f"expected one number or {num_tasks}, one per task"
        raise ConfigError(f"{option} has {value.size} values of shape {value.shape}; {expectation}. Change its length")
    return jnp.broadcast_to(value, (num_tasks,))


def _in_range(number, low, high):
    if isinstance(number, jax.core.Tracer):
        return True
    try:
        number = np.asarray(number, float)
    except (TypeError, ValueError):
        return False
    return bool(np.all(np.isfinite(number) & (number >= low) & (number <= high)))
