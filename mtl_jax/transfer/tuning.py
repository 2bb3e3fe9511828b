"""What a tuning that leaves most of its source as it is has changed: an artefact of that alone, and back to a model."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.balancing import equal
from mtl_jax.data.schema import Schema
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.train.adaptation import Adaptation, Origin
from mtl_jax.train.result import Result
from mtl_jax.train.state import Functional
from mtl_jax.train.step import Step
from mtl_jax.transfer.loading import Artefact, Loading, Tuning, load, trained_arrays, with_shapes


def tuning_of(
    result: Result, adaptation: Adaptation, loading: Loading, base: Artefact, schema: Schema, **facts: Any
) -> Artefact:
    """What a run has changed of the base that it was loaded from.

    These are all trained arrays (LoRA's factors and not the kernels that they make, adapters, biases, normalisations; the
    towers), states of modules, and what the base does not have: rows of ids that it never saw, arrays of ``reinit``.

    Args:
      result: Of training ``loading.model``.
      adaptation: By which it was trained. It leaves some arrays of the base as they are.
      loading: Of the base into the target's model.
      base: What was loaded.
      schema: Of the target, fitted.
      **facts: Anything else worth keeping, of plain JSON types.

    Returns:
      An artefact with ``tuning``; :func:`on_base` makes the deployed model of it again, to the last bit.

    Raises:
      ConfigError: See :func:`check_tuning`; or the result is not that of such a run.

    Example:
      >>> from flax import nnx
      >>> import mtl_jax
      >>> from mtl_jax.transfer import Artefact, LoRA, load, on_base, tuning_of
      >>> data = mtl_jax.data.load("synthetic", num_rows=300, dim=8)
      >>> base = Artefact.of(mtl_jax.MultiTaskModel(data.schema, rngs=nnx.Rngs(0)), data.schema)
      >>> loading = load(mtl_jax.MultiTaskModel(data.schema, rngs=nnx.Rngs(1)), data.schema, base)
      >>> result = mtl_jax.train.fit(loading.model, data, epochs=1, adaptation=LoRA(rank=1), origin=loading.origin)
      >>> small = tuning_of(result, LoRA(rank=1), loading, base, data.schema)
      >>> small.num_numbers < base.num_numbers / 2
      True
      >>> model = on_base(mtl_jax.MultiTaskModel(data.schema, rngs=nnx.Rngs(2)), small, base)
    """
    check_tuning(adaptation, loading, schema)
    adaptation = adaptation.simplified()
    parts = _Parts.of(loading.model, adaptation, schema, loading.origin)
    functional, params, rest = Functional.of(result.model)
    found = trained_arrays(functional, params, rest) | result.aux
    if missing := [path for path in parts.moved if path not in found]:
        raise ConfigError(
            f"the result has no {with_shapes(missing, parts.held)}, which {_name(adaptation)} trains; expected the result "
            "of a run that was trained by it. Give that"
        )
    held = parts.held | {path: found[path] for path in parts.moved}
    arrays = {path: np.asarray(array) for path, array in held.items()}
    tuning = Tuning(base.hash, _name(adaptation), _options(adaptation), parts.given(loading))
    artefact = Artefact(arrays, schema, facts, tuning)
    made = trained_arrays(*Functional.of(on_base(loading.model, artefact, base)))
    if other := [path for path in made if path not in found or not np.array_equal(made[path], found[path])]:
        raise ConfigError(
            f"the base and what was tuned do not make the arrays {other} of the result to the last bit; expected a run of "
            "loading.model by this adaptation and origin, and one that trained alone where devices add up several runs in "
            "another order. Give that (vectorize.axis=map), or keep all of the model (Artefact.of)"
        )
    return artefact


def on_base(model: MultiTaskModel, artefact: Artefact, base: Artefact) -> MultiTaskModel:
    """The model that was deployed, of its base and of what was tuned. Every array on either side is accounted for.

    What the deployed arrays are made of is put together as the run did, so that predictions are the same to the last bit.

    Args:
      model: The target's, built from ``artefact.schema`` as the run built it; its values do not matter. It stays as it is.
      artefact: By :func:`tuning_of`.
      base: The artefact that it was tuned on.

    Raises:
      ConfigError: It is another base, an unknown adaptation, or arrays are missing, left over, or of other shapes or types;
        all of them are listed.
    """
    tuning, schema = artefact.tuning, artefact.schema
    if tuning is None:
        raise ConfigError("the artefact has all arrays of a model; expected what was tuned. Load it (load)")
    if base.hash != tuning.base:
        raise ConfigError(
            f"the base has the hash {base.hash} and this was tuned on {tuning.base}; expected that one. Read the artefact "
            "with that hash (its manifest.json says it), or tune on this one"
        )
    adaptation = _adaptation(tuning)
    own = trained_arrays(*Functional.of(model))
    used = set(tuning.loaded.values())
    loading = load(
        model,
        schema,
        base,
        map=[(re.escape(source), target.replace("\\", r"\\")) for target, source in tuning.loaded.items()],
        drop=[re.escape(path) for path in base.arrays if path not in used],
        reinit=[re.escape(path) for path in own if path not in tuning.loaded],
    )
    parts = _Parts.of(loading.model, adaptation, schema, loading.origin)
    _check(artefact.arrays, parts.held)
    filled = dict(parts.own)
    for path, array in artefact.arrays.items():
        if path in filled:
            rows = parts.new_rows.get(path)
            filled[path] = jnp.asarray(array) if rows is None else filled[path].at[rows].set(array)
    functional = parts.step.functional
    step, state = _step(functional.merge(filled), adaptation, schema, loading.origin)
    state = state._replace(params={path: jnp.asarray(artefact.arrays[path]) for path in state.params})
    return functional.merge(step.evaluated(state))


def check_tuning(adaptation: Adaptation, loading: Loading, schema: Schema) -> None:
    """Raises a ConfigError for a run of which :func:`tuning_of` could make nothing: it needs no training to be asked.

    The adaptation has to train in one stage, leave arrays of the base as they are, train the towers of all tasks, and
    deploy what follows from its arrays alone.

    Args:
      adaptation: As for :func:`tuning_of`.
      loading: The same.
      schema: The same.
    """
    adaptation, what = adaptation.simplified(), None
    if not (adaptation.needs_source and adaptation.trains):
        what = "trains nothing that came from a source"
    elif len(adaptation.phases()) > 1:
        what = f"trains in {len(adaptation.phases())} stages"
    elif adaptation.source_batches:
        what = "deploys what follows from rows, too"
    if what is None:
        parts = _Parts.of(loading.model, adaptation, schema, loading.origin)
        if not parts.given(loading):
            what = "leaves nothing of its source as it was"
    if what is not None:
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' {what}, and an artefact of what was tuned has the rest from its base; "
            "expected one like lora, adapter, bitfit or linear_probe. Choose one, or keep all of the model (Artefact.of)"
        )
    Artefact(parts.held, schema, tuning=Tuning("", _name(adaptation), {}, {})).check_towers()


@dataclasses.dataclass(frozen=True)
class _Parts:
    """A loaded model by what becomes of its arrays.

    Attributes:
      step: Of the run.
      own: Path -> array, of all of the model with the modules that training adds.
      moved: Paths of what training changes; those of factors are none of the model's.
      new_rows: Path of a table that stays -> int[n], its rows that did not come from the base; only where there are any.
      held: Path -> initial value, of what the base does not give: what moves, new rows, and arrays that stay and did not
        come from it.
    """

    step: Step
    own: Mapping[str, Any]
    moved: tuple[str, ...]
    new_rows: Mapping[str, np.ndarray]
    held: Mapping[str, Any]

    @classmethod
    def of(cls, model: MultiTaskModel, adaptation: Adaptation, schema: Schema, origin: Origin) -> "_Parts":
        model = adaptation.prepared(model, jax.random.key(0))
        step, state = _step(model, adaptation, schema, origin)
        functional, params, rest = Functional.of(model)
        held = state.params | {path: rest[path] for path in functional.state_paths}
        moved, new_rows = tuple(held), {}
        for path in [path for path in functional.param_paths if path not in moved]:
            if path not in origin:
                held[path] = params[path]
            elif not np.all(origin[path]):
                new_rows[path] = np.flatnonzero(~origin[path])
                held[path] = params[path][new_rows[path]]
        return cls(step, params | rest, moved, new_rows, held)

    def given(self, loading: Loading) -> dict[str, str]:
        """Target path -> source path, of what the base gives, whole or in part."""
        return {target: source for target, source in loading.loaded.items() if target not in self.moved}


def _step(model: MultiTaskModel, adaptation: Adaptation, schema: Schema, origin: Origin) -> tuple[Step, Any]:
    """The step of a run, and its state before it, for what is trained and how it is deployed."""
    (trainable,) = adaptation.phases()
    return Step.of(
        model,
        schema.tasks,
        key=jax.random.key(0),
        balancer=equal(),
        adaptation=adaptation.in_phase(0),
        trainable=trainable,
        origin=origin,
    )


def _check(arrays: Mapping[str, np.ndarray], held: Mapping[str, Any]) -> None:
    wrong = []
    for what, some, others in (
        ("of the artefact have no place", arrays, held),
        ("of the model are not in the artefact", held, arrays),
    ):
        if paths := [path for path in some if path not in others]:
            wrong.append(f"{len(paths)} arrays {what}: {with_shapes(paths, some)}")
    for path in [path for path in held if path in arrays]:
        ours, theirs = held[path], arrays[path]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            wrong.append(
                f"{path}: the artefact has {theirs.dtype}{list(theirs.shape)}, the model {ours.dtype}{list(ours.shape)}"
            )
    if wrong:
        raise ConfigError(
            "what was tuned does not fit the model:\n- "
            + "\n- ".join(wrong)
            + "\nBuild the model as the run did that was tuned"
        )


def _name(adaptation: Adaptation) -> str:
    return f"{type(adaptation).__module__}.{type(adaptation).__qualname__}"


def _options(adaptation: Adaptation) -> dict[str, Any]:
    """Its fields, as plain JSON types."""
    fields = {field.name: getattr(adaptation, field.name) for field in dataclasses.fields(adaptation) if field.init}
    return {name: value.item() if hasattr(value, "item") else value for name, value in fields.items()}


def _adaptation(tuning: Tuning) -> Adaptation:
    """The one that an artefact names, among the classes that this process has imported."""
    known = {f"{one.__module__}.{one.__qualname__}": one for one in _subclasses(Adaptation)}
    if tuning.strategy not in known:
        raise ConfigError(
            f"this was tuned by '{tuning.strategy}', which no imported module has; expected a subclass of Adaptation. "
            "Import its module first"
        )
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in tuning.options.items()}
    try:
        return known[tuning.strategy](**options)
    except TypeError as error:
        raise ConfigError(
            f"this was tuned by '{tuning.strategy}' with the options {sorted(options)} ({error}); expected options that it "
            "has. Use the version of it that tuned"
        ) from error


def _subclasses(of: type) -> Iterator[type]:
    for one in of.__subclasses__():
        yield one
        yield from _subclasses(one)
