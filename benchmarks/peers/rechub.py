"""torch-rechub: its MMOE, its DataGenerator and its MTLTrainer, on the benchmark's features, rows and sizes.

    python benchmarks/peers/rechub.py DATA.npz --epochs 2 --json OUT.json

The library is used as it is. Its MLP puts batch normalisation after every linear layer, also inside the gates, and
gates have biases: work that the other competitors do not have. Its loader collates row by row; it gets the features as
NumPy arrays and the labels as a tensor, and no worker processes (its default), which is the fastest of what it takes
among the inputs that were tried (lists, arrays, tensors).
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import worker
from benchmarks.machine import versions


def run(data: worker.Data, epochs: int, batch_size: int, seed: int) -> dict:
    """Trains 1 + ``epochs`` epochs and measures the last ``epochs`` of them."""
    torch.manual_seed(seed)
    sizes, num_dense = data["table_sizes"].tolist(), data["train_dense"].shape[1]
    features = [SparseFeature(f"feature_{k}", size, embed_dim=worker.EMBEDDING) for k, size in enumerate(sizes)]
    features += [DenseFeature(f"dense_{k}") for k in range(num_dense)]
    task_types = ["classification"] * len(worker.TASKS)
    model = MMOE(
        features,
        task_types,
        worker.NUM_EXPERTS,
        {"dims": list(worker.EXPERT_UNITS)},
        [{"dims": list(worker.TOWER_UNITS)} for _ in task_types],
    )
    trainer = MTLTrainer(model, task_types, optimizer_params={"lr": worker.LEARNING_RATE})
    train_rows, test_rows = rows(data, "train"), rows(data, "test")
    generator = DataGenerator(*train_rows)
    train, _, test = generator.generate_dataloader(*test_rows, *test_rows, batch_size=batch_size)
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its losses
        warmup, seconds = worker.time_epochs(lambda: trainer.train_one_epoch(train), epochs)
        scores = trainer.evaluate(model, test)
    return worker.measurement(
        rows_per_epoch=len(data["train_ids"]),
        warmup_seconds=warmup,
        seconds_per_epoch=seconds,
        test_auc=dict(zip(worker.TASKS, scores, strict=True)),
        versions=versions("torch", "torch-rechub", "numpy"),
    )


def rows(data: worker.Data, part: str) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """The features by name, and the labels."""

    def columns(kind: str, values: np.ndarray) -> dict[str, np.ndarray]:
        return {f"{kind}_{k}": np.ascontiguousarray(column) for k, column in enumerate(values.T)}

    features = columns("feature", data[f"{part}_ids"]) | columns("dense", data[f"{part}_dense"])
    return features, torch.from_numpy(data[f"{part}_labels"])


if __name__ == "__main__":
    worker.main(run, __doc__)
