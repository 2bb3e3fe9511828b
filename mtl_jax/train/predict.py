"""One compiled pass over a part: the outputs of every task for every row."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mtl_jax.data.batching import as_batch, take
from mtl_jax.data.dataset import Encoded
from mtl_jax.train.parallel import Devices
from mtl_jax.train.state import Functional, Params

ROWS_PER_BLOCK = 8192


def predict(
    functional: Functional, arrays: Params, rows: Encoded | Mapping[str, Any], devices: Devices | None = None
) -> dict[str, np.ndarray]:
    """Outputs of all tasks: logits, or standardised predictions of regression tasks.

    Args:
      functional: Static view of the model.
      arrays: Path -> array, for all arrays of the model; those of an adaptation may be there beside them.
      rows: A part, or its batch on the device (see :func:`mtl_jax.data.batching.as_batch`).
      devices: Over which the rows are spread; arrays and batch are replicated there. By default one.

    Returns:
      Task -> f32[N] or f32[N, C] on the host.
    """
    data = as_batch(rows) if isinstance(rows, Encoded) else rows
    num_rows = data["ids"].shape[0]
    devices = Devices(count=1) if devices is None else dataclasses.replace(devices, strategy="jit")
    block = devices.multiple(min(ROWS_PER_BLOCK, num_rows))
    order = np.arange(-(-num_rows // block) * block, dtype=np.int32)
    order = np.where(order < num_rows, order, -1).reshape(-1, block)
    order = jax.device_put(order) if devices.number == 1 else devices.spread(order)
    outputs = jax.device_get(_pass_over(functional, functional.own(arrays), data, order))
    return {task: blocks.reshape(-1, *blocks.shape[2:])[:num_rows] for task, blocks in outputs.items()}


def outputs_of(model: Any, rows: Encoded) -> dict[str, np.ndarray]:
    """Outputs of a model for the rows of a part, as :func:`predict` gives them."""
    functional, params, rest = Functional.of(model)
    return predict(functional, params | rest, rows)


def predict_stack(functional: Functional, arrays: Params, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Outputs of several sets of arrays, stacked along a leading run axis, for the rows of one batch.

    Returns:
      Task -> f32[run, N] or f32[run, N, C] on the host.
    """
    num_rows, runs = data["ids"].shape[0], next(iter(arrays.values())).shape[0]
    block = min(max(ROWS_PER_BLOCK // runs, 256), num_rows)  # as much memory as one set takes
    order = np.arange(-(-num_rows // block) * block, dtype=np.int32)
    order = np.where(order < num_rows, order, -1).reshape(-1, block)
    outputs = jax.device_get(_passes_over(functional, functional.own(arrays), data, order))
    return {task: blocks.reshape(runs, -1, *blocks.shape[3:])[:, :num_rows] for task, blocks in outputs.items()}


def flops_per_example(functional: Functional, arrays: Params, data: Mapping[str, Any]) -> float | None:
    """Floating-point operations of one forward pass, as the compiler counts them; None where it does not."""
    block = min(1024, data["ids"].shape[0])
    forward = jax.jit(lambda arrays, data, rows: functional.merge(arrays)(take(data, rows)))
    cost = forward.lower(arrays, data, np.arange(block, dtype=np.int32)).cost_analysis() or {}
    return cost["flops"] / block if cost.get("flops", 0) > 0 else None


@functools.partial(jax.jit, static_argnums=0)
def _pass_over(
    functional: Functional, arrays: Params, data: Mapping[str, Any], order: jax.Array
) -> dict[str, jax.Array]:
    model = functional.merge(arrays)
    return jax.lax.map(lambda rows: model(take(data, rows)), order)


@functools.partial(jax.jit, static_argnums=0)
def _passes_over(
    functional: Functional, arrays: Params, data: Mapping[str, Any], order: jax.Array
) -> dict[str, jax.Array]:
    return jax.vmap(lambda one: _pass_over(functional, one, data, order))(arrays)
