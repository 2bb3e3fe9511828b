"""Discriminative learning rates: the nearer to the input, the smaller the step."""

import dataclasses
import re
from typing import Any

from mtl_jax.arguments import check_number
from mtl_jax.balancing.base import register
from mtl_jax.model import label
from mtl_jax.train.adaptation import Adaptation, Params

LAYER = re.compile(r"(?:.*/)?(?:layers|levels)/(\d+)/")


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

    Layers are told by the numbers in their paths: shared parameters with none count to the highest of them, those of
    encoders and histories and then the tables are the last groups.
    """
    layer = {path: int(found[1]) for path in params if label(path) == "shared" and (found := LAYER.match(path))}
    top = max(layer.values(), default=0)
    depths = {}
    for path in params:
        if label(path) == "embedding":
            depths[path] = top + 3
        elif path.split("/")[0] in ("encoder", "histories"):
            depths[path] = top + 2
        elif label(path) == "shared":
            depths[path] = top - layer.get(path, top) + 1
        else:
            depths[path] = 0
    present = {depth: rank for rank, depth in enumerate(sorted({0, *depths.values()}))}
    return {path: present[depth] for path, depth in depths.items()}
