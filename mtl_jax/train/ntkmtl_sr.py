"""NTKMTL-SR: the tangent kernel of a task from gradients of parts of the batch at the representation."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import register
from mtl_jax.balancing.ntkmtl import kernel_weights
from mtl_jax.balancing.options import checked, checked_count
from mtl_jax.train.cut_model import CutModel, parts_side_by_side
from mtl_jax.train.gradients import Balanced, BalancingOptions, TaskGradients, by_weights


def ntkmtl_sr(*, exponent: float = 0.5, num_micro: int = 4) -> Balancer:
    r"""Balanced convergence by the neural tangent kernel, at the shared representation z. The batch is cut in n parts, and
    the fastest mode of a task is the largest eigenvalue of its n x n kernel:

    .. math::
        w_i = \Bigl( \frac{\sum_j \lambda_j}{\lambda_i} \Bigr)^{\kappa}
        \qquad \lambda_i = \lambda_{\max}(Z_i Z_i^\top)
        \qquad (Z_i)_m = \nabla_z L_i^{(m)}

    The gradients of two parts have no row of z in common, so the kernel is diagonal, and :math:`\lambda_i` the largest
    squared length. :math:`L_i^{(m)}` estimates the loss of the batch from the labels of part m.

    Args:
      exponent: :math:`\kappa`; 0 is the sum of the gradients.
      num_micro: n >= 1; 1 is ``ntkmtl`` at the scope ``representation``.

    Returns:
      A balancer for the train step, at the scope ``representation``: one pass through the encoder, and T through heads. Its
      state is :math:`\lambda` of the latest step.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> from mtl_jax.train import BalancingOptions, ntkmtl_sr
      >>> options = BalancingOptions(scope="representation")
      >>> balancer = ntkmtl_sr(num_micro=8)  # for mtl_jax.train.fit(model, data, balancer=balancer, options=options)
      >>> balancer.num_parts
      8

    Edge cases:
      ============================== ================================================
      one task                       its own gradient
      a part without labels          does not count for the task
      a task without a gradient      left out of the sum, contributes zero
      ============================== ================================================

    References:
      Qin, Wang, Liao, Yan, *Mitigating Task Imbalance from Neural Tangent Kernel Perspective*, NeurIPS 2025,
      `arXiv:2510.18258 <https://arxiv.org/abs/2510.18258>`_. Without the clipping of the norm and the factor T of its
      published code.
    """
    exponent = checked(exponent, "ntkmtl_sr(exponent)")
    return NtkMtlSr(exponent, checked_count(num_micro, "ntkmtl_sr(num_micro)", at_least=1))


class NtkMtlSrState(NamedTuple):
    """The largest eigenvalue of each kernel."""

    kernels: Float[Array, " task"]


@register
@dataclasses.dataclass(frozen=True)
class NtkMtlSr(Balancer):
    exponent: Any
    num_micro: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "gramian"
    scopes: ClassVar = ("representation",)
    owns_step: ClassVar = True

    @property
    def num_parts(self) -> int:
        return self.num_micro

    def init(self, num_tasks: int, params: PyTree | None = None) -> NtkMtlSrState:
        return NtkMtlSrState(jnp.zeros(num_tasks))

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: NtkMtlSrState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NtkMtlSrState]:
        kernels = state.kernels if active is None else jnp.where(active, state.kernels, 0)
        return kernel_weights(kernels.astype(losses.dtype), self.exponent), state

    def gradients(
        self,
        model: CutModel,
        state: NtkMtlSrState,
        key: PRNGKeyArray,
        options: BalancingOptions,
        learning_rate: Callable[[str], Any] | None = None,
    ) -> Balanced:
        side_by_side = parts_side_by_side(model)
        labels, own, jacobian, pull = side_by_side.at_cut(side_by_side.part)
        labels, own, squares, products = model.total(
            (labels, own, squares_by_part(jacobian.rows), self.products(jacobian.rows))
        )
        losses = labels._replace(numerator=labels.numerator.sum(axis=1), denominator=labels.denominator.sum(axis=1))
        observed = labels.denominator > 0
        scale = losses.denominator[:, None] / jnp.where(observed, labels.denominator, 1)
        kernels = jnp.max(jnp.where(observed, scale**2 * squares, 0), axis=1)
        state = NtkMtlSrState(kernels.astype(state.kernels.dtype))
        return by_weights(model, TaskGradients(losses, own, jacobian, pull), products, self, state, None, options)


def squares_by_part(jacobian: PyTree[Float[Array, "task part ..."]]) -> Float[Array, "task part"]:
    """Squared lengths of the rows of each part."""
    leaves = jax.tree.leaves(jacobian)
    return sum(jnp.sum(jnp.square(leaf.astype(float)), axis=tuple(range(2, leaf.ndim))) for leaf in leaves)
