"""What methods have in common that learn over domains: steps of several domains, and what a step of them moves."""

import dataclasses
from typing import ClassVar

import jax

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.train.adaptation import AUX, Adaptation, Episodes, Params, RowsLoss

KINDS = ("embedding", "shared", "task")
"""Labels that a gradient step inside of a step may move."""


@register
@dataclasses.dataclass(frozen=True)
class OverDomains(Adaptation):
    """Base of methods that learn from the rows of several domains, some of them in each step.

    Attributes:
      num_domains: Domains of a step, drawn at random; None: all.
    """

    needs_source: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    by_domain: ClassVar[bool] = True
    blocks: ClassVar[int] = 1
    least_domains: ClassVar[int] = 1

    num_domains: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        if self.num_domains is not None:
            check_count(self.num_domains, "transfer.num_domains", least=self.least_domains)

    @property
    def episodes(self):
        if self.num_domains is None:
            raise ConfigError(f"transfer '{type(self).__name__}' has no num_domains; expected their number. Give it")
        return Episodes(self.num_domains, self.blocks)

    def for_domains(self, number):
        if self.num_domains is not None and self.num_domains > number:
            raise ConfigError(
                f"transfer.num_domains is {self.num_domains} and the training rows have {number} domains; expected at most "
                "as many. Lower it, or null for all"
            )
        return dataclasses.replace(self, num_domains=self.num_domains or number)

    def adapt(self, params, kept, loss, batches):
        """The initial values that were learned are what is deployed."""
        return of_model(params)


@register
@dataclasses.dataclass(frozen=True)
class FromSupport(OverDomains):
    """Base of methods that adapt parameters to a domain on support rows and are trained on its query rows.

    Attributes:
      step_size: Of an inner step, >= 0.
      num_steps: Inner steps, all on the same support rows.
      scope: Labels that they move, of ``embedding``, ``shared`` and ``task``.
    """

    blocks: ClassVar[int] = 2

    step_size: float = 0.01
    num_steps: int = dataclasses.field(default=1, metadata={"static": True})
    scope: tuple[str, ...] = dataclasses.field(default=KINDS, metadata={"static": True})

    def __post_init__(self):
        super().__post_init__()
        check_number(self.step_size, "transfer.step_size", least=0)
        check_count(self.num_steps, "transfer.num_steps")
        object.__setattr__(self, "scope", tuple(self.scope))
        check_scope(self.scope)

    def adapt_to_domains(self, params, kept, loss, rows):
        return jax.vmap(lambda rows: self.adapted(params, loss.on(block(rows, 0))))(rows)

    def adapted(self, params: Params, loss: RowsLoss) -> Params:
        """The model's parameters from those that are trained and the loss on a domain's support rows; differentiable."""
        raise NotImplementedError


def of_model(params: Params) -> Params:
    """The parameters that are the model's own."""
    return {path: array for path, array in params.items() if not path.startswith(AUX)}


def in_scope(params: Params, scope: tuple[str, ...]) -> dict[str, bool]:
    """Path -> whether it has one of the labels."""
    return {path: label(path).split("/")[0] in scope for path in params}


def check_scope(scope: tuple[str, ...]) -> None:
    """Raises a ConfigError for no label, or unknown ones."""
    if not scope or set(scope) - set(KINDS):
        raise ConfigError(f"transfer.scope is {list(scope)}; expected some of {list(KINDS)}. Change it")


def block(rows, number: int):
    """One block of a domain's rows."""
    return jax.tree.map(lambda leaf: leaf[number], rows)
