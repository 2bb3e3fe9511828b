"""Storage: arrays to and from a folder by Orbax, and what a disk that refuses them means in words."""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from mtl_jax.errors import FULL_DISK, RunFolderError, RunFolderFull

SPARE_BYTES = 2**18
SPARE_FILES = 64
JOIN_SECONDS = 60.0
NO_LIMIT_SECONDS = 10**9  # thirty years


def write_arrays(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes named arrays into a new folder."""
    # With folders made in the background, threads of a save that could not make one wait twenty minutes for it, and the
    # interpreter waits for them at its end. The limit is measured by the time of day, which may be set at any moment.
    in_order = ocp.options.AsyncOptions(create_directories_asynchronously=False, timeout_secs=NO_LIMIT_SECONDS)
    with _contained(), ocp.Context(async_options=in_order):
        ocp.save_checkpointables(folder, {"arrays": {name: _raw(array) for name, array in arrays.items()}})


def read_arrays(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads named arrays; shapes, types and placement on devices are those of ``like``."""
    raw = {name: _raw(array) for name, array in like.items()}
    template = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=getattr(a, "sharding", None)) for name, a in raw.items()
    }
    with _contained():
        arrays = ocp.load_checkpointables(folder, {"arrays": template})["arrays"]
    return {
        name: jax.random.wrap_key_data(array, impl=jax.random.key_impl(like[name])) if _is_key(like[name]) else array
        for name, array in arrays.items()
    }


def _is_key(array: Any) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _raw(array: Any) -> Any:
    """The array, a random key as its words: Orbax cannot place keys on several devices."""
    return jax.random.key_data(array) if _is_key(array) else array


def sync(folder: Path) -> None:
    """Makes renamings in the folder durable; systems that cannot open a folder do not need it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_room(path: Path, arrays: Mapping[str, Any]) -> None:
    """Asked before Orbax begins, because its threads print tracebacks when they meet a full disk.

    Raises:
      RunFolderFull: Too few bytes or files are free at ``path`` for the arrays.
    """
    needed = int(1.05 * sum(a.size * a.dtype.itemsize for a in arrays.values())) + SPARE_BYTES
    disk = os.statvfs(path)
    free = disk.f_bavail * disk.f_frsize
    if free < needed:
        raise _full(path, f"{free / 1e6:.1f} MB free", f"at least {needed / 1e6:.1f} MB")
    if disk.f_files and disk.f_favail < SPARE_FILES:  # some file systems do not count files
        raise _full(path, f"room for {disk.f_favail} files", f"at least {SPARE_FILES}")


def unwritable(folder: Path, error: Exception) -> RunFolderError:
    """The error for a failed write; the storage layers wrap the number of the operating system in a text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    if number in FULL_DISK:
        return _full(folder, os.strerror(number), "room for one more")
    reason = os.strerror(number) if number else f"{type(error).__name__}: {error}"
    return RunFolderError(
        f"cannot write checkpoint '{folder}' ({reason}); expected a writable folder. The checkpoints that were there are "
        "as before: mend the folder or choose another one, and run the same command again to resume"
    )


def _full(path: Path, found: str, expected: str) -> RunFolderFull:
    return RunFolderFull(
        f"no space to write a checkpoint to '{path}' ({found}); expected {expected}. The checkpoints that were there are "
        "as before: free space or choose another output folder, and run the same command again to resume"
    )


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Orbax logs tracebacks of errors that it also raises, and threads of a failed save go on for a while."""
    log = logging.getLogger("absl")
    level, before = log.level, set(threading.enumerate())
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except BaseException:
        for thread in set(threading.enumerate()) - before:
            thread.join(JOIN_SECONDS)
        raise
    finally:
        log.setLevel(level)
