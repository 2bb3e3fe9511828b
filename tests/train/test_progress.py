"""What a terminal shows, and what a pipe does not."""

import io

import pytest
from rich.console import Console

from mtl_jax.train import Bar, Quiet
from mtl_jax.train.progress import Observer, Observers

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


def test_the_bar_shows_the_device():
    screen = io.StringIO()
    bar = Bar(
        Console(file=screen, force_terminal=True, color_system=None, width=160), device=lambda: "gpu:0 3.5/78 GiB"
    )
    bar.started(total_steps=2, done_steps=0)
    bar.advanced(steps=2, epoch=1, losses={"click": 0.5}, examples_per_second=1.0, weights={"click": 1.0})
    bar.finished()
    assert "gpu:0 3.5/78 GiB" in screen.getvalue()


class Noting(Observer):
    def __init__(self, notes, name, *, wants_arrays=False, fails=False):
        self.notes, self.name, self.wants_arrays, self.fails = notes, name, wants_arrays, fails

    def advanced(self, **facts):
        self.notes.append((self.name, facts))

    def parameters(self, step, arrays):
        self.notes.append((self.name, step, arrays))

    def finished(self):
        self.notes.append((self.name, "finished"))
        if self.fails:
            raise OSError("disk full")


def test_several_observers_are_told_in_order():
    notes, call = [], {"steps": 1, "epoch": 1, "losses": {}, "examples_per_second": 1.0, "weights": None}
    several = Observers(Noting(notes, "a"), Quiet(), Noting(notes, "b", wants_arrays=True))
    several.started(total_steps=1, done_steps=0)
    several.advanced(**call)
    several.evaluated(epoch=1, values={}, monitor=None, best=True, history=[])
    several.saved(step=1)
    several.parameters(5, {"kernel": 1})
    assert notes == [("a", call), ("b", call), ("b", 5, {"kernel": 1})]
    assert several.wants_arrays and not Observers(Quiet(), Quiet()).wants_arrays


def test_every_observer_ends_even_after_a_failure():
    notes = []
    several = Observers(Noting(notes, "a", fails=True), Noting(notes, "b"))
    with pytest.raises(OSError, match="disk full"):
        several.finished()
    assert notes == [("a", "finished"), ("b", "finished")]
