"""What a run shows while it trains: a bar with losses, speed and time left on a terminal, nothing elsewhere."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

History = Sequence[Mapping[str, Any]]


class Observer(Protocol):
    """Is told how a run goes. All values are host numbers; nothing here may touch the device."""

    def started(self, *, total_steps: int, done_steps: int) -> None: ...

    def advanced(self, *, steps: int, epoch: int, losses: Mapping[str, float], examples_per_second: float) -> None: ...

    def evaluated(
        self, *, epoch: int, values: Mapping[str, float | None], monitor: float | None, best: bool, history: History
    ) -> None: ...

    def finished(self) -> None: ...


class Quiet:
    """Shows nothing."""

    def started(self, *, total_steps: int, done_steps: int) -> None:
        pass

    def advanced(self, *, steps: int, epoch: int, losses: Mapping[str, float], examples_per_second: float) -> None:
        pass

    def evaluated(
        self, *, epoch: int, values: Mapping[str, float | None], monitor: float | None, best: bool, history: History
    ) -> None:
        pass

    def finished(self) -> None:
        pass


class Bar:
    """A progress bar, with a line for every evaluation above it."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    @classmethod
    def on_terminal(cls) -> "Self | Quiet":
        """A bar where standard error is a terminal, else nothing."""
        return cls() if sys.stderr.isatty() else Quiet()

    def started(self, *, total_steps: int, done_steps: int) -> None:
        fields = {"epoch": 1, "losses": "compiling", "speed": ""}
        self.task = self.progress.add_task("train", total=total_steps, completed=done_steps, **fields)
        self.progress.start()

    def advanced(self, *, steps: int, epoch: int, losses: Mapping[str, float], examples_per_second: float) -> None:
        text = "  ".join(f"{task} {loss:.4f}" for task, loss in losses.items())
        speed = f"{examples_per_second:,.0f} ex/s"
        self.progress.update(self.task, advance=steps, epoch=epoch, losses=text, speed=speed)

    def evaluated(
        self, *, epoch: int, values: Mapping[str, float | None], monitor: float | None, best: bool, history: History
    ) -> None:
        text = "  ".join(f"{name} {'n/a' if value is None else f'{value:.4f}'}" for name, value in values.items())
        shown = "n/a" if monitor is None else f"{monitor:.4f}"
        self.progress.console.print(f"epoch {epoch:>3}  {text}  monitor {shown}{'  best' if best else ''}")

    def finished(self) -> None:
        self.progress.stop()
