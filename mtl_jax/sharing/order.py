"""check_order: the order of tasks of which one builds on another."""

from collections.abc import Sequence

from mtl_jax.arguments import shown
from mtl_jax.errors import ConfigError


def check_order(
    order: Sequence[str] | None, tasks: Sequence[str], *, least: int | None = None, place: str = "order"
) -> tuple[str, ...]:
    """The tasks from first to last; a ConfigError where they are no tasks, repeated or too few.

    Args:
      order: Some of the tasks; None: all as they are listed.
      tasks: Task names.
      least: Fewest that the order has; None: all tasks.
      place: What stands for the order in a configuration.
    """
    if order is None:
        return tuple(tasks)
    least = len(tasks) if least is None else least
    ok = isinstance(order, list | tuple) and len(set(map(str, order))) == len(order) >= least
    if not ok or not set(order) <= set(tasks):
        number = "all" if least == len(tasks) else f"{least} or more"
        raise ConfigError(
            f"{place} is {shown(order)}; expected {number} of the tasks {list(tasks)}, each once, first to last. Change it"
        )
    return tuple(order)
