"""The gradient-based transfer update: parameters of the source, moved along a gradient, are those of the target."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtl_jax.arguments import check_count, shown
from mtl_jax.errors import ConfigError
from mtl_jax.train.parallel import mean

MODES = ("update", "constrained", "first_order", "joint", "implicit")
Loss = Callable[..., Float[Array, ""]]


def gradient_update(
    loss: Loss,
    *,
    step_size: float | Float[Array, ""],
    sign: int = -1,
    num_steps: int = 1,
    mask: PyTree[bool] | None = None,
    batches: PyTree[Float[Array, "step ..."]] | None = None,
    first_order: bool = False,
    axis: str | None = None,
) -> Callable[[PyTree], PyTree]:
    r"""The map from parameters to parameters that a few gradient steps are.

    .. math:: T(\theta) = \theta + \sigma \eta \, \Pi \nabla \ell(\theta), \qquad \text{repeated } K \text{ times}

    It is differentiable: the Jacobian of one step is :math:`I + \sigma \eta \Pi H`. Steps are recomputed on the way back,
    so that K steps hold K copies of the parameters and the activations of one.

    Args:
      loss: ``params -> scalar``, or with ``batches`` ``(params, batch) -> scalar``.
      step_size: :math:`\eta`.
      sign: :math:`\sigma`, -1 to descend or +1 to ascend.
      num_steps: K, at least 0.
      mask: :math:`\Pi`, a bool for each leaf, or for whole branches (a prefix of the tree); the others are copied, and
        not differentiated. None moves all.
      batches: One for each step, stacked along a leading axis of K.
      first_order: Whether no gradient flows through :math:`\nabla \ell`; the Jacobian is then I.
      axis: Named axis of devices that each have a part of the rows. The loss is then a total over it (``jax.lax.psum``
        inside), the same on all, and gradients of it are means over the axis. That of what is made of the result has to be
        a mean over it, too (see :func:`mtl_jax.train.parallel.mean`).

    Returns:
      A function of parameters, with arrays of the same shapes and types.

    Raises:
      ConfigError: An option is out of its range, or the number of batches is not K.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.transfer import gradient_update
      >>> update = gradient_update(lambda params: jnp.sum(params["w"] ** 2), step_size=0.1)
      >>> print(update({"w": jnp.array([2.0, -1.0])})["w"])
      [ 1.6 -0.8]

    References:
      With sign -1 the inner step of MAML (Finn, Abbeel, Levine, ICML 2017); with +1, to first order, the loss rises.
    """
    _check_step(step_size, sign, num_steps)
    if batches is not None and (found := {len(leaf) for leaf in jax.tree.leaves(batches)}) != {num_steps}:
        raise ConfigError(
            f"batches have the leading sizes {sorted(found)} and num_steps is {num_steps}; expected one batch a step. "
            "Stack as many"
        )

    def step(moved: list[Array], fixed: list[Array], rebuild: Callable, batch: Any) -> list[Array]:
        def of_moved(moved):
            params = rebuild(moved, fixed)
            return loss(params) if batches is None else loss(params, batch)

        gradients = mean(jax.grad(of_moved)(moved), axis)
        if first_order:
            gradients = jax.lax.stop_gradient(gradients)
        return [(leaf + sign * step_size * g).astype(leaf.dtype) for leaf, g in zip(moved, gradients, strict=True)]

    def update(params: PyTree) -> PyTree:
        moved, fixed, rebuild = _split(params, mask)
        if num_steps == 1:
            first = None if batches is None else jax.tree.map(lambda leaf: leaf[0], batches)
            return rebuild(step(moved, fixed, rebuild, first), fixed)
        # A loop: of steps that are written out XLA on CPU keeps what is recomputed, as it was computed before.
        again = jax.checkpoint(lambda moved, batch: step(moved, fixed, rebuild, batch), prevent_cse=False)
        moved, _ = jax.lax.scan(lambda moved, batch: (again(moved, batch), None), moved, batches, length=num_steps)
        return rebuild(moved, fixed)

    return update


def gradient_transfer(
    source_loss: Loss,
    target_loss: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    *,
    step_size: float | Float[Array, ""],
    sign: int = -1,
    num_steps: int = 1,
    mode: str = "constrained",
    source_weight: float | Float[Array, ""] = 0.0,
    rho: float | Float[Array, ""] = 1.0,
    proximal: float | Float[Array, ""] = 1.0,
    mask: PyTree[bool] | None = None,
    source_batches: PyTree[Float[Array, "step ..."]] | None = None,
    num_cg_steps: int = 20,
    axis: str | None = None,
) -> tuple[Float[Array, ""], PyTree | None, PyTree]:
    r"""Value and gradient of an objective in which the target's parameters are the source's after a gradient step.

    With T of :func:`gradient_update` on the source loss:

    =============  ==========================================  =========================================================
    mode           objective                                   gradient
    =============  ==========================================  =========================================================
    update         L_t(T(theta))                               None: the step itself is the transfer
    constrained    L_t(T(theta)) + lambda_s L_s(theta)         exact: one Hessian-vector product a step
    first_order    the same                                    that of L_t at T(theta), as if T were a shift
    joint          L_s(theta_s) + L_t(theta_t)                 of both; a step of theta_s pulls theta_t and the reverse
                   + rho/2 |theta_t - T(theta_s)|^2
    implicit       L_t(phi), phi = argmin L_s(phi)             exact at the minimum, by conjugate gradients
                   + proximal/2 |phi - theta|^2
    =============  ==========================================  =========================================================

    Args:
      source_loss: ``params -> scalar``, or with ``source_batches`` ``(params, batch) -> scalar``.
      target_loss: ``params -> scalar``.
      params: :math:`\theta`; in ``joint`` the pair :math:`(\theta_s, \theta_t)`.
      step_size: :math:`\eta` of T; in ``implicit`` that of the descent to the minimum.
      sign: :math:`\sigma` of T; -1 in ``implicit``.
      num_steps: K of T; in ``implicit`` the steps of the descent, of which 16 are usual.
      mode: As above.
      source_weight: :math:`\lambda_s` of the constrained and first-order objective; the number 0 leaves the term out.
      rho: Coupling in ``joint``. It acts on the leaves of the mask; the others belong to either side alone.
      proximal: Strength of the pull to :math:`\theta` in ``implicit``, > 0.
      mask: Leaves that T moves, as for :func:`gradient_update`; in ``implicit`` those that are fitted to the source.
      source_batches: One for each step, stacked. A source loss outside of T is then the mean over them.
      num_cg_steps: Most iterations of the conjugate gradients in ``implicit``.
      axis: As for :func:`gradient_update`, of both losses; value and gradient are those of all devices.

    Returns:
      The objective, its gradient (shaped as ``params``; None in ``update``), and the parameters that serve the target:
      T(theta), theta_t in ``joint``, phi in ``implicit``.

    Raises:
      ConfigError: An unknown mode, an option out of its range, or one that the mode does not have.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.transfer import gradient_transfer
      >>> value, gradient, adapted = gradient_transfer(
      ...     lambda x: x**2, lambda x: 1.5 * (x - 1) ** 2, jnp.array(2.0), step_size=0.1
      ... )
      >>> print(f"{value:.2f} {gradient:.2f} {adapted:.2f}")
      0.54 1.44 1.60

    References:
      Finn, Abbeel, Levine, ICML 2017 (constrained, first_order); Rajeswaran, Finn, Kakade, Levine, *Meta-Learning with
      Implicit Gradients*, NeurIPS 2019 (implicit).
    """
    _check_step(step_size, sign, num_steps)
    _check_mode(mode, sign, source_weight, proximal, num_cg_steps)

    def source(params):
        if source_batches is None:
            return source_loss(params)
        return jnp.mean(jax.vmap(lambda batch: source_loss(params, batch))(source_batches))

    def updated(first_order=False):
        options = {"step_size": step_size, "sign": sign, "num_steps": num_steps, "mask": mask, "axis": axis}
        return gradient_update(source_loss, **options, batches=source_batches, first_order=first_order)

    fitted = None
    if mode == "implicit":
        options = {"step_size": step_size, "num_steps": num_steps, "proximal": proximal, "num_cg_steps": num_cg_steps}
        fitted = implicit_update(source_loss, **options, mask=mask, batches=source_batches, axis=axis)
    if mode == "update":
        adapted = updated()(params)
        return target_loss(adapted), None, adapted
    if mode == "joint":

        def objective(pair):
            of_source, of_target = pair
            (expected, *_), (found, *_) = _split(updated()(of_source), mask), _split(of_target, mask)
            distance = sum(jnp.sum(jnp.square(f - e)) for f, e in zip(found, expected, strict=True))
            return source(of_source) + target_loss(of_target) + rho / 2 * distance, of_target
    else:

        def objective(params):
            adapted = fitted(params) if mode == "implicit" else updated(mode == "first_order")(params)
            value = target_loss(adapted)
            return value if _is_zero(source_weight) else value + source_weight * source(params), adapted

    (value, adapted), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    return value, mean(gradient, axis), adapted


def implicit_update(
    loss: Loss,
    *,
    step_size: float | Float[Array, ""],
    num_steps: int = 16,
    proximal: float | Float[Array, ""] = 1.0,
    mask: PyTree[bool] | None = None,
    batches: PyTree[Float[Array, "step ..."]] | None = None,
    num_cg_steps: int = 20,
    axis: str | None = None,
) -> Callable[[PyTree], PyTree]:
    r"""The map from parameters to the minimum of a loss near them.

    .. math:: \phi(\theta) = \arg\min_\phi \ell(\phi) + \frac{\lambda}{2} \| \phi - \theta \|^2

    It is found by gradient descent from :math:`\theta`, and differentiated as the minimum that it is meant to be: by
    conjugate gradients with :math:`H + \lambda I`, whatever the steps were. What lies outside of the mask moves the minimum
    as well, and gets that part of the gradient too. Where H + proximal I is not positive there is no such minimum: the
    conjugate gradients then stop at what they have. A proximal above the concavity of the loss keeps it positive.

    Args:
      loss: As for :func:`gradient_update`; with batches the minimum is that of the mean over them.
      step_size: Of the descent.
      num_steps: Of the descent; 16 are usual.
      proximal: :math:`\lambda > 0`.
      mask: Leaves that are fitted.
      batches: One for each step, stacked.
      num_cg_steps: Most iterations of the conjugate gradients.
      axis: As for :func:`gradient_update`.

    Raises:
      ConfigError: An option is out of its range.

    References:
      Rajeswaran, Finn, Kakade, Levine, *Meta-Learning with Implicit Gradients*, NeurIPS 2019.
    """
    _check_step(step_size, -1, num_steps)
    _check_proximal(proximal, num_cg_steps)

    def over_batches(params):
        if batches is None:
            return loss(params)
        return jnp.mean(jax.vmap(lambda batch: loss(params, batch))(batches))

    def update(params: PyTree) -> PyTree:
        start, fixed, rebuild = _split(params, mask)

        def inner(params, *batch):
            moved, _, _ = _split(params, mask)
            near = sum(jnp.sum(jnp.square(m - jax.lax.stop_gradient(s))) for m, s in zip(moved, start, strict=True))
            return loss(params, *batch) + proximal / 2 * near

        options = {"step_size": step_size, "num_steps": num_steps, "mask": mask, "batches": batches}
        descend = gradient_update(inner, **options, axis=axis)
        fitted = _split(jax.lax.stop_gradient(descend(params)), mask)[0]

        def slope(moved, fixed):
            return mean(jax.grad(lambda moved: over_batches(rebuild(moved, fixed)))(moved), axis)

        def matrix(vector):
            product = jax.jvp(lambda moved: slope(moved, jax.lax.stop_gradient(fixed)), (fitted,), (vector,))[1]
            return [h + proximal * v for h, v in zip(product, vector, strict=True)]

        # What holds at the minimum: slope + proximal (phi - theta) = 0. Its value is left out and its derivative kept.
        held = [g - proximal * s for g, s in zip(slope(fitted, fixed), start, strict=True)]
        right = [jax.lax.stop_gradient(h) - h for h in held]

        def solve(matrix, right):
            return _conjugate_gradients(matrix, right, proximal, num_cg_steps)

        # The mean is for the way back, where the system is that of all devices and its right side has to be so, too.
        moves = mean(jax.lax.custom_linear_solve(matrix, right, solve, symmetric=True), axis)
        return rebuild([f + m for f, m in zip(fitted, moves, strict=True)], fixed)

    return update


def _conjugate_gradients(
    matrix: Callable[[list[Array]], list[Array]], right: list[Array], proximal: Any, num_steps: int
) -> list[Array]:
    """x with (H + proximal I) x = right, from steps that stop where the matrix is not positive: beyond, they find nothing.

    Where that is so along ``right`` itself, x is ``right / proximal``, as if H were 0.
    """

    def dot(one, other):
        return sum(jnp.vdot(a, b) for a, b in zip(one, other, strict=True))

    def add(one, scale, other):
        return [a + scale * b for a, b in zip(one, other, strict=True)]

    enough = (10 * float(jnp.finfo(jnp.result_type(*right)).eps)) ** 2 * dot(right, right)

    def body(carry):
        x, residual, direction, square, number, _ = carry
        image = matrix(direction)
        curvature = dot(direction, image)
        positive = curvature > 0
        size = jnp.where(positive, square / jnp.where(positive, curvature, 1.0), 0.0)
        x, residual = add(x, size, direction), add(residual, -size, image)
        new = dot(residual, residual)
        direction = add(residual, new / jnp.where(square > 0, square, 1.0), direction)
        return x, residual, direction, new, number + 1, positive

    def goes_on(carry):
        *_, square, number, positive = carry
        return positive & (square > enough) & (number < num_steps)

    zero = [jnp.zeros_like(r) for r in right]
    start = (zero, right, right, dot(right, right), jnp.zeros((), jnp.int32), jnp.array(True))
    x, *_, number, positive = jax.lax.while_loop(goes_on, body, start)
    at_once = ~positive & (number == 1)
    return [jnp.where(at_once, r / proximal, s) for r, s in zip(right, x, strict=True)]


def _split(params: PyTree, mask: PyTree[bool] | None) -> tuple[list[Array], list[Array], Callable[..., PyTree]]:
    """Leaves in the mask, the others, and the way back."""
    leaves, structure = jax.tree.flatten(params)
    chosen = [True] * len(leaves)
    if mask is not None:
        try:
            chosen = jax.tree.leaves(
                jax.tree.map(lambda keep, branch: jax.tree.map(lambda _: keep, branch), mask, params)
            )
        except ValueError as error:
            raise ConfigError(
                f"the mask does not fit the parameters ({error}); expected a bool for each leaf or branch. Change mask"
            ) from error
        if not all(isinstance(keep, bool) for keep in chosen):
            raise ConfigError(f"the mask has {shown(chosen)}; expected True and False. Change mask")

    def rebuild(moved, fixed):
        moved, fixed = iter(moved), iter(fixed)
        return jax.tree.unflatten(structure, [next(moved) if keep else next(fixed) for keep in chosen])

    moved = [leaf for leaf, keep in zip(leaves, chosen, strict=True) if keep]
    return moved, [leaf for leaf, keep in zip(leaves, chosen, strict=True) if not keep], rebuild


def _check_step(step_size, sign, num_steps) -> None:
    if _is_number(step_size) and not (0 <= step_size < math.inf):
        raise ConfigError(f"step_size is {step_size!r}; expected a number >= 0. Change it; sign turns the direction")
    if sign not in (-1, 1):
        raise ConfigError(f"sign is {sign!r}; expected -1 (descent) or 1 (ascent). Change it")
    check_count(num_steps, "num_steps", least=0)


def _check_mode(mode, sign, source_weight, proximal, num_cg_steps) -> None:
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}; expected one of {list(MODES)}. Change it")
    if mode == "implicit" and sign != -1:
        raise ConfigError("mode 'implicit' fits the source and has sign 1; expected -1. Change it, or the mode")
    if mode not in ("constrained", "first_order") and not _is_zero(source_weight):
        raise ConfigError(
            f"mode '{mode}' has source_weight {shown(source_weight)}; expected 0, since its objective has no such term. "
            "Leave it out, or use mode 'constrained'"
        )
    if mode == "implicit":
        _check_proximal(proximal, num_cg_steps)
    check_count(num_cg_steps, "num_cg_steps")


def _check_proximal(proximal, num_cg_steps) -> None:
    if _is_number(proximal) and not (0 < proximal < math.inf):
        raise ConfigError(f"proximal is {proximal!r}; expected a number > 0. Change it")
    check_count(num_cg_steps, "num_cg_steps")


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real)


def _is_zero(value) -> bool:
    return _is_number(value) and value == 0
