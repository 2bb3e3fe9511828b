"""Read a pickled pandas DataFrame without pandas and without trust: what a pickle may name is a fixed list.

A pickle is a program. This reader gives it eleven words, all of them parts of arrays and of plain containers, and
refuses it at the first other one, which is neither imported nor called. It is the second line of defence: a member of a
wheel reaches it only after the sha256 of the wheel and of the member matched.
"""

import io
import lzma
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl

from mtl_jax.errors import MemberMismatch, UnsafePickle

MAX_BYTES = 2**30
"""Most bytes that a member may unpack to."""
DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[48]|O8?|[mM]8(\[\w+\])?)")
READ_ERRORS = (
    pickle.UnpicklingError, lzma.LZMAError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError,
    OverflowError, MemoryError, pl.exceptions.PolarsError,
)  # fmt: skip


def read_frame(content: bytes) -> pl.DataFrame:
    """The table in an xz-compressed pickle of a pandas DataFrame.

    Args:
      content: Bytes whose hash was checked.

    Returns:
      The columns in order; the index is left out, and NaN among objects is null.

    Raises:
      UnsafePickle: The pickle names anything but the parts of a DataFrame of NumPy arrays; nothing of it was called.
      MemberMismatch: It is not a table.
    """
    try:
        return _as_polars(_Unpickler(io.BytesIO(_unpack(content))).load())
    except READ_ERRORS as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise MemberMismatch(
            f"the member does not read as a pickled table ({said}); expected a pandas DataFrame of NumPy arrays. "
            "Report it: the pinned file cannot change"
        ) from error


def _unpack(content: bytes) -> bytes:
    unpacker = lzma.LZMADecompressor()
    unpacked = unpacker.decompress(content, max_length=MAX_BYTES)
    if not unpacker.eof:
        raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes, or is cut short")
    return unpacked


class _Unpickler(pickle.Unpickler):
    """Knows the names in :func:`_vocabulary` and no others; importing by name, as the base class does, is not left in."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._known = _vocabulary()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            known = sorted(f"{module}.{name}" for module, name in self._known)
            raise UnsafePickle(
                f"a pickle names '{module}.{name}'; expected only {known}. It was not imported or called: do not use the "
                "file, and report it"
            ) from None


def _vocabulary() -> dict[tuple[str, str], Callable[..., Any] | type]:
    """What a pickle may name. Made anew for every pickle, so that one which writes attributes changes only its own."""

    class DataFrame:
        def __setstate__(self, state):
            self.manager = state["_mgr"]

    class BlockManager:
        def __init__(self, blocks, axes):
            self.blocks, self.axes = blocks, axes

        def __setstate__(self, state):
            raise ValueError("it is of a pandas that nobody uses any more")

    class Marker:
        """Names that only say what else is built."""

    def dtype(text, align=False, copy=False):
        if not isinstance(text, str) or not DTYPE.fullmatch(text):
            raise ValueError(f"it has an array of type {text!r}")
        return np.dtype(text, copy=True)  # a copy, because what follows in the pickle may write to it

    def reconstruct(kind, shape, code):
        return np.empty(0, np.int8)  # its shape, type and content follow

    def from_buffer(buffer, dtype, shape, order):
        return np.frombuffer(buffer, dtype).reshape(shape, order=order)

    def unpickle_block(values, placement, ndim):
        return values, placement

    def new_index(kind, parts):
        return parts["data"] if "data" in parts else range(parts["start"], parts["stop"], parts["step"])

    return {
        ("builtins", "slice"): slice,
        ("numpy", "dtype"): dtype,
        ("numpy", "ndarray"): Marker,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
        ("pandas.core.frame", "DataFrame"): DataFrame,
        ("pandas.core.internals.managers", "BlockManager"): BlockManager,
        ("pandas._libs.internals", "_unpickle_block"): unpickle_block,
        ("pandas.core.indexes.base", "_new_Index"): new_index,
        ("pandas.core.indexes.base", "Index"): Marker,
        ("pandas.core.indexes.range", "RangeIndex"): Marker,
    }


def _as_polars(frame: Any) -> pl.DataFrame:
    """Axis 0 of the manager names the columns; the placement of a block says which of them its rows are."""
    names = [str(name) for name in frame.manager.axes[0]]
    columns: list[pl.Series | None] = [None] * len(names)
    for values, placement in frame.manager.blocks:
        places = range(len(names))[placement] if isinstance(placement, slice) else placement
        for place, column in zip(places, values, strict=True):
            columns[place] = _series(names[place], column)
    if None in [column if column is None else 0 for column in columns]:
        raise ValueError("some of its columns are in no block")
    return pl.DataFrame(columns)


def _series(name: str, column: np.ndarray) -> pl.Series:
    if column.dtype != object:
        return pl.Series(name, column)
    return pl.Series(name, [None if isinstance(value, float) and value != value else value for value in column])
