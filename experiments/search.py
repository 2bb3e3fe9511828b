"""The search of an ablation: every arm is tuned with as many trials, then runs its seeds with what was found."""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher

from experiments.cli import FAILURE, stop
from experiments.launch import launch
from mtl_jax.arms import Arm
from mtl_jax.errors import ConfigError
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.selection import settings
from mtl_jax.search import SEARCH, best, check_search, flat_space, space_of

Composed = tuple[str, str, dict[str, Any]]
"""Name of an arm, name of its data, its configuration."""


def searched(
    arms: Sequence[Arm],
    compose: Callable[[Arm], Composed],
    launcher: Launcher,
    folder: Path,
    written: Callable[[Any], str],
) -> tuple[list[Arm], dict[str, Any]]:
    """The arms with the values that their searches found, one job an arm, and what the plan says about the search.

    An arm without any of the keys has nothing to search, and stays as it is. ``written`` makes overrides of values.
    """
    composed = [(arm, *compose(arm)) for arm in arms]
    spaces = [space_of(config) for *_, config in composed]
    first = composed[0][-1]
    for _, _, _, config in composed:
        check_search(config)
    for key in flat_space(first["search"]):
        if not any(key in space for space in spaces):
            raise ConfigError(f"search.{key} names no key of any arm; expected one that --cfg job shows. Correct it")
    labels = [_label(data, name) for _, name, data, _ in composed]
    trials = first["trials"]
    jobs = [
        [*arm.overrides, f"folder={written(str(folder))}", f"searching={written(label)}"]
        for arm, space, label in zip(arms, spaces, labels, strict=True)
        if space and len(_trials(folder, label)) < trials
    ]
    if jobs:
        print(f"search: {trials} trials of each of {sum(map(bool, spaces))} arms in {folder}", file=sys.stderr)
        launch(launcher, jobs)
    found = []
    for arm, space, label in zip(arms, spaces, labels, strict=True):
        tried = _trials(folder, label)[:trials]
        values = best(tried)
        if space and values is None:
            errors = [trial["error"] for trial in tried] or ["the search did not begin"]
            stop(f"all {len(tried)} trials of {label} failed, the last one: {errors[-1]}", FAILURE)
        chosen = (f"++axis.{key}=[{written(value)}]" for key, value in values.items()) if space else ()
        found.append(arm._replace(overrides=(*arm.overrides, *chosen)))
    return found, {"space": flat_space(first["search"]), "trials": trials, "seeds": first["search_seeds"]}


def settled(earlier: Mapping[str, Any] | None, members: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The earlier plan without the values that a longer search chooses no more; an arm is compared at one point."""
    if earlier is None:
        return None
    chosen = {(m["data"], m["arm"]): m["values"] for m in members}
    kept = [m for m in earlier["members"] if chosen.get((m["data"], m["arm"]), m["values"]) == m["values"]]
    return {**earlier, "members": kept}


def search_name(search: Any, seeds: int) -> str:
    """What a folder is named by beside its arms: the ranges, and the seeds of a trial. More trials go on there."""
    facts = [flat_space(search), seeds]
    return "search-" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def tell(label: str, study: Mapping[str, Any], trials: int) -> None:
    """A line for the trial that has just ended."""
    last = study["trials"][-1]
    what = last["error"] if last["status"] == "failed" else f"{last['monitor']} {last['value']:.4f}"
    print(f"trial {len(study['trials'])}/{trials} of {label}: {what}, {settings(last['values'])}", file=sys.stderr)


def _label(data: str, name: str) -> str:
    """A name for files. Where characters are lost, a few digits keep it apart from others."""
    name = f"{data}-{name}"
    kept = re.sub(r"[^\w+=.,-]", "_", name)
    return kept if kept == name else f"{kept}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _trials(folder: Path, label: str) -> list[dict[str, Any]]:
    return (RunFolder(folder / SEARCH / label).read_json("study.json") or {"trials": []})["trials"]
