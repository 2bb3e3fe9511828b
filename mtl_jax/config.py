"""build: the one gate through which configuration becomes objects."""

import functools
import importlib
import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl_jax.arguments import check_arguments, parameters_of, shown
from mtl_jax.errors import ConfigError, MtlJaxError

ROOMS = ("mtl_jax.balancing", "mtl_jax.data", "mtl_jax.nn", "mtl_jax.sharing", "mtl_jax.train", "mtl_jax.transfer")
"""Modules of ours whose public objects a configuration may name. What reads, writes or runs on its own is in none."""
PACKAGES = ("optax",)
"""Packages whose public objects a configuration may name; ``allow=[mypaper]`` adds one of yours."""
RESERVED = ("_target_", "_partial_", "_args_")


def build(node: Any, *, allow: Sequence[str] = (), place: str = "") -> Any:
    """Instantiates a node: every ``_target_`` in it is called with the keys beside it.

    A target is ``<module>.<name>``. The module is imported only if it is allowed, the name has to be one that the module
    offers (no leading underscore, in ``__all__`` where there is one) and a function or class made in an allowed package.
    Attributes of objects are not followed, and text is never evaluated.

    Args:
      node: A mapping with ``_target_``, or plain values. ``_partial_: true`` gives a constructor with these options set,
        ``_args_`` is the list of what goes without a name, as in ``optax.chain``.
      allow: Further packages whose objects may be named.
      place: Where the node stands in the configuration, for messages.

    Returns:
      The object. Containers inside arrive as plain lists and dicts.

    Raises:
      ConfigError: The target is not importable, not allowed, or has no such option, or an option is not of its annotated
        type; the message lists what is valid. Nothing is called before all targets of the node have been checked.
    """
    node = plain(node)
    packages = (*PACKAGES, *_own_packages(allow))
    for where, inner in _targets(node, place):
        _check(where, inner, packages)
    return _make(node, place)


def arguments_of(node: Mapping[str, Any], *, allow: Sequence[str] = (), place: str = "") -> frozenset[str]:
    """Names of what the target of a node takes, whatever the keys beside it; nothing is called. None without a target.

    Raises:
      ConfigError: As by :func:`build`, for the target.
    """
    if "_target_" not in node:
        return frozenset()
    _check(place, {key: node[key] for key in RESERVED if key in node}, (*PACKAGES, *_own_packages(allow)))
    return frozenset(inspect.signature(_locate(place, node["_target_"])).parameters)


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


def check_sections(config: Any, required: Sequence[str], nodes: Sequence[str] = (), *, place: str = "") -> None:
    """Raises a ConfigError where a section of a configuration is missing or is not one.

    Args:
      config: Plain containers.
      required: Keys that it must have.
      nodes: Those of them that are mappings with a ``_target_``.
      place: Where the section stands; empty for the whole configuration.
    """
    place = place or "the configuration"
    if not isinstance(config, Mapping):
        raise ConfigError(f"{place} is {shown(config)}; expected a mapping with {sorted(required)}. Change it")
    missing = [key for key in required if key not in config]
    if missing:
        raise ConfigError(f"{place} has no {missing}; expected all of {sorted(required)}. Put them back")
    for key in nodes:
        if not isinstance(config[key], Mapping) or "_target_" not in config[key]:
            raise ConfigError(
                f"{key} is {shown(config[key])}; expected a mapping with a _target_, as in conf/. Choose one of the "
                f"group's options or set {key}._target_"
            )


def _own_packages(allow: Any) -> Sequence[str]:
    ok = isinstance(allow, list | tuple) and all(isinstance(name, str) and name.isidentifier() for name in allow)
    ours = [name for name in allow if name in sys.stdlib_module_names or name == "mtl_jax"] if ok else []
    if not ok or ours:
        raise ConfigError(
            f"allow is {shown(allow)}; expected a list of packages of your own, not of Python's library, like [mypaper]. "
            "Change it"
        )
    return allow


def _targets(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield place or str(node["_target_"]), node
        for key, value in node.items():
            yield from _targets(value, f"{place}.{key}" if place else str(key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _targets(value, f"{place}[{index}]")


def _check(place: str, node: Mapping[str, Any], packages: Sequence[str]) -> None:
    name = node["_target_"]
    module = name.rpartition(".")[0] if isinstance(name, str) else ""
    if module not in ROOMS and not _inside(module, packages):
        own = str(name).split(".")[0]
        hint = "Name one of theirs" if own == "mtl_jax" else f"For a package of your own add allow=[{own}]"
        raise ConfigError(
            f"{place} has _target_ {shown(name)}; expected an object of one of {[*ROOMS, *packages]}. {hint}"
        )
    if any(part.startswith("_") for part in name.split(".")):
        raise ConfigError(f"{place} has _target_ '{name}', which is private; expected a public name. Name it directly")
    target = _locate(place, name)
    # A module of an allowed package has others' objects in it too: what counts is where the object was made.
    home = getattr(target, "__module__", None) or type(target).__module__
    if not callable(target) or not isinstance(home, str) or not _inside(home, ("mtl_jax", *packages)):
        raise ConfigError(
            f"{place} has _target_ '{name}', which is {type(target).__name__} of '{home}'; expected a class or function of "
            f"one of {[*ROOMS, *packages]}. Name it directly"
        )
    if not isinstance(node.get("_partial_", False), bool):
        raise ConfigError(f"{place}._partial_ is {shown(node['_partial_'])}; expected true or false. Change it")
    if not isinstance(node.get("_args_", []), list | tuple):
        raise ConfigError(f"{place}._args_ is {shown(node['_args_'])}; expected a list. Change it")
    _check_options(place, target, [key for key in node if key not in RESERVED])


def _locate(place: str, name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise ConfigError(
            f"{place} has _target_ '{name}', which cannot be imported ({error}); expected a module and a name in it. "
            "Correct the path"
        ) from error
    offered = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    if attribute not in offered or not hasattr(module, attribute):
        objects = [n for n in offered if not isinstance(getattr(module, n, None), types.ModuleType)]
        raise ConfigError(
            f"{place} has _target_ '{name}', which cannot be imported ({module_name} has no '{attribute}'); expected one "
            f"of {sorted(objects)}. Correct the path"
        )
    return getattr(module, attribute)


def _check_options(place: str, target: Any, options: Sequence[str]) -> None:
    parameters = parameters_of(target)
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for option in options:
        # Words that steer Hydra (_recursive_, _convert_) are never passed on, not even to **options.
        if not isinstance(option, str) or option.startswith("_") or (option not in parameters and not open_ended):
            valid = [name for name in parameters if name not in ("rngs", "schema")]
            raise ConfigError(f"{place} has option '{option}'; expected one of {valid}. Remove or rename it")


def _make(node: Any, place: str) -> Any:
    """The object of a node whose targets were checked."""
    if isinstance(node, list | tuple):
        return [_make(value, f"{place}[{index}]") for index, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    made = {key: _make(value, f"{place}.{key}" if place else str(key)) for key, value in node.items()}
    if "_target_" not in node:
        return made
    name = node["_target_"]
    place = place or name
    target = _locate(place, name)
    options = {key: value for key, value in made.items() if key not in RESERVED}
    check_arguments(target, options, place=place)
    unnamed = made.get("_args_", ())
    if node.get("_partial_", False):
        return functools.partial(target, *unnamed, **options)
    try:
        return target(*unnamed, **options)
    except MtlJaxError:
        raise
    except Exception as error:  # optax and a package of the user's may raise anything
        raise ConfigError(
            f"'{place}' ({name}) cannot be built: {error}; expected other options. Change them"
        ) from error


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)
