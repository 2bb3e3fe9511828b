"""The figure of the toy by its pixels, and its table by its words."""

import copy
import io

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from mtl_jax.report.toy import COLOURS, plot_toy, toy_table

STARTS = [[-8.0, 8.0], [8.0, 8.0]]
ENDS = [[-2.0, -8.0], [5.0, 3.0]]


def values_at(points, kappa):
    x1, x2 = points[..., 0], points[..., 1]
    return np.stack([kappa * ((x1 - 7) ** 2 + x2), (x1 + 7) ** 2 + x2], axis=-1)


@pytest.fixture
def content():
    """One method: from the first start to the set, from the second to elsewhere."""
    ways = np.stack([np.linspace(start, end, 30) for start, end in zip(STARTS, ENDS, strict=True)])
    outcomes = [
        {"kappa": kappa, "start": start, "end": end, "losses": [1.0, -2.0], "distance": distance, "arrived": arrived,
         "nonfinite": None}
        for kappa in (1.0, 0.1)
        for start, end, distance, arrived in zip(STARTS, ENDS, (0.001, 11.2), (2900, None), strict=True)
    ]  # fmt: skip
    method = {
        "outcomes": outcomes,
        "points": np.stack([ways, ways]),
        "losses": np.stack([values_at(ways, kappa) for kappa in (1.0, 0.1)]),
    }
    front = np.stack([np.linspace(-7, 7, 21), np.full(21, -8.0)], axis=-1)
    return {"kappas": [1.0, 0.1], "steps": 3000, "pareto_set": front, "methods": {"cautious": method}}


@pytest.fixture
def drawn(tmp_path):
    def draw(content):
        plot_toy(content, values_at, tmp_path / "toy.png")
        return imread(io.BytesIO((tmp_path / "toy.png").read_bytes()))

    return draw


def printed(content):
    stream = io.StringIO()
    Console(file=stream, width=120).print(toy_table(content))
    return stream.getvalue()


def pixels(image, colour):
    wanted = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)])
    return int((np.rint(image[..., :3] * 255) == wanted).all(axis=-1).sum())


def test_every_start_has_its_colour_in_the_plane_and_in_the_space_of_losses(drawn, content):
    image = drawn(content)
    height, width, _ = image.shape
    assert 1200 <= width <= 1600 and 300 <= height <= 600
    panels = image[: int(0.8 * height)]
    for half in (panels[:, : width // 2], panels[:, width // 2 :]):
        for colour in COLOURS[:2]:
            assert pixels(half, colour) > 200
        assert pixels(half, COLOURS[2]) == 0


def test_an_end_on_the_set_is_filled(drawn, content):
    """The second end is a ring; on the set too it would have more of its colour."""
    there = copy.deepcopy(content)
    for outcome in there["methods"]["cautious"]["outcomes"]:
        outcome["arrived"] = 100
    assert pixels(drawn(there), COLOURS[1]) > pixels(drawn(content), COLOURS[1]) + 50
    assert pixels(drawn(there), COLOURS[0]) == pixels(drawn(content), COLOURS[0])


def test_a_row_a_method(drawn, content):
    one = drawn(content)
    content["methods"]["bold"] = content["methods"]["cautious"]
    two = drawn(content)
    assert two.shape[1] == one.shape[1] and 1.6 * one.shape[0] < two.shape[0] < 2 * one.shape[0]


def test_more_starts_than_colours_are_drawn(drawn, content):
    method = content["methods"]["cautious"]
    for name in ("points", "losses"):
        method[name] = np.concatenate([method[name] + shift for shift in (0.0, 0.5, 1.0, 1.5)], axis=1)
    method["outcomes"] = [o for kappa in (1.0, 0.1) for o in method["outcomes"] * 4 if o["kappa"] == kappa]
    assert pixels(drawn(content), COLOURS[5]) > 100


def test_the_table_says_where_each_start_ended(content):
    lines = [line.strip() for line in printed(content).splitlines() if "cautious" in line]
    assert len(lines) == 4
    assert "(-2.000, -8.000)" in lines[0] and "reached" in lines[0] and lines[0].endswith("2,900")
    assert "no: 11.2 away" in lines[1] and lines[1].endswith("3,000")


def test_a_step_that_is_not_finite_is_told_with_its_number(content):
    content["methods"]["cautious"]["outcomes"][0] |= {"nonfinite": 1234, "arrived": None}
    line = next(line for line in printed(content).splitlines() if "cautious" in line)
    assert "not finite" in line and line.rstrip().endswith("1,234")
