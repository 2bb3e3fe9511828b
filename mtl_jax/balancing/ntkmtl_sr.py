"""NTKMTL-SR: tangent kernels of several micro-batches, from gradients at the representation."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, only_active_rows
from mtl_jax.balancing.ntkmtl import kernel_weights
from mtl_jax.balancing.options import checked, checked_count
from mtl_jax.errors import ConfigError


def ntkmtl_sr(*, exponent: float = 0.5, num_micro: int = 4) -> Balancer:
    r"""Balanced convergence by the neural tangent kernel, at the shared representation. The rows of the batch are cut
    into n micro-batches; their gradients at the representation are the rows of :math:`Z_i`, and the fastest mode of a
    task, the largest eigenvalue of its kernel, decides:

    .. math::
        w_i = \Big( \frac{\sum_j \lambda_j}{\lambda_i} \Big)^{\kappa}
        \qquad \lambda_i = \lambda_{\max}(Z_i Z_i^\top)

    Args:
      exponent: :math:`\kappa`; 0 is the sum of the gradients.
      num_micro: n >= 1; the number of rows has to be a multiple of it. With 1 it is ``ntkmtl`` at the representation.

    Returns:
      A balancer that needs, as its Gramian, the n x n kernel of each task, f[T, n, n], and has no state. Leaves of the
      Jacobian are [T, B, ...], with the rows of the batch before the units: it works at the representation only.

    Raises:
      ConfigError: An option is out of its range; in the first step, the rows are no multiple of ``num_micro``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, ntkmtl_sr
      >>> balancer = ntkmtl_sr(num_micro=2)
      >>> jacobian = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]])  # two tasks, rows and units
      >>> direction, _ = aggregate(balancer, jacobian, balancer.init(2))
      >>> print(direction.round(2))
      [[5.27 1.05]
       [1.05 5.27]]

    Edge cases:
      ================================ =====================================================
      one task                         its own gradient
      a micro-batch without labels     a row of zeros, which changes no largest eigenvalue
      a task without a gradient        left out of the sum, contributes zero
      ================================ =====================================================

    References:
      Qin, Wang, Liao, Yan, *Mitigating Task Imbalance from Neural Tangent Kernel Perspective*, NeurIPS 2025,
      `arXiv:2510.18258 <https://arxiv.org/abs/2510.18258>`_. Without the clipping of the norm and the factor T of its
      published code. The rows of one place in all micro-batches are columns of :math:`Z_i` in common.
    """
    return NtkMtlSr(
        checked(exponent, "ntkmtl_sr(exponent)"), checked_count(num_micro, "ntkmtl_sr(num_micro)", at_least=1)
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NtkMtlSr(Balancer):
    exponent: Any
    num_micro: int = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "gramian"
    scopes: ClassVar = ("representation",)

    def products(self, jacobian: PyTree[Float[Array, "task row ..."]]) -> Float[Array, "task micro micro"]:
        return sum(map(self._kernels, jax.tree.leaves(jacobian)))

    def squared_norms(self, products: Float[Array, "task micro micro"]) -> Float[Array, " task"]:
        return jnp.trace(products, axis1=1, axis2=2)

    def weigh(
        self,
        gramian: Float[Array, "task micro micro"],
        losses: Float[Array, " task"],
        state: NoState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState]:
        kernels = only_active_rows(gramian, active)
        traces = self.squared_norms(kernels)
        # Each kernel is scaled on its own: an eigenvalue keeps its digits however long the others are.
        scale = jnp.where(traces > 0, traces, 1)
        largest = traces * jnp.linalg.eigvalsh(kernels / scale[:, None, None])[:, -1]
        return kernel_weights(jnp.where(traces > 0, largest, 0), self.exponent), state

    def _kernels(self, leaf):
        num_tasks, num_rows = leaf.shape[:2] if leaf.ndim > 1 else (leaf.shape[0], 1)
        if num_rows % self.num_micro:
            expectation = f"expected a multiple of num_micro={self.num_micro}"
            raise ConfigError(
                f"balancer 'ntkmtl_sr' got {num_rows} rows of a batch; {expectation}. Change the batch size or num_micro"
            )
        parts = leaf.reshape(num_tasks, self.num_micro, -1)
        highest, dtype = jax.lax.Precision.HIGHEST, jnp.promote_types(leaf.dtype, jnp.float32)
        return jnp.matmul(parts, parts.transpose(0, 2, 1), precision=highest, preferred_element_type=dtype)
