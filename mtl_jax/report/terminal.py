"""One run as a table in the terminal: every task beside what it has to beat."""

import os
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtl_jax.report.compare import (
    AUCS,
    baseline_value,
    below_baseline,
    best_gain,
    delta_m_against,
    delta_m_c_against,
    mean_best_gain,
    reported_part,
    shown_baselines,
    task_value,
)
from mtl_jax.report.record import data_text, domains_text, method_text

Record = Mapping[str, Any]
WITH_POSITIVES = ("binary", "multilabel", "zero_inflated")
FLAGS = {
    "reopened": "the test part was opened for different selections: its numbers are not a clean estimate",
    "oracle": "the checkpoint was chosen with test labels: never rank this run with others",
    "leak": "the leakage guard has flagged this data: read the record's data.leakage",
    "transductive": "unlabelled rows of the test part were used in training",
}


def result_table(record: Record, *, reference: Record | None = None) -> Table:
    """One row a task: the monitored metric of the model, of the trivial baselines and of the single-task reference.

    The last column is the gain over the best trivial baseline; a negative one is marked ``below baseline``.

    Args:
      record: Of the run.
      reference: Record of the single-task run of the same data, split, tasks and seed.
    """
    part = reported_part(record)
    method = record["method"]
    title = f"{method_text(method)} on {data_text(record['data'])}{domains_text(record)}, "
    title += f"{part} part" if part else "nothing evaluated"
    if part == "valid":
        title += " (the test part is unopened)"
    heading = Text(title, style="bold")
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("task\n(positives / rows)", no_wrap=True)
    table.add_column("metric\n(better)")
    table.add_column("model", justify="right", style="bold")
    baselines = shown_baselines(record)
    for name in baselines:
        table.add_column(name.replace("_mean", "\nmean").replace("_", " "), justify="right")
    if reference is not None:
        table.add_column("scratch" if method.get("transfer") else "single\ntask", justify="right")
    table.add_column("gain over\nbest baseline", justify="right", no_wrap=True)
    for task, facts in record["tasks"].items():
        cells = [
            _two_lines(task, _support(record, task)),
            _two_lines(facts["metric"], facts["direction"]),
            _number(task_value(record, task)),
            *(_number(baseline_value(record, name, task)) for name in baselines),
        ]
        if reference is not None:
            cells.append(_number(task_value(reference, task)))
        table.add_row(*cells, _gain(record, task))
    return table


def print_result(
    record: Record,
    console: Console,
    *,
    reference: Record | None = None,
    reference_command: str | None = None,
    folder: str | os.PathLike | None = None,
) -> None:
    """Prints the table, what it amounts to, and how much it can be trusted.

    Args:
      record: Of the run.
      console: To print on.
      reference: Record of the single-task run; see :func:`mtl_jax.report.find.single_task_reference`.
      reference_command: The command that makes the reference, shown where there is none.
      folder: The run folder; the run id is shown where it is not given.
    """
    if record["status"] != "completed":
        error = record.get("error")
        reason = f": {error['class']}: {error['message']}" if error else ""
        console.print(Text(f"run {record['status']}{reason}", style="bold red"))
    console.print(result_table(record, reference=reference))
    for note in _notes(record):
        console.print(Text(note, style="yellow"))
    lines = [*_summary(record, reference, reference_command), *_cost(record), *_tuning(record), *_trust(record)]
    lines.append(("run folder", os.fspath(folder)) if folder is not None else ("run", record["run_id"]))
    for label, text in lines:
        console.print(Text.assemble((f"{label:<16}", "dim"), text), highlight=False, soft_wrap=True)


def _support(record: Record, task: str) -> str:
    facts = record["tasks"][task]
    part = reported_part(record)
    support = record["support"][part].get(task, {}).get(facts["metric"], {}) if part else {}
    rows, positives = support.get("n"), support.get("positives")
    if rows is None:
        return facts["kind"]
    if facts["kind"] in WITH_POSITIVES and positives is not None:
        return f"{facts['kind']} {positives:,.0f} / {rows:,}"
    return f"{facts['kind']} {rows:,}"


def _gain(record: Record, task: str) -> Text:
    gain = best_gain(record, task)
    if gain is None:
        return Text("n/a", style="dim")
    over = f"over {gain.baseline}"
    if gain.value < 0:
        return Text.assemble((f"{100 * gain.value:+.2f} %", "bold red"), "\n", ("below baseline", "bold red"))
    return Text.assemble((f"{100 * gain.value:+.2f} %", "green"), "\n", (over, "dim"))


def _notes(record: Record) -> list[str]:
    """Why a value is n/a, and the flags that are up."""
    part = reported_part(record)
    notes = []
    for task, facts in record["tasks"].items():
        if part and task_value(record, task) is None:
            support = record["support"][part].get(task, {}).get(facts["metric"], {})
            notes.append(f"n/a: {task} {facts['metric']}: {support.get('reason') or 'not evaluated'}")
        missing = [name for name in shown_baselines(record) if baseline_value(record, name, task) is None]
        if missing and part:
            notes.append(f"n/a: {task} has no {facts['metric']} for {', '.join(missing)}")
    absent = [name for name in ("global_mean", "logistic") if name not in record["baselines"]]
    if absent and part:
        notes.append(f"the record has no {' and no '.join(absent)} baseline: the gain is over those that it has")
    notes += [f"{flag}: {meaning}" for flag, meaning in FLAGS.items() if record["flags"][flag]]
    worse = below_baseline(record)
    if worse:
        notes.append(f"below baseline: {', '.join(worse)}; a predictor without a network does better there")
    return notes


def _summary(record: Record, reference: Record | None, command: str | None) -> list[tuple[str, str]]:
    part, count = reported_part(record), len(record["tasks"])
    gain = mean_best_gain(record)
    if gain is None:
        mean = "n/a: a task has no value, or no baseline"
    else:
        mean = f"{100 * gain:+.2f} % over the best trivial baseline of each task, mean of {count} ({part})"
    lines = [("mean gain", mean)]
    if record["method"].get("transfer"):
        return [*lines, *_transfer(record, reference, command)]
    if reference is None and record["method"]["sharing"] == "single_task":
        return [*lines, ("delta_m", "this is a single-task run: the reference of other runs")]
    if reference is None:
        missing = "n/a: no single-task run of the same data, split, tasks and seed"
        return [*lines, ("delta_m", f"{missing}. To make it:\n  {command}" if command else missing)]
    delta = delta_m_against(record, reference)
    if delta is None:
        return [*lines, ("delta_m", f"n/a: a task has no value here or in run {reference['run_id']}")]
    lines.append(("delta_m", f"{delta:+.2f} % against single task, positive = better (run {reference['run_id']})"))
    centred = delta_m_c_against(record, reference)
    if centred is not None and any(facts["metric"] in AUCS for facts in record["tasks"].values()):
        lines.append(("delta_m_c", f"{centred:+.2f} % with AUC - 1/2 in place of AUC"))
    return lines


def _transfer(record: Record, reference: Record | None, command: str | None) -> list[tuple[str, str]]:
    """What the source was worth, task by task, and what was lost on it."""

    def listed(values: Mapping[str, float | None]) -> str:
        return ", ".join(f"{task} {'n/a' if value is None else f'{value:+.4f}'}" for task, value in values.items())

    forgetting = record.get("transfer", {}).get("forgetting")
    lost = (
        [("forgetting", f"{listed(forgetting)} on the source's validation part, positive = lost")] if forgetting else []
    )
    if reference is None:
        missing = "n/a: no run from scratch of the same method, data, split, tasks and seed. To make it:"
        return [("transfer gain", f"{missing}\n  {command}"), *lost]
    gains = {}
    for task, facts in record["tasks"].items():
        with_source, without = task_value(record, task), task_value(reference, task)
        sign = 1.0 if facts["direction"] == "higher" else -1.0
        gains[task] = None if with_source is None or without is None else sign * (with_source - without)
    return [("transfer gain", f"{listed(gains)} over scratch (run {reference['run_id']}), positive = better"), *lost]


def _cost(record: Record) -> list[tuple[str, str]]:
    timing = record["timing"]
    rate, compiling, wall = timing["examples_per_second"], timing["compile_seconds"], timing["wall_seconds"]
    parts = [
        "n/a examples/s" if rate is None else f"{rate:,.0f} examples/s",
        "compile n/a" if compiling is None else f"compile {compiling:,.1f} s",
        "wall n/a" if wall is None else f"wall {wall:,.1f} s",
    ]
    return [("speed", ", ".join(parts))]


def _tuning(record: Record) -> list[tuple[str, str]]:
    """Of each artefact of what was tuned: its numbers beside those of its base."""
    found = [one["artefact_numbers"] for one in record.get("stages", ()) if "artefact_numbers" in one]
    return [("tuning", f"{one['tuning']:,} numbers kept, for a base of {one['base']:,}") for one in found]


def _trust(record: Record) -> list[tuple[str, str]]:
    monitor, seed = record["monitor"], record["seed"]
    lines = []
    if monitor["name"] and monitor["step"] is not None:
        value = _number(monitor["value"]).plain
        text = f"{record['selector']}: {monitor['name']} {value} on valid at step {monitor['step']:,}"
        lines.append(("checkpoint", text))
    advice = f"{seed}; one seed has no interval. Run more seeds (seed={seed + 1}, seed={seed + 2}, ...) to get one"
    return [*lines, ("seed", advice)]


def _two_lines(first: str, second: str) -> Text:
    return Text.assemble(first, "\n", (second, "dim"))


def _number(value: float | None) -> Text:
    if value is None:
        return Text("n/a", style="dim")
    return Text(f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}")
