"""One way to train several seeds, in one process: read the arrays, train, write down what was measured.

    python -m benchmarks.vectorised_worker DATA.npz --model small --way vmap --seeds 0 1 2 3 --json OUT.json

benchmarks/vectorised_runs.py starts a fresh process of it for every measurement, so that nothing compiled is left from
another one. Imports the standard library and NumPy only; jax and mtl_jax when it trains.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import worker
from benchmarks.machine import peak_resident_bytes, versions

WAYS = ("vmap", "map", "fit")
"""On the run axis, together or one after the other; or a call of ``fit`` a seed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An MMoE and how long it is trained.

    Attributes:
      num_rows: Training rows, where they are generated.
      epochs: Of every seed; nothing stops early.
      batch_size: Rows of a step.
      num_experts: Experts.
      expert_units: Widths of their layers.
      tower_units: Widths of the towers.
      table_sizes: Rows of each feature's embedding table.
      num_dense: Dense columns.
    """

    num_rows: int
    epochs: int
    batch_size: int
    num_experts: int
    expert_units: tuple[int, ...]
    tower_units: tuple[int, ...]
    table_sizes: tuple[int, ...]
    num_dense: int


CASES = {
    # The rows of conf/data/synthetic.yaml, and a model that leaves most of a GPU idle.
    "small": Case(9_600, 20, 256, 4, (32, 16), (16,), (), 100),
    # The model of train_throughput.py, on tables of the sizes that MovieLens 1M has there.
    "medium": Case(
        200_000, 3, 2048, worker.NUM_EXPERTS, worker.EXPERT_UNITS, worker.TOWER_UNITS,
        (6042, 3671, 4, 23, 3441, 20, 9), 1,
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="arrays as benchmarks/worker.py describes them")
    parser.add_argument("--model", choices=CASES, required=True)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--epochs", type=int, help="default: those of the model")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(arguments)

    case, data = CASES[options.model], worker.load(options.data)
    result = measure(options.way, case, data, options.seeds, options.epochs or case.epochs)
    options.json.write_text(json.dumps(result, indent=2))


def measure(way: str, case: Case, data: worker.Data, seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    """Trains the seeds in one way.

    Args:
      way: One of :data:`WAYS`.
      case: What is trained.
      data: The arrays that :func:`benchmarks.worker.load` describes.
      seeds: Of initialisation, data order and draws.
      epochs: Of every seed.

    Returns:
      ``seconds`` of all training calls, and of them ``compile_seconds`` (tracing, lowering and compilation of whatever
      it was) and ``train_seconds`` (compiled steps; the rest is evaluation, initial values and copies); peak memory of
      the process and of the device, where it tells; ``steps`` and ``values`` (the monitor) of every seed.
    """
    allow_missing_polars()
    import jax

    from benchmarks.ours import training_data

    training, _ = training_data(data)
    device = jax.devices()[0]
    with CompileClock() as clock:
        start = time.perf_counter()
        # A result holds a model, and a study would keep records only.
        records = [
            _record(result, training.train.num_rows, epochs) for result in train(way, case, training, seeds, epochs)
        ]
        seconds = time.perf_counter() - start
    memory = device.memory_stats() or {}
    return {
        "seconds": seconds,
        "compile_seconds": clock.seconds,
        "train_seconds": sum(record["train_seconds"] for record in records),
        "peak_rss_bytes": peak_resident_bytes(),
        "device_peak_bytes": memory.get("peak_bytes_in_use"),
        "steps": [record["steps"] for record in records],
        "values": [record["value"] for record in records],
        "device": f"{device.platform}: {device.device_kind}",
        "versions": versions("jax", "jaxlib", "flax", "optax", "numpy"),
    }


def train(way: str, case: Case, training: Any, seeds: Sequence[int], epochs: int) -> Iterator[Any]:
    """What a user calls; yields results in the order of the seeds."""
    import optax

    from mtl_jax.train import Member, Optimizer, fit, fit_many

    # Runs share a program only if they share the transform.
    optimizer = Optimizer(optax.scale_by_adam(), learning_rate=worker.LEARNING_RATE)
    options = {"epochs": epochs, "batch_size": case.batch_size, "patience": 0}
    if way == "fit":
        for seed in seeds:
            yield fit(model_of(case, training.schema, seed), training, seed=seed, optimizer=optimizer, **options)
        return
    members = [Member(partial(model_of, case, training.schema, seed), seed=seed, optimizer=optimizer) for seed in seeds]
    for _, result in fit_many(members, training, axis=way, **options):
        if isinstance(result, Exception):
            raise result
        yield result


def model_of(case: Case, schema: Any, seed: int) -> Any:
    from flax import nnx

    from mtl_jax import MultiTaskModel
    from mtl_jax.nn import Encoder, Tower
    from mtl_jax.sharing import MMoE

    return MultiTaskModel(
        schema,
        encoder=partial(Encoder, embedding_dim=worker.EMBEDDING),
        sharing=partial(MMoE, num_experts=case.num_experts, expert_units=case.expert_units, dropout=0.0),
        towers=partial(Tower, units=case.tower_units, dropout=0.0),
        rngs=nnx.Rngs(seed),
    )


def generate(case: Case, num_rows: int) -> dict[str, np.ndarray]:
    """The arrays of a case in the form of :func:`benchmarks.worker.load`: labels that ids and numbers explain in part.

    Args:
      case: Sizes of the tables and number of dense columns.
      num_rows: Training rows; there are few test rows, which nothing here reads.
    """
    generator = np.random.default_rng(0)
    effects = [generator.standard_normal((size, 2)) for size in case.table_sizes]
    slopes = generator.standard_normal((case.num_dense, 2)) / np.sqrt(case.num_dense)
    arrays: dict[str, np.ndarray] = {"table_sizes": np.array(case.table_sizes, np.int64)}
    for part, rows in (("train", num_rows), ("test", 16)):
        # Few ids are frequent, as in a shop; 0 and 1 are reserved.
        columns = [2 + ((size - 2) * generator.random(rows) ** 3).astype(np.int32) for size in case.table_sizes]
        ids = np.stack(columns, axis=1) if columns else np.zeros((rows, 0), np.int32)
        dense = generator.standard_normal((rows, case.num_dense)).astype(np.float32)
        signal = dense @ slopes + sum(effect[column] for effect, column in zip(effects, columns, strict=True))
        labels = signal + generator.logistic(size=(rows, 2)) > 0
        arrays |= {f"{part}_ids": ids, f"{part}_dense": dense, f"{part}_labels": labels.astype(np.float32)}
    return arrays


class CompileClock:
    """Seconds in which jax traced, lowered or compiled, as it reports them.

    Reports nest (a function that is traced inside another one), so their intervals are united, not summed.
    """

    def __enter__(self) -> "CompileClock":
        import jax

        self.intervals: list[tuple[float, float]] = []
        self._open = True
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *error: object) -> None:
        self._open = False  # listeners cannot be taken back

    def _heard(self, event: str, duration: float, **facts: Any) -> None:
        if self._open and event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self.intervals.append((now - duration, now))

    @property
    def seconds(self) -> float:
        total, reached = 0.0, float("-inf")
        for begin, end in sorted(self.intervals):
            total += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return total


def allow_missing_polars() -> None:
    """Lets the library be imported where polars is not installed: it reads tables, and here are arrays only."""
    if importlib.util.find_spec("polars") is None:
        sys.modules["polars"] = mock.MagicMock()


def _record(result: Any, num_rows: int, epochs: int) -> Mapping[str, Any]:
    rate = result.timing["examples_per_second"]
    return {
        "train_seconds": num_rows * epochs / rate,
        "steps": result.timing["steps"],
        "value": result.monitor["value"],
    }


if __name__ == "__main__":
    main()
