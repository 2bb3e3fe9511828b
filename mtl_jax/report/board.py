"""A live table of an ablation, read from its folder: it shows the runs of any process on any machine that writes there."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from mtl_jax.metrics.kinds import LOWER_IS_BETTER


class State(NamedTuple):
    """How far a run is.

    Attributes:
      share: Of its steps, 1 for a run that has ended.
      monitor: Best monitored number so far, None where there is none yet.
      name: Of that number.
      note: What is going on; empty where nothing is.
    """

    share: float
    monitor: float | None = None
    name: str | None = None
    note: str = ""

    def merit(self) -> float:
        """The number to maximise."""
        return -self.monitor if (self.name or "").rpartition("/")[2] in LOWER_IS_BETTER else self.monitor


class Board:
    """Progress of all arms, time left, and the best validation value so far.

    Args:
      folder: Of the ablation.
      members: The plan, as in ``ablation.json``.
    """

    def __init__(self, folder: str | Path, members: Sequence[Mapping[str, Any]]):
        self.runs = Path(folder) / "runs"
        self.members = members
        self.ended: dict[str, dict[str, Any]] = {}
        self.started, self.begun = time.monotonic(), None

    def table(self) -> Table:
        """The table as of now."""
        states = [(member, self._state(member["run_id"])) for member in self.members]
        arms: dict[tuple[str, str], list[tuple[Mapping[str, Any], State]]] = {}
        for member, state in states:
            arms.setdefault((member["data"], member["arm"]), []).append((member, state))
        best = {key: _best([state for _, state in runs]) for key, runs in arms.items()}
        top = {data: _best([one for (name, _), one in best.items() if one and name == data]) for data, _ in arms}
        title = self._title(sum(state.share for _, state in states), len(states))
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("data")
        table.add_column("arm")
        table.add_column("runs", justify="right")
        table.add_column("best on valid", justify="right")
        table.add_column("now")
        for (data, arm), runs in arms.items():
            found = best[data, arm]
            ended = f"{sum(state.share == 1 for _, state in runs)}/{len(runs)}"
            notes = [f"seed {member['seed']}: {state.note}" for member, state in runs if state.note]
            more = f" and {len(notes) - 1} more" if len(notes) > 1 else ""
            table.add_row(
                escape(data),
                escape(arm),
                ended,
                f"{found.monitor:.4f}" if found else "",
                escape(f"{notes[0]}{more}") if notes else "",
                style="bold" if found and found.monitor == top[data].monitor else None,
            )
        return table

    def _title(self, done: float, total: int) -> str:
        if self.begun is None:
            self.begun = done  # what earlier sittings did says nothing about the speed of this one
        seconds, gained = time.monotonic() - self.started, done - self.begun
        left = seconds * (total - done) / gained if gained > 0 else None
        eta = f", about {_duration(left)} left" if left else ""
        return f"{done:.1f} of {total} runs, {_duration(seconds)}{eta}"

    def _state(self, run_id: str) -> State:
        record, progress = self.ended.get(run_id), None
        if record is None:
            record = _read(self.runs / run_id / "result.json")
            progress = _read(self.runs / run_id / "progress.json")
        if record and record.get("status") == "completed":
            self.ended[run_id] = {"status": "completed", "monitor": record["monitor"]}
            return State(1.0, record["monitor"]["value"], record["monitor"]["name"])
        if record and record.get("status") == "failed" and not self._runs_again(run_id):
            return State(1.0, note=f"FAILED {record['error']['class']}")
        if not progress:
            return State(0.0)
        steps = f"{progress['steps']}/{progress['total']} steps"
        share = min(progress["steps"] / max(progress["total"], 1), 0.999)
        return State(share, progress["monitor"], progress.get("name"), f"epoch {progress['epoch']}, {steps}")

    def _runs_again(self, run_id: str) -> bool:
        """Whether a run that has failed is under way once more: its record stays until the new one is there."""
        record, progress = (self.runs / run_id / name for name in ("result.json", "progress.json"))
        try:
            return progress.stat().st_mtime_ns > record.stat().st_mtime_ns
        except OSError:
            return False


def _best(states: Sequence[State]) -> State | None:
    """The state with the best monitored number, in the direction of its metric."""
    known = [state for state in states if state.monitor is not None]
    return max(known, key=State.merit, default=None)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not there yet, or on its way
        return None
    return content if isinstance(content, dict) else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
