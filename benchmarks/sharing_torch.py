"""Modules of torch-rechub and DeepCTR-Torch on the batch of benchmarks/sharing_worker.py: the same passes.

    PEERS/bin/python -m benchmarks.sharing_torch --strategies mmoe ple      # then a request a line:
    {"peer": "torch-rechub", "name": "mmoe"}

The modules are the libraries' own, with the plainest options that they have. They are given one dense feature of full
width, so that no lookup and no loader is timed. The loss is that of their trainers on the probabilities they return: the
sum over the tasks, which are the last columns (the chance of a conversion given a click comes first and has no loss).
A library that cannot be imported is named in the facts, with the reason.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from benchmarks import sharing_worker as ours
from benchmarks.balancing_worker import NUM_DENSE, serve
from benchmarks.machine import usable_cores, versions

Levels = Sequence[Sequence[int]]
USER = NUM_DENSE // 2
"""Numbers of the user, for a model that tells them from those of the item."""


class Rechub:
    """torch-rechub. Its MLP has a batch normalisation after every layer, also in front of the softmax of a gate and in what
    AITM carries over. Its AITM has no penalty on rising chances, not in its trainer either."""

    def __init__(self):
        from torch_rechub.basic.features import DenseFeature
        from torch_rechub.models import multi_task

        self.library, self.feature = multi_task, DenseFeature
        self.features = [DenseFeature("x", embed_dim=NUM_DENSE)]
        self.shared = self.features, ["classification" for _ in ours.TASKS]
        self.towers = [{"dims": list(ours.TOWER_UNITS)} for _ in ours.TASKS]

    def inputs(self, dense: Any) -> Any:
        return {"x": dense, "user": dense[:, :USER].contiguous(), "item": dense[:, USER:].contiguous()}

    def shared_bottom(self, units: Sequence[int]) -> Any:
        return self.library.SharedBottom(*self.shared, {"dims": list(units)}, self.towers)

    def mmoe(self, num_experts: int, expert_units: Sequence[int]) -> Any:
        return self.library.MMOE(*self.shared, num_experts, {"dims": list(expert_units)}, self.towers)

    def ple(self, levels: Levels, num_specific: int, num_shared: int) -> Any:
        """Its constructor repeats one expert on all levels; levels that differ are put together from its own."""
        from torch import nn
        from torch_rechub.models.multi_task.ple import CGC

        numbers = num_specific, num_shared
        model = self.library.PLE(*self.shared, len(levels), *numbers, {"dims": list(levels[-1])}, self.towers)
        if len(set(levels)) > 1:
            parts = []
            for width, units in _with_inputs(levels):
                below = len(parts) < len(levels) - 1  # has a gate of the shared stream
                parts.append(CGC(1, 1 + below, len(ours.TASKS), *numbers, width, {"dims": list(units)}))
            model.cgc_layers = nn.ModuleList(parts)
        return model

    def esmm(self, units: Sequence[int]) -> Any:
        """It reads features of a user and of an item, and from tables alone; here what is looked up is given."""
        from torch import nn

        class Given(nn.Module):
            def forward(self, x: Any, features: Sequence[Any], squeeze_dim: bool = False) -> Any:
                return x[features[0].name]

        halves = [self.feature("user", embed_dim=USER)], [self.feature("item", embed_dim=NUM_DENSE - USER)]
        model = self.library.ESMM(*halves, *({"dims": [*units, *ours.TOWER_UNITS]} for _ in ours.TASKS))
        model.embedding = Given()
        return model

    def aitm(self, units: Sequence[int]) -> Any:
        return self.library.AITM(self.features, len(ours.TASKS), {"dims": list(units)}, self.towers)


class DeepCTR:
    """DeepCTR-Torch. Its PLE computes a gate of the shared stream on the last level too, which nothing reads."""

    def __init__(self):
        # On import the library asks a package index for its newest version; and needs a package for it.
        sys.modules.setdefault("deepctr_torch.utils", mock.MagicMock())
        from deepctr_torch.inputs import DenseFeat
        from deepctr_torch.models import multitask

        self.library, self.feature = multitask, DenseFeat
        self.options = {
            "tower_dnn_hidden_units": ours.TOWER_UNITS,
            "task_names": ours.TASKS,
            "task_types": ["binary" for _ in ours.TASKS],
            "init_std": 0.1,  # the default of 0.0001 makes gradients that hardly differ from 0
        }

    def inputs(self, dense: Any) -> Any:
        return dense

    def shared_bottom(self, units: Sequence[int]) -> Any:
        return self.library.SharedBottom([self.feature("x", NUM_DENSE)], bottom_dnn_hidden_units=units, **self.options)

    def mmoe(self, num_experts: int, expert_units: Sequence[int]) -> Any:
        return self.library.MMOE(
            [self.feature("x", NUM_DENSE)],
            num_experts=num_experts,
            expert_dnn_hidden_units=expert_units,
            gate_dnn_hidden_units=(),
            **self.options,
        )

    def ple(self, levels: Levels, num_specific: int, num_shared: int) -> Any:
        """Its constructor repeats one expert on all levels; levels that differ are put together from its own."""
        from torch import nn

        def make(width: int, num_levels: int, units: Sequence[int]) -> Any:
            return self.library.PLE(
                [self.feature("x", width)],
                num_levels=num_levels,
                specific_expert_num=num_specific,
                shared_expert_num=num_shared,
                expert_dnn_hidden_units=units,
                gate_dnn_hidden_units=(),
                **self.options,
            )

        model = make(NUM_DENSE, len(levels), levels[-1])
        if len(set(levels)) > 1:
            parts = [make(width, 1, units) for width, units in _with_inputs(levels)]
            gates = "specific_gate_dnn_final_layer", "shared_gate_dnn_final_layer"
            for name in ("specific_experts", "shared_experts", *gates):
                setattr(model, name, nn.ModuleList([getattr(part, name)[0] for part in parts]))
        return model

    def esmm(self, units: Sequence[int]) -> Any:
        options = self.options | {"tower_dnn_hidden_units": (*units, *ours.TOWER_UNITS)}
        return self.library.ESMM([self.feature("x", NUM_DENSE)], **options)


# Distribution -> a class with a method for every strategy in benchmarks/sharing_worker.py that the library has.
PEERS: dict[str, Callable[[], Any]] = {"torch-rechub": Rechub, "deepctr-torch": DeepCTR}


def main() -> None:
    case = ours.Case.parse(__doc__)
    passes = Passes(case)
    names = {peer: [name for name, entry in case.compared().items() if peer in entry.peers] for peer in passes.peers}
    facts = {"compared": names, "missing": passes.missing, "versions": versions("torch", *PEERS, "numpy")}
    serve(facts, lambda request: passes.measure(**request))


class Passes:
    """Passes on one batch, each of a module of its own.

    Attributes:
      peers: Distribution -> what makes its modules.
      missing: Distribution -> why it is not there.
    """

    def __init__(self, case: ours.Case):
        self.case, self.peers, self.missing = case, {}, {}
        for peer, library in PEERS.items():
            try:
                import torch

                self.peers[peer] = library()
            except ImportError as error:
                self.missing[peer] = f"{type(error).__name__}: {error}"
        if self.peers:
            torch.set_num_threads(usable_cores())
            torch.manual_seed(0)
            self.dense, self.labels = map(torch.from_numpy, ours.generate(case).values())
        self.programs: dict[tuple[str, str], tuple[Callable[[], float], dict[str, Any]]] = {}

    def measure(self, peer: str, name: str) -> dict[str, Any]:
        """Seconds of a pass, and the module's number of parameters."""
        if (peer, name) not in self.programs:
            self.programs[peer, name] = self._passes(peer, name)
        passes, facts = self.programs[peer, name]
        return {"seconds": ours.seconds_of(passes, self.case.steps), **facts}

    def _passes(self, peer: str, name: str) -> tuple[Callable[[], float], dict[str, Any]]:
        import torch.nn.functional as F

        entry, library = ours.COMPARED[name], self.peers[peer]
        model = getattr(library, entry.maker)(**entry.options).train()
        inputs, labels = library.inputs(self.dense), self.labels

        def passes() -> float:
            model.zero_grad(set_to_none=True)
            found = model(inputs)
            first = found.shape[1] - labels.shape[1]
            loss = sum(F.binary_cross_entropy(found[:, first + k], labels[:, k]) for k in range(labels.shape[1]))
            loss.backward()
            return loss.item()

        return passes, {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _with_inputs(levels: Levels) -> list[tuple[int, Sequence[int]]]:
    """The width that a level reads, and those of its layers, for each level."""
    return list(zip((NUM_DENSE, *(units[-1] for units in levels[:-1])), levels, strict=True))


if __name__ == "__main__":
    main()
