"""A careful PyTorch loop: the benchmark's MMoE over tensors that are loaded once.

python benchmarks/peers/torch_loop.py DATA.npz --epochs 2 --json OUT.json
"""

import copy
import ctypes
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import worker
from benchmarks.machine import versions
from benchmarks.peers.torch_experts import EXPERTS, Experts, single_experts

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def run(data: worker.Data, epochs: int, batch_size: int, seed: int) -> dict:
    """Trains 1 + ``epochs`` epochs and measures the last ``epochs`` of them."""
    keep_freed_memory()
    torch.manual_seed(seed)
    tables = OneTable(data["table_sizes"].tolist())
    model = MMoE(tables, num_inputs=worker.input_width(data))
    train, test = (
        (tables.rows_of(torch.from_numpy(data[f"{part}_ids"])),)
        + tuple(torch.from_numpy(data[f"{part}_{name}"]) for name in ("dense", "labels"))
        for part in ("train", "test")
    )
    layout = model.compute_experts = fastest_experts(model, train, batch_size=batch_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=worker.LEARNING_RATE, fused=True)
    warmup, seconds = worker.time_epochs(lambda: train_epoch(model, optimizer, *train, batch_size=batch_size), epochs)
    scores = predict(model, *test[:2], batch_size=batch_size)
    return worker.measurement(
        rows_per_epoch=len(train[0]),
        warmup_seconds=warmup,
        seconds_per_epoch=seconds,
        test_auc={task: roc_auc_score(test[2][:, k], scores[:, k]) for k, task in enumerate(worker.TASKS)},
        versions=versions("torch", "numpy"),
        choices={"experts": next(name for name, experts in EXPERTS.items() if experts is layout)},
    )


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, dense: Tensor, labels: Tensor, *, batch_size: int
) -> None:
    """One pass in a new random order; the last batch is the rest."""
    for rows in torch.randperm(len(ids)).split(batch_size):
        train_step(model, optimizer, *(array.index_select(0, rows) for array in (ids, dense, labels)))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, dense: Tensor, labels: Tensor) -> None:
    """The loss is the sum of the tasks' means. Nothing is read back from it, so no step waits for Python."""
    loss = F.binary_cross_entropy_with_logits(model(ids, dense), labels.T, reduction="sum") / len(labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def fastest_experts(
    model: "MMoE", arrays: tuple[Tensor, Tensor, Tensor], *, batch_size: int, turns: int = 10, steps: int = 3
) -> Experts:
    """The layout of the experts that is fastest here: the median time of a few real steps, all layouts taking turns.

    The steps are of a copy, so training starts from the same parameters whatever was tried.
    """
    trial = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trial.parameters(), lr=worker.LEARNING_RATE, fused=True)
    seconds: dict[str, list[float]] = {name: [] for name in EXPERTS}
    for _ in range(turns):
        for name, trial.compute_experts in EXPERTS.items():
            start = time.perf_counter()
            for rows in torch.randint(len(arrays[0]), (steps, batch_size)):
                train_step(trial, optimizer, *(array.index_select(0, rows) for array in arrays))
            seconds[name].append(time.perf_counter() - start)
    return EXPERTS[min(seconds, key=lambda name: statistics.median(seconds[name]))]


@torch.inference_mode()
def predict(model: nn.Module, ids: Tensor, dense: Tensor, *, batch_size: int) -> Tensor:
    """Logits f32[N, 2]."""
    batches = zip(ids.split(batch_size), dense.split(batch_size), strict=True)
    return torch.cat([model(*batch).T for batch in batches])


class OneTable(nn.Module):
    """All features read one table, each at an offset of its own: one lookup and one gradient instead of seven."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.rows = nn.Parameter(0.01 * torch.randn(sum(sizes), worker.EMBEDDING))

    def rows_of(self, ids: Tensor) -> Tensor:
        """Row numbers int64[N, F]; done once, before training."""
        return ids.long() + self.offsets

    def forward(self, rows: Tensor) -> Tensor:
        return self.rows.index_select(0, rows.flatten()).view(len(rows), -1)


class MMoE(nn.Module):
    """Experts, and for every task a linear softmax gate without bias and a tower of one hidden layer.

    Args:
      tables: Module from ids to the concatenated embeddings.
      num_inputs: Width of embeddings and dense columns together.
      experts: How the experts are computed.
    """

    def __init__(self, tables: nn.Module, *, num_inputs: int, experts: Experts = single_experts):
        super().__init__()
        num_experts, num_tasks = worker.NUM_EXPERTS, len(worker.TASKS)
        (first, second), (tower,) = worker.EXPERT_UNITS, worker.TOWER_UNITS
        self.tables, self.compute_experts = tables, experts
        self.gates = nn.Parameter(glorot(num_inputs, num_experts, num_stacks=num_tasks).transpose(0, 1).flatten(1))
        self.experts = layers(num_experts, (num_inputs, first, second))
        self.towers = layers(num_tasks, (second, tower, 1))

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        """Logits [task, batch]."""
        x = torch.cat([self.tables(ids), dense], dim=1)
        experts = self.compute_experts(x, *self.experts)
        gates = (x @ self.gates).view(len(x), len(worker.TASKS), worker.NUM_EXPERTS).softmax(dim=-1)
        mixed = torch.einsum("bte,ebh->tbh", gates, experts)
        kernel_1, bias_1, kernel_2, bias_2 = self.towers
        return torch.baddbmm(bias_2, F.relu(torch.baddbmm(bias_1, mixed, kernel_1)), kernel_2).squeeze(-1)


def layers(num_stacks: int, widths: tuple[int, ...]) -> nn.ParameterList:
    """Kernel [stack, in, out] and zero bias [stack, 1, out] of every layer of MLPs side by side."""
    parameters = nn.ParameterList()
    for num_inputs, num_outputs in zip(widths[:-1], widths[1:], strict=True):
        parameters.append(glorot(num_inputs, num_outputs, num_stacks=num_stacks))
        parameters.append(torch.zeros(num_stacks, 1, num_outputs))
    return parameters


def glorot(num_inputs: int, num_outputs: int, *, num_stacks: int) -> Tensor:
    bound = (6 / (num_inputs + num_outputs)) ** 0.5
    return torch.empty(num_stacks, num_inputs, num_outputs).uniform_(-bound, bound)


def keep_freed_memory() -> None:
    """Has the GNU C library keep freed activations, so that no step pays for fresh pages."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


if __name__ == "__main__":
    worker.main(run, __doc__)
