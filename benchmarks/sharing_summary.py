"""The record of benchmarks/sharing_cost.py: medians and ratios of what was measured, as tables and in sentences."""

import operator
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.balancing_summary import QUIET, groups, print_table
from benchmarks.sharing_worker import COMPARED, PEERS, REFERENCE, STRATEGIES
from benchmarks.train_throughput import OURS

COLUMNS = (
    "strategy", "widths", "parameters", "forward kFLOP", "ms", "examples/s", f"x {REFERENCE}", "GFLOP/s", "of GEMM",
)  # fmt: skip
COMPARED_COLUMNS = ("model", "sizes", "library", "parameters", "ms", "examples/s", "ours is")
EXPERT_COLUMNS = ("experts", "stacked ms", "loop ms", "stacked is")
DIFFERENCES = (
    "torch-rechub has a batch normalisation after every layer but the last of a tower, also in its gates, and biases in "
    "its gates; deepctr-torch has a gate on the last level of its PLE that nothing reads. Neither can be turned off. Both "
    "multiply chances in ESMM, where ours chains logits; the AITM of torch-rechub lacks the penalty on rising chances"
)
MIN_EXPERTS = 4

# Of each kind: how it reads before the libraries, limit, how a ratio is compared with it, and the models it is about.
GOALS: tuple[tuple[str, float, Callable[[float, float], bool], tuple[str, ...]], ...] = (
    ("is faster than", 1.0, operator.gt, tuple(COMPARED)),
    (
        "is at least 1.5 x as fast as",
        1.5,
        operator.ge,
        tuple(name for name, entry in COMPARED.items() if entry.strategy in ("mmoe", "ple")),
    ),
)


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, and the goals.

    Args:
      record: ``equal_runs`` (a line a round and strategy with ``seconds`` of a pass, ``parameters``, and of an example
        ``forward_flop`` and ``flop``), ``compared_runs`` (a line a round and model with library -> ``seconds`` and
        ``parameters``), ``expert_runs`` (a line a round and number with layout -> ``seconds``), ``widths``,
        ``gemm_gflops`` and ``settings``.

    Returns:
      ``equal``: one a strategy, with the medians, ``relative``, the speed over that of the reference in the same round,
      and ``share_of_gemm``. ``compared``: one a model, with library -> ``seconds``, ``examples_per_second``,
      ``parameters``, and ``speed``, ours over theirs within a round (above 1 ours is faster). ``experts``: one a number,
      with layout -> ``seconds``, and ``speed`` of the stacked ones over the loop. ``goals``: one a goal and model that
      was measured: ``text``, ``limit``, ``worst``, ``where``, ``lacking`` (libraries that were not measured) and
      ``met``, None where that is not known.
    """
    batch_size = record["settings"]["batch_size"]
    rows = {
        "equal": _equal(record, batch_size),
        "compared": [_compared(same, batch_size) for same in groups(record["compared_runs"], "name")],
        "experts": [
            {
                "number": same[0]["number"],
                "seconds": _medians(same, "seconds"),
                "speed": statistics.median(run["seconds"]["loop"] / run["seconds"]["stacked"] for run in same),
            }
            for same in groups(record["expert_runs"], "number")
        ],
    }
    return rows | {"goals": [*_goals(rows["compared"]), *_expert_goal(rows["experts"])]}


def _equal(record: Mapping[str, Any], batch_size: int) -> list[dict[str, Any]]:
    reference = {run["round"]: run["seconds"] for run in record["equal_runs"] if run["name"] == REFERENCE}
    found = []
    for same in groups(record["equal_runs"], "name"):
        seconds = statistics.median(run["seconds"] for run in same)
        quotients = [reference[run["round"]] / run["seconds"] for run in same if run["round"] in reference]
        gflops = batch_size * same[0]["flop"] / seconds / 1e9
        facts = {name: same[0][name] for name in ("name", "parameters", "forward_flop", "flop")}
        found.append(
            facts
            | {
                "widths": record["widths"][same[0]["name"]],
                "seconds": seconds,
                "examples_per_second": batch_size / seconds,
                "relative": statistics.median(quotients) if quotients else None,
                "gflops": gflops,
                "share_of_gemm": gflops / record["gemm_gflops"],
            }
        )
    order = list(STRATEGIES)
    return sorted(found, key=lambda row: order.index(row["name"]))  # the rounds begin with different ones


def _compared(same: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    seconds = _medians(same, "seconds")
    return {
        "name": same[0]["name"],
        "parameters": same[0]["parameters"],
        "seconds": seconds,
        "examples_per_second": {who: batch_size / value for who, value in seconds.items()},
        "speed": {
            who: statistics.median(run["seconds"][who] / run["seconds"][OURS] for run in same)
            for who in seconds
            if who != OURS
        },
    }


def _medians(same: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    return {key: statistics.median(run[name][key] for run in same) for key in same[0][name]}


def _goals(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for text, limit, compare, names in GOALS:
        for row in (row for row in rows if row["name"] in names):
            peers = COMPARED[row["name"]].peers
            whom = "both other libraries" if peers == PEERS else f"{peers[0]}, the only other library that has it"
            goal = {"text": f"{model(row['name'])} {text} {whom}", "limit": limit}
            yield goal | _verdict(row["speed"], compare, limit, [peer for peer in peers if peer not in row["speed"]])


def _expert_goal(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    found = {f"{row['number']} experts": row["speed"] for row in rows if row["number"] >= MIN_EXPERTS}
    if found:
        text = f"Stacked experts are at least as fast as a loop over {MIN_EXPERTS} or more"
        yield {"text": text, "limit": 1.0} | _verdict(found, operator.ge, 1.0, [])


def _verdict(
    found: Mapping[str, float], compare: Callable[[float, float], bool], limit: float, lacking: Sequence[str]
) -> dict[str, Any]:
    """By the smallest of the ratios. A goal that is missed already is missed whatever is lacking."""
    where = min(found, key=found.__getitem__) if found else None
    worst = None if where is None else found[where]
    met = None if worst is None or (lacking and compare(worst, limit)) else compare(worst, limit)
    return {"worst": worst, "where": where, "lacking": list(lacking), "met": met}


def model(name: str) -> str:
    """How a model of the comparison reads."""
    return f"{COMPARED[name].title} ({COMPARED[name].sizes})"


def equal_table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a strategy, under ``COLUMNS``."""
    return [
        (
            row["name"],
            ", ".join(f"{name} {_widths(value)}" for name, value in row["widths"].items()),
            f"{row['parameters']:,}",
            f"{row['forward_flop'] / 1e3:.0f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['examples_per_second']:,.0f}",
            _times(row["relative"]),
            f"{row['gflops']:.0f}",
            f"{row['share_of_gemm']:.0%}",
        )
        for row in record["equal"]
    ]


def compared_table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a model and library, under ``COMPARED_COLUMNS``."""
    return [
        (
            COMPARED[row["name"]].title,
            COMPARED[row["name"]].sizes,
            who,
            f"{row['parameters'][who]:,}",
            f"{1e3 * seconds:.2f}",
            f"{row['examples_per_second'][who]:,.0f}",
            _times(row["speed"].get(who)),
        )
        for row in record["compared"]
        for who, seconds in row["seconds"].items()
    ]


def expert_table(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text a number of experts, under ``EXPERT_COLUMNS``."""
    return [
        (
            str(row["number"]),
            *(f"{1e3 * row['seconds'][way]:.2f}" for way in ("stacked", "loop")),
            _times(row["speed"]),
        )
        for row in sorted(record["experts"], key=lambda row: row["number"])
    ]


def _widths(value: Any) -> str:
    if not isinstance(value, list | tuple):
        return str(value)
    return ("/" if isinstance(value[0], list | tuple) else "-").join(map(_widths, value))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def caption(record: Mapping[str, Any]) -> list[str]:
    """What was measured where, and whether the machine was quiet."""
    settings, lines = record["settings"], [record["peer"]]
    lines += [f"{name} was not measured: {reason}" for name, reason in record["missing"].items()]
    lines += [f"{name} has no such size: {reason}" for name, reason in record["unmatched"].items()]
    if any(row["speed"] for row in record["compared"]):
        lines.append(DIFFERENCES)
    if (busy := record["busy_elsewhere"] or 0.0) > QUIET:
        lines.append(
            f"Other processes took {busy:.0%} of the cores, under which threads that wait for each other lose far more "
            "than that: the comparisons say nothing. Measure again on a quiet machine"
        )
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines.append(
        f"{record['machine']['cpu']}, {settings['threads']} cores, matrix product {record['gemm_gflops']:.0f} GFLOP/s; "
        f"{record['device']}; {record['target']:,} parameters asked for, a batch of {settings['batch_size']:,}, "
        f"{settings['steps']} passes a measurement, {settings['repeats']} rounds; {versions}; "
        f"commit {record['commit']}, {record['date']}"
    )
    return lines


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Of each goal, whether it is met."""

    def verdict(goal: Mapping[str, Any]) -> str:
        if goal["worst"] is None:
            return "not measured"
        lacking = "".join(f", {name} not measured" for name in goal["lacking"])
        said = {True: "met", False: "missed", None: "not known"}[goal["met"]]
        return f"{said}, {goal['worst']:.2f} x ({goal['where']}{lacking})"

    return [f"{goal['text']}: {verdict(goal)}." for goal in record["goals"]]


def show(record: Mapping[str, Any]) -> None:
    """Prints the tables, then the sentences."""
    print_table([COLUMNS, *equal_table(record)], left=("strategy", "widths"))
    print()
    print_table([COMPARED_COLUMNS, *compared_table(record)], left=("model", "sizes", "library"))
    if record["experts"]:
        print()
        print_table([EXPERT_COLUMNS, *expert_table(record)], left=())
    print("\n".join(["", *caption(record), "", *sentences(record)]))
