"""Any own table: a Parquet, CSV or TSV file, with column names given or inferred."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from mtl_jax.arguments import check_arguments
from mtl_jax.data import splits
from mtl_jax.data.dataset import Dataset
from mtl_jax.data.datasets import inference
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options
from mtl_jax.data.schema import Schema
from mtl_jax.errors import ConfigError, MissingFile, SchemaError
from mtl_jax.tasks import Task

SUFFIXES = (".parquet", ".csv", ".tsv")

_log = logging.getLogger(__name__)


def load(
    *,
    path: str | Path,
    tasks: Mapping[str, Any] | Sequence[str] | None = None,
    categorical: Sequence[str] | None = None,
    numeric: Sequence[str] | None = None,
    multihot: Sequence[str] | None = None,
    sequence: Sequence[str] | None = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    domain: str | None = None,
    default_domain: str | None = None,
    group: str | None = None,
    weight: str | None = None,
    recipe: str = "own",
    split: str | None = None,
    split_seed: int = 0,
    split_fractions: Sequence[float] = splits.FRACTIONS,
    split_options: Mapping[str, Any] | None = None,
    split_folds: Folds | None = None,
    reduction: Reduction | None = None,
    schema: str | Path | None = None,
    exclude: Sequence[str] | Mapping[str, str] = (),
    allow_leak: Mapping[str, str] | None = None,
    min_count: int = 1,
    max_len: int = 32,
    list_separator: str = "|",
    cache_dir: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """Reads a file, infers what is not given, splits, checks and fits.

    Columns that no argument names are inferred on training rows: strings, booleans and integers of at most 100 distinct
    values become categorical, other numbers numeric, lists multi-hot; dates and columns that are almost all distinct
    are excluded with the reason. ``user``, ``item``, ``time``, ``group`` and ``weight`` are features only if listed.
    The schema is logged as YAML.

    Args:
      path: A .parquet, .csv or .tsv file (UTF-8, with a header). Nothing of it is cached or copied.
      tasks: Column -> kind; or name -> fields of :class:`~mtl_jax.tasks.Task`; or columns, whose kinds are then
        inferred: {0, 1} or boolean is binary, text or at most 20 distinct integers multiclass, lists multilabel, other
        numbers regression; other kinds must be said. With ``schema``, the names of the tasks to keep.
      categorical: Columns with one value of a set.
      numeric: Columns with a number.
      multihot: List columns, or text with ``list_separator``, without an order.
      sequence: The same, oldest entry first.
      user, item, time, domain, group, weight: Columns of these roles; see :class:`~mtl_jax.data.schema.Schema`.
      default_domain: The domain that rows of domains which are not in train count as; None: they are an error.
      recipe: ``own``; a name for records.
      split: Name of a split. By default ``time`` with a time column, else ``cold_user`` with a user, else ``rows``.
      split_seed: Of the split.
      split_fractions: Shares of train, valid and test.
      split_options: Further parameters of the split, such as ``cuts``.
      split_folds: Cross-validation inside train and valid.
      reduction: What is kept of train and valid.
      schema: A .yaml or .json file with a whole schema, as logged; no column is inferred then, and only ``tasks`` and
        the split arguments are read.
      exclude: Columns that must not be features, or column -> reason.
      allow_leak: Feature -> reason why it may tell a label.
      min_count: Categories seen less often in train are out of vocabulary.
      max_len: Entries kept of a list.
      list_separator: Between the entries of a list that is stored as text; also in the column of a multilabel task.
      cache_dir: Without effect, like ``download``: the file is yours.
      download: See ``cache_dir``.

    Returns:
      The data set; its identity covers the file's sha256, the schema and the split.

    Raises:
      MissingFile, SchemaError, LabelError, LeakageError: with what to change.
    """
    del cache_dir, download
    path = Path(path)
    unfitted = None if schema is None else read_schema(schema)
    lists = [*(multihot or ()), *(sequence or ()), *_multilabel_columns(tasks if unfitted is None else unfitted.tasks)]
    frame = _split_lists(read(path), lists, list_separator)
    roles = {"user": user, "item": item, "time": time, "domain": domain, "group": group, "weight": weight}
    listed = {"categorical": categorical, "numeric": numeric, "multihot": multihot, "sequence": sequence}
    if unfitted is not None:
        unfitted = unfitted if tasks is None else unfitted.with_tasks(list(tasks))
        user, time, domain, group = unfitted.user, unfitted.time, unfitted.domain, unfitted.group
    else:
        _check_named(frame, path, roles, listed, exclude)
    split = split or ("time" if time else "cold_user" if user else "rows")
    options = dict(split_options or {}) | fold_options(split_folds) | reduction_options(reduction)
    splits.check_options(options)
    keys = {"user": user, "time": time, "domain": domain, "group": group}
    parts = splits.split(frame, split, **keys, fractions=split_fractions, seed=split_seed, **options)
    if unfitted is None:
        unfitted = inference.infer_schema(
            frame[parts["train"]],
            tasks=_tasks(tasks, frame[parts["train"]], path),
            listed={kind: tuple(columns or ()) for kind, columns in listed.items()},
            roles=roles,
            exclude=dict(exclude) if isinstance(exclude, Mapping) else dict.fromkeys(exclude, "excluded by the user"),
            allow_leak=dict(allow_leak or {}),
            min_count=min_count,
            max_len=max_len,
        )
        unfitted = dataclasses.replace(unfitted, default_domain=default_domain)
    _log.info("schema of %s:\n%s", path, yaml.safe_dump(unfitted.to_dict(), sort_keys=False))
    return Dataset.from_frame(
        frame,
        unfitted,
        parts,
        name=path.stem,
        recipe=recipe,
        seed=split_seed,
        split_name=split,
        split_options=options,
        identity={"file": file_sha256(path), "schema": unfitted.to_dict()},
        info={"path": str(path)},
    )


def read(path: Path) -> pl.DataFrame:
    """The table of a .parquet, .csv or .tsv file; the types of text files are inferred from all rows."""
    if path.suffix not in SUFFIXES:
        raise SchemaError(
            f"'{path}' has suffix '{path.suffix}'; expected one of {list(SUFFIXES)}. Convert or rename it"
        )
    if not path.is_file():
        raise MissingFile(f"{path} not found; expected a {', '.join(SUFFIXES)} file. Set data.path to where it is")
    separator = "\t" if path.suffix == ".tsv" else ","
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        return pl.read_csv(path, separator=separator, try_parse_dates=True, infer_schema_length=None)
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise SchemaError(
            f"{path} cannot be read ({said}); expected a whole {path.suffix} file with a header, text in UTF-8. "
            "Write it anew, or set data.path to another file"
        ) from error


def read_schema(path: str | Path) -> Schema:
    """A schema from a .yaml or .json file, in the form of :meth:`Schema.to_dict`."""
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path} not found; expected a schema in YAML or JSON. Set data.schema to where it is")
    text = path.read_text(encoding="utf-8")
    try:
        return Schema.from_dict(json.loads(text) if path.suffix == ".json" else yaml.safe_load(text))
    except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise SchemaError(
            f"{path} is not a schema ({type(error).__name__}: {error}); expected the keys features, vocabularies and "
            "tasks, as a run logs them. Correct it, or leave data.schema out to have one inferred"
        ) from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_lists(frame: pl.DataFrame, columns: Sequence[str], separator: str) -> pl.DataFrame:
    """Text files have no lists: turns ``a|b`` into two entries, and an empty text into none."""
    text = [column for column in dict.fromkeys(columns) if frame.schema.get(column) == pl.String]
    return frame.with_columns(
        pl.when(pl.col(column) == "")
        .then(pl.lit([], pl.List(pl.String)))
        .otherwise(pl.col(column).str.split(separator))
        .alias(column)
        for column in text
    )


def _multilabel_columns(tasks: Mapping[str, Any] | Sequence[Any] | None) -> list[str]:
    """Columns that hold lists of labels, by what the tasks declare."""
    if not isinstance(tasks, Mapping):
        tasks = {task.name: vars(task) for task in tasks or () if isinstance(task, Task)}
    fields = {name: value if isinstance(value, Mapping) else {"kind": value} for name, value in tasks.items()}
    columns = [task.get("column") or name for name, task in fields.items() if task.get("kind") == "multilabel"]
    return [column for column in columns if isinstance(column, str)]


def _check_named(frame: pl.DataFrame, path: Path, roles: dict, listed: dict, exclude: Any) -> None:
    named = {f"data.{role}": [column] for role, column in roles.items() if column is not None}
    named |= {f"data.{kind}": list(columns) for kind, columns in listed.items() if columns}
    named |= {"data.exclude": list(exclude)}
    missing = {what: [c for c in columns if c not in frame.columns] for what, columns in named.items()}
    missing = {what: columns for what, columns in missing.items() if columns}
    if missing:
        raise SchemaError(
            f"columns {sorted({c for columns in missing.values() for c in columns})} not in table '{path.stem}' (has "
            f"{frame.columns}); expected by {', '.join(missing)}. Rename them or drop them there"
        )
    kinds = [c for columns in listed.values() for c in columns or ()]
    twice = sorted({column for column in kinds if kinds.count(column) > 1})
    if twice:
        raise SchemaError(f"columns {twice} are listed as two kinds of feature; expected one. Drop them from one list")


def _tasks(tasks: Mapping[str, Any] | Sequence[str] | None, train: pl.DataFrame, path: Path) -> tuple[Task, ...]:
    if not tasks:
        raise ConfigError(f"'{path}' has no tasks; expected columns to predict. Set data.tasks, like {{buy: binary}}")
    given = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks)
    known = {field.name for field in dataclasses.fields(Task)} - {"name", "_"}
    found = []
    for name, value in given.items():
        fields = dict(value) if isinstance(value, Mapping) else {"kind": value} if value else {}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise SchemaError(
                f"task '{name}' has fields {unknown}; expected some of {sorted(known)}. Drop or rename them"
            )
        # classes may be written as numbers; all else has the type that Task says
        check_arguments(Task, {k: v for k, v in fields.items() if k != "classes"}, place=f"data.tasks.{name}")
        if "positive" in fields:
            fields.setdefault("kind", "binary")
        if "kind" not in fields:
            column = fields.get("column") or name
            if column not in train.columns:
                raise SchemaError(
                    f"columns ['{column}'] not in table '{path.stem}' (has {train.columns}); expected by task "
                    f"'{name}'. Rename it or drop the task"
                )
            fields["kind"] = inference.infer_kind(train[column])
        found.append(Task(name, **fields))
    return tuple(found)
