"""The moving average of the parameters against a plain recursion over whole tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.train import average
from mtl_jax.train.average import RowAverage
from mtl_jax.train.tables import compact

DECAY = 0.9


def recursion(history, decay):
    """a_t = sum_s d^(t-s) theta_s / sum_s d^(t-s) over the values after updates 1..t."""
    powers = decay ** np.arange(len(history))[::-1]
    return np.tensordot(powers, np.asarray(history, np.float64), 1) / powers.sum()


def test_is_the_weighted_mean_of_the_values_after_each_update():
    rng = np.random.default_rng(0)
    history = rng.normal(size=(30, 4)).astype(np.float32)
    kept = jnp.full(4, 100.0)  # what stood there before must not matter
    for number, value in enumerate(history, start=1):
        kept = average.update(kept, jnp.asarray(value), jnp.int32(number), DECAY)
        np.testing.assert_allclose(kept, recursion(history[:number], DECAY), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_rows_that_wait_are_brought_forward(decay):
    """Twenty steps that touch some rows each, some twice, some never: at every step the average of the whole table."""
    rng = np.random.default_rng(1)
    table = rng.normal(size=(6, 2)).astype(np.float32)
    kept, slots, history = RowAverage.of(jnp.asarray(table), 0), jnp.zeros(6, jnp.int32), []
    step_rows = jax.jit(lambda *a: average.update_rows(*a[:5], decay, a[5]))
    for number in range(1, 21):
        ids = rng.choice(5, size=3)  # row 5 is never touched
        new = table.copy()
        new[ids] += rng.normal(size=(6, 2)).astype(np.float32)[ids]
        slots, rows = compact(slots, jnp.asarray(ids, jnp.int32))
        kept = step_rows(kept, jnp.asarray(table), jnp.asarray(new), rows, jnp.int32(number), jnp.array(True))
        table = new
        history.append(table)
        now = average.forward(kept.rows, kept.seen, jnp.asarray(table), jnp.int32(number), decay)
        np.testing.assert_allclose(now, recursion(history, decay), rtol=1e-4, atol=1e-5)
    assert np.asarray(kept.seen)[5] == 0


def test_a_step_that_is_skipped_leaves_rows_alone():
    table = jnp.ones((4, 2))
    kept = RowAverage.of(table, 3)
    _, rows = compact(jnp.zeros(4, jnp.int32), jnp.array([1, 2], jnp.int32))
    after = average.update_rows(kept, table, table + 1, rows, jnp.int32(4), DECAY, jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, after, kept)
