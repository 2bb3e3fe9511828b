"""Discriminative learning rates: the nearer to the input, the smaller the step."""

import dataclasses
import math
import re
from typing import Any

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.model import label
from mtl_jax.train.adaptation import Adaptation, Params

NUMBERED = {name: re.compile(rf"(?:.*?/)?{name}/(\d+)/") for name in ("levels", "layers")}


@register
@dataclasses.dataclass(frozen=True)
class DiscriminativeLR(Adaptation):
    r"""Group by group towards the input the rate is divided by :math:`\xi`: towers, layers from the top, tables.

    .. math:: \eta^{l-1} = \eta^l / \xi

    The update is scaled and not the gradient, whose scale Adam would cancel.

    Attributes:
      xi: :math:`\xi > 0`; 1 is plain fine-tuning.

    References:
      Howard, Ruder, *Universal Language Model Fine-tuning for Text Classification*, ACL 2018.
    """

    xi: float = 2.6

    def __post_init__(self):
        check_number(self.xi, "transfer.xi", above=0)

    def rates(self, params):
        if isinstance(self.xi, float | int) and self.xi == 1:
            return {}
        return {path: self.xi**-depth for path, depth in groups(params).items() if depth}


def groups(params: Params) -> dict[str, Any]:
    """Path -> depth of its group below the towers, which have 0.

    Layers are told by the numbers in their paths, levels of several layers first; shared parameters without a number are
    the highest. Encoders and histories, and then the tables, are the last groups.
    """

    def place(path: str) -> tuple[float, float]:
        found = (pattern.match(path) for pattern in NUMBERED.values())
        level, layer = (math.inf if one is None else int(one[1]) for one in found)
        return level, layer

    def outer(path: str) -> int:
        if label(path) == "embedding":
            return 3
        if path.split("/")[0] in ("encoder", "histories"):
            return 2
        return 1 if label(path) == "shared" else 0

    order = {path: (outer(path), *(tuple(-n for n in place(path)) if outer(path) == 1 else ())) for path in params}
    present = {group: rank for rank, group in enumerate(sorted({(0,), *order.values()}))}
    return {path: present[group] for path, group in order.items()}
