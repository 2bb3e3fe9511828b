"""The inner loop: many steps in one compiled call, over data that stays on the device."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mtl_jax.data.batching import take
from mtl_jax.train.direction import diagnostic_names
from mtl_jax.train.state import TrainState
from mtl_jax.train.step import Numbers, Step, Sums

Run = Callable[..., tuple[TrainState, Sums]]


def run_steps(step: Step) -> Run:
    """A pure function that makes up to K steps and gathers each batch by row number inside the loop.

    Returns:
      ``(state, data, order int32[K, batch], num_steps int32[], numbers) -> (state, sums)``. The number of steps is data,
      not shape: every call of a run, also the shorter last one of an epoch or the first after a resume, executes the same
      program, so that results do not depend on where a run was cut. So are learning rates and the like (``numbers``, those
      of the step by default): runs that differ in them share the program.
    """

    def run(
        state: TrainState,
        data: Mapping[str, Any],
        order: Int[Array, "step batch"],
        num_steps: Int[Array, ""],
        numbers: Numbers | None = None,
    ) -> tuple[TrainState, Sums]:
        one = step if numbers is None else step.with_numbers(numbers)

        def body(index, carry):
            state, sums = carry
            state, added = one(state, take(data, order[index]))
            return state, jax.tree.map(jnp.add, sums, added)

        sums = Sums.zeros(len(step.tasks), diagnostic_names(step.balancer, state.balancer))
        return jax.lax.fori_loop(0, num_steps, body, (state, sums))

    return run
