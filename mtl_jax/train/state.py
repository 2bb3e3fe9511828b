"""TrainState: everything that a run changes, as one pytree; and the functional view of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.model import MultiTaskModel, label, path_name
from mtl_jax.nn import State
from mtl_jax.train.adaptation import AUX, Kept, Params


class TrainState(NamedTuple):
    """What a step reads and returns.

    Attributes:
      step: Finished steps; one that was skipped for a non-finite number counts.
      params: Path -> array, for parameters that are differentiated as a whole.
      rest: Path -> array, for arrays of the model that no optimizer touches.
      opt: Optimizer state of ``params``.
      tables: Path -> rows f32[V, D], for tables of which only the rows of a batch are touched.
      row_opt: Path -> optimizer state of that table.
      slots: Vocabulary -> int32[V], scratch of the row compaction; its content carries no meaning between steps.
      balancer: State of the balancer.
      average: Path -> moving average, of the paths in ``params`` and ``tables``; empty without one.
      selected: Path -> best value so far of parameters that are selected task by task; empty elsewhere.
      kept: What an adaptation reads and no optimizer touches.
      key: Root key of the run; every draw folds in a name and the step.
      live: False once the run met a non-finite loss or gradient; updates stop there.
    """

    step: Int[Array, ""]
    params: Params
    rest: Params
    opt: PyTree
    tables: dict[str, Float[Array, "row width"]]
    row_opt: dict[str, PyTree]
    slots: dict[str, Int[Array, " row"]]
    balancer: PyTree
    average: dict[str, PyTree]
    selected: Params
    kept: Kept
    key: PRNGKeyArray
    live: Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class Functional:
    """A model as a pure function of its arrays. Models that differ in nothing but their arrays have equal ones.

    Attributes:
      graphdef: The static part.
      paths: ``/``-joined path -> path of the array inside the module.
      param_paths: The paths that are trained.
      state_paths: The paths of what a module assigns itself while it trains (:class:`mtl_jax.nn.State`).
    """

    graphdef: Any
    paths: Mapping[str, tuple] = dataclasses.field(compare=False)  # follow from the static part
    param_paths: tuple[str, ...]
    state_paths: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: MultiTaskModel) -> tuple["Functional", Params, Params]:
        """The static part, the trained arrays and the other arrays. The arrays are copies: a donated state owns them."""
        graphdef, *parts = nnx.split(model, nnx.Param, State, ...)
        trained, moved, rest = map(_by_path, parts)
        names = {path: path_name(path, model) for part in (trained, moved, rest) for path in part}
        paths = {name: path for path, name in names.items()}
        trained, moved, rest = (
            {names[path]: jnp.copy(array) for path, array in arrays.items()} for arrays in (trained, moved, rest)
        )
        return cls(graphdef, paths, tuple(trained), tuple(moved)), trained, moved | rest

    def own(self, arrays: Params) -> Params:
        """The arrays without those of an adaptation (``aux/<name>/...``), which have no place in the module."""
        return {path: array for path, array in arrays.items() if path in self.paths or not path.startswith(AUX)}

    def merge(self, *arrays: Params) -> MultiTaskModel:
        """The module with those of these arrays that are its own; together they must cover every path."""
        flat = {self.paths[path]: array for part in arrays for path, array in self.own(part).items()}
        return nnx.merge(self.graphdef, nnx.State(_nest(flat)))

    def states(self, model: MultiTaskModel) -> Params:
        """Path -> array, of the ``state_paths`` as the module has them now."""
        arrays = _by_path(nnx.state(model, State))
        return {path: arrays[self.paths[path]] for path in self.state_paths}


def count_parameters(arrays: Mapping[str, Array]) -> dict[str, int]:
    """Numbers of parameters by kind of label (``embedding``, ``shared``, ``task``, ``aux``) and in ``total``."""
    counts = dict.fromkeys(("embedding", "shared", "task", "aux", "total"), 0)
    for path, array in arrays.items():
        counts[label(path).split("/")[0]] += array.size
        counts["total"] += array.size
    return counts


def shapes_of(tree: PyTree) -> tuple:
    """Structure, shapes and types of a pytree, to find what was compiled for it."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def _by_path(state: nnx.State) -> dict[tuple, Array]:
    return {path: variable[...] for path, variable in nnx.to_flat_state(state)}


def _nest(flat: Mapping[tuple, Array]) -> dict:
    nested: dict = {}
    for path, array in flat.items():
        node = nested
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = array
    return nested
