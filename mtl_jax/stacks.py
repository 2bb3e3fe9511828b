"""Which runs were trained together, so that a later process goes on with them together."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from mtl_jax.report.folder import RunFolder

MEMBERS = "members.json"


class Stacks:
    """The folder with the checkpoints of stacks, each in a folder of its own beside the list of its runs.

    Runs that are trained together have one checkpoint. How many fit together can be another number tomorrow (memory,
    measured speed, runs that have ended since), and the checkpoint would then belong to nobody.

    Args:
      path: Of the folder; made when the first stack begins, and removed with the last one.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, run_ids: Sequence[str], size: int) -> Path:
        """The folder for the checkpoints of a stack of these runs, on ``size`` places."""
        folder = self._folder(run_ids)
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).write_json(MEMBERS, {"run_ids": list(run_ids), "size": size})
        return folder

    def of(self, run_ids: Collection[str]) -> list[list[str]]:
        """The runs of each stack that was begun and not forgotten, of those stacks that hold none but ``run_ids``."""
        known = [json.loads(path.read_bytes())["run_ids"] for path in sorted(self.path.glob(f"*/{MEMBERS}"))]
        return [names for names in known if set(names) <= set(run_ids)]

    def size(self, run_ids: Sequence[str]) -> int:
        """Places of a stack that was begun."""
        return json.loads((self._folder(run_ids) / MEMBERS).read_bytes())["size"]

    def forget(self, run_ids: Sequence[str]) -> None:
        """Removes the checkpoints of a stack."""
        shutil.rmtree(self._folder(run_ids), ignore_errors=True)
        with contextlib.suppress(OSError):  # of other arms there may be some left
            self.path.rmdir()

    def _folder(self, run_ids: Sequence[str]) -> Path:
        return self.path / hashlib.sha256(json.dumps(list(run_ids)).encode()).hexdigest()[:16]
