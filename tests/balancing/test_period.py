"""Periods of n calls, and means over the calls of one."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.period import add_losses, checked_period, count_call, no_means
from mtl_jax.errors import ConfigError


class Counter(NamedTuple):
    ended: jnp.ndarray
    calls: jnp.ndarray


def test_every_n_calls_end_a_period_and_epochs_end_none():
    for period, expected in ((1, [1, 2, 3, 4, 5, 6, 7]), (3, [0, 0, 1, 1, 1, 2, 2]), ("epoch", [0] * 7)):
        state, ended = Counter(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)), []
        for _ in range(7):
            state = count_call(state, period, lambda s: s._replace(ended=s.ended + 1))
            ended.append(int(state.ended))
        assert ended == expected


def test_means_count_the_calls_with_the_tasks_labels():
    losses = np.random.default_rng(0).uniform(0, 5, size=(7, 3)).astype(np.float32)
    active = np.array([[True, call % 2 == 0, False] for call in range(7)])
    means = no_means(3)
    for loss, present in zip(losses, active, strict=True):
        means = add_losses(means, jnp.where(present, loss, jnp.nan), jnp.asarray(present))
    np.testing.assert_array_equal(means.count, [7, 4, 0])
    np.testing.assert_allclose(means.value, [losses[:, 0].mean(), losses[::2, 1].mean(), 0], rtol=1e-6)


@pytest.mark.parametrize("period", ["epochs", 0, -1, 2.0, True, None])
def test_what_is_no_period_is_refused(period):
    with pytest.raises(ConfigError, match=r"dwa\(period\) is .*; expected 'epoch' or a whole number"):
        checked_period(period, "dwa(period)")
