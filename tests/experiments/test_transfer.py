"""The command line of transfer: from domains of a table to records and reports, and mistakes in one message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import ablate, transfer
from experiments.cli import command_line
from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.comparison import changes_data, compare
from mtl_jax.report.record import validate

ROOT = Path(__file__).parents[2]
TABLE = "visits.csv"
SMALL = [
    "data=table", f"data.path={TABLE}", "data.tasks={buy: binary, spend: regression}", "data.domain=area",
    "data.categorical=[item]", "data.numeric=[price]", "data.split=rows", "source=north", "target=west",
    "sharing=shared_bottom", "sharing.units=[6]", "encoder.embedding_dim=4", "towers.units=[]",
    "optimizer.learning_rate=0.03", "trainer.batch_size=64", "trainer.epochs=3", "trainer.epoch_steps=5",
]  # fmt: skip
SCARCE = "data.target_fraction=0.25"


def write_table(folder):
    """Tastes are those of the north in the west, where there are few rows."""
    rng = np.random.default_rng(0)
    area = np.repeat(["north", "south", "west"], [900, 300, 300])
    item, price = rng.integers(0, 12, len(area)), rng.normal(size=len(area))
    value = 2.0 * np.sin(2.4 * item) + price + 0.3 * rng.normal(size=len(area))
    columns = {"area": area, "item": [f"i{number}" for number in item], "price": price}
    pl.DataFrame(columns | {"buy": (value > 0).astype(int), "spend": value - 2 * price}).write_csv(folder / TABLE)


def start(*overrides, cwd, module="experiments.transfer"):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", module, *overrides]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def call(monkeypatch, capsys):
    """(*overrides, cwd, main) -> exit status, standard output, standard error; in this process."""

    def run(*overrides, cwd, main=transfer):
        name = main.__name__.rsplit(".", 1)[-1]
        monkeypatch.chdir(cwd)
        overrides = [f"++{override}" if override.startswith("axis.") else override for override in overrides]
        monkeypatch.setattr(sys, "argv", [name, *overrides])
        status = 0
        try:
            command_line(main.main, name)
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and output of a command that has ended."""
    cwd = tmp_path_factory.mktemp("finished")
    write_table(cwd)
    return cwd, start(*SMALL, SCARCE, cwd=cwd)


def read(path):
    record = json.loads(path.read_text())
    validate(record)
    return record


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def times(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_trains_the_source_hands_it_over_and_reports_both(finished):
    cwd, out = finished
    record, source = (read(only(cwd, f"outputs/{kind}/*/result.json")) for kind in ("train", "source"))
    assert record["status"] == source["status"] == "completed"
    assert record["method"]["transfer"] == "fine_tune" and source["method"]["transfer"] is None
    assert (record["test_openings"], source["test_openings"]) == (1, 0)
    assert "sealed" in source and "sealed" not in record
    assert [one["name"] for one in record["stages"]] == ["source_train", "select", "transfer", "FineTune"]
    assert record["config"]["source"] == "north" and record["config"]["target"] == "west"
    assert record["timing"]["steps"] == 3 * 5, "epoch_steps counts for the target"
    assert record["data"]["rows"]["train"] < 64
    home = only(cwd, "outputs/train/*")
    assert {"config.yaml", "schema.json", "run.log", "result.png", "history.parquet"} <= {
        p.name for p in home.iterdir()
    }
    assert {path.name for path in cwd.glob("outputs/source/*/artefact/*")} == {"arrays.npz", "manifest.json"}
    history = pl.read_parquet(home / "history.parquet").filter(name="mean_gain")
    assert history["step"].to_list() == [0, 5, 10, 15]
    assert str(home.relative_to(cwd)) in out
    assert "fine_tune" in out or "FineTune" in out


def test_the_schema_of_the_run_is_the_one_that_its_model_reads(finished):
    """Rows of tables are those of the joined vocabularies."""
    cwd, _ = finished
    schema = json.loads(only(cwd, "outputs/train/*/schema.json").read_text())
    vocabularies = {one["name"]: one["values"] for one in schema["vocabularies"]}
    manifest = json.loads(only(cwd, "outputs/source/*/artefact/manifest.json").read_text())
    of_source = {one["name"]: one["values"] for one in manifest["schema"]["vocabularies"]}
    assert vocabularies["item"][: len(of_source["item"])] == of_source["item"]


def test_the_same_command_prints_a_finished_run_and_trains_nothing(finished, call):
    cwd, _ = finished
    before = times(cwd / "outputs")
    status, out, err = call(*SMALL, SCARCE, cwd=cwd)
    assert (status, err) == (0, "")
    assert "finished on" in out and "nothing to train" in out
    after = times(cwd / "outputs")
    assert {path for path in after if after[path] != before.get(path)} <= {p for p in after if p.endswith(".png")}


def test_scratch_is_the_reference_of_the_gain(finished, call):
    """Of the same rows; the command for it is printed before, and the gain after it."""
    cwd, first = finished
    assert "transfer=scratch" in first
    status, _, _ = call(*SMALL, SCARCE, "transfer=scratch", cwd=cwd)
    assert status == 0
    records = {record["method"]["transfer"]: record for record in map(read, cwd.glob("outputs/train/*/result.json"))}
    tuned, alone = records["fine_tune"], records[None]
    assert tuned["data"] == alone["data"] and tuned["baselines"] == alone["baselines"]
    assert tuned["metrics"]["test"]["buy"]["auc"] > alone["metrics"]["test"]["buy"]["auc"] + 0.1
    assert len(list(cwd.glob("outputs/source/*"))) == 1
    _, out, _ = call(*SMALL, SCARCE, cwd=cwd)
    assert "over scratch" in out and alone["run_id"] in out


def test_a_strategy_with_towers_of_its_own_has_the_same_reference(finished, call):
    cwd, _ = finished
    call(*SMALL, SCARCE, "transfer=scratch", cwd=cwd)
    status, out, _ = call(*SMALL, SCARCE, "transfer=feature_augmentation", cwd=cwd)
    assert status == 0 and "over scratch" in out
    records = [read(path) for path in cwd.glob("outputs/train/*/result.json")]
    (found,) = (record for record in records if record["method"]["transfer"] == "feature_augmentation")
    assert found["config"]["towers"]["_target_"] == "mtl_jax.nn.AugmentedTower"
    assert found["config"]["transfer"] == {"_target_": "mtl_jax.transfer.Pooled", "weight": 1.0}


def test_help_is_for_newcomers(tmp_path, call):
    status, shown, _ = call("--help", cwd=tmp_path)
    assert not status
    for words in ("experiments.transfer", "transfer=scratch", "fine_tune", "lp_ft", "source: grocery", "target: drug_gm",
                  "epoch_steps: 20", "python -m mtl_jax.data"):  # fmt: skip
        assert words in shown, words


def test_summary_prints_the_model_and_trains_nothing(finished, call):
    cwd, _ = finished
    before = times(cwd)
    status, out, _ = call(*SMALL, SCARCE, "summary=true", cwd=cwd)
    assert status == 0 and "sharing" in out
    assert times(cwd) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["target=moon"], ["'visits' has no domains ['moon']", "'north', 'south', 'west'"]),
        (["source=moon"], ["'visits' has no domains ['moon']", "'north', 'south', 'west'"]),
        (["target=north"], ["['north'] are source and target; expected different domains"]),
        (["select=nonsense"], ["select is 'nonsense'", "'given'", "'gradient_cosine'"]),
        (["transfer=fine_tune", "source=null"], ["'FineTune' takes over from a source, and source is null", "scratch"]),
        (["target=null"], ["target is null", "Set target=..."]),
        (["data.domain=null"], ["has no domains to be source or target", "data.domain"]),
        (["transfer=finetune"], ["transfer/finetune", "fine_tune", "lora"]),
        (["transfer.alpha=1"], ["transfer.alpha"]),
        (["transfer=l2_sp", "transfer.alpha=-1"], ["transfer.alpha is -1"]),
        (["training=staged"], ["training=staged", "joint"]),
        (["folds=3"], ["target with folds"]),
        (["sharing.unit=[3]"], ["unknown option 'sharing.unit'"]),
        (["loading.reinit=[nothing]"], ["reinit has 'nothing', which fits no array"]),
    ],
)
def test_a_mistake_is_one_clear_message(finished, call, overrides, words):
    cwd, _ = finished
    status, _, message = call(*SMALL, SCARCE, *overrides, cwd=cwd)
    assert status in (1, 2)
    found, _, said = message.rpartition("ConfigError: ")
    assert "Traceback" not in message and all(line.startswith("source ") for line in found.splitlines())
    for word in words:
        assert word in said, word
    if not found:  # nothing was begun, so nothing says that it failed
        for path in cwd.glob("outputs/*/*/result.json"):
            assert read(path)["status"] == "completed"


# --- ablations --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ablated(finished):
    """Folder of an ablation: two strategies and scratch, at two shares of the target's rows and two seeds."""
    cwd, _ = finished
    small = [override for override in SMALL if not override.startswith("data.path")]
    chosen = ["transfer=zero_shot,fine_tune", "baseline=scratch", "axis.data.target_fraction=[0.25,1.0]", "seeds=2"]
    out = start(
        *small,
        f"data.path={cwd / TABLE}",
        *chosen,
        "vectorize.axis=map",
        "name=curve",
        cwd=cwd,
        module="experiments.ablate",
    )
    return cwd / "outputs" / "ablate" / "curve", out


def test_strategies_stand_beside_scratch_for_every_share_of_rows(ablated):
    folder, out = ablated
    ablation = read_ablation(folder)
    assert ablation.facts["baseline"] == "scratch"
    found = compare(ablation)
    assert [one.data.split(", ")[-1] for one in found] == ["data.target_fraction=0.25", "data.target_fraction=1.0"]
    for one in found:
        assert one.baseline == one.single_task == "scratch"
        assert [row.arm for row in one.rows] == ["scratch", "zero_shot", "fine_tune"]
        assert all(len(row.run_ids) == row.planned == 2 and not row.failed for row in one.rows)
        assert one.row("fine_tune").differences.keys() == {"buy", "spend"}
        assert one.row("scratch").differences == {}
    few = found[0].row("fine_tune")
    assert few.differences["buy"].mean > 0.05 and few.differences["spend"].mean > 0, "positive is better"
    assert few.delta_m.mean > 5
    assert "scratch" in out


def test_each_seed_has_one_source_for_all_strategies_and_shares(ablated):
    folder, _ = ablated
    sources = [read(path) for path in folder.parents[1].glob("source/*/result.json")]
    assert sorted(record["seed"] for record in sources) == [0, 1]
    used = {record["stages"][2]["loading_report"]["source_run"] for record in read_ablation(folder).records.values()
            if record["method"]["transfer"]}  # fmt: skip
    assert used == {record["run_id"] for record in sources}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("data.target_fraction", True),
        ("target", True),
        ("source", False),
        ("transfer.alpha", False),
        ("target_x", False),
    ],
)
def test_what_changes_the_rows_is_no_tuning(key, changes):
    assert changes_data(key) is changes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["transfer=fine_tune,l2_sp", "source=null"], ["source is null", "expected domains"]),
        (["transfer=fine_tune", "select=random,largest"], ["select"]),
        (["transfer=fine_tune", "baseline=fine_tune"], ["baseline is 'fine_tune'", "'scratch'"]),
    ],
)
def test_a_mistake_of_an_ablation_is_one_clear_message(finished, call, overrides, words):
    cwd, _ = finished
    status, _, message = call(*SMALL, *overrides, "name=wrong", "seeds=1", cwd=cwd, main=ablate)
    assert status in (1, 2)
    assert "ConfigError: " in message and "Traceback" not in message
    for word in words:
        assert word in message, word
    assert not (cwd / "outputs" / "ablate" / "wrong").exists()
