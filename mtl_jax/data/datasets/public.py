"""What the public data sets share: check the request before any work, read the tables, fill the record."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from mtl_jax.data import fetch, tables
from mtl_jax.data.dataset import Dataset
from mtl_jax.data.schema import Schema
from mtl_jax.errors import SchemaError


def check_known(what: str, value: str, known: Collection[str]) -> None:
    """Raises SchemaError with the known names unless ``value`` is one of them."""
    if value not in known:
        raise SchemaError(f"unknown {what} '{value}'; expected one of {list(known)}. Choose one of these")


def select_tasks(schema: Schema, names: Sequence[str]) -> Schema:
    """The schema with these tasks in this order; ``implies`` is dropped where the implied task is left out.

    Raises:
      SchemaError: No task, an unknown one, or one whose ``space`` is not among them.
    """
    if not names:
        raise SchemaError(f"no tasks; expected some of {list(schema.task_names)}. Set data.tasks to some of these")
    chosen = []
    for task in map(schema.task, names):
        if task.space not in ("all", *names):
            raise SchemaError(
                f"task '{task.name}' exists only where '{task.space}' is 1, and the tasks are {list(names)}; "
                f"expected '{task.space}' among them. Add {task.space} to data.tasks"
            )
        chosen.append(task if task.implies in names else dataclasses.replace(task, implies=None))
    return dataclasses.replace(schema, tasks=tuple(chosen))


def read_tables(
    source: str, names: Sequence[str], *, cache_dir: str | Path | None = None, download: bool = False
) -> dict[str, pl.DataFrame]:
    """The tables by name, fetched first if they are not in the cache and ``download`` is set."""
    if download:
        fetch.fetch(source, cache_dir=cache_dir, tables=names)
    return {name: tables.read(source, name, cache_dir=cache_dir) for name in names}


def make(
    frame: pl.DataFrame,
    schema: Schema,
    *,
    name: str,
    recipe: str,
    source: str,
    table_names: Sequence[str],
    parameters: Mapping[str, Any],
    key: Sequence[str],
    split: str,
    split_seed: int,
    split_options: Mapping[str, Any] | None = None,
    split_name: str | None = None,
) -> Dataset:
    """The checked and fitted data set.

    Args:
      frame: All rows.
      schema: Unfitted.
      name: Of the data set.
      recipe: How the table was built.
      source: Name of the source in the catalogue.
      table_names: Tables of the source that were read.
      parameters: Of the recipe, defaults included: they are part of the identity.
      key: Columns that together name a row of a part.
      split: Name of the split.
      split_seed: Of splits that draw.
      split_options: Further parameters of the split.
      split_name: What to call it, where the recipe makes the parts of split ``given``; ``split`` by default.

    Returns:
      A data set whose ``info`` has ``parameters``, ``source``, ``version``, ``files`` (name -> sha256) and what
      :meth:`~mtl_jax.data.dataset.Dataset.from_frame` adds.
    """
    found = fetch.source(source)
    members = [found.members[table] for table in table_names]
    return Dataset.from_frame(
        frame,
        schema,
        split,
        name=name,
        recipe=recipe,
        seed=split_seed,
        split_options=split_options,
        split_name=split_name,
        licence=found.licence,
        identity={"tables": fetch.identity(found, tables=table_names), "parameters": dict(parameters)},
        key=key,
        info={
            "parameters": dict(parameters),
            "source": found.package,
            "version": found.version,
            "files": {member.path: member.sha256 for member in members},
        },
    )
