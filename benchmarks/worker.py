"""One competitor in one process: read the arrays, train, write down what was measured.

Every competitor is a function ``run(data, epochs, batch_size, seed) -> dict`` with the model, the timing and the
result that are fixed here, so that none can differ by accident. Imports the standard library and NumPy only.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.machine import peak_resident_bytes

TASKS = ("click", "like")
EMBEDDING = 16
NUM_EXPERTS = 8
EXPERT_UNITS = (64, 32)
TOWER_UNITS = (32,)
LEARNING_RATE = 1e-3

ARRAYS = {
    "train_ids": np.int32,
    "train_dense": np.float32,
    "train_labels": np.float32,
    "test_ids": np.int32,
    "test_dense": np.float32,
    "test_labels": np.float32,
    "table_sizes": np.int64,
}

Data = Mapping[str, np.ndarray]
Run = Callable[[Data, int, int, int], dict]


def main(run: Run, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """The command line of a competitor: trains on DATA.npz and writes ``run``'s result as JSON.

    ``peak_rss_bytes`` is added here: the peak of the whole process less the arrays it was given, so interpreter,
    framework, compiler and every copy of the data count.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="arrays written by benchmarks/train_throughput.py")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs, after one that warms up (default: 2)")
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here instead of printing it")
    options = parser.parse_args(arguments)

    data = load(options.data)
    result = run(data, options.epochs, options.batch_size, options.seed)
    result["peak_rss_bytes"] = peak_resident_bytes() - sum(array.nbytes for array in data.values())
    text = json.dumps(result, indent=2)
    if options.json:
        options.json.write_text(text)
    else:
        print(text)


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a benchmark file.

    Returns:
      ``train_ids`` int32[N, F], ``train_dense`` f32[N, D], ``train_labels`` f32[N, 2] (click, like), the same three
      for ``test``, and ``table_sizes`` int64[F], the rows of each feature's embedding table.

    Raises:
      ValueError: An array is missing, or an id lies outside its table.
    """
    with np.load(path) as file:
        missing = sorted(set(ARRAYS) - set(file.files))
        if missing:
            raise ValueError(f"{path} lacks {missing}; expected the arrays {list(ARRAYS)}. Write it again")
        data = {name: np.ascontiguousarray(file[name], dtype=dtype) for name, dtype in ARRAYS.items()}
    for part in ("train", "test"):
        ids = data[f"{part}_ids"]
        if (ids < 0).any() or (ids >= data["table_sizes"]).any():
            raise ValueError(
                f"{path}: {part}_ids reach {ids.max(axis=0).tolist()} with table_sizes {data['table_sizes'].tolist()}; "
                "expected 0 <= id < size in every column. Write the file again"
            )
    return data


def input_width(data: Data) -> int:
    """Width of the experts' input: an embedding a feature, and the dense columns."""
    return len(data["table_sizes"]) * EMBEDDING + data["train_dense"].shape[1]


def time_epochs(train_epoch: Callable[[], object], epochs: int) -> tuple[float, list[float]]:
    """Seconds of one warm-up epoch, and of each of the ``epochs`` that follow.

    ``train_epoch`` returns when its work is done: a framework that runs ahead has to be waited for in there.
    """
    seconds = []
    for _ in range(1 + epochs):
        start = time.perf_counter()
        train_epoch()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1:]


def measurement(
    *,
    rows_per_epoch: int,
    warmup_seconds: float,
    seconds_per_epoch: Sequence[float],
    test_auc: Mapping[str, float],
    versions: Mapping[str, str],
    choices: Mapping[str, str] | None = None,
) -> dict:
    """What a competitor returns.

    Args:
      rows_per_epoch: Training rows that pass through the model in one epoch, padding not counted.
      warmup_seconds: Of the first epoch, compilation included; not part of the speed.
      seconds_per_epoch: Of each timed epoch.
      test_auc: Task -> area under the ROC curve on the test rows after the last epoch.
      versions: Package -> version.
      choices: What the competitor chose for this machine, for the record.
    """
    return {
        "examples_per_second": rows_per_epoch * len(seconds_per_epoch) / sum(seconds_per_epoch),
        "warmup_seconds": warmup_seconds,
        "seconds_per_epoch": list(seconds_per_epoch),
        "rows_per_epoch": rows_per_epoch,
        "test_auc": {task: float(test_auc[task]) for task in TASKS},
        "versions": dict(versions),
        "choices": dict(choices or {}),
    }


def training_flop(in_features: int) -> int:
    r"""Floating-point operations of one training step of the benchmark's model, an example.

    The matrix products of the forward pass, a multiplication and an addition an entry; with E experts of widths
    :math:`H_1, H_2`, T tasks and towers of width U on an input of width I:

    .. math::
        F = 2 \left[ E (I H_1 + H_1 H_2) + T (I E + E H_2) + T (H_2 U + U) \right]

    Expert layers, gates and their mixtures, towers and logits. The backward pass makes two products (for the
    input and for the weights) of each one here, so a step counts 3 F. Lookups, activations, losses and Adam are not
    counted: they are little arithmetic, and the rate stays comparable with that of a matrix product.

    Args:
      in_features: I, width of the experts' input.
    """
    num_tasks = len(TASKS)
    expert = sum(i * o for i, o in zip((in_features, *EXPERT_UNITS), EXPERT_UNITS, strict=False))
    gate = in_features * NUM_EXPERTS + NUM_EXPERTS * EXPERT_UNITS[-1]
    tower = sum(i * o for i, o in zip((EXPERT_UNITS[-1], *TOWER_UNITS), (*TOWER_UNITS, 1), strict=True))
    return 3 * 2 * (NUM_EXPERTS * expert + num_tasks * (gate + tower))
