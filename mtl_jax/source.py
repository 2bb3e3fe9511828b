"""Source and target of a configuration: which rows they have, the run that trains the source, and what it hands over."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mtl_jax import metrics
from mtl_jax.arguments import shown
from mtl_jax.config import build
from mtl_jax.data.dataset import Dataset, Encoded
from mtl_jax.data.domains import check_domains, of_domains
from mtl_jax.data.encode import encode
from mtl_jax.data.reduction import Reduction
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.train.adaptation import Adaptation, Origin
from mtl_jax.train.result import Result
from mtl_jax.transfer import Artefact, Loading, tuning_of
from mtl_jax.transfer.lin_int import interpolated
from mtl_jax.transfer.select import SELECTS

LOADING = {"map": None, "drop": [], "reinit": [], "new_rows": "fresh"}
"""Options of loading, with their defaults."""
WHOLE = {"target_fraction": 1.0, "valid_fraction": None}
SCRATCH = {"_target_": "mtl_jax.transfer.Scratch"}


def domains_of(given: Any) -> list[str]:
    """Names of domains, from one name, a list of them, or null."""
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def in_order(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with lists of domains sorted where their order means nothing, so that a run has one name.

    Rows of several domains are told by the numbers that the whole data set gives them. Several sources are an exception
    unless they are taken together: ``select`` draws one by its place, and takes the first of equals.
    """
    keys = ("target", "source") if config["select"] == "given" else ("target",)
    return dict(config) | {key: sorted(config[key]) for key in keys if isinstance(config[key], list)}


def check_transfer(config: Mapping[str, Any]) -> None:
    """Raises a ConfigError for a source, a target or a way of loading that no run can have."""
    for key in ("source", "target"):
        names = config[key]
        whole = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        if names is not None and not isinstance(names, str) and not (whole and len(set(names)) == len(names)):
            raise ConfigError(
                f"{key} is {shown(names)}; expected a domain, a list of different ones, or null. Change it"
            )
    if config["select"] not in SELECTS:
        raise ConfigError(f"select is {shown(config['select'])}; expected one of {list(SELECTS)}. Change it")
    node = config["loading"]
    if not isinstance(node, Mapping) or set(node) != set(LOADING):
        raise ConfigError(f"loading is {shown(node)}; expected a mapping with {list(LOADING)}. Change it")
    _check_patterns(node)
    if not isinstance(config["tuning_artefact"], bool):
        raise ConfigError(f"tuning_artefact is {shown(config['tuning_artefact'])}; expected true or false. Change it")
    adaptation, before = adaptation_of(config), adaptation_of(config, "pretraining")
    if before.needs_model or before.needs_rows:
        raise ConfigError(
            f"pretraining '{type(before).__name__}' takes over from a source, and a source has none itself; expected "
            "scratch, or a method that learns over domains (maml, reptile, ...). Change it"
        )
    needs = adaptation.needs_model or adaptation.needs_rows
    if needs and (config["source"] is None or config["target"] is None):
        absent = [key for key in ("source", "target") if config[key] is None]
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' takes over from a source, and {' and '.join(absent)} "
            f"{'is' if len(absent) == 1 else 'are'} null; expected domains of the data. Set "
            f"{' '.join(f'{key}=...' for key in absent)}, or transfer=scratch"
        )
    both = set(domains_of(config["source"])) & set(domains_of(config["target"]))
    if needs and both:
        raise ConfigError(f"{sorted(both)} are source and target; expected different domains. Change one of them")
    if config["target"] is not None and config["training"] != "joint":
        raise ConfigError(f"target with training={config['training']}; expected joint. transfer has stages of its own")
    if config["folds"] is not None and (config["target"] is not None or adaptation.by_domain):
        what = f"transfer '{type(adaptation).__name__}'" if config["target"] is None else "target"
        raise ConfigError(f"{what} with folds; expected null. Repeat runs by seeds= of experiments.ablate")


def _check_patterns(node: Mapping[str, Any]) -> None:
    def texts(value: Any, length: int | None = None) -> bool:
        whole = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        return whole and length in (None, len(value))

    pairs = [] if node["map"] is None else node["map"]
    if not isinstance(pairs, list | tuple) or not all(texts(pair, 2) for pair in pairs):
        raise ConfigError(
            f"loading.map is {shown(node['map'])}; expected pairs [pattern, template], or null. Write [[from, to], ...]"
        )
    for key in ("drop", "reinit"):
        if not texts(node[key]):
            raise ConfigError(f"loading.{key} is {shown(node[key])}; expected a list of patterns. Write [pattern, ...]")
    patterns = {"map": [pair[0] for pair in pairs], "drop": node["drop"], "reinit": node["reinit"]}
    for key, pattern in ((key, pattern) for key, some in patterns.items() for pattern in some):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"loading.{key} has {shown(pattern)}, which is no pattern ({error}); expected one of re. Mend it"
            ) from None


def adaptation_of(config: Mapping[str, Any], place: str = "transfer") -> Adaptation:
    """What ``transfer`` or ``pretraining`` describes."""
    made = build(config[place], allow=config["allow"], place=place)
    if not isinstance(made, Adaptation):
        raise ConfigError(
            f"{place} has _target_ {shown(config[place]['_target_'])}, which makes a {type(made).__name__}; expected "
            "an Adaptation. Choose one of conf/transfer"
        )
    return made


def source_config(config: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The run that trains the source: the same one on all rows of the source's domains, by ``pretraining``."""
    alone = {
        "transfer": config["pretraining"],
        "pretraining": SCRATCH,
        "source": None,
        "target": sorted(names),
        "select": "given",
        "loading": LOADING,
        "tuning_artefact": False,
    }
    return dict(config) | {"data": whole_data(config["data"])} | alone


def target_of(whole: Dataset, config: Mapping[str, Any]) -> Dataset:
    """The target's rows, with the share of them that the configuration keeps; unknown sources show here, too."""
    check_domains(whole, domains_of(config["source"]))
    node = config["data"]
    reduction = Reduction.of(node.get("target_fraction", 1.0), node.get("valid_fraction"))
    return of_domains(whole, domains_of(config["target"]), reduction=reduction)


def whole_data(node: Mapping[str, Any]) -> dict[str, Any]:
    """The node of the data with all of their rows."""
    return dict(node) | {key: value for key, value in WHOLE.items() if key in node}


@dataclasses.dataclass(frozen=True)
class Handover:
    """What a target's run begins with.

    Attributes:
      dataset: The target's, encoded as a continuation of the source's where there is one.
      model: With the source's values where it has them.
      adaptation: How it is trained.
      origin: What came from the source; None where nothing is loaded.
      source: Data of the source; None where there is none.
      record: Of the run that trained the source; None where nothing is loaded.
      stages: What was done before the target is trained, for the record.
      beside: The source's model, where it is a part of what is deployed.
      base: What the source handed on and how it was loaded, where the run leaves an artefact of what it changes of that.
    """

    dataset: Dataset
    model: MultiTaskModel
    adaptation: Adaptation
    origin: Origin | None = None
    source: Dataset | None = None
    record: Mapping[str, Any] | None = None
    stages: tuple[dict[str, Any], ...] = ()
    beside: MultiTaskModel | None = None
    base: tuple[Artefact, Loading] | None = None

    def rows(self, part: str) -> Encoded:
        """A part of the source as the target's model reads it."""
        return encode(self.source.part(part), self.dataset.schema)

    def for_setup(self) -> dict[str, Any]:
        """What runs that differ in seeds and numbers have in common."""
        return {"adaptation": self.adaptation, "source": self.rows("train") if self.adaptation.needs_rows else None}

    def for_fit(self) -> dict[str, Any]:
        """Arguments of :func:`mtl_jax.train.fit`."""
        return self.for_setup() | {"origin": self.origin}

    def deployed(self, result: Result) -> Result:
        """What a trained run is judged as."""
        return result if self.beside is None else interpolated(result, self.beside, self.dataset.for_training())

    def tuning(self, result: Result, **facts: Any) -> Artefact | None:
        """What a trained run changed of its base, where it leaves that."""
        if self.base is None:
            return None
        base, loading = self.base
        return tuning_of(result, self.adaptation, loading, base, self.dataset.schema, **facts)

    def evaluated(self, result: Result, tuning: Artefact | None = None) -> dict[str, Any]:
        """For the record: the stages, and what the source's validation part says of the trained model.

        ``forgetting`` is by how much a task's metric got worse there, since the source was trained.

        Args:
          result: Of the run.
          tuning: As from :meth:`tuning`.
        """
        parent = self.stages[-1]["parent_hash"] if self.stages else None
        timing = result.timing
        trained = stage(
            type(self.adaptation).__name__,
            parent,
            artefact=tuning and tuning.hash,
            steps=timing["steps"],
            seconds=timing["wall_seconds"],
        )
        if tuning is not None:
            trained["artefact_numbers"] = {"tuning": tuning.num_numbers, "base": self.base[0].num_numbers}
        found = {"stages": [*self.stages, trained], "source_slices": {}, "transfer": {"reference": None}}
        if self.source is None:
            return found
        rows, tasks = self.rows("valid"), self.dataset.schema.tasks
        values, _ = metrics.evaluate(tasks, result.predict(rows), rows)
        found["source_slices"] = {"source": {"valid": values}}
        if self.record is not None:
            before = self.record["metrics"]["valid"]
            found["transfer"]["forgetting"] = {
                task.name: _worse(before.get(task.name, {}).get(task.metric), values[task.name][task.metric], task)
                for task in tasks
            }
        return found


def stage(
    name: str,
    parent: str | None = None,
    *,
    artefact: str | None = None,
    report: Any = None,
    needs: Any = None,
    steps: int | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """One stage of a run, for its record."""
    return {
        "name": name,
        "parent_hash": parent,
        "artefact_hash": artefact,
        "loading_report": report,
        "needs": needs,
        "steps": steps,
        "wall_seconds": seconds,
    }


def _worse(before: float | None, after: float | None, task: Any) -> float | None:
    if before is None or after is None:
        return None
    return before - after if task.higher_is_better else after - before
