"""Schema: which columns are features, tasks and keys, with everything that was fitted on the training rows.

Frozen dataclasses without arrays. Tables (vocabularies) and features are separate objects: several features may point
to one vocabulary and then share one embedding table.
"""

import dataclasses
import json
from typing import Any

from mtl_jax.arguments import check_fields
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

PAD_ID = 0
OOV_ID = 1
FIRST_ID = 2
NULL_VALUE = "<null>"
MAX_LEN = 2**16
MAX_BUCKETS = 2**30
NUMERIC_TRANSFORMS = ("none", "log1p", "signed_log1p")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The rows of one embedding table: id 0 pads, id 1 is out of vocabulary, then the values.

    Attributes:
      name: Name of the table.
      values: Fitted on train, ordered by (-count, value); value i has id i + 2. Empty before fitting.
      min_count: Values seen less often in train are out of vocabulary.
      hash_buckets: With a number n, ids are 2 + hash mod n and ``values`` stays empty.
    """

    name: str
    values: tuple[str, ...] = ()
    min_count: int = 1
    hash_buckets: int | None = None

    def __post_init__(self):
        check_fields(self, f"vocabulary {self.name!r}")
        _check_whole(f"vocabulary '{self.name}' has min_count", self.min_count)
        if self.hash_buckets is not None:
            _check_whole(f"vocabulary '{self.name}' has hash_buckets", self.hash_buckets, most=MAX_BUCKETS)

    @property
    def size(self) -> int:
        """Rows of the table, the two reserved ones included."""
        return FIRST_ID + (self.hash_buckets or len(self.values))


@dataclasses.dataclass(frozen=True)
class Categorical:
    """One id a row."""

    name: str
    vocabulary: str

    def __post_init__(self):
        check_fields(self, f"feature {self.name!r}")


@dataclasses.dataclass(frozen=True)
class Numeric:
    """One number a row: transformed, standardised by train moments, clipped; null becomes 0 after standardising.

    Attributes:
      name: Column.
      transform: ``none``, ``log1p`` (values >= 0) or ``signed_log1p``.
      mean: Fitted train mean after the transform.
      std: Fitted train standard deviation after the transform.
      fill: Value (before the transform) that stands in for NaN; None makes NaN an error.
      missing_indicator: Fitted: whether train has nulls, which adds an input ``<name>__missing``.
      clip: Bound of the standardised value.
    """

    name: str
    transform: str = "none"
    mean: float = 0.0
    std: float = 1.0
    fill: float | None = None
    missing_indicator: bool = False
    clip: float = 10.0

    def __post_init__(self):
        check_fields(self, f"feature {self.name!r}")
        if self.transform not in NUMERIC_TRANSFORMS:
            raise SchemaError(
                f"feature '{self.name}' has transform '{self.transform}'; expected one of {list(NUMERIC_TRANSFORMS)}. "
                "Change it"
            )
        if not self.clip > 0:
            raise SchemaError(f"feature '{self.name}' has clip {self.clip}; expected a number > 0. Change it")


@dataclasses.dataclass(frozen=True)
class MultiHot:
    """A set of ids a row (a list column), optionally weighted by a list column; at most ``max_len`` are kept."""

    name: str
    vocabulary: str
    max_len: int
    weights: str | None = None

    def __post_init__(self):
        check_fields(self, f"feature {self.name!r}")
        _check_whole(f"feature '{self.name}' has max_len", self.max_len)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A history of ids a row (a list column), oldest first; the last ``max_len`` are kept."""

    name: str
    vocabulary: str
    max_len: int

    def __post_init__(self):
        check_fields(self, f"feature {self.name!r}")
        _check_whole(f"feature '{self.name}' has max_len", self.max_len)


Feature = Categorical | Numeric | MultiHot | Sequence


@dataclasses.dataclass(frozen=True)
class Schema:
    """Everything that is known about a table before and after fitting.

    Attributes:
      features: In the order of the model's inputs.
      vocabularies: One per embedding table.
      tasks: In the order of every per-task array.
      domain: Column of the domain (scenario), or None.
      domains: Names of the domains; the position is the id.
      default_domain: The one of them that rows of any other domain, and of none, count as; None: they are an error.
      user: Column of the user, for grouped metrics and baselines; a feature only if also listed.
      item: Column of the item, for baselines; a feature only if also listed.
      group: Column of the unit that may not cross splits.
      time: Column that orders rows in time.
      weight: Column of row weights for all tasks.
      logistic_features: Numeric features of the mandatory ``logistic`` baseline, log1p and standardised;
        empty: all numeric features plus hashed categorical ones.
      excluded: Columns that must never be features, with the reason.
      allow_leak: Features exempt from the leakage guard, with the reason.
    """

    features: tuple[Feature, ...]
    vocabularies: tuple[Vocabulary, ...]
    tasks: tuple[Task, ...]
    domain: str | None = None
    domains: tuple[str, ...] = ()
    default_domain: str | None = None
    user: str | None = None
    item: str | None = None
    group: str | None = None
    time: str | None = None
    weight: str | None = None
    logistic_features: tuple[str, ...] = ()
    excluded: dict[str, str] = dataclasses.field(default_factory=dict)
    allow_leak: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self, "the schema")
        for what, names in (
            ("feature", [f.name for f in self.features]),
            ("vocabulary", [v.name for v in self.vocabularies]),
            ("task", [t.name for t in self.tasks]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise SchemaError(f"{what} names {twice} occur twice; expected unique names. Rename or drop one")
        known = {v.name for v in self.vocabularies}
        for feature in self.features:
            if not isinstance(feature, Numeric) and feature.vocabulary not in known:
                raise SchemaError(
                    f"feature '{feature.name}' points to vocabulary '{feature.vocabulary}'; the schema has "
                    f"{sorted(known)}. Add the vocabulary or point to one of these"
                )
        names = self.task_names
        for task in self.tasks:
            for what, other in (("space", task.space), ("implies", task.implies)):
                if other not in (None, "all") and (other not in names or self.task(other).kind != "binary"):
                    raise SchemaError(
                        f"task '{task.name}' has {what}='{other}'; expected a binary task of "
                        f"{list(names)}. Set Task.{what}"
                    )

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def categoricals(self) -> tuple[Categorical, ...]:
        """Columns of ``ids``, in order."""
        return tuple(f for f in self.features if isinstance(f, Categorical))

    @property
    def numerics(self) -> tuple[Numeric, ...]:
        return tuple(f for f in self.features if isinstance(f, Numeric))

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Columns of ``dense``, in order: each numeric feature, followed by its missing indicator."""
        return tuple(
            name
            for f in self.numerics
            for name in ([f.name, f"{f.name}__missing"] if f.missing_indicator else [f.name])
        )

    @property
    def bags(self) -> tuple[MultiHot, ...]:
        return tuple(f for f in self.features if isinstance(f, MultiHot))

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(f for f in self.features if isinstance(f, Sequence))

    def task(self, name: str) -> Task:
        """The task of that name; SchemaError with the known ones otherwise."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise SchemaError(
            f"unknown task '{name}'; the schema has {list(self.task_names)}. Set data.tasks to some of these"
        )

    def vocabulary(self, name: str) -> Vocabulary:
        """The vocabulary of that name; SchemaError with the known ones otherwise."""
        for vocabulary in self.vocabularies:
            if vocabulary.name == name:
                return vocabulary
        raise SchemaError(f"unknown vocabulary '{name}'; the schema has {[v.name for v in self.vocabularies]}")

    def with_tasks(self, names: "list[str] | tuple[str, ...]") -> "Schema":
        """The schema with these tasks only, in this order."""
        return dataclasses.replace(self, tasks=tuple(self.task(name) for name in names))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; features carry their class name as ``type``."""
        plain = dataclasses.asdict(self)
        plain["features"] = [{"type": type(f).__name__, **dataclasses.asdict(f)} for f in self.features]
        return json.loads(json.dumps(plain))

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Schema":
        """The inverse of :meth:`to_dict`."""
        types = {t.__name__: t for t in (Categorical, Numeric, MultiHot, Sequence)}
        plain = dict(plain)
        plain["features"] = tuple(
            types[f["type"]](**{k: v for k, v in f.items() if k != "type"}) for f in plain["features"]
        )
        plain["vocabularies"] = tuple(
            Vocabulary(**{**v, "values": tuple(v.get("values", ()))}) for v in plain["vocabularies"]
        )
        plain["tasks"] = tuple(Task(**t) for t in plain["tasks"])
        for field in ("domains", "logistic_features"):
            plain[field] = tuple(plain.get(field, ()))
        return cls(**plain)


def _check_whole(what: str, value: int, *, most: int = MAX_LEN) -> None:
    if not 1 <= value <= most:
        raise SchemaError(f"{what} {value}; expected a whole number from 1 to {most:,}. Change it")
