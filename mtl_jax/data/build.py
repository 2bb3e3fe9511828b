"""From a table and a schema to a data set: split, check, fit, in this order."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from mtl_jax.data import splits
from mtl_jax.data.dataset import PARTS, Dataset
from mtl_jax.data.encode import fit_schema
from mtl_jax.data.validate import check_columns, inspect
from mtl_jax.errors import SchemaError

FORMAT = 1
"""Raised when the same rows are encoded in another way."""


def build(
    raw: Dataset,
    split: str | Mapping[str, Any],
    *,
    seed: int,
    fractions: tuple[float, ...],
    source: Any,
    split_name: str | None,
    split_options: dict[str, Any],
) -> Dataset:
    """The work of :meth:`Dataset.from_frame`; ``raw`` has neither parts nor an identity yet."""
    if not raw.schema.tasks:
        raise SchemaError(f"'{raw.name}' has no tasks; expected at least one to predict. Add a Task to the schema")
    check_columns(raw.frame, raw.schema, name=raw.name)
    parts, chosen = _parts(raw, split, seed=seed, fractions=fractions, options=split_options)
    dataset = dataclasses.replace(
        raw,
        splits=parts,
        info=dict(raw.info)
        | {"split": split_name or chosen, "split_seed": seed, "split_options": _plain(split_options)}
        | {"split_sha256": _parts_sha256(parts)}
        | {"target_fraction": split_options["reduction"].fraction if "reduction" in split_options else 1.0},
    )
    report = inspect(dataset)
    schema = fit_schema(dataset.schema, dataset.part("train"))
    return dataclasses.replace(
        dataset,
        schema=_with_held_out_domains(dataset, schema),
        identity=_identity(dataset, source if source is not None else frame_sha256(raw.frame)),
        info=dict(dataset.info) | {"warnings": report.warnings, "leakage": report.leakage},
    )


def frame_sha256(frame: pl.DataFrame) -> str:
    """sha256 over names, types and values of a table."""
    buffer = io.BytesIO()
    frame.rechunk().write_ipc(buffer, compression="uncompressed")
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def _parts(
    raw: Dataset, split: str | Mapping[str, Any], *, seed: int, fractions: tuple[float, ...], options: dict[str, Any]
) -> tuple[dict[str, np.ndarray], str]:
    if not isinstance(split, str | Mapping):
        raise SchemaError(f"split is {split!r}; expected a name, or part -> row numbers. Set it to one of them")
    if not isinstance(split, str):
        return {part: np.asarray(split.get(part, ()), np.int64) for part in PARTS}, "given"
    splits.check_options(options)
    schema = raw.schema
    keys = {"user": schema.user, "time": schema.time, "domain": schema.domain, "group": schema.group}
    return splits.split(raw.frame, split, **keys, fractions=fractions, seed=seed, **options), split


def _with_held_out_domains(dataset: Dataset, schema):
    """Appends domains that train lacks, so that ids of the others do not depend on valid and test rows."""
    if schema.domain is None or dataset.schema.domains:
        return schema
    rows = np.concatenate([dataset.splits[part] for part in PARTS])
    every = dataset.frame[schema.domain][rows].drop_nulls().unique().sort().cast(pl.String)
    return dataclasses.replace(schema, domains=(*schema.domains, *(d for d in every if d not in schema.domains)))


def _identity(dataset: Dataset, source: Any) -> str:
    facts = {"format": FORMAT, "name": dataset.name, "recipe": dataset.recipe, "source": source}
    facts |= {key: dataset.info[key] for key in ("split", "split_seed", "split_options", "split_sha256")}
    return hashlib.sha256(json.dumps(_plain(facts), sort_keys=True).encode()).hexdigest()


def _parts_sha256(parts: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(f"{part}:{len(parts[part])};".encode())
        digest.update(np.ascontiguousarray(parts[part], "<i8").tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)
