"""LDC-MTL: weights from a learned router that also keeps neighbouring losses close."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, register
from mtl_jax.balancing.cosmos import count_negative
from mtl_jax.balancing.geometric import positive_losses
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import checked
from mtl_jax.errors import ConfigError

NORMALIZATIONS = ("init", "none", "log")
# Neighbours within so many roundings of each other are equal. Under ``init`` all tasks start equal, and
# their first weights should not depend on how a compiler rounds.
TIE = 16


def ldc_mtl(*, lambda_: float = 0.05, normalize: str = "init", weight_lr: float = 1e-3) -> Balancer:
    r"""Loss discrepancy control: a weighted sum of normalised losses and the differences of neighbours in it.

    .. math::
        O = \frac{\sum_i v_i \tilde L_i}{s} + \lambda \sum_{i < T_a} \lvert v_i \tilde L_i - v_{i+1} \tilde L_{i+1} \rvert,
        \quad v = \sigma(\omega), \quad s = \sum_i v_i \text{ held constant}

    .. math::
        w_i = \frac{\partial \tilde L_i}{\partial L_i}\, v_i \Bigl(\frac1s + \lambda (\sigma_i - \sigma_{i-1})\Bigr)
        \qquad \frac{\partial O}{\partial \omega_i}
            = \tilde L_i\, v_i (1 - v_i) \Bigl(\frac1s + \lambda (\sigma_i - \sigma_{i-1})\Bigr)

    with :math:`\sigma_i = \mathrm{sign}(v_i \tilde L_i - v_{i+1} \tilde L_{i+1})` and 0 at both ends. From
    :math:`\omega = 1`; the weights of a step are read before its update of :math:`\omega`, an Adam step. Neighbours are
    those in the order of the tasks, which matters; weights are negative where :math:`\lambda` is larger than
    :math:`1 / 2s`, and are used as they are.

    Args:
      lambda_: :math:`\lambda \ge 0`; the authors use 0.01 to 0.1.
      normalize: :math:`\tilde L`: ``init`` is :math:`L_i \min_j L_j^0 / L_i^0` with the first losses :math:`L^0`,
        ``log`` is :math:`\log (L_i / L_i^0)`, ``none`` is :math:`L_i`.
      weight_lr: Learning rate of :math:`\omega`, >= 0.

    Returns:
      A balancer that needs one backward pass and the losses; its state is :math:`\omega` with its Adam, :math:`L^0`, and
      a diagnostic, ``negative_weights``.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, ldc_mtl
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), ldc_mtl(normalize="none")
      >>> direction, state = aggregate(balancer, jacobian, balancer.init(2), losses=[0.5, 2.0])
      >>> print(direction.round(4), state.logits.value)
      [1.3655 1.     1.    ] [0.999 0.999]

    Edge cases:
      ======================================== =====================================================
      one task                                 its own gradient, times :math:`\partial\tilde L / \partial L`
      equal neighbours, up to rounding         no pull: :math:`\sigma_i = 0`, as in the first step of ``init``
      an inactive task                         its neighbours are each other's; its :math:`\omega` stays
      a first loss of zero                     :math:`L^0` is the first that is not; until then L is as it is
      ``init`` with a negative first loss      a non-finite step: the weights are NaN
      ``log`` with a negative loss             the same; a loss of zero stands for 1e-12 of the largest
      ======================================== =====================================================

    References:
      Xiao, Dong, Zou, Ji, *LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control*, 2025,
      `arXiv:2502.08585 <https://arxiv.org/abs/2502.08585>`_. The first losses are taken once; the authors' program for
      molecules takes them anew each epoch.
    """
    if normalize not in NORMALIZATIONS:
        expectation = f"expected one of {list(NORMALIZATIONS)}"
        raise ConfigError(f"ldc_mtl(normalize) is '{normalize}'; {expectation}. Set one of them")
    lambda_ = checked(lambda_, "ldc_mtl(lambda_)", at_least=0.0)
    return LdcMtl(lambda_, normalize, checked(weight_lr, "ldc_mtl(weight_lr)", at_least=0.0))


class LdcMtlState(NamedTuple):
    """The logits, the first losses (0 where unknown), and how many weights of the latest call were negative."""

    logits: Learnable
    initial_losses: Float[Array, " task"]
    negative_weights: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class LdcMtl(Balancer):
    lambda_: Any
    normalize: str = dataclasses.field(metadata={"static": True})
    weight_lr: Any

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> LdcMtlState:
        return LdcMtlState(learnable(jnp.ones(num_tasks)), jnp.zeros(num_tasks), jnp.zeros((), jnp.int32))

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: LdcMtlState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], LdcMtlState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        new = active & (state.initial_losses == 0)
        initial = jnp.where(new, losses.astype(state.initial_losses.dtype), state.initial_losses)
        normalised, slopes = self._normalised(losses, initial.astype(losses.dtype), active)
        logits = state.logits.value.astype(losses.dtype)
        router = jax.nn.sigmoid(logits)
        # v / s as a softmax of logarithms: the logits may drift far down together, where v alone vanishes.
        shares = jax.nn.softmax(jax.nn.log_sigmoid(logits), where=active)
        pulls = discrepancy_slopes(router * normalised, active)
        effective = shares + self.lambda_ * router * pulls
        weights = jnp.where(active, slopes * effective, 0).astype(losses.dtype)
        gradient = normalised * effective * jax.nn.sigmoid(-logits)
        moved = adam_step(state.logits, gradient, self.weight_lr, active=active)
        return weights, LdcMtlState(moved, initial, count_negative(weights))

    def diagnostics(self, state: LdcMtlState) -> dict[str, Array]:
        return {"negative_weights": state.negative_weights}

    def _normalised(self, losses, initial, active):
        """The normalised losses, and their derivatives by the losses."""
        if self.normalize == "none":
            return losses, jnp.ones_like(losses)
        known = active & (initial != 0)
        if self.normalize == "log":
            positive = positive_losses(losses, active)
            return jnp.log(positive) - jnp.log(jnp.where(known, initial, positive)), 1 / positive
        initial = jnp.where(initial < 0, jnp.nan, initial)
        smallest = jnp.min(initial, where=known, initial=jnp.inf)
        slopes = jnp.where(known, smallest / jnp.where(known, initial, 1), 1)
        return slopes * losses, slopes


def discrepancy_slopes(values: Float[Array, " task"], active: Bool[Array, " task"]) -> Float[Array, " task"]:
    """Derivative of the summed absolute differences of neighbouring active tasks by the value of each."""
    order = jnp.argsort(~active, stable=True)  # the active ones, in their order
    present = active[order]
    left, right = values[order][:-1], values[order][1:]
    rounding = TIE * jnp.finfo(values.dtype).eps * jnp.maximum(jnp.abs(left), jnp.abs(right))
    signs = jnp.where(present[1:] & ~(jnp.abs(left - right) <= rounding), jnp.sign(left - right), 0)
    slopes = jnp.pad(signs, (0, 1)) - jnp.pad(signs, (1, 0))
    return jnp.zeros_like(values).at[order].set(slopes)
