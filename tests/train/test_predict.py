"""Predictions in blocks are the model's outputs, row by row."""

import numpy as np

from mtl_jax.data.batching import as_batch
from mtl_jax.train import predict as module
from mtl_jax.train.predict import flops_per_example, predict
from mtl_jax.train.state import Functional


def test_blocks_do_not_show(three_task_schema, make_model, make_rows, monkeypatch):
    """Whether the rows fill their blocks, leave a rest, or are fewer than one block; weights do not matter."""
    rows = make_rows(three_task_schema, 23)
    rows.weight[4] = 0
    model = make_model(three_task_schema, "mmoe", dropout=0.5)
    functional, params, rest = Functional.of(model)
    expected = model(as_batch(rows))
    for block in (23, 8, 100):
        monkeypatch.setattr(module, "ROWS_PER_BLOCK", block)
        outputs = predict(functional, params | rest, rows)
        assert {task: out.shape for task, out in outputs.items()} == {"click": (23,), "spend": (23,), "kind": (23, 3)}
        for task, out in outputs.items():
            assert isinstance(out, np.ndarray)
            np.testing.assert_allclose(out, expected[task], rtol=1e-5, atol=1e-6)


def test_operations_are_counted(small_schema, make_model, make_rows):
    """At least two a weight of the matrix products: (3 + 1) 5 in the bottom, 5 4 + 4 in each tower."""
    functional, params, rest = Functional.of(make_model(small_schema))
    flops = flops_per_example(functional, params | rest, as_batch(make_rows(small_schema, 16)))
    least = 2 * (4 * 5 + 2 * (5 * 4 + 4))
    assert least <= flops < 3 * least
