"""The figure over a number of the data: what it draws are the numbers of the comparisons."""

import pytest

from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.comparison import compare
from mtl_jax.report.drawing import marks
from mtl_jax.report.files import write_report
from mtl_jax.report.sweep import axis_of, draw

POINTS = [{"data.target_fraction": 0.01}, {"data.target_fraction": 0.2}, {"data.target_fraction": 1.0}]
CLICKS = {"single_task": (0.60, 0.70, 0.75), "mmoe": (0.68, 0.73, 0.76)}


def members(value):
    return [{"click": value + seed, "rating": 1.0 - seed} for seed in (-0.01, 0.0, 0.01)]


@pytest.fixture
def ablation(write_ablation):
    arms = {arm: [members(value) for value in values] for arm, values in CLICKS.items()}
    return read_ablation(write_ablation(arms, points=dict.fromkeys(arms, POINTS)))


def test_a_point_for_each_arm_task_and_value(ablation):
    comparisons = compare(ablation)
    axis = axis_of(comparisons)
    assert axis.name == "data.target_fraction"
    for arm, values in CLICKS.items():
        line = axis.points.filter(arm=arm, task="click").sort("value")
        assert line["value"].to_list() == [0.01, 0.2, 1.0]
        assert line["mean"].to_list() == pytest.approx(values)
        # Student's t with two degrees of freedom, standard deviation .01
        assert (line["high"] - line["mean"]).to_list() == pytest.approx([4.302653 * 0.01 / 3**0.5] * 3)
    assert set(axis.points["data"]) == {"movielens_1m"}


def test_it_is_written_and_shown_on_the_page(ablation, tmp_path):
    comparisons = compare(ablation)
    written = write_report(ablation, comparisons, tmp_path, ["png", "html"])
    assert [path.name for path in written] == ["sweep.png", "report.html"]
    picture = (tmp_path / "sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and picture == draw(axis_of(comparisons), marks(comparisons))
    page = (tmp_path / "report.html").read_text()
    assert "Metrics of all arms over data.target_fraction" in page


def test_what_has_not_finished_is_left_out_and_switches_are_no_numbers(write_ablation):
    arms = {arm: [members(values[0]), [None] * 3, [None] * 3] for arm, values in CLICKS.items()}
    comparisons = compare(read_ablation(write_ablation(arms, points=dict.fromkeys(arms, POINTS))))
    axis = axis_of(comparisons)
    assert set(axis.points["value"]) == {0.01} and draw(axis, marks(comparisons)).startswith(b"\x89PNG")
    switches = [{"data.cold": False}, {"data.cold": True}]
    arms = {arm: [members(values[0]), members(values[1])] for arm, values in CLICKS.items()}
    folder = write_ablation(arms, points=dict.fromkeys(arms, switches), name="switches")
    assert axis_of(compare(read_ablation(folder))) is None


def test_nothing_is_drawn_where_no_number_varies(grid_folder, tmp_path):
    ablation = read_ablation(grid_folder)
    assert axis_of(compare(ablation)) is None
    assert write_report(ablation, compare(ablation), tmp_path, ["png"]) == []
