"""Checkpoints: the whole train state with the position in the run, whole or absent, and checked before it is used."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from mtl_jax.errors import DamagedCheckpoint, RunFolderError
from mtl_jax.train.manifest import damaged, read_facts, read_manifest, write_json, write_manifest
from mtl_jax.train.storage import check_room, read_arrays, sync, unwritable, write_arrays

logger = logging.getLogger(__name__)
State = TypeVar("State")
KEEP = 2
"""Newest checkpoints kept beside the best ones: the older of the two is there for a damaged newer one."""
PARTIAL = ".partial"
SHOWN = 4


class Checkpoints:
    """The checkpoints of one run, one folder each, named by step.

    A folder holds ``state/`` (the arrays, by Orbax), ``progress.json`` and ``manifest.json`` with a checksum of every
    file. It is written under another name and renamed when it is complete.

    Args:
      path: Absolute or relative folder; made when missing.
      identity: Facts that tell this run from others whose arrays have the same shapes, such as the hash of the schema;
        a checkpoint that was written under other values is refused.

    Raises:
      RunFolderError: The folder cannot be made.
    """

    def __init__(self, path: str | Path, *, identity: Mapping[str, str] | None = None):
        self.path = Path(path).resolve()
        self.identity = dict(identity or {})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending. An unfinished write has another name until it is complete."""
        return sorted(int(entry.name) for entry in self.path.iterdir() if entry.is_dir() and entry.name.isdecimal())

    def save(self, step: int, state: Any, progress: dict[str, Any], *, best: int | None) -> None:
        """Writes the state and a JSON-like ``progress``, then drops what no kept checkpoint needs.

        The newest checkpoints stay, and the best one of each of them: whichever is gone on from, its selection is there.

        Raises:
          RunFolderFull: No room. The checkpoints that were there are as before, and nothing half-written stays.
          RunFolderError: The folder cannot be written for another reason; the same holds.
        """
        arrays = _flat(state)
        self._sweep()
        partial = self._hidden(step)
        try:
            check_room(self.path, arrays)
            partial.mkdir()
            write_arrays(partial / "state", _filled(arrays))
            write_json(partial / "progress.json", progress)
            kept = best if best is None or best == step or self._folder(best).exists() else None
            write_manifest(partial, {"arrays": _describe(arrays), "best": kept, "identity": self.identity})
            sync(partial)
            if self._folder(step).exists():  # a rerun over a damaged or equal checkpoint
                self._drop(step)
            partial.rename(self._folder(step))
            sync(self.path)
        except RunFolderError:
            raise
        except Exception as error:  # whatever the storage layers raise
            raise unwritable(self._folder(step), error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in set(self.steps()) - self._needed():
            self._drop(old)

    def latest(self, like: State | Callable[[dict[str, Any]], State]) -> tuple[State, dict[str, Any]] | None:
        """The newest undamaged checkpoint; None without any.

        Args:
          like: The template of the state, or a function that makes it from the progress.

        Raises:
          RunFolderError: There are checkpoints and all are damaged, or the newest good one is of another run.
        """
        faults: list[DamagedCheckpoint] = []
        for step in reversed(self.steps()):
            try:
                found = self.load(step, like)
                self._check_best(step)
            except DamagedCheckpoint as error:
                faults.append(error)
                continue
            for fault in faults:
                logger.warning("%s", fault.args[0].split("; expected")[0])
            if faults:
                logger.warning("going on from the checkpoint of step %d instead", step)
            return found
        if faults:
            raise DamagedCheckpoint(
                f"all {len(faults)} checkpoints are damaged, beginning with the newest: "
                + "; ".join(fault.args[0].split("; expected")[0] for fault in faults)
                + f"; expected one that is whole. Restore one from a copy, or remove '{self.path}' so that the same "
                "command trains from the beginning"
            ) from faults[0]
        return None

    def load(self, step: int, like: State | Callable[[dict[str, Any]], State]) -> tuple[State, dict[str, Any]]:
        """The checkpoint of one step, its arrays placed on devices as those of ``like`` are.

        Args:
          step: One of :meth:`steps`.
          like: The template of the state, or a function that makes it from the progress.

        Raises:
          DamagedCheckpoint: A file is missing, or is not what was written.
          RunFolderError: It belongs to another model, schema or optimizer; the message names what differs.
        """
        folder = self._folder(step)
        facts = read_manifest(folder)
        progress = json.loads((folder / "progress.json").read_bytes())
        if callable(like):
            like = like(progress)
        arrays = _flat(like)
        differences = _compare(facts["arrays"], _describe(arrays)) or _compare_facts(facts["identity"], self.identity)
        if differences:
            raise _another_run(folder, differences)
        try:
            restored = arrays | read_arrays(folder / "state", _filled(arrays))
        except Exception as error:  # whatever the storage layers raise about a file that is as it was written
            raise damaged(folder, f"its arrays cannot be restored ({type(error).__name__}: {error})") from error
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in arrays]), progress

    def progress(self, step: int) -> dict[str, Any]:
        """The progress of one checkpoint, without its arrays.

        Raises:
          DamagedCheckpoint: A file is missing, or is not what was written.
        """
        folder = self._folder(step)
        read_manifest(folder)
        return json.loads((folder / "progress.json").read_bytes())

    def _folder(self, step: int) -> Path:
        return self.path / str(step)

    def _hidden(self, step: int) -> Path:
        return self.path / f".{step}{PARTIAL}"

    def _check_best(self, step: int) -> None:
        """A checkpoint whose selected parameters are gone would be of no use at the end of the run."""
        best = read_facts(self._folder(step))["best"]
        if best is not None and best != step:
            read_manifest(self._folder(best))

    def _needed(self) -> set[int]:
        newest = self.steps()[-KEEP:]
        needed = set(newest)
        for step in newest:
            with contextlib.suppress(DamagedCheckpoint):
                needed.add(read_facts(self._folder(step))["best"])
        return needed

    def _drop(self, step: int) -> None:
        # Under another name first: removal takes many calls, and what a kill leaves of it must not look like a checkpoint.
        hidden = self.path / f".{step}.dropped{PARTIAL}"
        self._folder(step).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _sweep(self) -> None:
        """Removes what killed processes left half-written or half-removed."""
        for leftover in self.path.glob(f".*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)


def _flat(state: Any) -> dict[str, Any]:
    """Path -> leaf. Containers without arrays leave no trace, so that an empty one may be added later."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the state are called '{name}'")
        leaves[name] = leaf
    return leaves


def _filled(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Those with an entry: the storage has no place for others, such as the numeric features of rows that have none."""
    return {name: array for name, array in arrays.items() if array.size}


def _describe(arrays: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{a.dtype}[{','.join(map(str, a.shape))}]" for name, a in arrays.items()}


def _compare(held: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """What differs, in words, the arrays of other shapes first."""
    shapes = [
        f"{name} is {held[name]} there and {wanted[name]} here"
        for name in held
        if wanted.get(name, held[name]) != held[name]
    ]
    surplus = [f"{name} {shape} is there and not here" for name, shape in held.items() if name not in wanted]
    lacking = [f"{name} {shape} is here and not there" for name, shape in wanted.items() if name not in held]
    return shapes + surplus + lacking


def _compare_facts(held: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    names = sorted(held.keys() | wanted.keys())
    return [
        f"its {name} is '{held.get(name)}' there and '{wanted.get(name)}' here"
        for name in names
        if held.get(name) != wanted.get(name)
    ]


def _another_run(folder: Path, differences: list[str]) -> RunFolderError:
    more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
    return RunFolderError(
        f"checkpoint '{folder}' is of another model, schema or optimizer: {', '.join(differences[:SHOWN])}{more}; "
        "expected the state of this model and optimizer. Nothing was changed: go back to the configuration that wrote "
        "it, or start in a new run folder"
    )
