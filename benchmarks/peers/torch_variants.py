"""Whether the PyTorch loop is as fast as it can be: its step against the same step with one choice changed.

    python benchmarks/peers/torch_variants.py DATA.npz --threads 2 --rounds 20

All variants take turns, a few steps at a time, so that a disturbance of the machine meets all of them. ``of CPU time``
divides by the seconds that the process computed rather than by those that passed: with one thread it is steady on
a busy machine too.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import worker
from benchmarks.peers.torch_experts import EXPERTS, Experts, single_experts
from benchmarks.peers.torch_loop import MMoE, OneTable, keep_freed_memory, train_step


class OneTableEmbedding(OneTable):
    """One table, read by ``F.embedding`` instead of ``index_select``."""

    def forward(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.rows).flatten(1)


class ManyTables(nn.Module):
    """A table a feature."""

    def __init__(self, sizes: list[int]):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, worker.EMBEDDING) for size in sizes)

    def rows_of(self, ids: Tensor) -> Tensor:
        return ids.long()

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([table(rows[:, k]) for k, table in enumerate(self.tables)], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="arrays written by benchmarks/train_throughput.py")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each variant (default: 20)")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn (default: 10)")
    parser.add_argument("--compile", action="store_true", help="add torch.compile, which needs a C++ compiler")
    options = parser.parse_args()

    keep_freed_memory()
    torch.set_num_threads(options.threads)
    data = worker.load(options.data)
    variants = {f"experts: {name}": variant(data, options, experts=experts) for name, experts in EXPERTS.items()} | {
        "lookups: F.embedding": variant(data, options, tables=OneTableEmbedding),
        "lookups: a table a feature": variant(data, options, tables=ManyTables),
        "Adam: foreach": variant(data, options, adam={"foreach": True}),
        "Adam: one by one": variant(data, options, adam={"foreach": False}),
    }
    if options.compile:
        variants["torch.compile"] = variant(data, options, transform=torch.compile)
    rates = measure(variants, rounds=options.rounds, rows=options.steps * options.batch_size)
    print(f"examples/s, {options.threads} threads, median (best) of {options.rounds} turns of {options.steps} steps")
    for name, (wall, cpu) in rates.items():
        print(f"{name:28}{show(wall)}   of CPU time {show(cpu)}")


def variant(
    data: worker.Data,
    options: argparse.Namespace,
    *,
    tables: type[nn.Module] = OneTable,
    experts: Experts = single_experts,
    adam: dict[str, bool] | None = None,
    transform: Callable[[nn.Module], Callable[..., Tensor]] = lambda model: model,
) -> Callable[[], None]:
    """A function that trains a few steps."""
    torch.manual_seed(0)
    lookup, dense = tables(data["table_sizes"].tolist()), torch.from_numpy(data["train_dense"])
    model = MMoE(lookup, num_inputs=worker.input_width(data), experts=experts)
    optimizer = torch.optim.Adam(model.parameters(), lr=worker.LEARNING_RATE, **(adam or {"fused": True}))
    ids, labels = lookup.rows_of(torch.from_numpy(data["train_ids"])), torch.from_numpy(data["train_labels"])
    return partial(train_steps, transform(model), optimizer, ids, dense, labels, options.steps, options.batch_size)


def train_steps(model, optimizer, ids: Tensor, dense: Tensor, labels: Tensor, steps: int, batch_size: int) -> None:
    for rows in torch.randint(len(ids), (steps, batch_size)):
        train_step(model, optimizer, ids.index_select(0, rows), dense.index_select(0, rows), labels[rows])


def measure(
    variants: dict[str, Callable[[], None]], *, rounds: int, rows: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Rates of each variant's turns by passed and by computed seconds, after one turn that warms up."""
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in variants}
    for turn in range(1 + rounds):
        for name, train in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            train()
            if turn > 0:
                rates[name][0].append(rows / (time.perf_counter() - wall))
                rates[name][1].append(rows / (time.process_time() - cpu))
    return rates


def show(rates: list[float]) -> str:
    return f"{statistics.median(rates) / 1e3:7.1f}k ({max(rates) / 1e3:5.1f}k)"


if __name__ == "__main__":
    main()
