"""Sharing strategies, one a file: interchangeable Flax NNX modules."""

from mtl_jax.sharing.adatt import AdaTT
from mtl_jax.sharing.adatt_sp import AdaTTSp
from mtl_jax.sharing.base import Context, SharedParameters, Strategy
from mtl_jax.sharing.cgc import CGC
from mtl_jax.sharing.cross_stitch import CrossStitch
from mtl_jax.sharing.dbmtl import DBMTL
from mtl_jax.sharing.dselect_k import DSelectK
from mtl_jax.sharing.match import match_parameters
from mtl_jax.sharing.mmoe import MMoE
from mtl_jax.sharing.mtan import MTAN
from mtl_jax.sharing.omoe import OMoE
from mtl_jax.sharing.ple import PLE
from mtl_jax.sharing.shared_bottom import SharedBottom
from mtl_jax.sharing.single_task import SingleTask
from mtl_jax.sharing.sluice import Sluice
from mtl_jax.sharing.snr import SNRAver, SNRTrans
from mtl_jax.sharing.soft_sharing import SoftSharing

__all__ = [
    "CGC",
    "DBMTL",
    "MTAN",
    "PLE",
    "AdaTT",
    "AdaTTSp",
    "Context",
    "CrossStitch",
    "DSelectK",
    "MMoE",
    "OMoE",
    "SNRAver",
    "SNRTrans",
    "SharedBottom",
    "SharedParameters",
    "SingleTask",
    "Sluice",
    "SoftSharing",
    "Strategy",
    "match_parameters",
]
