"""match_parameters: widths of a strategy at which it has as many parameters as another."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from mtl_jax.errors import ConfigError

TOLERANCE = 0.01
"""Share of the number asked for by which a match may miss it."""
STEPS = 60


def match_parameters(
    strategy: functools.partial, target: int, count: Callable[[functools.partial], int]
) -> functools.partial:
    """A strategy with all of its widths multiplied by one number, so that it has as many parameters as asked for.

    Experts, levels and depth stay.

    Args:
      strategy: ``functools.partial`` of a strategy's class; widths that it does not set are the defaults.
      target: Number of parameters.
      count: Strategy -> the number of parameters that has to come close to the target, such as
        :func:`number_of_parameters`.

    Returns:
      The partial with other widths.

    Raises:
      ConfigError: The class names no widths, or no multiple comes within 1 %.

    Example:
      >>> import functools
      >>> from mtl_jax.sharing import MMoE, SharedBottom, match_parameters
      >>> from mtl_jax.sharing.match import number_of_parameters
      >>> def count(strategy):
      ...     return number_of_parameters(strategy, in_features=20, tasks=("click", "buy"))
      >>> asked = count(functools.partial(MMoE, num_experts=4, expert_units=(32, 16)))
      >>> wider = match_parameters(functools.partial(SharedBottom, units=(32, 16)), asked, count)
      >>> asked, wider.keywords["units"], count(wider)
      (4960, (81, 40), 4981)
    """
    kind = strategy.func
    if not _widths(strategy):
        raise ConfigError(f"'{kind.__name__}' names no widths; expected a strategy with the attribute 'widths'. Add it")

    def scaled(factor: float) -> functools.partial:
        return _with_widths(strategy, factor)

    @functools.cache
    def number(factor: float) -> int:
        return count(scaled(factor))

    low, high = 1e-3, 1.0
    while number(high) < target:
        low, high = high, 2 * high
        if high > 2**12:
            raise ConfigError(f"{target:,} parameters are more than '{kind.__name__}' can be given. Ask for fewer")
    best = high
    for _ in range(STEPS):
        middle = np.sqrt(low * high)
        if abs(number(middle) - target) < abs(number(best) - target):
            best = middle
        low, high = (middle, high) if number(middle) < target else (low, middle)
        if high / low < 1 + 1e-5 or abs(number(best) - target) <= TOLERANCE / 10 * target:
            break
    if abs(number(best) - target) > TOLERANCE * target:
        raise ConfigError(
            f"'{kind.__name__}' has {number(best):,} parameters at the widths that come closest to {target:,}; expected "
            f"at most {TOLERANCE:.0%} off. Ask for more, or change its depth or number of experts"
        )
    return scaled(best)


def number_of_parameters(strategy: Callable[..., nnx.Module], in_features: int, tasks: Sequence[str]) -> int:
    """Trained numbers of a strategy, towers and tables apart. They are counted from shapes; nothing is computed."""
    module = nnx.eval_shape(lambda: strategy(in_features, tuple(tasks), rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _widths(strategy: functools.partial) -> dict[str, Any]:
    """What of a strategy is scaled: argument -> its value."""
    kind = strategy.func
    found = {name: strategy.keywords.get(name, _default(kind, name)) for name in getattr(kind, "widths", ())}
    return {name: value for name, value in found.items() if value is not None}


def _with_widths(strategy: functools.partial, factor: float) -> functools.partial:
    widths = _widths(strategy)
    return functools.partial(strategy, **{name: _scaled(value, factor, name) for name, value in widths.items()})


def _default(kind: type, name: str) -> Any:
    return kind.__init__.__kwdefaults__[name]


def _scaled(value: Any, factor: float, name: str) -> Any:
    if callable(value):  # a strategy inside
        return _with_widths(functools.partial(value), factor)
    if isinstance(value, list | tuple):
        return tuple(_scaled(one, factor, name) for one in value)
    width = max(1, round(factor * value))
    return width + width % 2 if name == "width" else width
