"""From a source to a target: the source's run is found, trained or waited for, and its values reach the target's run."""

import io
import json
import shutil
from pathlib import Path

import filelock
import hydra
import numpy as np
import polars as pl
import pytest
from rich.console import Console

import mtl_jax.handover
from mtl_jax import metrics
from mtl_jax.ablate import _of_setup, run_arm
from mtl_jax.config import plain
from mtl_jax.data.batching import as_batch
from mtl_jax.data.encode import encode
from mtl_jax.errors import ConfigError, Interrupted, TrainingError
from mtl_jax.handover import hand_over, trained_source
from mtl_jax.job import Shared, name_of
from mtl_jax.plan import plan_of, runs_of, settings_tried
from mtl_jax.report.folder import LEDGER, RunFolder
from mtl_jax.report.record import validate
from mtl_jax.run import run
from mtl_jax.run_config import build_model, check_config
from mtl_jax.source import check_transfer, in_order, source_config
from mtl_jax.train.predict import outputs_of
from mtl_jax.train.state import Functional
from mtl_jax.transfer import Artefact, on_base

SMALL = (
    "data=table", "data.tasks={buy: binary, spend: regression}", "data.domain=area", "data.categorical=[item]",
    "data.numeric=[price]", "data.split=rows", "source=north", "target=west", "sharing=shared_bottom", "sharing.units=[8]",
    "encoder.embedding_dim=4", "towers.units=[]", "optimizer.learning_rate=0.03", "trainer.batch_size=64",
    "trainer.epochs=4", "trainer.epoch_steps=null", "trainer.patience=0", "trainer.steps_per_call=8",
)  # fmt: skip
SCARCE = "data.target_fraction=0.25"


def make_frame(seed=0):
    """Most of what is bought depends on the item and the price alike in all areas; the east is all noise."""
    rng = np.random.default_rng(seed)
    area = np.repeat(["north", "south", "west", "east"], [1200, 300, 300, 400])
    item, price = rng.integers(0, 12, len(area)), rng.normal(size=len(area))
    liked = 2.0 * np.sin(2.4 * item)
    noise = np.where(area == "east", 4.0, 0.3) * rng.normal(size=len(area))
    shift = np.select([area == "south", area == "west"], [0.3, -0.3])
    rows = {"area": area, "item": [f"i{number}" for number in item], "price": price}
    rows |= {"buy": (liked + price + shift + noise > 0).astype(int), "spend": liked - price + shift + noise}
    return pl.DataFrame(rows).sample(fraction=1.0, shuffle=True, seed=seed)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "visits.parquet"
    make_frame().write_parquet(path)
    return path


@pytest.fixture(scope="module")
def compose(path):
    """(*overrides, output_dir=...) -> plain configuration of one run, or of an arm."""

    def composed(*overrides, output_dir="outputs", name="transfer"):
        given = [*SMALL, f"data.path={path}", f"output_dir={output_dir}", *overrides]
        with hydra.initialize_config_module("conf", version_base="1.3"):
            config = plain(hydra.compose(name, overrides=given))
        config.pop("summary", None)
        return config

    return composed


@pytest.fixture(scope="module")
def shared():
    """The table is read, a data set fitted, and a program of an ablation compiled, once for all tests."""
    return Shared(programs={})


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def ran(compose, outputs):
    """(*overrides) -> record and folder of a run; each is trained once."""
    records = {}

    def call(*overrides):
        if overrides not in records:
            config = compose(*overrides, output_dir=outputs)
            record = run(config, console=Console(file=io.StringIO()))
            validate(record)
            records[overrides] = record
        record = records[overrides]
        return record, outputs / "train" / record["run_id"]

    return call


@pytest.fixture
def copied(ran, outputs, tmp_path):
    """A folder of outputs where the source has been trained and nothing else."""
    ran(SCARCE)
    shutil.copytree(outputs / "source", tmp_path / "source")
    return tmp_path


def contents(folder):
    """Every file but locks, with its time and content."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def only(folder, pattern):
    (found,) = Path(folder).glob(pattern)
    return found


def arrays(model):
    _, params, rest = Functional.of(model)
    return {path: np.asarray(array) for path, array in (params | rest).items()}


def stages(record):
    return [one["name"] for one in record["stages"]]


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_transfer_helps_where_the_target_has_few_rows(ran):
    tuned, alone = (ran(SCARCE, f"transfer={name}")[0] for name in ("fine_tune", "scratch"))
    assert tuned["data"]["rows"]["train"] < 80
    assert tuned["metrics"]["test"]["buy"]["auc"] > alone["metrics"]["test"]["buy"]["auc"] + 0.1
    assert tuned["metrics"]["test"]["spend"]["rmse"] < 0.7 * alone["metrics"]["test"]["spend"]["rmse"]


def test_runs_with_and_without_transfer_are_of_the_same_data(ran):
    tuned, alone, pooled = (ran(SCARCE, f"transfer={name}")[0] for name in ("fine_tune", "scratch", "pooled"))
    for key in ("data", "baselines", "tasks", "split_seed", "selector"):
        assert tuned[key] == alone[key] == pooled[key], key
    assert len({record["run_id"] for record in (tuned, alone, pooled)}) == 3
    assert [record["method"]["transfer"] for record in (tuned, alone, pooled)] == ["FineTune", None, "Pooled"]


def test_the_record_says_what_was_done_before_the_target(ran, outputs):
    record, _ = ran(SCARCE, "transfer=fine_tune")
    assert stages(record) == ["source_train", "select", "transfer", "FineTune"]
    first, chosen, moved, tuned = record["stages"]
    artefact = Artefact.read(only(outputs, "source/*/artefact"))
    assert first["artefact_hash"] == moved["parent_hash"] == tuned["parent_hash"] == artefact.hash
    assert chosen["loading_report"] == {"how": "given", "chosen": ["north"], "scores": {}}
    report = moved["loading_report"]
    assert report["reinitialised"] == report["dropped"] == report["rescaled"] == []
    assert report["loaded"] == len(artefact.arrays)
    assert report["coverage"]["tables/item/rows"] == {"known": 12, "new": 0, "left": 0}
    assert report["coverage"]["tables/area/rows"] == {"known": 1, "new": 1, "left": 0}
    assert moved["needs"] == ["source_tower"]
    source = json.loads(only(outputs, "source/*/result.json").read_text())
    assert report["source_run"] == source["run_id"]
    assert first["steps"] == source["timing"]["steps"] == 4 * -(-source["data"]["rows"]["train"] // 64)
    assert tuned["steps"] == record["timing"]["steps"] == 4
    assert first["wall_seconds"] > 0 and tuned["wall_seconds"] > 0


def test_forgetting_is_what_the_sources_metrics_lost_on_its_validation_part(ran, outputs):
    record, _ = ran(SCARCE, "transfer=fine_tune")
    source = json.loads(only(outputs, "source/*/result.json").read_text())
    before, after = source["metrics"]["valid"], record["slices"]["source"]["valid"]
    assert record["slices"]["source"].keys() == {"valid"}
    assert record["transfer"]["forgetting"] == pytest.approx(
        {
            "buy": before["buy"]["auc"] - after["buy"]["auc"],
            "spend": after["spend"]["rmse"] - before["spend"]["rmse"],
        }
    )
    assert "domain=west" in record["slices"]


def test_a_model_that_is_not_trained_has_forgotten_nothing(ran):
    record, _ = ran(SCARCE, "transfer=zero_shot")
    assert record["transfer"]["forgetting"] == pytest.approx({"buy": 0.0, "spend": 0.0}, abs=1e-6)
    assert record["timing"]["steps"] == 0 and record["monitor"]["step"] == 0
    assert stages(record)[-1] == "ZeroShot"


def test_the_validation_of_a_loaded_model_is_the_first_candidate(ran):
    zero_shot, tuned = (ran(SCARCE, f"transfer={name}")[0] for name in ("zero_shot", "fine_tune"))
    history = RunFolder(ran(SCARCE, "transfer=fine_tune")[1]).read_history()
    first = history.filter(step=0, name="mean_gain")["value"].item()
    assert first == pytest.approx(zero_shot["monitor"]["value"], abs=1e-6)
    assert tuned["monitor"]["value"] >= first


def test_the_source_is_sealed_and_the_targets_test_part_is_opened_once(ran, outputs):
    record, folder = ran(SCARCE, "transfer=fine_tune")
    assert record["test_openings"] == 1 and len(RunFolder(folder).openings()) == 1
    home = only(outputs, "source/*")
    source = json.loads((home / "result.json").read_text())
    validate(source)
    assert "chosen and judged on its validation part" in source["sealed"]
    assert source["metrics"]["test"] is None and source["test_openings"] == 0 and not (home / LEDGER).exists()
    assert source["data"]["summary"] == {} and source["method"]["transfer"] is None


def test_the_target_is_reduced_and_the_source_never(ran, compose, shared, outputs):
    record, _ = ran(SCARCE, "transfer=fine_tune")
    source = json.loads(only(outputs, "source/*/result.json").read_text())
    whole = shared.dataset(compose("target=null", "transfer=scratch", "source=null"))
    rows = {part: dict(whole.part(part)["area"].value_counts().iter_rows()) for part in ("train", "valid", "test")}
    assert source["data"]["rows"] == {part: rows[part]["north"] for part in rows}
    assert source["data"]["target_fraction"] == 1.0
    assert record["data"]["target_fraction"] == 0.25
    assert record["data"]["rows"]["train"] == rows["train"]["west"] // 4
    assert record["data"]["rows"]["test"] == rows["test"]["west"]
    sets = [shared.dataset(compose(f"data.target_fraction={share}")) for share in (0.1, 0.25, 1.0)]
    for small, large in zip(sets, sets[1:], strict=False):
        assert set(small.splits["train"]) < set(large.splits["train"])


def test_a_meta_learned_source_is_a_run_of_its_own_that_a_few_steps_adapt(compose, shared, tmp_path):
    """Over the two domains of the source; neither its rates nor its rows go along, and the target trains nothing."""
    config = compose("source=[south,north]", "pretraining=maml", "transfer=few_steps", output_dir=tmp_path)
    record = run(config, console=Console(file=io.StringIO()))
    validate(record)
    assert stages(record) == ["source_train", "select", "transfer", "GradientTransfer"]
    assert record["timing"]["steps"] == 0 and record["stages"][2]["needs"] == ["source_tower"]
    home = only(tmp_path, "source/*")
    source = json.loads((home / "result.json").read_text())
    validate(source)
    artefact = Artefact.read(home / "artefact")
    assert record["stages"][0]["artefact_hash"] == record["stages"][2]["parent_hash"] == artefact.hash
    assert record["stages"][2]["loading_report"]["source_run"] == source["run_id"] == home.name
    assert source["config"]["target"] == ["north", "south"] and source["config"]["source"] is None
    assert source["config"]["transfer"]["_target_"] == "mtl_jax.transfer.MAML"
    assert source["config"]["pretraining"] == {"_target_": "mtl_jax.transfer.Scratch"}
    assert source["method"]["transfer"] == "MAML" and source["test_openings"] == 0
    assert source["timing"]["steps"] == 4 * -(-source["data"]["rows"]["train"] // 64)
    assert {path.split("/")[0] for path in artefact.arrays} == {"tables", "sharing", "task"}

    def name(*overrides):
        one = source_config(compose("source=[north,south]", *overrides), ["north", "south"])
        return name_of(one, shared.dataset(one))

    names = [name(), name("pretraining=maml"), name("pretraining=maml", "pretraining.num_steps=2")]
    assert names[1] == home.name and len(set(names)) == 3
    assert name("pretraining=maml", "transfer=l2_sp") == home.name


def test_what_takes_over_from_a_source_trains_none(compose):
    for name, shown in (("fine_tune", "FineTune"), ("pooled", "Pooled"), ("mamdr_dr", "DomainRegularisation")):
        config = compose(f"transfer={name}")
        with pytest.raises(ConfigError, match=f"pretraining '{shown}' takes over from a source, and a source has none"):
            check_transfer(config | {"pretraining": config["transfer"]})
    check_transfer(compose("pretraining=reptile"))


def test_a_source_of_one_domain_cannot_be_meta_learned(compose, shared, tmp_path):
    with pytest.raises(ConfigError, match="'MAML' learns from several domains and the training rows have 1"):
        hand_over(compose("pretraining=maml", output_dir=tmp_path), shared)


def test_scratch_and_pooling_train_no_source(compose, shared, tmp_path):
    for name, expected in (("scratch", []), ("pooled", ["select"])):
        config = compose(SCARCE, f"transfer={name}", output_dir=tmp_path)
        handover = hand_over(config, shared)
        assert [one["name"] for one in handover.stages] == expected
        assert handover.record is None and handover.origin is None
    assert handover.stages[0]["needs"] == ["source_data"]
    assert handover.rows("train").num_rows == len(shared.dataset(source_config(config, ["north"])).splits["train"])
    assert not list(tmp_path.iterdir())


def test_a_pooled_run_has_no_artefact_and_a_slice_of_the_source(ran):
    record, _ = ran(SCARCE, "transfer=pooled")
    assert stages(record) == ["select", "Pooled"]
    assert record["stages"][-1]["parent_hash"] is None
    assert "forgetting" not in record["transfer"]
    assert record["slices"]["source"]["valid"]["buy"]["auc"] > 0.8
    assert record["timing"]["steps"] > 4 * 10, "an epoch passes over the rows of both"


def test_without_a_target_nothing_is_handed_over(compose, shared):
    assert hand_over(compose("source=null", "target=null", "transfer=scratch"), shared) is None


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_a_run_leaves_what_it_tuned_for_the_artefact_of_its_source(name, ran, compose, shared, outputs):
    """Its record has hash and size, and base and tuning predict what the run was judged by."""
    record, folder = ran(SCARCE, f"transfer={name}", "tuning_artefact=true")
    base, artefact = Artefact.read(only(outputs, "source/*/artefact")), Artefact.read(folder / "tuning")
    *_, moved, trained = record["stages"]
    assert artefact.tuning.base == moved["parent_hash"] == base.hash and trained["artefact_hash"] == artefact.hash
    assert trained["artefact_numbers"] == {"tuning": artefact.num_numbers, "base": base.num_numbers}
    assert artefact.facts == {"run_id": record["run_id"], "seed": 0}
    new = "tables/area/rows"
    assert artefact.arrays[new].shape == (1, 4), "the one area that the source never saw"
    assert not {
        path for path in artefact.arrays if path.endswith("/kernel") and path in base.arrays and "task" not in path
    }
    config = compose(SCARCE, f"transfer={name}", "seed=7", output_dir=outputs)
    own = shared.dataset(config)
    dataset = shared.continuation(own, shared.dataset(source_config(config, ["north"])))
    model = on_base(build_model(config, dataset), artefact, base)
    rows = encode(own.part("valid"), dataset.schema)
    values, _ = metrics.evaluate(dataset.schema.tasks, outputs_of(model, rows), rows)
    assert values == record["metrics"]["valid"]


def test_a_run_that_changes_everything_is_not_trained_for_what_it_tunes(copied, compose, shared):
    with pytest.raises(ConfigError, match="transfer 'FineTune' leaves nothing of its source as it was"):
        hand_over(compose("tuning_artefact=true", output_dir=copied), shared)
    assert hand_over(compose("tuning_artefact=true", "transfer=scratch", output_dir=copied), shared).base is None


# --- names of runs ----------------------------------------------------------------------------------------------------


def test_the_name_of_a_run_changes_with_transfer_source_and_target(compose, shared):
    def name(*overrides):
        config = compose(*overrides)
        return name_of(config, shared.dataset(config))

    different = [
        (), ("transfer=l2_sp",), ("transfer=l2_sp", "transfer.alpha=0.2"), ("transfer=scratch",), ("source=south",),
        ("source=[north,south]",), ("target=south",), ("target=[south,west]",), ("select=largest",),
        ("loading.new_rows=mean",), ("trainer.epoch_steps=9",), (SCARCE,), ("seed=1",),
    ]  # fmt: skip
    names = [name(*overrides) for overrides in different]
    assert len(set(names)) == len(names)
    assert names == [name(*overrides) for overrides in different]


def test_the_order_of_domains_makes_no_other_run(compose, tmp_path):
    """Two orders of a list of targets are one run, whose rows and numbers of domains are those of the whole data set."""
    options = ("source=null", "transfer=mamdr_dn", "trainer.epochs=1", "seed=3")
    said = []
    for target in ("[west,south]", "[south,west]"):
        console = Console(file=io.StringIO(), width=200)
        record = run(compose(*options, f"target={target}", output_dir=str(tmp_path)), console=console)
        said.append(console.file.getvalue())
    assert ["nothing to train" in text for text in said] == [False, True]
    assert record["config"]["target"] == ["south", "west"] and " south + west," in said[0]
    assert len(list((tmp_path / "train").glob("*/result.json"))) == 1
    one, other = (Shared().dataset(compose(f"target=[{names}]")) for names in ("west,south", "south,west"))
    assert one.identity == other.identity and one.schema == other.schema
    np.testing.assert_array_equal(one.part("train")["area"], other.part("train")["area"])
    with pytest.raises(ConfigError, match=r"are the same runs; expected runs that differ"):
        arm = compose("+axis.target=[[west,south],[south,west]]", "source=north", name="ablate")
        plan_of([("fine_tune", "table", arm)], Shared())


def test_the_order_of_sources_means_something_where_one_of_them_is_chosen(compose):
    """By its place, or as the first of equals."""
    for select, expected in (
        ("given", ["east", "north"]),
        ("random", ["north", "east"]),
        ("largest", ["north", "east"]),
    ):
        config = compose("source=[north,east]", f"select={select}")
        assert in_order(config) == config | {"source": expected}
    assert in_order(compose("source=null")) == compose("source=null")


def test_the_run_of_a_source_is_the_same_for_all_that_take_over_from_it(compose, shared):
    def name(*overrides):
        config = source_config(compose(*overrides), ["north"])
        check_config(config)
        return name_of(config, shared.dataset(config))

    one = name()
    for overrides in (["transfer=l2_sp"], ["target=south"], [SCARCE], ["loading.new_rows=mean"], ["source=[north,south]"],
                      ["select=random"], ["data.valid_fraction=full"]):  # fmt: skip
        assert name(*overrides) == one, overrides
    assert name("seed=1") != one and name("sharing.units=[4]") != one


# --- finding, training and waiting for the source ---------------------------------------------------------------------


def test_a_finished_source_is_used_again_by_every_target(ran, outputs):
    ran(SCARCE, "transfer=fine_tune")
    before = contents(outputs / "source")
    record, _ = ran("target=[south]", "transfer=zero_shot")
    assert stages(record)[0] == "source_train"
    assert contents(outputs / "source") == before


def test_the_targets_model_begins_with_the_values_of_the_source(copied, compose, shared):
    handover = hand_over(compose(SCARCE, output_dir=copied), shared)
    artefact = Artefact.read(only(copied, "source/*/artefact"))
    assert handover.dataset.identity == shared.dataset(compose(SCARCE)).identity
    assert handover.dataset.schema.vocabulary("item").values == artefact.schema.vocabulary("item").values
    found = arrays(handover.model)
    for path, array in artefact.arrays.items():
        np.testing.assert_array_equal(found[path][: len(array)], array)
    assert set(handover.origin) == set(artefact.arrays)
    assert handover.origin["tables/item/rows"].all()
    assert handover.origin["tables/area/rows"].tolist() == [True, True, True, False], "pad, unknown, north, west"
    assert all(came is True for path, came in handover.origin.items() if not path.endswith("rows"))


def test_an_artefact_that_is_gone_is_made_again_from_the_checkpoints(copied, compose, shared):
    home = only(copied, "source/*")
    lost = Artefact.read(home / "artefact").hash
    (home / "artefact" / "manifest.json").unlink()
    artefact, record = trained_source(source_config(compose(output_dir=copied), ["north"]), shared)
    assert artefact.hash == lost and record["status"] == "completed"
    events = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "started"] == [0, record["timing"]["steps"]]


def test_an_interrupted_source_is_gone_on_with(ran, compose, tmp_path):
    whole, _ = ran(SCARCE, "transfer=fine_tune")
    config, asked = compose(SCARCE, "transfer=fine_tune", output_dir=tmp_path), iter(range(1, 1000))
    with pytest.raises(Interrupted):
        run(config, console=Console(file=io.StringIO()), should_stop=lambda: next(asked) == 3)
    home = only(tmp_path, "source/*")
    assert json.loads((home / "result.json").read_text())["status"] == "interrupted"
    assert not (home / "artefact").exists()
    record = run(config, console=Console(file=io.StringIO()))
    events = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
    begun = [event["step"] for event in events if event["event"] == "started"]
    assert len(begun) == 2 and begun[0] == 0 and 0 < begun[1] < record["stages"][0]["steps"]
    for key in ("run_id", "metrics", "support", "monitor", "baselines", "slices"):
        assert record[key] == whole[key], key
    assert record["stages"][0]["artefact_hash"] == whole["stages"][0]["artefact_hash"]


def test_a_run_whose_source_cannot_be_trained_says_so_in_its_record(compose, tmp_path):
    config = compose("optimizer=sgd", "optimizer.learning_rate=1e30", "trainer.epochs=1", output_dir=tmp_path)
    with pytest.raises(TrainingError, match="is not finite in step"):
        run(config, console=Console(file=io.StringIO()))
    for kind in ("source", "train"):
        record = json.loads(only(tmp_path, f"{kind}/*/result.json").read_text())
        validate(record)
        assert record["status"] == "failed" and record["error"]["class"] == "TrainingError"


def test_a_source_that_another_process_trains_is_waited_for(copied, compose, shared, monkeypatch):
    lock, waited = filelock.FileLock(only(copied, "source/*") / ".lock"), []
    lock.acquire()

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            lock.release()

    monkeypatch.setattr(mtl_jax.handover.time, "sleep", sleep)
    assert hand_over(compose(SCARCE, output_dir=copied), shared).record["status"] == "completed"
    assert waited == 2 * [mtl_jax.handover.WAIT_SECONDS]


def test_waiting_ends_where_the_run_is_told_to_stop(copied, compose, shared, monkeypatch):
    monkeypatch.setattr(mtl_jax.handover.time, "sleep", lambda seconds: pytest.fail("went on waiting"))
    with filelock.FileLock(only(copied, "source/*") / ".lock"), pytest.raises(Interrupted, match="by another process"):
        hand_over(compose(SCARCE, output_dir=copied), shared, lambda: True)


# --- which source -----------------------------------------------------------------------------------------------------


def chosen_by(handover):
    return next(one for one in handover.stages if one["name"] == "select")["loading_report"]


def test_several_given_sources_are_one(compose, shared, tmp_path):
    handover = hand_over(compose("source=[south,north]", "transfer=pooled", output_dir=tmp_path), shared)
    assert set(handover.source.part("train")["area"]) == {"north", "south"}
    assert chosen_by(handover)["chosen"] == ["south", "north"]


def test_the_largest_source_is_the_one_with_the_most_training_rows(compose, shared, tmp_path):
    config = compose("source=[south,north,east]", "select=largest", "transfer=pooled", output_dir=tmp_path)
    report = chosen_by(hand_over(config, shared))
    assert report["how"] == "largest" and report["chosen"] == ["north"]
    assert report["scores"]["north"] > report["scores"]["east"] > report["scores"]["south"] > 200


def test_a_random_source_is_the_seeds(compose, shared, tmp_path):
    found = set()
    for seed in range(12):
        config = compose(
            "source=[south,north]", "select=random", "transfer=pooled", f"seed={seed}", output_dir=tmp_path
        )
        report = chosen_by(hand_over(config, shared))
        assert report["scores"] == {}
        found.add(tuple(report["chosen"]))
    assert found == {("south",), ("north",)}


@pytest.fixture(scope="module")
def scored(ran, outputs, tmp_path_factory):
    """A folder for the runs of candidates, each of which is trained once."""
    ran(SCARCE)
    place = tmp_path_factory.mktemp("scored")
    shutil.copytree(outputs / "source", place / "source")
    return place


@pytest.mark.parametrize("select", ["best_source_metric", "gradient_cosine"])
def test_the_source_that_teaches_most_is_chosen_by_score(scored, compose, shared, select):
    """What is sold in the east is noise: its model fits its own rows badly, and leads nowhere in the west."""
    config = compose("source=[east,north]", f"select={select}", output_dir=scored)
    handover = hand_over(config, shared)
    report = chosen_by(handover)
    assert report["how"] == select and report["chosen"] == ["north"]
    assert report["scores"].keys() == {"east", "north"}
    assert set(handover.source.part("train")["area"]) == {"north"}
    assert len(list(scored.glob("source/*/artefact"))) == 2


def test_the_best_source_has_the_lowest_error_where_the_monitor_is_one(compose, shared, tmp_path):
    config = compose(
        "source=[east,north]", "select=best_source_metric", "trainer.monitor=spend/rmse", "trainer.epochs=1",
        output_dir=tmp_path,
    )  # fmt: skip
    report = chosen_by(hand_over(config, shared))
    assert report["chosen"] == ["north"]


# --- outputs of the source's model ------------------------------------------------------------------------------------


def test_what_the_source_says_of_each_row_is_a_feature_of_the_target(copied, compose, shared):
    """In all parts, whatever share of the rows is kept; the model is that of the wider schema from its initial values."""
    handovers = [
        hand_over(compose(share, "transfer=pred", output_dir=copied), shared)
        for share in (SCARCE, "data.target_fraction=0.5")
    ]
    said = hand_over(compose(SCARCE, "transfer=zero_shot", output_dir=copied), shared)
    names = ["buy__source", "spend__source"]
    for part, rows in {"train": None, "valid": None, "test": said.dataset.open_test()}.items():
        rows = getattr(said.dataset.for_training(), part) if rows is None else rows
        outputs = said.model(as_batch(rows))
        own = handovers[0].dataset.part(part)
        assert own["item"].equals(said.dataset.part(part)["item"])
        for task in ("buy", "spend"):
            np.testing.assert_allclose(own[f"{task}__source"], outputs[task], rtol=1e-5, atol=1e-6)
    small, large = (handover.dataset for handover in handovers)
    common = small.splits["train"]
    assert set(common) < set(large.splits["train"])
    np.testing.assert_allclose(
        small.frame[common].select(names).to_numpy(), large.frame[common].select(names).to_numpy(), rtol=1e-6
    )
    assert handovers[0].origin is None and handovers[0].dataset.schema.dense_names[-2:] == tuple(names)
    fresh, kernel = arrays(build_model(compose(SCARCE), small)), "sharing/bottom/layers/0/kernel"
    for path, array in arrays(handovers[0].model).items():
        np.testing.assert_array_equal(array, fresh[path])
    assert len(fresh[kernel]) == len(arrays(said.model)[kernel]) + 2


def test_a_run_with_the_sources_outputs_profits_from_them(ran):
    told, alone = (ran(SCARCE, f"transfer={name}")[0] for name in ("pred", "scratch"))
    assert stages(told) == ["source_train", "select", "transfer", "Pred"]
    assert told["metrics"]["test"]["buy"]["auc"] > alone["metrics"]["test"]["buy"]["auc"] + 0.1
    assert told["slices"]["source"]["valid"]["buy"]["auc"] > 0.8
    assert told["data"] == alone["data"] and told["baselines"] == alone["baselines"]


def test_an_interpolated_run_is_on_validation_at_least_as_good_as_both_models(ran):
    mixed, source = (ran(SCARCE, f"transfer={name}")[0] for name in ("lin_int", "zero_shot"))
    assert stages(mixed)[-1] == "LinInt"
    history = RunFolder(ran(SCARCE, "transfer=lin_int")[1]).read_history().filter(part="valid")
    alone = {
        task: history.filter(step=mixed["monitor"]["step"], task=task, name=name)["value"].item()
        for task, name in (("buy", "auc"), ("spend", "rmse"))
    }
    found, said = mixed["metrics"]["valid"], source["metrics"]["valid"]
    assert found["buy"]["auc"] >= max(alone["buy"], said["buy"]["auc"]) - 1e-6
    assert found["spend"]["rmse"] <= min(alone["spend"], said["spend"]["rmse"]) + 1e-6
    shares = mixed["diagnostics"]["source_share"]
    assert shares.keys() == {"buy", "spend"} and all(round(10 * share, 9) in range(11) for share in shares.values())
    assert mixed["metrics"]["test"]["buy"]["auc"] > 0.8


def test_seeds_of_an_ablation_have_the_outputs_of_their_own_sources(compose):
    """Data of one seed are not those of another, so they are not trained as one."""
    of = [
        _of_setup(compose(SCARCE, f"transfer={name}", f"seed={seed}"))
        for name in ("pred", "lin_int")
        for seed in (0, 1)
    ]
    assert of[0] != of[1] and of[2] == of[3]


# --- loading ----------------------------------------------------------------------------------------------------------


def test_options_of_loading_reach_it(copied, compose, shared):
    tower = "task/spend/.*"
    options = [f"loading.reinit=['{tower}']", f"loading.drop=['{tower}']"]
    handover = hand_over(compose(*options, output_dir=copied), shared)
    report = handover.stages[-1]["loading_report"]
    assert report["reinitialised"] and all(path.startswith("task/spend/") for path in report["reinitialised"])
    assert report["dropped"] == report["reinitialised"]
    assert not set(handover.origin) & set(report["reinitialised"])


def test_a_map_of_paths_reaches_it(copied, compose, shared):
    handover = hand_over(compose("loading.map=[['(.*)','\\1']]", output_dir=copied), shared)
    assert handover.stages[-1]["loading_report"]["dropped"] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero_shot", "transfer 'ZeroShot' trains nothing, and .*task/spend.* did not come from"),
        ("pred", "transfer 'Pred' reads what the source's model says, and .*task/spend.* did not come from"),
        ("lin_int", "transfer 'LinInt' reads what the source's model says, and .*task/spend.* did not come from"),
    ],
)
def test_a_model_that_is_not_trained_needs_all_towers(name, message, copied, compose, shared):
    tower = "task/spend/.*"
    options = [f"loading.reinit=['{tower}']", f"loading.drop=['{tower}']", f"transfer={name}"]
    with pytest.raises(ConfigError, match=message):
        hand_over(compose(*options, output_dir=copied), shared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loading.new_rows=zero"], "new_rows is 'zero'; expected one of"),
        (["loading.drop=[nothing]"], "drop has 'nothing', which fits no array"),
        (["loading.reinit=[nothing]"], "reinit has 'nothing', which fits no array"),
        (["loading.map=[[nothing,nowhere]]"], "map has 'nothing', which fits no array of the source"),
        (["loading.map=3"], "loading.map"),
        (["loading.map=[[one]]"], "loading.map"),
        (["loading.drop=tables"], "loading.drop"),
        (["loading.drop=['(']"], "loading.drop|drop has"),
        (["loading.reinit=3"], "loading.reinit"),
    ],
)
def test_a_mistake_in_loading_is_a_message(copied, compose, shared, options, message):
    config = compose(*options, output_dir=copied)
    with pytest.raises(ConfigError, match=message):
        check_config(config)
        hand_over(config, shared)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["source=null"],
            r"'FineTune' takes over from a source, and source is null; .* Set source=\.\.\., or transfer",
        ),
        (["target=null"], "and target is null"),
        (["source=null", "target=null"], r"and source and target are null.* Set source=\.\.\. target=\.\.\."),
        (["source=null", "transfer=pooled"], "'Pooled' takes over from a source"),
        (["target=north"], r"\['north'\] are source and target; expected different domains"),
        (["source=[north,west]", "transfer=pooled"], r"\['west'\] are source and target"),
        (["source=[]"], r"source is \[\]; expected a domain, a list of different ones, or null"),
        (["source=[north,north]"], "source is .*; expected a domain, a list of different ones, or null"),
        (["target=3"], "target is 3; expected a domain"),
        (["target=[west,3]"], r"target is \['west', 3\]; expected a domain"),
        (["select=nonsense"], r"select is 'nonsense'; expected one of \['given', 'largest'"),
        (["select=[given]"], r"select is \['given'\]; expected one of"),
        (["loading=null"], "loading is None; expected a mapping with"),
        (["+loading.rows=1"], "loading is .*; expected a mapping with"),
        (["~loading.new_rows"], "loading is .*; expected a mapping with"),
        (["training=staged"], "target with training=staged; expected joint"),
        (["folds=3"], "target with folds; expected null"),
        (["folds=3", "target=null", "transfer=mldg"], "transfer 'MLDG' with folds; expected null"),
        (["transfer._target_=mtl_jax.transfer.load"], "transfer"),
        (["tuning_artefact=3"], "tuning_artefact is 3; expected true or false"),
        (["trainer.epoch_steps=0"], "trainer.epoch_steps is 0; expected a whole number from 1"),
    ],
)
def test_what_no_run_can_have_is_refused_before_anything_is_read(compose, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_config(compose(*overrides))


def test_scratch_may_name_a_source_and_needs_none(compose):
    for overrides in (["source=null"], ["source=west"], []):
        check_transfer(compose("transfer=scratch", *overrides))


@pytest.mark.parametrize(("key", "value"), [("target", "moon"), ("source", "moon"), ("source", "[north,moon]")])
def test_domains_that_the_data_lack_are_named(compose, shared, tmp_path, key, value):
    with pytest.raises(
        ConfigError, match=r"has no domains \['moon'\]; expected some of \['east', 'north', 'south', 'w"
    ):
        hand_over(compose(f"{key}={value}", output_dir=tmp_path), shared)
    assert not list(tmp_path.iterdir())


# --- ablations --------------------------------------------------------------------------------------------------------

ARM = ("seeds=2", "transfer=fine_tune", "trainer.epochs=1", SCARCE, "trainer.epoch_steps=4")


@pytest.fixture(scope="module")
def arm_of(compose):
    def build(*overrides, output_dir="outputs"):
        return compose(*ARM, *overrides, output_dir=output_dir, name="ablate")

    return build


@pytest.fixture(scope="module")
def compared(arm_of, shared, tmp_path_factory):
    """Axis -> records of an arm by seed; the source of each seed is trained for the first of them."""
    place = tmp_path_factory.mktemp("ablation")
    found = {"place": place}
    for axis in ("map", "vmap"):
        arm = arm_of("transfer=l2_sp", "++axis.transfer.alpha=[0.1,0.2]", f"vectorize.axis={axis}", output_dir=place)
        records = run_arm(arm, place / axis, shared=shared)
        assert [record["status"] for record in records.values()] == 4 * ["completed"]
        found[axis] = records
    return found


def test_each_seed_has_a_source_of_its_own(compared, arm_of, shared):
    sources = {
        json.loads(path.read_text())["seed"]: path.parent.name
        for path in compared["place"].glob("source/*/result.json")
    }
    assert sources.keys() == {0, 1}
    for record in compared["map"].values():
        validate(record)
        moved = next(one for one in record["stages"] if one["name"] == "transfer")
        assert moved["loading_report"]["source_run"] == sources[record["seed"]]
    assert len({record["stages"][0]["artefact_hash"] for record in compared["map"].values()}) == 2


def test_runs_that_train_together_equal_those_one_after_the_other(compared):
    assert compared["map"].keys() == compared["vmap"].keys()
    log = next(compared["place"].glob("vmap/runs/*/run.log")).read_text()
    assert "run axis Plan(axis='vmap', chunk=4," in log
    for name, alone in compared["map"].items():
        together = compared["vmap"][name]
        for task, metric in (("buy", "auc"), ("spend", "rmse")):
            for part in ("valid", "test"):
                value = alone["metrics"][part][task][metric]
                assert together["metrics"][part][task][metric] == pytest.approx(value, rel=1e-3)
            forgotten = alone["transfer"]["forgetting"][task]
            assert together["transfer"]["forgetting"][task] == pytest.approx(forgotten, abs=1e-3)
        assert together["baselines"] == alone["baselines"] and stages(together) == stages(alone)


def test_runs_that_stopped_together_go_on_to_the_same_results(compared, arm_of, shared, tmp_path):
    shutil.copytree(compared["place"] / "source", tmp_path / "source")
    arm = arm_of("transfer=l2_sp", "++axis.transfer.alpha=[0.1,0.2]", "vectorize.axis=vmap", output_dir=tmp_path)
    asked = iter(range(1, 1000))
    with pytest.raises(Interrupted):
        run_arm(arm, tmp_path / "arm", shared=shared, should_stop=lambda: next(asked) == 1)
    records = run_arm(arm, tmp_path / "arm", shared=shared)
    assert records.keys() == compared["vmap"].keys()
    for name, record in records.items():
        for key in ("status", "metrics", "monitor", "transfer"):
            assert record[key] == compared["vmap"][name][key], key


def test_a_member_is_the_run_of_its_configuration_alone(compared, arm_of, tmp_path):
    shutil.copytree(compared["place"] / "source", tmp_path / "source")
    arm = arm_of("transfer=l2_sp", "++axis.transfer.alpha=[0.1,0.2]", output_dir=tmp_path)
    alone = run(runs_of(arm)[3].config, console=Console(file=io.StringIO()))
    member = compared["map"][alone["run_id"]]
    for key in ("metrics", "support", "baselines", "monitor", "params", "data", "config_hash", "slices", "transfer"):
        assert member[key] == alone[key], key


def test_scratch_stands_beside_transfers_on_the_same_data(compared, arm_of, shared):
    place = compared["place"]
    before = contents(place / "source")
    arm = arm_of("transfer=scratch", "vectorize.axis=map", output_dir=place)
    records = run_arm(arm, place / "map", shared=shared)
    assert [record["status"] for record in records.values()] == 2 * ["completed"]
    for record in records.values():
        validate(record)
        other = next(one for one in compared["map"].values() if one["seed"] == record["seed"])
        assert (record["data"]["sha256"], record["baselines"]) == (other["data"]["sha256"], other["baselines"])
        assert stages(record) == ["Scratch"]
    assert contents(place / "source") == before


def test_what_trains_nothing_is_run_one_after_the_other(compared, arm_of, shared):
    place = compared["place"]
    records = run_arm(
        arm_of("transfer=zero_shot", "vectorize.axis=vmap", output_dir=place), place / "map", shared=shared
    )
    assert [(record["status"], record["timing"]["steps"]) for record in records.values()] == 2 * [("completed", 0)]


def test_an_interruption_while_the_source_trains_fails_no_run(arm_of, shared, tmp_path):
    """The same command goes on, without retry."""
    arm, asked = arm_of("seeds=1", "vectorize.axis=map", output_dir=tmp_path), iter(range(1, 1000))
    with pytest.raises(Interrupted):
        run_arm(arm, tmp_path / "arm", shared=shared, should_stop=lambda: next(asked) == 1)
    states = [json.loads(path.read_text())["status"] for path in tmp_path.glob("arm/runs/*/result.json")]
    assert "failed" not in states
    records = run_arm(arm, tmp_path / "arm", shared=shared)
    assert [record["status"] for record in records.values()] == ["completed"]


def test_a_source_that_cannot_be_trained_fails_its_runs_with_its_reason(arm_of, shared, tmp_path):
    arm = arm_of("seeds=1", "vectorize.axis=map", "optimizer=sgd", "optimizer.learning_rate=1e30", output_dir=tmp_path)
    records = run_arm(arm, tmp_path / "arm", shared=shared)
    (record,) = records.values()
    validate(record)
    assert record["status"] == "failed" and record["error"]["class"] == "TrainingError"
    assert json.loads(only(tmp_path, "source/*/result.json").read_text())["status"] == "failed"


def test_targets_and_fractions_are_comparisons_and_no_tuning(arm_of, shared):
    arm = arm_of("++axis.target=[west,south]", "++axis.data.target_fraction=[0.25,1.0]", "seeds=1")
    assert settings_tried(arm) == 0
    members = plan_of([("fine_tune", "visits", arm)], shared)
    assert len({member["run_id"] for member in members}) == 4
    assert len({member["run_id"].split("-")[1] for member in members}) == 4, "each is data of its own"


def test_a_run_of_a_source_is_kept_by_value_and_not_by_folder(compose, shared, tmp_path):
    """Its rows are part of its name: of other data it is another run."""
    frame = make_frame(seed=3)
    frame.write_parquet(tmp_path / "visits.parquet")
    one, other = (
        source_config(compose(*overrides), ["north"])
        for overrides in ((), (f"data.path={tmp_path / 'visits.parquet'}",))
    )
    names = [name_of(config, shared.dataset(config)) for config in (one, other)]
    assert names[0].split("-")[0] == names[1].split("-")[0] and names[0] != names[1]


def test_a_step_size_of_zero_shares_nothing_on_the_devices_with_others(copied, compose):
    """It reads no rows of the source; other step sizes are numbers of one program."""
    setups = [
        _of_setup(compose("transfer=gradient_transfer", f"transfer.step_size={size}", output_dir=copied))
        for size in (0.0, 0.1, 0.2)
    ]
    assert setups[0] != setups[1] == setups[2]
