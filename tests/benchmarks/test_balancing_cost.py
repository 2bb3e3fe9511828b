import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import balancing_cost, balancing_summary, balancing_worker

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, "benchmarks/balancing_cost.py"]
TINY = balancing_worker.Case(tasks=2, units=(8, 4), batch_size=16, steps=3)
OF_THE_PEER = "is not installed; it is the peer's, see benchmarks/README.md"


def run_of(method, scope, ours, *, turn=0, slow=1.0, tasks=2, needs="gramian", batches=1, peer=None):
    """A round in which everything is ``slow`` times slower; a step of ``equal`` is 1 s, TorchJD's sum 2 s."""
    times = {"ours": ours, "equal": 1.0, "peer_sum": 2.0 if peer else None}
    times |= dict(zip(("documented", "quickest"), peer or (None, None), strict=True))
    return {
        "tasks": tasks,
        "encoder": "191-64-32",
        "round": turn,
        "method": method,
        "scope": scope,
        "needs": needs,
        "batches": batches,
        "owns_step": method == "ntkmtl_sr",
        "settings": None,
    } | {name: value and value * slow for name, value in times.items()}


@pytest.fixture
def runs():
    """Two rounds, of which the second is disturbed."""
    return [
        run
        for turn, slow in enumerate((1.0, 10.0))
        for run in (
            run_of("equal", "", 1.0, turn=turn, slow=slow, needs="losses", peer=(2.0, 2.0)),
            run_of("pcgrad", "representation", 1.3, turn=turn, slow=slow),
            run_of("mgda", "representation", 1.35, turn=turn, slow=slow),
            run_of("pcgrad", "encoder", 3.0, turn=turn, slow=slow, peer=(5.0, 4.0)),
            run_of("ntkmtl_sr", "representation", 30.0, turn=turn, slow=slow),
            run_of("modo", "encoder", 30.0, turn=turn, slow=slow, batches=3),
            run_of("graddrop", "encoder", 30.0, turn=turn, slow=slow, needs="jacobian"),
        )
    ]


def test_help_needs_no_training_environment():
    heavy = ["jax", "polars", "hydra", "torch", "mtl_jax"]
    code = f"import benchmarks.balancing_cost, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for option in (
        "--quick",
        "--tasks",
        "--encoders",
        "--methods",
        "--repeats",
        "--threads",
        "--json",
        "--peer-python",
    ):
        assert option in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--tasks", "0"], ["--repeats", "0"], ["--encoders", "64x32"], ["--methods", "magic"], ["--steps", "0"]],
)
def test_impossible_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        balancing_cost.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_what_is_given_goes_before_what_quick_means_and_equal_is_always_there():
    options = balancing_cost.parse(["--quick", "--tasks", "8", "--methods", "mgda"])
    assert (options.tasks, options.encoders, options.methods) == ([8], ["64-32"], ["equal", "mgda"])
    assert balancing_cost.parse([]).methods == list(balancing_worker.METHODS)


def test_every_balancer_is_measured():
    configured = [path.stem for path in (ROOT / "conf" / "balancing").glob("*.yaml")]
    assert sorted(balancing_worker.METHODS) == sorted(configured)


def test_a_case_survives_its_command_line():
    case, methods = balancing_worker.Case.parse(None, TINY.arguments(["mgda", "equal"]))
    assert (case, methods) == (TINY, ["mgda", "equal"])
    assert case.name == "191-8-4"


def test_tasks_can_be_learned_and_differ():
    arrays = balancing_worker.generate(balancing_worker.Case(tasks=3, units=(4,), batch_size=500, steps=1))
    x, y = arrays["dense"], arrays["labels"]
    assert (x.shape, y.shape) == ((4000, 191), (4000, 3))
    slopes = np.linalg.lstsq(x, y - y.mean(axis=0), rcond=None)[0]
    assert all(np.corrcoef(x @ slopes[:, k], y[:, k])[0, 1] > 0.3 for k in range(3))
    assert (abs(np.corrcoef(slopes.T) - np.eye(3)) < 0.5).all()


def test_orders_visit_every_row_once_an_epoch():
    case = balancing_worker.Case(tasks=2, units=(4,), batch_size=5, steps=11)
    order = balancing_worker.orders(case, 0)
    assert order.shape == (11, 5)
    assert sorted(order[:8].ravel()) == list(range(40))
    assert not np.array_equal(order, balancing_worker.orders(case, 1))


@pytest.mark.parametrize("num_tasks", [2, 8])
def test_gramians_are_those_of_gradients_that_conflict(num_tasks):
    gramians, losses = balancing_worker.gramians(num_tasks)
    assert (np.linalg.eigvalsh(gramians) > 0).all()
    assert (gramians < 0).any() and (losses > 0).all()


def test_ratios_survive_a_disturbed_round(runs):
    rows = {(row["method"], row["scope"]): row for row in balancing_summary.summary(runs, [])["rows"]}
    row = rows["pcgrad", "encoder"]
    assert row["ratio"] == pytest.approx(3.0)
    assert (row["documented_ratio"], row["quickest_ratio"]) == (pytest.approx(2.5), pytest.approx(2.0))
    assert row["speed"] == pytest.approx(4 / 3)  # by the faster of TorchJD's ways
    assert row["seconds"]["ours"] == pytest.approx(16.5)
    assert rows["pcgrad", "representation"]["speed"] is None


def test_goals_go_by_the_worst_of_what_they_are_about(runs):
    runs += [run_of("nash_mtl", "encoder", 4.0, tasks=8, peer=(100.0, 90.0))]
    goals = {(goal["tasks"], goal["text"][:22]): goal for goal in balancing_summary.summary(runs, [])["goals"]}
    of_scope, of_speed, of_nash = "At scope representatio", "At scope encoder pcgra", "At scope encoder nash_"
    assert len(goals) == 6
    assert goals[2, of_scope]["met"] and goals[2, of_scope]["worst"] == pytest.approx(1.35)
    assert goals[2, of_scope]["where"] == "mgda, 191-64-32"
    assert goals[2, of_speed]["met"] is False and goals[2, of_speed]["limit"] == 1.5
    assert goals[8, of_nash]["met"] and goals[8, of_nash]["worst"] == pytest.approx(22.5)
    assert goals[2, of_nash]["met"] is None


def test_tables_and_sentences(runs):
    solvers = [
        {"method": m, "tasks": k, "round": r, "seconds": (1 + r) * 1e-6}
        for m, k in (("mgda", 2), ("mgda", 4), ("krum", 4))
        for r in range(3)
    ]
    record = balancing_summary.summary(runs, solvers) | {
        "peer": balancing_cost.NOT_ASKED,
        "peer_missing": {},
        "busy_elsewhere": 0.4,
        "machine": {"cpu": "a cpu"},
        "settings": {"threads": 2, "batch_size": 2048, "steps": 32, "repeats": 2},
        "gemm_gflops": 90.0,
        "device": "cpu: cpu",
        "versions": {"jax": "0"},
        "commit": None,
        "date": "today",
    }
    rows = {row[2:4]: row for row in balancing_summary.table(record)}
    shown = ("16500.00", "3.00 x", "27500.00", "2.50 x", "22000.00", "2.00 x", "1.33 x")
    assert rows["pcgrad", "encoder"][4:] == shown
    assert rows["pcgrad", "representation"][6:] == ("",) * 5
    header, *solver_rows = balancing_summary.solver_table(record)
    assert header == ("solver, us", "2 tasks", "4 tasks")
    assert solver_rows == [("mgda", "2.00", "2.00"), ("krum", "", "2.00")]
    caption = "\n".join(balancing_summary.caption(record))
    assert "no --peer-python" in caption and "40%" in caption and "90 GFLOP/s" in caption
    assert "quiet machine" not in "\n".join(balancing_summary.caption(record | {"busy_elsewhere": 0.01}))
    of_scope, of_speed, of_nash = balancing_summary.sentences(record)
    assert of_scope.endswith("with 2 tasks: met, 1.35 x (mgda, 191-64-32).")
    assert of_speed.endswith("missed, 1.33 x (pcgrad, 191-64-32).")
    assert of_nash.endswith("not measured.")


def test_an_interpreter_that_cannot_be_used_is_named(tmp_path):
    assert balancing_cost.peer_command(None) == (None, balancing_cost.NOT_ASKED)
    with pytest.raises(SystemExit, match="nowhere"):
        balancing_cost.peer_command(tmp_path / "nowhere")
    without = tmp_path / "python"
    without.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # no packages
    without.chmod(0o755)
    command, line = balancing_cost.peer_command(without)
    assert command is None
    assert f"{without} cannot import it (ModuleNotFoundError: No module named 'torch')" in line


def test_a_worker_that_fails_is_quoted():
    command = [sys.executable, "-c", "raise ValueError('broken')"]
    with (
        pytest.raises(SystemExit, match="(?s)ended with 1; its last lines:.*ValueError: broken"),
        balancing_cost.Worker(command),
    ):
        pass


def test_a_worker_answers_and_what_else_is_printed_is_no_answer():
    code = (
        "from benchmarks.balancing_worker import serve\n"
        "def answer(request):\n"
        "    print('noise')\n"
        "    return {'double': 2 * request['number']}\n"
        "serve({'fact': 1}, answer)"
    )
    with balancing_cost.Worker([sys.executable, "-c", code]) as worker:
        assert worker.facts == {"fact": 1}
        assert [worker.ask(number=number) for number in (2, 3)] == [{"double": 4}, {"double": 6}]


def test_scopes_of_methods_and_tasks_that_are_too_few():
    def scopes(name, num_tasks=2):
        return [entry["scope"] for entry in balancing_worker.entries_of(name, num_tasks)]

    assert scopes("famo") == [""]
    assert scopes("nash_mtl") == ["representation", "encoder"]
    assert scopes("moco") == scopes("modo") == ["encoder"]
    assert scopes("krum") == []
    assert scopes("krum", 4) == ["representation", "encoder"]


def test_a_measurement_trains_and_goes_on_from_the_one_before():
    steps = balancing_worker.Steps(TINY)
    made = 2 * (balancing_worker.WARM_UP + TINY.steps)
    for method, scope in (("pcgrad", "representation"), ("modo", "encoder")):  # the latter pads its batch
        assert all(steps.measure(method, scope) > 0 for _ in range(2))
        _, state, _ = steps.programs[method, scope]
        assert int(state.step) == made
        # Biases start at 0, and a step of Adam is about its rate at first.
        moved = [np.abs(np.asarray(array)).max() for path, array in state.params.items() if "bias" in path]
        assert all(0 < distance < 2 * made * balancing_worker.LEARNING_RATE for distance in moved)


def test_a_solver_is_timed_alone(monkeypatch):
    monkeypatch.setattr(balancing_worker, "SOLVER_SECONDS", 1e-4)
    assert 0 < balancing_worker.solve("pcgrad", 3) < 1.0


@pytest.mark.slow
def test_a_tiny_run_measures_both_scopes(tmp_path):
    arguments = ["--tasks", "2", "--encoders", "8-4", "--methods", "mgda", "--batch-size", "16", "--steps", "2"]
    arguments += ["--solver-tasks", "2", "--repeats", "2", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert balancing_cost.NOT_ASKED in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    names = [(row["method"], row["scope"]) for row in record["rows"]]
    assert names == [("equal", ""), ("mgda", "representation"), ("mgda", "encoder")]
    assert all(row["ratio"] > 0 and row["seconds"]["documented"] is None for row in record["rows"])
    assert record["solvers"][0]["seconds"] > 0 and record["gemm_gflops"] > 0
    assert done.stdout.rstrip().endswith("not measured.")


@pytest.mark.parametrize("method", ["mgda", "upgrad", "cagrad", "nash_mtl"])
def test_torchjds_settings_do_not_change_its_step(method):
    torch = pytest.importorskip("torch", reason=f"torch {OF_THE_PEER}")
    pytest.importorskip("torchjd", reason=f"torchjd {OF_THE_PEER}")
    from benchmarks import balancing_torch

    def trained(settings):
        torch.manual_seed(0)
        steps, trainer = balancing_torch.Steps(TINY), balancing_torch.Trainer(TINY, method, settings)
        steps.time(trainer, 1)
        return [parameter.detach().numpy() for parameter in trainer.encoder.parameters()]

    for one, two in zip(trained({}), trained({"parallel_chunk_size": 1}), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_torchjd_is_timed_in_the_settings_of_its_functions():
    pytest.importorskip("torch", reason=f"torch {OF_THE_PEER}")
    pytest.importorskip("torchjd", reason=f"torchjd {OF_THE_PEER}")
    from benchmarks import balancing_torch

    steps = balancing_torch.Steps(TINY)
    for method, way, chosen in (("equal", "documented", 0), ("pcgrad", "documented", 0), ("pcgrad", "quickest", 2)):
        answer = steps.measure(method, way)
        assert answer["seconds"] > 0 and len(answer["settings"]) == chosen
