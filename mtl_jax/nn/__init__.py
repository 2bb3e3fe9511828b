"""Layers: tables, encoder, MLP, experts, gate, tower, parameters of losses. Flax NNX modules without random state."""

from mtl_jax.nn.context import Context, stream
from mtl_jax.nn.embedding import Lookup, Table
from mtl_jax.nn.encoder import Encoder
from mtl_jax.nn.experts import Experts, StackedLinear
from mtl_jax.nn.gate import Gate
from mtl_jax.nn.mlp import MLP, Linear, dropout
from mtl_jax.nn.outputs import Cutpoints, Dispersion
from mtl_jax.nn.tower import Tower

__all__ = [
    "MLP",
    "Context",
    "Cutpoints",
    "Dispersion",
    "Encoder",
    "Experts",
    "Gate",
    "Linear",
    "Lookup",
    "StackedLinear",
    "Table",
    "Tower",
    "dropout",
    "stream",
]
