"""What is kept and shown of a configured run while it trains: the observers that ``trainer.*`` asks for."""

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from mtl_jax.arguments import shown
from mtl_jax.errors import ConfigError, RunFolderError
from mtl_jax.report.folder import RunFolder, plain
from mtl_jax.train.device_use import DeviceUse
from mtl_jax.train.profiler import Profiler
from mtl_jax.train.progress import Bar, History, Observer, Observers, Quiet
from mtl_jax.train.tensorboard import TensorBoard, check_installed

LOG = "log.jsonl"
OPTIONS = ("progress", "tensorboard", "profile")
"""Keys of ``trainer`` that are read here."""


def observe(home: RunFolder, options: Mapping[str, Any]) -> Observer:
    """The observers of a run: its logs, and what ``options`` ask for.

    Args:
      home: The run folder; ``log.jsonl``, ``tensorboard/`` and ``profile/`` go there.
      options: With the keys :data:`OPTIONS`.

    Raises:
      ConfigError: See :func:`check_options`.
    """
    check_options(options)
    device = DeviceUse()
    observers: list[Observer] = [RunLog(home, device=device.line), JsonLines(home, device=device.sample)]
    if options["tensorboard"]:
        observers.append(TensorBoard(home.path / "tensorboard"))
    if options["profile"]:
        observers.append(Profiler(home.path / "profile"))
    return Observers(*observers, _bar(options["progress"], device.line))


def check_options(options: Mapping[str, Any]) -> None:
    """Raises a ConfigError for a value that is not allowed, or a package that is not installed."""
    for name in OPTIONS:
        value = options[name]
        if not isinstance(value, bool) and (name, value) != ("progress", "auto"):
            expected = "auto, true or false" if name == "progress" else "true or false"
            raise ConfigError(f"trainer.{name} is {shown(value)}; expected {expected}. Change it")
    if options["tensorboard"]:
        check_installed()


class ProgressFile(Observer):
    """Where a run stands, in ``progress.json``, for whoever watches many runs from outside.

    Args:
      home: The run folder.
      monitor: Name of the number that the run is selected by.
      seconds: Shortest time between two writes.
    """

    def __init__(self, home: RunFolder, *, monitor: str, seconds: float = 1.0):
        self.home, self.name, self.seconds, self.written = home, monitor, seconds, 0.0
        self.facts: dict[str, Any] = {}

    def started(self, *, total_steps: int, done_steps: int) -> None:
        fresh = {"epoch": 1, "monitor": None}
        earlier = self._earlier() if done_steps else {}  # what was best before an interruption still is
        kept = {key: earlier.get(key, value) for key, value in fresh.items()}
        self.facts = {"steps": done_steps, "total": total_steps, "name": self.name} | kept
        self._write()

    def advanced(self, *, steps: int, epoch: int, examples_per_second: float, **_: Any) -> None:
        steps += self.facts["steps"]
        self.facts |= {"steps": steps, "epoch": epoch, "examples_per_second": examples_per_second}
        if time.monotonic() - self.written >= self.seconds:
            self._write()

    def evaluated(self, *, epoch: int, monitor: float | None, best: bool, **_: Any) -> None:
        if best:
            self.facts["monitor"] = monitor
        self._write()

    def _earlier(self) -> dict[str, Any]:
        try:
            return self.home.read_json("progress.json") or {}
        except (RunFolderError, OSError):
            return {}

    def _write(self) -> None:
        self.written = time.monotonic()
        with contextlib.suppress(RunFolderError):  # what is only looked at must not end a run
            self.home.write_json("progress.json", self.facts)


class RunLog(Observer):
    """Curves into ``history.parquet`` and a line for every epoch into ``run.log``."""

    def __init__(self, home: RunFolder, *, device: Callable[[], str]):
        self.home, self.device = home, device

    def evaluated(
        self, *, epoch: int, values: Mapping[str, float | None], monitor: float | None, best: bool, history: History
    ) -> None:
        self.home.write_history(history)
        text = "  ".join(f"{name} {_shown(value)}" for name, value in values.items())
        self.home.log(f"epoch {epoch}  {text}  monitor {_shown(monitor)}")
        self.home.log(f"device {self.device()}")


class JsonLines(Observer):
    """One JSON object an event in ``log.jsonl``, each line written at once, so that a kill leaves whole lines.

    Every object has ``time`` (UTC) and ``event``: ``started``, ``advanced`` (at most one in ``seconds``), ``evaluated``,
    ``checkpoint`` or ``finished``; and, where they apply, ``step``, ``epoch``, ``losses``, ``weights``,
    ``examples_per_second``, ``device``, ``values``, ``monitor`` and ``best``. Steps count over the whole run, and a
    resumed run appends.

    Args:
      home: The run folder.
      device: Gives the facts about the device.
      seconds: Between two lines about calls to the device.
      clock: Monotonic seconds.
    """

    def __init__(
        self,
        home: RunFolder,
        *,
        device: Callable[[], Mapping[str, Any]] = dict,
        seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.home, self.device, self.seconds, self.clock = home, device, seconds, clock
        self.step = 0
        self.told: float | None = None

    def started(self, *, total_steps: int, done_steps: int) -> None:
        self.step = done_steps
        self._write("started", step=done_steps, total_steps=total_steps, device=self.device())

    def advanced(self, *, steps: int, weights: Mapping[str, float] | None = None, **facts: Any) -> None:
        self.step += steps
        now = self.clock()
        if self.told is None or now - self.told >= self.seconds:
            self.told = now
            known = {} if weights is None else {"weights": weights}
            self._write("advanced", step=self.step, **facts, **known, device=self.device())

    def evaluated(self, *, history: History, **facts: Any) -> None:
        step = history[-1]["step"] if history else self.step
        latest = [row for row in history if row["step"] == step and row["part"] == "train" and row["task"]]
        losses = {row["task"]: row["value"] for row in latest if row["name"] == "loss"}
        weights = {row["task"]: row["value"] for row in latest if row["name"] == "weight"}
        self._write("evaluated", step=step, **facts, losses=losses, weights=weights)

    def saved(self, *, step: int) -> None:
        self._write("checkpoint", step=step)

    def finished(self) -> None:
        self._write("finished", step=self.step)

    def _write(self, event: str, **facts: Any) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self.home.append(LOG, json.dumps(plain({"time": now, "event": event} | facts), allow_nan=False))


def _bar(progress: bool | str, device: Callable[[], str]) -> Bar | Quiet:
    if progress == "auto":
        return Bar.on_terminal(device=device)
    return Bar(device=device) if progress else Quiet()


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.5f}"
