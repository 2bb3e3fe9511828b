"""MoCo: weights from averaged gradients, so that the noise of a batch does not bias them."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, only_active_rows, register
from mtl_jax.balancing.mixture import equal_mixture, mixed, shares_of
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.rows import combine_rows, follow, gramian, squared_row_norms, zeros_per_task
from mtl_jax.balancing.solvers import simplex_projection
from mtl_jax.errors import ConfigError

TRACKINGS = ("raw", "norm_loss")
SIMPLEXES = ("project", "softmax")


def moco(
    *,
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
    tracking: str = "raw",
    simplex: str = "project",
) -> Balancer:
    r"""Multi-objective gradients with correction. Every task's gradient is tracked over the steps; the weights and the
    direction come from what is tracked:

    .. math::
        y_i \leftarrow y_i - \beta_t (y_i - g_i)
        \qquad \lambda \leftarrow \Pi_\Delta \big( \lambda - \gamma_t (y y^\top + \rho I)\, \lambda \big)
        \qquad d = \sum_i \lambda_i y_i

    with :math:`\beta_t = \beta / t^{\sigma_\beta}` and :math:`\gamma_t = \gamma / t^{\sigma_\gamma}` in step t = 1, 2,
    ..., from y = 0 and equal weights, and :math:`\Pi_\Delta` the projection on the simplex.

    Args:
      beta: :math:`\beta` in [0, 1], how fast the gradients are followed.
      beta_sigma: :math:`\sigma_\beta \ge 0`, how fast that falls.
      gamma: :math:`\gamma \ge 0`, the step of the weights, in units of an inverse squared gradient; 0 keeps the mean.
      gamma_sigma: :math:`\sigma_\gamma \ge 0`, how fast that falls.
      rho: :math:`\rho \ge 0`, what pulls the weights together.
      tracking: What is tracked: ``raw``, :math:`g_i`, or ``norm_loss``, :math:`g_i L_i / \lVert g_i \rVert`.
      simplex: ``project``, or ``softmax`` in its place.

    Returns:
      A balancer that needs the Jacobian, with ``norm_loss`` also the losses; its state is y, one entry for each task
      and parameter, :math:`\lambda` and t.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, moco
      >>> balancer = moco()
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2, jnp.zeros(3)))
      >>> print(direction, state.mixture)
      [-0.125  0.5    0.5  ] [0.625 0.375]

    Edge cases:
      =============== ================================================================
      the first step  :math:`\beta` times as long as its gradients: y starts at 0
      an inactive task keeps its y and weight; the others share what is left
      =============== ================================================================

    References:
      Fernando, Shen, Liu, Chaudhury, Murugesan, Chen, *Mitigating Gradient Bias in Multi-objective Learning: A Provably
      Convergent Approach*, ICLR 2023, `arXiv:2210.12624 <https://arxiv.org/abs/2210.12624>`_. ``raw`` and ``project``
      are the paper's. Its released code has ``norm_loss`` and ``softmax``; the softmax of weights that are on the
      simplex already flattens them towards 1/T in every step. Not scale-free: :math:`\gamma` has to fit the lengths of
      the gradients.
    """
    for option, value, choices in (("tracking", tracking, TRACKINGS), ("simplex", simplex, SIMPLEXES)):
        if value not in choices:
            raise ConfigError(f"moco({option}) is {value!r}; expected one of {list(choices)}. Set one of them")
    return MoCo(
        checked(beta, "moco(beta)", at_least=0.0, at_most=1.0),
        checked(beta_sigma, "moco(beta_sigma)", at_least=0.0),
        checked(gamma, "moco(gamma)", at_least=0.0),
        checked(gamma_sigma, "moco(gamma_sigma)", at_least=0.0),
        checked(rho, "moco(rho)", at_least=0.0),
        tracking,
        simplex,
    )


class MoCoState(NamedTuple):
    """y, the weights of all tasks, on the simplex, and the number of steps."""

    tracked: PyTree[Float[Array, "task ..."]]
    mixture: Float[Array, " task"]
    steps: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class MoCo(Balancer):
    beta: Any
    beta_sigma: Any
    gamma: Any
    gamma_sigma: Any
    rho: Any
    tracking: str = dataclasses.field(metadata={"static": True})
    simplex: str = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "jacobian"
    homogeneity: ClassVar = None
    has_parameter_state: ClassVar = True
    scaling: ClassVar = "mean"

    @property
    def reads_losses(self) -> bool:
        return self.tracking == "norm_loss"

    def init(self, num_tasks: int, params: PyTree | None = None) -> MoCoState:
        mixture = equal_mixture(num_tasks)
        return MoCoState(zeros_per_task(params, num_tasks), mixture, jnp.zeros((), jnp.int32))

    def head_weights(
        self, weights: Float[Array, " task"], losses: Float[Array, " task"], state: MoCoState
    ) -> Float[Array, " task"]:
        return state.mixture

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: MoCoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], MoCoState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        steps = state.steps + 1
        time = steps.astype(losses.dtype)
        beta, gamma = self.beta / time**self.beta_sigma, self.gamma / time**self.gamma_sigma
        tracked = follow(state.tracked, jacobian, beta * self._factors(jacobian, losses), 1 - beta, active)

        present = only_active_rows(tracked, active)
        shares = shares_of(state.mixture, active)
        slope = jnp.matmul(gramian(present), shares, precision=jax.lax.Precision.HIGHEST) + self.rho * shares
        point = shares - gamma * slope
        if self.simplex == "softmax":
            moved = jax.nn.softmax(point, where=active)
        else:
            moved = simplex_projection(point, 1.0, active)
        direction = combine_rows(jnp.where(active, moved, 0), present)
        direction = jax.tree.map(lambda leaf, rows: leaf.astype(rows.dtype), direction, jacobian)
        return direction, MoCoState(tracked, mixed(state.mixture, moved, active), steps)

    def _factors(self, jacobian, losses):
        if self.tracking == "raw":
            return jnp.ones_like(losses)
        norms = jnp.sqrt(squared_row_norms(jacobian))
        return losses / jnp.where(norms > 0, norms, 1)
