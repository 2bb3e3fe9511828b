"""Run folders: ids that are stable, one process at a time, and files that are whole or absent."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import polars as pl
import pytest

from mtl_jax.errors import NoSpace, RunFolderError
from mtl_jax.report import folder as run_folder
from mtl_jax.report.folder import RunFolder

CONFIG = {
    "sharing": {"_target_": "mtl_jax.sharing.MMoE", "num_experts": 4, "hidden": [64, 32]},
    "data": {
        "name": "complete_journey",
        "split": "time",
        "cache_dir": "/home/a",
        "download": True,
        "path": "a.parquet",
    },
    "trainer": {"epochs": 3, "learning_rate": 1e-3, "progress": True},
    "seed": 0,
    "hydra": {"run": {"dir": "outputs/x"}},
    "output_dir": "outputs",
    "allow": ["mypaper"],
}
SELECTION = {"config_hash": "0a1b2c3d4e5f", "seed": 0, "selector": "valid_best", "checkpoint": "c0ffee", "step": 1200}


def python(code, *arguments, **options):
    """Starts another process that runs ``code``."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(process):
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return output.strip()


def with_value(dotted, value):
    config = json.loads(json.dumps(CONFIG))
    *parents, last = dotted.split(".")
    place = config
    for key in parents:
        place = place[key]
    place[last] = value
    return config


@pytest.mark.parametrize("dotted", ["seed", "hydra", "output_dir", "allow"])
@pytest.mark.parametrize("value", [7, "elsewhere"])
def test_hash_leaves_out_what_does_not_change_a_result(dotted, value):
    assert run_folder.config_hash(with_value(dotted, value)) == run_folder.config_hash(CONFIG)


@pytest.mark.parametrize("dotted", ["data.cache_dir", "data.download", "data.path", "trainer.progress"])
def test_hash_leaves_out_nested_keys(dotted):
    assert run_folder.config_hash(with_value(dotted, "changed")) == run_folder.config_hash(CONFIG)


@pytest.mark.parametrize("dotted", ["data.split", "data.name", "sharing.num_experts", "trainer.epochs", "sharing"])
def test_hash_depends_on_everything_else(dotted):
    assert run_folder.config_hash(with_value(dotted, "changed")) != run_folder.config_hash(CONFIG)


def test_only_the_named_key_is_left_out():
    """A key called ``seed`` or ``path`` elsewhere changes results."""
    assert run_folder.config_hash({"model": {"seed": 1}}) != run_folder.config_hash({"model": {"seed": 2}})
    assert run_folder.config_hash({"path": 1}) != run_folder.config_hash({"path": 2})


def test_hash_does_not_depend_on_order_or_container():
    shuffled = dict(reversed(CONFIG.items())) | {
        "sharing": {"hidden": (64, 32), "num_experts": 4, "_target_": "mtl_jax.sharing.MMoE"}
    }
    assert run_folder.config_hash(shuffled) == run_folder.config_hash(CONFIG)


def test_hash_is_the_sha256_of_sorted_json():
    """Worked out with sha256sum: printf '{"a":[1,2],"b":"x"}' | sha256sum."""
    assert run_folder.config_hash({"b": "x", "seed": 3, "a": (1, 2)}) == "d0f56dda38d3"


def test_infinite_and_absent_values_are_told_apart():
    assert run_folder.config_hash({"clip": float("inf")}) != run_folder.config_hash({"clip": None})


def test_run_id_tells_configuration_data_and_seed_apart():
    first = run_folder.run_id(CONFIG, seed=0, data_identity="ab" * 32)
    assert first == run_folder.run_id(CONFIG, seed=0, data_identity="ab" * 32)
    others = {
        run_folder.run_id(CONFIG, seed=1, data_identity="ab" * 32),
        run_folder.run_id(CONFIG, seed=0, data_identity="cd" * 32),
        run_folder.run_id(with_value("trainer.epochs", 4), seed=0, data_identity="ab" * 32),
    }
    assert len(others | {first}) == 4
    assert first.startswith(run_folder.config_hash(CONFIG)) and first.endswith("-s0")


def test_run_id_is_the_same_in_every_process():
    code = """
        import json, sys
        from mtl_jax.report.folder import run_id
        print(run_id(json.loads(sys.argv[1]), seed=3, data_identity="ab" * 32))
    """
    ids = {
        finished(python(code, json.dumps(CONFIG), env={**os.environ, "PYTHONHASHSEED": seed})) for seed in ("0", "1234")
    }
    assert ids == {run_folder.run_id(CONFIG, seed=3, data_identity="ab" * 32)}


def test_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    path = tmp_path / "run"
    code = """
        import sys, time
        from mtl_jax.report.folder import RunFolder
        with RunFolder.open(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = python(code, path)
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(RunFolderError, match="in use by another process; expected one process a run folder"):
            with RunFolder.open(path):
                pass
    finally:
        holder.kill()
        holder.communicate()
    with RunFolder.open(path) as folder:
        folder.log("resumed")
    assert (path / "run.log").read_text().endswith("resumed\n")


def test_folder_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), RunFolder.open(tmp_path):
        raise ZeroDivisionError
    with RunFolder.open(tmp_path) as folder:
        assert folder.path == tmp_path


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match="expected a writable folder"), RunFolder.open(tmp_path / "taken"):
        pass


def test_a_folder_holds_one_run(tmp_path):
    with RunFolder.open(tmp_path) as folder:
        folder.claim("aaa-s0")
        folder.claim("aaa-s0")
        with pytest.raises(RunFolderError, match="holds run 'aaa-s0'; expected 'bbb-s0' or an empty folder"):
            folder.claim("bbb-s0")


def test_json_round_trip(tmp_path):
    content = {
        "float": np.float32(0.5),
        "int": np.int64(3),
        "bool": np.bool_(True),
        "nan": float("nan"),
        "array": np.array([1.0, np.inf]),
        "tuple": (1, None),
        "path": tmp_path,
    }
    with RunFolder.open(tmp_path) as folder:
        folder.write_json("result.json", content)
        assert folder.read_json("result.json") == {
            "float": 0.5,
            "int": 3,
            "bool": True,
            "nan": None,
            "array": [1.0, None],
            "tuple": [1, None],
            "path": str(tmp_path),
        }
        assert "NaN" not in (tmp_path / "result.json").read_text()
        assert folder.read_json("absent.json") is None
        (tmp_path / "half.json").write_text('{"a": ')
        with pytest.raises(RunFolderError, match="half.json' is not JSON"):
            folder.read_json("half.json")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    with RunFolder.open(tmp_path) as folder:
        folder.write_json("result.json", {"a": 1})
        with pytest.raises(TypeError):
            folder.write_json("result.json", {"a": object()})
        assert folder.read_json("result.json") == {"a": 1}


def test_history_grows_and_keeps_its_types(tmp_path):
    rows = [
        {"step": 1, "part": "train", "task": None, "name": "learning_rate", "value": 0.1},
        {"step": 1, "part": "valid", "task": "buy", "name": "auc", "value": float("nan")},
    ]
    with RunFolder.open(tmp_path) as folder:
        assert folder.read_history() is None
        folder.write_history([])
        assert folder.read_history().schema == run_folder.HISTORY_SCHEMA
        folder.write_history(rows)
        rows.append({"step": 2, "part": "valid", "task": "buy", "name": "auc", "value": np.float64(0.75)})
        folder.write_history(rows)
        frame = folder.read_history()
        with pytest.raises(RunFolderError, match="history row with keys"):
            folder.write_history([{"step": 1, "value": 2.0}])
    assert frame.schema == run_folder.HISTORY_SCHEMA
    assert frame["value"].to_list() == [0.1, None, 0.75]
    assert frame["task"].to_list() == [None, "buy", "buy"]
    assert pl.read_parquet(tmp_path / "history.parquet").equals(frame)


def test_log_appends_with_utc_times(tmp_path):
    with RunFolder.open(tmp_path) as folder:
        folder.log("first")
    with RunFolder.open(tmp_path) as folder:
        folder.log("second")
    lines = [line.split(" ", 1) for line in (tmp_path / "run.log").read_text().splitlines()]
    assert [text for _, text in lines] == ["first", "second"]
    assert all(stamp.endswith("+00:00") for stamp, _ in lines)


def test_kill_during_writing_leaves_one_whole_version(tmp_path):
    """A process that overwrites a file of 3 MB without pause is killed at several moments."""
    code = """
        import sys
        from mtl_jax.report.folder import RunFolder
        with RunFolder.open(sys.argv[1]) as folder:
            version = 0
            while True:
                version += 1
                folder.write_json("result.json", {"version": version, "body": [version] * 300_000})
                print(version, flush=True)
    """
    for wait in (0.0, 0.03, 0.11):
        writer = python(code, tmp_path)
        try:
            writer.stdout.readline()
            time.sleep(wait)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        content = json.loads((tmp_path / "result.json").read_text())
        assert content["body"] == [content["version"]] * 300_000
    (tmp_path / ".result.json.1.partial").write_text("what a kill before the renaming leaves")
    with RunFolder.open(tmp_path):
        assert {file.name for file in tmp_path.iterdir()} == {".lock", "result.json"}


def test_no_room_left_keeps_the_old_files(tmp_path):
    """The system refuses files above 4 kB, as it would on a full disk."""
    pytest.importorskip("resource")
    code = """
        import resource, sys
        from mtl_jax.errors import NoSpace
        from mtl_jax.report.folder import RunFolder
        with RunFolder.open(sys.argv[1]) as folder:
            folder.write_json("result.json", {"version": 1})
            folder.log("x" * 3000)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            for write in (
                lambda: folder.write_json("result.json", list(range(5000))),
                lambda: folder.log("y" * 3000),
            ):
                try:
                    write()
                except NoSpace as error:
                    print(error)
    """
    messages = finished(python(code, tmp_path)).splitlines()
    assert [name in message for name, message in zip(("result.json", "run.log"), messages, strict=True)] == [True, True]
    assert all("free space or choose another output folder" in message for message in messages)
    assert json.loads((tmp_path / "result.json").read_text()) == {"version": 1}
    assert (tmp_path / "run.log").read_text().endswith("x\n")
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "result.json", "run.log"}


def test_other_write_errors_name_the_folder(tmp_path):
    with RunFolder.open(tmp_path) as folder:
        (tmp_path / "result.json").mkdir()
        with pytest.raises(RunFolderError, match="result.json") as caught:
            folder.write_json("result.json", {})
    assert not isinstance(caught.value, NoSpace)


def test_ledger_counts_openings_and_keeps_them(tmp_path):
    with RunFolder.open(tmp_path) as folder:
        assert not folder.reopened
        assert folder.record_opening(SELECTION) == 1
        assert not folder.reopened
    with RunFolder.open(tmp_path) as folder:
        assert folder.record_opening(dict(reversed(SELECTION.items()))) == 2
        assert not folder.reopened  # the same selection after a kill
        assert folder.record_opening(SELECTION | {"checkpoint": "decaf", "step": 1500}) == 3
        assert folder.reopened
        assert folder.record_opening(SELECTION) == 4
        assert folder.reopened  # going back does not undo it
    entries = [json.loads(line) for line in (tmp_path / "test_ledger.jsonl").read_text().splitlines()]
    assert [entry["checkpoint"] for entry in entries] == ["c0ffee", "c0ffee", "decaf", "c0ffee"]
    assert all(entry["time"].endswith("+00:00") for entry in entries)


@pytest.mark.parametrize("change", [{"selector": "test_legacy"}, {"step": 1300}, {"checkpoint": "decaf"}])
def test_any_other_selection_reopens(tmp_path, change):
    with RunFolder.open(tmp_path) as folder:
        folder.record_opening(SELECTION)
        folder.record_opening(SELECTION | change)
        assert folder.reopened


def test_another_seed_is_another_count(tmp_path):
    with RunFolder.open(tmp_path) as folder:
        folder.record_opening(SELECTION)
        assert folder.record_opening(SELECTION | {"seed": 1, "checkpoint": "decaf"}) == 1
        assert not folder.reopened


@pytest.mark.parametrize("missing", [{"selector"}, {"seed"}, {"config_hash"}, {"checkpoint", "step"}])
def test_test_part_needs_a_frozen_selection(tmp_path, missing):
    with RunFolder.open(tmp_path) as folder:
        with pytest.raises(RunFolderError, match="Fix the choice before opening"):
            folder.record_opening({key: value for key, value in SELECTION.items() if key not in missing})
        assert folder.openings() == []


def test_edited_ledger_is_noticed(tmp_path):
    with RunFolder.open(tmp_path) as folder:
        folder.record_opening(SELECTION)
        (tmp_path / "test_ledger.jsonl").write_text("{half")
        with pytest.raises(RunFolderError, match="test ledger"):
            folder.record_opening(SELECTION)
