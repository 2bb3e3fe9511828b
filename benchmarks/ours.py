"""mtl_jax in the throughput benchmark: what a user calls, on the benchmark's arrays."""

import time
from functools import partial

import numpy as np

from benchmarks import worker
from benchmarks.machine import versions


def run_ours(data: worker.Data, epochs: int, batch_size: int, seed: int) -> dict:
    """Trains 1 + ``epochs`` epochs of the benchmark's MMoE with :func:`mtl_jax.train.fit`.

    As for every competitor: sizes from :mod:`benchmarks.worker`, no dropout, dense Adam on all parameters and tables,
    a new order of the rows in every epoch, float32. The first epoch, with compilation, is the warm-up. An epoch is
    timed from its permutation to the arrival of its last loss; the evaluation after it is not part of it.

    Args:
      data: The arrays that :func:`benchmarks.worker.load` describes.
      epochs: Timed epochs.
      batch_size: Rows a step.
      seed: Of initialisation and data order.

    Returns:
      What :func:`benchmarks.worker.measurement` returns.
    """
    from flax import nnx

    from mtl_jax import MultiTaskModel, metrics, train
    from mtl_jax.nn import Encoder, Tower
    from mtl_jax.sharing import MMoE

    training, test = training_data(data)
    model = MultiTaskModel(
        training.schema,
        encoder=partial(Encoder, embedding_dim=worker.EMBEDDING),
        sharing=partial(MMoE, num_experts=worker.NUM_EXPERTS, expert_units=worker.EXPERT_UNITS, dropout=0.0),
        towers=partial(Tower, units=worker.TOWER_UNITS, dropout=0.0),
        rngs=nnx.Rngs(seed),
    )
    clock = EpochClock()
    result = train.fit(
        model,
        training,
        optimizer=train.Optimizer(learning_rate=worker.LEARNING_RATE),
        seed=seed,
        epochs=1 + epochs,
        batch_size=batch_size,
        patience=0,
        table_updates="dense",
        observer=clock,
    )
    logits = result.predict(test)
    return worker.measurement(
        rows_per_epoch=training.train.num_rows,
        warmup_seconds=clock.seconds[0],
        seconds_per_epoch=clock.seconds[1:],
        test_auc={task: metrics.auc(test.labels[task], logits[task]) for task in worker.TASKS},
        versions=versions("jax", "flax", "optax", "numpy"),
    )


class EpochClock:
    """An observer that times epochs, without the evaluations between them."""

    wants_arrays = False

    def __init__(self):
        self.seconds: list[float] = []
        self._start = self._end = 0.0

    def started(self, **facts):
        self._start = time.perf_counter()

    def advanced(self, **facts):
        self._end = time.perf_counter()

    def evaluated(self, **facts):
        self.seconds.append(self._end - self._start)
        self._start = time.perf_counter()

    def finished(self):
        pass


def training_data(data: worker.Data):
    """The arrays as :class:`mtl_jax.data.TrainingData`, and the test rows as ``Encoded``.

    ``fit`` wants validation rows and keeps the best epoch on them. The competitors have none, so it gets a batch of
    training rows, on which the last epoch is the best.
    """
    from mtl_jax.data import Categorical, Encoded, Numeric, Schema, TrainingData, Vocabulary
    from mtl_jax.tasks import Task

    names = [f"feature_{k}" for k in range(len(data["table_sizes"]))]
    schema = Schema(
        features=(
            *(Categorical(name, name) for name in names),
            *(Numeric(f"dense_{k}") for k in range(data["train_dense"].shape[1])),
        ),
        vocabularies=tuple(
            Vocabulary(name, hash_buckets=int(size) - 2) for name, size in zip(names, data["table_sizes"], strict=True)
        ),
        tasks=tuple(Task(name, "binary") for name in worker.TASKS),
    )

    def encoded(part: str, rows: slice = slice(None)) -> Encoded:
        ids, dense, labels = (data[f"{part}_{name}"][rows] for name in ("ids", "dense", "labels"))
        columns = {task: np.ascontiguousarray(labels[:, k]) for k, task in enumerate(worker.TASKS)}
        every = np.ones(len(ids), bool)
        return Encoded(
            ids=ids,
            dense=dense,
            bags={},
            sequences={},
            labels=columns,
            mask=dict.fromkeys(columns, every),
            task_weight={},
            weight=np.ones(len(ids), np.float32),
        )

    training = TrainingData("movielens_1m", schema, encoded("train"), encoded("train", slice(4096)), "benchmark")
    return training, encoded("test")
