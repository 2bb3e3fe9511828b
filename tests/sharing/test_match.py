"""Equal numbers of parameters, by one multiplier of all widths."""

import functools

import jax
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.sharing import (
    PLE,
    AdaTT,
    CrossStitch,
    EPNet,
    HoME,
    M3oE,
    MMoE,
    PPNet,
    SharedBottom,
    SNRTrans,
    match_parameters,
)
from mtl_jax.sharing.match import number_of_parameters

TASKS = ("click", "buy", "return")


def count(strategy):
    return number_of_parameters(strategy, 80, TASKS)


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (SharedBottom, 60_000),
        (MMoE, 60_000),
        (PLE, 60_000),
        (AdaTT, 400_000),
        (CrossStitch, 60_000),
        pytest.param(SNRTrans, 400_000, marks=pytest.mark.slow),
        pytest.param(HoME, 900_000, marks=pytest.mark.slow),
        pytest.param(functools.partial(M3oE, num_domains=3), 400_000, marks=pytest.mark.slow),
        pytest.param(functools.partial(EPNet, num_domains=3), 100_000, marks=pytest.mark.slow),
        (functools.partial(EPNet, num_domains=3, prior_features=8, inner=PPNet), 400_000),
    ],
)
def test_within_one_percent(kind, target):
    found = match_parameters(functools.partial(kind), target, count)
    sharing = found(80, TASKS, rngs=nnx.Rngs(0))
    number = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(sharing, nnx.Param)))
    assert abs(number - target) <= 0.01 * target
    assert number == count(found)


def test_other_options_stay():
    found = match_parameters(functools.partial(MMoE, num_experts=5, expert_units=(40, 20)), 50_000, count)
    assert found.keywords["num_experts"] == 5
    wide, narrow = found.keywords["expert_units"]
    assert abs(wide - 2 * narrow) <= 2


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(ConfigError, match="at most 1% off"):
        match_parameters(functools.partial(SharedBottom, units=(8,)), 125, count)

    class Odd(SharedBottom):
        widths = ()

    with pytest.raises(ConfigError, match="names no widths"):
        match_parameters(functools.partial(Odd), 125, count)
