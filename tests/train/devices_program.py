"""Trains small models on several virtual devices and writes their parameters; run by test_parallel.py in its own process.

python devices_program.py OUT.npz some|all   (with XLA_FLAGS=--xla_force_host_platform_device_count=8)
"""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml
from flax import nnx

import mtl_jax
from mtl_jax.balancing import equal, graddrop, pcgrad
from mtl_jax.config import build
from mtl_jax.data.batching import as_batch
from mtl_jax.data.dataset import Encoded, TrainingData
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.errors import Interrupted
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import MTAN, AdaptDHM, DSelectK, MMoE, ResFlow, SingleTask, SNRTrans
from mtl_jax.tasks import Task
from mtl_jax.train import BalancingOptions, Optimizer, Step, compile_step, fit
from mtl_jax.train.loop import run_steps
from mtl_jax.train.parallel import Devices
from mtl_jax.train.state import Functional
from mtl_jax.transfer import (
    BSS,
    IMAML,
    MAML,
    MLDG,
    Delta,
    Distill,
    FeatureDistill,
    GradientTransfer,
    LwF,
    MetaSGD,
    Reptile,
)

ROWS, STEPS = 48, 4
PLACES = [("jit", 1), ("jit", 2), ("jit", 8), ("pmap", 2), ("pmap", 8)]
FEW_PLACES = [("jit", 1), ("jit", 8), ("pmap", 8)]
# One of each way in which a step meets a balancer, for a test that does not wait for all of them.
SOME = ("equal", "famo", "graddrop", "modo", "nash_mtl", "samo")
# Values that have no default, what three tasks allow, and parts that the rows of a device divide into.
OPTIONS = {"fixed": {"weights": [1.0, 0.5, 2.0]}, "krum": {"num_byzantine": 0}, "ntkmtl_sr": {"num_micro": 3}}
SOURCE = {"step_size": 0.1, "source_weight": 0.5}
CONF = pathlib.Path(mtl_jax.__file__).parents[1] / "conf" / "balancing"
SCHEMA = Schema(
    (Categorical("user", "user"), Numeric("price")),
    (Vocabulary("user", tuple(map(str, range(18)))),),
    (Task("click", "binary"), Task("spend", "regression"), Task("kind", "multiclass", classes=("a", "b", "c"))),
)


def rows():
    """Labels lie unevenly: devices have none, few or all of a task's, and padding is on the last one only."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 20, (ROWS, 1)).astype(np.int32)
    price = rng.normal(size=(ROWS, 1)).astype(np.float32)
    value = price[:, 0] + np.sin(ids[:, 0])
    place = np.arange(ROWS)
    mask = {"click": place < 20, "spend": rng.random(ROWS) < place / ROWS, "kind": place % 8 < 5}
    labels = {"click": (value < 0).astype(np.float32), "spend": value, "kind": np.digitize(value, [-0.5, 0.5])}
    labels["spend"] = np.where(mask["spend"], value, np.nan).astype(np.float32)
    labels["kind"] = labels["kind"].astype(np.int32)
    weight = rng.uniform(0.5, 1.5, ROWS).astype(np.float32)
    return Encoded(ids, price, {}, {}, labels, mask, {"kind": rng.uniform(0, 2, ROWS).astype(np.float32)}, weight)


def cases(wanted):
    """Balancing configs; then the scopes, private tables, micro-batches, an average, and what strategies bring along."""
    for name in wanted:
        text = (CONF / f"{name}.yaml").read_text()
        node = {key: value for key, value in yaml.safe_load(text).items() if key != "defaults"}
        scope = BalancingOptions(scope=node.pop("scope", "encoder"))
        yield name, {"balancer": build(node | OPTIONS.get(name, {})), "options": scope}
    units = BalancingOptions(scope="representation")
    yield "scope all", {"balancer": pcgrad(), "options": BalancingOptions(scope="all"), "average": 0.5}
    weighted = BalancingOptions(scope="representation", head_gradient="weighted")
    yield "weighted heads", {"balancer": pcgrad(), "options": weighted}
    yield "micro-batches", {"balancer": pcgrad(), "micro_batches": 2, "options": BalancingOptions(scope="shared")}
    yield "gates drawn for all rows", {"balancer": pcgrad(), "sharing": SNRTrans, "micro_batches": 2}
    yield "moments of the batch", {"balancer": pcgrad(), "sharing": ResFlow, "options": units}
    yield "steps on a source", {"balancer": pcgrad(), "adaptation": GradientTransfer(num_steps=2, **SOURCE)}
    yield "steps on domains", {"balancer": pcgrad(), "adaptation": MAML(3, step_size=0.1)}
    yield "features of a teacher", {"balancer": pcgrad(), "adaptation": FeatureDistill()}
    if wanted is not SOME:
        first_order = GradientTransfer(mode="first_order", **SOURCE)
        joint = GradientTransfer(mode="joint", step_size=0.1)
        # a weaker pull leaves systems that are not positive, whose ends depend on rounding
        implicit = GradientTransfer(mode="implicit", step_size=0.1, num_steps=2, proximal=8.0)
        for strategy in (first_order, joint, implicit):
            yield f"mode {strategy.mode}", {"balancer": pcgrad(), "adaptation": strategy}
        over_domains = (MLDG(3, step_size=0.1), MetaSGD(3), IMAML(3, step_size=0.1), MAML(3, first_order=True))
        for strategy in (*over_domains, BSS(weight=0.1), Distill(), LwF(), Delta(weight=0.1)):
            origin = dict.fromkeys(Functional.of(model_of(MMoE))[1], True)
            yield f"{strategy}", {"balancer": pcgrad(), "adaptation": strategy, "origin": origin}
        yield "Reptile", {"balancer": equal(), "adaptation": Reptile(2, num_steps=3, step_size=0.05)}
        yield "masks of units", {"balancer": graddrop(leak=0.5), "options": units}
        plain = BalancingOptions(head_gradient="plain")
        yield "private tables", {"balancer": equal(), "options": plain, "sharing": SingleTask}
        yield "dense tables", {"balancer": equal(), "table_updates": None}
        yield "a penalty on rows", {"balancer": pcgrad(), "sharing": DSelectK}
        yield "parameters in the cut", {"balancer": pcgrad(), "sharing": MTAN, "options": units}
        yield "moments below the scope", {"balancer": pcgrad(), "sharing": ResFlow}
        yield "centres of the batch", {"balancer": equal(), "sharing": AdaptDHM}


def model_of(sharing):
    made = {
        SingleTask: functools.partial(SingleTask, units=(5,)),
        MMoE: functools.partial(MMoE, num_experts=2, expert_units=(5,)),
        SNRTrans: functools.partial(SNRTrans, num_nodes=(2, 2), units=(4, 4, 4), log_alpha=0.0),
        DSelectK: functools.partial(DSelectK, num_experts=3, expert_units=(4,), entropy=0.1),
        MTAN: functools.partial(MTAN, units=(4, 4)),
        ResFlow: functools.partial(ResFlow, units=(4, 4), logits=False),
        AdaptDHM: functools.partial(AdaptDHM, units=(4,)),
    }[sharing]
    return mtl_jax.MultiTaskModel(
        SCHEMA,
        encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5),
        sharing=functools.partial(made, dropout=0.0),
        towers=functools.partial(Tower, units=(4,), dropout=0.0),
        rngs=nnx.Rngs(0),
    )


def train(place, *, sharing=None, **options):
    devices = Devices(*place)
    model = model_of(sharing or MMoE)
    defaults = {"table_updates": {"user": "sparse"}, "optimizer": Optimizer(optax.trace(0.9), learning_rate=0.05)}
    adaptation, batch = options.get("adaptation"), as_batch(rows())
    if adaptation and adaptation.source_batches:  # what the model is deployed with
        options["batches"] = jax.tree.map(lambda column: jnp.stack([column[:9]] * adaptation.source_batches), batch)
    step, initial = Step.of(model, SCHEMA.tasks, key=jax.random.key(0), axis=devices.axis, **defaults | options)
    if adaptation and adaptation.studies:
        found = step.study(initial, batch, np.arange(ROWS).reshape(2, -1))
        initial = initial._replace(kept=initial.kept._replace(arrays=initial.kept.arrays | found))
    run = compile_step(run_steps(step), devices, rows=(2,))
    order = np.tile(np.arange(ROWS, dtype=np.int32), (STEPS, 1))
    order[:, -3:] = -1
    state, sums = run(
        devices.replicate(initial),
        devices.replicate(batch),
        devices.spread(order),
        devices.replicate(np.int32(STEPS)),
        step.numbers(),
    )
    assert int(state.step) == STEPS, "a step was not finite"
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(initial)), "donation took the originals"
    # how many iterations a solver takes is a matter of rounding
    return {**step.evaluated(state), **sums._replace(diagnostics=None)._asdict()}


def moved(folder):
    """Two epochs: on one device; and begun on eight, resumed on one, then on two under pmap."""
    data = TrainingData("world", SCHEMA, rows(), rows(), "0" * 64)
    options = {
        "batch_size": 8,
        "epochs": 3,
        "steps_per_call": 2,
        "optimizer": Optimizer(optax.trace(0.9), learning_rate=0.02),
    }
    options |= {"patience": 0, "table_updates": "sparse", "balancer": pcgrad(), "average": 0.7, "training": "staged"}

    def run(place, calls=None, **more):
        asked = iter(range(1, 100))
        stop = {} if calls is None else {"should_stop": lambda: next(asked) == calls}
        strategy, count = place
        return fit(model_of(MMoE), data, parallel=strategy, devices=count, **options, **stop, **more)

    alone = run(("jit", 1))
    for place, calls in ((("jit", 8), 3), (("jit", 1), 2), (("pmap", 2), None)):
        try:
            last = run(place, calls, checkpoints=folder, checkpoint_seconds=0)
        except Interrupted:
            assert calls is not None
    assert alone.monitor["step"] == last.monitor["step"]
    for name, result in (("alone", alone), ("moved", last)):
        for path, array in Functional.of(result.model)[1].items():
            yield f"{name}|{path}", np.asarray(array)


def main(path, which):
    jax.config.update("jax_disable_most_optimizations", True)
    arrays = {}
    balancers = sorted(path.stem for path in CONF.glob("*.yaml")) if which == "all" else SOME
    for name, options in cases(balancers):
        for place in PLACES if name in balancers and which == "all" else FEW_PLACES:
            for key, array in train(place, **options).items():
                if array is not None:
                    arrays["|".join((name, *map(str, place), key))] = np.asarray(array)
        jax.clear_caches()  # some hundred programs at once map more memory areas than Linux allows a process
    np.savez(path, **arrays)
    np.savez(path.replace("outcomes", "moved"), **dict(moved(path.replace(".npz", ""))))


if __name__ == "__main__":
    main(*sys.argv[1:])
