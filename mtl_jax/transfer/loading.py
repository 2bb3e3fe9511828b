"""Artefacts, the arrays of a model with what they mean, and loading them into another model without surprises."""

import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import mtl_jax
from mtl_jax.arguments import shown
from mtl_jax.data.schema import Schema, Vocabulary
from mtl_jax.errors import ConfigError, MissingFile, RunFolderError
from mtl_jax.model import MultiTaskModel, is_table, label
from mtl_jax.train.state import Functional

ARRAYS, MANIFEST, FORMAT = "arrays.npz", "manifest.json", 1
NEW_ROWS = ("fresh", "mean", "unk")
UNKNOWN, FIRST = 1, 2
"""Rows of a table: 0 pads, 1 is for what is out of vocabulary, the values follow."""
LISTED = 12
"""Paths that an error names of each side."""
SAME_TASK = ("kind", "loss", "classes", "positive", "space")
"""What makes the labels of two tasks of one name mean the same."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Where the rest of a model is, of which an artefact has only what was tuned (see :func:`mtl_jax.transfer.tuning_of`).

    Attributes:
      base: Hash of the artefact that has it.
      strategy: Class of the adaptation, with its module.
      options: Of the adaptation.
      loaded: Target path -> path of the base, of what the base gives.
    """

    base: str
    strategy: str
    options: Mapping[str, Any]
    loaded: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Artefact:
    """What a source hands on, or what a target has made of it.

    Attributes:
      arrays: Path -> array, of all parameters and states of the model; with ``tuning`` of what was tuned.
      schema: Fitted; it says what ids, numbers and labels mean.
      facts: Anything else worth keeping (metrics, configuration, seed), of plain JSON types.
      tuning: What else the model consists of; None: nothing, ``arrays`` are all of it.
    """

    arrays: Mapping[str, np.ndarray]
    schema: Schema
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuning: Tuning | None = None

    @classmethod
    def of(cls, model: MultiTaskModel, schema: Schema, **facts: Any) -> "Artefact":
        """That of a model, such as ``Result.model()`` gives, and the schema that it was trained with."""
        return cls(
            {path: np.asarray(array) for path, array in trained_arrays(*Functional.of(model)).items()}, schema, facts
        )

    @property
    def hash(self) -> str:
        """Of the arrays and of what they mean."""
        content = json.dumps([self._digests(), self.schema.to_dict(), *self._tunings()], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def num_numbers(self) -> int:
        """How many numbers the arrays have."""
        return sum(array.size for array in self.arrays.values())

    def save(self, folder: str | os.PathLike) -> None:
        """Writes ``arrays.npz`` and ``manifest.json`` (shapes, types and digests of the arrays, schema, facts, version).

        Raises:
          ConfigError: It has what was tuned, and not the tower of each task.
          RunFolderError: The folder has an artefact already, or cannot be written.
        """
        self.check_towers()
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            raise RunFolderError(f"'{folder}' has an artefact already; expected a folder without. Choose another")
        buffer = io.BytesIO()
        np.savez(buffer, **self.arrays)
        manifest = {
            "format": FORMAT,
            "hash": self.hash,
            "arrays": self._digests(),
            "schema": self.schema.to_dict(),
            "facts": dict(self.facts),
            "mtl_jax": mtl_jax.__version__,
        }
        if self.tuning is not None:
            manifest["tuning"] = dataclasses.asdict(self.tuning)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ARRAYS).write_bytes(buffer.getvalue())
            partial = folder / f"{MANIFEST}.partial"  # last, and at once: a folder with a manifest is whole
            partial.write_text(json.dumps(manifest, indent=1, allow_nan=False))
            partial.replace(folder / MANIFEST)
        except OSError as error:
            raise RunFolderError(f"cannot write to '{folder}' ({error.strerror}). Choose another folder") from error

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Artefact":
        """The artefact of a folder.

        Raises:
          MissingFile: There is none.
          RunFolderError: It is damaged: an array, or what the arrays mean, is not what the manifest says.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise MissingFile(f"'{folder}' has no {MANIFEST}; expected the folder of an artefact. Save one there first")
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            tuning = Tuning(**manifest["tuning"]) if "tuning" in manifest else None
            arrays, schema = _read_arrays(folder / ARRAYS), Schema.from_dict(manifest["schema"])
            found = cls(arrays, schema, manifest["facts"], tuning)
            whole = found._digests() == manifest["arrays"]
            meant = found.hash == manifest["hash"]
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise RunFolderError(f"the artefact in '{folder}' cannot be read ({error}). Save it again") from error
        if not whole or not meant:
            what = "what its arrays mean is not that" if whole else "the arrays are not those"
            raise RunFolderError(
                f"the artefact in '{folder}' has changed: {what} of its manifest; expected what was saved. Save "
                "it again"
            )
        return found

    def check_towers(self) -> None:
        """Raises a ConfigError for what was tuned without the tower of a task, which the base cannot give."""
        if self.tuning is None:
            return
        having = {label(path) for path in self.arrays}
        if without := [name for name in self.schema.task_names if f"task/{name}" not in having]:
            raise ConfigError(
                f"the artefact has only what was tuned, and no tower of the tasks {without}; expected those of all tasks "
                "of its schema (task/<name>/...), which a base does not have. Train them, and put them in"
            )

    def _tunings(self) -> list[dict[str, Any]]:
        return [] if self.tuning is None else [dataclasses.asdict(self.tuning)]

    def _digests(self) -> dict[str, dict[str, Any]]:
        return {
            path: {
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest(),
            }
            for path, array in sorted(self.arrays.items())
        }


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The members of an ``.npz`` file; none may be a pickle."""
    arrays = {}
    with zipfile.ZipFile(path) as stored:
        for member in stored.namelist():
            with stored.open(member) as file:
                arrays[member.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


class Coverage(NamedTuple):
    """What became of the ids of one vocabulary.

    Attributes:
      known: Ids of the target that the source has: they have its rows.
      new: Ids of the target that it lacks.
      left: Ids of the source that the target lacks.
    """

    known: int
    new: int
    left: int


@dataclasses.dataclass(frozen=True)
class Loading:
    """A loaded model, and what was done.

    Attributes:
      model: The target model; what is not loaded has the values that it had.
      loaded: Target path -> source path.
      reinitialised: Target paths that keep their own values.
      dropped: Source paths that nothing has taken.
      coverage: Target path of a table -> :class:`Coverage`.
      origin: Target path -> True, or bool[V] for the rows of a table: what came from the source.
      rescaled: Numeric features and tasks that the two data sets standardise differently: the same price is another
        number, and the same output another price.
    """

    model: MultiTaskModel
    loaded: dict[str, str]
    reinitialised: tuple[str, ...]
    dropped: tuple[str, ...]
    coverage: dict[str, Coverage]
    origin: dict[str, Any]
    rescaled: tuple[str, ...]


def load(
    model: MultiTaskModel,
    schema: Schema,
    artefact: Artefact,
    *,
    map: Sequence[tuple[str, str]] | None = None,
    drop: Sequence[str] = (),
    reinit: Sequence[str] = (),
    new_rows: str = "fresh",
) -> Loading:
    """The model with arrays of an artefact in place of its own. Every array on either side is accounted for.

    Without ``map`` all shared arrays and tables go to the same path, and those of a task where both have a task of that
    name whose labels mean the same (kind, loss, classes, threshold, space); other tasks' arrays are dropped here and keep
    their own values there. Rows of tables go by the value of an id, never by its number.

    Args:
      model: The target, initialised; it is left as it is.
      schema: Of the target, fitted.
      artefact: Of the source.
      map: Pairs of a pattern for a whole source path and a template of the target path (``re`` syntax, groups as
        ``\\1``); the first pattern that fits counts. It takes the place of the rule above.
      drop: Patterns of source paths that are not loaded.
      reinit: Patterns of target paths that keep their own values.
      new_rows: Rows of ids that the source lacks: ``fresh`` keeps those of the model, ``mean`` is the mean row of the
        source's ids, ``unk`` its row for what is out of vocabulary.

    Raises:
      ConfigError: Something is left over on either side, a pattern fits nothing, a target is named twice, shapes differ,
        ids cannot be matched, or shared layers would read other features than they were trained on. All that is wrong is
        said at once, with paths and shapes. Or the artefact has only what was tuned.

    Example:
      >>> from flax import nnx
      >>> import mtl_jax
      >>> from mtl_jax.transfer import Artefact, load
      >>> source, target = (mtl_jax.data.load("synthetic", num_rows=300, dim=8, seed=seed) for seed in (0, 1))
      >>> trained = mtl_jax.MultiTaskModel(source.schema, rngs=nnx.Rngs(0))
      >>> model = mtl_jax.MultiTaskModel(target.schema, rngs=nnx.Rngs(1))
      >>> artefact = Artefact.of(trained, source.schema)
      >>> loading = load(model, target.schema, artefact, reinit=["task/y2/.*"], drop=["task/y2/.*"])
      >>> sorted({path.split("/")[1] for path in loading.reinitialised})
      ['y2']
    """
    if new_rows not in NEW_ROWS:
        raise ConfigError(f"new_rows is {new_rows!r}; expected one of {list(NEW_ROWS)}. Change it")
    if artefact.tuning is not None:
        raise ConfigError(
            f"the artefact has only what was tuned on the base {artefact.tuning.base}; expected all arrays of a model. "
            "Put it on its base (mtl_jax.transfer.on_base)"
        )
    functional, params, rest = Functional.of(model)
    own = trained_arrays(functional, params, rest)
    pairs, dropped, kept, wrong = _matched(artefact, own, schema, map, drop, reinit)
    loaded, coverage, origin = {}, {}, {}
    for target, source in pairs.items():
        try:
            if is_table(target) and is_table(source):
                loaded[target], origin[target], left = _rows(own[target], target, schema, artefact, source, new_rows)
                known = int(origin[target][FIRST:].sum())
                coverage[target] = Coverage(known, len(origin[target]) - FIRST - known, left)
            else:
                loaded[target], origin[target] = _array(own[target], artefact.arrays[source]), True
        except ConfigError as error:
            wrong.append(f"{source} -> {target}: {error}")
    wrong += _other_inputs(pairs, schema, artefact.schema)
    if wrong:
        raise ConfigError(
            "the artefact does not fit the model:\n- "
            + "\n- ".join(wrong)
            + "\nName what goes where (map), what is left "
            "out (drop), and what keeps its own values (reinit)"
        )
    merged = functional.merge(params | rest | {path: jnp.asarray(array) for path, array in loaded.items()})
    return Loading(merged, pairs, tuple(kept), tuple(dropped), coverage, origin, _rescaled(schema, artefact.schema))


def trained_arrays(functional: Functional, params: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What training changes: parameters and states, and not what was chosen for it, like dropout rates."""
    return dict(params) | {path: rest[path] for path in functional.state_paths}


def _matched(artefact, own, schema, map, drop, reinit) -> tuple[dict[str, str], list[str], list[str], list[str]]:
    """Target -> source, what is dropped, what is kept, and everything that is wrong with it."""
    wrong: list[str] = []
    sources, targets = list(artefact.arrays), list(own)
    dropped, kept = _fitting(drop, sources, "drop", wrong), _fitting(reinit, targets, "reinit", wrong)
    if map is None:
        alike = _same_tasks(schema, artefact.schema)
        dropped |= {path for path in sources if _of_other_task(path, alike)}
        kept |= {path for path in targets if _of_other_task(path, alike)}
        rules: list[tuple[str, Callable]] = [(".*", lambda found: found[0])]
    else:
        rules = [(pattern, lambda found, to=to: found.expand(to)) for pattern, to in map]
    pairs: dict[str, str] = {}
    left, used = [], set()
    for source in sources:
        if source in dropped:
            continue
        for pattern, target_of in rules:
            if found := re.fullmatch(pattern, source):
                used.add(pattern)
                target = target_of(found)
                if target in pairs:
                    wrong.append(f"{source} and {pairs[target]} both go to {target}")
                elif target in own and target not in kept:
                    pairs[target] = source
                else:
                    left.append(source)
                break
        else:
            left.append(source)
    if map is not None:
        wrong += [
            f"map has {shown(pattern)}, which fits no array of the source" for pattern, _ in map if pattern not in used
        ]
    missing = [path for path in targets if path not in pairs and path not in kept]
    for what, paths, arrays in (
        ("of the source have no place", left, artefact.arrays),
        ("of the target have no source", missing, own),
    ):
        if paths:
            wrong.append(f"{len(paths)} arrays {what}: {with_shapes(paths, arrays)}")
    return pairs, sorted(dropped), [path for path in targets if path in kept], wrong


def _fitting(patterns: Sequence[str], paths: Iterable[str], name: str, wrong: list[str]) -> set[str]:
    found = set()
    for pattern in patterns:
        some = {path for path in paths if re.fullmatch(pattern, path)}
        if not some:
            wrong.append(f"{name} has {shown(pattern)}, which fits no array")
        found |= some
    return found


def with_shapes(paths: Sequence[str], arrays: Mapping[str, Any]) -> str:
    text = ", ".join(f"{path} {list(arrays[path].shape)}" for path in paths[:LISTED])
    return f"{text}, ..." if len(paths) > LISTED else text


def _same_tasks(target: Schema, source: Schema) -> set[str]:
    """Tasks that both have, with labels of one meaning."""
    known = {task.name: task for task in source.tasks}
    return {
        task.name
        for task in target.tasks
        if task.name in known and all(getattr(task, field) == getattr(known[task.name], field) for field in SAME_TASK)
    }


def _of_other_task(path: str, tasks: set[str]) -> bool:
    """Whether the path belongs to a task that is none of these."""
    kind, _, task = label(path).partition("/")
    return kind == "task" and task not in tasks


def _array(own: Any, array: np.ndarray) -> np.ndarray:
    if own.shape != array.shape or own.dtype != array.dtype:
        raise ConfigError(f"the source has {array.dtype}{list(array.shape)}, the target {own.dtype}{list(own.shape)}")
    return array


def _rows(
    own: Any, target: str, schema: Schema, artefact: Artefact, source: str, new_rows: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """The rows of a table by the values of ids, which of them are the source's, and how many of its ids have no place."""
    rows = artefact.arrays[source]
    ours, theirs = (one.vocabulary(path.split("/")[-2]) for one, path in ((schema, target), (artefact.schema, source)))
    if rows.shape[1:] != own.shape[1:] or rows.dtype != own.dtype:
        raise ConfigError(
            f"rows of the source are {rows.dtype}{list(rows.shape[1:])}, of the target {list(own.shape[1:])}"
        )
    if ours.hash_buckets or theirs.hash_buckets:
        if ours.hash_buckets != theirs.hash_buckets:
            raise ConfigError(
                f"ids of the source have {theirs.hash_buckets or 'no'} hash buckets, of the target "
                f"{ours.hash_buckets or 'none'}; rows go by ids, or by buckets of one number"
            )
        return _array(own, rows), np.ones(len(rows), bool), 0
    place = _places(theirs)
    found = [place.get(value, -1) for value in _places(ours)]
    known = np.array(found, int) >= 0
    filled = np.array(own)
    filled[:FIRST] = rows[:FIRST]
    filled[FIRST:][known] = rows[np.array(found, int)[known]]
    if new_rows != "fresh":
        filled[FIRST:][~known] = rows[UNKNOWN] if new_rows == "unk" else rows[FIRST:].mean(axis=0)
    return filled, np.concatenate([np.ones(FIRST, bool), known]), len(place) - int(known.sum())


def _places(vocabulary: Vocabulary) -> dict[str, int]:
    """Value -> row."""
    place = {value: FIRST + index for index, value in enumerate(vocabulary.values)}
    if len(place) < len(vocabulary.values):
        raise ConfigError(f"vocabulary '{vocabulary.name}' has a value twice")
    return place


def _other_inputs(pairs: Mapping[str, str], target: Schema, source: Schema) -> list[str]:
    """Layers are loaded for what they read: the same features in the same order."""
    if not any(label(path) == "shared" for path in pairs):
        return []
    found = []
    for what, of in (
        ("embedded features", lambda schema: [f.name for f in (*schema.features,) if f.name not in _numbers(schema)]),
        ("numbers", lambda schema: list(schema.dense_names)),
    ):
        if of(target) != of(source):
            found.append(f"shared layers read the {what} {of(source)} in the source and {of(target)} in the target")
    return found


def _numbers(schema: Schema) -> set[str]:
    return {feature.name for feature in schema.numerics}


def _rescaled(target: Schema, source: Schema) -> tuple[str, ...]:
    def scales(schema):
        return {one.name: (one.mean, one.std, one.transform) for one in (*schema.numerics, *schema.tasks)}

    ours, theirs = scales(target), scales(source)
    return tuple(name for name, scale in ours.items() if name in theirs and scale != theirs[name])
