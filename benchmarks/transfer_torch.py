"""MAML on sine waves in PyTorch, by torch.func as its documentation shows it; the steps of benchmarks/transfer_worker.py.

PEERS/bin/python -m benchmarks.transfer_torch           # then a request a line: {"inner_steps": 5}
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import transfer_worker as ours
from benchmarks.balancing_worker import serve
from benchmarks.machine import usable_cores, versions


def main() -> None:
    import torch

    torch.set_num_threads(usable_cores())
    serve({"versions": versions("torch", "numpy")}, answer)


def answer(request: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step."""
    return {"seconds": ours.measured(maml(request["inner_steps"]))}


@functools.cache
def maml(inner_steps: int) -> Callable[[int], None]:
    """One graph a step: gradients of the inner loss by torch.func.grad, waves by torch.vmap, Adam."""
    import torch

    depth = len(ours.UNITS) + 1
    params = {name: torch.tensor(array, requires_grad=True) for name, array in ours.layers((1, *ours.UNITS, 1)).items()}
    waves = {name: torch.tensor(array) for name, array in ours.sines(0).items()}
    optimizer = torch.optim.Adam(params.values(), lr=ours.RATE, fused=True)

    def loss(params, x, y):
        for index in range(depth):
            x = x @ params[f"kernel_{index}"] + params[f"bias_{index}"]
            x = torch.relu(x) if index < depth - 1 else x
        return ((x - y) ** 2).mean()

    def of_wave(params, x, y):
        for _ in range(inner_steps):
            gradients = torch.func.grad(loss)(params, x[0], y[0])
            params = {name: leaf - ours.INNER_RATE * gradients[name] for name, leaf in params.items()}
        return loss(params, x[1], y[1])

    def run(count: int) -> None:
        for index in range(count):
            losses = torch.vmap(of_wave, in_dims=(None, 1, 1))(params, waves["x"][index], waves["y"][index])
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        if not torch.isfinite(losses).all():
            raise RuntimeError("a step gave numbers that are not finite; expected finite ones")

    return run


if __name__ == "__main__":
    main()
