"""Tasks: what is predicted, from which column, with which loss and metric. No JAX in here."""

import dataclasses
import math
import re

from mtl_jax.arguments import check_fields
from mtl_jax.errors import SchemaError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What all tasks of one kind share.

    Attributes:
      losses: Names of functions in :mod:`mtl_jax.losses`; the first is the default.
      metric: Name of the monitored metric.
      higher_is_better: Its direction.
      has_classes: Whether the labels are values of a list that is fitted on train, :attr:`Task.classes`.
    """

    losses: tuple[str, ...]
    metric: str
    higher_is_better: bool
    has_classes: bool = False


KINDS: dict[str, Kind] = {
    "binary": Kind(("bce",), "auc", True),
    "multiclass": Kind(("softmax", "sampled_softmax"), "accuracy", True, has_classes=True),
    "multilabel": Kind(("bce",), "auc", True, has_classes=True),
    "regression": Kind(("squared", "huber"), "rmse", False),
    "ordinal": Kind(("cumulative", "coral"), "qwk", True, has_classes=True),
    "count": Kind(("poisson", "negative_binomial"), "poisson_deviance", False),
    "zero_inflated": Kind(("ziln",), "rmse", False),
}
TRANSFORMS = ("none", "log1p")
OPERATORS = (">=", "<=", "==", "!=", ">", "<")
_COMPARISON = re.compile(r"\s*(?P<column>[^<>=!]*?)\s*(?P<operator>>=|<=|==|!=|>|<)\s*(?P<number>[^<>=!\s]+)\s*")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """``column operator number``; the column is None where the expression leaves it out."""

    column: str | None
    operator: str
    number: float


@dataclasses.dataclass(frozen=True)
class Task:
    """One supervised task.

    Attributes:
      name: Unique name; also the name of its head and of its metrics.
      kind: One of :data:`KINDS`.
      column: Label column; defaults to ``name``. For multilabel a list column with the names of the labels that are 1,
        or several 0/1 columns, one a label.
      loss: Name of the loss; defaults to the first of the kind.
      space: ``all``, or the binary task whose positives are the rows where this label exists.
      mask: Boolean column of observed labels. A null label is unobserved with or without it.
      weight: A number (factor of the task's loss) or a column (row weights of this task).
      implies: A binary task that is 1 wherever this one is 1 (checked).
      classes: Class values of a multiclass, ordinal (lowest first) or multilabel task, in the order of their ids; fitted
        on train when None. With several columns: names of their labels, by default those of the columns.
      transform: ``none`` or ``log1p``, applied to a regression target before it is standardised.
      positive: Derives a binary label from ``column`` by a comparison with a number: ``"> 3"``, ``"rating > 3"``.
      positive_weight: Factor of the positives in ``bce`` (binary, multilabel).
      smoothing: Label smoothing of ``softmax``, in [0, 1).
      delta: Threshold of ``huber`` in units of the standardised target, > 0.
      num_sampled: Classes drawn a step by ``sampled_softmax``; >= 1 there, else 0.
      standardise: Whether a regression target is standardised on train.
      mean: Fitted train mean of the transformed target (regression; 0 when not standardised).
      std: Fitted train standard deviation of the transformed target (regression; 1 when not standardised).
      frequencies: Fitted train share of each class, n_c/n (multiclass: the proposal of ``sampled_softmax``), smoothed to
        (n_c + 1)/(n + C) for ordinal, whose cutpoints start from it.
    """

    name: str
    kind: str
    column: str | tuple[str, ...] | None = None
    _: dataclasses.KW_ONLY
    loss: str | None = None
    space: str = "all"
    mask: str | None = None
    weight: float | str = 1.0
    implies: str | None = None
    classes: tuple[str, ...] | None = None
    transform: str = "none"
    positive: str | None = None
    positive_weight: float = 1.0
    smoothing: float = 0.0
    delta: float = 1.0
    num_sampled: int = 0
    standardise: bool = True
    mean: float = 0.0
    std: float = 1.0
    frequencies: tuple[float, ...] | None = None

    def __post_init__(self):
        check_fields(self, f"task {self.name!r}", free=("classes", "frequencies", "loss"))
        if self.kind not in KINDS:
            raise SchemaError(f"task '{self.name}' has kind '{self.kind}'; expected one of {list(KINDS)}. Set its kind")
        kind = KINDS[self.kind]
        compared = self.comparison.column if self.comparison else None
        if compared and self.column not in (None, compared):
            raise SchemaError(
                f"task '{self.name}' has column '{self.column}' and positive '{self.positive}'; expected one column. "
                "Leave Task.column out"
            )
        column = compared or self.column or self.name
        object.__setattr__(self, "column", column if isinstance(column, str) else tuple(column))
        object.__setattr__(self, "loss", self.loss or kind.losses[0])
        several = not isinstance(self.column, str)
        if several and self.classes is None:
            object.__setattr__(self, "classes", self.column)
        for field in ("classes", "frequencies"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.classes is not None:  # YAML gives numbers; ids are looked up by text
            object.__setattr__(self, "classes", tuple(str(value) for value in self.classes))
        checks = [
            (self.loss in kind.losses, f"loss '{self.loss}'", f"one of {list(kind.losses)} for kind '{self.kind}'"),
            (self.transform in TRANSFORMS, f"transform '{self.transform}'", f"one of {list(TRANSFORMS)}"),
            (self.delta > 0, f"delta {self.delta}", "a number > 0"),
            (0 <= self.smoothing < 1, f"smoothing {self.smoothing}", "a number in [0, 1)"),
            (self.positive_weight > 0, f"positive_weight {self.positive_weight}", "a number > 0"),
            (
                isinstance(self.weight, str) or (math.isfinite(self.weight) and self.weight >= 0),
                f"weight {self.weight}",
                "a finite number >= 0 or a column",
            ),
            (
                (self.num_sampled > 0) == (self.loss == "sampled_softmax"),
                f"num_sampled {self.num_sampled} with loss '{self.loss}'",
                "num_sampled >= 1 with 'sampled_softmax' and 0 otherwise",
            ),
            *(
                (
                    getattr(self, option) in (None, "none") or self.kind == only,
                    f"{option} '{getattr(self, option)}'",
                    f"it only for kind '{only}'",
                )
                for option, only in (("positive", "binary"), ("implies", "binary"), ("transform", "regression"))
            ),
            (not several or self.kind == "multilabel", f"columns {self.column}", "one column, except for 'multilabel'"),
            (
                not several or len(self.classes or ()) == len(self.column),
                f"classes {self.classes} for columns {self.column}",
                "one class a column",
            ),
        ]
        for ok, value, expectation in checks:
            if not ok:
                raise SchemaError(f"task '{self.name}' has {value}; expected {expectation}. Change the task's options")

    @property
    def comparison(self) -> Comparison | None:
        """``positive``, parsed; None without it."""
        return None if self.positive is None else parse_positive(self.positive)

    @property
    def columns(self) -> tuple[str, ...]:
        """The label columns; one, except for some multilabel tasks."""
        return (self.column,) if isinstance(self.column, str) else self.column

    @property
    def num_classes(self) -> int:
        """C, for kinds with classes."""
        if self.classes is None:
            raise SchemaError(f"task '{self.name}' has no classes yet; expected a fitted schema. Fit it on train rows")
        return len(self.classes)

    @property
    def width(self) -> int:
        """C_k, the number of outputs of the task's tower."""
        if self.kind in ("multiclass", "multilabel"):
            return self.num_classes
        return 3 if self.kind == "zero_inflated" else 1

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The axes after the row axis of what losses and metrics read; () for one number a row.

        It is the tower's width, or what the loss's own parameters make of one score: C - 1 cumulative logits (ordinal),
        log mean and log size (``negative_binomial``).
        """
        if self.kind == "ordinal":
            return (self.num_classes - 1,)
        if self.loss == "negative_binomial":
            return (2,)
        return (self.width,) if self.kind in ("multiclass", "multilabel", "zero_inflated") else ()

    @property
    def has_classes(self) -> bool:
        return KINDS[self.kind].has_classes

    @property
    def metric(self) -> str:
        """Name of the monitored metric."""
        return KINDS[self.kind].metric

    @property
    def higher_is_better(self) -> bool:
        return KINDS[self.kind].higher_is_better

    @property
    def loss_weight(self) -> float:
        """Factor of the task's loss; 1 where ``weight`` is a column."""
        return 1.0 if isinstance(self.weight, str) else float(self.weight)


def parse_positive(text: str) -> Comparison:
    """Reads ``"> 3"`` or ``"rating > 3"``: an optional column, one of >=, <=, ==, !=, >, <, and a finite number.

    Raises:
      SchemaError: for anything else; nothing is evaluated.
    """
    match = _COMPARISON.fullmatch(text)
    try:
        number = float(match["number"]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise SchemaError(
            f"positive '{text}' is not a comparison; expected '[column] operator number' with an operator of "
            f"{list(OPERATORS)}, like 'rating > 3'. Write it so, or add a 0/1 column"
        )
    return Comparison(match["column"] or None, match["operator"], number)
