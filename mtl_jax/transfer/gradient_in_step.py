"""The gradient-based transfer update as a way to train: theta_t = theta_s + eta * grad l(theta_s) inside of the step."""

import dataclasses

import jax
import jax.numpy as jnp

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.model import COPY
from mtl_jax.train.adaptation import Adaptation, is_zero
from mtl_jax.transfer.episodes import KINDS, check_scope, in_scope
from mtl_jax.transfer.fine_tune import FineTune
from mtl_jax.transfer.gradient import MODES, gradient_update, implicit_update


@register
@dataclasses.dataclass(frozen=True)
class GradientTransfer(Adaptation):
    r"""The target's parameters are the source's after a few steps along the gradient of the source's losses.

    .. math:: T(\theta) = \theta + \sigma \eta \, \Pi \nabla \ell_s(\theta)

    ===============  ======================================================================================================
    mode             what happens
    ===============  ======================================================================================================
    ``update``       T once, on batches of the source; then plain fine-tuning on the target
    ``constrained``  theta is trained so that T(theta) serves the target: losses and balancing are at T(theta), and their
                     gradient is pulled back through T exactly, by one Hessian-vector product a step of T, whatever the
                     number of tasks
    ``first_order``  the same, as if T were a shift
    ``joint``        both theta_s and theta_t are trained, each on its losses, with rho/2 |theta_t - T(theta_s)|^2
                     between them
    ``implicit``     theta is trained so that the minimum of l_s(phi) + proximal/2 |phi - theta|^2 serves the target;
                     differentiated as a minimum, by conjugate gradients
    ===============  ======================================================================================================

    :math:`\ell_s` is the sum of the tasks' losses on a batch of the source, another one in each of the steps of T and of
    training. The deployed model is T(theta) with batches that are drawn once, theta_t in ``joint`` and the minimum in
    ``implicit``. New towers lie outside of :math:`\Pi`. In tables updated by rows the coupling of ``joint`` acts on the
    rows that a step names.

    Attributes:
      step_size: :math:`\eta \ge 0`.
      sign: :math:`\sigma`: -1 descends (the inner step of MAML), +1 is the literal ascent.
      num_steps: Steps of T; in ``implicit`` of the descent to the minimum, where 16 are usual.
      mode: As above.
      source_weight: Of :math:`\ell_s(\theta)` in the objective of ``constrained`` and ``first_order``.
      rho: Coupling of ``joint``.
      proximal: Of ``implicit``, > 0.
      num_cg_steps: Most iterations of the conjugate gradients in ``implicit``.
      scope: Labels that T moves, of ``embedding``, ``shared`` and ``task``.
      rows: Whose rows T takes in ``update``: those of the ``source``, or of the ``target``. With the latter and
        ``then_train=False`` it is the adaptation of a meta-learned model, a few steps on the target and no more.
      then_train: Whether fine-tuning follows T in ``update``.

    Raises:
      ConfigError: A value is out of its range.

    References:
      :func:`mtl_jax.transfer.gradient_transfer`; Finn, Abbeel, Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of
      Deep Networks*, ICML 2017.
    """

    step_size: float = 0.01
    sign: int = dataclasses.field(default=-1, metadata={"static": True})
    num_steps: int = dataclasses.field(default=1, metadata={"static": True})
    mode: str = dataclasses.field(default="constrained", metadata={"static": True})
    source_weight: float = dataclasses.field(default=0.0, metadata={"static": True})  # 0 is another program
    rho: float = 1.0
    proximal: float = 1.0
    num_cg_steps: int = dataclasses.field(default=20, metadata={"static": True})
    scope: tuple[str, ...] = dataclasses.field(default=KINDS, metadata={"static": True})
    rows: str = dataclasses.field(default="source", metadata={"static": True})
    then_train: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self):
        check_number(self.step_size, "transfer.step_size", least=0)
        check_number(self.source_weight, "transfer.source_weight", least=0)
        check_number(self.rho, "transfer.rho", least=0)
        check_number(self.proximal, "transfer.proximal", above=0)
        check_count(self.num_steps, "transfer.num_steps")
        check_count(self.num_cg_steps, "transfer.num_cg_steps")
        object.__setattr__(self, "scope", tuple(self.scope))
        choices = (("mode", self.mode, MODES), ("sign", self.sign, (-1, 1)), ("rows", self.rows, ("source", "target")))
        for name, value, known in choices:
            if value not in known:
                raise ConfigError(f"transfer.{name} is {value!r}; expected one of {list(known)}. Change it")
        if self.mode == "implicit" and self.sign != -1:
            raise ConfigError(
                "transfer.mode 'implicit' fits the source and has sign 1; expected -1. Change one of them"
            )
        if self.source_weight and self.mode not in ("constrained", "first_order"):
            raise ConfigError(
                f"transfer.source_weight is {self.source_weight} in mode '{self.mode}', whose objective has no such term; "
                "expected 0. Change it, or the mode"
            )
        if self.mode != "update" and (self.rows == "target" or not self.then_train):
            raise ConfigError(
                f"transfer.rows is '{self.rows}' and transfer.then_train {self.then_train} in mode '{self.mode}', which "
                "trains on steps of the source; expected 'source' and true. Change them, or set transfer.mode=update"
            )
        check_scope(self.scope)

    @property
    def source_batches(self):
        return self.num_steps

    @property
    def adapts(self):
        return self.mode != "update"

    @property
    def starts(self):
        return self.mode == "update"

    @property
    def reads_target(self):
        return self.rows == "target"

    @property
    def trains(self):
        return self.then_train

    @property
    def penalises(self):
        return self.mode == "joint" or self.source_weight > 0

    def simplified(self):
        plain = is_zero(self.step_size) and self.trains and not self.penalises
        return FineTune() if plain else self

    def init(self, params, origin, key):
        if self.mode != "joint":
            return params, {}
        return params | {f"{COPY}/{path}": jnp.copy(array) for path, array in params.items()}, {}

    def adapt(self, params, kept, loss, batches):
        if self.mode == "joint":
            return {path: array for path, array in params.items() if not path.startswith(f"{COPY}/")}
        if self.mode == "implicit":
            options = {"proximal": self.proximal, "num_cg_steps": self.num_cg_steps}
            return implicit_update(loss, **self._options(params, loss, batches), **options)(params)
        return self._update(params, loss, batches)(params)

    def penalty(self, params, kept, view):
        if self.mode != "joint":
            return self.source_weight * self._mean(params, view)
        source = {path.removeprefix(f"{COPY}/"): array for path, array in params.items() if path.startswith(f"{COPY}/")}
        moved = self._update(source, view.source_loss, view.batches)(source)
        coupled = [path for path, inside in in_scope(moved, self.scope).items() if inside]
        distance = sum(jnp.sum(jnp.square(params[path] - moved[path])) for path in coupled)
        return self._mean(source, view) + self.rho / 2 * distance

    def _mean(self, params, view):
        """Mean of the source's losses over its batches."""
        return jnp.mean(jax.vmap(lambda batch: view.source_loss(params, batch))(view.batches))

    def _update(self, params, loss, batches):
        options = self._options(params, loss, batches)
        return gradient_update(loss, **options, sign=self.sign, first_order=self.mode == "first_order")

    def _options(self, params, loss, batches):
        options = {"mask": in_scope(params, self.scope), "batches": batches, "axis": loss.axis}
        return options | {"step_size": self.step_size, "num_steps": self.num_steps}
