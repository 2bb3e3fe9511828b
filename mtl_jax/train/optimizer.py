"""Optimizer: an optax transform with a learning rate, decay by label, and clipping over all gradients."""

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtl_jax.errors import ConfigError
from mtl_jax.model import decays, label

LABEL_KINDS = ("embedding", "shared", "task", "aux")
DEFAULT = "default"
ADAM = optax.scale_by_adam()
"""One object: optimizers with one transform share compiled programs, and functions are equal to themselves only."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates.

    Attributes:
      transform: An optax transform without learning rate, like ``optax.scale_by_adam()``. For tables updated by rows it
        must work row by row (as the ``scale_by_*`` transforms do).
      learning_rate: A number > 0 or a schedule of the step, of optax or :class:`SlantedTriangular`; or one by label
        (``embedding``, ``shared``, ``task``, ``aux``, or one task's ``task/<name>``), with ``default`` for labels that
        are not named.
      weight_decay: Decoupled decay (Loshchilov and Hutter, ICLR 2019): a number for all labels, or one by label kind
        (``embedding``, ``shared``, ``task``, ``aux``; what is not named has none). In tables updated by rows only
        touched rows decay.
      rate_scale: Name -> factor > 0 of the learning rate, for the parameters that have the name in their path, or
        as it: ``{"stitch": 100.0}`` trains cross-stitch matrices a hundred times as fast as the networks that they join.
      clip_norm: Bound of the global norm of the gradient over all parameters, touched rows included; None: no clipping.

    Example:
      >>> import optax
      >>> from mtl_jax.train import Optimizer
      >>> Optimizer(optax.scale_by_adam(), learning_rate=1e-3, weight_decay={"shared": 1e-5}).clip_norm is None
      True
    """

    transform: optax.GradientTransformation = ADAM
    learning_rate: float | optax.Schedule | Mapping[str, float | optax.Schedule] = 1e-3
    weight_decay: float | Mapping[str, float] = 0.0
    rate_scale: Mapping[str, float] | None = None
    clip_norm: float | None = None

    def __post_init__(self):
        if not isinstance(self.transform, optax.GradientTransformation):
            raise ConfigError(
                f"optimizer.transform is {self.transform!r}; expected an optax transform like optax.scale_by_adam()"
            )
        rates = self.learning_rate if isinstance(self.learning_rate, Mapping) else {DEFAULT: self.learning_rate}
        for name, rate in rates.items():
            if not callable(rate) and not _positive(rate):
                raise ConfigError(
                    f"optimizer.learning_rate is {self.learning_rate!r}; expected a number > 0 or a schedule, or one by "
                    f"label of {[*LABEL_KINDS, 'task/<name>', DEFAULT]}. Change it"
                )
            if name.split("/")[0] not in (*LABEL_KINDS, DEFAULT):
                raise ConfigError(
                    f"optimizer.learning_rate names the label '{name}'; expected some of "
                    f"{[*LABEL_KINDS, 'task/<name>', DEFAULT]}. Rename it"
                )
        decay = self.weight_decay
        if not _is_number(decay) and not isinstance(decay, Mapping):
            raise ConfigError(
                f"optimizer.weight_decay is {decay!r}; expected a number >= 0, or one by label. Change it"
            )
        decay = dict.fromkeys(LABEL_KINDS, decay) if not isinstance(decay, Mapping) else dict(decay)
        unknown = sorted(set(decay) - set(LABEL_KINDS))
        if unknown or not all(_is_number(rate) and (_positive(rate) or rate == 0) for rate in decay.values()):
            raise ConfigError(
                f"optimizer.weight_decay is {self.weight_decay}; expected rates >= 0 for labels of {list(LABEL_KINDS)}. "
                "Change them"
            )
        scale = {} if self.rate_scale is None else self.rate_scale
        if not isinstance(scale, Mapping) or not all(map(_positive, scale.values())):
            raise ConfigError(
                f"optimizer.rate_scale is {scale!r}; expected a number > 0 by a name in the paths of parameters, like "
                "{stitch: 100}. Change it"
            )
        if self.clip_norm is not None and not _positive(self.clip_norm):
            raise ConfigError(f"optimizer.clip_norm is {self.clip_norm!r}; expected a number > 0 or null. Change it")
        object.__setattr__(self, "weight_decay", decay)
        object.__setattr__(self, "rate_scale", dict(scale))

    def dense(self) -> optax.GradientTransformation:
        """The transform of a dict path -> array; the path gives the label, the label decay and learning rate."""
        decayed = [
            optax.add_decayed_weights(
                rate, lambda params, kind=kind: {p: decays(p) and _kind(p) == kind for p in params}
            )
            for kind, rate in self.weight_decay.items()
            if _acts(rate)
        ]
        scaled = [optax.stateless(self._scaled)] if self.rate_scale else []
        if not isinstance(self.learning_rate, Mapping):
            return optax.chain(self.transform, *decayed, optax.scale_by_learning_rate(self.learning_rate), *scaled)
        rates = {name: optax.scale_by_learning_rate(rate) for name, rate in self.learning_rate.items()}
        by_label = optax.partition(rates, lambda params: {path: self._rate_name(path) for path in params})
        return optax.chain(self.transform, *decayed, by_label, *scaled)

    def rows(self, path: str) -> optax.GradientTransformation:
        """The transform of the rows of one table."""
        decay = self.weight_decay.get(_kind(path), 0.0)
        decayed = [optax.add_decayed_weights(decay)] if _acts(decay) else []
        rate = self.learning_rate
        rate = rate[self._rate_name(path)] if isinstance(rate, Mapping) else rate
        scaled = [optax.scale(self._scale(path))] if self.rate_scale else []
        return optax.chain(self.transform, *decayed, optax.scale_by_learning_rate(rate), *scaled)

    def rate(self, path: str, step: Int[Array, ""]) -> Any:
        """The learning rate of a parameter after so many updates."""
        rate = self.learning_rate
        rate = rate[self._rate_name(path)] if isinstance(rate, Mapping) else rate
        return (rate(step) if callable(rate) else rate) * self._scale(path)

    def numbers(self) -> dict[str, Any]:
        """Learning rates and factors, decays, bound, as far as they are numbers: what runs of one program may differ in.

        Schedules are functions and a decay of 0 is no decay, so both belong to the program.
        """
        rate = self.learning_rate
        rates = rate if isinstance(rate, Mapping) else {DEFAULT: rate}
        return {
            "learning_rate": {name: value for name, value in rates.items() if not callable(value)},
            "weight_decay": {name: value for name, value in self.weight_decay.items() if _acts(value)},
            "rate_scale": dict(self.rate_scale),
            "clip_norm": self.clip_norm,
        }

    def with_numbers(self, numbers: Mapping[str, Any]) -> "Optimizer":
        """The same optimizer with other :meth:`numbers`, traced ones too."""
        rate = self.learning_rate
        rates = numbers["learning_rate"]
        return dataclasses.replace(
            self,
            learning_rate=dict(rate) | rates if isinstance(rate, Mapping) else rates.get(DEFAULT, rate),
            weight_decay=self.weight_decay | numbers["weight_decay"],
            rate_scale=numbers["rate_scale"],
            clip_norm=numbers["clip_norm"],
        )

    def program(self) -> tuple:
        """What optimizers must have in common to share a compiled program, beside the structure of :meth:`numbers`."""
        rates = self.learning_rate if isinstance(self.learning_rate, Mapping) else {DEFAULT: self.learning_rate}
        schedules = tuple((name, rate) for name, rate in rates.items() if callable(rate))
        return self.transform, isinstance(self.learning_rate, Mapping), schedules

    def check_names(self, paths: Iterable[str]) -> None:
        """Raises a ConfigError for a name of ``rate_scale`` that no parameter has in its path."""
        known = {name for path in paths for name in (path, *path.split("/"))}
        if unknown := sorted(set(self.rate_scale) - known):
            raise ConfigError(
                f"optimizer.rate_scale names {unknown}, which no parameter of this model has in its path; expected some of "
                f"{sorted(known)}. Rename them"
            )

    def _scale(self, path: str) -> Any:
        """The factor of a parameter's learning rate."""
        return math.prod(factor for name, factor in self.rate_scale.items() if name == path or name in path.split("/"))

    def _scaled(self, updates: dict[str, Array], params: Any = None) -> dict[str, Array]:
        return {path: self._scale(path) * update for path, update in updates.items()}

    def _rate_name(self, path: str) -> str:
        """The entry of ``learning_rate`` that a parameter follows."""
        for name in (label(path), _kind(path), DEFAULT):
            if name in self.learning_rate:
                return name
        raise ConfigError(
            f"optimizer.learning_rate has rates for {list(self.learning_rate)}; expected one for the label "
            f"'{label(path)}' of this model. Add it, or '{DEFAULT}'"
        )


def clip(gradients: dict[str, Array], bound: float | None) -> tuple[dict[str, Array], Float[Array, ""]]:
    """The gradients with their global norm bounded, and the norm before."""
    norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradients)))
    if bound is None:
        return gradients, norm
    scale = jnp.minimum(1.0, bound / jnp.where(norm > 0, norm, 1.0))
    return jax.tree.map(lambda g: g * scale, gradients), norm


def by_group(
    transform: optax.GradientTransformation, groups: Mapping[str, int], num_begun: Int[Array, ""] | int = 0
) -> optax.GradientTransformation:
    """The transform with a state for each group of paths. One that has not begun keeps its state, and its updates are 0.

    Args:
      transform: Of a dict path -> array.
      groups: Path -> number of its group; empty: the transform as it is.
      num_begun: So many groups have begun.
    """
    if not groups:
        return transform

    def split(arrays: Mapping[str, Array]) -> dict[int, dict[str, Array]]:
        present = sorted({groups[path] for path in arrays})
        return {group: {path: array for path, array in arrays.items() if groups[path] == group} for group in present}

    def init(params):
        return {group: transform.init(part) for group, part in split(params).items()}

    def update(updates, state, params):
        parts, moved, states = split(params), {}, {}
        for group, part in split(updates).items():
            new = transform.update(part, state[group], parts[group])
            old = jax.tree.map(jnp.zeros_like, part), state[group]
            some, states[group] = jax.tree.map(lambda a, b, on=group < num_begun: jnp.where(on, a, b), new, old)
            moved |= some
        return moved, states

    return optax.GradientTransformation(init, update)


def as_optimizer(optimizer: Any) -> Optimizer:
    """An :class:`Optimizer`, also from a bare optax transform that includes its learning rate (``optax.adam(1e-3)``)."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    if isinstance(optimizer, optax.GradientTransformation):
        # the transform already descends: undo the sign that scale_by_learning_rate puts on
        return Optimizer(optax.chain(optimizer, optax.scale(-1.0)), learning_rate=1.0)
    raise ConfigError(f"optimizer is {optimizer!r}; expected mtl_jax.train.Optimizer or an optax transform")


def _is_number(value: Any) -> bool:
    """Also for an array of one number, which the run axis of seeds and rates may put here."""
    return not isinstance(value, bool) and (isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0)


def _positive(value: Any) -> bool:
    """Whether it is a finite number > 0. A traced one stands for numbers that were checked before."""
    return isinstance(value, jax.core.Tracer) or (_is_number(value) and 0 < value < math.inf)


def _acts(decay: Any) -> bool:
    return isinstance(decay, jax.core.Tracer) or decay > 0


def _kind(path: str) -> str:
    return label(path).split("/")[0]
