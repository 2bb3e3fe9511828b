"""Every node in conf/ composes, builds through the gate, and trains two steps."""

import functools
import re
from pathlib import Path

import hydra
import jax
import numpy as np
import polars as pl
import pytest
from omegaconf import OmegaConf

import conf
import mtl_jax
from mtl_jax.arms import METHOD
from mtl_jax.config import build, plain
from mtl_jax.data.batching import as_batch, epoch_order
from mtl_jax.plan import runs_of
from mtl_jax.report.folder import config_hash
from mtl_jax.run_config import KEYS, TRAINER_KEYS, build_model, build_parts
from mtl_jax.train import Step, compile_step
from mtl_jax.train.loop import run_steps
from mtl_jax.train.parallel import Devices

ROOT = Path(conf.__file__).parent
NODES = sorted(
    (path.parent.name, path.stem)
    for path in ROOT.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "data", "budget")
)
EXPERIMENTS = sorted(path.stem for path in ROOT.glob("experiment/*.yaml"))
# Values that a node leaves to the user.
REQUIRED = {
    "fixed": ["balancing.weights={y1: 1.0, y2: 0.5}"],
}
EXPERTS, LEVELS, NODES_OF_SNR = ["sharing.expert_units=[4]"], ["sharing.levels=[[4],[3]]"], ["sharing.units=[4,4,4]"]
SMALL = {
    **dict.fromkeys(("omoe", "mmoe", "cgc", "dselect_k"), EXPERTS),
    **dict.fromkeys(("ple", "adatt", "adatt_sp"), LEVELS),
    **dict.fromkeys(("snr_trans", "snr_aver"), NODES_OF_SNR),
    "sluice": ["sharing.width=4"],
    "dbmtl": ["sharing.units=[4]", "sharing.parents={y2: [y1]}", "sharing.bottom=[4]"],
    "home": LEVELS,
    "stem": EXPERTS,
    "m2m": [],
    "m3oe": [],
    "epnet": ["sharing.inner.expert_units=[4]"],
    "pepnet": ["sharing.inner.units=[4]"],
    "sar_net": [],
    "hamur": [],
}
# What ties binary tasks, or reads domains, user and item.
OF_A_FUNNEL = (
    "aitm", "resflow", "star", "sar_net", "m2m", "adasparse", "hamur", "epnet", "ppnet", "pepnet", "adapt_dhm", "m3oe",
    "feature_augmentation",
)  # fmt: skip
# Data whose rows are made on the spot -> a small one.
GENERATED = {
    "countries": {
        **{"rho": [1.0, 0.5], "rows": [300, 200], "ctr": [0.4, 0.4], "cvr": [0.5, 0.5]},
        **{"users": 40, "items": 20},
    },
    "linear_gaussian": {"dim": 3, "source_rows": 12, "target_rows": 8, "valid_rows": 6, "test_rows": 20},
    "synthetic": {"num_rows": 60, "dim": 3},
}
# Methods that are not defined for two tasks.
MANY_TASKS = ("krum", "trimmed_mean")


def compose(*overrides, name="train"):
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return plain(hydra.compose(name, overrides=list(overrides)))


@functools.cache
def dataset(many_tasks):
    recipe = {"recipe": "kinds"} if many_tasks else {}
    return mtl_jax.data.load("synthetic", num_rows=120, dim=4, **recipe)


@pytest.fixture(scope="module")
def funnel(tmp_path_factory):
    """Clicks and conversions of users in three countries."""
    rng = np.random.default_rng(0)
    user, item, click = rng.integers(0, 9, 160), rng.integers(0, 7, 160), rng.random(160) < 0.6
    conversion = np.where(click, rng.random(160) < 0.5, False)
    columns = {"user": user, "item": item, "country": rng.choice(["es", "fr", "nl"], 160), "price": rng.random(160)}
    labels = {"ctr": click, "ctcvr": click & conversion, "converted": conversion}
    frame = pl.DataFrame(columns | {name: label.astype(int) for name, label in labels.items()})
    path = tmp_path_factory.mktemp("funnel") / "rows.parquet"
    frame.write_parquet(path)
    cvr = {"kind": "binary", "column": "converted", "space": "ctr"}
    return mtl_jax.data.load(
        "table", path=str(path), tasks={"ctr": "binary", "cvr_click": cvr, "ctcvr": "binary"},
        categorical=["user", "item"], numeric=["price"], domain="country", user="user", item="item", split="rows",
    )  # fmt: skip


@pytest.mark.parametrize(("group", "name"), NODES, ids=[f"{group}={name}" for group, name in NODES])
def test_every_node_trains_two_steps(group, name, funnel):
    data = funnel if group == "link" or name in OF_A_FUNNEL else dataset(name in MANY_TASKS)
    small = SMALL.get(name, ["sharing.units=[4]"]) if group == "sharing" else ["sharing.units=[4]"]
    sharing = [] if group == "sharing" else ["sharing=shared_bottom"]
    config = compose("data=synthetic", *small, *sharing, f"{group}={name}", "towers.units=[3]", *REQUIRED.get(name, []))
    assert set(config) - {"summary"} <= set(KEYS)
    assert set(config["trainer"]) == set(TRAINER_KEYS)
    parts = build_parts(config)
    devices = Devices(parts.pop("parallel"), parts.pop("devices"))
    assert parts.pop("training") == "joint"
    model = build_model(config, data)
    step, state = Step.of(model, data.schema.tasks, key=jax.random.key(0), axis=devices.axis, **parts)
    before = jax.device_get(state.params)
    run = compile_step(run_steps(step), devices, rows=(2,))
    order = devices.spread(epoch_order(96, 48, seed=0, epoch=0)[:2])  # three batches a step are possible
    state, rows, count = devices.replicate((state, as_batch(data.for_training().train), np.int32(2)))
    state, sums = run(state, rows, order, count, step.numbers())
    assert int(sums.steps) == 2
    changed = [path for path, array in jax.device_get(state.params).items() if (array != before[path]).any()]
    assert len(changed) >= 0.75 * len(before)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_says_its_command(name):
    text = (ROOT / "experiment" / f"{name}.yaml").read_text()
    job = re.search(rf"python -m experiments\.(train|ablate) experiment={name}\b", text)[1]
    for budget in ("budget=quick", "budget=full") if job == "ablate" else ("seed=1",):
        config = compose(f"experiment={name}", budget, name=job)
        if job == "ablate":
            assert budget in text
            assert len(runs_of(config)) >= 5
            assert all(METHOD.match(key) for key in config["grid"])
        build_parts({key: value for key, value in config.items() if key in KEYS})


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("data/*.yaml")))
def test_every_data_node_names_options_that_the_loader_has(name, tmp_path):
    """Built with its source out of reach, a node fails for the lack of data, and not for an option."""
    config = compose(f"data={name}", *(["data.path=absent.csv"] if name == "table" else []))
    node = dict(config["data"])
    if name in GENERATED:
        assert build(node | GENERATED[name]).name == name
        return
    expected = mtl_jax.errors.MissingFile if name == "table" else mtl_jax.errors.NotCached
    if name != "table":
        node |= {"download": False, "cache_dir": str(tmp_path)}
    with pytest.raises(expected):
        build(node)


def test_the_configuration_is_plain_yaml():
    for path in ROOT.rglob("*.yaml"):
        assert OmegaConf.to_container(OmegaConf.load(path), resolve=False) is not None


@pytest.mark.parametrize("name", ["train", "transfer", "ablate"])
def test_feature_augmentation_is_pooling_with_towers_of_its_own(name):
    """Both nodes can be overridden, and both make it another method than pooling."""
    given = ["target=west", "source=north", "transfer.weight=0.5", "towers.units=[3]"]
    chosen, pooled = (compose(f"transfer={one}", *given, name=name) for one in ("feature_augmentation", "pooled"))
    assert chosen["transfer"] == pooled["transfer"] == {"_target_": "mtl_jax.transfer.Pooled", "weight": 0.5}
    assert chosen["towers"]["_target_"] == "mtl_jax.nn.AugmentedTower"
    assert chosen["towers"] == pooled["towers"] | {"_target_": chosen["towers"]["_target_"]}
    assert {key for key in chosen if chosen[key] != pooled[key]} == {"towers"}
    assert config_hash(chosen) != config_hash(pooled)


def test_a_method_that_defines_an_option_itself_gets_it():
    """``max_norm`` goes to Nash-MTL, and shortens the direction of any other method from outside."""
    for value in (None, 3.0):
        own = build_parts(compose("balancing=nash_mtl", f"balancing.max_norm={'null' if value is None else value}"))
        assert own["balancer"].max_norm == value and own["options"].max_norm is None
    assert build_parts(compose("balancing=nash_mtl"))["balancer"].max_norm == 1.0
    assert build_parts(compose("balancing=mgda", "balancing.max_norm=3.0"))["options"].max_norm == 3.0
