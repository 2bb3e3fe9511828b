"""Devices: where the rows of a step are computed, and the compilation of pure functions over them.

Parameters, optimizer state and data are on every device; the rows of a batch are spread. Under ``jit`` the compiler finds
the sums over devices from the placement of the arrays; under ``pmap`` every device runs the program on its rows and the
step sums by name (:func:`total`). Both give the numbers of one device, up to the order of the sums.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from mtl_jax.errors import ConfigError

STRATEGIES = ("jit", "pmap")
AXIS = "batch"


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a run.

    Attributes:
      strategy: ``jit`` (one program, partitioned by the compiler) or ``pmap`` (one program a device).
      count: How many of the visible devices; None: all.

    Raises:
      ConfigError: The strategy is unknown, or there are fewer devices.
    """

    strategy: str = "jit"
    count: int | None = None

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"parallel is '{self.strategy}'; expected one of {list(STRATEGIES)}. Change it")
        visible = jax.device_count()
        if self.count is not None and not (isinstance(self.count, int) and 1 <= self.count <= visible):
            raise ConfigError(
                f"parallel.devices is {self.count}; expected a number from 1 to {visible}, the visible devices. Lower it, "
                "or leave it out to use all"
            )

    @property
    def number(self) -> int:
        """How many devices share the rows of a step."""
        return self.count or jax.device_count()

    @property
    def axis(self) -> str | None:
        """The name over which a step has to sum; None where the compiler does it."""
        return AXIS if self.strategy == "pmap" else None

    @functools.cached_property
    def mesh(self) -> Mesh:
        return jax.make_mesh((self.number,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[: self.number])

    def multiple(self, rows: int) -> int:
        """The number of rows, rounded up so that every device has as many."""
        return -(-rows // self.number) * self.number

    def replicate(self, tree: PyTree) -> PyTree:
        """Copies of the arrays, on every device; the originals survive a donation of these."""
        sharding = NamedSharding(self.mesh, PartitionSpec())
        # Copied first: over several devices even may_alias=False hands on the buffer of the one that holds the array.
        return jax.tree.map(lambda leaf: jax.device_put(jnp.copy(leaf), sharding), tree)

    def spread(self, orders: np.ndarray) -> Array:
        """Row numbers int32[steps, batch] with the rows of each step spread over the devices.

        The batch is a multiple of :attr:`number`. Under ``pmap`` the result is [steps, device, batch / device].
        """
        if self.axis:
            orders = orders.reshape(orders.shape[0], self.number, -1)
        return jax.device_put(orders, NamedSharding(self.mesh, PartitionSpec(None, AXIS)))


def compile_step(
    function: Callable[..., Any],
    devices: Devices | None = None,
    *,
    rows: Sequence[int] = (),
    donate: Sequence[int] = (0,),
) -> Callable[..., Any]:
    """Compiles a pure function of replicated arrays, and of rows that are spread, to replicated results.

    Args:
      function: ``(state, ...) -> ...``.
      devices: Where; one program on the devices of its arguments by default.
      rows: Positions of the arguments from :meth:`Devices.spread`.
      donate: Positions of the arguments whose buffers the result reuses.
    """
    if devices is None:
        return jax.jit(function, donate_argnums=tuple(donate))
    if devices.axis is None:
        replicated = NamedSharding(devices.mesh, PartitionSpec())
        return jax.jit(function, donate_argnums=tuple(donate), out_shardings=replicated)
    axes = tuple(1 if position in rows else None for position in range(len(inspect.signature(function).parameters)))
    return jax.pmap(
        function,
        axis_name=devices.axis,
        in_axes=axes,
        out_axes=None,
        donate_argnums=tuple(donate),
        devices=jax.devices()[: devices.number],
    )


def total(tree: PyTree, axis: str | None) -> PyTree:
    """The sum over devices, inside a program that one device runs (``pmap``); the tree itself elsewhere."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def mean(tree: PyTree, axis: str | None) -> PyTree:
    """The mean over devices, inside a program that one device runs (``pmap``); the tree itself elsewhere.

    Of derivatives, where a function has totals over devices inside, and so one value on all of them: each device then
    differentiates the sum of what all devices have by its own copy of the arguments, and the mean is the derivative by the
    arguments that they are copies of. That holds of derivatives within functions that are differentiated themselves, too.
    """
    return tree if axis is None else jax.lax.pmean(tree, axis)
