"""One configured run: data, model, training, the one look at the test part, and the run folder that is left."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mtl_jax.config import plain
from mtl_jax.data.batching import as_batch
from mtl_jax.errors import ConfigError
from mtl_jax.handover import hand_over
from mtl_jax.job import Job, Shared, name_of
from mtl_jax.report.find import scratch_command, scratch_reference, single_task_command, single_task_reference
from mtl_jax.report.folder import RunFolder
from mtl_jax.report.gates import plot_gates
from mtl_jax.report.plot import plot_run
from mtl_jax.report.terminal import print_result
from mtl_jax.run_config import COMMAND_KEYS, build_model, build_parts, check_config
from mtl_jax.source import in_order
from mtl_jax.summary import print_summary

PLAIN_WIDTH = 110
"""Columns of the printed result where standard output is not a terminal."""


def run(
    config: Any,
    *,
    names: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    sealed: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs a configuration to its result record, or goes on where an earlier run of it stopped.

    Args:
      config: With the keys of ``conf/train.yaml``.
      names: Names of the chosen nodes (``sharing``, ``link``, ``balancing``), for the record; those of the targets by
        default.
      folder: Run folder; ``<output_dir>/train/<run id>`` by default.
      overrides: The user's own, for the command that makes the single-task reference.
      console: Where the result is printed; standard output by default.
      sealed: Why the test part must stay closed. The run then ends with its validation part, and this in the record.
      should_stop: Is asked while training; True ends the run after a checkpoint.

    Returns:
      The record, as in ``result.json``.

    Raises:
      Interrupted: ``should_stop`` said so; the record then says ``interrupted``.
      MtlJaxError: What the user can mend; the record then says ``failed``, and checkpoints stay.
    """
    config = {key: value for key, value in plain(config).items() if key not in COMMAND_KEYS}
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    check_config(config)
    config = in_order(config)
    if config["folds"] is not None:
        raise ConfigError(f"folds is {config['folds']} in one run; expected null. Use mtl_jax.cross_validate for folds")
    parts = build_parts(config) | {"should_stop": should_stop}
    shared = Shared()
    dataset = shared.dataset(config)
    name = name_of(config, dataset)
    root = Path(config["output_dir"]) / "train"
    with RunFolder.open(folder or root / name) as home:
        home.claim(name)
        job = Job(config, home, dataset, shared, names=names, sealed=sealed)
        record = job.earlier()
        if record is None or record["status"] != "completed":
            with job.recorded():
                job.handover = hand_over(config, shared, should_stop, told=functools.partial(print, file=sys.stderr))
            record = job.train(parts)
        else:
            console.print(f"finished on {record['timing']['started']}; nothing to train")
        outputs, transferred = Path(config["output_dir"]), record["method"]["transfer"] is not None
        if transferred:
            reference = scratch_reference(outputs, record)
        else:
            reference = single_task_reference(outputs, record)
            if record["method"]["sharing"] == "single_task":
                reference = None
        plot_run(record, home.read_history(), home.path / "result.png", reference=reference)
        plot_gates(record, home.path / "gates.png")
        command = (scratch_command if transferred else single_task_command)(record, list(overrides))
        print_result(record, console, reference=reference, reference_command=command, folder=home.path)
    return record


def summarise(config: Any, console: Console | None = None) -> None:
    """Prints the model of a configuration for its data; nothing is trained or written."""
    config = plain(config)
    check_config(config)
    build_parts(config)
    shared = Shared()
    dataset = shared.dataset(config)
    console = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    print_summary(build_model(config, dataset), as_batch(dataset.for_training().valid), console)
