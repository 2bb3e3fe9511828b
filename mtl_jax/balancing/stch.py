"""Smooth Tchebycheff scalarization: a soft maximum over the losses."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, NoState, TaskLike, num_active, register
from mtl_jax.balancing.cosmos import preferences, preferences_by_position
from mtl_jax.balancing.geometric import positive_losses
from mtl_jax.balancing.options import PerTask, by_position, checked, vector
from mtl_jax.balancing.period import Means, Period, add_losses, checked_period, count_call, no_means
from mtl_jax.errors import ConfigError

TRANSFORMS = ("none", "log_nadir")
MIN_MU = 1e-30


def stch(
    *,
    mu: float = 1.0,
    preference: PerTask | None = None,
    reference: PerTask = 0.0,
    transform: str = "none",
    warmup: int = 4,
    period: Period = "epoch",
) -> Balancer:
    r"""The largest weighted distance to the reference point z, smoothed:

    .. math::
        O = \mu \log \sum_i e^{y_i / \mu}, \quad y = \lambda \circ (L - z)
        \qquad w = \lambda \circ \mathrm{softmax}(y / \mu)

    With ``transform="log_nadir"`` it is, instead, a soft maximum over how far each loss has fallen from its size
    :math:`\nu` after a warm-up, which has :math:`O = \sum_i \log L_i` and takes :math:`\nu` as the mean losses of its
    last period:

    .. math::
        O = T_a\, \mu \log \sum_i (L_i / \nu_i)^{1 / \mu}
        \qquad w_i = T_a\, \mathrm{softmax}(\log(L / \nu) / \mu)_i / L_i

    with :math:`T_a` the number of tasks that have labels in the batch.

    Args:
      mu: :math:`\mu`, >= 1e-30: towards 0 all weight goes to the largest term, towards infinity it is equal.
      preference: :math:`\lambda \ge 0`, one number, one per task, or by task name; None is :math:`1/T_a`. Only without
        a transform.
      reference: :math:`z`, the losses at best; given like ``preference``, and only without a transform.
      transform: ``none`` or ``log_nadir``.
      warmup: Periods of warm-up, >= 1; only read with ``log_nadir``, like ``period``.
      period: ``epoch``, or a number of steps.

    Returns:
      A balancer that needs one backward pass and the losses; with ``log_nadir`` its state is the mean losses of the
      period under way, :math:`\nu`, and two counters.

    Raises:
      ConfigError: An option is out of its range, does not fit the tasks, or does not go with ``log_nadir``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, stch
      >>> jacobian, balancer = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), stch(mu=0.1)
      >>> direction, _ = aggregate(balancer, jacobian, balancer.init(2), losses=[0.5, 2.0])
      >>> print(direction.round(4))
      [2.9972 0.5    0.5   ]

    Edge cases:
      ========================================= ============================================================
      losses of any size, any :math:`\mu`       finite: sums are taken around the largest term
      ``log_nadir``, a loss of zero             stands for 1e-12 of the largest one
      ``log_nadir``, a negative loss            a non-finite step: the weights are NaN
      no labels in the last period of warm-up   :math:`\nu_i` is the mean of the latest period that has some,
                                                else the first loss after it
      ========================================= ============================================================

    References:
      Lin, Zhang, Yang, Liu, Wang, Zhang, *Smooth Tchebycheff Scalarization for Multi-Objective Optimization*,
      ICML 2024, `arXiv:2402.19078 <https://arxiv.org/abs/2402.19078>`_. The default is the paper's definition;
      ``log_nadir`` is what the authors train their multi-task networks with.
    """
    if transform not in TRANSFORMS:
        raise ConfigError(f"stch(transform) is '{transform}'; expected one of {list(TRANSFORMS)}. Set one of them")
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 1:
        expectation = "expected a whole number, at least 1"
        raise ConfigError(f"stch(warmup) is {warmup!r}; {expectation}. The nadir is measured in its last period")
    no_reference = isinstance(reference, int | float) and reference == 0
    if transform == "log_nadir" and (preference is not None or not no_reference):
        expectation = "expected neither with transform 'log_nadir', which measures losses by their own size"
        raise ConfigError(
            f"stch(preference, reference) are {preference}, {reference}; {expectation}. Leave them out, or set "
            f"transform to 'none'"
        )
    preference = preference if preference is None else checked(preference, "stch(preference)", at_least=0.0)
    reference = checked(reference, "stch(reference)")
    mu = checked(mu, "stch(mu)", at_least=MIN_MU)
    return Stch(mu, preference, reference, transform, warmup, checked_period(period, "stch(period)"))


class StchState(NamedTuple):
    """Mean losses of the period under way, the nadir (0 where unknown), ended periods, calls in this one."""

    means: Means
    nadir: Float[Array, " task"]
    periods: Int[Array, ""]
    calls: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class Stch(Balancer):
    mu: Any
    preference: Any
    reference: Any
    transform: str = dataclasses.field(metadata={"static": True})
    warmup: int = dataclasses.field(metadata={"static": True})
    period: Period = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "losses"
    reads_losses: ClassVar = True
    weighted_heads: ClassVar = True

    @property
    def by_epoch(self) -> bool:
        return self.transform == "log_nadir" and self.period == "epoch"

    def init(self, num_tasks: int, params: PyTree | None = None) -> NoState | StchState:
        preferences(self.preference, num_tasks, None, "stch(preference)")
        vector(self.reference, num_tasks, "stch(reference)")
        if self.transform == "none":
            return NoState()
        counters = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return StchState(no_means(num_tasks), jnp.zeros(num_tasks), *counters)

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        preference = preferences_by_position(self.preference, tasks, "stch(preference)")
        reference = by_position(self.reference, [task.name for task in tasks], "stch(reference)")
        return dataclasses.replace(super().for_tasks(tasks), preference=preference, reference=reference)

    def weigh(
        self,
        gramian: Float[Array, "task task"] | None,
        losses: Float[Array, " task"],
        state: NoState | StchState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], NoState | StchState]:
        if self.transform == "log_nadir":
            return self._weigh_by_nadir(losses, state, active)
        num_tasks = losses.shape[0]
        preference = preferences(self.preference, num_tasks, active, "stch(preference)").astype(losses.dtype)
        reference = vector(self.reference, num_tasks, "stch(reference)").astype(losses.dtype)
        return preference * soft_largest(preference * (losses - reference), self.mu, active), state

    def end_epoch(self, state: NoState | StchState) -> NoState | StchState:
        return self._next_period(state) if self.by_epoch else state

    def _weigh_by_nadir(self, losses, state, active):
        positive = positive_losses(losses, active)
        warm = state.periods >= self.warmup
        present = jnp.ones(losses.shape, bool) if active is None else active
        nadir = jnp.where(warm & present & (state.nadir == 0), positive.astype(state.nadir.dtype), state.nadir)
        logs = jnp.log(positive) - jnp.log(jnp.where(warm & present, nadir, 1)).astype(losses.dtype)
        factors = soft_largest(logs, self.mu, active) * num_active(active, losses.shape[0])
        weights = jnp.where(present, jnp.where(warm, factors, 1) / positive, 0).astype(losses.dtype)
        state = state._replace(means=add_losses(state.means, losses, active), nadir=nadir)
        return weights, count_call(state, self.period, self._next_period)

    def _next_period(self, state):
        measured = (state.means.count > 0) & (state.periods < self.warmup)
        return state._replace(
            means=jax.tree.map(jnp.zeros_like, state.means),
            nadir=jnp.where(measured, state.means.value, state.nadir),
            periods=jnp.minimum(state.periods + 1, self.warmup),
        )


def soft_largest(
    values: Float[Array, " task"], mu: float | Float[Array, ""], active: Bool[Array, " task"] | None
) -> Float[Array, " task"]:
    """softmax(values / mu) over the active tasks; the quotients themselves may leave the range of the type."""
    present = jnp.ones(values.shape, bool) if active is None else active
    values = jnp.where(present, values, -jnp.inf)
    top = jnp.argmax(values)
    # Its own difference is 0 by decree: compilers fuse the product in ``values`` with the subtraction, and their rest
    # of one rounding would be divided by mu.
    gaps = jnp.where(jnp.arange(values.size) == top, 0, jnp.minimum(values - values[top], 0) / mu)
    shares = jnp.where(present, jnp.exp(gaps), 0)
    return (shares / jnp.sum(shares)).astype(values.dtype)
