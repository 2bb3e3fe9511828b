"""Check and tidy the cache."""

import contextlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from mtl_jax.data.cache import Cache, file_sha256
from mtl_jax.data.fetch import find_wheel, wheel_files
from mtl_jax.errors import HashMismatch


def verify(cache: Cache) -> dict[str, str]:
    """Hashes every file of a source again.

    Returns:
      File name -> sha256, of the kept wheel and of the tables that the manifest names.

    Raises:
      HashMismatch: A file is not what was pinned (the wheel) or written (a table).
    """
    wheel = find_wheel(cache)
    hashes = {} if wheel is None else {wheel.name: cache.source.wheel_sha256}
    manifest = cache.manifest() or {"tables": {}}
    for table, entry in manifest["tables"].items():
        path = cache.path(table)
        found = file_sha256(path) if path.exists() else "of no file"
        if found != entry["file_sha256"]:
            raise HashMismatch(
                f"{path} has sha256 {found}; expected {entry['file_sha256']}. It changed after conversion. "
                f"Delete {cache.folder} and run fetch again"
            )
        hashes[path.name] = found
    return hashes


def prune(caches: Iterable[Cache], *, wheels: bool = False) -> list[Path]:
    """Removes what no reader needs: tables of other formats or pins, work folders and folders set aside as broken.

    Args:
      caches: One a source.
      wheels: Also remove the kept wheels; a new format then needs the network.

    Returns:
      What was removed.
    """
    removed = []
    for cache in caches:
        if not cache.root.exists():
            continue
        with cache.writing() as work:
            old = [path for path in cache.home.iterdir() if path not in (cache.folder, work)]
            if wheels:
                old += wheel_files(cache)
            for path in old:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed += old
        # A source that was never fetched leaves no empty folder behind.
        with contextlib.suppress(OSError):
            cache.home.rmdir()
    return removed
