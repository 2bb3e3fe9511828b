"""Training: a pure step, a compiled loop, and `fit`, the way in."""

from mtl_jax.train.fit import fit
from mtl_jax.train.gradients import BalancingOptions, balanced_gradients
from mtl_jax.train.objective import Objective
from mtl_jax.train.optimizer import Optimizer
from mtl_jax.train.parallel import compile_step
from mtl_jax.train.progress import Bar, Observer, Quiet
from mtl_jax.train.result import Result
from mtl_jax.train.setup import Member
from mtl_jax.train.state import TrainState
from mtl_jax.train.step import Step, Sums
from mtl_jax.train.vectorize import fit_many

__all__ = [
    "BalancingOptions",
    "Bar",
    "Member",
    "Objective",
    "Observer",
    "Optimizer",
    "Quiet",
    "Result",
    "Step",
    "Sums",
    "TrainState",
    "balanced_gradients",
    "compile_step",
    "fit",
    "fit_many",
]
