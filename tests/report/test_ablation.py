"""The folder of an ablation: what is read, what is refused, and what is left out with its reason."""

import json

import polars as pl
import pytest

from mtl_jax.errors import MissingFile, RunFolderError
from mtl_jax.report.ablation import FRAME_SCHEMA, members_frame, read_ablation

GOOD = {"click": 0.8, "rating": 0.9}
ARMS = {"single_task": [GOOD, GOOD], "mmoe+equal": [GOOD, ValueError("loss is nan")], "ple+equal": [None, GOOD]}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_records_of_the_plan(write_ablation):
    ablation = read_ablation(write_ablation(ARMS))
    assert [member["arm"] for member in ablation.facts["members"]] == [arm for arm in ARMS for _ in range(2)]
    statuses = [record["status"] for record in ablation.records.values()]
    assert statuses == ["completed", "completed", "completed", "failed", "completed"]
    assert ablation.problems == {}


def test_broken_and_foreign_records_are_named(write_ablation):
    folder = write_ablation(ARMS)
    first, second, third, *_ = (folder / "runs").iterdir()
    (first / "result.json").write_text("{")
    edit(second / "result.json", strange=1)
    edit(third / "result.json", run_id="another")
    ablation = read_ablation(folder)
    assert ablation.problems.keys() == {first.name, second.name, third.name}
    assert "JSONDecodeError" in ablation.problems[first.name]
    assert "unknown key 'strange'" in ablation.problems[second.name]
    assert "'another'" in ablation.problems[third.name]
    assert not ablation.records.keys() & ablation.problems.keys()


def test_frame_has_every_metric_and_every_member(write_ablation):
    ablation = read_ablation(write_ablation(ARMS))
    frame = members_frame(ablation)
    assert dict(frame.schema) == FRAME_SCHEMA
    assert frame["run_id"].n_unique() == 6
    done = frame.filter(pl.col("status") == "completed")
    assert len(done) == 4 * 2 * 2  # runs, parts, tasks
    assert done.filter(part="test", task="rating", metric="rmse")["value"].to_list() == [0.9] * 4
    lost = frame.filter(pl.col("status") != "completed").select("arm", "seed", "status", "value").rows()
    assert lost == [("mmoe+equal", 1, "failed", None), ("ple+equal", 0, "missing", None)]


def test_axis_values_survive_as_json(write_ablation):
    points = {"mmoe+equal": [{"optimizer.learning_rate": 0.001}, {"optimizer.learning_rate": 0.01}]}
    folder = write_ablation({"mmoe+equal": [[GOOD], [GOOD]]}, points=points)
    values = members_frame(read_ablation(folder))["values"].unique(maintain_order=True)
    assert [json.loads(text) for text in values] == points["mmoe+equal"]


def test_no_folder(tmp_path):
    with pytest.raises(MissingFile, match="nowhere"):
        read_ablation(tmp_path / "nowhere")


def test_other_folders_are_refused_with_a_hint(write_ablation, tmp_path):
    folder = write_ablation(ARMS)
    with pytest.raises(RunFolderError, match="one of its subfolders: ablation"):
        read_ablation(tmp_path)
    with pytest.raises(RunFolderError, match="ordinary runs.*experiments.ablate"):
        read_ablation(folder / "runs")


@pytest.mark.parametrize(
    "plan",
    [
        "{",
        "[]",
        json.dumps({"baseline": None}),
        json.dumps({"baseline": None, "members": []}),
        json.dumps(
            {"baseline": None, "members": [{"run_id": "a", "arm": "b", "values": {}, "seed": "0", "data": "c"}]}
        ),
        json.dumps(
            {"baseline": None, "members": [{"run_id": "../a", "arm": "b", "values": {}, "seed": 0, "data": "c"}]}
        ),
        json.dumps(
            {
                "baseline": None,
                "members": [{"run_id": r, "arm": "b", "values": {}, "seed": 0, "data": "c"} for r in "ab"],
            }
        ),
        json.dumps({"baseline": 1, "members": [{"run_id": "a", "arm": "b", "values": {}, "seed": 0, "data": "c"}]}),
        json.dumps(
            {"baseline": None, "members": [{"run_id": "a", "arm": "b", "values": {}, "seed": 0, "data": "c"}] * 2}
        ),
    ],
)
def test_broken_plans_are_refused(tmp_path, plan):
    (tmp_path / "ablation.json").write_text(plan)
    with pytest.raises(RunFolderError, match="is not the plan of an ablation"):
        read_ablation(tmp_path)
