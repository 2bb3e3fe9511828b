"""mtl_jax: multi-task and transfer learning for recommendation, in JAX.

Importing this package loads nothing heavy and initialises no backend; its parts are loaded when they are first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = ("balancing", "data", "errors", "losses", "metrics", "model", "nn", "report", "sharing", "tasks", "train")
_NAMES = {"MultiTaskModel": "model", "Task": "tasks", "Dataset": "data"}

__all__ = ["Dataset", "MultiTaskModel", "Task", "__version__", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"mtl_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"mtl_jax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'mtl_jax' has no attribute '{name}'; it has {sorted(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
