"""The catalogue of public data: which pinned wheel holds which tables, and which data set needs which wheel."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from mtl_jax.errors import ConfigError

CATALOGUE = Path(__file__).with_name("sources.toml")


@dataclasses.dataclass(frozen=True)
class Member:
    """One file inside a wheel, and the table that it becomes.

    Attributes:
      path: Full name inside the wheel.
      sha256: Of the file's bytes.
      num_bytes: Its size, uncompressed.
      rows: Of the converted table.
      columns: Of the converted table.
      on_demand: True if only an explicit request converts it.
    """

    path: str
    sha256: str
    num_bytes: int
    rows: int
    columns: int
    on_demand: bool = False


@dataclasses.dataclass(frozen=True)
class Source:
    """One pinned wheel, used as an archive.

    Attributes:
      name: In the catalogue, and of the folder in the cache.
      requirement: One line of a requirements file: ``package==version --hash=sha256:...``.
      package: Name on the package index.
      version: Pinned version.
      wheel_sha256: The identity of the wheel, wherever it comes from.
      prefix: Folder inside the wheel, ending in "/" or empty.
      num_bytes: Size of the wheel.
      licence: A reminder in one line.
      terms: Addresses of the terms.
      members: Table name -> member.
    """

    name: str
    requirement: str
    package: str
    version: str
    wheel_sha256: str
    prefix: str
    num_bytes: int
    licence: str
    terms: tuple[str, ...]
    members: Mapping[str, Member]


def sources() -> dict[str, Source]:
    """All sources of the catalogue by name."""
    return {name: parse(name, entry) for name, entry in _catalogue().items() if name != "datasets"}


def datasets() -> dict[str, str]:
    """Data set -> name of the source that holds it."""
    return dict(_catalogue()["datasets"])


def fetchable() -> dict[str, str]:
    """What can be fetched by name -> its source: the data sets, and each source of which only tables are read so far."""
    known = datasets()
    return known | {name: name for name in sources() if name not in known.values()}


def source(name: str) -> Source:
    """The source of that name.

    Raises:
      ConfigError: The catalogue has no such source.
    """
    known = sources()
    if name not in known:
        raise ConfigError(f"unknown source {name!r}; expected one of {sorted(known)}. Choose one of them")
    return known[name]


def source_of(dataset: str) -> Source:
    """The source that holds a data set, or the source of that name where no data set is made of it.

    Raises:
      ConfigError: The catalogue has no such data set.
    """
    known = fetchable()
    if dataset not in known:
        raise ConfigError(f"unknown data set {dataset!r}; expected one of {sorted(known)}. Choose one of them")
    return source(known[dataset])


def dataset_names(source: Source) -> list[str]:
    """The data sets that a source holds; its own name if the catalogue lists none."""
    return [dataset for dataset, name in datasets().items() if name == source.name] or [source.name]


def parse(name: str, entry: Mapping) -> Source:
    """One table of the catalogue as a ``Source``; the keys are explained at the head of ``sources.toml``."""
    for what in (name, *entry.get("tables", ())):  # they become names of folders and files
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", what):
            raise ConfigError(
                f"source or table {what!r} has another name than a file may; expected letters, digits, '_', '-' and '.'. "
                "Rename it"
            )
    pin = re.fullmatch(
        r"(?P<package>\S+)==(?P<version>\S+) --hash=sha256:(?P<sha256>[0-9a-f]{64})", entry["requirement"]
    )
    if pin is None:
        raise ConfigError(
            f"requirement {entry['requirement']!r} of source {name!r} is not pinned; "
            "expected 'package==version --hash=sha256:<64 hex digits>'. Add the version and the hash"
        )
    members = {
        table: Member(
            path=entry["prefix"] + member["member"],
            sha256=member["sha256"],
            num_bytes=member["bytes"],
            rows=member["rows"],
            columns=member["columns"],
            on_demand=member.get("on_demand", False),
        )
        for table, member in entry["tables"].items()
    }
    return Source(
        name=name,
        requirement=entry["requirement"],
        package=pin["package"],
        version=pin["version"],
        wheel_sha256=pin["sha256"],
        prefix=entry["prefix"],
        num_bytes=entry["bytes"],
        licence=entry["licence"],
        terms=tuple(entry["terms"]),
        members=members,
    )


def _catalogue() -> dict:
    return tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
