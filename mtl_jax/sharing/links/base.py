"""Link: the contract of what ties tasks together at their logits; itself the link that ties none."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from mtl_jax.errors import ConfigError

Logits = dict[str, Float[Array, " batch"]]


class Linked(NamedTuple):
    """What a link makes of the towers' logits.

    Attributes:
      logits: Task -> its logits.
      losses: Task -> element losses that take the place of the task's own.
      aux: Tasks -> a penalty on each row where all of them are observed; its mean is added after balancing, factor 1.
    """

    logits: Logits
    losses: Logits
    aux: dict[tuple[str, ...], Float[Array, " batch"]]


class Link(nnx.Module):
    """Ties nothing: every task has a tower, and its logits are that tower's.

    A link is constructed as ``Link(tasks, *, ...)`` and called with the logits of the towers. It stands behind any sharing
    strategy whose tables are shared. The attributes below say which towers a task depends on. From them the model knows
    what to compute for one task alone, and what counts as shared: a tower, and the part of the strategy that feeds it, is
    shared where the losses of several tasks reach it, whatever it is called.

    Attributes:
      towers: Tasks with a tower. The logits of the others come from the link.
      extra: Name -> task: further towers, of that task's representation and its own.
      reads: Task -> the towers that its logits or its loss read.
      shared: Towers that the losses of several tasks reach.
      detached: Towers whose logits other tasks read without a gradient.
      evaluated: Tasks without a loss; no balancer sees them.
      observed_by: Task -> the task in whose observed rows its loss is taken, where that is another one.
      penalised: The keys of :attr:`Linked.aux`.
      tied: Tasks that have to be binary, because the link reads their logits as those of chances.
      order: Of the steps, where the tasks are such: a later one implies those before.
      given: Task -> the step before which it is a chance given, for the check of its ``space``.
    """

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tuple(tasks)
        self.tie()

    def tie(
        self,
        *,
        towers: Sequence[str] | None = None,
        extra: Mapping[str, str] | None = None,
        reads: Mapping[str, Sequence[str]] | None = None,
        shared: Sequence[str] = (),
        detached: Sequence[str] = (),
        evaluated: Sequence[str] = (),
        observed_by: Mapping[str, str] | None = None,
        penalised: Sequence[tuple[str, ...]] = (),
        order: Sequence[str] = (),
        given: Mapping[str, str] | None = None,
        tied: Sequence[str] = (),
    ) -> None:
        """Sets the attributes; what is not given is that of tasks without ties."""
        self.towers = self.tasks if towers is None else tuple(towers)
        reads = {task: (task,) for task in self.tasks} | {task: tuple(names) for task, names in (reads or {}).items()}
        self.shared, self.detached, self.evaluated = tuple(shared), tuple(detached), tuple(evaluated)
        self.penalised, self.order, self.tied = tuple(penalised), tuple(order), tuple(tied)
        # As pairs, since what a module holds beside arrays has to be hashable.
        maps = {"extra": extra or {}, "reads": reads, "observed_by": observed_by or {}, "given": given or {}}
        self.maps = tuple((name, tuple(pairs.items())) for name, pairs in maps.items())

    def __call__(
        self,
        logits: Mapping[str, Float[Array, " batch"]],
        labels: Mapping[str, Float[Array, " batch"]] | None = None,
        weight: Mapping[str, Float[Array, " batch"]] | None = None,
    ) -> Linked:
        """The logits of the tasks.

        Args:
          logits: Tower -> its outputs. Towers may be missing; then so are the tasks that read them.
          labels: Task -> labels, where losses are wanted.
          weight: Task -> 1 where its label is observed, 0 elsewhere.
        """
        return Linked(dict(logits), {}, {})

    @property
    def extra(self) -> dict[str, str]:
        return self._map("extra")

    @property
    def reads(self) -> dict[str, tuple[str, ...]]:
        return self._map("reads")

    @property
    def observed_by(self) -> dict[str, str]:
        return self._map("observed_by")

    @property
    def given(self) -> dict[str, str]:
        return self._map("given")

    def _map(self, name: str) -> dict:
        return dict(dict(self.maps)[name])

    def check(self, kinds: Mapping[str, tuple[str, str]]) -> None:
        """Raises a ConfigError where tasks are not such as the link can tie.

        Args:
          kinds: Task -> its kind, and the task in whose positives its label exists (``all`` if everywhere).
        """
        name = type(self).__name__
        for task in self.tied:
            if kinds[task][0] != "binary":
                raise ConfigError(
                    f"link {name} ties task '{task}', which is {kinds[task][0]}; expected binary tasks. Change its order, "
                    "or leave out the link (of AITM by sharing.calibration=0, of ResFlow by sharing.logits=false)"
                )
        for task, before in self.given.items():
            if kinds[task][1] != before:
                raise ConfigError(
                    f"link {name} takes task '{task}' as the chance given '{before}', and its label has the space "
                    f"'{kinds[task][1]}'; expected '{before}'. Set the task's space"
                )

    def check_labels(self, labels: Mapping[str, np.ndarray], mask: Mapping[str, np.ndarray]) -> None:
        """Raises a ConfigError where a row has a later step of ``order`` without one before."""
        for before, after in zip(self.order[:-1], self.order[1:], strict=True):
            wrong = (labels[after] == 1) & (labels[before] == 0) & mask[after] & mask[before]
            if wrong.any():
                raise ConfigError(
                    f"{int(wrong.sum()):,} training rows have {after}=1 and {before}=0, and link "
                    f"{type(self).__name__} takes '{after}' as a step after '{before}'; expected none. Correct the labels "
                    "or the link's order"
                )
