"""Search over continuous values: as many trials for every arm, judged on validation, with the test part closed."""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mtl_jax.ablate import run_arm
from mtl_jax.arguments import check_count, shown
from mtl_jax.errors import ConfigError, RunFolderError
from mtl_jax.job import Shared, name_of
from mtl_jax.plan import has_key, runs_of
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.selection import sign_of
from mtl_jax.run_config import KEYS

SEALED = "search: trials are judged on validation, and the test part is kept for the runs with the chosen values"
SEARCH = "search"
"""Folder of the searches, inside that of the ablation."""
ENDS, OPTIONS = {"low", "high"}, {"log", "step"}


def search_arm(
    arm: Mapping[str, Any],
    folder: str | Path,
    label: str,
    *,
    names: Mapping[str, str] | None = None,
    shared: Shared | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    told: Callable[[Mapping[str, Any]], None] = lambda study: None,
) -> dict[str, Any]:
    """Tries ``trials`` points of the arm's space and returns the study, as ``search/<label>/study.json`` holds it.

    A trial is the mean monitored number on validation over ``search_seeds`` seeds. One that fails, or has no finite
    number, counts like the others. The sampler is the tree-structured Parzen estimator, and trial k draws with seed k:
    the points depend on the trials before and on nothing else, so that a search that was killed goes on as if it had
    not been, and every arm begins at the same points. Trials that differ in numbers only share a compiled program.

    Args:
      arm: As for :func:`mtl_jax.ablate.run_arm`, with ``search``, ``trials`` and ``search_seeds``.
      folder: Of the ablation.
      label: Of the arm, in names of files.
      names: As for ``run_arm``.
      shared: What this process has loaded before.
      should_stop: Is asked while training.
      told: Is given the study after every trial.

    Returns:
      ``{space, seeds, trials: [{values, status, value, merit, run_ids}], chosen}``; ``chosen`` are the values of the
      best trial, None where all failed.

    Raises:
      ConfigError: The space cannot be searched, or optuna is missing.
      RunFolderError: The folder holds the search of another space.
      Interrupted: ``should_stop`` said so.

    References:
      Bergstra, Bardenet, Bengio and Kegl, *Algorithms for Hyper-Parameter Optimization*, NeurIPS 2011; Akiba et al.,
      *Optuna*, KDD 2019, arXiv:1907.10902.
    """
    check_search(arm)
    space = space_of(arm)
    # Kept apart from what a process keeps for all arms, and let go with this search.
    shared = dataclasses.replace(shared or Shared(), programs={})
    place = Path(folder) / SEARCH
    with RunFolder.open(place / label) as home:
        study = home.read_json("study.json") or {"space": space, "seeds": arm["search_seeds"], "trials": []}
        _check_same(study, arm, space, home.path)
        while len(study["trials"]) < arm["trials"]:
            number = len(study["trials"])
            values = ask(space, study["trials"], number)
            study["trials"].append(_tried(arm, home.path, values, names, shared, should_stop))
            study["chosen"] = best(study["trials"])
            home.write_json("study.json", study)
            told(study)
    return study


def check_search(arm: Mapping[str, Any]) -> None:
    """Raises a ConfigError for a search that cannot be done; nothing is run."""
    check_count(arm["trials"], "trials")
    check_count(arm["search_seeds"], "search_seeds")
    flat_space(arm["search"])
    if arm["axis"]:
        raise ConfigError(
            f"search is {shown(arm['search'])} and axis is {shown(arm['axis'])}; expected one of them, since every arm is "
            "tuned in one way. Leave one out"
        )
    _optuna()


def space_of(arm: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted key -> its range, for the keys that this arm has."""
    run = {key: arm[key] for key in KEYS if key in arm}
    return {key: ends for key, ends in flat_space(arm["search"]).items() if has_key(run, key)}


def flat_space(search: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Dotted key -> ``{low, high, log, step}``, from the nested mapping that ``search.<key>={low: .., high: ..}`` makes.

    Example:
      >>> from mtl_jax.search import flat_space
      >>> flat_space({"optimizer": {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}}})
      {'optimizer.learning_rate': {'low': 1e-05, 'high': 0.01, 'log': True, 'step': None}}
    """
    if not isinstance(search, Mapping):
        raise ConfigError(
            f"search{'.' + prefix.rstrip('.') if prefix else ''} is {shown(search)}; expected a range. Write "
            f"search.{prefix.rstrip('.') or '<key>'}={{low: .., high: ..}}"
        )
    if ENDS & set(search):
        return {prefix.rstrip("."): _range(search, prefix.rstrip("."))}
    flat: dict[str, dict[str, Any]] = {}
    for key, value in search.items():
        flat |= flat_space(value, f"{prefix}{key}.")
    return flat


def ask(space: Mapping[str, Mapping[str, Any]], trials: list[Mapping[str, Any]], number: int) -> dict[str, Any]:
    """The point of trial ``number``, after the trials before it."""
    optuna = _optuna()
    distributions = {key: _distribution(optuna, ends) for key, ends in space.items()}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=number))
    for trial in trials:
        failed = trial["merit"] is None
        study.add_trial(
            optuna.trial.create_trial(
                params=trial["values"],
                distributions=distributions,
                value=None if failed else trial["merit"],
                state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
            )
        )
    return {key: _short(value, space[key]) for key, value in study.ask(distributions).params.items()}


def best(trials: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The values of the best trial, the first among equals; None where all failed."""
    able = [trial for trial in trials if trial["merit"] is not None]
    return dict(max(able, key=lambda trial: trial["merit"])["values"]) if able else None


def _tried(
    arm: Mapping[str, Any],
    folder: Path,
    values: Mapping[str, Any],
    names: Mapping[str, str] | None,
    shared: Shared,
    should_stop: Callable[[], bool],
) -> dict[str, Any]:
    """One trial, as the study keeps it."""
    point = {key: copy.deepcopy(value) for key, value in arm.items()}
    point |= {"seeds": arm["search_seeds"], "axis": {key: [value] for key, value in values.items()}, "retry": False}
    trial: dict[str, Any] = {"values": dict(values), "monitor": None, "value": None, "merit": None, "run_ids": []}
    try:
        run_ids = [name_of(one.config, shared.dataset(one.config)) for one in runs_of(point)]
    except ConfigError as error:  # a point that no run can have
        return trial | {"status": "failed", "error": str(error)}
    run_arm(point, folder, names=names, shared=shared, should_stop=should_stop, sealed=SEALED)
    records = [json.loads((folder / "runs" / run_id / "result.json").read_bytes()) for run_id in run_ids]
    trial |= {"run_ids": run_ids, "status": "failed"}
    for record in records:
        if record["status"] != "completed":
            return trial | {"error": (record.get("error") or {}).get("message")}
    monitors = [record["monitor"]["value"] for record in records]
    trial["monitor"] = records[0]["monitor"]["name"]
    if any(value is None or not math.isfinite(value) for value in monitors):
        return trial | {"error": "the monitored number is not finite"}
    value = math.fsum(monitors) / len(monitors)
    return trial | {"status": "completed", "value": value, "merit": sign_of(records[0]) * value}


def _check_same(study: Mapping[str, Any], arm: Mapping[str, Any], space: Mapping[str, Any], path: Path) -> None:
    if (study["space"], study["seeds"]) != (space, arm["search_seeds"]):
        raise RunFolderError(
            f"'{path}' holds a search over {study['space']} with {study['seeds']} seeds; expected {space} with "
            f"{arm['search_seeds']}. Choose another folder= or name="
        )


def _range(ends: Mapping[str, Any], key: str) -> dict[str, Any]:
    unknown = set(ends) - ENDS - OPTIONS
    low, high, log, step = (ends.get(name) for name in ("low", "high", "log", "step"))
    numbers = [value for value in (low, high, step) if value is not None]
    fine = (
        not unknown
        and not (log and step)
        and log in (None, True, False)
        and all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
        and None not in (low, high)
        and low < high
        and (not log or low > 0)
        and (step is None or step > 0)
    )
    if not fine:
        raise ConfigError(
            f"search.{key} is {shown(dict(ends))}; expected low < high, both finite, with log: true (low above 0) or "
            "step: (above 0), or neither. Correct it"
        )
    return {"low": low, "high": high, "log": bool(log), "step": step}


def _short(value: float, ends: Mapping[str, Any]) -> float:
    """Four digits, inside the range; more tell nothing, and tables and commands show them."""
    if isinstance(value, int) or ends["step"]:
        return value
    return min(max(float(f"{value:.4g}"), ends["low"]), ends["high"])


def _distribution(optuna: Any, ends: Mapping[str, Any]) -> Any:
    """Whole numbers where all that is given is whole."""
    given = [value for value in (ends["low"], ends["high"], ends["step"]) if value is not None]
    if all(isinstance(value, int) for value in given):
        return optuna.distributions.IntDistribution(ends["low"], ends["high"], log=ends["log"], step=ends["step"] or 1)
    return optuna.distributions.FloatDistribution(ends["low"], ends["high"], log=ends["log"], step=ends["step"])


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(
            f"search needs optuna, which cannot be imported ({error}); expected the extra. "
            "Run: pip install 'mtl_jax[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for every study and trial otherwise
    return optuna
