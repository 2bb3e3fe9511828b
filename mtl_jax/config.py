"""build: the one gate through which configuration becomes objects."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra.utils
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl_jax.errors import ConfigError, MtlJaxError

ALLOWED = ("mtl_jax", "optax")
"""Packages whose objects a configuration may name; ``allow=[mypaper]`` adds one of yours."""
RESERVED = ("_target_", "_partial_", "_args_")


def build(node: Any, *, allow: Sequence[str] = ()) -> Any:
    """Instantiates a node: every ``_target_`` in it is called with the keys beside it.

    Args:
      node: A mapping with ``_target_`` (``_partial_: true`` gives a constructor with these options set), or plain values.
      allow: Further packages whose objects may be named.

    Returns:
      The object. Containers inside arrive as plain lists and dicts.

    Raises:
      ConfigError: The target is not importable, not of an allowed package, or has no such option; the message lists the
        valid ones. Nothing is called before all targets of the node have been checked.
    """
    node = plain(node)
    for place, inner in _targets(node, ""):
        _check(place, inner, (*ALLOWED, *allow))
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, MtlJaxError):
            raise cause from None
        name = node.get("_target_") if isinstance(node, Mapping) else node
        raise ConfigError(f"'{name}' cannot be built: {cause or error}. Change its options") from cause


def plain(node: Any) -> Any:
    """The node as plain Python containers with all interpolations resolved.

    Raises:
      ConfigError: A value that the user must give (``???``) is missing, or an interpolation leads nowhere.
    """
    if not isinstance(node, DictConfig | ListConfig):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"'{error.full_key}' has no value ({said}); expected one. Set {error.full_key}=...") from None


def check_keys(node: Mapping[str, Any], known: Sequence[str], *, place: str = "") -> None:
    """Raises a ConfigError where the node has a key that nothing reads."""
    for key in node:
        if key not in known:
            where = f"{place}.{key}" if place else key
            raise ConfigError(f"nothing reads '{where}'; expected keys of {sorted(known)}. Remove or rename it")


def _targets(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield place or str(node["_target_"]), node
        for key, value in node.items():
            yield from _targets(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _targets(value, f"{place}[{index}]")


def _check(place: str, node: Mapping[str, Any], allowed: Sequence[str]) -> None:
    name = node["_target_"]
    if not isinstance(name, str) or not _inside(name, allowed):
        raise ConfigError(
            f"{place} has _target_ '{name}'; expected an object of one of {list(allowed)}. For a package of your own add "
            f"allow=[{str(name).split('.')[0]}]"
        )
    try:
        target = hydra.utils.get_object(name)
    except Exception as error:
        raise ConfigError(
            f"{place} has _target_ '{name}', which cannot be imported ({error}). Correct the path"
        ) from error
    # `mtl_jax.somewhere.os.system` starts with an allowed name too: what counts is where the object comes from.
    home = getattr(target, "__module__", None) or type(target).__module__
    if not callable(target) or not _inside(home, allowed):
        raise ConfigError(
            f"{place} has _target_ '{name}', which is {type(target).__name__} of '{home}'; expected a class or function of "
            f"one of {list(allowed)}. Name it directly"
        )
    _check_options(place, target, {key: value for key, value in node.items() if key not in RESERVED})


def _check_options(place: str, target: Any, options: Mapping[str, Any]) -> None:
    parameters = _parameters(target)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            valid = [name for name in parameters if name not in ("rngs", "schema")]
            raise ConfigError(f"{place} has option '{option}'; expected one of {valid}. Remove or rename it")


@functools.cache
def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    if not inspect.isclass(target):
        return inspect.signature(target).parameters
    # a metaclass may hide the constructor's own signature
    return {name: p for name, p in inspect.signature(target.__init__).parameters.items() if name != "self"}


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
