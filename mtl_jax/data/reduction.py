"""Reduction: a nested share of the training rows, for learning curves over the amount of data; test stays as it is."""

import dataclasses
import math
import numbers
from collections.abc import Mapping

import numpy as np

from mtl_jax.data.hash_order import hash_ranking
from mtl_jax.errors import SchemaError

LEAST_VALID = 1_000
FULL = "full"


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How much of train and valid is kept.

    Attributes:
      fraction: f, the share of the training rows, in (0, 1].
      valid: None keeps the same share of the validation rows, but at least 1,000 of them (or all, where there are
        fewer): labels for validation cost what labels for training cost. ``full`` keeps them all.

    Raises:
      SchemaError: A value is out of range.
    """

    fraction: float
    valid: str | None = None

    def __post_init__(self):
        is_number = isinstance(self.fraction, numbers.Real) and not isinstance(self.fraction, bool)
        if not is_number or not 0 < self.fraction <= 1:  # not a number is in no range
            raise SchemaError(
                f"target_fraction is {self.fraction!r}; expected a number above 0 and at most 1, the share of the "
                "training rows to keep. Set data.target_fraction"
            )
        if self.valid not in (None, FULL):
            raise SchemaError(
                f"valid_fraction is {self.valid!r}; expected null, for the share that training keeps, or 'full'. "
                "Set data.valid_fraction"
            )

    @classmethod
    def of(cls, fraction: float, valid: str | None) -> "Reduction | None":
        """What the options ``target_fraction`` and ``valid_fraction`` ask for; None where every row stays.

        Raises:
          SchemaError: A value is out of range.
        """
        asked = cls(fraction, valid)
        return None if asked.fraction == 1 else dataclasses.replace(asked, fraction=float(fraction))


def reduction_options(reduction: Reduction | None) -> dict[str, Reduction]:
    """The split option of this reduction; none without, so that the identity of a whole data set stays."""
    return {} if reduction is None else {"reduction": reduction}


def reduce(parts: Mapping[str, np.ndarray], reduction: Reduction, *, seed: int) -> dict[str, np.ndarray]:
    r"""The first rows of train and of valid in the hash order of their row numbers.

    .. math::
        n_\text{train}' = \lfloor f\, n_\text{train} \rfloor \qquad
        n_\text{valid}' = \min(n_\text{valid}, \max(\lfloor f\, n_\text{valid} \rfloor, 1000))

    The order does not depend on f, so that the rows of a smaller fraction are among those of every larger one.

    Args:
      parts: Part -> row numbers.
      reduction: What to keep.
      seed: Of the hash order.

    Returns:
      Part -> sorted int64 row numbers; ``test`` is the same.

    Raises:
      SchemaError: Not one training row would be left.
    """
    train, valid = (np.asarray(parts[part], np.int64) for part in ("train", "valid"))
    num_train, num_valid = _share(len(train), reduction.fraction), _share(len(valid), reduction.fraction)
    if not num_train:
        raise SchemaError(
            f"target_fraction is {reduction.fraction:g} of {len(train):,} training rows, which is none; expected at "
            "least one row. Raise data.target_fraction"
        )
    num_valid = len(valid) if reduction.valid == FULL else max(num_valid, LEAST_VALID)
    return {
        "train": _first(train, num_train, seed),
        "valid": _first(valid, num_valid, seed),
        "test": np.asarray(parts["test"], np.int64),
    }


def _share(count: int, fraction: float) -> int:
    # Rounding first: .29 of 100 rows is 28.999999999999996 in floats.
    return math.floor(round(count * fraction, 9))


def _first(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    return np.sort(rows[hash_ranking(rows.tolist(), seed)[:count]])
