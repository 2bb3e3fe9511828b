"""Checkpoints: the whole train state with the position in the run, written atomically by Orbax."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from mtl_jax.errors import RunFolderError

logger = logging.getLogger(__name__)
State = TypeVar("State")
KEEP = 2
"""Newest checkpoints kept beside the best one: the older of the two is there for a damaged newer one."""


class Checkpoints:
    """The checkpoints of one run, one folder each, named by step.

    Args:
      path: Absolute or relative folder; made when missing.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        self.path.mkdir(parents=True, exist_ok=True)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending. An unfinished write has another name until it is complete."""
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.is_dir() and entry.name.isdecimal())

    def save(self, step: int, state: Any, progress: dict[str, Any], *, best: int | None) -> None:
        """Writes the state and a JSON-like ``progress``, then drops all but the newest and the best checkpoints."""
        folder = self.path / str(step)
        if folder.exists():  # a rerun over a damaged or equal checkpoint
            shutil.rmtree(folder)
        # One array of characters, because Orbax would write every number of a long history as an array of its own.
        characters = np.frombuffer(json.dumps(progress).encode(), np.uint8)
        ocp.save_checkpointables(folder, {"state": state, "progress": {"json": characters}})
        for old in self.steps()[:-KEEP]:
            if old != best:
                shutil.rmtree(self.path / str(old))

    def latest(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with ``like`` as the template of the state; None without any.

        Raises:
          RunFolderError: There are checkpoints and none fits.
        """
        faults = []
        for step in reversed(self.steps()):
            try:
                return self.load(step, like)
            except RunFolderError as error:
                logger.warning("checkpoint of step %d cannot be read; trying an older one", step)
                faults.append(error)
        if faults:
            raise faults[0]
        return None

    def load(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """The checkpoint of one step.

        Raises:
          RunFolderError: It is damaged, or belongs to another model or optimizer.
        """
        template = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        folder = self.path / str(step)
        try:
            loaded = ocp.load_checkpointables(folder, {"state": template, "progress": None})
        except Exception as error:  # Orbax raises whatever its storage layers raise
            raise RunFolderError(
                f"checkpoint '{folder}' cannot be read ({type(error).__name__}); expected the state of this model and "
                "optimizer, undamaged. Remove that folder, or start in a new run folder"
            ) from error
        return loaded["state"], json.loads(bytes(np.asarray(loaded["progress"]["json"])))
