"""The two-task toy: two losses over a plane on which methods of balancing visibly part ways."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mtl_jax.arguments import check_arguments, check_count, check_number, shown
from mtl_jax.balancing import Balancer, as_optax
from mtl_jax.balancing.base import combine, weigh
from mtl_jax.balancing.rows import combine_rows
from mtl_jax.errors import ConfigError

STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
KAPPAS = (1.0, 0.1)
LOWER_BOUNDS = (-21.0, -21.0)
"""Below both losses for kappa = 1; the logarithms of the upper half stay above -7, the bowls of the lower one above -20."""
REACHED = 0.05
"""How near to the Pareto set a point counts as on it; Adam's steps of 1e-3 go on there."""
LEAST = 5e-6


class ToyTask(NamedTuple):
    """What a balancer may ask of a task."""

    name: str
    kind: str = "regression"


TASKS = (ToyTask("L1"), ToyTask("L2"))


def losses(x: Float[Array, "*points 2"], kappa: float | Float[Array, ""] = 1.0) -> Float[Array, "*points 2"]:
    r"""The two losses at points of the plane:

    .. math::
        L_1 = \kappa\, (f_1 c_1 + q_1 c_2) \qquad L_2 = f_2 c_1 + q_2 c_2

    .. math::
        f_1 &= \log \max\bigl(|\tfrac12 (-x_1 - 7) - \tanh(-x_2)|,\, 5 \cdot 10^{-6}\bigr) + 6 \\
        f_2 &= \log \max\bigl(|\tfrac12 (-x_1 + 3) + \tanh(-x_2) + 2|,\, 5 \cdot 10^{-6}\bigr) + 6 \\
        q_{1, 2} &= \bigl((x_1 \mp 7)^2 + 0.1\, (x_2 + 8)^2\bigr) / 10 - 20 \\
        c_{1, 2} &= \max\bigl(\tanh(\pm x_2 / 2),\, 0\bigr)

    In the upper half of the plane each loss has a narrow valley, in the lower half a bowl; :math:`\kappa` is the unit of
    the first loss. The maximum with 0 has the derivative 1 at its tie, so that both losses fall along
    :math:`-x_2` from the origin.

    Args:
      x: Points.
      kappa: :math:`\kappa > 0`.

    Returns:
      Both losses of each point. On the Pareto set they are negative.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from mtl_jax.analysis.toy import losses
      >>> print(np.asarray(losses(jnp.array([9.0, -1.0])), float).round(3))
      [-8.831  2.814]
      >>> print(np.asarray(jax.jacobian(losses)(jnp.zeros(2)), float).round(3))
      [[ 0.    10.856]
       [ 0.    10.856]]

    References:
      Liu, Liu, Jin, Stone, Liu, *Conflict-Averse Gradient Descent for Multi-task Learning*, NeurIPS 2021,
      `arXiv:2110.14048 <https://arxiv.org/abs/2110.14048>`_; with :math:`\kappa` = 0.1, Navon et al., *Multi-Task
      Learning as a Bargaining Game*, ICML 2022, `arXiv:2202.01017 <https://arxiv.org/abs/2202.01017>`_.
    """
    x1, x2 = x[..., 0], x[..., 1]
    bend = jnp.tanh(-x2)
    valleys = jnp.stack([_log_distance(0.5 * (-x1 - 7) - bend), _log_distance(0.5 * (-x1 + 3) + bend + 2)], axis=-1)
    bowls = ((x1[..., None] - jnp.array([7.0, -7.0])) ** 2 + 0.1 * (x2[..., None] + 8) ** 2) / 10 - 20
    above, below = _positive(jnp.tanh(x2 / 2)), _positive(jnp.tanh(-x2 / 2))
    return (valleys * above[..., None] + bowls * below[..., None]) * jnp.array([kappa, 1.0])


def pareto_set(num: int = 201) -> Float[np.ndarray, "num 2"]:
    r"""Points that are minima of :math:`w L_1 + (1 - w) L_2` for w from 0 to 1, from left to right; the same for any kappa.

    They have :math:`x_1 = 7 (2w - 1)`, and the :math:`x_2` at which the derivative along it vanishes.
    """
    x1 = np.linspace(-7, 7, num)
    low, high = np.full(num, -9.0), np.full(num, -8.0)
    for _ in range(60):
        x2 = (low + high) / 2
        mixed = (49 - x1**2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
        slope = -(1 - np.tanh(x2 / 2) ** 2) / 2 * mixed - np.tanh(x2 / 2) * 0.02 * (x2 + 8)
        low, high = np.where(slope < 0, x2, low), np.where(slope < 0, high, x2)
    return np.stack([x1, (low + high) / 2], axis=-1)


def distance_to_set(points: Float[np.ndarray, "*points 2"]) -> Float[np.ndarray, "*points"]:
    """From each point to the Pareto set, along the second coordinate where the set is below or above it."""
    front = pareto_set(2001)
    x1 = np.clip(points[..., 0], -7, 7)
    return np.hypot(points[..., 0] - x1, points[..., 1] - np.interp(x1, *front.T))


def values_at(points: Float[np.ndarray, "*points 2"], kappa: float = 1.0) -> Float[np.ndarray, "*points 2"]:
    """:func:`losses` in NumPy and float64."""
    with jax.enable_x64(True):
        return np.asarray(_losses(jnp.asarray(points, float), kappa))


_losses = jax.jit(losses)


class Trajectories(NamedTuple):
    """Where a method went from each start, for each kappa.

    Attributes:
      kappas: Units of the first loss.
      steps: Numbers of steps after which points were kept, 0 first.
      points: Those points.
      losses: Both losses there.
      stopped: The step, from 0, that a method could not take, as its weights, the direction or the next point are not
        finite; the points stay from there on. The number of steps where there was none.
    """

    kappas: Float[np.ndarray, " kappa"]
    steps: np.ndarray
    points: Float[np.ndarray, "kappa start kept 2"]
    losses: Float[np.ndarray, "kappa start kept 2"]
    stopped: np.ndarray

    def outcomes(self) -> list[dict[str, Any]]:
        """One a kappa and start, in plain values: the end, and whether and when it came to the Pareto set.

        ``arrived`` is the first kept step within 0.05 of the set, None where the end is not; ``nonfinite`` the step that
        could not be taken.
        """
        distances = distance_to_set(self.points)
        return [
            {
                "kappa": float(kappa),
                "start": self.points[k, s, 0].tolist(),
                "end": self.points[k, s, -1].tolist(),
                "losses": self.losses[k, s, -1].tolist(),
                "distance": float(distances[k, s, -1]),
                "arrived": _arrival(self.steps, distances[k, s]),
                "nonfinite": int(self.stopped[k, s]) if self.stopped[k, s] < self.steps[-1] else None,
            }
            for k, kappa in enumerate(self.kappas)
            for s in range(self.points.shape[1])
        ]


def trajectories(
    balancer: Balancer,
    *,
    starts: Sequence[Sequence[float]] = STARTS,
    kappas: Sequence[float] = KAPPAS,
    steps: int = 50_000,
    learning_rate: float = 1e-3,
    every: int = 100,
    bounds: Sequence[float] | None = LOWER_BOUNDS,
    seed: int = 0,
) -> Trajectories:
    """Descends from every start for every kappa with Adam on the balanced direction, in float64, as one program.

    Args:
      balancer: The method. One of several batches gets the same gradients for each: there is no noise here.
      starts: Points of the plane.
      kappas: Units of the first loss, > 0.
      steps: Of Adam.
      learning_rate: Its rate, > 0.
      every: Steps from one kept point to the next; the last point is kept as well.
      bounds: Of the losses for kappa = 1. A method with an option ``bound`` that was left at 0 gets them, the first
        times kappa: the losses here are negative. None leaves it.
      seed: Of stochastic methods; each start has its own draws, the same for all kappas.

    Returns:
      The kept points and losses, and where a method stopped.

    Raises:
      ConfigError: An option is out of its range, or the method needs epochs, a representation or more tasks.

    Example:
      >>> from mtl_jax.analysis.toy import trajectories
      >>> from mtl_jax.balancing import equal
      >>> found = trajectories(equal(), starts=[(9.0, -1.0)], kappas=[1.0], steps=5000, learning_rate=0.01)
      >>> (outcome,) = found.outcomes()
      >>> print(outcome["distance"] < 0.05, outcome["nonfinite"])
      True None
    """
    _check(balancer, starts, kappas, steps, learning_rate, every, bounds)
    as_optax(balancer, len(TASKS))  # refuses what works in no plain loop
    with jax.enable_x64(True):
        found = [_bounded(balancer.for_tasks(TASKS), kappa, bounds) for kappa in kappas]
        by_kappa = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, float) for leaf in leaves]), *found)
        keys = jax.random.split(jax.random.key(seed), len(starts))
        given = jnp.asarray(starts, float), jnp.asarray(kappas, float), keys, learning_rate
        points, stopped = jax.device_get(_descend(by_kappa, *given, steps, every))
    kept = np.minimum(np.arange(points.shape[2]) * every, steps)
    values = np.stack([values_at(of_kappa, kappa) for of_kappa, kappa in zip(points, kappas, strict=True)])
    return Trajectories(np.asarray(kappas, float), kept, points, values, stopped)


@functools.partial(jax.jit, static_argnames=("steps", "every"))
def _descend(balancers, starts, kappas, keys, learning_rate, steps, every):
    """Points [kappa, start, kept, 2], and the step that could not be taken [kappa, start]."""

    def descend(balancer, kappa, start, key):
        adam = optax.adam(learning_rate)
        losses_at = functools.partial(losses, kappa=kappa)

        def step(count, carry):
            *kept, stopped = carry
            x, moments, state = kept
            draw = jax.random.fold_in(key, count) if balancer.stochastic else None
            direction, state, nonfinite = _balanced(balancer, jax.jacrev(losses_at)(x), losses_at(x), state, draw)
            updates, moments = adam.update(direction, moments)
            x = x + updates
            if balancer.observes:
                state = balancer.observe(losses_at(x), state)
            ended = (stopped < steps) | nonfinite | ~jnp.all(jnp.isfinite(x))
            stopped = jnp.where(ended, jnp.minimum(stopped, count), stopped)
            chosen = jax.tree.map(lambda old, new: jnp.where(ended, old, new), kept, [x, moments, state])
            return *chosen, stopped

        def stretch(carry, first):
            carry = jax.lax.fori_loop(first, jnp.minimum(first + every, steps), step, carry)
            return carry, carry[0]

        carry = start, adam.init(start), balancer.init(len(TASKS), start), jnp.asarray(steps)
        (*_, stopped), points = jax.lax.scan(stretch, carry, jnp.arange(0, steps, every))
        return jnp.concatenate([start[None], points]), stopped

    over_starts = jax.vmap(descend, in_axes=(None, None, 0, 0))
    return jax.vmap(over_starts, in_axes=(0, 0, None, None))(balancers, kappas, starts, keys)


def _balanced(balancer, jacobian, losses, state, key):
    """Direction, state, and whether this is a step that the method cannot take."""
    if balancer.needs == "jacobian":
        direction, state, info = combine(balancer, jacobian, losses, state, key)
        return direction, state, info["nonfinite"]
    batches = jnp.stack([jacobian] * balancer.num_batches) if balancer.num_batches > 1 else jacobian
    products = balancer.products(batches) if balancer.needs == "gramian" else None
    weights, state, info = weigh(balancer, products, losses, state, key)
    return combine_rows(weights, jacobian), state, info["nonfinite"]


def _log_distance(value):
    return jnp.log(jnp.maximum(jnp.abs(value), LEAST)) + 6


def _positive(value):
    # jnp.maximum has the derivative 1/2 at its tie, and jax.nn.relu 0.
    return jnp.where(value >= 0, value, 0)


def _arrival(steps, distances):
    return int(steps[np.argmax(distances <= REACHED)]) if distances[-1] <= REACHED else None


def _bounded(balancer, kappa, bounds):
    if bounds is None or not hasattr(balancer, "bound") or np.any(balancer.bound):
        return balancer
    return dataclasses.replace(balancer, bound=np.asarray(bounds, float) * (kappa, 1.0))


def _check(balancer, starts, kappas, steps, learning_rate, every, bounds):
    if not isinstance(balancer, Balancer):
        raise ConfigError(
            f"balancer is {shown(balancer)}; expected a Balancer. Call the method first, as in nash_mtl()"
        )
    given = {"starts": starts, "kappas": kappas, "bounds": bounds}
    check_arguments(trajectories, given, place="toy")
    for name, points in (("starts", starts), ("bounds", [] if bounds is None else [bounds])):
        if (name == "starts" and not len(points)) or any(len(point) != 2 for point in points):
            raise ConfigError(f"toy.{name} is {shown(given[name])}; expected pairs of numbers. Change it")
    if not len(kappas):
        raise ConfigError("toy.kappas is empty; expected one number > 0 or more. Give some")
    for kappa in kappas:
        check_number(kappa, "toy.kappas", least=1e-6, most=1e6)
    check_count(steps, "toy.steps", most=10_000_000)
    check_count(every, "toy.every", most=10_000_000)
    check_number(learning_rate, "toy.learning_rate", least=1e-9, most=10.0)
