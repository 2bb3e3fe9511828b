"""The folder of converted tables: one folder a source, complete or absent, with a manifest that says what it is."""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import io
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import polars as pl

from mtl_jax.data.sources import Source
from mtl_jax.errors import CacheBusy, ConfigError, DataError, NoSpace

# Raised when conversion changes; older folders are then ignored and the tables are converted again from the kept wheel.
FORMAT = 1

LOCK_SECONDS = 600.0

logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def default_cache_dir() -> Path:
    """``~/.cache/mtl_jax``."""
    return Path.home() / ".cache" / "mtl_jax"


@dataclasses.dataclass(frozen=True)
class Cache:
    """Where the files of one source lie, and how they get there.

    ::

        <root>/wheels/                            kept wheels
        <root>/locks/<source>.lock                held while something of the source is written
        <root>/tables/<source>/v<FORMAT>-<hash>/  <table>.parquet and manifest.json
        <root>/tables/<source>/.tmp-*             work in progress, or left by a process that was killed

    Readers take no lock: a folder appears whole by one rename, and a table that joins it later is not there before the
    new manifest names it.
    """

    source: Source
    root: Path

    @property
    def wheels(self) -> Path:
        return self.root / "wheels"

    @property
    def home(self) -> Path:
        return self.root / "tables" / self.source.name

    @property
    def folder(self) -> Path:
        return self.home / f"v{FORMAT}-{self.source.wheel_sha256[:12]}"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None unless it is readable and speaks of the pinned bytes."""
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
            members = {table: entry["sha256"] for table, entry in manifest["tables"].items()}
            same = manifest["format"] == FORMAT and manifest["wheel_sha256"] == self.source.wheel_sha256
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        pinned = {table: member.sha256 for table, member in self.source.members.items()}
        return manifest if same and members.items() <= pinned.items() else None

    def tables(self) -> dict[str, dict[str, Any]]:
        """Tables that can be read -> their entry in the manifest."""
        return {table: entry for table, entry in self._entries().items() if self._whole(table, entry)}

    def missing(self, tables: Iterable[str]) -> list[str]:
        """Those of the tables that are absent, or not what was written: cut short, or with a bit that flipped."""
        entries = self._entries()
        return [table for table in tables if table not in entries or not self._whole(table, entries[table])]

    def choose(self, tables: Iterable[str] | None) -> list[str]:
        """The tables of a request; None means all that are not on demand."""
        members = self.source.members
        if tables is None:
            return [table for table, member in members.items() if not member.on_demand]
        tables = list(tables)
        unknown = sorted(set(tables) - set(members))
        if unknown:
            raise ConfigError(
                f"unknown tables {unknown}; source {self.source.name!r} has {list(members)}. Choose some of these"
            )
        return tables

    def path(self, table: str) -> Path:
        """Of the converted table."""
        return self.folder / f"{table}.parquet"

    @contextlib.contextmanager
    def writing(self) -> Iterator[Path]:
        """Holds the source's lock and yields an empty work folder, which is gone afterwards whatever happens.

        Raises:
          CacheBusy: Another process held the lock for ten minutes.
          NoSpace: The disk filled up.
          DataError: The cache folder cannot be written.
        """
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self.wheels.mkdir(exist_ok=True)
            lock_file = self.root / "locks" / f"{self.source.name}.lock"
            lock_file.parent.mkdir(exist_ok=True)
            with _lock(lock_file):
                self.remove_leftovers()
                work = self.home / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
                work.mkdir()
                try:
                    yield work
                finally:
                    shutil.rmtree(work, ignore_errors=True)
        except OSError as error:
            if error.errno in FULL:
                raise self.no_space() from error
            if error.errno in FORBIDDEN:
                raise DataError(
                    f"cannot write {self.root} ({error}); expected a writable folder. Set data.cache_dir"
                ) from error
            raise

    def remove_leftovers(self) -> None:
        """Removes work folders of killed processes; under the lock every work folder is one."""
        for folder in self.home.glob(".tmp-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, frames: Iterable[tuple[str, pl.DataFrame]], work: Path) -> None:
        """Writes tables into the work folder, then makes them visible at once. To be called under the lock."""
        old = self.manifest()
        entries = dict(old["tables"]) if old else {}
        stage = work / "tables"
        stage.mkdir()
        for table, frame in frames:
            if self.path(table).exists():
                logger.warning("'%s' was damaged; it is converted again from the kept wheel", self.path(table))
            entries[table] = self._write_table(table, frame, stage)
        _write(stage / "manifest.json", json.dumps(self._describe(entries), indent=1).encode())
        if old:
            join(stage, self.folder)
        else:
            self._set_broken_aside()
            publish(stage, self.folder)

    def _write_table(self, table: str, frame: pl.DataFrame, stage: Path) -> dict[str, Any]:
        # Through memory, because polars reports a full disk without its errno.
        buffer = io.BytesIO()
        frame.write_parquet(buffer, compression="zstd")
        content = buffer.getvalue()
        _write(stage / f"{table}.parquet", content)
        member = self.source.members[table]
        return {
            "member": member.path,
            "sha256": member.sha256,
            "rows": frame.height,
            "columns": frame.width,
            "dtypes": {name: str(dtype) for name, dtype in frame.schema.items()},
            "file_bytes": len(content),
            "file_sha256": hashlib.sha256(content).hexdigest(),
        }

    def _describe(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "source": self.source.name,
            "package": self.source.package,
            "version": self.source.version,
            "wheel_sha256": self.source.wheel_sha256,
            "licence": self.source.licence,
            "terms": list(self.source.terms),
            "polars": pl.__version__,
            "converted": _utc_now().isoformat(timespec="seconds"),
            "tables": dict(entries),
        }

    def _entries(self) -> dict[str, dict[str, Any]]:
        return (self.manifest() or {"tables": {}})["tables"]

    def _whole(self, table: str, entry: Mapping[str, Any]) -> bool:
        try:
            return file_sha256(self.path(table)) == entry["file_sha256"]
        except (OSError, KeyError):
            return False

    def _set_broken_aside(self) -> None:
        if self.folder.exists():
            os.rename(self.folder, self.home / f".broken-{_utc_now():%Y%m%dT%H%M%S%f}")

    def no_space(self) -> NoSpace:
        """The error that says how much is free and how much a fetch needs."""
        free = shutil.disk_usage(self.root).free
        return NoSpace(
            f"{free / 1e6:.0f} MB free in {self.root}; expected at least {self.needed_bytes() / 1e6:.0f} MB. "
            "Free space or set data.cache_dir"
        )

    def needed_bytes(self) -> int:
        """Free disk for a fetch: pip's copy, ours and the tables."""
        return 3 * self.source.num_bytes + 64 * 2**20


def publish(stage: Path, folder: Path) -> None:
    """Makes a complete folder visible by one rename; if another process was first, theirs stays."""
    try:
        os.rename(stage, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def join(stage: Path, folder: Path) -> None:
    """Moves new tables into a visible folder; the manifest comes last, so readers never see a table half."""
    for path in stage.glob("*.parquet"):
        os.replace(path, folder / path.name)
    os.replace(stage / "manifest.json", folder / "manifest.json")


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        lock = filelock.FileLock(path, timeout=LOCK_SECONDS)
        lock.acquire()
    except filelock.Timeout:
        raise CacheBusy(
            f"{path} held for {LOCK_SECONDS:g} s; expected another fetch to finish. "
            "Wait, or delete it if no process runs"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
