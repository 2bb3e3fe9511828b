"""A model before it is trained: its tree of modules, parameters by label, and the work of an example."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mtl_jax.model import MultiTaskModel, label
from mtl_jax.train.predict import flops_per_example
from mtl_jax.train.state import Functional, count_parameters


def print_summary(model: MultiTaskModel, data: Mapping[str, Any], console: Console) -> None:
    """Prints the modules with the shapes, sizes and labels of their arrays, then sums by label and FLOPs of an example.

    Args:
      model: With initial values.
      data: A batch of a part (see :func:`mtl_jax.data.batching.as_batch`), for the shapes of an example.
      console: Where to.
    """
    functional, params, rest = Functional.of(model)
    console.print(_tree(model, functional.paths, params))
    counts = count_parameters(params)
    table = Table("parameters", *(name for name in counts if counts[name] or name == "total"), box=None)
    table.add_row("", *(f"{count:,}" for name, count in counts.items() if count or name == "total"))
    console.print(table)
    if (flops := flops_per_example(functional, params | rest, data)) is not None:
        console.print(f"one forward pass: {flops:,.0f} floating-point operations an example")


def _tree(model: MultiTaskModel, paths: Mapping[str, tuple], params: Mapping[str, jax.Array]) -> Tree:
    names = {"/".join(map(str, paths[name])): name for name in params}  # as they lie in the module
    nodes = {"": Tree(_line(type(model).__name__, params))}
    for path, name in names.items():
        array, parts = params[name], path.split("/")
        for depth in range(1, len(parts)):
            inner = "/".join(parts[:depth])
            if inner not in nodes:
                below = {one: params[name] for one, name in names.items() if one.startswith(f"{inner}/")}
                outer = nodes["/".join(parts[: depth - 1])]
                kind = type(_at(model, parts[:depth])).__name__
                nodes[inner] = outer.add(_line(parts[depth - 1], below, "" if kind in ("Dict", "List") else kind))
        shape = "x".join(map(str, array.shape)) or "number"
        nodes["/".join(parts[:-1])].add(Text.assemble(f"{parts[-1]} ", (shape, "cyan"), (f"  {label(name)}", "dim")))
    return nodes[""]


def _line(name: str, params: Mapping[str, jax.Array], kind: str = "") -> Text:
    number = sum(array.size for array in params.values())
    return Text.assemble((name, "bold"), f" {kind}" if kind else "", (f"  {number:,}", "green"))


def _at(model: MultiTaskModel, parts: list[str]) -> Any:
    node: Any = model
    for part in parts:
        node = (
            node[int(part)]
            if isinstance(node, nnx.List)
            else node[part]
            if isinstance(node, nnx.Dict)
            else getattr(node, part)
        )
    return node
