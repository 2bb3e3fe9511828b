"""Which of several sources a target takes over from."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.data.batching import as_batch, take
from mtl_jax.data.dataset import Encoded
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.tasks import Task
from mtl_jax.train.objective import Objective
from mtl_jax.train.state import Functional

SELECTS = ("given", "largest", "random", "best_source_metric", "gradient_cosine")
MOST_ROWS = 4096
"""Rows of each side that gradients are compared on."""


def choose(candidates: Sequence[str], how: str, *, seed: int, score: Callable[[str], float | None]) -> list[str]:
    """The sources, of the candidates.

    Args:
      candidates: Names.
      how: ``given``: all of them together; ``random``: one, by the seed; else the one with the highest score, the first
        of several; one without a score is the last choice.
      seed: Of ``random``.
      score: Name -> score: training rows for ``largest``, the monitor of its own run on its own validation part for
        ``best_source_metric``, :func:`gradient_cosine` for ``gradient_cosine``. Called where it decides only.

    Raises:
      ConfigError: An unknown way.
    """
    if how not in SELECTS:
        raise ConfigError(f"select is {how!r}; expected one of {list(SELECTS)}. Change it")
    if how == "given" or len(candidates) == 1:
        return list(candidates)
    if how == "random":
        return [candidates[int(np.random.Generator(np.random.PCG64(seed)).integers(len(candidates)))]]
    scores = {name: score(name) for name in candidates}
    return [max(candidates, key=lambda name: -np.inf if scores[name] is None else scores[name])]


def gradient_cosine(model: MultiTaskModel, tasks: Sequence[Task], source: Encoded, target: Encoded) -> float:
    """Cosine of the gradients of two data sets' losses, by all parameters but tables, at those of the model.

    Near the optimum of the source its gradient is small and noisy; on at most 4,096 rows of each, drawn once.

    Args:
      model: Trained on the source.
      tasks: Those of the model.
      source: Training rows of the source.
      target: Training rows of the target, in the same encoding.
    """
    functional, params, rest = Functional.of(model)
    tables = {path: array for path, array in params.items() if path.endswith("/rows")}
    params = {path: array for path, array in params.items() if path not in tables}
    objective = Objective()

    def loss(params, batch):
        outputs = functional.merge(params, tables, rest)(batch)
        return sum(objective(task, outputs[task.name], batch).loss for task in tasks)

    one, other = (
        jax.tree.leaves(jax.grad(loss)(params, take(as_batch(rows), _some(rows.num_rows)))) for rows in (source, target)
    )
    product, *squares = (
        sum(jnp.vdot(a, b) for a, b in zip(x, y, strict=True)) for x, y in ((one, other), (one, one), (other, other))
    )
    length = float(squares[0] * squares[1]) ** 0.5
    return float(product) / length if length else 0.0


def _some(count: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).permutation(count)[:MOST_ROWS].astype(np.int32)
