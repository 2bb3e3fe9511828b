"""What a terminal shows, and what a pipe does not."""

import io

import pytest
from rich.console import Console

from mtl_jax.train import Bar, Quiet

VALUES = {"click auc": 0.75, "spend rmse": None}


def test_the_bar_shows_losses_speed_and_evaluations():
    """Numbers that do not exist are n/a, not an error."""
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, color_system=None, width=160))
    bar.started(total_steps=100, done_steps=25)
    bar.advanced(steps=15, epoch=2, losses={"click": 0.69314, "spend": float("nan")}, examples_per_second=12345.6)
    bar.evaluated(epoch=2, values=VALUES, monitor=0.125, best=True, history=[])
    bar.evaluated(epoch=3, values=VALUES, monitor=None, best=False, history=[])
    bar.finished()
    text = screen.getvalue()
    for part in ("40/100 steps", "click 0.6931", "12,346 ex/s", "click auc 0.7500  spend rmse n/a"):
        assert part in text
    lines = [line for line in text.splitlines() if "monitor" in line]
    assert "monitor 0.1250  best" in lines[0] and "monitor n/a" in lines[1] and "best" not in lines[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_terminals_only(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stderr", stream)
    assert isinstance(Bar.on_terminal(), Bar if terminal else Quiet)
