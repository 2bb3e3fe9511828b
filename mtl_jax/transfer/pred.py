"""What the source's model says of a row, as a feature of the target."""

import dataclasses
from typing import ClassVar

import numpy as np
import polars as pl

from mtl_jax.balancing.base import register
from mtl_jax.data.dataset import Dataset
from mtl_jax.data.encode import encode, fit_schema
from mtl_jax.data.schema import Numeric
from mtl_jax.model import MultiTaskModel
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.train.predict import outputs_of


@register
@dataclasses.dataclass(frozen=True)
class Pred(Adaptation):
    """Training from initial values on the target, whose rows have the outputs of the source's model as further numbers.

    These are logits, or standardised predictions, of all tasks (see :func:`with_outputs`). The source's model stays as
    it is and has to be there wherever the trained one is used.

    References:
      The baseline ``pred`` of Daumé III, *Frustratingly Easy Domain Adaptation*, ACL 2007.
    """

    needs_source: ClassVar[bool] = False
    reads_outputs: ClassVar[bool] = True


def with_outputs(dataset: Dataset, model: MultiTaskModel) -> Dataset:
    """The data with numeric features ``<task>__source`` (``<task>__source_<i>`` where a task has several outputs).

    They follow the other features, and like them are standardised by the moments of the training rows. Parts, identity and
    everything else stay.

    Args:
      dataset: Its schema is the one that the model reads.
      model: Gives the outputs of the rows of all parts.
    """
    outputs: dict[str, np.ndarray] = {}
    for part, numbers in dataset.splits.items():
        for task, found in outputs_of(model, encode(dataset.part(part), dataset.schema)).items():
            whole = outputs.setdefault(task, np.full((dataset.frame.height, *found.shape[1:]), np.nan, np.float32))
            whole[numbers] = found
    columns = {}
    for task, whole in outputs.items():
        several = {f"{task}__source_{index}": column for index, column in enumerate(whole.reshape(len(whole), -1).T)}
        columns |= several if whole.ndim > 1 else {f"{task}__source": whole}
    frame = dataset.frame.with_columns(pl.Series(name, column) for name, column in columns.items())
    own = dataclasses.replace(dataset.schema, features=tuple(map(Numeric, columns)))
    fitted = fit_schema(own, frame[dataset.splits["train"]]).features
    schema = dataclasses.replace(dataset.schema, features=(*dataset.schema.features, *fitted))
    return dataclasses.replace(dataset, frame=frame, schema=schema)
