"""What a run tells while it trains, and a bar that shows it on a terminal."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

History = Sequence[Mapping[str, Any]]


class Observer(Protocol):
    """Is told how a run goes. Whoever derives from it overrides what concerns it; the rest does nothing.

    All values are host numbers, but for the arrays that an observer asks for. Nothing here may change a result.

    Attributes:
      wants_arrays: Whether :meth:`parameters` is called.
    """

    wants_arrays: bool = False

    def started(self, *, total_steps: int, done_steps: int) -> None:
        """Once, before compilation; a resumed run has ``done_steps`` behind it."""

    def advanced(
        self,
        *,
        steps: int,
        epoch: int,
        losses: Mapping[str, float],
        examples_per_second: float,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """After every call to the device.

        Args:
          steps: Of this call.
          epoch: Under way, from 1.
          losses: Mean of each task over the epoch so far; NaN without a label.
          examples_per_second: Of this call.
          weights: Mean balancing weight of each task over the epoch so far, where known.
        """

    def evaluated(
        self, *, epoch: int, values: Mapping[str, float | None], monitor: float | None, best: bool, history: History
    ) -> None:
        """After every evaluation on validation; ``history`` is that of the whole run."""

    def parameters(self, step: int, arrays: Mapping[str, Any]) -> None:
        """After every epoch, where :attr:`wants_arrays`; path -> device array, alive during this call only."""

    def saved(self, *, step: int) -> None:
        """After every checkpoint."""

    def finished(self) -> None:
        """Once, however training ends."""


class Quiet(Observer):
    """Shows nothing."""


class Observers(Observer):
    """Several observers as one: each is told everything, in their order."""

    def __init__(self, *observers: Observer):
        self.observers = observers
        self.wants_arrays = any(observer.wants_arrays for observer in observers)

    def started(self, **facts: Any) -> None:
        for observer in self.observers:
            observer.started(**facts)

    def advanced(self, **facts: Any) -> None:
        for observer in self.observers:
            observer.advanced(**facts)

    def evaluated(self, **facts: Any) -> None:
        for observer in self.observers:
            observer.evaluated(**facts)

    def parameters(self, step: int, arrays: Mapping[str, Any]) -> None:
        for observer in self.observers:
            if observer.wants_arrays:
                observer.parameters(step, arrays)

    def saved(self, **facts: Any) -> None:
        for observer in self.observers:
            observer.saved(**facts)

    def finished(self) -> None:
        """Ends every observer, also where one before it fails: a bar must give the terminal back."""
        failures = []
        for observer in self.observers:
            try:
                observer.finished()
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]


class Bar(Observer):
    """A progress bar, with a line for every evaluation above it.

    Args:
      console: Where it is drawn; standard error by default.
      device: Gives the text about the device (see :meth:`mtl_jax.train.device_use.DeviceUse.line`).
    """

    def __init__(self, console: Console | None = None, *, device: Callable[[], str] = lambda: ""):
        self.console = console or Console(stderr=True)
        self.device = device
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[speed]}"),
            TextColumn("{task.fields[device]}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    @classmethod
    def on_terminal(cls, *, device: Callable[[], str] = lambda: "") -> "Self | Quiet":
        """A bar where standard error is a terminal, else nothing."""
        return cls(device=device) if sys.stderr.isatty() else Quiet()

    def started(self, *, total_steps: int, done_steps: int) -> None:
        fields = {"epoch": 1, "losses": "compiling", "speed": "", "device": ""}
        self.task = self.progress.add_task("train", total=total_steps, completed=done_steps, **fields)
        self.progress.start()

    def advanced(
        self,
        *,
        steps: int,
        epoch: int,
        losses: Mapping[str, float],
        examples_per_second: float,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        text = "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
        speed = f"{examples_per_second:,.0f} ex/s"
        self.progress.update(self.task, advance=steps, epoch=epoch, losses=text, speed=speed, device=self.device())

    def evaluated(
        self, *, epoch: int, values: Mapping[str, float | None], monitor: float | None, best: bool, history: History
    ) -> None:
        text = "  ".join(f"{name} {'n/a' if value is None else f'{value:.4f}'}" for name, value in values.items())
        shown = "n/a" if monitor is None else f"{monitor:.4f}"
        self.progress.console.print(f"epoch {epoch:>3}  {text}  monitor {shown}{'  best' if best else ''}")

    def finished(self) -> None:
        self.progress.stop()
