"""From a configured source to what the target's run begins with: the source is found or trained, and loaded."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtl_jax.data.encode import encode
from mtl_jax.errors import ConfigError, Interrupted, RunFolderError, TrainingError
from mtl_jax.job import Job, Shared, name_of
from mtl_jax.metrics.kinds import LOWER_IS_BETTER
from mtl_jax.report.folder import RunFolder
from mtl_jax.run_config import build_model, build_parts
from mtl_jax.source import Handover, adaptation_of, domains_of, source_config, stage
from mtl_jax.train import Result
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.transfer import Artefact, Loading, check_tuning, load
from mtl_jax.transfer.loading import MANIFEST
from mtl_jax.transfer.pred import with_outputs
from mtl_jax.transfer.select import choose, gradient_cosine

FOLDER, ARTEFACT = "source", "artefact"
SEALED = "the source of a transfer: chosen and judged on its validation part"
IN_USE = "in use by another process"
WAIT_SECONDS = 1.0


def hand_over(
    config: Mapping[str, Any],
    shared: Shared,
    should_stop: Callable[[], bool] = lambda: False,
    told: Callable[[str], None] = lambda text: None,
) -> Handover | None:
    """What the run of a configuration begins with; None for one without a target that
    learns over no domains either.

    The run of the source is found in ``<output_dir>/source`` by its configuration, data and seed, and trained there where
    it is not finished. Its test part stays closed.

    Args:
      config: Plain and checked.
      shared: Of the process.
      should_stop: Is asked while the source is trained.
      told: Is given a sentence about each source that is found or trained.

    Raises:
      ConfigError: Domains that the data lack, or a source that does not fit the target.
      Interrupted: ``should_stop`` said so.
    """
    adaptation = adaptation_of(config)
    if config["target"] is None and not adaptation.by_domain:
        return None
    own = shared.dataset(config)
    if not (adaptation.needs_model or adaptation.needs_rows):
        return Handover(own, build_model(config, own), adaptation)
    started = time.perf_counter()
    names, scores = _chosen(config, shared, should_stop, told)
    of_source = source_config(config, names)
    source = shared.dataset(of_source)
    dataset = shared.continuation(own, source)
    model = build_model(config, dataset)
    selected = stage("select", report={"how": config["select"], "chosen": names, "scores": scores})
    if not adaptation.needs_model:
        needs = ["source_data"]
        return Handover(dataset, model, adaptation, source=source, stages=(selected | {"needs": needs},))
    artefact, record = trained_source(of_source, shared, should_stop, told)
    loading = _loaded(config, model, dataset, artefact, adaptation)
    if config["tuning_artefact"]:
        check_tuning(adaptation, loading, dataset.schema)
    timing = record["timing"]
    trained = stage("source_train", artefact=artefact.hash, steps=timing.get("steps"), seconds=timing["wall_seconds"])
    moved = stage(
        "transfer",
        artefact.hash,
        report=_report(loading) | {"source_run": record["run_id"]},
        needs=["source_tower", "source_data"] if adaptation.needs_rows else ["source_tower"],
        seconds=time.perf_counter() - started,
    )
    stages = (trained, selected, moved)
    if adaptation.needs_source:
        base = (artefact, loading) if config["tuning_artefact"] else None
        return Handover(dataset, loading.model, adaptation, loading.origin, source, record, stages, base=base)
    if adaptation.reads_outputs:
        alike = (dataclasses.replace(one, schema=dataset.schema) for one in (dataset, source))
        dataset, source = (with_outputs(one, loading.model) for one in alike)
        model = build_model(config, dataset)
    beside = loading.model if adaptation.mixes_outputs else None
    return Handover(dataset, model, adaptation, None, source, record, stages, beside)


def trained_source(
    config: Mapping[str, Any],
    shared: Shared,
    should_stop: Callable[[], bool] = lambda: False,
    told: Callable[[str], None] = lambda text: None,
) -> tuple[Artefact, dict[str, Any]]:
    """The artefact of a source's run, and its record.

    Raises:
      Interrupted: ``should_stop`` said so; the same call goes on from there.
    """
    dataset = shared.dataset(config)
    name = name_of(config, dataset)
    folder = Path(config["output_dir"]) / FOLDER / name

    def saved(result: Result) -> None:
        shutil.rmtree(folder / ARTEFACT, ignore_errors=True)  # of a run that was killed before its record
        facts = {"run_id": name, "valid": result.metrics["valid"], "seed": config["seed"]}
        Artefact.of(result.model, dataset.schema, **facts).save(folder / ARTEFACT)

    while True:
        try:
            with RunFolder.open(folder) as home:
                home.claim(name)
                job = Job(config, home, dataset, shared, sealed=SEALED)
                record = job.earlier()
                found = (
                    record is not None and record["status"] == "completed" and (folder / ARTEFACT / MANIFEST).exists()
                )
                told(f"source {' + '.join(config['target'])}: {'found in' if found else 'trained in'} {folder}")
                if not found:
                    parts = build_parts(config) | {"should_stop": should_stop}
                    job.handover = hand_over(config, shared)
                    if name in shared.failed:
                        raise shared.failed[name]
                    try:
                        record = job.train(parts, kept=saved)
                    except TrainingError as error:
                        shared.failed[name] = error
                        raise
                return Artefact.read(folder / ARTEFACT), record
        except RunFolderError as error:
            if IN_USE not in str(error):
                raise
        if should_stop():  # another process trains the same source
            raise Interrupted(f"stopped while '{folder}' was trained by another process")
        time.sleep(WAIT_SECONDS)


def _chosen(
    config: Mapping[str, Any], shared: Shared, should_stop: Callable[[], bool], told: Callable[[str], None]
) -> tuple[list[str], dict[str, float | None]]:
    """The sources, and the scores that chose them."""
    candidates, scores = domains_of(config["source"]), {}

    def score(name: str) -> float | None:
        alone = source_config(config, [name])
        data = shared.dataset(alone)
        if config["select"] == "largest":
            scores[name] = float(len(data.splits["train"]))
            return scores[name]
        artefact, record = trained_source(alone, shared, should_stop, told)
        monitor = record["monitor"]
        lower = monitor["name"].rsplit("/", 1)[-1] in LOWER_IS_BETTER
        scores[name] = -monitor["value"] if lower and monitor["value"] is not None else monitor["value"]
        if config["select"] == "gradient_cosine":
            dataset = shared.continuation(shared.dataset(config), data)
            model = load(build_model(config, dataset), dataset.schema, artefact, **_options(config)).model
            rows = encode(data.part("train"), dataset.schema), dataset.for_training().train
            scores[name] = gradient_cosine(model, dataset.schema.tasks, *rows)
        return scores[name]

    return choose(candidates, config["select"], seed=config["seed"], score=score), scores


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    pairs = config["loading"]["map"]
    return dict(config["loading"]) | {"map": pairs and [tuple(pair) for pair in pairs]}


def _loaded(config: Mapping[str, Any], model: Any, dataset: Any, artefact: Artefact, adaptation: Adaptation) -> Loading:
    loading = load(model, dataset.schema, artefact, **_options(config))
    if loading.reinitialised and not (adaptation.trains and adaptation.needs_source):
        what = "reads what the source's model says" if adaptation.trains else "trains nothing"
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' {what}, and {list(loading.reinitialised)} did not come from the "
            "source; expected towers of the source for all tasks. Leave the tasks out (data.tasks), or fine-tune"
        )
    return loading


def _report(loading: Loading) -> dict[str, Any]:
    return {
        "loaded": len(loading.loaded),
        "reinitialised": list(loading.reinitialised),
        "dropped": list(loading.dropped),
        "coverage": {path: dict(found._asdict()) for path, found in loading.coverage.items()},
        "rescaled": list(loading.rescaled),
    }
