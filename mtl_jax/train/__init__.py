"""Training: a pure step, a compiled loop, and `fit`, the way in."""

from mtl_jax.train.auto_lambda import auto_lambda
from mtl_jax.train.fit import fit
from mtl_jax.train.forum import forum
from mtl_jax.train.gradients import BalancingOptions, balanced_gradients
from mtl_jax.train.moml import moml
from mtl_jax.train.ntkmtl_sr import ntkmtl_sr
from mtl_jax.train.objective import Objective
from mtl_jax.train.optimizer import Optimizer
from mtl_jax.train.parallel import compile_step
from mtl_jax.train.progress import Bar, Observer, Quiet
from mtl_jax.train.result import Result
from mtl_jax.train.samo import samo
from mtl_jax.train.schedule import SlantedTriangular
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
    "SlantedTriangular",
    "Step",
    "Sums",
    "TrainState",
    "auto_lambda",
    "balanced_gradients",
    "compile_step",
    "fit",
    "fit_many",
    "forum",
    "moml",
    "ntkmtl_sr",
    "samo",
]
