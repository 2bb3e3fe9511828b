"""The train step: one pure function from (state, batch) to (state, sums)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.reuse import reuse
from mtl_jax.data.batching import take
from mtl_jax.errors import ConfigError
from mtl_jax.model import Inputs, MultiTaskModel, is_table, of_loss
from mtl_jax.nn import Context, stream
from mtl_jax.sharing import Link, Strategy
from mtl_jax.tasks import Task
from mtl_jax.train import average, tables
from mtl_jax.train.adaptation import TEACHER, Adaptation, Kept, Origin, RowsLoss, View
from mtl_jax.train.average import RowAverage
from mtl_jax.train.checks import check_adaptation, check_episodes, check_numerics
from mtl_jax.train.cut_model import below_cut
from mtl_jax.train.direction import diagnostic_names
from mtl_jax.train.gradients import (
    Balanced,
    BalancingOptions,
    acts_on_units,
    balanced_gradients,
    check_scope,
    scope_template,
    task_losses,
)
from mtl_jax.train.objective import Objective, TaskLoss, label_weights
from mtl_jax.train.optimizer import Optimizer, by_group, clip
from mtl_jax.train.parallel import mean, total
from mtl_jax.train.state import Functional, Params, TrainState


class Sums(NamedTuple):
    """What a step adds up on the device; averages are formed on the host, after many steps.

    Attributes:
      steps: Updates made.
      numerator: Weighted element losses of each task.
      denominator: Weights of each task's observed labels.
      weight: Balancing weights, summed over steps.
      skipped: Steps without an update, because something was not finite.
      nonfinite: Steps in which each task's loss was not finite.
      null_rows: Active tasks without a gradient.
      cosines: Of each pair of task gradients; 0 where either is 0 or is not computed.
      compared: Steps in which each pair had one.
      diagnostics: Numbers of the balancer (see :func:`mtl_jax.train.direction.diagnostic_names`).
    """

    steps: Int[Array, ""]
    numerator: Float[Array, " task"]
    denominator: Float[Array, " task"]
    weight: Float[Array, " task"]
    skipped: Int[Array, ""]
    nonfinite: Int[Array, " task"]
    null_rows: Int[Array, ""]
    cosines: Float[Array, "task task"]
    compared: Int[Array, "task task"]
    diagnostics: dict[str, Float[Array, ""]]

    @classmethod
    def zeros(cls, num_tasks: int, names: Sequence[str] = ()) -> "Sums":
        count, vector, pairs = jnp.zeros((), jnp.int32), jnp.zeros(num_tasks), (num_tasks, num_tasks)
        bad = jnp.zeros(num_tasks, jnp.int32)
        numbers = {name: jnp.zeros(()) for name in names}
        cosines, compared = jnp.zeros(pairs), jnp.zeros(pairs, jnp.int32)
        return cls(count, vector, vector, vector, count, bad, count, cosines, compared, numbers)


class Numbers(NamedTuple):
    """Numeric hyperparameters of a step.

    Attributes:
      balancer: The balancer, a pytree whose leaves are its numbers.
      optimizer: See :meth:`mtl_jax.train.optimizer.Optimizer.numbers`.
      adaptation: The same as the balancer.
    """

    balancer: Balancer
    optimizer: dict[str, Any]
    adaptation: Adaptation | None


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A train step for one model, one objective, one balancer and one optimizer. Pure, and without a strategy's name.

    Attributes:
      functional: Static view of the model.
      tasks: In the order of every per-task array.
      objective: Reduction of the losses.
      balancer: The method, with the tasks filled in.
      options: Scope and head gradient.
      optimizer: Updates.
      sparse: Vocabulary -> features, for tables of which only the touched rows are updated.
      link: What ties the tasks; read for what it says of itself, never called.
      micro_batches: Parts that a batch is computed in, one after the other, to bound memory; they divide the batch.
      precision: Type of the network's arithmetic, ``float32`` or ``bfloat16``. Parameters, tables, losses, sums of
        gradients, Gramian, solvers and optimizer stay in float32.
      average: Decay of a moving average of the parameters, in (0, 1); None keeps none.
      axis: Named axis of devices to sum over (see :class:`mtl_jax.train.parallel.Devices`).
      adaptation: What training owes to a source; None: nothing.
      frozen: Whether an adaptation trains nothing below the cut, which then runs as in evaluation.
    """

    functional: Functional
    tasks: tuple[Task, ...]
    objective: Objective
    balancer: Balancer
    options: BalancingOptions
    optimizer: Optimizer
    sparse: Mapping[str, tuple[str, ...]]
    link: Link
    micro_batches: int = 1
    precision: str = "float32"
    average: float | None = None
    axis: str | None = None
    adaptation: Adaptation | None = None
    frozen: bool = False

    def __post_init__(self):
        check_numerics(self.precision, self.average)

    @classmethod
    def of(
        cls,
        model: MultiTaskModel,
        tasks: Sequence[Task],
        *,
        key: jax.Array,
        objective: Objective = Objective(),
        balancer: Balancer,
        options: BalancingOptions = BalancingOptions(),
        optimizer: Optimizer = Optimizer(),
        table_updates: Mapping[str, str] | None = None,
        micro_batches: int = 1,
        precision: str = "float32",
        average: float | None = None,
        axis: str | None = None,
        trainable: Callable[[str], bool] = lambda path: True,
        start: int = 0,
        adaptation: Adaptation | None = None,
        origin: Origin | None = None,
        batches: PyTree = None,
    ) -> tuple["Step", TrainState]:
        """The step of a model and the state before the first one.

        Args:
          model: Its arrays are copied.
          tasks: Those of the model's schema.
          key: Root key of the run's dropout and draws.
          objective: Reduction of the losses.
          balancer: The method.
          options: Scope and head gradient.
          optimizer: Updates.
          table_updates: Vocabulary -> ``dense`` or ``sparse`` (see :func:`mtl_jax.train.tables.choose`); dense if absent.
          micro_batches: As in the class.
          precision: As in the class.
          average: As in the class.
          axis: As in the class.
          trainable: Whether a parameter, named by its path, is trained; the others are not even differentiated.
          start: Number of updates that lie behind the model's values.
          adaptation: As in the class.
          origin: What of the model's values came from a source.
          batches: Batches of the source that the model is deployed with, stacked, for an adaptation that has any.

        Raises:
          ConfigError: The tasks are not the model's, or the balancer cannot work with this model.
        """
        if tuple(task.name for task in tasks) != model.task_names:
            raise ConfigError(
                f"the tasks are {[task.name for task in tasks]}; the model was built for {list(model.task_names)}. "
                "Build the model from the same schema"
            )
        functional, params, rest = Functional.of(model)
        rest |= {path: array for path, array in params.items() if not trainable(path)}
        params = {path: array for path, array in params.items() if trainable(path)}
        optimizer.check_names([*params, *rest])
        kept: dict[str, Params] = {}
        groups: dict[str, int] = {}
        of_model = params
        if adaptation is not None:
            adaptation = adaptation.simplified()
            check_adaptation(adaptation, functional, average)
            if rates := adaptation.rates(params):
                optimizer = dataclasses.replace(optimizer, rate_scale=optimizer.rate_scale | rates)
            params, kept = adaptation.init(params, origin or {}, stream(key, "transfer"))
            groups = adaptation.groups(params)
            if TEACHER in kept:  # with the moments of its own
                kept[TEACHER] |= {path: jnp.copy(rest[path]) for path in functional.state_paths}
        balancer = balancer.for_tasks(tasks)
        check_scope(of_model, balancer, options, micro_batches)
        if adaptation is not None and adaptation.episodes:
            check_episodes(adaptation, balancer, options, micro_batches)
            number = adaptation.episodes.num_domains  # gradients are those of the adapted parameters
            of_model = {path: jnp.broadcast_to(array, (number, *array.shape)) for path, array in of_model.items()}
        if functional.state_paths and (micro_batches > 1 or acts_on_units(balancer, options)):
            which = f"balancing '{type(balancer).__name__}' at scope 'representation'"
            which = f"trainer.micro_batches={micro_batches}" if micro_batches > 1 else which
            raise ConfigError(
                f"'{type(model.sharing).__name__}' keeps statistics of whole batches, and {which} computes a batch in "
                "parts; expected a batch in one. Change it, or choose another sharing"
            )
        if options.update_every > 1:
            balancer = reuse(balancer, every=options.update_every)
        chosen = {name for name, choice in (table_updates or {}).items() if choice == tables.SPARSE}
        readers = {
            f.vocabulary: tuple(g.name for g in model.features if g.vocabulary == f.vocabulary) for f in model.features
        }
        sparse = {name: readers[name] for name in readers if name in chosen}
        by_rows = {path for path in params if is_table(path) and _vocabulary(path) in sparse}
        whole = {path: array for path, array in params.items() if path not in by_rows}
        sparse = {name: sparse[name] for name in sparse if name in map(_vocabulary, by_rows)}
        step = cls(
            functional, tuple(tasks), objective, balancer, options, optimizer, sparse, model.link,
            micro_batches=micro_batches, precision=precision, average=average, axis=axis, adaptation=adaptation,
            frozen=adaptation is not None and not any(below_cut(path) for path in of_model),
        )  # fmt: skip
        rows = {path: params[path] for path in sorted(by_rows)}
        sizes = {_vocabulary(path): array.shape[0] for path, array in rows.items()}
        state = TrainState(
            step=jnp.asarray(start, jnp.int32),
            params=whole,
            rest=rest,
            opt=by_group(optimizer.dense(), groups).init(whole),
            tables=rows,
            row_opt={path: optimizer.rows(path).init(array) for path, array in rows.items()},
            slots={name: jnp.zeros(size, jnp.int32) for name, size in sizes.items()},
            balancer=balancer.init(
                len(tasks), scope_template({p: a for p, a in of_model.items() if p not in by_rows}, options.scope)
            ),
            average=_first_average(whole, rows, start) if average else {},
            selected={},
            kept=Kept(kept, batches),
            key=key,
            live=jnp.array(True),
        )
        return step, state

    def numbers(self) -> "Numbers":
        """The numeric hyperparameters as arrays, which a compiled program takes as an argument."""
        # 1 and 1.0 are one number: the type must not tell programs apart
        numbers = Numbers(self.balancer, self.optimizer.numbers(), self.adaptation)
        return jax.tree.map(lambda number: jnp.asarray(number, float), numbers)

    def with_numbers(self, numbers: "Numbers") -> "Step":
        """The same step with other numbers."""
        return dataclasses.replace(
            self,
            balancer=numbers.balancer,
            optimizer=self.optimizer.with_numbers(numbers.optimizer),
            adaptation=numbers.adaptation,
        )

    def program(self) -> tuple:
        """What steps have in common that share a compiled program: all but the values of :meth:`numbers`."""
        sparse = tuple((name, features) for name, features in self.sparse.items())
        return (
            self.functional, self.tasks, self.objective, type(self.balancer), jax.tree.structure(self.numbers()),
            self.options, self.optimizer.program(), sparse, self.micro_batches, self.precision, self.average, self.axis,
            self.frozen,
            # the class and static fields of the adaptation are in the structure of the numbers
        )  # fmt: skip

    def __call__(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Sums]:
        """One update. After a non-finite step (``nonfinite="raise"``) nothing changes any more and nothing is counted."""
        key = jax.random.fold_in(state.key, state.step)
        inputs = self.model_of(state).inputs(batch)
        slots, compacted = dict(state.slots), {}
        for name, features in self.sparse.items():
            inputs, slots[name], compacted[name] = tables.renumber(inputs, features, slots[name], self.axis)
        rows = {path: table[compacted[_vocabulary(path)].ids] for path, table in state.tables.items()}
        before = state.params | rows
        forward, penalty, inputs, batch = self._adaptation(state, inputs, batch, compacted, key)
        adapted, pull = (before, None) if forward is None else jax.vjp(forward, before)
        problem = self._problem(adapted, state, batch, key)
        problem = problem._replace(rows=self._rows(inputs, batch, key))
        if self.by_domain:
            problem = _of_domains(problem, self.adaptation.domain_weights())
        balanced = self._balance(adapted, state, problem, key)
        if self.by_domain and self.adaptation.interpolates:
            gradients = {path: array - jnp.mean(adapted[path], axis=0) for path, array in before.items()}
        else:
            gradients = balanced.gradients
            if pull is not None:
                gradients = mean(pull(gradients)[0], self._spread)
        if penalty is not None:
            gradients = jax.tree.map(jnp.add, gradients, penalty(before))
        groups, num_begun = self._groups(state)
        begun = {path: group < num_begun for path, group in groups.items()}
        gradients |= {path: jnp.where(on, gradients[path], 0) for path, on in begun.items()}
        gradients, norm = clip(gradients, self.optimizer.clip_norm)
        finite = ~balanced.info["nonfinite"] & jnp.isfinite(norm)
        update = state.live & finite
        proceed = state.live if self.objective.nonfinite == "skip" else update

        def select(new, old):
            return jax.tree.map(lambda a, b: jnp.where(update, a, b), new, old)

        dense = {path: gradients[path] for path in state.params}
        updates, opt = by_group(self.optimizer.dense(), groups, num_begun).update(dense, state.opt, state.params)
        params = select(optax.apply_updates(state.params, updates), state.params)
        new_tables, row_opt = {}, {}
        for path, table in state.tables.items():
            new_tables[path], row_opt[path] = tables.update_rows(
                self.optimizer.rows(path),
                table,
                state.row_opt[path],
                compacted[_vocabulary(path)],
                gradients[path],
                update & begun.get(path, True),
            )
        moved = self._moved(problem, state)
        balancer_state = balanced.state
        if self.balancer.observes:
            after = params | {path: table[compacted[_vocabulary(path)].ids] for path, table in new_tables.items()}
            after = after if forward is None else forward(after)
            rows = {name: part for name, part in problem.rows.items() if name != "sample"}
            losses = task_losses(problem.common, problem.heads, after, **rows, axis=self.axis)
            active = (losses.denominator > 0) & update
            balancer_state = self.balancer.observe(losses.loss, balancer_state, active=active)
        new_state = state._replace(
            step=state.step + proceed,
            params=params,
            rest=state.rest | select(moved, {path: state.rest[path] for path in moved}),
            opt=select(opt, state.opt),
            tables=new_tables,
            row_opt=row_opt,
            slots=slots,
            balancer=select(balancer_state, state.balancer),
            average=self._average(state, params, new_tables, compacted, update, proceed) if state.average else {},
            live=proceed,
        )
        return new_state, self._sums(state, balanced, finite)

    @property
    def by_domain(self) -> bool:
        """Whether the rows of a step come by domain, each of which has parameters of its own."""
        return self.adaptation is not None and self.adaptation.episodes is not None

    def evaluated(self, state: TrainState) -> Params:
        """All arrays as they are evaluated and selected: the average of the parameters where there is one.

        What the model's arrays are made of (factors) is there beside them, by its own ``aux/<name>/...``.
        """
        arrays = state.params | state.tables
        for path, kept in state.average.items():
            if isinstance(kept, RowAverage):
                kept = average.forward(kept.rows, kept.seen, state.tables[path], state.step, self.average)
            arrays[path] = kept
        if self.adaptation is not None and self.adaptation.adapts:
            made = _deployed(self, self.numbers(), state._replace(params=arrays, tables={}))
            arrays = {path: array for path, array in arrays.items() if path not in self.functional.paths} | made
        return arrays | state.rest

    def started(self, state: TrainState) -> TrainState:
        """The state that training begins with: moved once by an adaptation that does so."""
        if self.adaptation is None or not self.adaptation.starts:
            return state
        moved = _deployed(self, self.numbers(), state._replace(params=state.params | state.tables, tables={}))
        params, rows = ({path: moved[path] for path in part} for part in (state.params, state.tables))
        kept = state.kept._replace(batches=None)
        average = _first_average(params, rows, state.step) if self.average else {}
        return state._replace(params=params, tables=rows, kept=kept, average=average)

    def study(self, state: TrainState, data: Mapping[str, Any], order: Int[Array, "batch row"]) -> dict[str, Params]:
        """What an adaptation learns of training rows before a phase begins.

        Args:
          state: Its parameters, what is kept, and its key are read.
          data: All rows, as one batch.
          order: Row numbers of the batches; negative ones pad.
        """
        step = dataclasses.replace(self, axis=None)  # every device has all rows
        key = stream(state.key, "transfer/study")
        of_each = jax.vmap(lambda rows: step._denominators(take(data, rows)))(order)
        whole = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), of_each)

        def add_up(function):
            def of(rows):
                batch = take(data, rows)
                return function(step._view(state, step.model_of(state).inputs(batch), batch, key, None, whole))

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of, order[0]))
            return jax.lax.scan(lambda sums, rows: (jax.tree.map(jnp.add, sums, of(rows)), None), zeros, order)[0]

        return self.adaptation.study(state.params | state.tables, state.kept.arrays, add_up)

    def model_of(self, state: TrainState) -> MultiTaskModel:
        """The module, for what it does apart from the values of its arrays."""
        arrays = state.params | state.tables
        if self.adaptation is not None and self.adaptation.adapts and not self.adaptation.source_batches:
            arrays = self.adaptation.adapt(arrays, state.kept.arrays, None, None)
        return self.functional.merge(arrays, state.rest)

    def _adaptation(
        self, state: TrainState, inputs: Inputs, batch: Mapping[str, Any], compacted: Mapping[str, tables.Compact], key
    ) -> "_Adapted":
        """How the model's parameters follow from the trained ones in this step, and the rows of the target in it.

        A batch has a row of the target and one of each source batch in turn, so that wherever it is cut all have their
        share.
        """
        adaptation = self.adaptation
        if adaptation is None:
            return _Adapted(None, None, inputs, batch)
        batches = None
        if self.by_domain:
            shape = tuple(adaptation.episodes)

            def by_block(column):
                turns = _by_turn(column, math.prod(shape))
                return turns.reshape(*shape, *turns.shape[1:])

            inputs, batch = jax.tree.map(by_block, (inputs, dict(batch)))
            episode = inputs, batch, _keys(self._of_device(key), math.prod(shape)).reshape(shape)
            inputs, batch = jax.tree.map(lambda column: column[:, -1], (inputs, batch))
        elif number := adaptation.batches_beside:
            inputs, batch = jax.tree.map(lambda column: _by_turn(column, number + 1), (inputs, dict(batch)))
            batches = *jax.tree.map(lambda column: column[1:], (inputs, batch)), _keys(self._of_device(key), number)
            inputs, batch = jax.tree.map(lambda column: column[0], (inputs, batch))
        rows = {path: compacted[_vocabulary(path)].ids for path in state.tables}
        kept = {
            name: {path: array[rows[path]] if path in rows else array for path, array in arrays.items()}
            for name, arrays in state.kept.arrays.items()
        }

        def forward(params):
            loss = self._source_loss(state, key)
            if self.by_domain:
                return adaptation.adapt_to_domains(params, kept, loss, episode)
            return adaptation.adapt(params, kept, loss, batches)

        def penalty(params):  # of each touched row once, though it may be in several places
            gradient = jax.grad(adaptation.penalty)(params, kept, self._view(state, inputs, batch, key, batches))
            gradient = mean(gradient, self._spread)
            for path, table in state.tables.items():
                touched = compacted[_vocabulary(path)].touched < table.shape[0]
                gradient[path] = jnp.where(touched[:, None], gradient[path], 0)
            return gradient

        return _Adapted(
            forward if adaptation.adapts else None, penalty if adaptation.penalises else None, inputs, batch
        )

    def _view(
        self,
        state: TrainState,
        inputs: Inputs,
        batch: Mapping[str, Any],
        key,
        batches: PyTree,
        denominators: dict[str, Float[Array, ""]] | None = None,
    ) -> View:
        """Of the rows of a step, for a penalty; or of a part of those that the denominators are of."""

        def model_and_cut(params, train):
            model = self.functional.merge(self._in_precision(state.rest), self._in_precision(params))
            drawn = {"rngs": stream(self._of_device(key), "transfer/view"), "axis": self.axis}
            context = Context(train=train, step=state.step, domain=inputs.domain, **drawn)
            return model, model.common(inputs, context), context

        def outputs(params, train):
            model, cut, context = model_and_cut(params, train)
            return {task.name: model.head(task.name, cut, context) for task in self.tasks}

        def features(params, train):
            model, cut, _ = model_and_cut(params, train)
            return model.features_of(cut)

        def loss(params, units=None):
            part = _Part(inputs, batch, key, denominators or self._denominators(batch))
            return self._loss(params, state, part, key, train=False, units=units)

        return View(
            tasks=self.tasks,
            weight=batch["weight"],
            labels=batch["labels"],
            counted={task.name: label_weights(task, batch) > 0 for task in self.tasks},
            outputs=outputs,
            features=features,
            loss=loss,
            source_loss=self._source_loss(state, key),
            batches=batches,
            axis=self.axis,
        )

    def _source_loss(self, state: TrainState, key, train: bool = True) -> RowsLoss:
        """The sum of the tasks' losses on ``(inputs, batch, key)`` of the source."""

        def loss(params, rows):
            inputs, batch, own = rows
            return self._loss(params, state, _Part(inputs, batch, own, self._denominators(batch)), key, train)

        return RowsLoss(loss, self.axis)

    def _loss(self, params: Params, state: TrainState, part: "_Part", key, train: bool, units=None) -> Float[Array, ""]:
        """The sum of the tasks' losses on some rows, of all devices."""
        problem = self._problem(params, state, part.batch, key, train, units)
        return jnp.sum(task_losses(problem.common, problem.heads, params, part=part, axis=self.axis).loss)

    def _average(self, state: TrainState, params, new_tables, compacted, update, proceed):
        step = state.step + 1
        kept = {  # a step without an update counts its old values once more, as it does for rows that wait
            path: jnp.where(proceed, average.update(state.average[path], new, step, self.average), state.average[path])
            for path, new in params.items()
        }
        for path, new in new_tables.items():
            rows, old = compacted[_vocabulary(path)], state.tables[path]
            kept[path] = average.update_rows(state.average[path], old, new, rows, step, self.average, update)
        return kept

    @property
    def _spread(self) -> str | None:
        """The devices whose derivatives of an adaptation differ, since it reads rows; None where none do."""
        adaptation = self.adaptation
        return self.axis if adaptation.source_batches or adaptation.episodes or adaptation.reads_rows else None

    @property
    def by_epoch(self) -> bool:
        """Whether balancer or adaptation wait for :meth:`end_epoch`."""
        return self.balancer.by_epoch or (self.adaptation is not None and self.adaptation.by_epoch)

    def end_epoch(self, state: TrainState) -> TrainState:
        """The state once an epoch has ended and before it is evaluated, for methods that wait for it."""
        if self.balancer.by_epoch:
            state = state._replace(balancer=self.balancer.end_epoch(state.balancer))
        if self.adaptation is not None and self.adaptation.by_epoch:
            arrays, kept = self.adaptation.end_epoch(state.params | state.tables, state.kept.arrays)
            params, rows = ({path: arrays[path] for path in part} for part in (state.params, state.tables))
            state = state._replace(params=params, tables=rows, kept=state.kept._replace(arrays=kept))
            if self.adaptation.afresh:
                row_opt = {path: self.optimizer.rows(path).init(array) for path, array in rows.items()}
                state = state._replace(opt=self.optimizer.dense().init(params), row_opt=row_opt)
        return state

    def _groups(self, state: TrainState) -> tuple[dict[str, int], Int[Array, ""] | int]:
        """Of parameters that begin one after the other: path -> group, and how many groups have begun; else ({}, 0)."""
        groups = {} if self.adaptation is None else self.adaptation.groups(state.params | state.tables)
        return groups, self.adaptation.num_begun(state.kept.arrays) if groups else 0

    def _problem(
        self,
        params: Params,
        state: TrainState,
        batch: Mapping[str, Any],
        key,
        train: bool = True,
        units: Float[Array, " feature"] | None = None,
    ) -> "_Problem":
        """The losses of this step as functions of the parameters and of rows."""

        def merged(replaced):
            return self.functional.merge(self._in_precision(params | dict(replaced)), self._in_precision(state.rest))

        def context(part, train=train):
            keys = {"rngs": stream(part.key, "model"), "step_rngs": stream(key, "model")}
            where = {"axis": self.axis, "domain": part.inputs.domain}
            return Context(train=train, step=state.step, units=units, **where, **keys)

        def common(below, part):
            return merged(below).common(part.inputs, context(part, train and not self.frozen))

        def head(task: Task):
            def loss(own, cut, part):
                model, elements, batch = merged(own), None, part.batch
                if task.name in model.link.evaluated:  # absent from every step
                    return TaskLoss(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
                outputs = model.head(task.name, cut, context(part))
                if task.name in model.link.observed_by:
                    linked = model.linked((task.name,), cut, context(part), batch["labels"], batch["mask"])
                    elements = linked.losses[task.name]
                drawn = stream(part.key, f"loss/{task.name}")
                batch = self._observed(model.link, batch)
                return self.objective(task, outputs, batch, part.denominators[task.name], drawn, elements)

            return loss

        def row_regulariser(params, part):
            model, cut = merged(params), common(params, part)
            penalties = model.row_penalties(cut, context(part), part.batch)
            whole = part.batch if self.by_domain else batch

            def scale(tasks, rows):
                return math.prod([rows["weight"], *(rows["mask"][task] for task in tasks)])

            parts = [
                jnp.vdot(scale(tasks, part.batch), penalty)
                / jnp.maximum(total(scale(tasks, whole).sum(), self.axis), 1e-12)
                for tasks, penalty in penalties.items()
            ]
            return sum(parts, jnp.zeros(()))

        def states(part, moved):
            model = self.functional.merge(self._in_precision(params), self._in_precision(state.rest | moved))
            cut = model.common(part.inputs, context(part, train and not self.frozen))
            for task in self.tasks:
                model.head(task.name, cut, context(part))
            return self.functional.states(model)

        heads = {task.name: head(task) for task in self.tasks}
        return _Problem(common, heads, row_regulariser, states)

    def _balance(self, params: Params, state: TrainState, problem: "_Problem", key) -> Balanced:
        model = self.functional.merge(params, state.rest)
        kind = type(model.sharing)
        on_parameters = kind.regulariser is not Strategy.regulariser
        on_rows = kind.row_regulariser is not Strategy.row_regulariser or model.link.penalised
        return balanced_gradients(
            problem.common,
            problem.heads,
            params,
            **problem.rows,
            balancer=self.balancer,
            state=state.balancer,
            key=stream(key, "balancer"),
            options=self.options,
            regulariser=self._regulariser(state) if on_parameters else None,
            row_regulariser=problem.row_regulariser if on_rows else None,
            learning_rate=lambda path: self.optimizer.rate(path, state.step),
            axis=self.axis,
        )

    def _regulariser(self, state: TrainState) -> Callable[[Params], Float[Array, ""]]:
        """The strategy's penalty on its parameters; weighed over domains where each has its own."""

        def one(params):
            return self.functional.merge(params, state.rest).sharing.regulariser()

        if not self.by_domain:
            return one
        return lambda params: jnp.vdot(self.adaptation.domain_weights(), jax.vmap(one)(params))

    def _rows(self, inputs: Inputs, batch: Mapping[str, Any], key) -> dict[str, "_Part"]:
        """The rows of this device, or their parts, each with a key of its own for what it draws.

        Parts of a step share its denominators, and independent batches of a balancer have their own.
        """
        key = self._of_device(key)
        if self.by_domain and batch["weight"].ndim > 1:
            keys = jax.random.split(key, len(batch["weight"]))
            return {"part": _Part(inputs, batch, keys, jax.vmap(self._denominators)(batch))}
        number = self.micro_batches * self.balancer.num_batches * self.balancer.num_parts
        if acts_on_units(self.balancer, self.options):
            number = batch["weight"].shape[0]
        if number == 1:
            part = _Part(inputs, batch, key, self._denominators(batch))
            if (stride := self.options.row_stride) == 1:
                return {"part": part}
            some, labels = jax.tree.map(lambda column: column[::stride], (inputs, dict(batch)))
            return {"part": part, "sample": _Part(some, labels, key, self._denominators(labels))}

        # every n-th row, so that rows which lie on one device stay there
        parts, labels = jax.tree.map(lambda column: _by_turn(column, number), (inputs, dict(batch)))
        if self.balancer.num_batches == 1:
            denominators = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (number,)), self._denominators(batch))
        else:
            denominators = jax.vmap(self._denominators)(labels)
        return {"parts": _Part(parts, labels, jax.random.split(key, number), denominators)}

    def _of_device(self, key: PRNGKeyArray) -> PRNGKeyArray:
        """For what this device draws for its rows."""
        return key if self.axis is None else jax.random.fold_in(key, jax.lax.axis_index(self.axis))

    def _moved(self, problem: "_Problem", state: TrainState) -> Params:
        """What modules assigned themselves in this step's forward pass; the compiler merges it with that of the losses."""
        moved = {path: state.rest[path] for path in self.functional.state_paths}
        if not moved:
            return moved
        if "part" in problem.rows:
            return problem.states(problem.rows["part"], moved)
        return jax.lax.scan(lambda moved, part: (problem.states(part, moved), None), moved, problem.rows["parts"])[0]

    def _observed(self, link: Link, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the mask of each task's loss, where a link takes it on the rows of another task."""
        mask = batch["mask"]
        return batch | {"mask": mask | {task: mask[other] for task, other in link.observed_by.items()}}

    def _denominators(self, batch: Mapping[str, Any]) -> dict[str, Float[Array, ""]]:
        """Task -> the weights of its observed labels, over all devices."""
        batch = self._observed(self.link, batch)
        return {task.name: total(self.objective.denominator(task, batch), self.axis) for task in self.tasks}

    def _in_precision(self, arrays: Params) -> Params:
        """The arrays that the network computes with.

        Lookups stay as they are: sums over repeated rows need the digits. So do parameters of losses: cutpoints are sums
        of steps down to 1e-4; and running moments, which move by a hundredth.
        """
        if self.precision == "float32":
            return arrays

        def narrow(path):  # nor dropout rates, which are numbers and no arrays
            array = arrays[path]
            kept = is_table(path) or of_loss(path) or path in self.functional.state_paths
            return array.dtype == jnp.float32 and array.ndim > 0 and not kept

        return {path: array.astype(self.precision) if narrow(path) else array for path, array in arrays.items()}

    def _sums(self, state: TrainState, balanced: Balanced, finite) -> Sums:
        counted = state.live & finite
        bad = state.live & ~finite

        cosines = balanced.cosines
        if cosines is None:
            cosines = jnp.zeros((len(self.tasks), len(self.tasks)))

        def keep(array):
            return jnp.where(counted, array, 0)

        return Sums(
            steps=counted.astype(jnp.int32),
            numerator=keep(balanced.losses.numerator),
            denominator=keep(balanced.losses.denominator),
            weight=keep(balanced.weights),
            skipped=bad.astype(jnp.int32),
            nonfinite=(bad & ~jnp.isfinite(balanced.losses.loss)).astype(jnp.int32),
            null_rows=keep(balanced.info["null_rows"]).astype(jnp.int32),
            cosines=keep(cosines),
            compared=keep(cosines != 0).astype(jnp.int32),
            diagnostics={
                name: keep(balanced.info[name]).astype(jnp.float32)
                for name in diagnostic_names(self.balancer, balanced.state)
            },
        )


class _Part(NamedTuple):
    """Rows that are computed together: the model's view, their labels, a key, and what their losses are divided by."""

    inputs: Inputs
    batch: Mapping[str, Any]
    key: PRNGKeyArray
    denominators: dict[str, Float[Array, ""]]


class _Problem(NamedTuple):
    """The losses of a step: to the cut, from there to each task's loss, the penalty on rows, what modules assign
    themselves, and the rows of a train step (``part``, ``parts``, ``sample``)."""

    common: Callable
    heads: dict[str, Callable]
    row_regulariser: Callable
    states: Callable
    rows: dict[str, _Part] | None = None


class _Adapted(NamedTuple):
    """From the trained parameters to those of the model, and to the gradient of a penalty (None: there is none), and the
    rows of the target."""

    forward: Callable[[Params], Params] | None
    penalty: Callable[[Params], Params] | None
    inputs: Inputs
    batch: Mapping[str, Any]


def _of_domains(problem: _Problem, weights: Float[Array, " domain"]) -> _Problem:
    """The losses of rows that come by domain, as functions of parameters that do so too."""

    def head(loss):
        def weighed(own, cut, part):
            found = jax.vmap(loss)(own, cut, part)
            return TaskLoss(jnp.vdot(weights, found.loss), found.numerator.sum(), found.denominator.sum())

        return weighed

    return problem._replace(
        common=jax.vmap(problem.common),
        heads={task: head(loss) for task, loss in problem.heads.items()},
        row_regulariser=lambda params, part: jnp.vdot(weights, jax.vmap(problem.row_regulariser)(params, part)),
    )


def _vocabulary(path: str) -> str:
    return path.split("/")[-2]


def _first_average(params: Params, rows: Params, start: Any) -> dict[str, Any]:
    """Of parameters that have not been trained."""
    return jax.tree.map(jnp.copy, params) | {path: RowAverage.of(array, start) for path, array in rows.items()}


def _by_turn(column: Array, number: int) -> Array:
    """[number, rows / number, ...]: row i goes to batch i mod number."""
    return jnp.moveaxis(column.reshape(column.shape[0] // number, number, *column.shape[1:]), 1, 0)


def _keys(key: PRNGKeyArray, number: int) -> PRNGKeyArray:
    return jax.random.split(stream(key, "transfer"), number)


@functools.partial(jax.jit, static_argnums=0)
def _deployed(step: Step, numbers: Numbers, state: TrainState) -> Params:
    """The model's parameters from the trained ones, tables included; draws and source batches are always the same."""
    step, batches = dataclasses.replace(step.with_numbers(numbers), axis=None), state.kept.batches
    adaptation, loss = step.adaptation, step._source_loss(state, state.key, False)
    if batches is not None:
        model = step.model_of(state)
        batches = jax.vmap(model.inputs)(batches), batches, _keys(state.key, adaptation.source_batches)
    return adaptation.adapt(state.params, state.kept.arrays, loss, batches)
