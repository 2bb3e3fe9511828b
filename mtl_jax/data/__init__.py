"""Data: what reaches a model, and how.

    from mtl_jax.data import load

    dataset = load("complete_journey")
    training = dataset.for_training()

``load`` reads converted tables from the cache and never downloads unless told to.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_jax.arguments import check_arguments
from mtl_jax.data import countries, linear_gaussian, synthetic
from mtl_jax.data.dataset import PARTS, Dataset, Encoded, TrainingData
from mtl_jax.data.datasets import complete_journey, inst_eval, movielens_1m, movielens_100k, table
from mtl_jax.data.datasets.public import check_known
from mtl_jax.data.encode import fit_schema
from mtl_jax.data.folds import Folds
from mtl_jax.data.reduction import Reduction
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Vocabulary
from mtl_jax.data.schema import Sequence as SequenceFeature
from mtl_jax.errors import SchemaError

__all__ = [
    "PARTS",
    "Categorical",
    "Dataset",
    "Encoded",
    "MultiHot",
    "Numeric",
    "Schema",
    "SequenceFeature",
    "TrainingData",
    "Vocabulary",
    "fit_schema",
    "load",
]

DATASETS = {
    "complete_journey": complete_journey.load,
    "movielens_1m": movielens_1m.load,
    "movielens_100k": movielens_100k.load,
    "inst_eval": inst_eval.load,
    "synthetic": synthetic.load,
    "countries": countries.load,
    "linear_gaussian": linear_gaussian.load,
    "table": table.load,
}


def load(
    name: str,
    *,
    recipe: str | None = None,
    split: str | None = None,
    tasks: Sequence[str] | Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    download: bool = False,
    split_seed: int = 0,
    split_folds: int | None = None,
    split_fold: int | None = None,
    split_group: str | None = None,
    target_fraction: float = 1.0,
    valid_fraction: str | None = None,
    **parameters: Any,
) -> Dataset:
    """A data set by name: built, split, fitted on its training part and validated.

    Args:
      name: ``complete_journey``, ``movielens_1m``, ``movielens_100k``, ``inst_eval``, ``synthetic``, ``countries``,
        ``linear_gaussian`` or ``table`` (a file of your own).
      recipe: How rows are made of the source; the first of the data set by default.
      split: How rows become train, valid and test; the first of the data set by default.
      tasks: Some of the recipe's tasks, in this order; its default ones if None. ``implies`` is dropped where the
        implied task is left out; a task whose ``space`` is left out is an error.
      cache_dir: Folder of the fetched tables; ``~/.cache/mtl_jax`` by default.
      download: Whether a source that is not in the cache is fetched.
      split_seed: Of splits that draw; another seed is another split.
      split_folds: k, to cut train and valid into k folds for cross-validation; test stays what the split made it.
      split_fold: The fold that is valid, from 0 to k - 1; the others are train.
      split_group: Column whose rows no fold may cut; a split by time needs one.
      target_fraction: Share of the training rows that is kept, in (0, 1]: the first in hash order, so that a smaller
        share is part of every larger one. Vocabularies and moments come from what is kept; test stays.
      valid_fraction: None for the same share of valid, at least 1,000 rows; ``full`` for all of it.
      **parameters: Of the recipe, or of the loader of ``table`` and of generated rows.

    Returns:
      The data set. ``info`` says ``split``, ``split_seed``, ``split_sha256``, ``target_fraction``, ``parameters``,
      ``source``, ``version``, ``files`` (name -> sha256) and ``warnings``.

    Raises:
      SchemaError: Unknown name, recipe, split, task or parameter; the text lists the valid ones.
      NotCached: The source was not fetched and ``download`` is False.
      LabelError, LeakageError: Validation failed.
    """
    check_arguments(load, {"name": name, "recipe": recipe, "split": split, "tasks": tasks}, place="data")
    check_known("data set", name, DATASETS)
    loader = DATASETS[name]
    known = inspect.signature(loader).parameters
    folds = Folds.of(split_folds, split_fold, split_group)
    reduction = Reduction.of(target_fraction, valid_fraction)
    options = {"recipe": recipe, "split": split, "tasks": tasks, "cache_dir": cache_dir}
    options |= {"split_folds": folds, "reduction": reduction}
    options = {key: value for key, value in options.items() if value is not None}
    options |= {"download": download, "split_seed": split_seed, **parameters}
    for parameter in parameters:
        check_known(f"parameter of data '{name}'", parameter, known)
    missing = [key for key, value in known.items() if value.default is value.empty and key not in options]
    if missing:
        raise SchemaError(f"data '{name}' has no {missing}; expected a value. Set data.{' and data.'.join(missing)}")
    check_arguments(loader, options, place="data")
    return loader(**options)
