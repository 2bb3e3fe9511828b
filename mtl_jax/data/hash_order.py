"""A reproducible random order: keys sorted by a keyed hash of their text."""

import hashlib
import math
import numbers
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from mtl_jax.data.dataset import PARTS
from mtl_jax.errors import SchemaError

FRACTIONS = (0.8, 0.1, 0.1)


def key_hash(key: Hashable, seed: int = 0) -> int:
    """64-bit blake2b hash of the text ``"seed|key"``, big-endian: the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed}|{key}".encode(), digest_size=8).digest(), "big")


def hash_order(
    keys: Iterable[Hashable], fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> dict[str, list[Hashable]]:
    """Distinct keys in the order of (hash, text), cut at floor(n * cumulative fraction).

    Args:
      keys: Any values with a stable text; two keys with the same text are one key.
      fractions: Shares of train, valid and test; those left out are 0.
      seed: Of the hash.

    Returns:
      Part -> keys in hash order.
    """
    distinct = list({str(key): key for key in keys}.values())
    return {part: [distinct[i] for i in index] for part, index in cut(hash_ranking(distinct, seed), fractions).items()}


def cut(order: np.ndarray, fractions: Sequence[float]) -> dict[str, np.ndarray]:
    """Part -> its stretch of an ordered array."""
    return dict(zip(PARTS, np.split(order, cuts(len(order), fractions)), strict=True))


def cuts(count: int | np.ndarray, fractions: Sequence[float]) -> list:
    """Where valid and test begin among ``count`` ordered units: floor(count * cumulative fraction).

    Raises:
      SchemaError: The fractions are not one to three shares that sum to 1.
    """
    numbers_only = all(isinstance(share, numbers.Real) and share >= 0 for share in fractions)
    if not 1 <= len(fractions) <= len(PARTS) or not numbers_only or not math.isclose(sum(fractions), 1, abs_tol=1e-9):
        raise SchemaError(
            f"fractions are {tuple(fractions)}; expected shares of train, valid and test that sum to 1. "
            "Set data.split_fractions"
        )
    shares = np.cumsum([*fractions, 0.0, 0.0])[:2]
    # Rounding first: 0.9 as a sum of floats must not lose a unit to its last bit.
    return [np.floor(np.round(count * share, 9)).astype(np.int64) for share in shares]


def mixed(numbers: np.ndarray) -> np.ndarray:
    """u64, the same shape: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64-bit numbers.

    It makes hashes of many pairs from hashes of their members: ``mixed(first ^ second)``.
    """
    x = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_ranking(keys: Sequence[Hashable], seed: int) -> np.ndarray:
    """Positions of the keys in the order of (key_hash, text)."""
    prefix, blake2b = f"{seed}|", hashlib.blake2b
    texts = [str(key) for key in keys]
    digests = b"".join([blake2b((prefix + text).encode(), digest_size=8).digest() for text in texts])
    hashes = np.frombuffer(digests, dtype=">u8").astype(np.uint64)
    order = np.argsort(hashes, kind="stable")
    if np.any(np.diff(hashes[order]) == 0):
        order = np.array(sorted(range(len(texts)), key=lambda i: (hashes[i], texts[i])), dtype=np.int64)
    return order
