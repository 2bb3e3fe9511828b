"""MultiTaskModel: tables, encoder, sharing strategy and towers, composed for a schema."""

import functools
import inspect
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListOf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mtl_jax.arguments import parameters_of
from mtl_jax.data.schema import Categorical, Feature, MultiHot, Numeric, Schema, Sequence
from mtl_jax.errors import ConfigError, SchemaError
from mtl_jax.nn import Context, Cutpoints, Dispersion, Encoder, Lookup, Mean, Table, Tower, stream
from mtl_jax.sharing import Link, Linked, SharedBottom
from mtl_jax.tasks import Task

OUTPUTS = "outputs"
"""Where the parameters of a task's loss lie, beside its tower."""
TASK, LINKED = "task", "linked"
COPY = "aux/copy"
"""Where copies of a model's parameters are that are trained beside it; they follow the rules of what they are copies of."""
ADAPTER = "aux/adapter"
"""Label of what training adds between shared layers (:class:`mtl_jax.nn.Adapters`); balancing counts it among them."""
ENCODING = ("encoder", "histories")
"""Where the layers lie that make the strategy's input, beside the tables."""


class Inputs(NamedTuple):
    """The model's view of a batch.

    Attributes:
      lookups: Feature -> what it reads from its vocabulary's table.
      dense: Standardised numbers.
      domain: Domain ids.
      weight: Row weights.
    """

    lookups: dict[str, Lookup]
    dense: Float[Array, "batch dense"]
    domain: Int[Array, " batch"] | None
    weight: Float[Array, " batch"] | None


class LinkedCommon(NamedTuple):
    """The cut, where a link ties tasks.

    Attributes:
      sharing: The cut of the strategy.
      logits: Tower -> logits, of the towers that several tasks read.
      representations: Task -> representation, of those that further towers read beside a shared one.
    """

    sharing: Any
    logits: dict[str, Float[Array, " batch"]]
    representations: dict[str, Float[Array, "batch hidden"]]


class MultiTaskModel(nnx.Module):
    """The whole network. Its output is one array of logits (or standardised predictions) a task.

    The parts are given as constructors, so that widths follow from the schema; use ``functools.partial`` to set options.

    Args:
      schema: A fitted schema.
      encoder: ``(num_lookups, num_dense, *, rngs) -> module`` with ``embedding_dim``, ``stddev``, ``out_features``.
      history: ``(width, max_len, *, rngs) -> module``, once per sequence feature: what becomes of its items. A module with
        ``needs_target`` also reads the first categorical feature of the same vocabulary.
      sharing: ``(in_features, tasks, *, rngs) -> Strategy``.
      towers: ``(in_features, out_features, *, rngs) -> module``, once per task; with ``use_bias=False`` for ordinal ones,
        and ``num_domains`` where it asks for it.
      link: ``tasks -> Link``: what ties tasks together at their logits (ESMM and its like); none by default, but where the
        strategy brings one (ResFlow, AITM).
      prior: Names of the features whose embeddings the strategy's gates read beside its input (``context.prior``), for a
        strategy that does; None: user and item.
      rngs: Initialisation. Every part draws from a stream named after it, so a task starts from the same tower and
        private tables whatever the other tasks are.

    Raises:
      SchemaError: There is no feature, a name of a task or vocabulary has a slash, or a history lacks what it compares
        with.
      ConfigError: Strategy or towers need domains or a prior that the data lack, or the link cannot tie these tasks.

    Labels: ``tables`` are ``embedding``; under ``task/<name>`` (towers, parameters of its loss, private tables, a
    strategy's own parts) that task's; the rest ``shared``. Where a link makes the losses of other tasks reach a tower, the
    paths of that task's parts say ``linked/<name>``, and they are shared.

    Example:
      >>> import functools
      >>> from flax import nnx
      >>> import mtl_jax
      >>> from mtl_jax.data.batching import as_batch
      >>> from mtl_jax.sharing import MMoE
      >>> data = mtl_jax.data.load("synthetic", num_rows=300, dim=8)
      >>> sharing = functools.partial(MMoE, num_experts=4, expert_units=(16,))
      >>> model = mtl_jax.MultiTaskModel(data.schema, sharing=sharing, rngs=nnx.Rngs(0))
      >>> outputs = model(as_batch(data.for_training().train))
      >>> {task: z.shape for task, z in outputs.items()}
      {'y1': (250,), 'y2': (250,)}
    """

    def __init__(
        self,
        schema: Schema,
        *,
        encoder: Callable[..., nnx.Module] = Encoder,
        history: Callable[..., nnx.Module] = Mean,
        sharing: Callable[..., nnx.Module] = SharedBottom,
        towers: Callable[..., nnx.Module] = Tower,
        link: Callable[..., Link] = Link,
        prior: ListOf[str] | None = None,
        rngs: nnx.Rngs,
    ):
        _check(schema)
        key = rngs.params()
        self.features = tuple(f for f in schema.features if not isinstance(f, Numeric))
        self.task_names = schema.task_names

        def encoded(owner: str) -> nnx.Module:
            return encoder(len(self.features), len(schema.dense_names), rngs=_rngs(key, f"{owner}encoder"))

        shared_encoder = encoded("")
        self.prior = _prior(prior, schema) if "prior_features" in parameters_of(sharing) else ()
        given = {"num_domains": len(schema.domains), "prior_features": len(self.prior) * shared_encoder.embedding_dim}
        asked, of_towers = _asked(sharing, given, "sharing"), _asked(towers, given, "towers")
        self.link = link(self.task_names)
        towered = self.link.towers
        self.sharing = sharing(shared_encoder.out_features, towered, **asked, rngs=_rngs(key, "sharing"))
        self.link = _link(self.link, self.sharing, schema)

        def tables(owner: str) -> nnx.Dict:
            return nnx.Dict(
                {
                    vocabulary.name: Table(
                        vocabulary.size,
                        shared_encoder.embedding_dim,
                        stddev=shared_encoder.stddev,
                        rngs=_rngs(key, f"{owner}/tables/{vocabulary.name}"),
                    )
                    for vocabulary in schema.vocabularies
                    if any(f.vocabulary == vocabulary.name for f in self.features)
                }
            )

        def tower(task: Task, where: str) -> nnx.Module:
            options = of_towers | ({"use_bias": False} if task.kind == "ordinal" else {})
            return towers(self.sharing.out_features, task.width, **options, rngs=_rngs(key, where))

        private = self.sharing.private_tables

        def histories(owner: str) -> nnx.Dict:
            found = {
                f.name: history(shared_encoder.embedding_dim, f.max_len, rngs=_rngs(key, f"{owner}histories/{f.name}"))
                for f in self.features
                if isinstance(f, Sequence)
            }
            for name, module in found.items():
                if module.needs_target and self._target(name) is None:
                    raise SchemaError(
                        f"'{type(module).__name__}' of sequence '{name}' compares its items with a categorical feature of "
                        "the same vocabulary; expected one. Add it, or choose another history"
                    )
            return nnx.Dict(found)

        if not private or self.sharing.shared_tables:
            self.tables, self.encoder, self.histories = tables("shared"), shared_encoder, histories("")

        def own(task: Task) -> nnx.Dict:
            inputs = {}
            if private:
                names = tables(task.name), encoded(f"{task.name}/"), histories(f"{task.name}/")
                inputs = dict(zip(("tables", "encoder", "histories"), names, strict=True))
            further = {name: f"{task.name}/{name}" for name, of in self.link.extra.items() if of == task.name}
            towers = {"tower": tower(task, f"{task.name}/tower")} if task.name in self.link.towers else {}
            towers |= {name: tower(task, where) for name, where in further.items()}
            return nnx.Dict(towers | _loss_parameters(task) | inputs)

        self.task = nnx.Dict({task.name: own(task) for task in schema.tasks})

    def inputs(self, batch: Mapping[str, Any]) -> Inputs:
        """Pairs features with the arrays of a batch. Padding is recognised here (id 0), so ids may be renumbered after."""
        lookups: dict[str, Lookup] = {}
        column = 0
        for feature in self.features:
            if isinstance(feature, Categorical):
                lookups[feature.name] = Lookup(batch["ids"][:, column])
                column += 1
            elif isinstance(feature, MultiHot):
                lookups[feature.name] = Lookup(*batch["bags"][feature.name])
            else:
                ids = batch["sequences"][feature.name]
                lookups[feature.name] = Lookup(ids, (ids > 0).astype(jnp.float32))
        return Inputs(lookups, batch["dense"], batch.get("domain"), batch.get("weight"))

    def common(self, inputs: Inputs, context: Context = Context()) -> Any:
        """The cut: everything that the heads read from tables, encoder and shared parameters."""
        context = self._with(inputs, context)
        cut = self.sharing.common(self._encoded(inputs, context), context.stream("sharing"))
        if type(self.link) is Link:
            return cut
        logits = {task: self._tower(task, cut, context) for task in (*self.link.shared, *self.link.detached)}
        logits |= {task: jax.lax.stop_gradient(logits[task]) for task in self.link.detached}
        of = set(self.link.extra.values()) & set(self.link.shared)
        return LinkedCommon(cut, logits, {task: self._read(task, cut, context) for task in sorted(of)})

    def gates(self, batch: Mapping[str, Any]) -> dict[str, Float[Array, "..."]]:
        """What the strategy's gates, masks and stitches weigh for a batch (see :meth:`mtl_jax.sharing.Strategy.gates`)."""
        inputs = self.inputs(batch)
        context = self._with(inputs, Context())
        return self.sharing.gates(self._encoded(inputs, context), context)

    def _with(self, inputs: Inputs, context: Context) -> Context:
        """The context with what the batch says of its rows."""
        prior = [inputs.lookups[name](self.tables[self._vocabulary(name)].rows[...]) for name in self.prior]
        prior = jnp.concatenate(prior, axis=-1) if prior else None
        return context._replace(domain=inputs.domain, weight=inputs.weight, prior=prior)

    def _vocabulary(self, feature: str) -> str:
        return next(f.vocabulary for f in self.features if f.name == feature)

    def _encoded(self, inputs: Inputs, context: Context) -> Float[Array, "batch *task in"]:
        """The strategy's input."""
        owners = [self.task[name] for name in self.sharing.tasks] if self.sharing.private_tables else [self]
        if self.sharing.private_tables and self.sharing.shared_tables:
            owners.append(self)
        encoded = [
            owner.encoder(
                [self._value(f, owner, inputs, context) for f in self.features],
                inputs.dense,
                context.stream("encoder"),
            )
            for owner in owners
        ]
        return jnp.stack(encoded, axis=1) if self.sharing.private_tables else encoded[0]

    def _value(self, feature: Feature, owner: Any, inputs: Inputs, context: Context) -> Float[Array, "batch width"]:
        """What a feature reads from the tables of an owner: the model, or a task with tables of its own."""
        rows, lookup = owner.tables[feature.vocabulary].rows[...], inputs.lookups[feature.name]
        if not isinstance(feature, Sequence):
            return lookup(rows)
        history, target = owner.histories[feature.name], None
        if history.needs_target:
            target = inputs.lookups[self._target(feature.name)](rows)
        context = context.stream(f"history/{feature.name}")
        return history(lookup.items(rows), lookup.weight, target, context)

    def _target(self, sequence: str) -> str | None:
        """The categorical feature that says which item is scored."""
        vocabulary = self._vocabulary(sequence)
        found = (f.name for f in self.features if isinstance(f, Categorical) and f.vocabulary == vocabulary)
        return next(found, None)

    def head(self, task: str, common: Any, context: Context = Context()) -> Float[Array, "batch *out"]:
        """Outputs of one task, from the cut: those of its tower, then what the parameters of its loss make of them.

        The context says the domains of the rows, for towers that tell them apart.
        """
        if type(self.link) is Link:
            outputs, own = self._tower(task, common, context), self.task[task]
            return own[OUTPUTS](outputs) if OUTPUTS in own else outputs
        outputs, own = self.linked((task,), common, context).logits[task], self.task[task]
        return own[OUTPUTS](outputs) if OUTPUTS in own else outputs

    def features_of(self, common: Any) -> Float[Array, "batch feature"]:
        """What the towers read, from the cut: an array that all share once, else those of the tasks side by side."""
        cut = common if type(self.link) is Link else common.sharing
        read = [self.sharing.head(task, cut) for task in self.link.towers]
        return read[0] if all(one is read[0] for one in read) else jnp.concatenate(read, axis=-1)

    def linked(
        self,
        tasks: ListOf[str],
        common: LinkedCommon,
        context: Context = Context(),
        labels: Mapping[str, Array] | None = None,
        weight: Mapping[str, Array] | None = None,
    ) -> Linked:
        """What the link makes of the towers that some tasks read (see :class:`mtl_jax.sharing.Link`)."""
        read = {name for task in tasks for name in self.link.reads[task]}
        logits = {name: common.logits[name] for name in sorted(read & set(common.logits))}
        for name in sorted(read - set(self.link.shared)):
            if name in self.link.extra:
                of = self.link.extra[name]
                z = (
                    common.representations[of]
                    if of in common.representations
                    else self._read(of, common.sharing, context)
                )
                logits[name] = self.task[of][name](z, context.stream(f"{of}/{name}"))
            elif name in tasks or name not in logits:
                logits[name] = self._tower(name, common.sharing, context)
        return self.link(logits, labels, weight)

    def row_penalties(
        self, common: Any, context: Context, batch: Mapping[str, Any]
    ) -> dict[tuple[str, ...], Float[Array, " batch"]]:
        """Penalties on rows: of the strategy, keyed by (), and of the link, keyed by tasks to be observed there."""
        own = self.sharing.row_regulariser(common if type(self.link) is Link else common.sharing)
        found = {} if own is None else {(): own}
        if self.link.penalised:
            tasks = sorted({task for names in self.link.penalised for task in names})
            found |= self.linked(tasks, common, context, batch["labels"], batch["mask"]).aux
        return found

    def _tower(self, task: str, common: Any, context: Context) -> Float[Array, "batch *out"]:
        """Outputs of a task's tower, from the cut of the strategy."""
        return self.task[task]["tower"](self._read(task, common, context), context.stream(f"{task}/tower"))

    def _read(self, task: str, common: Any, context: Context) -> Float[Array, "batch hidden"]:
        """What a task's tower reads, from the cut of the strategy."""
        read = self.sharing.head(task, common)
        if context.units is None:
            return read
        factors = context.units.reshape(-1, read.shape[-1])  # a row for each tower, or one for all
        return read * factors[self.link.towers.index(task) % len(factors)]

    def __call__(self, batch: Mapping[str, Any], context: Context = Context()) -> dict[str, Float[Array, "batch *out"]]:
        """Outputs of all tasks for a batch (see :func:`mtl_jax.data.batching.as_batch`)."""
        inputs = self.inputs(batch)
        context = context._replace(domain=inputs.domain)
        common = self.common(inputs, context)
        return {task: self.head(task, common, context) for task in self.task_names}


def _loss_parameters(task: Task) -> dict[str, nnx.Module]:
    if task.kind == "ordinal":
        return {OUTPUTS: Cutpoints(task.frequencies or (1 / task.num_classes,) * task.num_classes)}
    return {OUTPUTS: Dispersion()} if task.loss == "negative_binomial" else {}


def _prior(names: ListOf[str] | None, schema: Schema) -> tuple[str, ...]:
    """Features whose embeddings are the prior."""
    known = [f.name for f in schema.categoricals]
    if names is None:
        return tuple(name for name in (schema.user, schema.item) if name in known)
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"prior names {unknown}; expected categorical features of {known}. Change it")
    return tuple(names)


def _asked(part: Callable[..., Any], given: Mapping[str, int], name: str) -> dict[str, int]:
    """What the constructor of a part asks for of the data; it has to be there, but where it can do without."""
    parameters = parameters_of(part)
    asked = {argument: given[argument] for argument in given if argument in parameters}
    absent = {
        argument
        for argument, value in asked.items()
        if value == 0 and parameters[argument].default is inspect.Parameter.empty
    }
    if "num_domains" in absent:
        raise ConfigError(
            f"{name} needs domains and the data have none; expected data with domains. Name their column (data.domain), or "
            f"choose another {name}"
        )
    if "prior_features" in absent:
        raise ConfigError(
            f"{name} reads embeddings of user and item and the data have neither as a feature; expected one. Name features "
            f"in prior=[...], or choose another {name}"
        )
    return asked


def _link(link: Link, sharing: nnx.Module, schema: Schema) -> Link:
    """The link of a model: the one that was asked for, or that of the strategy."""
    own, kind = sharing.link(), type(link).__name__
    if own is not None and type(link) is not Link:
        raise ConfigError(
            f"'{type(sharing).__name__}' ties tasks by itself, and link is {kind}; expected none. Set link=none"
        )
    if type(link) is not Link and sharing.private_tables:
        raise ConfigError(
            f"link {kind} ties towers and '{type(sharing).__name__}' gives each task tables of its own; expected shared "
            "tables. Set sharing.share_embeddings=true, or another sharing"
        )
    link = link if own is None else own(link.tasks)
    link.check({task.name: (task.kind, task.space) for task in schema.tasks})
    return link


def _check(schema: Schema) -> None:
    if not schema.features:
        raise SchemaError(
            "the schema has no features; expected at least one. Add columns to data.categorical or numeric"
        )
    slashed = [name for name in (*schema.task_names, *(v.name for v in schema.vocabularies)) if "/" in name]
    if slashed:  # paths of parameters are joined by slashes, and labels are read from them
        raise SchemaError(f"tasks or vocabularies {slashed} have a '/'; expected names without it. Rename them")


def _rngs(key: jax.Array, name: str) -> nnx.Rngs:
    return nnx.Rngs(params=stream(key, name))


def path_name(path: tuple, model: nnx.Module) -> str:
    """The ``/``-joined name of an array, from which its label is read.

    What lies under ``task/<name>`` is there called ``linked/<name>`` where the losses of other tasks reach it, through the
    model's link or because the strategy reads the tables of a task for all.
    """
    parts = [str(part) for part in path]
    link = getattr(model, "link", None)
    if isinstance(link, Link) and TASK in parts[:-1]:
        place = parts.index(TASK)
        reached = parts[place + 1] in link.shared and not set(parts) & set(link.extra)
        if reached or (model.sharing.reads_all_tables and parts[place + 2] in ("tables", *ENCODING)):
            parts[place] = LINKED
    return "/".join(parts)


def label(path: str) -> str:
    """The label of a parameter, from its path: ``embedding``, ``shared``, ``task/<name>`` or ``aux/<name>``."""
    parts = path.removeprefix(f"{COPY}/").split("/")
    if parts[0] == "tables" or (parts[0] == LINKED and is_table(path)):  # first: a vocabulary may be named 'task'
        return "embedding"
    if parts[0] in ENCODING:  # a feature may be so named too
        return "shared"
    for kind in (TASK, "aux"):
        if kind in parts[:-1]:
            return f"{kind}/{parts[parts.index(kind) + 1]}"
    return "shared"


@functools.cache
def is_table(path: str) -> bool:
    """Whether the path is an embedding table, shared or private."""
    parts = path.split("/")
    return len(parts) >= 3 and parts[-3] == "tables" and parts[-1] == "rows"


@functools.cache
def of_encoder(path: str) -> bool:
    """Whether the path is in an encoder or a history, the shared ones or a task's."""
    parts = path.split("/")
    return parts[0] in ENCODING or (len(parts) > 3 and parts[0] in (TASK, LINKED) and parts[2] in ENCODING)


@functools.cache
def of_loss(path: str) -> bool:
    """Whether the path is a parameter of a task's loss (cutpoints, dispersion), and no weight of the network."""
    parts = path.removeprefix(f"{COPY}/").split("/")
    return len(parts) > 3 and parts[0] == "task" and parts[2] == OUTPUTS


def decays(path: str) -> bool:
    """Whether weight decay may act on the parameter: not on those of a loss."""
    return not of_loss(path)
