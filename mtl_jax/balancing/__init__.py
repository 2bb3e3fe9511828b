"""Balancing: one loss weighting or gradient aggregator a file; needs jax, optax and numpy only."""

from mtl_jax.balancing.aligned_mtl import aligned_mtl
from mtl_jax.balancing.as_optax import as_optax
from mtl_jax.balancing.base import Balancer, NoState, TaskLike, aggregate
from mtl_jax.balancing.cagrad import cagrad
from mtl_jax.balancing.config import config
from mtl_jax.balancing.cosmos import cosmos
from mtl_jax.balancing.cr_mogm import cr_mogm
from mtl_jax.balancing.db_mtl import db_mtl
from mtl_jax.balancing.dual_proj import dual_proj
from mtl_jax.balancing.dwa import dwa
from mtl_jax.balancing.equal import equal
from mtl_jax.balancing.excess_mtl import excess_mtl
from mtl_jax.balancing.fairgrad import fairgrad
from mtl_jax.balancing.famo import famo
from mtl_jax.balancing.fixed import fixed
from mtl_jax.balancing.geometric import geometric
from mtl_jax.balancing.go4align import go4align
from mtl_jax.balancing.graddrop import graddrop
from mtl_jax.balancing.gradnorm import gradnorm
from mtl_jax.balancing.gradvac import gradvac
from mtl_jax.balancing.imtl import imtl
from mtl_jax.balancing.imtl_g import imtl_g
from mtl_jax.balancing.imtl_l import imtl_l
from mtl_jax.balancing.krum import krum
from mtl_jax.balancing.ldc_mtl import ldc_mtl
from mtl_jax.balancing.m_config import m_config
from mtl_jax.balancing.metabalance import metabalance
from mtl_jax.balancing.mgda import mgda
from mtl_jax.balancing.moco import moco
from mtl_jax.balancing.modo import modo
from mtl_jax.balancing.nash_mtl import nash_mtl
from mtl_jax.balancing.ntkmtl import ntkmtl
from mtl_jax.balancing.pbi import pbi
from mtl_jax.balancing.pcgrad import pcgrad
from mtl_jax.balancing.pe_ltr import pe_ltr
from mtl_jax.balancing.ple_schedule import ple_schedule
from mtl_jax.balancing.random import random
from mtl_jax.balancing.scale_invariant import scale_invariant
from mtl_jax.balancing.sdmgrad import sdmgrad
from mtl_jax.balancing.stch import stch
from mtl_jax.balancing.trimmed_mean import trimmed_mean
from mtl_jax.balancing.uncertainty import uncertainty
from mtl_jax.balancing.upgrad import upgrad

__all__ = [
    "Balancer",
    "NoState",
    "TaskLike",
    "aggregate",
    "aligned_mtl",
    "as_optax",
    "cagrad",
    "config",
    "cosmos",
    "cr_mogm",
    "db_mtl",
    "dual_proj",
    "dwa",
    "equal",
    "excess_mtl",
    "fairgrad",
    "famo",
    "fixed",
    "geometric",
    "go4align",
    "graddrop",
    "gradnorm",
    "gradvac",
    "imtl",
    "imtl_g",
    "imtl_l",
    "krum",
    "ldc_mtl",
    "m_config",
    "metabalance",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "ntkmtl",
    "pbi",
    "pcgrad",
    "pe_ltr",
    "ple_schedule",
    "random",
    "scale_invariant",
    "sdmgrad",
    "stch",
    "trimmed_mean",
    "uncertainty",
    "upgrad",
]
