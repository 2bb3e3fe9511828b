"""What a reader must know beside the numbers, in plain sentences."""

from mtl_jax.report.rows import Comparison, Row
from mtl_jax.report.statistics import LEVEL, SMALLEST_EXACT

SEEDS_FOR_CLAIMS = 10
NARROW_BOOTSTRAP = 20
ALPHA = 1 - LEVEL
EXPECTED_TRIVIAL = ("global_mean", "logistic")
FLAGS = {
    "reopened": "the test part was opened for several selections",
    "leak": "the leakage guard has flagged its data",
    "oracle": "its checkpoint was chosen with test labels",
}


def refusals(comparison: Comparison, command: str | None) -> tuple[str, ...]:
    """Why no gain, rank or winner may be printed, each with what to run; empty where nothing is missing."""
    again = f": {command}" if command else ""
    single = comparison.row(comparison.single_task) if comparison.single_task is not None else None
    found = []
    if single is None:
        found.append(
            "no gains, ranks or winners: there is no single-task row, so nothing says whether sharing helps. Run the same "
            f"command without baseline=none, or with baseline=scratch where a source is the question{again}"
        )
    elif not single.metrics:
        found.append(
            f"no gains, ranks or winners: no run of the reference row '{single.arm}' has finished. Run the same command "
            f"again{again}"
        )
    lacking = [task for task in comparison.tasks if not any(task in row for row in comparison.trivial.values())]
    if lacking:
        found.append(
            f"no gains, ranks or winners: the records have no trivial predictor for {', '.join(lacking)}. Remove the run "
            f"folders and run the same command again, which evaluates the trivial predictors on the test part{again}"
        )
    return tuple(found)


def notes(comparison: Comparison) -> tuple[str, ...]:
    """All sentences of one comparison, the gravest first."""
    return (
        *comparison.refused,
        *_failures(comparison),
        *_flags(comparison),
        *_copies(comparison),
        *(sentence for task in comparison.tasks for sentence in _task(comparison, task)),
        *_transfer(comparison),
        *_order(comparison),
        *_seeds(comparison),
        *_tuning(comparison),
        *_limits(comparison),
    )


def _transfer(comparison: Comparison) -> list[str]:
    """Negative transfer is declared by the interval of the gain, not by its mean."""
    found = []
    for row in comparison.rows:
        worse = [task for task, one in row.differences.items() if row.transfer and one.interval and one.interval[1] < 0]
        if worse:
            found.append(
                f"{row.arm}: negative transfer in {', '.join(worse)} (the 95 % interval of its gain over "
                f"{comparison.baseline} lies below 0; not corrected for the number of comparisons)"
            )
    return found


def _failures(comparison: Comparison) -> list[str]:
    found = []
    for row in comparison.rows:
        if row.failed:
            what = f"{row.arm}: {len(row.run_ids)} of {row.planned} seeds finished"
            found.append(f"{what}; its numbers are of those alone. Missing: {'; '.join(row.failed)}")
        for task, name in row.below_trivial.items():
            level = comparison.trivial[name][task]
            values = f"{comparison.tasks[task]['metric']} {number(row.mean(task))} against {number(level)}"
            found.append(f"{row.arm} FAILED in {task}: below {name} ({values}), which needs no network")
        short = [task for task in comparison.tasks if row.run_ids and len(row.seeds(task)) < len(row.run_ids)]
        if short:
            found.append(f"{row.arm}: {', '.join(short)} has no value in some finished seeds; they are left out there")
    return found


def _flags(comparison: Comparison) -> list[str]:
    return [
        f"{row.arm} is not ranked: {'; '.join(f'{flag}: {FLAGS[flag]}' for flag in row.flags)}"
        for row in comparison.rows
        if row.flags
    ]


def _copies(comparison: Comparison) -> list[str]:
    return [
        f"{' and '.join(arms)} are equal in every task and seed: one is a copy of the other, or the methods coincide here"
        for arms in comparison.identical
    ]


def _task(comparison: Comparison, task: str) -> list[str]:
    """Who has the best mean, who cannot be told from it, and what holds against the baseline."""
    metric = comparison.tasks[task]["metric"]
    ranked = [row for row in comparison.rows if row.best]
    best = next((row for row in ranked if row.best[task]), None)
    found = []
    if ranked and best is None:
        found.append(f"{task}: every ranked arm is below a trivial predictor, so none is called best")
    if best is not None:
        others = [row.arm for row in ranked if row is not best and task not in row.below_trivial]
        tied = [row.arm for row in ranked if row.tied_with_best[task]]
        summary = best.metrics[task]
        value = f"{metric} {number(summary.mean)}, 95 % interval {interval(summary.interval)}, n = {summary.n}"
        value += f" of {best.planned}" if summary.n < best.planned else ""
        if others and len(tied) == len(others):
            found.append(
                f"{task}: the differences are within noise. {best.arm} has the best mean ({value}), and no other arm can "
                "be told from it"
            )
        elif tied:
            found.append(f"{task}: {best.arm} has the best mean ({value}); tied with it: {', '.join(tied)}")
        else:
            found.append(f"{task}: {best.arm} has the best mean ({value}); no other arm is tied with it")
    return found + _against_baseline(comparison, task)


def _against_baseline(comparison: Comparison, task: str) -> list[str]:
    tested = {
        row.arm: row.differences[task]
        for row in comparison.rows
        if task in row.differences and row.differences[task].p_holm is not None
    }
    if not tested:
        return []
    clear = {arm: one for arm, one in tested.items() if one.p_holm <= ALPHA}
    better = [arm for arm, one in clear.items() if one.mean > 0]
    worse = [arm for arm in clear if arm not in better]
    if not clear:
        return [f"{task}: no difference to {comparison.baseline} holds after correction for all comparisons"]
    parts = [f"{word}: {', '.join(arms)}" for word, arms in (("better", better), ("worse", worse)) if arms]
    return [f"{task}: against {comparison.baseline}, after correction for all comparisons: {'; '.join(parts)}"]


def _order(comparison: Comparison) -> list[str]:
    ranked = [row for row in comparison.rows if row.mean_rank is not None]
    if not ranked:
        return []
    found = [f"ranks are among {len(ranked)} arms and change with the set of arms"]
    if comparison.friedman_p is None:
        return found
    said = f"Friedman's test over the seeds gives p = {probability(comparison.friedman_p)}"
    if comparison.friedman_p > ALPHA:
        found.append(f"{said}: the order of the arms is within noise, and ranks are not to be read")
    elif comparison.critical_difference is not None:
        found.append(
            f"{said}: the arms differ. Two of them are told apart where their ranks by seed differ by more than "
            f"{comparison.critical_difference:.2f} (Nemenyi); this is about seeds on this data set, not about others"
        )
    return found


def _seeds(comparison: Comparison) -> list[str]:
    sizes = [summary.n for row in comparison.rows for summary in row.metrics.values()]
    if not sizes:
        return []
    least, most = min(sizes), max(sizes)
    shown = f"{least}" if least == most else f"{least} to {most}"
    if most < 2:
        return [
            "one seed a row has no interval: nothing is ranked, set in bold or called best. Run more seeds, "
            f"seeds={SEEDS_FOR_CLAIMS} for a claim"
        ]
    found = []
    if least < 2:
        few = [row.arm for row in comparison.rows if any(summary.n < 2 for summary in row.metrics.values())]
        found.append(f"not ranked, as one seed has no interval: {', '.join(few)}")
    if least < SMALLEST_EXACT:
        size = max(least, 2)
        found.append(
            f"n = {shown} seeds: an exact paired test of {size} cannot fall under p = {2.0 ** (1 - size):.4g}, so none is "
            f"given under {SMALLEST_EXACT}; the t-test assumes normal differences"
        )
    if least < SEEDS_FOR_CLAIMS:
        found.append(
            f"{SEEDS_FOR_CLAIMS} seeds are the default for claims, and the least for differences under .01 AUC: run the "
            f"same command with seeds={SEEDS_FOR_CLAIMS}"
        )
    return found


def _tuning(comparison: Comparison) -> list[str]:
    trials = {row.arm: row.trials for row in comparison.rows}
    if max(trials.values(), default=1) == 1:
        return []
    found = ["where several settings were tried, the best on validation stands for the arm"]
    if len(set(trials.values())) > 1:
        counts = ", ".join(f"{arm} {count}" for arm, count in trials.items())
        found.append(f"the arms were not tuned alike (settings tried: {counts}): a gain may be that of the tuning")
    return found


def _limits(comparison: Comparison) -> list[str]:
    found = []
    absent = [name for name in EXPECTED_TRIVIAL if name not in comparison.trivial]
    if comparison.trivial and absent:
        found.append(f"the records have no {' and no '.join(absent)}: 'below' is against those that they have")
    if any(len(summary.values) > 1 for row in comparison.rows for summary in row.metrics.values()):
        sizes = [one.n for row in comparison.rows for one in row.differences.values() if one.bootstrap is not None]
        if sizes and min(sizes) < NARROW_BOOTSTRAP:
            found.append(
                f"a bootstrap interval of few seeds ({min(sizes)} here) is too narrow: of 5 it holds the truth in "
                "about 83 % of the cases, of 10 in 90 %. Read it beside the other one, not instead"
            )
        found.append("intervals hold the noise of training alone: another sample of test users would move all rows")
    return found


def number(value: float | None) -> str:
    """Four decimals, fewer for large numbers."""
    if value is None:
        return "n/a"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def interval(ends: tuple[float, float] | None) -> str:
    """Both ends, as :func:`number`."""
    return "n/a" if ends is None else f"{number(ends[0])} to {number(ends[1])}"


def probability(p: float | None) -> str:
    """Two digits; what is very small as a bound."""
    if p is None:
        return "n/a"
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def status(row: Row) -> str:
    """Finished of planned seeds."""
    return f"{len(row.run_ids)} / {row.planned}"
