"""Layers, from tables to towers: Flax NNX modules without random state."""

from mtl_jax.nn.adapter import Adapter, Adapters
from mtl_jax.nn.augmented_tower import AugmentedTower
from mtl_jax.nn.batch_norm import BatchNorm
from mtl_jax.nn.context import Context, stream
from mtl_jax.nn.cross_encoder import CrossEncoder
from mtl_jax.nn.domain_linear import DomainLinear
from mtl_jax.nn.domain_tower import DomainTower
from mtl_jax.nn.embedding import Lookup, Table
from mtl_jax.nn.encoder import Encoder
from mtl_jax.nn.experts import Experts, StackedLinear
from mtl_jax.nn.fm_encoder import FMEncoder
from mtl_jax.nn.gate import Gate, mix
from mtl_jax.nn.gate_nu import GateNU
from mtl_jax.nn.gru import GRU
from mtl_jax.nn.mean import Mean
from mtl_jax.nn.mlp import MLP, Linear, dropout
from mtl_jax.nn.outputs import Cutpoints, Dispersion
from mtl_jax.nn.partitioned_norm import PartitionedNorm
from mtl_jax.nn.stacked_batch_norm import StackedBatchNorm
from mtl_jax.nn.state import State
from mtl_jax.nn.target_attention import TargetAttention
from mtl_jax.nn.tower import Tower
from mtl_jax.nn.transformer import Transformer

__all__ = [
    "GRU",
    "MLP",
    "Adapter",
    "Adapters",
    "AugmentedTower",
    "BatchNorm",
    "Context",
    "CrossEncoder",
    "Cutpoints",
    "Dispersion",
    "DomainLinear",
    "DomainTower",
    "Encoder",
    "Experts",
    "FMEncoder",
    "Gate",
    "GateNU",
    "Linear",
    "Lookup",
    "Mean",
    "PartitionedNorm",
    "StackedBatchNorm",
    "StackedLinear",
    "State",
    "Table",
    "TargetAttention",
    "Tower",
    "Transformer",
    "dropout",
    "mix",
    "stream",
]
