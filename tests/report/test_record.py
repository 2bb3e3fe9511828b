"""The result record: complete, strict at every level, and honest about what is missing."""

import importlib.metadata
import json
import math
import platform
import subprocess

import numpy as np
import pytest

from mtl_jax.errors import MtlJaxError
from mtl_jax.report import record as result
from mtl_jax.report.record import RecordError, new_record, validate

START = {"run_id": "abc-s0", "config": {"seed": 0}, "config_hash": "abc", "seed": 0}


def test_a_finished_run_is_valid_and_is_json(record, reference):
    for one in (record, reference):
        validate(one)
        validate(json.loads(json.dumps(one, allow_nan=False)))


def test_a_run_that_failed_at_once_has_a_valid_record():
    record = new_record(START, status="failed", error=ValueError("no rows"))
    validate(record)
    assert record["error"] == {"class": "ValueError", "message": "no rows"}
    required = {key for key in result.SCHEMA if not key.endswith("?")}
    assert required | {"error"} == record.keys()
    assert record["metrics"] == {"valid": {}, "test": {}}
    assert record["timing"]["examples_per_second"] is None and record["data"]["rows"]["test"] is None
    validate(new_record(START, status="interrupted"))


def test_numpy_values_become_plain():
    known = START | {"monitor": {"name": "buy/auc", "value": np.float32(0.75), "step": np.int64(10)}}
    record = new_record(known, status="interrupted")
    validate(record)
    assert record["monitor"] == {"name": "buy/auc", "value": 0.75, "step": 10}


@pytest.mark.parametrize(
    "place",
    [
        "surprise",
        "metrics/train",
        "support/test/buy/auc/median",
        "slices",
        "method/optimizer",
        "tasks/buy/weight",
        "data/owner",
        "data/rows/all",
        "params/bytes",
        "monitor/epoch",
        "timing/gpu_seconds",
        "versions/torch",
        "device/name",
        "flags/nice",
        "diagnostics",
    ],
)
def test_unknown_keys_fail_at_every_level(changed, place):
    value = {"slices": {"domain=meat": {"train": {}}}, "diagnostics": {"mood": 1}}.get(place, 1)
    with pytest.raises(RecordError, match="unknown key '.*'; expected one of"):
        validate(changed(place, value))


def required_places(schema=result.SCHEMA, path=()):
    """Every required key of the schema that the record of the fixture has."""
    for key, inner in schema.items():
        key = key.removesuffix("|null")
        if key == "*" or key.endswith("?"):
            continue
        yield "/".join((*path, key))
        if isinstance(inner, dict):
            yield from required_places(inner, (*path, key))


@pytest.mark.parametrize("place", list(required_places()))
def test_required_keys_may_not_be_missing(changed, place):
    with pytest.raises(RecordError, match=f"lacks '{place.replace('/', '.')}'"):
        validate(changed(place, ...))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("seed", "0"),
        ("seed", True),
        ("seed", None),
        ("seed", 0.5),
        ("run_id", 7),
        ("run_id", None),
        ("config", []),
        ("metrics/test/buy/auc", "0.8"),
        ("metrics/test/buy/auc", True),
        ("metrics/test/buy", 0.8),
        ("metrics", None),
        ("baselines/logistic/buy/auc", [0.8]),
        ("dirty", "no"),
        ("flags/leak", 0),
        ("timing/wall_seconds", np.float32(3.0)),
        ("parents", "abc"),
        ("parents", [3]),
        ("data/rows/test", 1.5),
        ("error", None),
    ],
)
def test_wrong_types_fail(changed, place, value):
    with pytest.raises(RecordError, match=place.replace("/", ".")):
        validate(changed(place, value))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
@pytest.mark.parametrize("place", ["metrics/test/buy/auc", "timing/wall_seconds", "config", "diagnostics"])
def test_numbers_are_finite(changed, place, value):
    content = {"config": {"a": [1, {"b": value}]}, "diagnostics": {"terms": {"l2": [value]}}}.get(place, value)
    with pytest.raises(RecordError, match="expected a finite number or null"):
        validate(changed(place, content))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("status", "done", "expected one of"),
        ("status", "failed", "error = 'absent'"),
        ("error", {"class": "E", "message": ""}, "error = 'present'"),
        ("schema_version", 99, "schema_version = 99"),
        ("tasks/buy/direction", "up", "direction = 'up'"),
        ("tasks/buy", ..., "expected a task of"),
        ("baselines/logistic/by", {"auc": 0.8}, "baselines.logistic.by"),
        ("metrics/valid/buy/auc", None, "expected a number, or a reason in support.valid"),
        ("test_openings", 0, "expected at least 1 with test metrics"),
        ("test_openings", None, "expected at least 1 with test metrics"),
        ("metrics/valid/buy", {}, "expected the monitored metric of every task"),
        ("data/sha256", None, "expected a value in a completed run"),
        ("selector", None, "expected a value in a completed run"),
        ("method/sharing", None, "expected a value in a completed run"),
    ],
)
def test_values_owe_each_other(changed, place, value, message):
    with pytest.raises(RecordError, match=message):
        validate(changed(place, value))


def test_null_with_a_reason_is_a_result(changed, record):
    record["support"]["test"]["coupon"]["auc"]["reason"] = "one class only"
    validate(changed("metrics/test/coupon/auc", None))


def test_an_unopened_test_part_has_no_metrics(changed, record):
    record["test_openings"] = 0
    validate(changed("metrics/test", {}))


def test_faults_can_be_mended_by_a_user():
    assert issubclass(RecordError, MtlJaxError) and issubclass(RecordError, ValueError)


def test_versions_are_those_of_the_distributions():
    found = result.versions()
    assert found.keys() == result.SCHEMA["versions"].keys()
    assert found["python"] == platform.python_version()
    assert found["numpy"] == np.__version__
    assert found["orbax"] == importlib.metadata.version("orbax-checkpoint")


def git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_source_state_of_a_repository(repository, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD")
    assert result.source_state(repository) == (commit, False)
    (repository / "code.py").write_text("x = 2\n")
    assert result.source_state(repository) == (commit, True)
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a hook of another repository
    assert result.source_state(str(repository)) == (commit, True)


def test_no_commit_to_name(tmp_path, repository, monkeypatch):
    """An installed package inside someone's repository is not that repository's code."""
    installed = repository / "site-packages"
    installed.mkdir()
    (repository / ".gitignore").write_text("site-packages\n")
    (installed / "code.py").write_text("x = 1\n")
    assert result.source_state(installed) == (None, None)
    monkeypatch.setenv("PATH", "")
    assert result.source_state(repository) == (None, None)


def test_outside_of_any_repository(tmp_path):
    assert result.source_state(tmp_path) == (None, None)
