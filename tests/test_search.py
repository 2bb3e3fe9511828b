"""The search: it finds a known optimum, spends the same on every arm, goes on after a kill, and sees no test part."""

import json
import math
import subprocess
import sys

import hydra
import pytest

from mtl_jax.config import plain
from mtl_jax.errors import ConfigError, RunFolderError
from mtl_jax.search import SEALED, ask, best, check_search, flat_space, search_arm, space_of

RATE = "search.optimizer.learning_rate={low: 1e-5, high: 1e-1, log: true}"
SMALL = (
    "data=synthetic", "data.num_rows=300", "data.dim=4", "trainer.batch_size=50", "trainer.epochs=1",
    "sharing=shared_bottom", "sharing.units=[4]", "towers.units=[3]", "vectorize.axis=map",
)  # fmt: skip


def arm_of(*overrides):
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return plain(hydra.compose("ablate", overrides=[*SMALL, *overrides]))


@pytest.fixture(scope="module")
def arm():
    return arm_of(f"++{RATE}", "trials=3")


@pytest.fixture(scope="module")
def whole(arm, tmp_path_factory):
    """A search without interruption, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return search_arm(arm, folder, "one"), folder


@pytest.mark.parametrize("optimum", [1e-4, 3e-2])
def test_the_optimum_of_a_known_problem_is_found(optimum):
    """A parabola in the logarithm; uniform points are at least 1.67 decades away from these optima on average."""
    space = flat_space({"rate": {"low": 1e-6, "high": 1.0, "log": True}})
    trials = []
    for number in range(30):
        values = ask(space, trials, number)
        trials.append({"values": values, "merit": -(math.log10(values["rate"] / optimum) ** 2)})
    assert abs(math.log10(best(trials)["rate"] / optimum)) < 0.15
    late = [abs(math.log10(trial["values"]["rate"] / optimum)) for trial in trials[15:]]
    assert sum(late) / len(late) < 1.2


def test_points_lie_in_the_range_and_whole_ranges_give_whole_numbers():
    space = flat_space(
        {
            "a": {"low": 1, "high": 4},
            "b": {"c": {"low": 0.0, "high": 1.0, "step": 0.25}, "d": {"low": 1e-5, "high": 1, "log": True}},
        }
    )
    trials = []
    for number in range(20):
        values = ask(space, trials, number)
        trials.append({"values": values, "merit": None if number % 3 else values["a"]})
        assert values["a"] in (1, 2, 3, 4) and isinstance(values["a"], int)
        assert values["b.c"] in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert 1e-5 <= values["b.d"] <= 1
        assert values["b.d"] == float(f"{values['b.d']:.4g}")


def test_the_best_trial_is_the_first_among_equals_and_failed_ones_take_no_part():
    trials = [{"values": {"a": n}, "merit": merit} for n, merit in enumerate([None, -2.0, 1.0, 1.0])]
    assert best(trials) == {"a": 2}
    assert best(trials[:1]) is None


def test_trials_never_see_the_test_part(whole):
    study, folder = whole
    assert len(study["trials"]) == 3
    home = folder / "search" / "one"
    for trial in study["trials"]:
        (run_id,) = trial["run_ids"]
        record = json.loads((home / "runs" / run_id / "result.json").read_bytes())
        assert record["sealed"] == SEALED
        assert record["metrics"]["test"] is None
        assert record["test_openings"] == 0
        assert trial["value"] == trial["merit"] == record["monitor"]["value"]
        assert record["config"]["optimizer"]["learning_rate"] == trial["values"]["optimizer.learning_rate"]
    assert not list(home.rglob("test_ledger.jsonl"))
    top = max(study["trials"], key=lambda trial: trial["value"])
    assert study["chosen"] == top["values"]


def test_trials_share_a_compiled_program(whole):
    study, folder = whole
    paths = [folder / "search/one/runs" / trial["run_ids"][0] / "result.json" for trial in study["trials"]]
    seconds = [json.loads(path.read_bytes())["timing"]["compile_seconds"] for path in paths]
    assert seconds[0] > 0
    assert seconds[1:] == [0, 0]


def test_a_search_that_was_killed_goes_on_as_if_it_had_not_been(arm, whole, tmp_path):
    def kill(study):
        if len(study["trials"]) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_arm(arm, tmp_path, "one", told=kill)
    assert len(json.loads((tmp_path / "search/one/study.json").read_bytes())["trials"]) == 2
    heard = []
    assert search_arm(arm, tmp_path, "one", told=lambda study: heard.append(len(study["trials"]))) == whole[0]
    assert heard == [3]  # the two that were finished did not run again


def test_another_space_does_not_go_on_in_the_same_folder(arm, whole):
    other = arm | {"search": {"optimizer": {"learning_rate": {"low": 1e-3, "high": 1e-2}}}}
    with pytest.raises(RunFolderError, match=r"holds a search over .* Choose another folder"):
        search_arm(other, whole[1], "one")


def test_failed_trials_count(tmp_path):
    """Steps so large that the losses are no numbers any more."""
    arm = arm_of("++search.optimizer.learning_rate={low: 1e30, high: 1e35, log: true}", "trials=2", "trainer.epochs=2")
    study = search_arm(arm, tmp_path, "one")
    assert [trial["status"] for trial in study["trials"]] == ["failed", "failed"]
    assert all(trial["error"] for trial in study["trials"])
    assert study["chosen"] is None


def test_a_key_that_an_arm_does_not_have_is_none_of_its_space():
    arm = arm_of("++search.sharing.num_experts={low: 2, high: 8}", f"++{RATE}")
    assert set(space_of(arm)) == {"optimizer.learning_rate"}


@pytest.mark.parametrize(
    "ends",
    [
        {"low": 1, "high": 1}, {"low": 1.0}, {"low": 0, "high": 1, "log": True}, {"low": "a", "high": 1},
        {"low": 0, "high": 1, "base": 2}, {"low": 1, "high": 2, "log": True, "step": 1}, {"low": 0.0, "high": math.inf},
    ],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(ends):
    with pytest.raises(ConfigError, match=r"search.a.b is .* expected low < high"):
        flat_space({"a": {"b": ends}})


def test_a_value_in_the_place_of_a_range_is_refused():
    with pytest.raises(ConfigError, match=r"search.a is 3; expected a range. Write search.a=\{low"):
        flat_space({"a": 3})


def test_search_and_axis_exclude_each_other(arm):
    with pytest.raises(ConfigError, match="expected one of them"):
        check_search(arm | {"axis": {"optimizer": {"learning_rate": [1e-3]}}})


def test_without_optuna_the_error_says_what_to_install(arm, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # what an import of an absent package meets
    with pytest.raises(ConfigError, match=r"pip install 'mtl_jax\[search\]'"):
        check_search(arm)


@pytest.mark.slow
def test_the_command_searches_every_arm_alike_and_runs_the_seeds_with_what_was_found(tmp_path):
    command = [
        sys.executable, "-m", "experiments.ablate", *SMALL, RATE, "trials=2", "seeds=2", "report=false",
        f"folder={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "ablation.json").read_bytes())
    assert plan["search"] == {"space": flat_space_of_rate(), "trials": 2, "seeds": 1}
    assert {member["arm"] for member in plan["members"]} == {"single_task", "shared_bottom+equal"}
    for member in plan["members"]:
        study = json.loads((tmp_path / f"search/synthetic-{member['arm']}/study.json").read_bytes())
        assert len(study["trials"]) == 2
        assert member["values"] == study["chosen"]
        record = json.loads((tmp_path / "runs" / member["run_id"] / "result.json").read_bytes())
        assert record["tuning_trials"] == 2
        assert record["metrics"]["test"] is not None
        assert record["config"]["optimizer"]["learning_rate"] == study["chosen"]["optimizer.learning_rate"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0
    assert "trial" not in again.stderr and "completed" not in again.stderr  # nothing was left to do


def flat_space_of_rate():
    return {"optimizer.learning_rate": {"low": 1e-5, "high": 0.1, "log": True, "step": None}}
