"""FORUM: descent on held-out losses of all tasks, without leaving the path along which the training loss falls."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing import Balancer, TaskLike
from mtl_jax.balancing.base import register, weigh
from mtl_jax.balancing.learnable import Learnable, adam_step, learnable
from mtl_jax.balancing.options import checked, checked_count
from mtl_jax.errors import ConfigError
from mtl_jax.train.cut_model import CutModel, union
from mtl_jax.train.gradients import Balanced, BalancingOptions

MAX_TASKS = 10
TOLERANCE = 1e-6


def forum(*, phi: float = 0.1, inner_lr: float = 0.1, inner_steps: int = 5, meta_lr: float = 1e-3) -> Balancer:
    r"""First-order multi-gradient bi-level optimization of the weights :math:`w = \mathrm{softmax}(\alpha)` and the network
    together. One half of the batch trains; how far its weighted loss f still is from where a few steps of SGD lead is a
    constraint on the descent of the losses of the other half:

    .. math::
        q(\alpha, \theta) = f(\alpha, \theta) - f(\alpha, \theta^T), \quad f = \sum_i w_i L_i^{train},
        \qquad
        F_t = \frac{\nabla_\theta L_t^{held}}{\lVert \nabla_\theta L_t^{held} \rVert},
        \qquad
        \pi_t = \varphi - \frac{\langle \nabla q, F_t \rangle}{\lVert \nabla q \rVert^2}

    .. math::
        \min_{\lambda \in \Delta,\ \nu}\ \Bigl\lVert \sum_t \lambda_t F_t + \nu \nabla q \Bigr\rVert^2
        - \nu \varphi \lVert \nabla q \rVert^2
        \quad \text{with} \quad \nu \ge \max\Bigl(\sum_t \lambda_t \pi_t,\ 0\Bigr)

    .. math::
        \tilde\lambda \leftarrow \tilde\lambda + \frac{\lambda - \tilde\lambda}{(e + 1)^{3/4}}
        \qquad
        d = \sum_t \tilde\lambda_t F_t + \max\Bigl(\sum_t \tilde\lambda_t \pi_t,\ 0\Bigr) \nabla q

    in epoch e = 0, 1, ...; d moves the whole network by the optimizer, and :math:`\alpha` by an Adam of its own.

    Args:
      phi: :math:`\varphi \ge 0`, how fast q has to fall.
      inner_lr: Learning rate of the steps to :math:`\theta^T`, >= 0.
      inner_steps: How many, at least 1.
      meta_lr: Learning rate of :math:`\alpha`, >= 0.

    Returns:
      A balancer for the train step, for at most 10 tasks: two halves of a batch, T + ``inner_steps`` + 2 backward passes
      and T forward derivatives. Its state is :math:`\alpha` with its Adam, :math:`\tilde\lambda`, and the epochs.

    Raises:
      ConfigError: An option is out of its range, there are too many tasks, or heads are to be ``plain``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.train import forum
      >>> balancer = forum(phi=0.5)  # for mtl_jax.train.fit(model, data, balancer=balancer)
      >>> print(balancer.weigh(None, jnp.ones(4), balancer.init(4), None)[0])
      [0.25 0.25 0.25 0.25]

    Edge cases:
      ============================================== =====================================================
      no training loss left to fall, q = 0           ``mgda`` on unit gradients of the held-out half
      a task without labels in the training half     weight 0, its :math:`\alpha` stays
      a task without labels in the held-out half     no :math:`F_t`; its :math:`\tilde\lambda` stays
      ============================================== =====================================================

    References:
      Ye, Lin, Yue, Guo, Xiao, Zhang, *A First-Order Multi-Gradient Algorithm for Multi-Objective Bi-Level Optimization*,
      ECAI 2024, `arXiv:2401.09257 <https://arxiv.org/abs/2401.09257>`_. The best :math:`\nu` without its bound lies half a
      :math:`\varphi` below it, so the bound holds with equality; what is left is solved on every face of the simplex.
    """
    return Forum(
        checked(phi, "forum(phi)", at_least=0.0),
        checked(inner_lr, "forum(inner_lr)", at_least=0.0),
        checked_count(inner_steps, "forum(inner_steps)", at_least=1),
        checked(meta_lr, "forum(meta_lr)", at_least=0.0),
    )


class ForumState(NamedTuple):
    """The logits of the weights, the averaged mixture of the held-out losses, and the epochs that have ended."""

    logits: Learnable
    mixture: Float[Array, " task"]
    epochs: Int[Array, ""]


@register
@dataclasses.dataclass(frozen=True)
class Forum(Balancer):
    phi: Any
    inner_lr: Any
    inner_steps: int = dataclasses.field(metadata={"static": True})
    meta_lr: Any

    needs: ClassVar = "losses"
    num_batches: ClassVar = 2
    homogeneity: ClassVar = None
    owns_step: ClassVar = True
    weighted_heads: ClassVar = True

    @property
    def by_epoch(self) -> bool:
        return True

    def init(self, num_tasks: int, params: PyTree | None = None) -> ForumState:
        return ForumState(learnable(jnp.zeros(num_tasks)), jnp.zeros(num_tasks), jnp.zeros((), jnp.int32))

    def end_epoch(self, state: ForumState) -> ForumState:
        return state._replace(epochs=state.epochs + 1)

    def for_tasks(self, tasks: Sequence[TaskLike]) -> Balancer:
        if len(tasks) > MAX_TASKS:
            expectation = f"got {len(tasks)} tasks; expected at most {MAX_TASKS}"
            raise ConfigError(f"balancer 'Forum' {expectation}. Leave some out or choose another balancing")
        return super().for_tasks(tasks)

    def weigh(
        self,
        gramian: None,
        losses: Float[Array, " task"],
        state: ForumState,
        key: PRNGKeyArray | None,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], ForumState]:
        active = jnp.ones(losses.shape, bool) if active is None else active
        return jax.nn.softmax(state.logits.value.astype(losses.dtype), where=active), state

    def gradients(
        self,
        model: CutModel,
        state: ForumState,
        key: PRNGKeyArray,
        options: BalancingOptions,
        learning_rate: Callable[[str], Any] | None = None,
    ) -> Balanced:
        if not options.weighted_heads(self):
            expectation = "expected 'auto' or 'weighted'"
            raise ConfigError(
                f"balancing.head_gradient is 'plain'; {expectation}: forum moves the whole network along one direction"
            )
        train, held_out = model.batch(0), model.batch(1)
        losses = model.total(model.losses(*model.params, train))
        active = losses.denominator > 0
        weights, _, info = weigh(self, None, losses.loss, state, None, active)

        def slope(params):
            return model.total(jax.grad(lambda params: weights @ model.losses(*params, train).loss)(params))

        fall = slope(model.params)
        ahead, _ = jax.lax.scan(lambda params, _: (self._step(params, slope(params)), None),
                                self._step(model.params, fall), length=self.inner_steps - 1)  # fmt: skip
        left = losses.loss - model.total(model.losses(*ahead, train).loss)
        fall_of_logits = jnp.where(active, weights * (left - weights @ left), 0)

        def judged(params):
            losses = model.losses(*params, held_out)
            return losses.loss, losses.denominator

        _, pull, labels = jax.vjp(judged, model.params, has_aux=True)
        judges = model.total(labels) > 0  # of all devices
        _, push = jax.linearize(lambda params: judged(params)[0], model.params)

        def compare(one):
            gradient = model.total(pull(one)[0])
            return model.total(push(gradient)), _inner(gradient, fall)

        products, along = jax.lax.map(compare, jnp.eye(len(model.heads), dtype=losses.loss.dtype))
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(products), 0))
        present = judges & (norms > 0)
        inverse = jnp.where(present, 1 / jnp.where(norms > 0, norms, 1), 0)
        cosines, along = products * inverse[:, None] * inverse, along * inverse
        squared = _inner(fall, fall) + fall_of_logits @ fall_of_logits
        mixture = constrained_mixture(cosines, along, squared, self.phi, present)
        share = (state.epochs + 1.0) ** -0.75
        mixture = jnp.where(present, state.mixture + share * (mixture - state.mixture), state.mixture)
        used = jnp.where(present, mixture, 0)
        pressure = jnp.sum(used) * self.phi - used @ along / jnp.where(squared > 0, squared, 1)
        pressure = jnp.where(squared > 0, jnp.maximum(pressure, 0), 0)

        (judged_direction,) = pull((used * inverse).astype(losses.loss.dtype))
        below, own = jax.tree.map(lambda g, q: g + pressure * q, model.total(judged_direction), fall)
        moves = active & jnp.all(jnp.isfinite(used)) & jnp.isfinite(pressure)
        logits = adam_step(state.logits, pressure * fall_of_logits, self.meta_lr, active=moves)
        state = state._replace(logits=logits, mixture=mixture.astype(state.mixture.dtype))
        return Balanced(below | union(own), losses, weights, state, info | {"negative_weights": jnp.zeros(())})

    def _step(self, params: PyTree, gradient: PyTree) -> PyTree:
        return jax.tree.map(lambda value, g: value - self.inner_lr * g, params, gradient)


def constrained_mixture(
    products: Float[Array, "objective objective"],
    along: Float[Array, " objective"],
    squared: Float[Array, ""],
    phi: float | Float[Array, ""],
    present: Bool[Array, " objective"],
) -> Float[Array, " objective"]:
    """The best mixture lambda of unit gradients.

    The optimum is stationary on a face of the simplex, and on one side of where the constraint begins to act, or on the
    border: each of these is a linear system, and the best of those solutions that are mixtures is the answer.

    Args:
      products: Of the unit gradients.
      along: Their products with the gradient of q.
      squared: The squared length of the latter.
      phi: How fast q has to fall.
      present: Which gradients there are.
    """
    num_tasks = len(along)
    faces = jnp.array([face for face in itertools.product([False, True], repeat=num_tasks) if any(face)])
    slopes = along / jnp.where(squared > 0, squared, 1)
    steepest = jnp.maximum(jnp.max(jnp.abs(slopes)), jnp.finfo(slopes.dtype).tiny)
    eye = jnp.eye(num_tasks, dtype=products.dtype)
    ridge = 4 * num_tasks * jnp.finfo(products.dtype).eps * eye
    acting = 2 * (products - along[:, None] * slopes)

    def solve(face, quadratic, linear, border):
        row = jnp.where(border, slopes / steepest, 0)
        edges = jnp.stack([jnp.ones_like(along), row])
        upper = jnp.concatenate([quadratic + 2 * ridge, -edges.T], axis=1)
        upper = jnp.where(face[:, None], upper, jnp.pad(eye, ((0, 0), (0, 2))))
        lower = jnp.concatenate([jnp.where(face, edges, 0), jnp.diag(jnp.stack([0, 1.0 - border]))], axis=1)
        right = jnp.concatenate([jnp.where(face, -linear, 0), jnp.stack([1.0, jnp.where(border, phi / steepest, 0)])])
        mixture = jnp.linalg.solve(jnp.concatenate([upper, lower]), right.astype(products.dtype))[:num_tasks]
        # A system without a solution may still give numbers.
        fits = jnp.all(mixture >= -TOLERANCE) & (jnp.abs(jnp.sum(mixture) - 1) < 1e-3) & ~jnp.any(face & ~present)
        mixture = jnp.clip(jnp.where(jnp.isfinite(mixture), mixture, 0), 0)
        mixture = mixture / jnp.where(jnp.sum(mixture) > 0, jnp.sum(mixture), 1)
        return mixture, jnp.where(fits, value(mixture), jnp.inf)

    def value(mixture):
        pressure = jnp.maximum(phi - mixture @ slopes, 0)
        quadratic = jnp.einsum("t,ts,s->", mixture, products, mixture, precision="highest")
        return quadratic + 2 * pressure * (mixture @ along) + (pressure - phi) * pressure * squared

    ways = ((2 * products, jnp.zeros_like(along), 0.0), (acting, phi * along, 0.0), (2 * products, 0 * along, 1.0))
    found = [jax.vmap(solve, in_axes=(0, None, None, None))(faces, *way) for way in ways]
    mixtures, values = (jnp.concatenate(parts) for parts in zip(*found, strict=True))
    best = mixtures[jnp.argmin(values)]
    return jnp.where(jnp.any(present) & jnp.isfinite(jnp.min(values)), best, 0)


def _inner(one: PyTree, other: PyTree) -> Float[Array, ""]:
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
