"""A live table of an ablation, read from its folder: it shows the runs of any process on any machine that writes there."""

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

UNFINISHED = ("interrupted", None)


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
        shares, best, running = defaultdict(list), {}, defaultdict(list)
        for member in self.members:
            key = (member["data"], member["arm"])
            share, monitor, note = self._state(member["run_id"])
            shares[key].append(share)
            if monitor is not None:
                best[key] = max(monitor, best.get(key, monitor))
            if note:
                running[key].append(f"seed {member['seed']}: {note}")
        every = [share for values in shares.values() for share in values]
        table = Table(
            title=self._title(sum(every), len(every)), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        table.add_column("data")
        table.add_column("arm")
        table.add_column("runs", justify="right")
        table.add_column("best on valid", justify="right")
        table.add_column("now")
        top = max(best.values(), default=None)
        for key, values in shares.items():
            value = best.get(key)
            shown = "" if value is None else f"{value:.4f}"
            notes = running[key]
            now = f"{notes[0]}{f' and {len(notes) - 1} more' if len(notes) > 1 else ''}" if notes else ""
            style = "bold" if value is not None and value == top else None
            table.add_row(*key, f"{sum(v == 1 for v in values)}/{len(values)}", shown, now, style=style)
        return table

    def _title(self, done: float, total: int) -> str:
        if self.begun is None:
            self.begun = done  # what earlier sittings did says nothing about the speed of this one
        seconds, gained = time.monotonic() - self.started, done - self.begun
        left = seconds * (total - done) / gained if gained > 0 else None
        eta = f", about {_duration(left)} left" if left else ""
        return f"{done:.1f} of {total} runs, {_duration(seconds)}{eta}"

    def _state(self, run_id: str) -> tuple[float, float | None, str]:
        """Share that is done, best monitor so far, and what is going on."""
        record = self.ended.get(run_id) or _read(self.runs / run_id / "result.json")
        if record and record.get("status") not in UNFINISHED:
            self.ended[run_id] = record
            if record["status"] == "failed":
                return 1.0, None, f"FAILED {record['error']['class']}"
            return 1.0, record["monitor"]["value"], ""
        progress = _read(self.runs / run_id / "progress.json")
        if not progress:
            return 0.0, None, ""
        share = min(progress["steps"] / max(progress["total"], 1), 0.999)
        return share, progress["monitor"], f"epoch {progress['epoch']}, {progress['steps']}/{progress['total']} steps"


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
