"""Run folders: one folder a run, one process a folder, and files that are whole or absent."""

import contextlib
import datetime
import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import polars as pl

from mtl_jax.errors import FULL_DISK, RunFolderError, RunFolderFull

UNHASHED_KEYS = (
    "seed",  # seeds of one configuration share its hash, so that they can be averaged
    "seeds",
    "hydra",  # where and how the job is launched
    "output_dir",
    "allow",  # which packages a configuration may name; the names themselves are hashed
    "data.cache_dir",
    "data.download",
    "data.path",  # the content behind the path is part of the data identity
    "trainer.progress",
    "trainer.tensorboard",
    "trainer.profile",
    "tuning_artefact",
    "folds",  # the folds of one cross-validation, which the data identity tells apart
    "data.split_fold",
)
"""Dotted keys that :func:`config_hash` leaves out: they do not change a result, or are told apart elsewhere."""

HISTORY_SCHEMA = {"step": pl.Int64, "part": pl.String, "task": pl.String, "name": pl.String, "value": pl.Float64}
LEDGER = "test_ledger.jsonl"
PARTIAL = ".partial"


def config_hash(config: Mapping[str, Any]) -> str:
    """The first 12 hex digits of the sha256 over the sorted JSON of ``config`` without :data:`UNHASHED_KEYS`.

    The order of keys does not matter, tuples equal lists, and the value is the same in every process.
    """
    kept = _without(config, UNHASHED_KEYS)
    text = json.dumps(_plain(kept), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_id(config: Mapping[str, Any], *, seed: int, data_identity: str) -> str:
    """Name of a run, ``<config hash>-<data identity>-s<seed>``.

    The same command on the same data gives the same name, which is how it finds its unfinished or finished run. The
    code version is recorded by the run, not hashed.

    Args:
      config: Resolved configuration, plain containers.
      seed: Of the training run.
      data_identity: sha256 over the data set, its recipe and its split; its first 8 digits enter.
    """
    return f"{config_hash(config)}-{data_identity[:8]}-s{seed}"


class RunFolder:
    """An open run folder; only :meth:`open` makes one.

    Every write replaces a file as a whole, so a kill at any time leaves the old content or the new one. Where the disk
    is full the old content stays and :class:`~mtl_jax.errors.RunFolderFull` is raised.

    Attributes:
      path: Of the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: str | os.PathLike) -> Iterator["RunFolder"]:
        """Makes the folder where it is missing and holds its lock inside the ``with`` block.

        The operating system drops the lock when the process ends, however it ends.

        Raises:
          RunFolderError: Another process holds the folder, or it cannot be made.
        """
        path = Path(path)
        with _mended(path):
            path.mkdir(parents=True, exist_ok=True)
            _refuse_links(path)
            lock = filelock.FileLock(path / ".lock", timeout=0)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise RunFolderError(
                    f"run folder '{path}' is in use by another process; expected one process a run folder. "
                    "Wait for it to end, or give this run another seed or folder"
                ) from None
        try:
            for leftover in path.glob(f".*{PARTIAL}"):
                leftover.unlink(missing_ok=True)
            yield cls(path)
        finally:
            lock.release()

    def claim(self, run_id: str) -> None:
        """Makes this the folder of one run; matters where a user names the folder.

        Raises:
          RunFolderError: The folder holds another run.
        """
        held = (self.read_json("run.json") or {}).get("run_id")
        others = sorted(entry.name for entry in self.path.iterdir() if entry.name != ".lock")
        if held is None and others:
            shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise RunFolderError(
                f"folder '{self.path}' holds {shown} and is not a run folder; expected one of this run or an empty folder. "
                "Choose another folder"
            )
        if held is None:
            self.write_json("run.json", {"run_id": run_id})
        elif held != run_id:
            raise RunFolderError(
                f"run folder '{self.path}' holds run '{held}'; expected '{run_id}' or an empty folder. "
                "The configuration, the seed or the data have changed: choose another folder"
            )

    def write_json(self, name: str, content: Any) -> None:
        """Writes JSON; NumPy values become plain ones, and NaN and infinities, which JSON lacks, become null."""
        text = json.dumps(plain(content), indent=2, allow_nan=False)
        write_atomically(self.path / name, f"{text}\n".encode())

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The content of a JSON file, None where there is no such file."""
        path = self.path / name
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError(f"of an object, but of a {type(content).__name__}")
            return content
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise RunFolderError(
                f"'{path}' is not JSON ({error}); expected a file written by a run. Remove the file or the folder"
            ) from None

    def write_yaml(self, name: str, text: str) -> None:
        """Writes text that is already YAML."""
        write_atomically(self.path / name, text.encode())

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes all curves of the run to ``history.parquet``, replacing what was there.

        Args:
          rows: Dicts of ``step``, ``part``, ``task`` (None for what belongs to no task), ``name``, ``value``. NaN
            becomes null.
        """
        for row in rows:
            if row.keys() != HISTORY_SCHEMA.keys():
                raise RunFolderError(
                    f"history row with keys {sorted(row)}; expected {sorted(HISTORY_SCHEMA)}. Change the row"
                )
        columns = {name: [row[name] for row in rows] for name in HISTORY_SCHEMA}
        frame = pl.DataFrame(columns, schema=HISTORY_SCHEMA).with_columns(pl.col("value").fill_nan(None))
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        write_atomically(self.path / "history.parquet", buffer.getvalue())

    def read_history(self) -> pl.DataFrame | None:
        """The curves written so far, None where there are none."""
        path = self.path / "history.parquet"
        if not path.exists():
            return None
        try:
            frame = pl.read_parquet(path)
            if frame.schema != HISTORY_SCHEMA:
                raise ValueError(f"columns {dict(frame.schema)}")
            return frame
        except (pl.exceptions.PolarsError, OSError, ValueError) as error:
            raise RunFolderError(
                f"'{path}' cannot be read ({error}); expected the curves that a run wrote. Remove the file"
            ) from error

    def log(self, line: str) -> None:
        """Appends a line with the UTC time to ``run.log``."""
        self.append("run.log", f"{_now()} {line}")

    def append(self, name: str, line: str) -> None:
        """Appends a line to a file; where the disk is full, the file ends where it did."""
        path = self.path / name
        content = f"{line}\n".encode()
        # Unbuffered, or closing the file would try once more to write what a full disk has refused.
        with _mended(path), path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError:
                os.ftruncate(file.fileno(), start)
                raise

    def record_opening(self, selection: Mapping[str, Any]) -> int:
        """Enters into the test ledger that the test part is about to be read. Call it before reading.

        Args:
          selection: What was chosen without the test part: ``config_hash``, ``seed``, ``selector``, and ``checkpoint``
            (hash) or ``step`` or both; further keys are part of the selection too.

        Returns:
          Openings of this configuration and seed so far, this one included. Opening again with the same selection, as a
          resumed run does, counts but does not make it :meth:`reopened`.
        """
        selection = plain(selection)
        missing = {"config_hash", "seed", "selector"} - selection.keys()
        if missing or not selection.keys() & {"checkpoint", "step"}:
            raise RunFolderError(
                f"selection with keys {sorted(selection)}; expected config_hash, seed, selector, and checkpoint or "
                "step. Fix the choice before opening the test part"
            )
        lines = [json.dumps(entry) for entry in (*self.openings(), {**selection, "time": _now()})]
        write_atomically(self.path / LEDGER, "".join(f"{line}\n" for line in lines).encode())
        return len(self._openings_of(selection))

    def openings(self) -> list[dict[str, Any]]:
        """All entries of the test ledger, oldest first."""
        path = self.path / LEDGER
        if not path.exists():
            return []
        try:
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            if not all(isinstance(entry, dict) and {"config_hash", "seed"} <= entry.keys() for entry in entries):
                raise ValueError("an entry lacks config_hash or seed")
            return entries
        except ValueError as error:
            raise RunFolderError(
                f"test ledger '{path}' is not readable ({error}); expected one JSON object a line. "
                "It has been edited: start the run in a new folder"
            ) from None

    @property
    def reopened(self) -> bool:
        """Whether the test part was opened for two different selections of the latest configuration and seed."""
        entries = self.openings()
        if not entries:
            return False
        same_run = self._openings_of(entries[-1])
        return any(_selection(entry) != _selection(entries[-1]) for entry in same_run)

    def _openings_of(self, selection: Mapping[str, Any]) -> list[dict[str, Any]]:
        key = (selection["config_hash"], selection["seed"])
        return [entry for entry in self.openings() if (entry["config_hash"], entry["seed"]) == key]


def _refuse_links(path: Path) -> None:
    """A link would lead writing, appending and the removal of old checkpoints out of the folder."""
    links = sorted(str(e.relative_to(path)) for e in (*path.iterdir(), *path.glob("checkpoints/*")) if e.is_symlink())
    if links:
        raise RunFolderError(
            f"run folder '{path}' has links in it ({', '.join(links[:3])}); expected files and folders of its own. Remove "
            "them, or put the whole run folder elsewhere"
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content`` in one step that a kill or a full disk cannot cut in two.

    Raises:
      RunFolderFull: The disk or the quota is full, or the file would exceed the allowed size. ``path`` is as it was.
      RunFolderError: The file cannot be written for another reason.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with _mended(path):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def plain(content: Any) -> Any:
    """``content`` with JSON types only: NumPy values and tuples converted, keys as text, NaN and infinities as None."""
    return _plain(content, finite=True)


def _plain(content: Any, *, finite: bool = False) -> Any:
    if isinstance(content, Mapping):
        return {str(key): _plain(value, finite=finite) for key, value in content.items()}
    if isinstance(content, np.ndarray | np.generic):
        content = content.tolist()
    if isinstance(content, list | tuple):
        return [_plain(value, finite=finite) for value in content]
    if finite and isinstance(content, float) and not math.isfinite(content):
        return None
    return str(content) if isinstance(content, os.PathLike) else content


def _without(config: Mapping[str, Any], dotted_keys: Sequence[str]) -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        inner = [dotted.removeprefix(f"{key}.") for dotted in dotted_keys if dotted.startswith(f"{key}.")]
        if key not in dotted_keys:
            kept[key] = _without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def _selection(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "time"}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _mended(path: Path) -> Iterator[None]:
    """Turns the operating system's complaint about ``path`` into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            raise RunFolderFull(
                f"no space to write '{path}' ({error.strerror}); expected room for a few MB. The file is as it was "
                "before: free space or choose another output folder, and run the same command again to resume"
            ) from error
        raise RunFolderError(
            f"cannot write '{path}' ({error.strerror or error}); expected a writable folder. Choose another one"
        ) from error


def _sync_folder(path: Path) -> None:
    # Makes the renaming itself durable; systems that cannot open a folder do not need it.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
