"""Adapters in every strategy: they are read, below the cut, and where there is no place for any that is said."""

import cases
import cases_chains
import cases_domains
import cases_stateful_domains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.model import ADAPTER, label
from mtl_jax.train.cut_model import below_cut, in_scope
from mtl_jax.train.state import Functional
from mtl_jax.transfer import Adapter

EVERY = cases.CASES | cases_chains.CASES | cases_domains.CASES | cases_stateful_domains.CASES
CASES = {name: case for name, case in EVERY.items() if "," not in name}
WITHOUT = (
    "single_task", "soft_sharing", "cross_stitch", "sluice", "mtan", "snr_trans", "snr_aver", "resflow", "ltb", "ppnet",
    "pepnet", "adapt_dhm",
)  # fmt: skip
"""Strategies without a shared layer that is one of an MLP or of experts."""
SLOW = ("home", "omoe", "cgc", "dselect_k", "adatt_sp", "m3oe")
"""Their experts are read as those of others are."""


class Holder(nnx.Module):
    """What holds a strategy as a model does."""

    def __init__(self, sharing):
        self.sharing = sharing


def prepared(name):
    return Adapter(3).prepared(Holder(cases.make(CASES[name])), jax.random.key(0))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES if name not in WITHOUT]
)
def test_adapters_are_read_below_the_cut(name):
    """Each has a gradient, and heads give what they gave without a number in them."""
    functional, params, rest = Functional.of(prepared(name))
    rng = np.random.default_rng(0)
    added = {
        path: rng.normal(size=array.shape).astype(np.float32)
        for path, array in params.items()
        if label(path) == ADAPTER
    }
    x = cases.rows(number=64)
    context = cases.context(len(x))

    def build(added):
        return functional.merge(params | added, rest).sharing

    def squared(added):
        strategy = build(added)
        common = strategy.common(x, context)
        outputs = {task: strategy.head(task, common) for task in strategy.tasks}
        return sum(jnp.sum(z**2) for z in outputs.values()), (outputs, common)

    gradient, (outputs, common) = jax.jit(jax.grad(squared, has_aux=True))(added)
    assert added and all(below_cut(path) and in_scope(path, "encoder") for path in added)
    assert [path for path, slope in gradient.items() if not np.any(slope)] == []
    without = build({path: np.nan * array for path, array in added.items()})
    heads = jax.jit(lambda common: {task: without.head(task, common) for task in outputs})(common)
    for task, expected in outputs.items():
        np.testing.assert_allclose(heads[task], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_strategy_without_a_place_for_them_is_refused(name):
    with pytest.raises(
        ConfigError, match=r"transfer.targets is '\.\*', which no shared layer of '\w+' that an adapter"
    ):
        prepared(name)
