"""check_arguments: values from a configuration against the annotations of what will receive them."""

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtl_jax.errors import ConfigError, SchemaError

MAX_WIDTH = 2**16
"""Largest width of a layer or table; beyond it a slip of the keyboard is likelier than a model."""
SHOWN = 100
"""Characters of a value that a message repeats."""


def check_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], *, place: str, names: Mapping[str, str] | None = None
) -> None:
    """Raises a ConfigError for a value that is not of the annotated type, or not finite.

    A bool is no number, a string no list, a whole number fits a float. Parameters without annotation, and annotations that
    mean nothing to a configuration (arrays with shapes, protocols), take anything.

    Args:
      function: A function, or a class, whose constructor then counts.
      values: Parameter -> value; names that the function lacks are left to the caller.
      place: What stands before the name of a value in the message, like ``optimizer``.
      names: Name of a value -> the parameter that it becomes, where the two differ.
    """
    hints = _hints(function)
    for name, value in values.items():
        hint = hints.get((names or {}).get(name, name), Any)
        if not _fits(value, hint):
            raise ConfigError(f"{place}.{name} is {shown(value)}; expected {_words(hint)}. Change {place}.{name}")


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Name -> parameter, of a function, a class or a partial of either; what the partial has bound is left out."""
    bound: set[str] = set()
    while isinstance(function, functools.partial):
        function, bound = function.func, bound | set(function.keywords)
    if not inspect.isclass(function):
        found = inspect.signature(function).parameters
    else:  # a metaclass may hide the constructor's own signature
        found = {name: p for name, p in inspect.signature(function.__init__).parameters.items() if name != "self"}
    return {name: parameter for name, parameter in found.items() if name not in bound}


def check_fields(record: Any, place: str, *, free: Sequence[str] = ()) -> None:
    """Raises a SchemaError for a field of a dataclass that is not of its annotated type, not finite, or empty text.

    Args:
      record: What is being made.
      place: What it is, for the message.
      free: Fields that take values of other types and convert them.
    """
    hints = _hints(type(record))
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name not in free and (
            (isinstance(value, str) and not value) or not _fits(value, hints.get(field.name, Any))
        ):
            expected = f"{_words(hints[field.name])}{', not empty' if isinstance(value, str) else ''}"
            raise SchemaError(f"{place} has {field.name} {shown(value)}; expected {expected}. Change it")


def check_number(
    value: Any,
    place: str,
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float | None = None,
    below: float | None = None,
) -> None:
    """Raises a ConfigError for anything but a finite number in [least, most]; ``above`` and ``below`` are open ends."""
    ok = _fits(value, float) and least <= value <= most
    if not ok or (above is not None and value <= above) or (below is not None and value >= below):
        end = f"{most:g}]" if below is None else f"{below:g})"
        start = f"({max(least, -math.inf if above is None else above):g}"
        if above is None and least > -math.inf:
            start = f"[{least:g}"
        raise ConfigError(f"{place} is {shown(value)}; expected a number in {start}, {end}. Change it")


def check_count(value: Any, place: str, *, least: int = 1, most: int = MAX_WIDTH) -> None:
    """Raises a ConfigError for anything but a whole number from ``least`` to ``most``."""
    if not _fits(value, int) or not least <= value <= most:
        raise ConfigError(f"{place} is {shown(value)}; expected a whole number from {least} to {most:,}. Change it")


def check_counts(values: Any, place: str, *, empty: bool = True) -> None:
    """Raises a ConfigError for anything but a list of widths."""
    if not _fits(values, Sequence[int]) or not all(1 <= value <= MAX_WIDTH for value in values):
        raise ConfigError(
            f"{place} is {shown(values)}; expected a list of whole numbers from 1 to {MAX_WIDTH:,}. Change it"
        )
    if not empty and not len(values):
        raise ConfigError(f"{place} is empty; expected at least one width. Change it")


def shown(value: Any) -> str:
    """The value as a message repeats it: in quotes where it is text, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print very large whole numbers
        text = f"a whole number of {value.bit_length()} bits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(target)
    except Exception:  # a name in an annotation that exists for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is Any or hint is object:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value)
    if hint is str:
        return isinstance(value, str)
    base = origin or hint
    if base is collections.abc.Callable:
        return callable(value)
    if not isinstance(base, type):
        return True
    if issubclass(base, os.PathLike):
        return isinstance(value, str | os.PathLike)
    if issubclass(base, collections.abc.Mapping):
        return (
            isinstance(value, Mapping)
            and _all_fit(value.keys(), arguments, 0)
            and _all_fit(value.values(), arguments, 1)
        )
    if issubclass(base, collections.abc.Sequence) and not hasattr(base, "_fields"):
        return isinstance(value, list | tuple) and _all_fit(value, arguments, 0)
    if not _speaks_to_configurations(base):
        return not isinstance(value, str) and all(_finite(one) for one in _numbers(value))
    return isinstance(value, base)


def _all_fit(values: Any, arguments: tuple[Any, ...], position: int) -> bool:
    return position >= len(arguments) or all(_fits(value, arguments[position]) for value in values)


def _speaks_to_configurations(base: type) -> bool:
    """Whether ``isinstance`` decides; arrays come as numbers or lists, and a protocol may not be asked."""
    module = getattr(base, "__module__", "").split(".")[0]
    return module not in ("numpy", "jax", "jaxlib", "jaxtyping") and not getattr(base, "_is_protocol", False)


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, numbers.Real) else []


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        return False


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if any(isinstance(one, type) and not _speaks_to_configurations(one) for one in arguments):
            return "a finite number, or numbers"  # what JAX takes for an array has a dozen types
        return " or ".join(sorted(dict.fromkeys(_words(one) for one in arguments), key="null".__eq__))
    plain = {
        Any: "anything",
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        types.NoneType: "null",
        None: "null",
    }
    if origin is None and hint in plain:
        return plain[hint]
    if origin is typing.Literal:
        return f"one of {list(arguments)}"
    base = origin or hint
    if base is collections.abc.Callable:
        return "a function"
    if not isinstance(base, type):
        return "another type"
    if issubclass(base, os.PathLike):
        return "a path"
    if issubclass(base, collections.abc.Mapping):
        return (
            f"a mapping from {_words(arguments[0])} to {_words(arguments[1])}" if len(arguments) == 2 else "a mapping"
        )
    if issubclass(base, collections.abc.Sequence) and not hasattr(base, "_fields"):
        return f"a list of {_words(arguments[0])}" if arguments else "a list"
    return "numbers" if not _speaks_to_configurations(base) else f"an object of {base.__name__}"
