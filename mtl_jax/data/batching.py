"""From encoded NumPy rows to device arrays and to the order of batches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.data.dataset import Encoded


def as_batch(encoded: Encoded) -> dict[str, Any]:
    """All rows of a part as one batch pytree on the device: what a model and a train step read.

    User and item codes stay on the host. Masks become f32. Without a domain the key is absent.
    """
    batch = {
        "ids": encoded.ids,
        "dense": encoded.dense,
        "bags": dict(encoded.bags),
        "sequences": dict(encoded.sequences),
        "labels": dict(encoded.labels),
        "mask": {task: mask.astype(np.float32) for task, mask in encoded.mask.items()},
        "task_weight": dict(encoded.task_weight),
        "weight": encoded.weight.astype(np.float32),
    }
    if encoded.domain is not None:
        batch["domain"] = encoded.domain
    return jax.device_put(batch)


def epoch_order(num_rows: int, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Row numbers int32[steps, batch_size] of one epoch: a permutation, padded with -1 in the last batch.

    A function of (seed, epoch) alone, so a resumed run sees the rows that the undisturbed one would have seen.
    """
    num_steps = -(-num_rows // batch_size)
    order = np.full(num_steps * batch_size, -1, np.int32)
    order[:num_rows] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
    return order.reshape(num_steps, batch_size)


def episode_order(
    domain: np.ndarray, *, steps: int, num_domains: int, blocks: int, block_size: int, seed: int, first: int = 0
) -> np.ndarray:
    """Row numbers int32[steps, num_domains, blocks, block_size] of steps that each take rows of several domains.

    A step draws its domains without replacement, in random order, and from each of them ``blocks`` disjoint blocks of
    rows; -1 pads. A domain passes through all of its rows before one comes again, but for those of steps without it.

    Args:
      domain: int[rows], domain of each row.
      steps: How many.
      num_domains: Domains of a step.
      blocks: Blocks of a domain in a step.
      block_size: Rows of a block.
      seed: Of everything drawn.
      first: Number of the first step. A step is a function of the seed and its number alone.
    """
    rows = [np.flatnonzero(domain == name).astype(np.int32) for name in np.unique(domain)]
    size = blocks * block_size
    order = np.full((steps, num_domains, size), -1, np.int32)
    shuffled: dict[int, tuple[int, np.ndarray]] = {}
    for step in range(steps):
        chosen = np.random.Generator(np.random.PCG64([seed, first + step])).permutation(len(rows))[:num_domains]
        for place, name in enumerate(chosen):
            chunks = -(-len(rows[name]) // size)
            turn, chunk = divmod(first + step, chunks)
            if shuffled.get(name, (None,))[0] != turn:
                draw = np.random.Generator(np.random.PCG64([seed, turn, int(name), 1]))
                shuffled[name] = turn, draw.permutation(rows[name])
            found = shuffled[name][1][chunk * size : (chunk + 1) * size]
            order[step, place, : len(found)] = found
    return order.reshape(steps, num_domains, block_size, blocks).swapaxes(
        2, 3
    )  # so that all blocks share what there is


def take(data: dict[str, Any], rows: jax.Array) -> dict[str, Any]:
    """The batch of these rows; a negative row number gives a padding row of weight 0."""
    batch = jax.tree.map(lambda column: jnp.take(column, jnp.maximum(rows, 0), axis=0), data)
    return batch | {"weight": jnp.where(rows >= 0, batch["weight"], 0.0)}
