"""Labels before encoding: which value a row has for a task, and whether it is observed there."""

import dataclasses
import operator

import numpy as np
import polars as pl

from mtl_jax.data.schema import Schema
from mtl_jax.errors import SchemaError
from mtl_jax.tasks import Task

_OPERATORS = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclasses.dataclass(frozen=True)
class Label:
    """One task's label over N rows.

    Attributes:
      values: Float64 for binary (0 or 1) and regression (transformed, not standardised), String for multiclass.
        Null where the label, or the row's mask column, says unobserved.
      mask: bool[N], observed and in the task's space.
    """

    values: pl.Series
    mask: np.ndarray

    @property
    def observed(self) -> pl.Series:
        """The values under the mask."""
        return self.values.filter(pl.Series(self.mask))


def labels(frame: pl.DataFrame, schema: Schema) -> dict[str, Label]:
    """The label of every task of the schema, with ``mask = observed and in space``.

    The space of a task is where its space task is observed, in its own space, and 1.
    """
    found: dict[str, Label] = {}

    def find(task: Task) -> Label:
        if task.name not in found:
            values = label_values(frame, task)
            mask = values.is_not_null().to_numpy()
            if task.space != "all":
                space = find(schema.task(task.space))
                mask = mask & space.mask & (space.values.fill_null(0) == 1).to_numpy()
            found[task.name] = Label(values, mask)
        return found[task.name]

    _refuse_cycles(schema)
    return {task.name: find(task) for task in schema.tasks}


def label_values(frame: pl.DataFrame, task: Task) -> pl.Series:
    """The task's label column, with ``positive``, ``transform`` and ``mask`` applied; see :class:`Label`."""
    raw = frame[task.column]
    if task.kind == "multiclass":
        values = class_text(raw)
    else:
        values = raw.cast(pl.Float64)
        if task.comparison:
            # A comparison with NaN has an answer in polars; the label stays NaN, so that validation finds it.
            undefined = values.is_nan().fill_null(False)
            values = _OPERATORS[task.comparison.operator](values, task.comparison.number).cast(pl.Float64)
            values = values.set(undefined, float("nan"))
        if task.transform == "log1p":
            values = values.log1p()
    if task.mask is not None:
        seen = frame[task.mask].cast(pl.Boolean).fill_null(False).to_numpy()
        values = values.set(pl.Series(~seen), None)
    return values.alias(task.name)


def class_text(series: pl.Series) -> pl.Series:
    """Class values as text; whole floats read like integers, so that 3.0 and 3 are one class."""
    text = series.cast(pl.String)
    return text.str.strip_suffix(".0") if series.dtype.is_float() else text


def _refuse_cycles(schema: Schema) -> None:
    for task in schema.tasks:
        path = [task.name]
        while (space := schema.task(path[-1]).space) != "all":
            if space in path:
                raise SchemaError(
                    f"the spaces of tasks {[*path, space]} form a circle; expected one with space 'all'. Set Task.space"
                )
            path.append(space)
