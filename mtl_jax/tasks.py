"""Tasks: what is predicted, from which column, with which loss and metric. No JAX in here."""

import dataclasses
import math
import re

from mtl_jax.errors import SchemaError


@dataclasses.dataclass(frozen=True)
class Kind:
    """What all tasks of one kind share.

    Attributes:
      losses: Names of functions in :mod:`mtl_jax.losses`; the first is the default.
      metric: Name of the monitored metric.
      higher_is_better: Its direction.
    """

    losses: tuple[str, ...]
    metric: str
    higher_is_better: bool


KINDS: dict[str, Kind] = {
    "binary": Kind(("bce",), "auc", True),
    "multiclass": Kind(("softmax", "sampled_softmax"), "accuracy", True),
    "regression": Kind(("squared", "huber"), "rmse", False),
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
      kind: ``binary``, ``multiclass`` or ``regression``.
      column: Label column; defaults to ``name``.
      loss: Name of the loss; defaults to the first of the kind.
      space: ``all``, or the binary task whose positives are the rows where this label exists.
      mask: Boolean column of observed labels. A null label is unobserved with or without it.
      weight: A number (factor of the task's loss) or a column (row weights of this task).
      implies: A binary task that is 1 wherever this one is 1 (checked).
      classes: Class values of a multiclass task, in the order of their ids; fitted on train when None.
      transform: ``none`` or ``log1p``, applied to a regression target before it is standardised.
      positive: Derives a binary label from ``column`` by a comparison with a number: ``"> 3"``, ``"rating > 3"``.
      positive_weight: Factor of the positives in ``bce``.
      smoothing: Label smoothing of ``softmax``, in [0, 1).
      delta: Threshold of ``huber`` in units of the standardised target, > 0.
      num_sampled: Classes drawn a step by ``sampled_softmax``; >= 1 there, else 0.
      standardise: Whether a regression target is standardised on train.
      mean: Fitted train mean of the transformed target (regression; 0 when not standardised).
      std: Fitted train standard deviation of the transformed target (regression; 1 when not standardised).
      frequencies: Fitted train share of each class (multiclass); the proposal of ``sampled_softmax``.
    """

    name: str
    kind: str
    column: str | None = None
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
        if self.kind not in KINDS:
            raise SchemaError(f"task '{self.name}' has kind '{self.kind}'; expected one of {list(KINDS)}. Set its kind")
        kind = KINDS[self.kind]
        compared = self.comparison.column if self.comparison else None
        if compared and self.column not in (None, compared):
            raise SchemaError(
                f"task '{self.name}' has column '{self.column}' and positive '{self.positive}'; expected one column. "
                "Leave Task.column out"
            )
        object.__setattr__(self, "column", compared or self.column or self.name)
        object.__setattr__(self, "loss", self.loss or kind.losses[0])
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
            (
                self.positive is None or self.kind == "binary",
                f"positive '{self.positive}'",
                "it only for kind 'binary'",
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
    def width(self) -> int:
        """C_k, the number of outputs of the task's head."""
        if self.kind != "multiclass":
            return 1
        if self.classes is None:
            raise SchemaError(f"task '{self.name}' has no classes yet; expected a fitted schema. Fit it on train rows")
        return len(self.classes)

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
