"""Learning without forgetting: nothing at the source's values, and then the source's towers alone are held."""

import jax
import numpy as np
import optax
import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.train import Optimizer, fit
from mtl_jax.transfer import FineTune, LwF

OLD = "aux/copy/"


def updates(make_model, make_step, make_batch, strategy, steps=1):
    """Path -> the trained array after so many steps of plain descent."""
    step, state = make_step(make_model(), strategy, optimizer=Optimizer(optax.identity(), 0.1))
    run = jax.jit(step)
    for number in range(steps):
        state, _ = run(state, make_batch(20, number))
    return state.params | state.tables


def test_the_first_step_is_that_of_fine_tuning(make_model, make_step, make_batch):
    """The distance and its gradient are 0 there."""
    plain = updates(make_model, make_step, make_batch, FineTune())
    found = updates(make_model, make_step, make_batch, LwF())
    assert found.keys() - plain.keys() == {f"{OLD}{path}" for path in plain if path.startswith("task/")}
    for path, array in plain.items():
        np.testing.assert_allclose(found[path], array, rtol=1e-6, atol=1e-7)


def test_later_the_term_pulls_on_what_both_towers_read_and_on_the_old_towers(make_model, make_step, make_batch):
    """The target's towers are free: within a step only shared layers and the old towers know of the term."""
    without = updates(make_model, make_step, make_batch, LwF(weight=1e-9), steps=2)
    with_term = updates(make_model, make_step, make_batch, LwF(weight=5.0), steps=2)
    towers = {path for path in without if path.startswith("task/")}
    apart = {path for path in without if not np.allclose(without[path], with_term[path], rtol=1e-6, atol=1e-8)}
    assert apart == without.keys() - towers


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_without_the_factor_the_term_is_smaller_by_the_squared_temperature(
    make_model, make_step, make_batch, temperature
):
    papers = LwF(weight=2.0, temperature=temperature, t_squared=False)
    same = LwF(weight=2.0 / temperature**2, temperature=temperature)
    one, other = (updates(make_model, make_step, make_batch, strategy, steps=2) for strategy in (papers, same))
    for path, array in one.items():
        np.testing.assert_allclose(other[path], array, rtol=1e-5, atol=1e-7)


def test_towers_have_to_come_from_the_source(make_model, make_data, arrays_of):
    """Their copies would hold initial values in place."""
    model = make_model()
    origin = {path: not path.startswith("task/spend") for path in arrays_of(model)}
    with pytest.raises(ConfigError, match=r"'LwF' asks towers of the source, and those of \['spend'\] did not come"):
        fit(model, make_data(), adaptation=LwF(), origin=origin, epochs=1, batch_size=11)
