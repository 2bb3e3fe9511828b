"""The benchmark of transfer: what it times are the steps that it says, and what it says of them are medians."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import transfer_cost, transfer_torch, transfer_worker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def small(monkeypatch):
    for name, value in {"BATCH": 16, "STEPS": 3, "SINES": 4}.items():
        monkeypatch.setattr(transfer_worker, name, value)
    for made in (transfer_worker.transfer, transfer_worker.train, transfer_worker.maml):
        made.cache_clear()
    yield
    for made in (transfer_worker.transfer, transfer_worker.train, transfer_worker.maml):
        made.cache_clear()


@pytest.mark.parametrize("mode", [transfer_worker.PLAIN, *transfer_worker.MODES])
def test_every_mode_is_timed(mode, small):
    answer = transfer_worker.answer({"part": "step", "mode": mode, "tasks": 2, "encoder": [4]})
    assert answer["seconds"] > 0


@pytest.mark.parametrize("strategy", [transfer_worker.PLAIN, "lora", "constrained", "maml", "reptile"])
def test_whole_train_steps_of_every_kind_are_timed(strategy, small):
    answer = transfer_worker.answer({"part": "train", "strategy": strategy, "tasks": 2, "encoder": [4]})
    assert answer["seconds"] > 0


def by_hand(inner_steps, count):
    """Parameters after some steps of MAML, wave by wave."""
    params = {name: jnp.asarray(array) for name, array in transfer_worker.layers((1, 40, 40, 1)).items()}
    optimizer, waves = optax.adam(transfer_worker.RATE), transfer_worker.sines(0)
    moments = optimizer.init(params)

    def loss(params, x, y):
        for index in range(3):
            x = x @ params[f"kernel_{index}"] + params[f"bias_{index}"]
            x = jnp.maximum(x, 0) if index < 2 else x
        return jnp.mean((x - y) ** 2)

    def mean_loss(params, x, y):
        total = 0.0
        for wave in range(x.shape[1]):
            moved = params
            for _ in range(inner_steps):
                gradients = jax.grad(loss)(moved, x[0, wave], y[0, wave])
                moved = jax.tree.map(lambda leaf, g: leaf - 0.01 * g, moved, gradients)
            total += loss(moved, x[1, wave], y[1, wave])
        return total / x.shape[1]

    for step in range(count):
        gradients = jax.grad(mean_loss)(params, waves["x"][step], waves["y"][step])
        updates, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(params, updates)
    return params


def closed_over(run, name):
    """What a function of the worker keeps."""
    return dict(zip(run.__code__.co_freevars, run.__closure__, strict=True))[name].cell_contents


def test_maml_is_that_of_the_paper(small):
    run = transfer_worker.maml(2)
    run(3)
    ((params, _),) = closed_over(run, "kept")
    for name, expected in by_hand(2, 3).items():
        np.testing.assert_allclose(params[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed; it is the peers'")
def test_maml_in_torch_makes_the_same_steps(small):
    run = transfer_torch.maml(2)
    run(3)
    for name, expected in by_hand(2, 3).items():
        found = closed_over(run, "params")[name].detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)


def record_of(rounds):
    """Rounds of (slowness, times of the constrained step, seconds of torch)."""
    steps = [
        {
            "tasks": tasks,
            "encoder": list(units),
            "round": turn,
            "seconds": {
                transfer_worker.PLAIN: slow,
                **dict.fromkeys(transfer_worker.MODES, 2 * slow),
                "constrained": slow * (ratio + (tasks == 8)),
            },
        }
        for turn, (slow, ratio, _) in enumerate(rounds)
        for tasks in transfer_cost.TASKS
        for units in transfer_cost.ENCODERS
    ]
    trained = [
        run | {"seconds": dict.fromkeys((transfer_worker.PLAIN, *transfer_worker.STRATEGIES), 1.0)} for run in steps
    ]
    waves = [
        {"inner_steps": number, "round": turn, "seconds": {"ours": slow} | ({"torch": slow * torch} if torch else {})}
        for turn, (slow, _, torch) in enumerate(rounds)
        for number in transfer_cost.INNER_STEPS
    ]
    return {"step_runs": steps, "train_runs": trained, "maml_runs": waves}


def test_ratios_are_within_a_round_and_goals_judge_by_the_worst():
    goals = transfer_cost.summary(record_of([(1.0, 3.0, 4.0), (10.0, 3.6, 2.0), (1.0, 3.2, 5.0)]))["goals"]
    constrained, first_order, *waves = goals
    assert constrained["worst"] == pytest.approx(4.2) and constrained["met"]
    assert constrained["where"].startswith("8 tasks")
    assert first_order["worst"] == pytest.approx(2.0) and first_order["met"]
    assert [goal["worst"] for goal in waves] == [4.0, 4.0] and all(goal["met"] for goal in waves)


def test_without_a_peer_nothing_is_said_of_it():
    *_, wave = transfer_cost.summary(record_of([(1.0, 5.0, None)]))["goals"]
    assert wave["met"] is None and wave["worst"] is None


def test_help_says_what_is_to_be_reached():
    command = [sys.executable, "benchmarks/transfer_cost.py"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "at most 4.5 x the plain step" in done.stdout
    wrong = subprocess.run([*command, "--repeats", "0"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "expected a number >= 1" in wrong.stderr
