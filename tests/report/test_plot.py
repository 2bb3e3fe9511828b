"""The figure of one run, judged by its pixels: what is trained is drawn in colours that nothing else has."""

import io
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from matplotlib.image import imread

from mtl_jax.report.folder import HISTORY_SCHEMA
from mtl_jax.report.plot import MODEL, SINGLE, plot_run


def pixels(image, colour):
    """Number of pixels of exactly one colour."""
    wanted = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)])
    return int((np.rint(image[..., :3] * 255) == wanted).all(axis=-1).sum())


@pytest.fixture
def drawn(tmp_path):
    def draw(record, history, **options):
        plot_run(record, history, tmp_path / "run.png", **options)
        return imread(io.BytesIO((tmp_path / "run.png").read_bytes()))

    return draw


def test_a_readable_figure_with_both_sides(drawn, record, history, reference):
    image = drawn(record, history, reference=reference)
    height, width, _ = image.shape
    assert 1200 <= width <= 2400 and 500 <= height <= 1600
    left, right = image[:, : width // 2], image[:, width // 2 :]
    assert pixels(left, MODEL) > 500 and pixels(left, SINGLE) == 0
    # Bars of the same height, and gains that differ by a few percent of their length.
    assert pixels(right, SINGLE) == pytest.approx(pixels(right, MODEL), rel=0.1)


def test_frames_and_rows_give_the_same_figure(drawn, record, history):
    assert np.array_equal(drawn(record, history), drawn(record, pl.DataFrame(history, schema=HISTORY_SCHEMA)))


def test_without_a_reference_there_is_no_single_task_bar(drawn, record, history):
    assert pixels(drawn(record, history), SINGLE) == 0


def test_a_run_cut_short_is_drawn_as_far_as_it_came(drawn, record, history):
    record["metrics"] = {"valid": {"buy": {"auc": 0.8}}, "test": {}}
    record["baselines"] = {"global_mean": {"buy": {"auc": 0.5}}}
    record["monitor"] = {"name": None, "value": None, "step": None}
    partial = [row for row in history if row["task"] == "buy"] + [history[0] | {"task": "promo", "value": None}]
    image = drawn(record, partial)
    assert pixels(image, MODEL) > 500
    record["metrics"], record["baselines"] = {"valid": {}, "test": {}}, {}
    assert 0 < pixels(drawn(record, []), "#222222")


def test_nothing_heavy_is_loaded_before_it_is_needed(tmp_path):
    """No JAX at all, matplotlib only for drawing, and never pyplot with its global state."""
    code = """
import sys
import mtl_jax.report.plot, mtl_jax.report.terminal, mtl_jax.report.find, mtl_jax.report.folder
assert "matplotlib" not in sys.modules
assert not {"jax", "jaxlib", "flax", "optax"} & sys.modules.keys()
record = dict(
    metrics={"valid": {}, "test": {}}, baselines={}, monitor={"step": None}, seed=0,
    tasks={"a": {"metric": "auc", "direction": "higher"}},
    method={"sharing": "x", "balancing": "y"}, data={"name": "d", "recipe": None, "split": "time"},
)
mtl_jax.report.plot.plot_run(record, [], sys.argv[1])
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.png")], check=True)
