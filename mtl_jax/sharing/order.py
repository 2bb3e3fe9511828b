"""order_of: the order of the tasks, for strategies in which one builds on another."""

from collections.abc import Sequence

from mtl_jax.arguments import shown
from mtl_jax.errors import ConfigError


def order_of(tasks: Sequence[str], order: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks from first to last; None: as they are listed. A ConfigError for anything but all of them, each once."""
    if order is None:
        return tuple(tasks)
    if not isinstance(order, list | tuple) or sorted(map(str, order)) != sorted(tasks):
        raise ConfigError(f"order is {shown(order)}; expected each of {list(tasks)} once, first to last. Change it")
    return tuple(order)
