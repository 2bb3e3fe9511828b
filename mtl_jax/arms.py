"""The arms of an ablation: every combination of the choices, named ones beside them, and the baseline of them all."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mtl_jax.arguments import shown
from mtl_jax.errors import ConfigError

SINGLE_TASK, SCRATCH = "single_task", "scratch"
BASELINES = (SINGLE_TASK, SCRATCH)
METHOD_GROUPS = ("sharing", "link", "balancing", "pretraining", "transfer", "alignment")
METHOD = re.compile(rf"^[+~]*({'|'.join(METHOD_GROUPS)})([.@=]|$)")
TRANSFER = re.compile(r"^[+~]*(transfer|pretraining|alignment)([.@=]|$)")


class Arm(NamedTuple):
    """One method on one data set; its runs differ in seeds and numbers only.

    Attributes:
      name: The choices that vary, joined by ``+``; empty where nothing varies.
      overrides: What it is composed of, as on a command line.
    """

    name: str
    overrides: tuple[str, ...]


def arms_of(
    sweeps: Mapping[str, Sequence[str]],
    *,
    fixed: Sequence[str] = (),
    named: Sequence[Mapping[str, Any]] | None = None,
    baseline: str | None = SINGLE_TASK,
) -> list[Arm]:
    """All arms, the baseline first.

    Args:
      sweeps: Key or group -> its values, like ``{"sharing": ["mmoe", "ple"]}``; crossed with each other.
      fixed: Overrides of all arms. The baseline leaves out those of methods.
      named: ``{name, overrides}`` of arms that are no combination. With them and without a sweep of methods there are no
        combinations.
      baseline: ``single_task``, which is added for every data set and takes the first value of what else is swept;
        ``scratch``, the same method without transfer; None: no baseline is added.

    Raises:
      ConfigError: A named arm is not one, or two arms have one name.

    Example:
      >>> from mtl_jax.arms import arms_of
      >>> [arm.name for arm in arms_of({"sharing": ["mmoe", "ple"], "balancing": ["equal", "pcgrad"]})]
      ['single_task', 'mmoe+equal', 'mmoe+pcgrad', 'ple+equal', 'ple+pcgrad']
    """
    if baseline not in (*BASELINES, None):
        raise ConfigError(f"baseline is {shown(baseline)}; expected one of {[*BASELINES, 'none']}. Change it")
    if isinstance(named, str | Mapping):
        raise ConfigError(f"arms is {shown(named)}; expected a list of entries with name and overrides. Correct it")
    methods = {key: values for key, values in sweeps.items() if METHOD.match(key)}
    others = {key: values for key, values in sweeps.items() if key not in methods}
    if "target" in others:
        raise ConfigError(
            "target has a comma list, and each of its values is judged on other rows; expected a comparison for each. "
            "Write axis.target=[...]"
        )
    arms: list[Arm] = []
    for data in _points({key: values for key, values in others.items() if key == "data"}):
        rest = {key: values for key, values in others.items() if key != "data"}
        if baseline:
            first = tuple(f"{key}={values[0]}" for key, values in rest.items())
            replaced, instead = METHOD, (f"sharing={SINGLE_TASK}", "balancing=equal")
            if baseline == SCRATCH:
                kept = tuple(f"{key}={values[0]}" for key, values in methods.items() if not TRANSFER.match(key))
                replaced, instead = TRANSFER, (*kept, f"transfer={SCRATCH}")
            own = tuple(override for override in fixed if not replaced.match(override))
            arms.append(Arm(baseline, (*own, *_overrides(data), *first, *instead)))
        for point in _points(rest):
            labels = [_label(key, point[key]) for key in rest]
            for method in _points(methods) if methods or not named else ():
                if baseline == SINGLE_TASK and method.get("sharing") == SINGLE_TASK:
                    continue  # alone, tasks have nothing to balance: that is the baseline
                if baseline == SCRATCH and method.get("transfer") == SCRATCH:
                    continue
                name = "+".join([*(_label(key, method[key]) for key in methods), *labels])
                arms.append(Arm(name, (*fixed, *_overrides(data | point | method))))
            for entry in named or ():
                label, overrides = _named(entry)
                arms.append(Arm("+".join([label, *labels]), (*fixed, *_overrides(data | point), *overrides)))
    seen: set[tuple[str, str]] = set()
    for arm in arms:
        key = (arm.name, next((o for o in reversed(arm.overrides) if o.startswith("data=")), ""))
        if key in seen:
            raise ConfigError(
                f"two arms are called '{arm.name}'; expected different names. Rename one of the named arms"
            )
        seen.add(key)
    return arms


def _points(sweeps: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    return [dict(zip(sweeps, values, strict=True)) for values in itertools.product(*sweeps.values())]


def _overrides(point: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{key}={value}" for key, value in point.items())


def _label(key: str, value: str) -> str:
    """A node by its name; a value with its key, as ``num_experts=4``."""
    return (
        value if "." not in key and (key in METHOD_GROUPS or not _is_number(value)) else f"{key.split('.')[-1]}={value}"
    )


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return value.lower() in ("true", "false", "null")
    return True


def _named(entry: Any) -> tuple[str, tuple[str, ...]]:
    if (
        not isinstance(entry, Mapping)
        or set(entry) != {"name", "overrides"}
        or not isinstance(entry["overrides"], list)
        or not isinstance(entry["name"], str | int | float)
        or not str(entry["name"]).strip()
    ):
        raise ConfigError(
            f"arms has {shown(entry)}; expected entries with name and overrides, like {{name: wide, overrides: "
            "['sharing=mmoe', 'sharing.num_experts=16']}. Correct it"
        )
    return str(entry["name"]), tuple(map(str, entry["overrides"]))
