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
      values: Float64 for numbers (binary: 0 or 1; regression: transformed, not standardised), String for multiclass and
        ordinal; null where the label, or the row's mask column, says unobserved. f64[N, C] for multilabel.
      mask: bool[N] (bool[N, C] for multilabel), observed and in the task's space.
    """

    values: pl.Series | np.ndarray
    mask: np.ndarray

    @property
    def observed(self) -> pl.Series:
        """The values under the mask, in one series."""
        if isinstance(self.values, np.ndarray):
            return pl.Series(self.values[self.mask])
        return self.values.filter(pl.Series(self.mask))

    def within(self, rows: np.ndarray) -> "Label":
        """The label with all rows unobserved but these, bool[N]."""
        return Label(self.values, self.mask & (rows if self.mask.ndim == 1 else rows[:, None]))


def labels(frame: pl.DataFrame, schema: Schema) -> dict[str, Label]:
    """The label of every task of the schema, with ``mask = observed and in space``.

    The space of a task is where its space task is observed, in its own space, and 1. Multilabel tasks need their classes
    (see :func:`fit_classes`).
    """
    found: dict[str, Label] = {}

    def find(task: Task) -> Label:
        if task.name not in found:
            label = _cells(frame, task) if task.kind == "multilabel" else _one_a_row(frame, task)
            if task.space != "all":
                label = label.within(_positive_rows(find(schema.task(task.space))))
            found[task.name] = label
        return found[task.name]

    _refuse_cycles(schema)
    return {task.name: find(task) for task in schema.tasks}


def fit_classes(schema: Schema, train: pl.DataFrame) -> Schema:
    """The schema with the classes of every task that has some and does not name them: those of its training labels.

    They are in the order of the column's own type, so that 2 comes before 10, and an Enum keeps its order.
    """
    binary = [task.name for task in schema.tasks if task.kind == "binary"]
    spaces = labels(train, schema.with_tasks(binary))

    def fitted(task: Task) -> Task:
        if not task.has_classes or task.classes is not None:
            return task
        rows = _seen(train, task)
        if task.space != "all":
            rows = rows & _positive_rows(spaces[task.space])
        column = train[task.column].filter(pl.Series(rows))
        values = flat_values(column)[0] if task.kind == "multilabel" else column
        return dataclasses.replace(task, classes=tuple(class_text(values.drop_nulls().unique().sort())))

    return dataclasses.replace(schema, tasks=tuple(fitted(task) for task in schema.tasks))


def as_guarded(schema: Schema, found: dict[str, Label] | None = None) -> tuple[Schema, dict[str, Label]]:
    """Tasks and labels as the leakage guard reads them: binary, multiclass and regression tasks of one column.

    A label of a multilabel task is a binary task ``<task>:<label>``. Ordinal tasks (by class id), counts and amounts are
    numbers in an order.

    Args:
      schema: Its classes are only needed with labels.
      found: Task -> label; without them the tasks alone are translated, a multilabel one by its columns.
    """
    tasks, translated = [], {}
    for task in schema.tasks:
        label = found[task.name] if found else None
        if task.kind == "multilabel":
            parts = task.classes if found else task.columns
            columns = task.columns if len(task.columns) == len(parts) else task.columns * len(parts)
            for index, (part, column) in enumerate(zip(parts, columns, strict=True)):
                tasks.append(Task(f"{task.name}:{part}", "binary", column))
                if label is not None:
                    translated[tasks[-1].name] = Label(pl.Series(label.values[:, index]), label.mask[:, index])
        elif task.kind in ("ordinal", "count", "zero_inflated"):
            tasks.append(Task(task.name, "regression", task.column))
            if label is not None and task.kind == "ordinal":
                ids = {value: float(index) for index, value in enumerate(task.classes)}
                label = Label(label.values.replace_strict(ids, default=None, return_dtype=pl.Float64), label.mask)
            translated[task.name] = label
        else:
            tasks.append(task)
            translated[task.name] = label
    return dataclasses.replace(schema, tasks=tuple(tasks)), translated


def flat_values(series: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """The entries of a list column in one series, and the i64[N] number of entries of each row (0 for null)."""
    if isinstance(series.dtype, pl.Array):
        series = series.arr.to_list()
    return series.explode(empty_as_null=False, keep_nulls=False), series.list.len().fill_null(0).to_numpy().astype(
        np.int64
    )


def _one_a_row(frame: pl.DataFrame, task: Task) -> Label:
    """The task's label column, with ``positive``, ``transform`` and ``mask`` applied."""
    raw = frame[task.column]
    if task.has_classes:
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
        values = values.set(pl.Series(~_seen(frame, task)), None)
    return Label(values.alias(task.name), values.is_not_null().to_numpy())


def _cells(frame: pl.DataFrame, task: Task) -> Label:
    """One column a label: from 0/1 columns, where a null hides one cell, or from lists, where it hides the row."""
    if isinstance(task.column, str):
        values, mask = _from_lists(frame[task.column], task.classes, task.num_classes)
    else:
        columns = [frame[column].cast(pl.Float64) for column in task.column]
        values = np.stack([column.to_numpy() for column in columns], axis=1)
        mask = np.stack([column.is_not_null().to_numpy() for column in columns], axis=1)
    return Label(values, mask).within(_seen(frame, task))


def _from_lists(series: pl.Series, classes: tuple[str, ...], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    flat, lengths = flat_values(series)
    numbers = {value: index for index, value in enumerate(classes)}
    ids = class_text(flat).replace_strict(numbers, default=-1, return_dtype=pl.Int64).fill_null(-1).to_numpy()
    rows, known = np.repeat(np.arange(len(series)), lengths), ids >= 0
    values = np.zeros((len(series), num_classes))
    values[rows[known], ids[known]] = 1.0
    return values, np.repeat(series.is_not_null().to_numpy()[:, None], num_classes, axis=1)


def _positive_rows(label: Label) -> np.ndarray:
    """bool[N]: where a binary label is observed and 1."""
    return label.mask & (label.values.fill_null(0) == 1).to_numpy()


def _seen(frame: pl.DataFrame, task: Task) -> np.ndarray:
    """bool[N]: the task's mask column; all rows without one."""
    if task.mask is None:
        return np.ones(frame.height, bool)
    return frame[task.mask].cast(pl.Boolean).fill_null(False).to_numpy()


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
