"""Adaptation: what training owes to a source. The base owes nothing but the initial values: plain (fine-)tuning."""

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from mtl_jax.model import MultiTaskModel
from mtl_jax.tasks import Task
from mtl_jax.train.parallel import total

AUX = "aux/"
"""Paths of what an adaptation trains in place of arrays of the model begin so."""
TEACHER = "teacher"
"""Name under which an adaptation keeps the parameters of a model that it compares with."""
Params = dict[str, Array]
AddUp = Callable[[Callable[["View"], PyTree]], PyTree]
"""(function of a view) -> the sum of what it makes of each batch."""
Origin = Mapping[str, Any]
"""Path -> True, or bool[V] for a table's rows: what came from a source. Absent paths did not."""


@dataclasses.dataclass(frozen=True)
class RowsLoss:
    """The sum of the tasks' losses on some rows: ``(parameters of the model, rows) -> scalar``.

    Attributes:
      function: That.
      axis: Named axis of devices, over which it is a total: what is differentiated of it is then to be averaged (see
        :func:`mtl_jax.train.parallel.mean`). None: there is none.
    """

    function: Callable[..., Float[Array, ""]]
    axis: str | None = None

    def __call__(self, params: Params, *rows: PyTree) -> Float[Array, ""]:
        return self.function(params, *rows)

    def on(self, rows: PyTree) -> "RowsLoss":
        """The same as a function of the parameters alone."""
        return RowsLoss(lambda params: self.function(params, rows), self.axis)


class Kept(NamedTuple):
    """What an adaptation reads and no optimizer touches; part of the train state.

    Attributes:
      arrays: Name -> path -> array: anchors, frozen parameters. Arrays of a table's path lead with its rows.
      batches: Batches of the source that the model is deployed with, stacked; None where it needs none.
    """

    arrays: dict[str, Params]
    batches: PyTree = None


class Episodes(NamedTuple):
    """Steps whose rows come from several domains.

    Attributes:
      num_domains: Of a step.
      blocks: Of the rows that each of them has in a step. The last is trained on, the others are for
        :meth:`Adaptation.adapt_to_domains`.
    """

    num_domains: int
    blocks: int


class View(NamedTuple):
    """What a penalty, or who studies training rows, sees of a batch beside the parameters.

    Attributes:
      tasks: In the order of every per-task array.
      weight: f32[batch], row weights; 0 pads.
      labels: Task -> its labels; anything where they do not count.
      counted: Task -> bool, where a label counts: it is observed and has a weight above 0.
      outputs: ``(params, train=...)`` -> task -> outputs of its head.
      features: ``(params, train=...)`` -> f32[batch, feature], what the towers read.
      loss: ``(params, units=None)`` -> the sum of the tasks' losses as in evaluation, with what the towers read times
        ``units`` f32[feature]; in a study the losses of its batches add up to that of all of its rows.
      source_loss: The source's loss on one of ``batches``, as for :meth:`Adaptation.adapt`.
      batches: Of the source; None where the adaptation reads none.
      axis: Named axis of devices, each of which sees a part of the rows, while the penalty is that of all; or None.
    """

    tasks: Sequence[Task]
    weight: Float[Array, " batch"]
    labels: Mapping[str, Shaped[Array, "batch *label"]]
    counted: Mapping[str, Bool[Array, "batch *label"]]
    outputs: Callable[..., dict[str, Float[Array, "batch *out"]]]
    features: Callable[..., Float[Array, "batch feature"]]
    loss: Callable[..., Float[Array, ""]]
    source_loss: RowsLoss
    batches: PyTree
    axis: str | None = None


class Adaptation:
    """Base of all strategies of transfer, as the train step sees them.

    A strategy is a frozen dataclass that :func:`mtl_jax.balancing.base.register` makes a pytree: numbers are leaves, so
    that a run axis can map them, everything else is static.

    Attributes:
      needs_source: Whether training begins with parameters of a source.
      reads_outputs: Whether the outputs of the source's model are features of each row.
      mixes_outputs: Whether they are a part of the deployed outputs.
      trains: Whether anything is trained; otherwise the model is judged as it was loaded.
      adapts: Whether the model's parameters are a function of those that are trained (see :meth:`adapt`), in every step.
      starts: Whether training starts from what :meth:`adapt` makes of the model's values, once.
      penalises: Whether there is a :meth:`penalty`.
      reads_rows: Whether the penalty depends on the rows of a step, and not on parameters alone.
      studies: Most batches of the target's training rows that :meth:`study` looks at, drawn once; 0: there is no study.
      source_batches: Batches of rows that :meth:`adapt` reads beside the step's own.
      reads_target: Whether these are rows of the target, and not of the source.
      by_epoch: Whether it waits for :meth:`end_epoch`.
      afresh: Whether the optimizer begins anew with every epoch.
      source_row_weight: Row weight of the source's rows where they are trained on like the target's; None: they are not.
      interpolates: Whether a step goes from the parameters to the mean of those that are adapted to its domains, with the
        distance in place of a gradient, and not along the gradient of the domains' losses.
      by_domain: Whether it tells the domains of the rows that it trains on, of which there have to be two at least.
      episodes: Of which rows a step consists, where they come from several domains; None: of any.
    """

    needs_source: ClassVar[bool] = True
    reads_outputs: ClassVar[bool] = False
    mixes_outputs: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    adapts: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    penalises: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False
    reads_target: ClassVar[bool] = False
    interpolates: ClassVar[bool] = False
    by_domain: ClassVar[bool] = False
    episodes: ClassVar[Episodes | None] = None
    by_epoch: ClassVar[bool] = False
    afresh: ClassVar[bool] = False
    studies: ClassVar[float] = 0

    @property
    def source_batches(self) -> int:
        return 0

    @property
    def source_row_weight(self) -> float | None:
        return None

    @property
    def needs_model(self) -> bool:
        """Whether a trained model of the source is needed."""
        return self.needs_source or self.reads_outputs or self.mixes_outputs

    @property
    def batches_beside(self) -> int:
        """Batches of source rows that come with each batch of the target."""
        return self.source_batches if self.adapts else 0

    @property
    def needs_rows(self) -> bool:
        """Whether rows of the source are needed."""
        return (self.source_batches > 0 and not self.reads_target) or self.source_row_weight is not None

    def simplified(self) -> "Adaptation":
        """Itself; or what is left of it where a coefficient is the constant 0, whose term is then not computed at all."""
        return self

    def for_domains(self, number: int) -> "Adaptation":
        """Itself, for rows of so many domains."""
        return self

    def visits(
        self, target: np.ndarray, source: np.ndarray | None, draw: np.random.Generator
    ) -> list[np.ndarray] | None:
        """Row numbers of an epoch, where it passes through some rows after others; None: through all in one order.

        Args:
          target: Domain of each row of the target.
          source: The same of the source, whose rows come after those of the target; None where there is none.
          draw: For what is random about it.
        """
        return None

    def prepared(self, model: MultiTaskModel, key: PRNGKeyArray) -> MultiTaskModel:
        """The model with modules that training adds to it, before anything else is asked of the strategy.

        Args:
          model: With what was loaded; it stays as it is.
          key: For the initial values of these modules.
        """
        return model

    def phases(self) -> tuple[Callable[[str], bool], ...]:
        """What is trained, by path, in one stage after the other."""
        return (lambda path: True,)

    def in_phase(self, number: int) -> "Adaptation":
        """What it is in a phase: another strategy where the phases differ in more than what they train."""
        return self

    def rates(self, params: Params) -> dict[str, Any]:
        """Path -> factor of its learning rate; absent paths have 1."""
        return {}

    def groups(self, params: Params) -> dict[str, int]:
        """Path -> number of its group, from 0, where groups begin to be trained one after the other; {}: all at once.

        A group that has not begun has no update, no weight decay, and an optimizer in its initial state.
        """
        return {}

    def num_begun(self, kept: dict[str, Params]) -> Int[Array, ""]:
        """How many of the groups are trained."""
        raise NotImplementedError

    def patient_from(self, params: Params, epochs: int) -> int:
        """The epoch, from 1, from which on one without progress counts towards the end of a stage.

        Args:
          params: As for :meth:`init`.
          epochs: Most epochs of the stage.

        Raises:
          ConfigError: So few epochs do not do.
        """
        return 0

    def init(self, params: Params, origin: Origin, key: PRNGKeyArray) -> tuple[Params, dict[str, Params]]:
        """What is trained, and what is kept.

        Args:
          params: Path -> array, of the model's parameters that the phase trains. The result may have other paths, which
            then say ``aux/<name>/...``.
          origin: What came from the source.
          key: For parameters of its own.
        """
        return params, {}

    def check_labels(
        self, tasks: Sequence[Task], labels: Mapping[str, np.ndarray], counted: Mapping[str, np.ndarray]
    ) -> None:
        """Raises a ConfigError for training rows of the target that there is no :meth:`study` of.

        Args:
          tasks: As in a view.
          labels: The same.
          counted: The same.
        """

    def study(self, params: Params, kept: dict[str, Params], add_up: AddUp) -> dict[str, Params]:
        """What training rows of the target say before a phase begins; it joins what is kept.

        Args:
          params: As for :meth:`penalty`, with whole tables.
          kept: What :meth:`init` keeps.
          add_up: Passes over the batches.
        """
        raise NotImplementedError

    def adapt(self, params: Params, kept: dict[str, Params], loss: RowsLoss, batches: PyTree) -> Params:
        """The model's parameters from those that are trained; differentiable.

        Args:
          params: What is trained.
          kept: As from ``init``.
          loss: Of the source, on one of the batches.
          batches: They lead with an axis of them.
        """
        return params

    def adapt_to_domains(self, params: Params, kept: dict[str, Params], loss: RowsLoss, rows: PyTree) -> Params:
        """The model's parameters for each domain of a step, along a leading axis; differentiable.

        Args:
          params: What is trained.
          kept: As from ``init``.
          loss: On one block of rows.
          rows: Of the step, with the leading axes of ``episodes``: domains and blocks.
        """
        raise NotImplementedError

    def domain_weights(self) -> Float[Array, " domain"]:
        """What the loss of each domain of a step counts."""
        number = self.episodes.num_domains
        return jnp.full(number, 1 / number)

    def end_epoch(self, params: Params, kept: dict[str, Params]) -> tuple[Params, dict[str, Params]]:
        """What an epoch ends in, and what is kept from there on; called before it is evaluated. Tables are whole."""
        return params, kept

    def penalty(self, params: Params, kept: dict[str, Params], view: "View") -> Float[Array, ""]:
        """Is added to the objective beside the balanced losses, with weight 1. Of tables it may see some rows only."""
        raise NotImplementedError


def structure(adaptation: Adaptation) -> Any:
    """What adaptations have in common that differ in numbers only."""
    return jax.tree.structure(adaptation)


def mean_over_rows(
    values: Float[Array, " batch"], weight: Float[Array, " batch"], axis: str | None = None
) -> Float[Array, ""]:
    """Mean over the rows of weight > 0, of all devices of a named axis; 0 where there is none."""
    counted = weight > 0
    summed, number = total((jnp.sum(jnp.where(counted, values, 0)), jnp.sum(counted)), axis)
    return summed / jnp.maximum(number, 1)


def is_zero(*coefficients: Any) -> bool:
    """Whether all are the constant 0 and no traced number."""
    return all(isinstance(one, numbers.Real) and one == 0 for one in coefficients)


def from_source(origin: Origin, path: str, like: Array) -> np.ndarray:
    """f32[..., 1 ...]: 1 for what came from the source, broadcast against the array of a path."""
    found = np.asarray(origin.get(path, False), np.float32)
    return found.reshape(found.shape + (1,) * (np.ndim(like) - found.ndim))
