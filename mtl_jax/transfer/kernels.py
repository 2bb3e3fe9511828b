"""Kernels of shared layers: which ones a method changes."""

import re
from collections.abc import Mapping
from typing import Any

from mtl_jax.arguments import shown
from mtl_jax.errors import ConfigError
from mtl_jax.model import is_table, label


def of_tasks(path: str) -> bool:
    """Whether a parameter is one of a task's own."""
    return label(path).startswith("task/")


def of_norm(path: str) -> bool:
    """Whether a parameter is the scale or the shift of a normalisation."""
    *_, module = (part for part in path.split("/")[:-1] if not part.isdigit())
    return not is_table(path) and (module in ("norm", "norms") or module.endswith("_norm"))


def is_target(path: str, pattern: str) -> bool:
    """Whether a parameter is a shared one whose whole path fits a pattern."""
    return label(path) == "shared" and re.fullmatch(pattern, path) is not None


def sibling(path: str, name: str) -> str:
    """The path beside this one that has another last name."""
    return f"{path.rpartition('/')[0]}/{name}"


def check_targets(pattern: Any, found: Mapping[str, Any] | None = None) -> None:
    """Raises a ConfigError for no pattern, or for one that fits no array of at least two axes."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"transfer.targets is {shown(pattern)}, no pattern ({error}); expected one like '.*/kernel'"
        ) from error
    if found is not None and not found:
        raise ConfigError(
            f"transfer.targets is {shown(pattern)}, which no shared parameter has as its path; expected the kernels of "
            "some. Change it (summary=true prints the paths)"
        )
    if flat := [path for path, array in (found or {}).items() if array.ndim < 2]:
        raise ConfigError(f"transfer.targets fits {flat}, which are no matrices; expected kernels. Change it")
