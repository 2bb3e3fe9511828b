"""Sharing strategies, one a file: interchangeable Flax NNX modules."""

from mtl_jax.sharing.adapt_dhm import AdaptDHM
from mtl_jax.sharing.adasparse import AdaSparse
from mtl_jax.sharing.adatt import AdaTT
from mtl_jax.sharing.adatt_sp import AdaTTSp
from mtl_jax.sharing.aitm import AITM
from mtl_jax.sharing.base import Context, Kept, SharedParameters, Strategy
from mtl_jax.sharing.cgc import CGC
from mtl_jax.sharing.cross_stitch import CrossStitch
from mtl_jax.sharing.dbmtl import DBMTL
from mtl_jax.sharing.dselect_k import DSelectK
from mtl_jax.sharing.epnet import EPNet
from mtl_jax.sharing.hamur import HAMUR
from mtl_jax.sharing.home import HoME
from mtl_jax.sharing.links import ESCM2, ESMM, FallingChances, Link, Linked, LogitResidual, chain
from mtl_jax.sharing.ltb import LTB
from mtl_jax.sharing.m2m import M2M
from mtl_jax.sharing.m3oe import M3oE
from mtl_jax.sharing.match import match_parameters
from mtl_jax.sharing.mmoe import MMoE
from mtl_jax.sharing.mtan import MTAN
from mtl_jax.sharing.omoe import OMoE
from mtl_jax.sharing.ple import PLE
from mtl_jax.sharing.ppnet import PPNet
from mtl_jax.sharing.resflow import ResFlow
from mtl_jax.sharing.sar_net import SARNet
from mtl_jax.sharing.shared_bottom import SharedBottom
from mtl_jax.sharing.single_task import SingleTask
from mtl_jax.sharing.sluice import Sluice
from mtl_jax.sharing.snr import SNRAver, SNRTrans
from mtl_jax.sharing.soft_sharing import SoftSharing
from mtl_jax.sharing.star import STAR
from mtl_jax.sharing.stem import STEM

__all__ = [
    "AITM",
    "CGC",
    "DBMTL",
    "ESCM2",
    "ESMM",
    "HAMUR",
    "LTB",
    "M2M",
    "MTAN",
    "PLE",
    "STAR",
    "STEM",
    "AdaSparse",
    "AdaTT",
    "AdaTTSp",
    "AdaptDHM",
    "Context",
    "CrossStitch",
    "DSelectK",
    "EPNet",
    "FallingChances",
    "HoME",
    "Kept",
    "Link",
    "Linked",
    "LogitResidual",
    "M3oE",
    "MMoE",
    "OMoE",
    "PPNet",
    "ResFlow",
    "SARNet",
    "SNRAver",
    "SNRTrans",
    "SharedBottom",
    "SharedParameters",
    "SingleTask",
    "Sluice",
    "SoftSharing",
    "Strategy",
    "chain",
    "match_parameters",
]
