"""Domains as data sets of their own, and the schema that two of them share: what transfer trains on."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl

from mtl_jax.data.dataset import PARTS, Dataset
from mtl_jax.data.reduction import Reduction, reduce, reduction_options
from mtl_jax.data.schema import Numeric, Schema, Vocabulary
from mtl_jax.errors import ConfigError


def of_domains(dataset: Dataset, names: Sequence[str], *, reduction: Reduction | None = None) -> Dataset:
    """The rows of some domains, in the parts where they are, with a schema fitted on those that train.

    Numbers of domains and lists of classes stay those of the whole data set.

    Args:
      dataset: With domains.
      names: Of the domains to keep.
      reduction: What is kept of train and valid after that.

    Raises:
      ConfigError: The data set has no domains, or none of such a name.
      SchemaError, LabelError: Too little is left to train, select or test on.
    """
    check_domains(dataset, names)
    schema = dataset.schema
    own = dataset.frame[schema.domain].cast(pl.String)
    if schema.default_domain in names:
        own = pl.Series(np.where(own.is_in(list(schema.domains)), own, schema.default_domain))
    kept = own.is_in(list(names)).fill_null(False).to_numpy()
    parts = {part: dataset.splits[part][kept[dataset.splits[part]]] for part in PARTS}
    if reduction is not None:
        parts = reduce(parts, reduction, seed=dataset.info["split_seed"])
    return Dataset.from_frame(
        dataset.frame,
        schema,
        parts,
        name=dataset.name,
        recipe=dataset.recipe,
        seed=dataset.info["split_seed"],
        licence=dataset.licence,
        identity={"of": dataset.identity, "domains": sorted(names)},
        split_name=dataset.info["split"],
        split_options=dataset.info["split_options"] | reduction_options(reduction),
        key=dataset.info["key"],
        info={key: value for key, value in dataset.info.items() if key in ("version", "source", "files")}
        | {"domains": sorted(names)},
    )


def check_domains(dataset: Dataset, names: Sequence[str]) -> None:
    """Raises a ConfigError for names of domains that a data set does not have, and for data without any."""
    if dataset.schema.domain is None:
        raise ConfigError(
            f"'{dataset.name}' has no domains to be source or target; expected data with a domain column. Name it "
            "(data.domain), or choose other data"
        )
    if unknown := [name for name in names if name not in dataset.schema.domains]:
        raise ConfigError(
            f"'{dataset.name}' has no domains {unknown}; expected some of {list(dataset.schema.domains)}. Change it"
        )


def joined(target: Schema, source: Schema) -> Schema:
    """The target's schema as a continuation of the source's.

    Ids of the source keep their numbers and new ones follow; numeric features and regression targets are standardised by
    the moments of the source, so that an input and an output mean to the model what they meant there.

    Args:
      target: Fitted.
      source: Fitted on rows with the same columns.
    """
    vocabularies = {vocabulary.name: vocabulary for vocabulary in source.vocabularies}
    features = {feature.name: feature for feature in source.numerics}
    tasks = {task.name: task for task in source.tasks if task.kind == "regression"}
    return dataclasses.replace(
        target,
        vocabularies=tuple(_union(v, vocabularies.get(v.name)) for v in target.vocabularies),
        features=tuple(features.get(f.name, f) if isinstance(f, Numeric) else f for f in target.features),
        tasks=tuple(
            dataclasses.replace(t, mean=tasks[t.name].mean, std=tasks[t.name].std) if t.name in tasks else t
            for t in target.tasks
        ),
    )


def _union(target: Vocabulary, source: Vocabulary | None) -> Vocabulary:
    if source is None or target.hash_buckets:
        return target
    known = set(source.values)
    return dataclasses.replace(target, values=(*source.values, *(v for v in target.values if v not in known)))
