"""Profiler: a trace of a few calls to the device, for TensorBoard's profile plugin, XProf or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from mtl_jax.train.progress import Observer

FIRST, LAST = 2, 4
"""Calls to the device that are traced, counted from 1: the first one may still load and warm up."""


class Profiler(Observer):
    """Traces the second to the fourth call of a process by ``jax.profiler``, with the host work between them.

    Results do not depend on it; a run of a single call, or one that has nothing left to train, leaves no trace.

    Args:
      path: Folder of the trace, made where it is missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.calls = 0
        self.tracing = False

    def advanced(self, **facts: Any) -> None:
        self.calls += 1
        if self.calls == FIRST - 1:
            self.path.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.path)
            self.tracing = True
        elif self.calls == LAST:
            self._stop()

    def finished(self) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.tracing:
            self.tracing = False
            jax.profiler.stop_trace()
