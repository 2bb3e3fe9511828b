"""Looking up records: what is broken is skipped, and only a run of the same protocol is a reference."""

import copy
import json
import logging
import shlex

import pytest

from mtl_jax.report import find


def store(root, name, record):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(record))
    return folder


def changed_copy(record, **changes):
    copied = copy.deepcopy(record)
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = copied
        for key in parents:
            place = place[key]
        place[last] = value
    return copied


def test_broken_files_are_skipped_with_a_note(tmp_path, record, reference, caplog):
    store(tmp_path, "train/b", record)
    store(tmp_path, "ablate/x/a", reference)
    store(tmp_path, "train/c", record | {"surprise": 1})
    store(tmp_path, "train/d", [])
    (tmp_path / "train" / "e").mkdir()
    (tmp_path / "train" / "e" / "result.json").write_text('{"status": ')
    (tmp_path / "train" / "f").mkdir()
    with caplog.at_level(logging.WARNING):
        found = find.records(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path, _ in found] == ["ablate/x/a", "train/b"]
    assert found[1][1] == record
    assert [any(f"train/{name}/" in message for message in caplog.messages) for name in "cde"] == [True] * 3


def test_no_folder_has_no_records(tmp_path):
    assert find.records(tmp_path / "absent") == []


def test_latest_single_task_run_is_the_reference(tmp_path, record, reference):
    assert find.single_task_reference(tmp_path, record) is None
    store(tmp_path, "mmoe", record)
    assert find.single_task_reference(tmp_path, record) is None
    late = changed_copy(reference, run_id="late-s0", timing__started="2026-03-03T09:00:00+00:00")
    store(tmp_path, "a", changed_copy(reference, run_id="early-s0", timing__started="2026-02-03T09:00:00+00:00"))
    store(tmp_path, "b", late)
    store(tmp_path, "c", reference)
    assert find.single_task_reference(tmp_path, record) == late
    assert find.single_task_reference(tmp_path, late) == reference


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "interrupted"},
        {"seed": 1},
        {"data__sha256": "0" * 64},
        {"data__split": "cold_user"},
        {"data__target_fraction": 0.05},
        {"selector": "test_legacy"},
        {"method__sharing": "shared_bottom"},
        {"tasks__buy__metric": "logloss", "metrics__valid__buy": {"logloss": 0.4}},
        {"metrics__test": {}, "test_openings": 0},
    ],
)
def test_another_protocol_is_no_reference(tmp_path, record, reference, changes):
    store(tmp_path, "run", changed_copy(reference, **changes))
    assert len(find.records(tmp_path)) == 1
    assert find.single_task_reference(tmp_path, record) is None


def test_a_run_is_not_its_own_reference(tmp_path, reference):
    store(tmp_path, "run", reference)
    assert find.single_task_reference(tmp_path, reference) is None


def test_command_keeps_what_the_user_chose(record):
    overrides = [
        "data=movielens_1m",
        "sharing=ple",
        "sharing.num_experts=4",
        "+sharing.deep=true",
        "balancing=nash_mtl",
        "++balancing.max_steps=3",
        "hydra.run.dir=outputs/mine",
        "data.tasks={buy: binary, spend: regression}",
        "trainer.sharing_note=1",
        "seed=3",
    ]
    assert shlex.split(find.single_task_command(record, overrides)) == [
        "python",
        "-m",
        "experiments.train",
        "data=movielens_1m",
        "data.tasks={buy: binary, spend: regression}",
        "trainer.sharing_note=1",
        "seed=3",
        "sharing=single_task",
        "balancing=equal",
    ]


def test_command_names_the_seed_of_the_run(record):
    record["seed"] = 7
    command = find.single_task_command(record, [])
    assert command == "python -m experiments.train seed=7 sharing=single_task balancing=equal"
