"""The traced calls: the second to the fourth, closed however the run ends."""

import jax
import jax.numpy as jnp
import pytest

from mtl_jax.train.profiler import Profiler


@pytest.mark.parametrize(("calls", "traced"), [(0, False), (1, True), (3, True), (6, True)])
def test_a_trace_of_what_there_is(calls, traced, tmp_path):
    """A run of one call has a trace of what followed it; profiling can start again, since every trace was closed."""
    profiler = Profiler(tmp_path)
    profiler.started(total_steps=6, done_steps=0)
    for _ in range(calls):
        jax.block_until_ready(jnp.ones(3) + 1)
        profiler.advanced(steps=1, epoch=1, losses={}, examples_per_second=1.0)
    assert profiler.tracing == (1 <= calls < 4)
    profiler.finished()
    files = list(tmp_path.rglob("*.xplane.pb"))
    assert bool(files) == traced and all(path.stat().st_size for path in files)
    jax.profiler.start_trace(tmp_path / "other")
    jax.profiler.stop_trace()
