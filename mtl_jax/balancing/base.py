"""What a balancer is, and the one place that shields it from rows that are not ordinary."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.rows import combine_rows, gramian, num_rows, row_dtype, squared_row_norms
from mtl_jax.errors import ConfigError

# A row this much shorter than the longest one (1e-8, squared) carries no direction in float32.
NULL_SQUARED = 1e-16


@runtime_checkable
class TaskLike(Protocol):
    """The two things that a balancer may ask a task for; :class:`mtl_jax.tasks.Task` has them."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...


class NoState(NamedTuple):
    """State of a balancer that remembers nothing."""


class Balancer:
    r"""Base of all methods: weights :math:`w` so that shared parameters receive :math:`d = \sum_i w_i g_i`.

    A method is a frozen dataclass that :func:`register` makes a pytree: numeric hyperparameters are leaves, so that a run
    axis can map them, modes are static. Besides the attributes below it defines::

        weigh(gramian f[T, T] | None, losses f[T], state, key, *, active bool[T] | None = None) -> (weights f[T], state)

    which gives inactive tasks weight 0, reads none of their entries, keeps their entries of the state, and counts only
    active tasks where its formula has their number. Call it through :func:`weigh`. A method that acts entry by entry
    (``needs = "jacobian"``) has no weights and defines instead, under the same rules::

        combine(jacobian, losses f[T], state, key, *, active bool[T] | None = None) -> (direction, state)

    with a pytree whose leaves lead with a task axis. Call it through :func:`combine`.

    Attributes:
      needs: ``losses``, ``gramian`` or ``jacobian``: what has to be computed before the call; others may be absent.
      reads_losses: Whether the values of the losses matter.
      stochastic: Whether the method draws from its key; otherwise the key may be None.
      min_tasks: Fewest tasks that the method is defined for.
      num_batches: Independent batches a step needs. With several, Jacobians lead with a batch axis before the task
        axis, and the weights act on the last batch.
      homogeneity: h in :math:`d(sJ) = s^h d(J)` for s > 0; None where there is none.
      scaling: Length of d for T equal gradients g: that of their ``sum``, of their ``mean``, or ``own``, a length that
        the method defines otherwise.
      observes: Whether ``observe`` is to be called after the update, with the losses of the same batch.
      has_parameter_state: Whether the state has entries for each parameter: ``init`` needs their template, and the
        columns of the Jacobian have to be parameters, not rows of a batch.
      scopes: The scopes (see :class:`mtl_jax.train.BalancingOptions`) that the method is defined in; None: those which its
        other attributes allow.
      num_parts: Parts of a batch that the method tells apart.
      by_unit: Whether a method that acts entry by entry does so on the units of a representation too, by
        ``unit_factors(sums, key, *, active)``.
      robust: Whether the method is made for gradients out of all proportion: one counts as absent where it is 1e-8 of the
        median length, not of the longest.
      owns_step: Whether the method takes its gradients itself, at points of its own: it works in the train step only,
        which calls ``gradients(model, state, key, options, learning_rate)`` of it (see :mod:`mtl_jax.train.gradients`).
      weighted_heads: What ``head_gradient: auto`` gives a task's own parameters: its gradient times its weight (True),
        as where the method descends :math:`\sum_i w_i L_i`, or its plain gradient (False).
    """

    needs: ClassVar[str]
    reads_losses: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    min_tasks: ClassVar[int] = 1
    num_batches: ClassVar[int] = 1
    homogeneity: ClassVar[float | None] = 1
    scaling: ClassVar[str] = "own"
    observes: ClassVar[bool] = False
    has_parameter_state: ClassVar[bool] = False
    scopes: ClassVar[tuple[str, ...] | None] = None
    num_parts: ClassVar[int] = 1
    by_unit: ClassVar[bool] = False
    robust: ClassVar[bool] = False
    owns_step: ClassVar[bool] = False
    weighted_heads: ClassVar[bool] = False

    @property
    def by_epoch(self) -> bool:
        """Whether the method waits for ``end_epoch``; elsewhere it counts its own steps."""
        return False

    def init(self, num_tasks: int, params: PyTree | None = None) -> Any:
        """State before the first step; ``params`` is a template of the parameters in the scope."""
        return NoState()

    def products(self, jacobian: PyTree[Float[Array, "..."]]) -> Float[Array, "..."]:
        """What ``weigh`` receives as ``gramian``: sums over columns, so that disjoint columns may be added up."""
        return gramian(jacobian)

    def kept(self, state: Any) -> tuple[Bool[Array, ""], Float[Array, "task task"]] | None:
        """Whether this step needs new products, and those that stand for them if not; None: every step needs its own."""
        return None

    def squared_norms(self, products: Float[Array, "..."]) -> Float[Array, " task"]:
        """Squared lengths of the rows, as far as the products tell; a task without a length is left out of a step."""
        return jnp.diagonal(products)

    def observe(
        self, losses_after: Float[Array, " task"], state: Any, *, active: Bool[Array, " task"] | None = None
    ) -> Any:
        """The state once the losses of the same batch after the update are known."""
        return state

    def end_epoch(self, state: Any) -> Any:
        """The state once an epoch has ended."""
        return state

    def weights_outside(self, losses: Float[Array, " task"], state: Any) -> Float[Array, " task"]:
        """Weights for shared parameters outside of the scope, of a method that acts entry by entry inside of it."""
        return jnp.ones_like(losses)

    def head_weights(
        self, weights: Float[Array, " task"], losses: Float[Array, " task"], state: Any
    ) -> Float[Array, " task"]:
        """What the gradient of a task's own parameters is multiplied by where heads are weighted; ``weights`` are those of
        shared parameters, or of these outside of the scope."""
        return weights

    def diagnostics(self, state: Any) -> dict[str, Float[Array, ""]]:
        """Scalars about the latest call, such as the residual of a solver, for the history of a run."""
        return {}

    def for_tasks(self, tasks: Sequence[TaskLike]) -> "Balancer":
        """The same method with what it takes from the tasks' names and kinds filled in.

        Raises:
          ConfigError: The tasks are too few, or a per-task option does not fit them.
        """
        check_num_tasks(self, len(tasks))
        return self


def register(cls: type[Balancer]) -> type[Balancer]:
    """Makes a frozen dataclass a pytree: static fields are structure, the others leaves, and the class is structure too.

    ``jax.tree_util.register_dataclass`` leaves the class out of the comparison of structures: two methods with the same
    fields would count as one, and a compiled program of one could be run for the other.
    """
    fields = dataclasses.fields(cls)
    leaves = [field.name for field in fields if not field.metadata.get("static")]
    static = [field.name for field in fields if field.metadata.get("static")]

    def structure(balancer):
        return (cls, *(getattr(balancer, name) for name in static))

    def flatten(balancer):
        return [getattr(balancer, name) for name in leaves], structure(balancer)

    def flatten_with_keys(balancer):
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(balancer, name)) for name in leaves]
        return keyed, structure(balancer)

    def unflatten(structure, children):
        balancer = object.__new__(cls)
        for name, value in (*zip(static, structure[1:], strict=True), *zip(leaves, children, strict=True)):
            object.__setattr__(balancer, name, value)
        return balancer

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def weigh(
    balancer: Balancer,
    gramian: Float[Array, "task task"] | None,
    losses: Float[Array, " task"],
    state: Any,
    key: PRNGKeyArray | None,
    active: Bool[Array, " task"] | None = None,
) -> tuple[Float[Array, " task"], Any, dict[str, Array]]:
    """Weights of one step, whatever the rows are; no gradient flows through them.

    Args:
      balancer: The method.
      gramian: Inner products of the task gradients in the chosen scope; None for a method that needs losses only.
      losses: One value a task.
      state: From ``balancer.init`` or the previous call.
      key: Key of this step; None for a method that is not stochastic.
      active: Tasks with observed labels in this batch; None means all.

    Returns:
      The weights, the state, and ``info``: ``null_rows`` (int32, active tasks without a gradient) and ``nonfinite``
      (bool, the step is to be skipped).

    Edge cases:
      ================================================== ==============================================
      inactive task                                      weight 0, its entries never reach the method
      gradient at most 1e-8 of the longest (Gramian)     as inactive, counted in ``null_rows``
      no task left                                       weights 0, state kept
      non-finite loss, Gramian entry or resulting weight weights 0, state kept, ``nonfinite``
      ================================================== ==============================================
    """
    active = jnp.ones(losses.shape, bool) if active is None else active
    losses = jax.lax.stop_gradient(jnp.where(active, losses, 0))
    finite = jnp.all(jnp.isfinite(losses))
    null = jnp.zeros(losses.shape, bool)
    if gramian is not None:
        gramian = jax.lax.stop_gradient(only_active(gramian, active))
        finite &= jnp.all(jnp.isfinite(gramian))
        if balancer.needs == "gramian":
            null = null_rows(balancer, balancer.squared_norms(gramian), active)
            gramian = only_active(gramian, ~null & finite)
    # A step with a non-finite entry is one without tasks: no method has to cope with NaN.
    usable = active & ~null & finite
    weights, new_state = balancer.weigh(gramian, jnp.where(usable, losses, 0), state, key, active=usable)
    weights = jnp.where(usable, weights, 0)
    finite &= jnp.all(jnp.isfinite(weights))
    keep = ~finite | ~jnp.any(usable)
    weights = jnp.where(keep, 0, weights)
    return weights, _kept(keep, state, new_state), {"null_rows": jnp.sum(null, dtype=jnp.int32), "nonfinite": ~finite}


def combine(
    balancer: Balancer,
    jacobian: PyTree[Float[Array, "task ..."]],
    losses: Float[Array, " task"],
    state: Any,
    key: PRNGKeyArray | None,
    active: Bool[Array, " task"] | None = None,
) -> tuple[PyTree[Float[Array, "..."]], Any, dict[str, Array]]:
    """Direction of one step of a method that acts entry by entry, under the rules of :func:`weigh`."""
    active = jnp.ones(losses.shape, bool) if active is None else active
    losses = jax.lax.stop_gradient(jnp.where(active, losses, 0))
    jacobian = jax.lax.stop_gradient(only_active_rows(jacobian, active))
    squares = squared_row_norms(jacobian)
    finite = jnp.all(jnp.isfinite(losses)) & jnp.all(jnp.isfinite(squares))
    null = null_rows(balancer, squares, active)
    usable = active & ~null & finite
    direction, new_state = balancer.combine(
        only_active_rows(jacobian, usable), jnp.where(usable, losses, 0), state, key, active=usable
    )
    for leaf in jax.tree.leaves(direction):
        finite &= jnp.all(jnp.isfinite(leaf))
    keep = ~finite | ~jnp.any(usable)
    direction = jax.tree.map(lambda leaf: jnp.where(keep, 0, leaf).astype(leaf.dtype), direction)
    return direction, _kept(keep, state, new_state), {"null_rows": jnp.sum(null, dtype=jnp.int32), "nonfinite": ~finite}


def aggregate(
    balancer: Balancer,
    jacobian: PyTree[Float[Array, "task ..."]],
    state: Any,
    *,
    losses: Float[Array, " task"] | Sequence[float] | None = None,
    key: PRNGKeyArray | None = None,
    active: Bool[Array, " task"] | Sequence[bool] | None = None,
) -> tuple[PyTree[Float[Array, "..."]], Any]:
    r"""One direction from the gradients of all tasks: :math:`d = \sum_i w_i g_i`.

    Args:
      balancer: The method.
      jacobian: Task gradients, f[T, P], or a pytree of parameters with a leading task axis.
      state: From ``balancer.init(T)`` or the previous call.
      losses: One value a task, for methods that read them.
      key: For stochastic methods; a new one each step.
      active: Tasks with observed labels in this batch; None means all.

    Returns:
      The direction, shaped and typed like ``jacobian`` without its task axis, and the state of the next step.

    Raises:
      ConfigError: Losses or key are missing, a shape does not fit the number of tasks, or the method owns the train step.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, equal
      >>> jacobian = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([5.0, 6.0])}
      >>> direction, _ = aggregate(equal(), jacobian, equal().init(2))
      >>> print(direction["kernel"], direction["bias"])
      [4. 6.] 11.0
    """
    check_takes_gradients(balancer)
    num_tasks = _num_tasks(balancer, jacobian)
    check_num_tasks(balancer, num_tasks)
    losses = _losses(balancer, losses, num_tasks, row_dtype(jacobian))
    if balancer.stochastic and key is None:
        raise ConfigError(
            f"{_name(balancer)} draws from a key and got None. Pass key=jax.random.key(...), new each step"
        )
    if active is not None:
        active = jnp.asarray(active, bool)
        _check_per_task("active", active, num_tasks)
    if balancer.needs == "jacobian":
        return combine(balancer, jacobian, losses, state, key, active)[:2]
    products = balancer.products(jacobian) if balancer.needs == "gramian" else None
    weights, state, _ = weigh(balancer, products, losses, state, key, active)
    last = jax.tree.map(lambda leaf: leaf[-1], jacobian) if balancer.num_batches > 1 else jacobian
    return combine_rows(weights, last), state


def only_active(gramian: Float[Array, "task ..."], active: Bool[Array, " task"] | None) -> Float[Array, "task ..."]:
    """The products with those of inactive tasks set to 0: rows and columns of a Gramian, else rows."""
    if active is None:
        return gramian
    if gramian.ndim == 2:
        return jnp.where(active[:, None] & active, gramian, 0)
    return only_active_rows(gramian, active)


def only_active_rows(
    jacobian: PyTree[Float[Array, "task ..."]], active: Bool[Array, " task"] | None
) -> PyTree[Float[Array, "task ..."]]:
    """The task gradients with those of inactive tasks set to 0."""
    if active is None:
        return jacobian
    return jax.tree.map(lambda rows: jnp.where(active.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0), jacobian)


def num_active(active: Bool[Array, " task"] | None, num_tasks: int) -> int | Int[Array, ""]:
    """The number of tasks that a formula counts, at least 1."""
    return num_tasks if active is None else jnp.maximum(jnp.sum(active), 1)


def check_num_tasks(balancer: Balancer, num_tasks: int) -> None:
    """Raises a ConfigError where the method is not defined for so few tasks."""
    if num_tasks < balancer.min_tasks:
        expectation = f"got {num_tasks} tasks; expected at least {balancer.min_tasks}"
        raise ConfigError(f"{_name(balancer)} {expectation}. Add tasks or choose another balancing")


def check_takes_gradients(balancer: Balancer) -> None:
    """Raises a ConfigError where the method takes the gradients itself, and cannot be given them."""
    if balancer.owns_step:
        raise ConfigError(
            f"{_name(balancer)} takes gradients at points of its own, which are not those of one Jacobian; expected a "
            "method that is given its gradients. Use mtl_jax.train.fit, or balancing= in a configuration"
        )


def _num_tasks(balancer, jacobian):
    if balancer.num_batches == 1:
        return num_rows(jacobian)
    if (found := num_rows(jacobian)) != balancer.num_batches:
        expectation = f"expected leaves [{balancer.num_batches}, T, ...]"
        raise ConfigError(
            f"{_name(balancer)} got a jacobian with leading axis {found}; {expectation}. Stack the Jacobians of "
            f"{balancer.num_batches} independent batches"
        )
    return num_rows(jax.tree.map(lambda leaf: leaf[0], jacobian))


def null_rows(
    balancer: Balancer, squared_norms: Float[Array, " task"], active: Bool[Array, " task"]
) -> Bool[Array, " task"]:
    """Active tasks whose gradient is too short to have a direction."""
    if balancer.robust:
        usual = jnp.nan_to_num(jnp.nanmedian(jnp.where(active, squared_norms, jnp.nan)))
    else:
        usual = jnp.max(squared_norms)
    return active & (squared_norms <= NULL_SQUARED * usual)


def _kept(keep, state, new_state):
    return jax.tree.map(lambda old, new: jnp.where(keep, old, new), state, new_state)


def _losses(balancer, losses, num_tasks, dtype):
    if losses is None:
        if balancer.reads_losses:
            raise ConfigError(f"{_name(balancer)} reads the loss of each task and got None. Pass losses=, one per task")
        return jnp.zeros(num_tasks, dtype)
    losses = jnp.asarray(losses)
    losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
    _check_per_task("losses", losses, num_tasks)
    return losses


def _check_per_task(name, value, num_tasks):
    if value.shape != (num_tasks,):
        raise ConfigError(
            f"{name} has shape {value.shape}; expected ({num_tasks},), one value per task of the jacobian"
        )


def _name(balancer):
    return f"balancer '{type(balancer).__name__}'"
