"""Dataset: one table of rows, a fitted schema and the three parts, with the test part sealed."""

import dataclasses
import functools
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from typing import Any

import numpy as np
import polars as pl

from mtl_jax.data.schema import Schema
from mtl_jax.errors import SchemaError

PARTS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The rows of one part as NumPy arrays; N rows, F categorical and D dense columns.

    Attributes:
      ids: int32[N, F], one column a categorical feature, in schema order.
      dense: f32[N, D], in the order of ``schema.dense_names``.
      bags: Multi-hot feature -> (int32[N, L] right-padded with 0, f32[N, L] weights, 0 at pads).
      sequences: Sequence feature -> int32[N, L], oldest first, right-padded with 0.
      labels: Task -> f32[N] (int32[N] class ids for multiclass and ordinal, f32[N, C] for multilabel); 0 where
        unobserved. Regression targets are transformed and standardised.
      mask: Task -> bool[N] (bool[N, C] for multilabel), observed and in the task's space.
      task_weight: Task -> f32[N], only for tasks with a weight column.
      weight: f32[N] row weights.
      domain: int32[N] or None.
      user: int32[N] codes of ``schema.user``, comparable between parts of one data set, or None. Host only.
      item: The same of ``schema.item``.
    """

    ids: np.ndarray
    dense: np.ndarray
    bags: Mapping[str, tuple[np.ndarray, np.ndarray]]
    sequences: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    mask: Mapping[str, np.ndarray]
    task_weight: Mapping[str, np.ndarray]
    weight: np.ndarray
    domain: np.ndarray | None = None
    user: np.ndarray | None = None
    item: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return self.ids.shape[0]


def concatenated(first: Encoded, second: Encoded, weight: float = 1.0) -> Encoded:
    """The rows of both, encoded by one schema; those of the second have their weight multiplied. Codes of users and items
    are left out: they do not compare."""

    def together(one: Any, other: Any) -> Any:
        if isinstance(one, Mapping):
            return {key: together(one[key], other[key]) for key in one}
        if isinstance(one, tuple):
            return tuple(map(together, one, other))
        return None if one is None else np.concatenate([one, other])

    second = dataclasses.replace(second, weight=second.weight * np.float32(weight))
    fields = [f.name for f in dataclasses.fields(Encoded) if f.name not in ("user", "item")]
    return Encoded(**{name: together(getattr(first, name), getattr(second, name)) for name in fields})


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a trainer may see: the training and validation parts, and nothing of the test part."""

    name: str
    schema: Schema
    train: Encoded
    valid: Encoded
    identity: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A table with a fitted schema and disjoint parts.

    Attributes:
      name: Of the data set.
      recipe: How the table was built from the source.
      frame: All rows.
      schema: Fitted on the training rows.
      splits: Part -> int64 row numbers of ``frame``, for ``train``, ``valid`` and ``test``.
      identity: sha256 over source, recipe, parameters and splits.
      licence: The note to read before use.
      info: Further facts for the record (split name and parameters, warnings, source versions), plain JSON types.
    """

    name: str
    recipe: str
    frame: pl.DataFrame
    schema: Schema
    splits: Mapping[str, np.ndarray]
    identity: str
    licence: str
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_frame(
        cls,
        frame: pl.DataFrame,
        schema: Schema,
        split: str | Mapping[str, Any] = "rows",
        *,
        name: str = "table",
        recipe: str = "own",
        seed: int = 0,
        fractions: Listing[float] = (0.8, 0.1, 0.1),
        licence: str = "your own data",
        identity: Any = None,
        split_name: str | None = None,
        split_options: Mapping[str, Any] | None = None,
        key: Listing[str] = (),
        info: Mapping[str, Any] | None = None,
    ) -> "Dataset":
        """Splits a table, checks it, and fits the schema on the training rows.

        Args:
          frame: All rows.
          schema: Unfitted, or fitted on other rows: it is fitted anew.
          split: Name of a split (see :mod:`mtl_jax.data.splits`), or part -> row numbers.
          name: Of the data set, for messages and records.
          recipe: How the table was built.
          seed: Of the split.
          fractions: Shares of train, valid and test.
          licence: The note to read before use.
          identity: Plain JSON value that says where the rows come from (file hashes, parameters); the rows are hashed
            when None.
          split_name: What to call a split that is given as row numbers; ``given`` by default.
          split_options: Further parameters of the named split, such as ``cuts`` or ``column``.
          key: Columns that together name a row; no two rows of a part may share them.
          info: Further plain facts to keep.

        Returns:
          The data set. ``info`` has ``split``, ``split_seed``, ``split_sha256``, ``target_fraction``, ``warnings`` and
          ``leakage``.

        Raises:
          SchemaError, LabelError, LeakageError: see :mod:`mtl_jax.data.validate`.
        """
        # The builder needs this class, so it cannot be imported with the module.
        from mtl_jax.data.build import build

        return build(
            cls(name, recipe, frame, schema, {}, "", licence, dict(info or {}) | {"key": list(key)}),
            split,
            seed=seed,
            fractions=tuple(fractions),
            source=identity,
            split_name=split_name,
            split_options=dict(split_options or {}),
        )

    def part(self, part: str) -> pl.DataFrame:
        """The rows of one part, as they came. Not for a trainer: it includes ``test``."""
        return self.frame[self.splits[part]]

    def for_training(self) -> TrainingData:
        """The encoded training and validation parts (computed once). Test rows do not enter it in any way."""
        return self._training

    def open_test(self) -> Encoded:
        """The encoded test part: for evaluation, after everything was chosen."""
        return self._encode("test")

    def summary(self) -> dict[str, Any]:
        """Rows, positives or means per task, part and domain, known keys, truncated lists: plain JSON types."""
        from mtl_jax.data.summary import summarise

        return summarise(self)

    def with_tasks(self, names: Listing[str]) -> "Dataset":
        """The data set with these tasks only, in this order; identity, parts and fitted values stay.

        Where the space of a kept task is dropped, the task keeps its rows: they go into a mask column
        ``<task>__observed``. An ``implies`` of a dropped task is dropped.
        """
        from mtl_jax.data.labels import labels

        if not names:
            raise SchemaError(
                f"no tasks; expected some of {list(self.schema.task_names)}. Set data.tasks to some of these"
            )
        frame, tasks = self.frame, []
        for name in names:
            task = self.schema.task(name)
            if task.space != "all" and task.space not in names:
                column = f"{name}__observed"
                mask = labels(self.frame, self.schema)[name].mask
                mask = mask.reshape(len(mask), -1).any(axis=1)  # cells without a label stay so by their own columns
                frame = frame.with_columns(pl.Series(column, mask))
                task = dataclasses.replace(task, space="all", mask=column)
            if task.implies not in names:
                task = dataclasses.replace(task, implies=None)
            tasks.append(task)
        return dataclasses.replace(self, frame=frame, schema=dataclasses.replace(self.schema, tasks=tuple(tasks)))

    @functools.cached_property
    def _training(self) -> TrainingData:
        return TrainingData(self.name, self.schema, self._encode("train"), self._encode("valid"), self.identity)

    def _encode(self, part: str) -> Encoded:
        from mtl_jax.data.encode import encode

        user, item = self._codes
        return encode(self.part(part), self.schema, user_codes=user and user[part], item_codes=item and item[part])

    @functools.cached_property
    def _codes(self) -> tuple[dict[str, np.ndarray] | None, dict[str, np.ndarray] | None]:
        """Codes of users and items by part, numbered in order of appearance: train first, test last."""
        return self._codes_of(self.schema.user), self._codes_of(self.schema.item)

    def _codes_of(self, column: str | None) -> dict[str, np.ndarray] | None:
        from mtl_jax.data.encode import appearance_codes

        if column is None:
            return None
        rows = [self.splits[part] for part in PARTS]
        codes = appearance_codes(self.frame[column][np.concatenate(rows)])
        return dict(zip(PARTS, np.split(codes, np.cumsum([len(r) for r in rows])[:-1]), strict=True))
