"""Linear probing, and fine-tuning from the probe."""

import dataclasses

from mtl_jax.balancing.base import register
from mtl_jax.model import label
from mtl_jax.train.adaptation import Adaptation


@register
@dataclasses.dataclass(frozen=True)
class LinearProbe(Adaptation):
    """Only the tasks' own parameters are trained; what is below them is not differentiated and runs as in evaluation.

    Attributes:
      then_all: A second stage fine-tunes everything from the probe: new towers then do not distort what the source learned.

    References:
      ``then_all``: Kumar, Raghunathan, Jones, Ma, Liang, *Fine-Tuning can Distort Pretrained Features and Underperform
      Out-of-Distribution*, ICLR 2022. The towers are those of the configuration: ``towers.units=[]`` makes them linear.
    """

    then_all: bool = dataclasses.field(default=False, metadata={"static": True})

    def phases(self):
        probe = (lambda path: label(path).startswith("task/"),)
        return (*probe, *super().phases()) if self.then_all else probe
