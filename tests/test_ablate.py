"""Runs of an arm: each equals the same run alone, what is finished stays, and no end of a process changes a number."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import hydra
import pytest
from rich.console import Console

import mtl_jax.ablate
import mtl_jax.job
from mtl_jax.ablate import run_arm
from mtl_jax.config import plain
from mtl_jax.errors import ConfigError, Interrupted, RunFolderError
from mtl_jax.job import Shared
from mtl_jax.plan import flat_axis, plan_of, runs_of, seeds_of, settings_tried
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.record import validate
from mtl_jax.run import run
from mtl_jax.watch import ProgressFile

ROOT = Path(__file__).parents[1]
SMALL = (
    "data=synthetic", "data.num_rows=300", "data.dim=4", "towers.units=[3]", "trainer.batch_size=50", "trainer.epochs=2",
    "trainer.patience=0", "trainer.steps_per_call=1", "seeds=2", "vectorize.axis=map",
)  # fmt: skip
RATES = "++axis.optimizer.learning_rate=[0.001,0.01]"
BAD_RATE = "++axis.optimizer.learning_rate=[0.001,1e30]"
STEPS = 10  # of a run: 250 rows for training
BOTTOM = ("sharing=shared_bottom", "sharing.units=[4]")
EXPERTS = ("sharing=mmoe", "sharing.num_experts=2", "sharing.expert_units=[4]")


def compose(*overrides, sharing=BOTTOM):
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return plain(hydra.compose("ablate", overrides=[*SMALL, *sharing, *overrides]))


@pytest.fixture(scope="module")
def shared():
    """Of all tests: the data set is made, and each program compiled, once."""
    return Shared(programs={})


@pytest.fixture(scope="module")
def finished(shared, tmp_path_factory):
    """Axis -> folder of an arm of two rates and two seeds."""
    folders = {}
    for axis in ("map", "vmap"):
        folders[axis] = tmp_path_factory.mktemp(axis)
        records = run_arm(compose(RATES, f"vectorize.axis={axis}"), folders[axis], shared=shared)
        assert [record["status"] for record in records.values()] == 4 * ["completed"]
    return folders


def read(folder):
    """Run id -> record."""
    found = {path.parent.name: json.loads(path.read_bytes()) for path in folder.glob("runs/*/result.json")}
    for record in found.values():
        validate(record)
    return found


def states(folder):
    return sorted(record["status"] for record in read(folder).values())


def contents(folder):
    """Every file with its time and size."""
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def stops_at(*calls):
    """A question that is answered yes at these calls."""
    asked = iter(range(1, 10_000))
    return lambda: next(asked) in calls


def assert_same_results(folder, other):
    one, two = read(folder), read(other)
    assert one.keys() == two.keys()
    for name, record in two.items():
        for key in ("status", "metrics", "support", "monitor", "baselines", "params", "seed", "config"):
            assert one[name][key] == record[key], (name, key)
        curves = [RunFolder(place / "runs" / name).read_history() for place in (folder, other)]
        assert curves[0].equals(curves[1])


def close(one, other, tolerance):
    """Equal numbers, in whatever they lie."""
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], value, tolerance) for key, value in other.items())
    return one == other or (bool(tolerance) and one == pytest.approx(other, rel=tolerance, abs=tolerance))


@pytest.mark.parametrize(("axis", "tolerance"), [("map", 0.0), ("vmap", 1e-4)])
def test_each_member_is_the_run_of_its_configuration_alone(finished, shared, tmp_path, axis, tolerance):
    arm = compose(RATES)
    for planned in (runs_of(arm)[0], runs_of(arm)[3]):
        alone = run(planned.config, folder=tmp_path / str(planned.seed), console=Console(file=io.StringIO()))
        member = read(finished[axis])[alone["run_id"]]
        for key in ("metrics", "support", "baselines"):
            assert close(member[key], alone[key], tolerance), key
        assert close(member["monitor"], alone["monitor"] | {"step": member["monitor"]["step"]}, tolerance)
        for key in ("config", "config_hash", "seed", "method", "tasks", "data", "params", "test_openings", "flags"):
            assert member[key] == alone[key], key
        texts = [
            place / "config.yaml" for place in (finished[axis] / "runs" / alone["run_id"], tmp_path / str(planned.seed))
        ]
        assert texts[0].read_text() == texts[1].read_text()
        assert {path.name for path in texts[0].parent.iterdir()} >= {
            "history.parquet",
            "run.log",
            "log.jsonl",
            "schema.json",
        }


def test_a_learning_rate_makes_a_difference(finished):
    assert len({record["metrics"]["test"]["y1"]["rmse"] for record in read(finished["map"]).values()}) == 4


def test_seeds_are_crossed_with_every_axis():
    planned = runs_of(compose(RATES, "++axis.optimizer.clip_norm=[1.0,2.0]", "seeds=[7,3]"))
    assert [
        (one.values["optimizer.learning_rate"], one.values["optimizer.clip_norm"], one.seed) for one in planned
    ] == [(rate, norm, seed) for rate in (0.001, 0.01) for norm in (1.0, 2.0) for seed in (7, 3)]
    for one in planned:
        assert one.config["optimizer"]["learning_rate"] == one.values["optimizer.learning_rate"]
        assert one.config["seed"] == one.seed and "axis" not in one.config
    assert seeds_of(3) == [0, 1, 2] and seeds_of([4, 2]) == [4, 2]
    assert flat_axis({"a": {"b": [1], "c": {"d": [2, 3]}}}) == {"a.b": [1], "a.c.d": [2, 3]}


def test_settings_that_validation_chooses_from_are_counted():
    """Axes of data are comparisons of their own, and no choice."""
    rates, fractions = "++axis.optimizer.learning_rate=[0.01,0.02,0.03]", "++axis.data.valid_fraction=[0.5,1.0]"
    assert settings_tried(compose(rates, fractions)) == 3
    assert settings_tried(compose(fractions)) == settings_tried(compose()) == 0


def test_an_axis_that_an_arm_does_not_have_is_none_of_its_own(shared):
    axis = "++axis.sharing.num_experts=[2,4]"
    bottom = ("bottom", "synthetic", compose(axis))
    members = plan_of([bottom, ("mmoe", "synthetic", compose(axis, sharing=EXPERTS))], shared)
    assert [(member["arm"], member["values"], member["seed"]) for member in members] == [
        *(("bottom", {}, seed) for seed in (0, 1)),
        *(("mmoe", {"sharing.num_experts": number}, seed) for number in (2, 4) for seed in (0, 1)),
    ]
    with pytest.raises(ConfigError, match=r"axis.sharing.num_experts names no key of any arm; expected one that --cfg"):
        plan_of([bottom], shared)
    with pytest.raises(ConfigError, match="axis.vectorize.chunk names no key of any arm"):
        plan_of([("a", "synthetic", compose("++axis.vectorize.chunk=[1,2]"))], shared)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seeds=0"], "seeds is 0; expected a whole number"),
        (["seeds=[1,1]"], r"seeds is \[1, 1\]; expected a number of seeds or a list of different ones"),
        (["seeds=[]"], r"seeds is \[\]; expected a number of seeds"),
        (["seeds=[-1]"], "seeds is -1; expected a whole number"),
        (["vectorize.axis=x"], "vectorize.axis is 'x'; expected one of"),
        (["vectorize.chunk=0"], "vectorize.chunk is 0; expected a whole number >= 1"),
        (["vectorize.axis=vmap", "parallel=pmap"], "vectorize.axis is 'vmap' with parallel=pmap"),
        (["folds=3"], "folds is 3 in an ablation; expected null"),
        (["optimizer.learning_rate=-1"], r"optimizer.learning_rate is -1.*\(arm 'bottom'\)"),
        (["++axis.optimizer.learning_rate=[0.1,-1]"], r"optimizer.learning_rate is -1.*\(arm 'bottom'\)"),
        (["++axis.optimizer.learning_rate=0.1"], "axis.optimizer.learning_rate is 0.1; expected a list of values"),
        (["++axis.optimizer.learning_rate=[]"], r"axis.optimizer.learning_rate is \[\]; expected a list of values"),
        (["axis=3"], "axis is 3; expected lists of values by key"),
        (["++axis.trainer.epochs=[x]"], "trainer.epochs is 'x'"),
        (["balancing=fixed", "balancing.weights=x"], "balancing.weights"),
    ],
)
def test_a_mistake_shows_before_any_data_are_read(overrides, message, monkeypatch):
    monkeypatch.setattr(mtl_jax.job, "build_data", lambda config: pytest.fail("data were read"))
    with pytest.raises(ConfigError, match=message):
        plan_of([("bottom", "synthetic", compose(*overrides))], Shared())


def test_the_same_run_twice_is_refused(shared):
    arm = ("bottom", "synthetic", compose())
    with pytest.raises(ConfigError, match="arm 'bottom' and arm 'again' are the same runs; expected runs that differ"):
        plan_of([arm, ("again", *arm[1:])], shared)
    for axis in ("++axis.optimizer.learning_rate=[0.1,0.1]", "++axis.seed=[1,2]"):
        with pytest.raises(ConfigError, match="are the same runs"):
            plan_of([("bottom", "synthetic", compose(axis))], shared)


def test_data_are_loaded_once_a_process(tmp_path, monkeypatch):
    loads, build = [], mtl_jax.job.build_data
    monkeypatch.setattr(mtl_jax.job, "build_data", lambda config: loads.append(1) or build(config))
    shared, arm = Shared(), compose("seeds=2", "trainer.epochs=1")
    plan_of([("one", "synthetic", arm), ("other", "synthetic", compose("balancing=pcgrad"))], shared)
    run_arm(arm, tmp_path, shared=shared)
    assert len(loads) == 1 and states(tmp_path) == 2 * ["completed"]


def test_data_and_discrete_keys_make_programs_of_their_own(shared, tmp_path):
    """Each equals its run alone, which the run id says; what is trained together are the seeds of one program."""
    arm = compose("++axis.sharing.units=[[4],[5]]", "vectorize.axis=vmap", "trainer.epochs=1")
    records = run_arm(arm, tmp_path / "units", shared=shared)
    assert sorted(record["params"]["total"] for record in records.values()) == [58, 58, 69, 69]
    logs = [path.read_text() for path in (tmp_path / "units").glob("runs/*/run.log")]
    assert len(logs) == 4 and all("run axis Plan(axis='vmap', chunk=2," in log for log in logs)
    records = run_arm(
        compose("++axis.data.num_rows=[300,240]", "seeds=1", "trainer.epochs=1"), tmp_path / "rows", shared=shared
    )
    assert [record["data"]["rows"]["train"] for record in records.values()] == [250, 200]


def test_what_is_finished_stays_as_it_is(finished, shared):
    for axis, folder in finished.items():
        before = contents(folder)
        assert run_arm(compose(RATES, f"vectorize.axis={axis}"), folder, shared=shared) == {}
        assert contents(folder) == before
        assert not list(folder.glob("runs/*/checkpoints")) and not (folder / "stacks").exists()


def test_more_seeds_are_run_and_only_they(shared, tmp_path):
    arm = compose("trainer.epochs=1")
    first = run_arm(arm, tmp_path, shared=shared)
    before = {name: contents(tmp_path / "runs" / name) for name in first}
    more = run_arm(arm | {"seeds": 3, "keep_checkpoints": True}, tmp_path, shared=shared)
    assert [record["seed"] for record in more.values()] == [2]
    assert {name: contents(tmp_path / "runs" / name) for name in first} == before
    assert [path.parent.name for path in tmp_path.glob("runs/*/checkpoints")] == list(more)


@pytest.mark.parametrize("axis", ["map", "vmap"])
def test_a_run_that_fails_ends_alone_and_runs_again_on_demand(shared, tmp_path, axis):
    arm = compose(BAD_RATE, "seeds=1", f"vectorize.axis={axis}", "optimizer=sgd")
    told = []
    records = run_arm(arm, tmp_path, shared=shared, told=told.append)
    assert told == list(records.values()) and read(tmp_path) == records
    good, bad = records.values()
    assert (good["status"], bad["status"]) == ("completed", "failed")
    assert bad["error"]["class"] == "TrainingError" and "is not finite in step" in bad["error"]["message"]
    assert not (tmp_path / "runs" / good["run_id"] / "checkpoints").exists()
    assert run_arm(arm, tmp_path, shared=shared) == {}
    before = contents(tmp_path / "runs" / good["run_id"])
    assert list(run_arm(arm | {"retry": True}, tmp_path, shared=shared)) == [bad["run_id"]]
    assert contents(tmp_path / "runs" / good["run_id"]) == before


def test_runs_that_cannot_begin_are_recorded_and_told(shared, tmp_path):
    """What only the data's tasks tell: three weights for two tasks."""
    told = []
    records = run_arm(
        compose("balancing=fixed", "balancing.weights=[1,2,3]"), tmp_path, shared=shared, told=told.append
    )
    assert [record["error"]["class"] for record in records.values()] == 2 * ["ConfigError"]
    assert told == list(records.values()) and "3 values" in told[0]["error"]["message"]
    assert states(tmp_path) == 2 * ["failed"] and len(list(tmp_path.glob("runs/*/config.yaml"))) == 2


@pytest.mark.parametrize(("axis", "calls", "left"), [("map", (18, 25), 2), ("vmap", (3, 9), 4)])
def test_an_interrupted_arm_goes_on_to_the_same_results(finished, shared, tmp_path, axis, calls, left):
    """Twice, in the middle of an epoch each time. What has not begun leaves no record."""
    arm = compose(RATES, f"vectorize.axis={axis}")
    for call in (calls[0], calls[1] - calls[0]):
        with pytest.raises(Interrupted):
            run_arm(arm, tmp_path, shared=shared, should_stop=stops_at(call))
        assert "interrupted" in states(tmp_path)
        assert len([state for state in states(tmp_path) if state != "completed"]) == (4 if axis == "vmap" else 1)
    assert len(run_arm(arm, tmp_path, shared=shared)) == left
    assert_same_results(tmp_path, finished[axis])
    assert not list(tmp_path.glob("runs/*/checkpoints")) and not (tmp_path / "stacks").exists()


def started(folder):
    """Steps that were done when training was taken up, of each run in turn."""
    logs = [path.read_text().splitlines() for path in sorted(folder.glob("runs/*/log.jsonl"))]
    events = [[json.loads(line) for line in log] for log in logs]
    return [[event["step"] for event in log if event["event"] == "started"] for log in events]


def test_runs_that_began_together_go_on_together(finished, shared, tmp_path):
    """Though now only two would be trained at a time: apart, they would begin anew."""
    arm = compose(RATES, "vectorize.axis=vmap")
    with pytest.raises(Interrupted):
        run_arm(arm, tmp_path, shared=shared, should_stop=stops_at(7))
    run_arm(arm | {"vectorize": {"axis": "auto", "chunk": 2}}, tmp_path, shared=shared)
    assert started(tmp_path) == 4 * [[0, 7]]
    assert_same_results(tmp_path, finished["vmap"])
    assert not (tmp_path / "stacks").exists()


def test_an_end_between_the_records_of_a_stack_loses_nothing(finished, shared, tmp_path):
    def fall(record):
        raise RuntimeError("the process ends here")

    arm = compose(RATES, "vectorize.axis=vmap")
    with pytest.raises(RuntimeError):
        run_arm(arm, tmp_path, shared=shared, told=fall)
    (first,) = read(tmp_path)
    before = contents(tmp_path / "runs" / first)
    assert len(run_arm(arm, tmp_path, shared=shared)) == 3
    assert contents(tmp_path / "runs" / first) == before
    assert sorted(map(len, started(tmp_path))) == [1, 2, 2, 2] and [0, STEPS] in started(tmp_path)
    assert_same_results(tmp_path, finished["vmap"])
    assert not (tmp_path / "stacks").exists()


PROGRAM = """
import json, os, signal, sys
from mtl_jax.ablate import run_arm

arm, folder, last = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
asked = 0
def should_stop():
    global asked
    asked += 1
    if asked == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return False
run_arm(arm, folder, should_stop=should_stop)
"""


def test_a_killed_arm_goes_on_to_the_same_results(finished, shared, tmp_path):
    """SIGKILL in the second epoch: of the second run, or of all four. At most the epoch under way is lost."""
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    processes = []
    for axis, last in (("map", 19), ("vmap", 8)):
        arguments = [json.dumps(compose(RATES, f"vectorize.axis={axis}")), str(tmp_path / axis), str(last)]
        processes.append(subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], env=environment))
    assert [process.wait(timeout=300) for process in processes] == 2 * [-signal.SIGKILL]
    assert states(tmp_path / "map") == ["completed"] and states(tmp_path / "vmap") == []
    for axis in ("map", "vmap"):
        run_arm(compose(RATES, f"vectorize.axis={axis}"), tmp_path / axis, shared=shared)
        assert_same_results(tmp_path / axis, finished[axis])
    assert sorted(started(tmp_path / "map")) == [[0], [0], [0], [0, 5]]
    assert started(tmp_path / "vmap") == 4 * [[0, 5]]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files on this system")
def test_runs_that_wait_hold_no_lock_and_no_model(shared, tmp_path, monkeypatch):
    """Hundreds of runs an arm are neither hundreds of open files nor hundreds of models."""
    models, build = weakref.WeakSet(), mtl_jax.ablate.build_model
    locks, alive = [], []

    def built(*arguments):
        model = build(*arguments)
        models.add(model)
        return model

    def look():
        opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        locks.append(len([path for path in opened if path.startswith(str(tmp_path)) and path.endswith(".lock")]))
        gc.collect()
        alive.append(len(models))
        return False

    monkeypatch.setattr(mtl_jax.ablate, "build_model", built)
    arm = compose("seeds=4", "trainer.epochs=1", "trainer.steps_per_call=3")
    gc.freeze()  # what other tests left is a lot to go through at every look
    try:
        run_arm(arm, tmp_path, shared=shared, should_stop=look)
    finally:
        gc.unfreeze()
    assert set(locks) == {1} and max(alive) <= 2 and states(tmp_path) == 4 * ["completed"]


def test_a_run_that_another_process_holds_ends_the_arm(shared, tmp_path):
    arm = compose("seeds=1")
    (member,) = plan_of([("bottom", "synthetic", arm)], shared)
    home = tmp_path / "runs" / member["run_id"]
    with (
        RunFolder.open(home),
        pytest.raises(RunFolderError, match="is in use by another process; expected one process"),
    ):
        run_arm(arm, tmp_path, shared=shared)
    assert not (home / "result.json").exists()


def test_a_place_that_takes_no_folder_is_one_message(shared, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(
        RunFolderError, match="cannot write '.*/runs/.*' .*; expected a writable folder. Choose another one"
    ):
        run_arm(compose(), tmp_path, shared=shared)


def test_the_best_so_far_outlives_an_interruption(tmp_path):
    with RunFolder.open(tmp_path) as home:
        for done in (0, 6):
            progress = ProgressFile(home, monitor="y1/rmse", seconds=0.0)
            progress.started(total_steps=10, done_steps=done)
            assert home.read_json("progress.json")["monitor"] == (0.5 if done else None)
            progress.advanced(steps=5, epoch=2, examples_per_second=1.0)
            progress.evaluated(epoch=2, monitor=0.5, best=True)
            progress.evaluated(epoch=2, monitor=0.9, best=False)
        facts = home.read_json("progress.json")
    assert facts == {
        "steps": 11, "total": 10, "name": "y1/rmse", "epoch": 2, "monitor": 0.5, "examples_per_second": 1.0
    }  # fmt: skip
