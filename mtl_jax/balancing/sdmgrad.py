"""SDMGrad: the short combination of the gradients, kept near a direction of one's own."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, TaskLike, num_active, only_active, register
from mtl_jax.balancing.mixture import MixtureState, cross_gramian, equal_mixture, largest_products, mixed, shares_of
from mtl_jax.balancing.options import PerTask, by_position, checked, checked_count, vector
from mtl_jax.balancing.solvers import simplex_projection

# Where the diagonal of A is this much smaller than A, it tells no scale of the gradients.
NO_SCALE = 1e-12


def sdmgrad(
    *,
    lambda_: float = 0.3,
    inner_lr: float = 10.0,
    momentum: float = 0.5,
    num_iterations: int = 20,
    preference: PerTask | None = None,
) -> Balancer:
    r"""Direction-oriented multi-objective descent. The weights of a step descend
    :math:`\tfrac12 \lVert J^\top (w + \lambda \tilde w) \rVert^2`, whose gradient comes from two independent batches
    a and b, and act on a third one, c:

    .. math::
        \hat A = J_a J_b^\top \Big/ \Big( \operatorname{mean}_i \sqrt{\max(A_{ii}, 0)} \Big)^2
        \qquad v \leftarrow \mu\, v + \hat A\, (w + \lambda \tilde w)
        \qquad w \leftarrow \Pi_\Delta (w - \eta\, v)

    for ``num_iterations`` from v = 0 and the w of the previous step, and then

    .. math:: d = J_c^\top \frac{w + \lambda \tilde w}{1 + \lambda}

    Args:
      lambda_: :math:`\lambda \ge 0`, the pull to the preferred direction; 0 is the shortest combination.
      inner_lr: :math:`\eta \ge 0`.
      momentum: :math:`\mu` in [0, 1].
      num_iterations: Inner steps, >= 0; 0 keeps the weights of the start, 1/T.
      preference: :math:`\tilde w \ge 0` up to a factor, one per task or by task name; None is 1/T.

    Returns:
      A balancer that needs the Jacobians of three batches, [3, T, ...]; its state is w.

    Raises:
      ConfigError: An option is out of its range; by ``for_tasks``, ``init`` or the first step, the number or names of
        the preferences are not those of the tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, sdmgrad
      >>> jacobian = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> balancer = sdmgrad(inner_lr=0.5)
      >>> direction, _ = aggregate(balancer, jnp.stack([jacobian] * 3), balancer.init(2))
      >>> print(direction.round(2))
      [0.88 0.35]

    Edge cases:
      ================================== ==================================================
      one task                           its own gradient
      no gradient in a and b             as inactive
      no positive :math:`A_{ii}`         no scale: w stays
      an inactive task                   keeps its w; the others share what is left
      ================================== ==================================================

    References:
      Xiao, Ban, Ji, *Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms*, NeurIPS
      2023, `arXiv:2305.18409 <https://arxiv.org/abs/2305.18409>`_. Scale and momentum are those of its code. The
      weights do not change with the scale of the gradients.
    """
    lambda_ = checked(lambda_, "sdmgrad(lambda_)", at_least=0.0)
    inner_lr = checked(inner_lr, "sdmgrad(inner_lr)", at_least=0.0)
    momentum = checked(momentum, "sdmgrad(momentum)", at_least=0.0, at_most=1.0)
    preference = 1.0 if preference is None else checked(preference, "sdmgrad(preference)", at_least=0.0)
    num_iterations = checked_count(num_iterations, "sdmgrad(num_iterations)", at_least=0)
    return SdmGrad(lambda_, inner_lr, momentum, preference, num_iterations)


@register
@dataclasses.dataclass(frozen=True)
class SdmGrad(Balancer):
    lambda_: Any
    inner_lr: Any
    momentum: Any
    preference: Any
    num_iterations: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "gramian"
    num_batches: ClassVar = 3
    scaling: ClassVar = "mean"

    def init(self, num_tasks: int, params: PyTree | None = None) -> MixtureState:
        vector(self.preference, num_tasks, "sdmgrad(preference)")
        return MixtureState(equal_mixture(num_tasks))

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        preference = by_position(self.preference, [task.name for task in tasks], "sdmgrad(preference)")
        return dataclasses.replace(super().for_tasks(tasks), preference=preference)

    def products(self, jacobian: PyTree[Float[Array, "3 task ..."]]) -> Float[Array, "task task"]:
        return cross_gramian(jacobian)

    def squared_norms(self, products: Float[Array, "task task"]) -> Float[Array, " task"]:
        return largest_products(products)

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: MixtureState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], MixtureState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        preferred = shares_of(vector(self.preference, losses.shape[0], "sdmgrad(preference)"), active)
        shares = shares_of(state.mixture, active)
        options = (self.lambda_ * preferred, self.inner_lr, self.momentum, self.num_iterations)
        moved = descend(only_active(gramian, active), shares, active, *options)
        weights = (moved + self.lambda_ * preferred) / (1 + self.lambda_)
        return weights.astype(losses.dtype), MixtureState(mixed(state.mixture, moved, active))


# Jitted, because a loop outside of jit is compiled anew at every call.
@functools.partial(jax.jit, static_argnums=6)
def descend(
    products: Float[Array, "task task"],
    start: Float[Array, " task"],
    active: Bool[Array, " task"],
    pull: Float[Array, " task"],
    inner_lr: float | Float[Array, ""],
    momentum: float | Float[Array, ""],
    num_iterations: int,
) -> Float[Array, " task"]:
    """Descent with momentum on the simplex; the start where the products have no scale."""
    roots = jnp.sqrt(jnp.maximum(jnp.diagonal(products), 0))
    scale = (jnp.sum(roots) / num_active(active, start.shape[0])) ** 2
    known = scale > NO_SCALE * jnp.max(jnp.abs(products))
    matrix = jnp.where(known, products / jnp.where(known, scale, 1), 0)

    def step(_, carry):
        point, velocity = carry
        slope = jnp.matmul(matrix, point + pull, precision=jax.lax.Precision.HIGHEST)
        velocity = (momentum * velocity + slope).astype(velocity.dtype)
        return simplex_projection(point - inner_lr * velocity, 1.0, active).astype(point.dtype), velocity

    moved, _ = jax.lax.fori_loop(0, num_iterations, step, (start, jnp.zeros_like(start)))
    return jnp.where(known, moved, start)
