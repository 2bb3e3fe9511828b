"""gate_use: what the gates, masks and stitches of a trained model weigh, on average over rows and within each domain."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.data.batching import as_batch, take
from mtl_jax.data.dataset import Encoded
from mtl_jax.train.predict import ROWS_PER_BLOCK
from mtl_jax.train.state import Functional, Params

Use = dict[str, dict[str, dict[str, float]]]


def gate_use(functional: Functional, arrays: Params, rows: Encoded, domains: Sequence[str] = ()) -> Use:
    """Mean weight of every member of every gate.

    Args:
      functional: Static view of the model.
      arrays: Path -> array, for all arrays of the model.
      rows: A part; rows count by their weight.
      domains: Names of its domains.

    Returns:
      ``all`` and ``domain=<name>`` -> gate -> member -> mean weight; {} where the strategy has no gates.
    """
    members = functional.merge(arrays).sharing.gate_members()
    if not members:
        return {}
    data = as_batch(rows)
    number = data["ids"].shape[0]
    block = min(ROWS_PER_BLOCK, number)
    order = np.arange(-(-number // block) * block, dtype=np.int32)
    order = np.where(order < number, order, -1).reshape(-1, block)
    sums, weight = jax.device_get(_sums(functional, len(domains), arrays, data, order))
    places = {"all": None} | {f"domain={name}": index for index, name in enumerate(domains)}
    found: Use = {}
    for place, index in places.items():
        total = weight.sum() if index is None else weight[index]
        if total > 0:
            found[place] = {
                gate: dict(zip(names, map(float, _of(sums[gate], index) / total), strict=True))
                for gate, names in members.items()
            }
    return found


def _of(sums: np.ndarray, domain: int | None) -> np.ndarray:
    return sums.sum(axis=0) if domain is None else sums[domain]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    functional: Functional, num_domains: int, arrays: Params, data: Mapping[str, Any], order: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Weighted sums over the rows of each domain, and their weights."""
    model = functional.merge(arrays)

    def of_block(rows):
        batch = take(data, rows)
        weight = batch["weight"]
        if num_domains:
            weight = weight[:, None] * jax.nn.one_hot(batch["domain"], num_domains)
        else:
            weight = weight[:, None]
        gates = {
            gate: jnp.broadcast_to(weights, (len(rows), weights.shape[-1]))
            for gate, weights in model.gates(batch).items()
        }
        return {gate: weight.T @ weights for gate, weights in gates.items()}, weight.sum(axis=0)

    return jax.tree.map(lambda blocks: blocks.sum(axis=0), jax.lax.map(of_block, order))
