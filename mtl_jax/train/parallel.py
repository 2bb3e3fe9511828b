"""Compilation of pure functions over devices."""

from collections.abc import Callable
from typing import Any

import jax

from mtl_jax.errors import ConfigError

STRATEGIES = ("jit",)


def compile_step(
    function: Callable[..., Any], *, strategy: str = "jit", donate: tuple[int, ...] = (0,)
) -> Callable[..., Any]:
    """Compiles a pure function of a state.

    Args:
      function: ``(state, ...) -> ...``.
      strategy: ``jit``, one device.
      donate: Positions of the arguments whose buffers the result reuses.

    Raises:
      ConfigError: On an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"parallel is '{strategy}'; expected one of {list(STRATEGIES)}. Change it")
    return jax.jit(function, donate_argnums=donate)
