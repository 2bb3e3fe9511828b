"""A balancer inside any optax chain, without the rest of this library."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mtl_jax.balancing.base import Balancer, aggregate, check_num_tasks, check_takes_gradients
from mtl_jax.balancing.rows import num_rows
from mtl_jax.errors import ConfigError


class AsOptaxState(NamedTuple):
    """Steps taken, and the balancer's own state."""

    count: Int[Array, ""]
    balancer: Any


def as_optax(balancer: Balancer, num_tasks: int, *, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """The balancer as the first link of an optax chain over the shared parameters.

    Its updates are the gradients of all tasks, the parameters with a leading task axis; a method of several batches wants
    those of each, [3, T, ...]. What it passes on has the shape of the parameters. Parameters of one task's head need an
    optimizer of their own, and gradient accumulation (``optax.MultiSteps``) belongs around each task's gradient, not
    around this chain.

    Args:
      balancer: The method.
      num_tasks: T.
      seed: Step t of a stochastic method draws from ``jax.random.fold_in(jax.random.key(seed), t)``, t = 0, 1, ...

    Returns:
      A transformation with the extra arguments ``losses=`` (f[T], for methods that read them), ``active=`` (bool[T],
      tasks with labels in the batch; all by default) and ``losses_after=`` of ``update``: for a method that observes what
      an update did, the losses of the previous call's batch under the parameters after that call; None in the first.

    Raises:
      ConfigError: The method cannot work with so many tasks, waits for epochs, or owns the train step; in ``update``:
        losses are missing, or the task axis is.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mtl_jax.balancing import as_optax, pcgrad
      >>> optimizer = optax.chain(as_optax(pcgrad(), 2), optax.sgd(0.1))
      >>> params = jnp.array([1.0, 1.0])
      >>> tasks = lambda x: jnp.stack([x[0] ** 2, (x[0] - 2) ** 2 + x[1] ** 2])
      >>> updates, state = optimizer.update(jax.jacobian(tasks)(params), optimizer.init(params))
      >>> print(updates)
      [-0.1 -0.3]
    """
    if not isinstance(balancer, Balancer):
        raise ConfigError(f"as_optax got {balancer!r}; expected a balancer. Call the method first, as in pcgrad()")
    check_takes_gradients(balancer)
    check_num_tasks(balancer, num_tasks)
    name = type(balancer).__name__
    if balancer.by_epoch:
        raise ConfigError(
            f"'{name}' waits for the end of an epoch, which an optax chain never hears of. Set period=n steps"
        )

    def init(params):
        return AsOptaxState(jnp.zeros([], jnp.int32), balancer.init(num_tasks, params))

    # optax hands every link of a chain the extra arguments of all, so those of others have to pass.
    def update(updates, state, params=None, *, losses=None, active=None, losses_after=None, **others):
        found = num_rows(updates if balancer.num_batches == 1 else jax.tree.map(lambda leaf: leaf[0], updates))
        if found != num_tasks:
            fix = "Give it jax.jacobian of the losses, not the gradient of their sum"
            raise ConfigError(f"as_optax got updates with task axis {found}; expected {num_tasks} tasks. {fix}")
        key = jax.random.fold_in(jax.random.key(seed), state.count) if balancer.stochastic else None
        inner = state.balancer
        if balancer.observes and losses_after is not None:
            inner = balancer.observe(jnp.asarray(losses_after, float), inner)
        direction, inner = aggregate(balancer, updates, inner, losses=losses, key=key, active=active)
        return direction, AsOptaxState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformationExtraArgs(init, update)
