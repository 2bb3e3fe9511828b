"""From a configuration to checked parts: everything of a run that needs no data, and the model that needs its schema."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import optax
from flax import nnx

from mtl_jax.arguments import check_arguments, check_count, shown
from mtl_jax.balancing import Balancer
from mtl_jax.config import arguments_of, build, check_keys, check_sections
from mtl_jax.data.dataset import Dataset
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel, is_table
from mtl_jax.sharing import Link, Strategy, match_parameters
from mtl_jax.source import check_transfer
from mtl_jax.train import BalancingOptions, Objective, Optimizer, fit
from mtl_jax.train.checks import check_numerics
from mtl_jax.train.parallel import Devices
from mtl_jax.train.stages import check_training
from mtl_jax.watch import OPTIONS as WATCH_KEYS
from mtl_jax.watch import check_options

KEYS = (
    "data", "sharing", "balancing", "optimizer", "trainer", "parallel", "objective", "encoder", "history", "towers",
    "link", "prior", "training", "match_parameters", "seed", "folds", "allow", "output_dir", "transfer", "source",
    "target", "select", "loading", "pretraining", "tuning_artefact",
)  # fmt: skip
COMMAND_KEYS = ("summary",)
"""What the command line reads itself, and no run has."""
TRAINER_KEYS = (
    "epochs", "batch_size", "patience", "monitor", "tables", "steps_per_call", "checkpoint_seconds",
    "micro_batches", "precision", "average", "order_seed", "epoch_steps", *WATCH_KEYS,
)  # fmt: skip
PARALLEL_KEYS = ("strategy", "devices")
NODES = (
    "data",
    "sharing",
    "balancing",
    "optimizer",
    "objective",
    "encoder",
    "history",
    "towers",
    "link",
    "transfer",
    "pretraining",
)
MODEL_PARTS = {"encoder": nnx.Module, "history": nnx.Module, "sharing": Strategy, "towers": nnx.Module, "link": Link}
MAX_SEED = 2**32 - 1
OPTION_KEYS = tuple(field.name for field in dataclasses.fields(BalancingOptions))


def check_config(config: Mapping[str, Any]) -> None:
    """Raises a ConfigError for sections, keys and plain values that no run can have; nothing is built or read."""
    check_sections(config, KEYS, NODES)
    check_keys(config, (*KEYS, *COMMAND_KEYS))
    for place, keys in (("trainer", TRAINER_KEYS), ("parallel", PARALLEL_KEYS)):
        check_sections(config[place], keys, place=place)
        check_keys(config[place], keys, place=place)
    check_options(config["trainer"])
    given = {key: value for key, value in config["trainer"].items() if key not in WATCH_KEYS}
    check_arguments(fit, given, place="trainer", names={"tables": "table_updates"})
    if config["trainer"]["order_seed"] is not None:
        check_count(config["trainer"]["order_seed"], "trainer.order_seed", least=0, most=MAX_SEED)
    if config["trainer"]["epoch_steps"] is not None:
        check_count(config["trainer"]["epoch_steps"], "trainer.epoch_steps")
    for key in ("steps_per_call", "micro_batches"):  # arrays have these lengths
        check_count(config["trainer"][key], f"trainer.{key}")
    check_numerics(config["trainer"]["precision"], config["trainer"]["average"])
    check_arguments(fit, config["parallel"], place="parallel", names={"strategy": "parallel"})
    devices_of(config)
    check_training(config["training"])
    check_transfer(config)
    if config["prior"] is not None and not (
        isinstance(config["prior"], list) and all(isinstance(name, str) for name in config["prior"])
    ):
        raise ConfigError(f"prior is {shown(config['prior'])}; expected a list of features, or null. Change it")
    if config["match_parameters"] is not None:
        check_count(config["match_parameters"], "match_parameters", most=2**31)
    check_count(config["seed"], "seed", least=0, most=MAX_SEED)
    if not isinstance(config["output_dir"], str) or not config["output_dir"] or "\0" in config["output_dir"]:
        raise ConfigError(f"output_dir is {shown(config['output_dir'])}; expected the path of a folder. Change it")


def build_parts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that needs no data, so that a mistake shows before any is read."""
    balancing = dict(config["balancing"])
    own = arguments_of(balancing, allow=config["allow"], place="balancing")  # a method may define one itself
    options = {key: balancing.pop(key) for key in OPTION_KEYS if key in balancing and key not in own}
    for name, kind in MODEL_PARTS.items():
        part = build(config[name], allow=config["allow"], place=name)
        made = getattr(part, "func", None)
        if made is None or (isinstance(made, type) and not issubclass(made, kind)):
            raise ConfigError(
                f"{name} has _target_ {shown(config[name]['_target_'])}; expected the constructor of a {kind.__name__}, "
                f"with _partial_: true. Choose one of conf/{name}, or a class of your own that is one"
            )
    return {
        "balancer": _built(config | {"balancing": balancing}, "balancing", Balancer),
        "options": BalancingOptions(**options),
        "optimizer": _built(config, "optimizer", (Optimizer, optax.GradientTransformation)),
        "objective": _built(config, "objective", Objective),
        "parallel": config["parallel"]["strategy"],
        "devices": config["parallel"]["devices"],
        "training": config["training"],
    }


def build_model(config: Mapping[str, Any], dataset: Dataset) -> MultiTaskModel:
    """The model that a configuration describes, for a data set; its seed gives the initial values."""
    parts = {name: build(config[name], allow=config["allow"], place=name) for name in MODEL_PARTS}
    prior = {"prior": config["prior"]}
    if (target := config["match_parameters"]) is not None:

        def count(sharing: functools.partial) -> int:
            """Parameters of the whole model without its tables."""
            model = nnx.eval_shape(
                lambda: MultiTaskModel(dataset.schema, **parts | {"sharing": sharing}, **prior, rngs=nnx.Rngs(0))
            )
            sizes = {
                "/".join(map(str, path)): leaf.size for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
            }
            return sum(size for path, size in sizes.items() if not is_table(path))

        parts["sharing"] = match_parameters(parts["sharing"], target, count)
    return MultiTaskModel(dataset.schema, **parts, **prior, rngs=nnx.Rngs(config["seed"]))


def _built(config: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    made = build(config[key], allow=config["allow"], place=key)
    if not isinstance(made, kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise ConfigError(
            f"{key} has _target_ {shown(config[key]['_target_'])}, which makes a {type(made).__name__}; expected a "
            f"{names}. Choose one of conf/{key}"
        )
    return made


def build_data(config: Mapping[str, Any]) -> Dataset:
    """The data set that a configuration describes."""
    return _built(config, "data", Dataset)


def devices_of(config: Mapping[str, Any]) -> Devices:
    """The devices that a configuration asks for."""
    return Devices(config["parallel"]["strategy"], config["parallel"]["devices"])
