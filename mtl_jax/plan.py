"""What an ablation consists of: the runs of an arm, over seeds and values of numbers, and the plan of all arms."""

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.arguments import check_count, shown
from mtl_jax.config import check_keys
from mtl_jax.errors import ConfigError
from mtl_jax.job import Shared, name_of
from mtl_jax.report.comparison import changes_data
from mtl_jax.run_config import KEYS, MAX_SEED, build_parts, check_config
from mtl_jax.source import in_order
from mtl_jax.train.vectorize import check_axis

OWN_KEYS = ("seeds", "axis", "vectorize", "retry", "keep_checkpoints")
"""Keys of an arm beside those of a run."""
COMMAND_KEYS = (
    "grid", "arms", "search", "trials", "search_seeds", "searching", "baseline", "report", "name", "folder",
)  # fmt: skip
"""Keys of ``conf/ablate.yaml`` that are the command's, and allowed in an arm."""


class Planned(NamedTuple):
    """One run of an arm.

    Attributes:
      config: As for :func:`mtl_jax.run.run`.
      values: Dotted key -> the value that this run has on the axis.
    """

    config: dict[str, Any]
    values: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.config["seed"]


def runs_of(arm: Mapping[str, Any]) -> list[Planned]:
    """All runs of an arm: every value of every axis, with every seed.

    An axis whose key the arm does not have (a constant of another balancer, say) is none of this arm's.

    Args:
      arm: The keys of a run, and :data:`OWN_KEYS`.

    Raises:
      ConfigError: A list is empty, or a run cannot have these values.
    """
    seeds = seeds_of(arm["seeds"])
    _check_arm(arm)
    base = {key: arm[key] for key in KEYS if key in arm}
    axis = {key: values for key, values in flat_axis(arm["axis"]).items() if has_key(base, key)}
    planned = []
    for point in itertools.product(*axis.values()):
        values = dict(zip(axis, point, strict=True))
        for seed in seeds:
            config = copy.deepcopy(base) | {"seed": seed}
            for key, value in values.items():
                _put(config, key, value)
            check_config(config)
            planned.append(Planned(in_order(config), values))
    return planned


def settings_tried(arm: Mapping[str, Any]) -> int:
    """Settings that validation chooses from: the points of the arm's axes but for data; 0 where there is no choice."""
    base = {key: arm[key] for key in KEYS if key in arm}
    tuned = [values for key, values in flat_axis(arm["axis"]).items() if has_key(base, key) and not changes_data(key)]
    points = math.prod(map(len, tuned))
    return points if points > 1 else 0


def plan_of(arms: Sequence[tuple[str, str, Mapping[str, Any]]], shared: Shared) -> list[dict[str, Any]]:
    """The members of an ablation, as ``ablation.json`` lists them. Data are loaded, because their content names runs.

    Args:
      arms: Name of the arm, name of its data, and its configuration.
      shared: What this process has loaded before.

    Raises:
      ConfigError: An arm cannot run as configured, or an axis is a key of no arm.
    """
    configs = [{key: arm[key] for key in KEYS if key in arm} for _, _, arm in arms]
    for key in {key: None for _, _, arm in arms for key in flat_axis(arm["axis"])}:
        if not any(has_key(config, key) for config in configs):
            raise ConfigError(f"axis.{key} names no key of any arm; expected one that --cfg job shows. Correct it")
    planned = [(name, data, runs_of(arm)) for name, data, arm in arms]
    for name, _, runs in planned:
        for one in {_text(one.values): one for one in runs}.values():  # the seeds do not matter here
            try:
                build_parts(one.config)
            except ConfigError as error:
                raise ConfigError(f"{error} (arm '{name}')") from error
    members = [
        {"run_id": name_of(one.config, shared.dataset(one.config)), "arm": name, "values": one.values, "seed": one.seed}
        | {"data": data}
        for name, data, runs in planned
        for one in runs
    ]
    first: dict[str, dict[str, Any]] = {}
    for member in members:
        other = first.setdefault(member["run_id"], member)
        if other is not member:
            one, two = (f"arm '{m['arm']}' {m['values'] or ''}".strip() for m in (other, member))
            raise ConfigError(f"{one} and {two} are the same runs; expected runs that differ. Leave one of them out")
    return members


def seeds_of(seeds: Any) -> list[int]:
    """The list of seeds, from a number of them or from a list."""
    if isinstance(seeds, list | tuple):
        for seed in seeds:
            check_count(seed, "seeds", least=0, most=MAX_SEED)
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(
                f"seeds is {shown(seeds)}; expected a number of seeds or a list of different ones. Change it"
            )
        return list(seeds)
    check_count(seeds, "seeds")
    return list(range(seeds))


def flat_axis(axis: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Dotted key -> values, from the nested mapping that ``axis.<key>=[...]`` makes."""
    flat: dict[str, list[Any]] = {}
    if not isinstance(axis, Mapping):
        raise ConfigError(
            f"axis is {shown(axis)}; expected lists of values by key, as axis.<key>=[...] makes. Change it"
        )
    for key, value in axis.items():
        if isinstance(value, Mapping):
            flat |= flat_axis(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value:
            flat[f"{prefix}{key}"] = list(value)
        else:
            raise ConfigError(
                f"axis.{prefix}{key} is {shown(value)}; expected a list of values. Write axis.{prefix}{key}=[...]"
            )
    return flat


def has_key(config: Mapping[str, Any], key: str) -> bool:
    """Whether a dotted key is in a configuration."""
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def _check_arm(arm: Mapping[str, Any]) -> None:
    """Raises a ConfigError for what no arm can have."""
    vectorize = arm["vectorize"]
    check_keys({key: value for key, value in arm.items() if key not in (*OWN_KEYS, *COMMAND_KEYS)}, KEYS)
    check_axis(vectorize["axis"], vectorize["chunk"])
    if vectorize["axis"] == "vmap" and arm["parallel"]["strategy"] == "pmap":
        raise ConfigError(
            "vectorize.axis is 'vmap' with parallel=pmap, which gives the devices to the rows of one run; expected "
            "vectorize.axis=map or parallel=jit. Change one of them"
        )
    if arm["folds"] is not None:
        raise ConfigError(f"folds is {shown(arm['folds'])} in an ablation; expected null. Repeat runs by seeds=")


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True, default=str)
