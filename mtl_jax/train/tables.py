"""Embedding tables of which a step touches only the rows of its batch.

A step reads a few thousand rows of a table that may have millions. The rows that it reads are gathered once and become
ordinary parameters; the optimizer then updates those rows and their state in place. Nothing of the table's size is
computed, and no sort is needed to find duplicates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mtl_jax.data.schema import PAD_ID
from mtl_jax.errors import ConfigError
from mtl_jax.model import Inputs

DENSE, SPARSE = "dense", "sparse"
ROWS_PER_LOOKUP = 4
"""A table is updated by rows when it has more rows than this many times the ids of a step.

Measured on 2 CPU cores with 32k ids a step and Adam, width 32: the whole table costs 1.3 / 5.4 / 37 ms at 1e4 / 1e5 / 1e6
rows, its touched rows 3.8 / 5.5 / 6.5 ms.
"""


def choose(
    sizes: Mapping[str, int], ids_per_step: Mapping[str, int], override: str | Mapping[str, str] = "auto"
) -> dict[str, str]:
    """How each vocabulary's tables are updated: ``dense`` (whole) or ``sparse`` (touched rows).

    Args:
      sizes: Vocabulary -> rows V.
      ids_per_step: Vocabulary -> ids that one step looks up, duplicates included.
      override: ``auto`` (by size), ``dense`` or ``sparse`` for all, or a choice for some vocabularies by name.

    Raises:
      ConfigError: On an unknown choice or vocabulary.
    """
    choices = dict.fromkeys(sizes, override) if isinstance(override, str) else dict(override)
    for name, choice in choices.items():
        if name not in sizes:
            raise ConfigError(f"trainer.tables names '{name}'; expected vocabularies of {sorted(sizes)}. Remove it")
        if choice not in ("auto", DENSE, SPARSE):
            raise ConfigError(f"trainer.tables has '{choice}' for '{name}'; expected auto, dense or sparse. Change it")

    def by_size(name: str) -> str:
        return SPARSE if sizes[name] > ROWS_PER_LOOKUP * ids_per_step[name] else DENSE

    return {name: by_size(name) if choices.get(name, "auto") == "auto" else choices[name] for name in sizes}


class Compact(NamedTuple):
    """The rows of one lookup of N ids.

    Attributes:
      ids: The ids, duplicates included.
      representatives: For each of the N places, the place that stands for its id.
      touched: The id at places that represent one, V (out of range) elsewhere: scatters there are dropped.
    """

    ids: Int[Array, " lookup"]
    representatives: Int[Array, " lookup"]
    touched: Int[Array, " lookup"]


def compact(slots: Int[Array, " row"], ids: Int[Array, " lookup"]) -> tuple[Int[Array, " row"], Compact]:
    """Finds one representative per distinct id in time O(N), whatever the size of the table.

    Every place offers its number to the slot of its id; the lowest stays and is the representative. It must not be left
    to chance which one stays: every device does this by itself, and gradients are summed over devices place by place.
    ``slots`` is scratch: what it held before is never read.
    """
    places = jnp.arange(ids.shape[0], dtype=jnp.int32)
    slots = slots.at[ids].set(ids.shape[0]).at[ids].min(places)
    representatives = slots[ids]
    touched = jnp.where(representatives == places, ids, slots.shape[0])
    return slots, Compact(ids, representatives, touched)


def renumber(
    inputs: Inputs, names: Sequence[str], slots: Int[Array, " row"], axis: str | None = None
) -> tuple[Inputs, Int[Array, " row"], Compact]:
    """Compacts all ids of the features ``names``, which read one vocabulary, and lets them point to representatives.

    Rows of weight 0 (the padding of a batch) read the padding id: naming a table row is enough to move it by its momentum.
    With a named ``axis`` the rows are those of all devices.
    """
    ids = jnp.concatenate([_of_weighted_rows(inputs.lookups[name].ids, inputs.weight).reshape(-1) for name in names])
    start = 0
    if axis is not None:
        start = jax.lax.axis_index(axis) * ids.size
        ids = jax.lax.all_gather(ids, axis, tiled=True)
    slots, rows = compact(slots, ids)
    lookups = dict(inputs.lookups)
    for name in names:
        lookup = lookups[name]
        part = jax.lax.dynamic_slice_in_dim(rows.representatives, start, lookup.ids.size)
        lookups[name] = lookup._replace(ids=part.reshape(lookup.ids.shape))
        start += lookup.ids.size
    return inputs._replace(lookups=lookups), slots, rows


def update_rows(
    transform: optax.GradientTransformation,
    table: Float[Array, "row width"],
    state: PyTree,
    rows: Compact,
    gradient: Float[Array, "lookup width"],
    live: Bool[Array, ""],
) -> tuple[Float[Array, "row width"], PyTree]:
    """Applies any per-row optax transform to the touched rows, and to nothing else.

    Leaves of ``state`` with one entry a row are gathered and scattered like the table; others (step counts) advance as
    usual. A row that is not touched keeps its moments, unlike under a dense optimizer, where they decay. With ``live``
    False nothing changes: the row numbers are masked, because a select over the whole table would cost ten times the
    update.
    """
    num_rows = table.shape[0]
    touched = jnp.where(live, rows.touched, num_rows)

    def by_row(leaf: Any) -> bool:
        return jnp.ndim(leaf) > 0 and leaf.shape[0] == num_rows

    def take(leaf: Array) -> Array:
        return leaf.at[touched].get(mode="fill", fill_value=0) if by_row(leaf) else leaf

    def put(leaf: Array, new: Array) -> Array:
        if by_row(leaf):
            return leaf.at[touched].set(new, mode="drop", unique_indices=True)
        return jnp.where(live, new, leaf)

    old = take(table)
    updates, new_state = transform.update(gradient, jax.tree.map(take, state), old)
    return put(table, old + updates), jax.tree.map(put, state, new_state)


def _of_weighted_rows(
    ids: Int[Array, "batch *length"], weight: Float[Array, " batch"] | None
) -> Int[Array, "batch *length"]:
    return ids if weight is None else jnp.where(jnp.expand_dims(weight > 0, range(1, ids.ndim)), ids, PAD_ID)
