"""TorchJD on the model of benchmarks/balancing_worker.py: the same requests, with its aggregators.

    PEERS/bin/python -m benchmarks.balancing_torch --tasks 2 --encoder 64 32                  # then a request a line:
    {"method": "pcgrad", "way": "documented"}

``documented`` is the loop of TorchJD's documentation for a shared encoder with heads: ``mtl_backward``, then
``jac_to_grad``, with their defaults. ``quickest`` is the same with the settings of the two (gradients of the tasks one
after the other or together; Gramian of the whole Jacobian or by tensor) that a few steps find to be the fastest. ``equal``
is the backward pass of the sum of the losses. A step gathers its rows and ends with a fused Adam, as ours.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchjd import aggregation
from torchjd.autojac import jac_to_grad, mtl_backward

from benchmarks import balancing_worker as ours
from benchmarks.machine import usable_cores, versions

# With the options that ours have by default.
AGGREGATORS: dict[str, Callable[[int], aggregation.Aggregator]] = {
    "pcgrad": lambda tasks: aggregation.PCGrad(),
    "mgda": lambda tasks: aggregation.MGDA(),
    "upgrad": lambda tasks: aggregation.UPGrad(),
    "cagrad": lambda tasks: aggregation.CAGrad(c=0.5),
    "nash_mtl": lambda tasks: aggregation.NashMTL(n_tasks=tasks),
    "aligned_mtl": lambda tasks: aggregation.AlignedMTL(),
    "imtl_g": lambda tasks: aggregation.IMTLG(),
}
TRIAL_STEPS = 3


def main() -> None:
    case, methods = ours.Case.parse(__doc__)
    torch.set_num_threads(usable_cores())
    torch.manual_seed(0)
    steps, found, missing = Steps(case), ["equal"] if "equal" in methods else [], {}
    for method in AGGREGATORS:
        if method in methods:
            try:
                AGGREGATORS[method](case.tasks)
                found.append(method)
            except ImportError as error:  # some solvers are extras
                missing[method] = str(error)
    packages = ("torch", "torchjd", "numpy", "cvxpy", "quadprog")
    facts = {"methods": found, "missing": missing, "versions": versions(*packages)}
    ours.serve(facts, lambda request: steps.measure(**request))


class Steps:
    """Train steps of one model for each method; each trains a model of its own."""

    def __init__(self, case: ours.Case):
        self.case, self.asked = case, 0
        self.dense, self.labels = (torch.from_numpy(array) for array in ours.generate(case).values())
        self.trainers: dict[tuple[str, str], Trainer] = {}

    def measure(self, method: str, way: str) -> dict[str, Any]:
        """Seconds of a step, and the settings."""
        if (method, way) not in self.trainers:
            self.trainers[method, way] = self._trainer(method, way)
        trainer = self.trainers[method, way]
        self.asked += 1
        self.time(trainer, ours.WARM_UP)
        seconds = self.time(trainer, self.case.steps)
        if not trainer.loss.isfinite():
            raise RuntimeError(f"'{method}' has a loss that is not finite; expected a finite one")
        return {"seconds": seconds, "settings": trainer.settings}

    def time(self, trainer: "Trainer", steps: int) -> float:
        """Seconds of a step."""
        rows = torch.from_numpy(ours.orders(self.case, self.asked))[:steps]
        start = time.perf_counter()
        for chosen in rows:
            trainer.step(self.dense.index_select(0, chosen), self.labels.index_select(0, chosen))
        return (time.perf_counter() - start) / len(rows)

    def _trainer(self, method: str, way: str) -> "Trainer":
        make = functools.partial(Trainer, self.case, method)
        if method == "equal" or way == "documented":
            return make({})
        by_gramian = isinstance(AGGREGATORS[method](self.case.tasks), aggregation.GramianWeightedAggregator)
        trials = [
            make({"parallel_chunk_size": chunk, "optimize_gramian_computation": gramian})
            for chunk, gramian in itertools.product((None, 1), (False, True) if by_gramian else (False,))
        ]
        seconds = [min(self.time(trial, TRIAL_STEPS) for _ in range(3)) for trial in trials]
        return trials[seconds.index(min(seconds))]


class Trainer:
    """A model with its optimizer and its way to gradients."""

    def __init__(self, case: ours.Case, method: str, settings: Mapping[str, Any]):
        widths = (ours.NUM_DENSE, *case.units)
        layers = [(nn.Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise(widths)]
        self.encoder = nn.Sequential(*itertools.chain.from_iterable(layers))
        self.heads = nn.ModuleList(nn.Linear(widths[-1], 1) for _ in range(case.tasks))
        parameters = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=ours.LEARNING_RATE, fused=True)
        self.settings = dict(settings)
        self.aggregator = AGGREGATORS[method](case.tasks) if method in AGGREGATORS else None
        self.loss = torch.tensor(math.nan)

    def step(self, dense: torch.Tensor, labels: torch.Tensor) -> None:
        features = self.encoder(dense)
        losses = [
            F.binary_cross_entropy_with_logits(head(features).squeeze(1), labels[:, k])
            for k, head in enumerate(self.heads)
        ]
        if self.aggregator is None:
            torch.stack(losses).sum().backward()
        else:
            mtl_backward(losses, features=features, parallel_chunk_size=self.settings.get("parallel_chunk_size"))
            by_tensor = self.settings.get("optimize_gramian_computation", False)
            jac_to_grad(self.encoder.parameters(), self.aggregator, optimize_gramian_computation=by_tensor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = losses[0].detach()


if __name__ == "__main__":
    main()
