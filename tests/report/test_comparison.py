"""Comparisons against numbers worked out by hand, and everything that must keep a row from being called best."""

import dataclasses
import json

import numpy as np
import pytest

from mtl_jax.errors import ConfigError, RunFolderError
from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.comparison import compare
from mtl_jax.report.tables import tables

NOISE = np.array([0.0, 0.0010, -0.0008, 0.0004, -0.0006])
GAINS = np.array([0.010, 0.012, 0.008, 0.011, 0.004])


def runs(click, rating):
    return [{"click": float(c), "rating": float(r)} for c, r in zip(click, rating, strict=True)]


SINGLE = runs(0.80 + NOISE, 0.900 + NOISE)
BETTER = runs(0.80 + NOISE + GAINS, 0.900 + NOISE - GAINS)
EQUAL = runs(0.80 + NOISE[::-1], 0.900 + NOISE[::-1])
THREE = {"single_task": SINGLE, "mmoe+equal": EQUAL, "mmoe+pcgrad": BETTER}


@pytest.fixture
def compared(write_ablation):
    """The only comparison of an ablation."""

    def build(arms, *, against=None, **options):
        (comparison,) = compare(read_ablation(write_ablation(arms, **options)), baseline=against)
        return comparison

    return build


def note(comparison, *words):
    return [text for text in comparison.notes if all(word in text for word in words)]


def test_means_and_differences_by_hand(compared):
    """The worked example of five differences, in both directions of a metric."""
    comparison = compared(THREE)
    assert [row.arm for row in comparison.rows] == list(THREE)
    row = comparison.row("mmoe+pcgrad")
    assert row.metrics["click"].mean == pytest.approx(0.80 + NOISE.mean() + 0.009)
    for task in ("click", "rating"):
        found = row.differences[task]
        assert (found.mean, found.std) == (pytest.approx(0.009), pytest.approx(0.00316228, abs=1e-8))
        assert found.p == pytest.approx(0.0031256, abs=1e-7)
        assert found.interval == pytest.approx((0.0050735, 0.0129265), abs=1e-7)
        # Four comparisons: this p comes twice among them, as the least and, by Holm's monotony, as the next.
        assert found.p_holm == pytest.approx(4 * 0.0031256, abs=1e-6)
    assert comparison.row("single_task").differences == {}


def test_delta_m_is_paired_by_seed(compared):
    row = compared(THREE).row("mmoe+pcgrad")
    single = 0.80 + NOISE, 0.900 + NOISE
    expected = 50 * GAINS * (1 / single[0] + 1 / single[1])
    assert list(row.delta_m.values.values()) == pytest.approx(expected)
    centred = 50 * GAINS * (1 / (single[0] - 0.5) + 1 / single[1])
    assert row.delta_m_c.mean == pytest.approx(centred.mean())
    assert row.delta_m.interval[0] < expected.mean() < row.delta_m.interval[1]


def test_best_tied_and_ranks(compared):
    comparison = compared(THREE)
    best, equal, single = (comparison.row(arm) for arm in ("mmoe+pcgrad", "mmoe+equal", "single_task"))
    assert best.best == {"click": True, "rating": True}
    assert not any(best.tied_with_best.values()) and not any(equal.tied_with_best.values())
    assert best.mean_rank == best.seed_rank == 1.0
    assert equal.mean_rank == single.mean_rank == 2.5
    assert (equal.seed_rank + single.seed_rank) == 5.0
    assert comparison.critical_difference == pytest.approx(2.343 * (12 / 30) ** 0.5, rel=1e-3)
    assert note(comparison, "click: mmoe+pcgrad has the best mean", "no other arm is tied")
    assert note(comparison, "click: against single_task", "better: mmoe+pcgrad")


def test_within_noise_is_said(compared):
    comparison = compared({"single_task": SINGLE, "mmoe+equal": EQUAL})
    tied = [row.tied_with_best["click"] for row in comparison.rows]
    assert sorted(tied) == [False, True]
    assert note(comparison, "click: the differences are within noise")
    assert note(comparison, "rating: no difference to single_task holds")


def test_order_is_judged_before_it_is_read(compared):
    """Ranks (1, 2, 3) in all of five seeds give p = e^-5; three arms that take turns are within noise."""
    clear = {arm: runs(0.80 + NOISE + 0.01 * i, 0.9 + NOISE) for i, arm in enumerate(THREE)}
    comparison = compared(clear)
    assert comparison.friedman_p == pytest.approx(np.exp(-5))
    assert note(comparison, "p = 0.0067: the arms differ", "more than 1.48 (Nemenyi)")
    turns = {arm: runs(0.80 + np.roll([0, 1, 2, 0, 0], i) / 1000, 0.9 + NOISE) for i, arm in enumerate(THREE)}
    comparison = compared(turns, name="turns")
    assert comparison.friedman_p > 0.5
    assert note(comparison, "the order of the arms is within noise")


def test_another_baseline(compared):
    comparison = compared(THREE, against="mmoe+pcgrad")
    assert comparison.row("single_task").differences["click"].mean == pytest.approx(-0.009)
    assert comparison.row("single_task").delta_m is None  # delta_m stays against single-task training
    assert comparison.row("mmoe+pcgrad").delta_m.mean > 0
    with pytest.raises(ConfigError, match="unknown baseline 'ple'.*'mmoe\\+pcgrad'"):
        compared(THREE, against="ple", name="again")


def test_failed_and_missing_runs_are_counted_and_never_replaced(compared):
    arms = THREE | {"mmoe+equal": [*EQUAL[:3], FloatingPointError("loss is nan"), None]}
    comparison = compared(arms)
    row = comparison.row("mmoe+equal")
    assert (len(row.run_ids), row.planned, row.metrics["click"].n) == (3, 5, 3)
    assert [text.split(": ", 1)[1] for text in row.failed] == ["FloatingPointError: loss is nan", "no result yet"]
    assert row.differences["click"].n == 3
    assert note(comparison, "mmoe+equal: 3 of 5 seeds finished", "loss is nan")
    assert comparison.critical_difference == pytest.approx(2.343 * (12 / 18) ** 0.5, rel=1e-3)  # three common seeds


def test_an_arm_without_any_finished_run(compared):
    comparison = compared(THREE | {"ple+equal": [None] * 5})
    row = comparison.row("ple+equal")
    assert (row.metrics, row.differences, row.mean_rank, row.best, row.delta_m) == ({}, {}, None, {}, None)
    assert comparison.row("mmoe+pcgrad").mean_rank == 1.0


def test_below_a_trivial_predictor_is_a_failure(compared):
    """item_mean has AUC .70: a high rank among the networks helps nothing."""
    low = runs(0.66 + NOISE, 0.85 + NOISE)
    comparison = compared(THREE | {"ple+equal": low})
    row = comparison.row("ple+equal")
    assert row.below_trivial == {"click": "item_mean"}
    assert (row.best["click"], row.tied_with_best["click"], row.best["rating"]) == (False, False, True)
    assert note(comparison, "ple+equal FAILED in click: below item_mean (auc 0.6600 against 0.7000)")


def test_all_below_the_trivial_predictor_leaves_no_best(compared):
    comparison = compared(
        {arm: runs(0.6 + i / 100 + NOISE, 0.9 + NOISE) for i, arm in enumerate(("single_task", "mmoe"))}
    )
    assert not any(row.best["click"] or row.tied_with_best["click"] for row in comparison.rows)
    assert note(comparison, "click: every ranked arm is below a trivial predictor")


def test_one_seed_ranks_nothing(compared):
    comparison = compared({arm: members[:1] for arm, members in THREE.items()})
    for row in comparison.rows:
        assert (row.mean_rank, row.best, row.tied_with_best) == (None, {}, {})
        assert row.metrics["click"].interval is None
    assert comparison.critical_difference is None
    assert note(comparison, "one seed a row has no interval", "seeds=10")
    assert not note(comparison, "best mean")


def test_number_of_seeds_is_judged(compared):
    few = compared(THREE)
    assert note(few, "n = 5", "p = 0.0625") and note(few, "10 seeds are the default for claims")
    many = compared({arm: members * 2 for arm, members in THREE.items()}, name="many")
    assert not note(many, "exact paired test") and not note(many, "default for claims")
    assert many.row("mmoe+pcgrad").differences["click"].p_exact == pytest.approx(2 / 2**10)


def refused(comparison):
    ranked = [row for row in comparison.rows if row.mean_rank or row.best or row.differences or row.delta_m]
    return bool(comparison.refused) and not ranked and comparison.friedman_p is None


def test_no_gain_without_single_task_training(compared):
    arms = {arm: members for arm, members in THREE.items() if arm != "single_task"}
    comparison = compared(arms, baseline=None)
    assert refused(comparison) and "python -m experiments.ablate sharing=mmoe" in comparison.refused[0]
    assert refused(compared(arms, baseline=None, against="mmoe+equal", name="other"))
    assert refused(compared(THREE | {"single_task": [None] * 5}, name="unfinished"))
    assert comparison.row("mmoe+pcgrad").metrics["click"].interval is not None


def test_no_gain_without_trivial_predictors(compared):
    def remove(arm, seed, record):
        record["baselines"] = {name: {"rating": row["rating"]} for name, row in record["baselines"].items()}

    comparison = compared(THREE, change=remove)
    assert refused(comparison) and "no trivial predictor for click" in comparison.refused[0]


@pytest.mark.parametrize("flag", ["reopened", "leak", "oracle"])
def test_flagged_rows_are_not_ranked(compared, flag):
    def raise_flag(arm, seed, record):
        record["flags"][flag] = arm == "mmoe+pcgrad" and seed == 3

    comparison = compared(THREE, change=raise_flag)
    row = comparison.row("mmoe+pcgrad")
    assert (row.flags, row.mean_rank, row.best) == ((flag,), None, {})
    assert sorted(other.mean_rank for other in comparison.rows if other is not row) == [1.5, 1.5]
    assert note(comparison, "mmoe+pcgrad is not ranked", flag)


def test_copied_rows_are_flagged(compared):
    comparison = compared(THREE | {"ple+equal": BETTER})
    assert comparison.identical == (("mmoe+pcgrad", "ple+equal"),)
    assert note(comparison, "mmoe+pcgrad and ple+equal are equal in every task and seed")
    assert comparison.row("ple+equal").tied_with_best["click"] or comparison.row("mmoe+pcgrad").tied_with_best["click"]


def test_undefined_metric_is_left_out_and_said(compared):
    def undefine(arm, seed, record):
        if arm == "mmoe+equal" and seed == 2:
            record["metrics"]["test"]["click"]["auc"] = None
            record["support"]["test"]["click"]["auc"]["reason"] = "one class"

    comparison = compared(THREE, change=undefine)
    assert comparison.row("mmoe+equal").metrics["click"].n == 4
    assert note(comparison, "mmoe+equal: click has no value in some finished seeds")


def test_unopened_test_part_is_not_a_result(compared):
    def seal(arm, seed, record):
        if arm == "mmoe+equal":
            record["metrics"]["test"], record["test_openings"] = {}, 0

    row = compared(THREE, change=seal).row("mmoe+equal")
    assert row.metrics == {} and "the test part is unopened" in row.failed[0]


RATES = [{"optimizer.learning_rate": rate} for rate in (0.1, 0.01, 0.001)]


def test_setting_is_chosen_on_validation(compared):
    """The middle one is best on validation and worst on test; the first is best there on a seed that the second lacks."""
    valid = {0: [0.90, 0.5, 0.5, 0.5, 0.5], 1: [None, 0.6, 0.6, 0.6, 0.6], 2: [0.55] * 5}
    tests = [BETTER, [None, *EQUAL[1:]], BETTER]

    def change(arm, seed, record):
        if arm == "mmoe+equal":
            point = (int(record["run_id"].split("-")[0], 16) - 5) // 5
            record["monitor"]["value"] = valid[point][seed]

    arms = {"single_task": SINGLE, "mmoe+equal": tests}
    comparison = compared(arms, points={"mmoe+equal": RATES}, change=change)
    row = comparison.row("mmoe+equal")
    assert (row.values, row.trials, row.planned, len(row.run_ids)) == (RATES[1], 3, 5, 4)
    assert row.metrics["click"].mean == pytest.approx(np.mean([run["click"] for run in EQUAL[1:]]))
    assert [(one.chosen, one.value.mean, one.value.n) for one in comparison.candidates] == [
        (False, pytest.approx(0.5), 4),
        (True, pytest.approx(0.6), 4),
        (False, pytest.approx(0.55), 4),
    ]
    assert note(comparison, "not tuned alike", "mmoe+equal 3")


def test_a_setting_that_never_finished_is_out_and_counted(compared):
    tests = [[ValueError("diverged")] * 5, EQUAL, BETTER]
    comparison = compared({"single_task": SINGLE, "mmoe": tests}, points={"mmoe": RATES})
    row = comparison.row("mmoe")
    assert (row.values, row.trials) == (RATES[2], 3)
    assert [one.finished for one in comparison.candidates] == [0, 5, 5]


def test_monitor_that_is_an_error_is_minimised(compared):
    def change(arm, seed, record):
        point = (int(record["run_id"].split("-")[0], 16) - 5) // 5
        record["monitor"] |= {"name": "click/logloss", "value": [0.5, 0.3, 0.4][point]}

    arms = {"single_task": SINGLE, "mmoe": [EQUAL] * 3}
    assert compared(arms, points={"mmoe": RATES}, change=change).row("mmoe").values == RATES[1]


def test_an_axis_of_the_data_is_a_comparison_each(write_ablation):
    points = [{"data.target_fraction": fraction} for fraction in (0.1, 1.0)]

    def change(arm, seed, record):
        record["data"]["sha256"] = "ab" * 32 if int(record["run_id"].split("-")[0], 16) % 10 < 5 else "cd" * 32

    arms = {"single_task": [SINGLE, SINGLE], "mmoe": [EQUAL, BETTER]}
    ablation = read_ablation(write_ablation(arms, points=dict.fromkeys(arms, points), change=change))
    small, full = compare(ablation)
    assert (small.data, full.data) == (
        "movielens_1m, data.target_fraction=0.1",
        "movielens_1m, data.target_fraction=1.0",
    )
    assert full.row("mmoe").differences["click"].mean == pytest.approx(0.009)
    assert small.candidates == full.candidates == ()


def test_a_data_set_without_a_finished_run_keeps_its_place(write_ablation):
    folder = write_ablation(THREE)
    plan = json.loads((folder / "ablation.json").read_text())
    plan["members"] += [m | {"data": "complete_journey", "run_id": f"x{m['run_id']}"} for m in plan["members"]]
    (folder / "ablation.json").write_text(json.dumps(plan))
    done, waiting = compare(read_ablation(folder))
    assert (done.data, waiting.data) == ("movielens_1m", "complete_journey")
    assert done.row("mmoe+pcgrad").mean_rank == 1.0
    assert refused(waiting) and [len(row.failed) for row in waiting.rows] == [5, 5, 5]
    assert all(grid.rows and len(grid.rows[0]) == len(grid.header) for grid in tables(waiting))


def test_long_errors_are_cut(compared):
    arms = THREE | {"mmoe+equal": [*EQUAL[:4], ValueError("line\n" * 500)]}
    (line,) = compared(arms).row("mmoe+equal").failed
    assert line.endswith("...") and "\n" not in line and len(line) < 400


def test_records_of_other_data_are_not_mixed(compared):
    def change(arm, seed, record):
        record["data"]["split"] = "rows" if arm == "mmoe+equal" else "time"

    with pytest.raises(RunFolderError, match="differ in data.split"):
        compared(THREE, change=change)


def test_nothing_finished_yet(compared):
    with pytest.raises(RunFolderError, match="no run of .* has finished \\(of 2\\)(.|\n)*ValueError: bad rate"):
        compared({"single_task": [None], "mmoe": [ValueError("bad rate")]})


def test_costs_are_those_of_the_records(compared):
    row = compared(THREE).row("mmoe+equal")
    assert (row.parameters, row.examples_per_second, row.compile_seconds) == (
        480_000,
        182_345.6,
        pytest.approx(5 * 11.84),
    )
    assert row.method["sharing"] == "mmoe"


def test_comparison_is_plain_enough_for_json(compared):
    json.dumps(dataclasses.asdict(compared(THREE)), allow_nan=False)
