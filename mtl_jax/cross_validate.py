"""Cross-validation: k ordinary runs inside train and valid, and what they say together. The test part stays closed."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtl_jax.config import build, plain
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.report import statistics
from mtl_jax.report.folder import RunFolder, config_hash, run_id
from mtl_jax.report.record import data_text
from mtl_jax.report.statistics import LEVEL
from mtl_jax.run import PLAIN_WIDTH, run
from mtl_jax.run_config import COMMAND_KEYS, check_config

RESULT = "cross_validation.json"
SEALED = "cross-validation: every fold is cut out of train and valid, and the test part is kept for the final choice"
NOTE = (
    "each fold chose its checkpoint on the rows that it reports, and folds share training rows: the interval is too "
    "narrow, and good for choosing between configurations only"
)


def cross_validate(
    config: Any,
    *,
    names: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    console: Console | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs ``config.folds`` folds one after another and prints mean, deviation and interval of every metric.

    Fold i is the run with ``data.split_folds=k data.split_fold=i``, in the subfolder ``fold-i``: resumable like any
    other, with the vocabularies and moments of its own training rows, and without the test part. The same command
    prints a finished cross-validation, and goes on in the fold and epoch where an earlier one stopped.

    Args:
      config: With the keys of ``conf/train.yaml``; ``folds`` is k >= 2.
      names: Names of the chosen nodes, for the records.
      folder: Where all goes; ``<output_dir>/cross_validation/<run id>`` by default.
      console: Where it is printed; standard output by default.
      should_stop: As for :func:`mtl_jax.run.run`.

    Returns:
      What ``cross_validation.json`` holds: ``metrics[task][metric]`` with ``mean``, ``std``, ``interval`` and ``n`` on
      the validation folds, ``folds`` with the value and the run id of each, and ``metrics_test`` null.

    Raises:
      Interrupted: ``should_stop`` said so.
      MtlJaxError: As :func:`mtl_jax.run.run`; finished folds stay finished.
    """
    config = {key: value for key, value in plain(config).items() if key not in COMMAND_KEYS}
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    check_config(config)
    count = config["folds"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ConfigError(f"folds is {count}; expected a whole number >= 2, or null for one ordinary run. Set folds")
    held = config["data"].get("split_fold")
    if held is not None:
        raise ConfigError(
            f"data.split_fold is {held} with folds={count}; expected null, since all folds run. Remove it"
        )
    configs = [_of_fold(config, count, fold) for fold in range(count)]
    # The first fold stands for all: their data differ in the cut only.
    identity = build(configs[0]["data"], allow=config["allow"], place="data").identity
    name = run_id(configs[0], seed=config["seed"], data_identity=identity)
    with RunFolder.open(folder or Path(config["output_dir"]) / "cross_validation" / name) as home:
        home.claim(name)
        summary = home.read_json(RESULT)
        if summary is None:
            shared = {"names": names, "console": Console(quiet=True), "sealed": SEALED, "should_stop": should_stop}
            records = []
            for fold, of_fold in enumerate(configs):
                if fold and should_stop():
                    raise Interrupted(f"stopped after fold {fold}/{count}")
                console.print(Text(f"fold {fold + 1}/{count}", style="bold"))
                records.append(run(of_fold, folder=home.path / f"fold-{fold}", **shared))
                console.print(Text(_line(records[-1], home.path / f"fold-{fold}")), soft_wrap=True)
            summary = {"run_id": name, "config_hash": config_hash(configs[0])} | summarise(records)
            home.write_json(RESULT, summary)
        else:
            console.print("finished; nothing to train")
        print_summary(summary, console, folder=home.path)
    return summary


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and interval of every validation metric over the records of the folds.

    See :func:`over_folds`; plain JSON types.
    """
    first = records[0]
    metrics: dict[str, dict[str, Any]] = {}
    for task, facts in first["metrics"]["valid"].items():
        values = {name: [record["metrics"]["valid"][task][name] for record in records] for name in facts}
        metrics[task] = {name: over_folds(of_folds) for name, of_folds in values.items()}
    return {
        "method": first["method"],
        "tasks": first["tasks"],
        "data": {key: first["data"][key] for key in ("name", "recipe", "split")},
        "seed": first["seed"],
        "metrics": metrics,
        "metrics_test": None,
        "sealed": SEALED,
        "level": LEVEL,
        "note": NOTE,
        "folds": [
            {
                "run_id": record["run_id"],
                "rows": {part: record["data"]["rows"][part] for part in ("train", "valid")},
                "monitor": record["monitor"],
                "metrics": record["metrics"]["valid"],
            }
            for record in records
        ],
    }


def over_folds(values: Sequence[float | None]) -> dict[str, Any]:
    r"""Mean, standard deviation s (n - 1), and the interval of Student's t.

    .. math:: \bar x \pm t_{0.975,\,n-1}\; s / \sqrt n

    Args:
      values: One a fold; None where the metric is undefined, which is left out.

    Returns:
      ``{mean, std, interval: [low, high], n}``; None for what needs more values: one for the mean, two for the rest.

    References:
      Folds are not independent, and no unbiased estimate of the variance exists: Bengio and Grandvalet, *No Unbiased
      Estimator of the Variance of K-Fold Cross-Validation*, JMLR 5, 2004.
    """
    found = statistics.summary(dict(enumerate(values)))
    interval = None if found.interval is None else list(found.interval)
    return {"mean": found.mean, "std": found.std, "interval": interval, "n": found.n}


def print_summary(summary: Mapping[str, Any], console: Console, *, folder: Path) -> None:
    """The table of a cross-validation, and how far it can be trusted."""
    method, data, count = summary["method"], summary["data"], len(summary["folds"])
    title = f"{method['sharing']} + {method['balancing']} on {data_text(data)}, {count} folds of train and valid"
    console.print(Text(f"{title} (the test part is unopened)", style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("task", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("mean", "std", f"{LEVEL:.0%} interval".replace("%", " %"), "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, metrics in summary["metrics"].items():
        for name, facts in metrics.items():
            interval = "n/a" if facts["interval"] is None else "{:.4f} to {:.4f}".format(*facts["interval"])
            style = "bold" if name == summary["tasks"][task]["metric"] else None
            table.add_row(
                task, name, _number(facts["mean"]), _number(facts["std"]), interval, str(facts["n"]), style=style
            )
    console.print(table)
    for label, text in (("note", summary["note"]), ("run folder", str(folder))):
        console.print(Text.assemble((f"{label:<16}", "dim"), text), highlight=False, soft_wrap=True)


def _of_fold(config: Mapping[str, Any], count: int, fold: int) -> dict[str, Any]:
    return {**config, "folds": None, "data": config["data"] | {"split_folds": count, "split_fold": fold}}


def _line(record: Mapping[str, Any], folder: Path) -> str:
    monitor = record["monitor"]
    value = "n/a" if monitor["value"] is None else f"{monitor['value']:.4f}"
    return f"  {monitor['name']} {value} at step {monitor['step']}, {folder}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
