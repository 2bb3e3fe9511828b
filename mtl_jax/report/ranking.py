"""Who is best, who is tied with the best, and whether the order of all is more than noise.

Per task the best row is the one with the best mean. Every other row is compared with it by the 95 % interval of the
paired differences; where that holds 0, or cannot be computed, the row is tied. The best is picked after the fact and
the intervals are not corrected, so this marks ties and proves no win: claims are read from the corrected differences.

Whether the rows differ at all is Friedman's question, and Nemenyi's critical difference says how far two ranks must
lie apart (Demšar, JMLR 2006). Both need independent blocks in which every method is ranked once. Here a block is a
seed: within it the ranks of a method over the tasks are averaged, and the methods ranked by this average. Tasks are no
blocks, as the tasks of one run share its weights. Demšar's blocks are data sets; with seeds the answer is about
training noise on this data set and carries over to no other. It also differs from ``mean_rank``, which ranks the means
over seeds and has no test of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mtl_jax.metrics import mean_rank
from mtl_jax.report.rows import Comparison, Row
from mtl_jax.report.statistics import critical_difference, difference, friedman


def rank(comparison: Comparison) -> Comparison:
    """The comparison with best, ties, ranks, and the two tests; unchanged with fewer than two rows that can be ranked.

    A row takes part with an interval in every task and no flag up. A row under a trivial predictor keeps its rank, and is
    neither best nor tied in that task.
    """
    ranked = [row for row in comparison.rows if row.can_rank(comparison.tasks)]
    if len(ranked) < 2 or not comparison.tasks:
        return comparison
    tasks, higher = list(comparison.tasks), [comparison.higher(task) for task in comparison.tasks]
    ranks = dict(zip(_arms(ranked), mean_rank([[r.mean(t) for t in tasks] for r in ranked], higher), strict=True))
    by_seed = _ranks_by_seed(ranked, tasks, higher)
    seed_ranks = dict(
        zip(_arms(ranked), by_seed.mean(axis=0) if len(by_seed) > 1 else [None] * len(ranked), strict=True)
    )
    standings = {task: _standing(ranked, task, high) for task, high in zip(tasks, higher, strict=True)}
    rows = [
        dataclasses.replace(
            row,
            mean_rank=ranks[row.arm],
            seed_rank=None if seed_ranks[row.arm] is None else float(seed_ranks[row.arm]),
            best={task: row.arm == standings[task][0] for task in tasks},
            tied_with_best={task: row.arm in standings[task][1] for task in tasks},
        )
        if row in ranked
        else row
        for row in comparison.rows
    ]
    return dataclasses.replace(
        comparison,
        rows=tuple(rows),
        friedman_p=friedman(by_seed),
        critical_difference=critical_difference(len(ranked), len(by_seed)),
    )


def identical_rows(rows: Sequence[Row], tasks: Mapping[str, object]) -> tuple[tuple[str, ...], ...]:
    """Groups of arms with the same value in every task and seed: a copying error, or methods that coincide."""
    groups: dict[tuple, list[str]] = {}
    for row in rows:
        if row.run_ids:
            key = tuple((task, *sorted(row.seeds(task).items())) for task in tasks)
            groups.setdefault(key, []).append(row.arm)
    return tuple(tuple(arms) for arms in groups.values() if len(arms) > 1)


def _standing(rows: Sequence[Row], task: str, higher: bool) -> tuple[str | None, set[str]]:
    """Arm of the best mean, and the arms that are tied with it."""
    valid = [row for row in rows if task not in row.below_trivial]
    if not valid:
        return None, set()
    best = max(valid, key=lambda row: row.mean(task) if higher else -row.mean(task))
    tied = set()
    for row in valid:
        against = difference(row.seeds(task), best.seeds(task), higher_is_better=higher)
        if row is not best and (against.interval is None or against.interval[0] <= 0 <= against.interval[1]):
            tied.add(row.arm)
    return best.arm, tied


def _ranks_by_seed(rows: Sequence[Row], tasks: Sequence[str], higher: Sequence[bool]) -> np.ndarray:
    """[seed, row] ranks, over the seeds that all rows have in all tasks."""
    seeds = set.intersection(*(set(row.seeds(task)) for row in rows for task in tasks))
    ranks = []
    for seed in sorted(seeds):
        over_tasks = mean_rank([[row.seeds(task)[seed] for task in tasks] for row in rows], higher)
        # Averages over tasks vary less than ranks do: the tests are about ranks, so the methods are ranked once more.
        ranks.append(mean_rank([[round(value, 9)] for value in over_tasks], [False]))
    return np.array(ranks, np.float64).reshape(len(ranks), len(rows))


def _arms(rows: Sequence[Row]) -> list[str]:
    return [row.arm for row in rows]
