"""What methods have in common that go on top of another one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Bool, Float, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike


def _of_base(name):
    return property(lambda self: getattr(self.base, name))


class Wrapper(Balancer):
    """A method with the needs of its field ``base``, another method, whose state is the field ``base`` of its own."""

    base: Balancer

    needs = _of_base("needs")
    reads_losses = _of_base("reads_losses")
    stochastic = _of_base("stochastic")
    min_tasks = _of_base("min_tasks")
    num_batches = _of_base("num_batches")
    homogeneity = _of_base("homogeneity")
    observes = _of_base("observes")
    has_parameter_state = _of_base("has_parameter_state")
    weighted_heads = _of_base("weighted_heads")
    by_epoch = _of_base("by_epoch")
    scaling = _of_base("scaling")

    def products(self, jacobian: PyTree[Float[Array, "..."]]) -> Float[Array, "..."]:
        return self.base.products(jacobian)

    def kept(self, state: Any) -> tuple[Bool[Array, ""], Float[Array, "task task"]] | None:
        return self.base.kept(state.base)

    def squared_norms(self, products: Float[Array, "..."]) -> Float[Array, " task"]:
        return self.base.squared_norms(products)

    def observe(
        self, losses_after: Float[Array, " task"], state: Any, *, active: Bool[Array, " task"] | None = None
    ) -> Any:
        return state._replace(base=self.base.observe(losses_after, state.base, active=active))

    def end_epoch(self, state: Any) -> Any:
        return state._replace(base=self.base.end_epoch(state.base))

    def diagnostics(self, state: Any) -> dict[str, Float[Array, ""]]:
        return self.base.diagnostics(state.base)

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        return dataclasses.replace(self, base=self.base.for_tasks(tasks))
