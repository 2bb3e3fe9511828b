"""The summary of a model before training."""

import io

from flax import nnx
from rich.console import Console

import mtl_jax
from mtl_jax.data.batching import as_batch
from mtl_jax.model import label
from mtl_jax.sharing import PLE
from mtl_jax.summary import print_summary


def test_a_summary_has_every_array_with_its_label_and_the_sums():
    data = mtl_jax.data.load("synthetic", num_rows=120, dim=4)

    def sharing(in_features, tasks, *, rngs):
        return PLE(in_features, tasks, levels=((5,), (3,)), rngs=rngs)

    model = mtl_jax.MultiTaskModel(data.schema, sharing=sharing, rngs=nnx.Rngs(0))
    text = io.StringIO()
    print_summary(model, as_batch(data.for_training().valid), Console(file=text, width=120))
    lines = text.getvalue().splitlines()
    numbers = {path: array.size for path, array in mtl_jax.train.state.Functional.of(model)[1].items()}
    assert f"{sum(numbers.values()):,}" in lines[0] and "MultiTaskModel" in lines[0]
    assert sum("  task/y1" in line for line in lines) == sum(label(path) == "task/y1" for path in numbers)
    assert any("kernel 3x4x5  shared" in line for line in lines)  # own experts of two tasks and one shared
    assert "floating-point operations" in lines[-1]
