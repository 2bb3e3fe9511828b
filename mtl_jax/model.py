"""MultiTaskModel: tables, encoder, sharing strategy and towers, composed for a schema."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema
from mtl_jax.errors import ConfigError, SchemaError
from mtl_jax.nn import Context, Cutpoints, Dispersion, Encoder, Lookup, Table, Tower, stream
from mtl_jax.sharing import SharedBottom
from mtl_jax.tasks import Task

OUTPUTS = "outputs"
"""Where the parameters of a task's loss lie, beside its tower."""


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


class MultiTaskModel(nnx.Module):
    """The whole network. Its output is one array of logits (or standardised predictions) a task.

    The parts are given as constructors, so that widths follow from the schema; use ``functools.partial`` to set options.

    Args:
      schema: A fitted schema.
      encoder: ``(num_lookups, num_dense, *, rngs) -> module`` with ``embedding_dim``, ``stddev``, ``out_features``.
      sharing: ``(in_features, tasks, *, rngs) -> Strategy``.
      towers: ``(in_features, out_features, *, rngs) -> module``, once per task; with ``use_bias=False`` for ordinal ones.
      link: None. The place of what will tie tasks together at their logits (ESMM and its like); there is none yet.
      rngs: Initialisation. Every part draws from a stream named after it, so a task starts from the same tower and
        private tables whatever the other tasks are.

    Raises:
      SchemaError: There is no feature, or a name of a task or vocabulary has a slash.

    Labels: ``tables`` are ``embedding``; under ``task/<name>`` (towers, parameters of its loss, private tables, a
    strategy's own parts) that task's; the rest ``shared``.

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
        sharing: Callable[..., nnx.Module] = SharedBottom,
        towers: Callable[..., nnx.Module] = Tower,
        link: None = None,
        rngs: nnx.Rngs,
    ):
        _check(schema)
        if link is not None:
            raise ConfigError(f"link is {link!r}; expected None, because this version has no links. Leave it out")
        key = rngs.params()
        self.features = tuple(f for f in schema.features if not isinstance(f, Numeric))
        self.task_names = schema.task_names
        self.encoder = encoder(len(self.features), len(schema.dense_names), rngs=_rngs(key, "encoder"))
        self.sharing = sharing(self.encoder.out_features, self.task_names, rngs=_rngs(key, "sharing"))

        def tables(owner: str) -> nnx.Dict:
            return nnx.Dict(
                {
                    vocabulary.name: Table(
                        vocabulary.size,
                        self.encoder.embedding_dim,
                        stddev=self.encoder.stddev,
                        rngs=_rngs(key, f"{owner}/tables/{vocabulary.name}"),
                    )
                    for vocabulary in schema.vocabularies
                    if any(f.vocabulary == vocabulary.name for f in self.features)
                }
            )

        def tower(task: Task) -> nnx.Module:
            options = {"use_bias": False} if task.kind == "ordinal" else {}
            return towers(self.sharing.out_features, task.width, **options, rngs=_rngs(key, f"{task.name}/tower"))

        private = self.sharing.private_tables
        if not private:
            self.tables = tables("shared")
        self.task = nnx.Dict(
            {
                task.name: nnx.Dict(
                    {"tower": tower(task)} | _loss_parameters(task) | ({"tables": tables(task.name)} if private else {})
                )
                for task in schema.tasks
            }
        )

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
        context = context._replace(domain=inputs.domain, weight=inputs.weight)
        sets = [self.task[name].tables for name in self.task_names] if self.sharing.private_tables else [self.tables]
        encoded = [
            self.encoder(
                [inputs.lookups[f.name](tables[f.vocabulary].rows[...]) for f in self.features],
                inputs.dense,
                context.stream("encoder"),
            )
            for tables in sets
        ]
        x = jnp.stack(encoded, axis=1) if self.sharing.private_tables else encoded[0]
        return self.sharing.common(x, context.stream("sharing"))

    def head(self, task: str, common: Any, context: Context = Context()) -> Float[Array, "batch *out"]:
        """Outputs of one task, from the cut: those of its tower, then what the parameters of its loss make of them."""
        own = self.task[task]
        outputs = own.tower(self.sharing.head(task, common), context.stream(f"{task}/tower"))
        return own[OUTPUTS](outputs) if OUTPUTS in own else outputs

    def __call__(self, batch: Mapping[str, Any], context: Context = Context()) -> dict[str, Float[Array, "batch *out"]]:
        """Outputs of all tasks for a batch (see :func:`mtl_jax.data.batching.as_batch`)."""
        common = self.common(self.inputs(batch), context)
        return {task: self.head(task, common, context) for task in self.task_names}


def _loss_parameters(task: Task) -> dict[str, nnx.Module]:
    if task.kind == "ordinal":
        return {OUTPUTS: Cutpoints(task.frequencies or (1 / task.num_classes,) * task.num_classes)}
    return {OUTPUTS: Dispersion()} if task.loss == "negative_binomial" else {}


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


def label(path: str) -> str:
    """The label of a parameter, from its path: ``embedding``, ``shared``, ``task/<name>`` or ``aux/<name>``."""
    parts = path.split("/")
    if parts[0] == "tables":  # first, because a vocabulary may be named 'task'
        return "embedding"
    for kind in ("task", "aux"):
        if kind in parts[:-1]:
            return f"{kind}/{parts[parts.index(kind) + 1]}"
    return "shared"


@functools.cache
def is_table(path: str) -> bool:
    """Whether the path is an embedding table, shared or private."""
    parts = path.split("/")
    return len(parts) >= 3 and parts[-3] == "tables" and parts[-1] == "rows"


@functools.cache
def of_loss(path: str) -> bool:
    """Whether the path is a parameter of a task's loss (cutpoints, dispersion), and no weight of the network."""
    parts = path.split("/")
    return len(parts) > 3 and parts[0] == "task" and parts[2] == OUTPUTS


def decays(path: str) -> bool:
    """Whether weight decay may act on the parameter: not on those of a loss."""
    return not of_loss(path)
