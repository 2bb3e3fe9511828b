"""Small encoded data for the tests of metrics."""

import numpy as np
import pytest

from mtl_jax.data.dataset import Encoded, TrainingData
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.metrics import from_original
from mtl_jax.tasks import Task

TASKS = (
    Task("click", "binary"),
    Task("grade", "multiclass", classes=("a", "b", "c")),
    Task("rating", "regression", mean=3.2, std=1.1),
    Task("spend", "regression", transform="log1p", mean=1.5, std=0.8),
)


def encode(num_rows: int, seed: int) -> Encoded:
    """Random rows whose labels depend on user, item and the first dense column; a few labels are hidden."""
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 20, num_rows), rng.integers(0, 15, num_rows)
    dense = rng.normal(size=(num_rows, 3)).astype(np.float32)
    signal = 1.5 * np.sin(user) + 1.5 * np.cos(item) + 0.7 * dense[:, 0] + rng.normal(scale=0.5, size=num_rows)
    labels = {
        "click": (signal > 0.5).astype(np.float32),
        "grade": np.digitize(signal, [-0.5, 1]).astype(np.int32),
        "rating": from_original(TASKS[2], np.clip(np.round(signal + 3), 1, 5)).astype(np.float32),
        "spend": from_original(TASKS[3], np.exp(signal)).astype(np.float32),
    }
    mask = {name: rng.random(num_rows) < 0.9 for name in labels}
    return Encoded(
        ids=np.stack([user + 2, item + 2], axis=1).astype(np.int32),
        dense=dense,
        bags={},
        sequences={},
        labels={name: np.where(mask[name], values, 0).astype(values.dtype) for name, values in labels.items()},
        mask=mask,
        task_weight={"click": rng.choice([0.0, 1.0, 2.0], num_rows).astype(np.float32)},
        weight=rng.choice([0.5, 1.0], num_rows).astype(np.float32),
        domain=rng.integers(0, 2, num_rows).astype(np.int32),
        user=user.astype(np.int32),
        item=item.astype(np.int32),
    )


@pytest.fixture(scope="session")
def training() -> TrainingData:
    schema = Schema(
        features=(
            Categorical("user", "user"),
            Categorical("item", "item"),
            *(Numeric(f"x{column}") for column in range(3)),
        ),
        vocabularies=(
            Vocabulary("user", tuple(map(str, range(20)))),
            Vocabulary("item", tuple(map(str, range(15)))),
        ),
        tasks=TASKS,
        domain="domain",
        domains=("north", "south"),
        user="user",
        item="item",
    )
    return TrainingData("small", schema, encode(600, 0), encode(200, 1), "identity")


@pytest.fixture(scope="session")
def part() -> Encoded:
    return encode(200, 2)
