"""From a source to a target: what is handed on, ways to train with it, and updates of parameters as pure functions."""

from mtl_jax.transfer.adapter import Adapter
from mtl_jax.transfer.bitfit import BitFit
from mtl_jax.transfer.bss import BSS
from mtl_jax.transfer.co_tuning import CoTuning
from mtl_jax.transfer.delta import Delta
from mtl_jax.transfer.discriminative_lr import DiscriminativeLR
from mtl_jax.transfer.distill import Distill
from mtl_jax.transfer.domain_negotiation import DomainNegotiation
from mtl_jax.transfer.domain_regularisation import DomainRegularisation
from mtl_jax.transfer.feature_distill import FeatureDistill
from mtl_jax.transfer.fine_tune import FineTune
from mtl_jax.transfer.gradient import gradient_transfer, gradient_update, implicit_update
from mtl_jax.transfer.gradient_in_step import GradientTransfer
from mtl_jax.transfer.gradual_unfreeze import GradualUnfreeze
from mtl_jax.transfer.imaml import IMAML
from mtl_jax.transfer.l2_sp import L2SP
from mtl_jax.transfer.lin_int import Interpolation, LinInt, interpolated
from mtl_jax.transfer.linear_map import LinearMap
from mtl_jax.transfer.linear_probe import LinearProbe
from mtl_jax.transfer.loading import Artefact, Coverage, Loading, Tuning, load
from mtl_jax.transfer.lora import LoRA
from mtl_jax.transfer.lwf import LwF
from mtl_jax.transfer.maml import MAML
from mtl_jax.transfer.meta_sgd import MetaSGD
from mtl_jax.transfer.mldg import MLDG
from mtl_jax.transfer.nonlinear_map import NonlinearMap
from mtl_jax.transfer.pooled import Pooled
from mtl_jax.transfer.pred import Pred, with_outputs
from mtl_jax.transfer.reptile import Reptile
from mtl_jax.transfer.scratch import Scratch
from mtl_jax.transfer.tuning import check_tuning, on_base, tuning_of
from mtl_jax.transfer.zero_shot import ZeroShot

__all__ = [
    "BSS",
    "IMAML",
    "L2SP",
    "MAML",
    "MLDG",
    "Adapter",
    "Artefact",
    "BitFit",
    "CoTuning",
    "Coverage",
    "Delta",
    "DiscriminativeLR",
    "Distill",
    "DomainNegotiation",
    "DomainRegularisation",
    "FeatureDistill",
    "FineTune",
    "GradientTransfer",
    "GradualUnfreeze",
    "Interpolation",
    "LinInt",
    "LinearMap",
    "LinearProbe",
    "LoRA",
    "Loading",
    "LwF",
    "MetaSGD",
    "NonlinearMap",
    "Pooled",
    "Pred",
    "Reptile",
    "Scratch",
    "Tuning",
    "ZeroShot",
    "check_tuning",
    "gradient_transfer",
    "gradient_update",
    "implicit_update",
    "interpolated",
    "load",
    "on_base",
    "tuning_of",
    "with_outputs",
]
