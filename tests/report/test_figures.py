"""The figures of an ablation hold the numbers of its comparison: traces are read back, pixels are not looked at."""

import dataclasses
import json
import math

import numpy as np
import polars as pl
import pytest
from scipy import stats

from mtl_jax.report import curves, figures
from mtl_jax.report.ablation import read_ablation
from mtl_jax.report.comparison import compare
from mtl_jax.report.drawing import label, marks, mean_text
from mtl_jax.report.pareto import front, pareto
from mtl_jax.report.statistics import Summary


@pytest.fixture(scope="module")
def ablation(grid_folder):
    return read_ablation(grid_folder)


@pytest.fixture(scope="module")
def comparison(ablation):
    return compare(ablation)[0]


@pytest.fixture(scope="module")
def look(comparison):
    return marks([comparison])


@pytest.fixture(scope="module")
def histories(ablation, comparison):
    return curves.read_histories(ablation, comparison)


def of(figure, **wanted):
    """The traces with these attributes."""
    return [trace for trace in figure.data if all(getattr(trace, key) == value for key, value in wanted.items())]


def row_of(comparison, arm):
    return next(row for row in comparison.rows if row.arm == arm)


def test_a_curve_is_the_mean_over_seeds_and_its_band_the_t_interval(histories, comparison, look):
    figure = curves.learning_curves(histories, comparison, look)
    (line,) = of(figure, meta="mean", legendgroup="mmoe+pcgrad", yaxis="y")
    values = histories.filter(arm="mmoe+pcgrad", part="valid", task="buy", name="auc", step=700)["value"].to_numpy()
    assert len(values) == 5
    at = list(line.x).index(700)
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert line.y[at] == pytest.approx(values.mean())
    assert line.customdata[at] == pytest.approx([(high - low) / 2, 5])
    (band,) = of(figure, meta="band", legendgroup="mmoe+pcgrad", yaxis="y")
    ends = [y for x, y in zip(band.x, band.y, strict=True) if x == 700]
    assert sorted(ends) == pytest.approx([low, high])


def test_seeds_that_stopped_leave_the_mean_and_n_says_so(histories, comparison, look):
    figure = curves.learning_curves(histories, comparison, look)
    (line,) = of(figure, meta="mean", legendgroup="mmoe+equal", yaxis="y")
    assert list(line.customdata[:, 1]) == [5] * 6 + [4] * 4
    rows = histories.filter(arm="mmoe+equal", part="valid", task="buy", step=800)["value"]
    assert line.y[7] == pytest.approx(rows.mean())


def test_one_legend_entry_an_arm_toggles_it_in_all_panels(histories, comparison, look):
    figure = curves.learning_curves(histories, comparison, look)
    assert {trace.yaxis for trace in figure.data} == {"y", "y2"}
    for arm in look:
        traces = of(figure, legendgroup=arm)
        assert sum(trace.showlegend for trace in traces) == 1
        assert len(traces) == 4  # a line and a band in each of two panels
        assert {trace.line.color for trace in traces if trace.meta == "mean"} == {look[arm].colour}


def test_long_curves_are_thinned_and_keep_their_ends():
    rows = pl.DataFrame({"step": np.repeat(np.arange(1, 5001), 2), "value": np.tile([1.0, 3.0], 5000)})
    curve = curves.mean_curve(rows)
    assert len(curve) == curves.MOST_POINTS
    assert (curve["step"][0], curve["step"][-1]) == (1, 5000)
    steps = curve["step"].diff().drop_nulls()
    assert steps.max() - steps.min() <= 1
    assert np.allclose(curve["mean"], 2.0) and np.allclose(
        curve["half"], stats.t.ppf(0.975, 1) * math.sqrt(2) / math.sqrt(2)
    )


def test_a_single_run_has_a_line_without_a_band(histories, comparison, look):
    (run,) = row_of(comparison, "ple+equal").run_ids[:1]
    figure = curves.learning_curves(histories.filter(run_id=run), comparison, look)
    assert of(figure, meta="band") == [] and len(of(figure, meta="mean")) == 2
    assert np.isnan(figure.data[0].customdata[:, 0]).all()


def test_weights_and_cosines_are_drawn_from_their_rows_or_refused_in_a_sentence(histories, look):
    weights = curves.task_weights(histories, look)
    expected = histories.filter(arm="single_task", name="weight", task="spend", step=100)["value"].mean()
    (line,) = of(weights, meta="mean", legendgroup="single_task", yaxis="y2")
    assert line.y[0] == pytest.approx(expected)
    cosines = curves.gradient_cosines(histories, look)
    assert {trace.legendgroup for trace in cosines.data} == {"mmoe+pcgrad"}
    without = histories.filter(~pl.col("name").str.starts_with("cosine"))
    assert "no gradient cosines" in curves.gradient_cosines(without, look)
    assert "no weights" in curves.task_weights(histories.clear(), look)


def test_a_damaged_or_missing_history_leaves_the_others(ablation, comparison, tmp_path):
    kept = row_of(comparison, "mmoe+equal").run_ids[1]
    lost = row_of(comparison, "mmoe+equal").run_ids[2]
    for run in (kept, lost):
        (tmp_path / "runs" / run).mkdir(parents=True)
    (tmp_path / "runs" / kept / "history.parquet").write_bytes(
        (ablation.folder / "runs" / kept / "history.parquet").read_bytes()
    )
    (tmp_path / "runs" / lost / "history.parquet").write_bytes(b"no parquet")
    found = curves.read_histories(dataclasses.replace(ablation, folder=tmp_path), comparison)
    assert set(found["run_id"]) == {kept}


def test_the_forest_holds_differences_and_intervals_and_colours_by_the_corrected_test(comparison, look):
    figure = figures.differences(comparison, look)
    drawn = {}
    for trace in figure.data:
        for index, arm in enumerate(trace.y):
            if arm is not None:
                ends = trace.x[index] - trace.error_x.arrayminus[index], trace.x[index] + trace.error_x.array[index]
                drawn[trace.yaxis, arm] = (trace.x[index], *ends, trace.name)
    for axis, task in (("y", "buy"), ("y2", "spend")):
        for row in comparison.rows:
            if row.arm == comparison.baseline:
                assert (axis, row.arm) not in drawn
                continue
            found = row.differences[task]
            assert drawn[axis, row.arm][:3] == pytest.approx((found.mean, *found.interval))
            expected = figures.NOISE if found.p_holm > 0.05 else figures.BETTER if found.mean > 0 else figures.WORSE
            assert drawn[axis, row.arm][3] == expected
    # The data were made so: mmoe gains .012, ple loses .008 AUC, shared_bottom+equal gains less than the noise.
    assert drawn["y", "mmoe+equal"][3] == figures.BETTER
    assert drawn["y", "ple+equal"][3] == figures.WORSE
    assert drawn["y", "shared_bottom+equal"][3] == figures.NOISE
    assert [shape.x0 for shape in figure.layout.shapes] == [0, 0]


def test_an_interval_without_zero_is_noise_when_holm_does_not_reject(comparison):
    found = row_of(comparison, "mmoe+equal").differences["buy"]
    assert figures.verdict(dataclasses.replace(found, p_holm=0.06)) == figures.NOISE
    assert figures.verdict(dataclasses.replace(found, p_holm=None)) == figures.NOISE


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_a_sweep_finds(seed):
    generator = np.random.default_rng(seed)
    points = [tuple(point) for point in generator.integers(0, 8, (12, 2)).tolist()]
    # Sweep from the right: a point stays when it is higher than all to its right, equal points together.
    swept, highest = set(), -1
    for x in sorted({x for x, _ in points}, reverse=True):
        top = max(y for a, y in points if a == x)
        if top > highest:
            swept |= {index for index, point in enumerate(points) if point == (x, top)}
            highest = top
    found = front(points)
    assert set(found) == swept
    assert [points[index][0] for index in found] == sorted(points[index][0] for index in found)


def test_pareto_points_are_means_with_intervals_and_the_front_knows_the_directions(comparison, look):
    figure = pareto(comparison, look)
    row = row_of(comparison, "mmoe+pcgrad")
    (point,) = of(figure, name="mmoe+pcgrad")
    assert (point.x[0], point.y[0]) == (row.metrics["buy"].mean, row.metrics["spend"].mean)
    low, high = row.metrics["spend"].interval
    assert point.error_y.array[0] == pytest.approx((high - low) / 2)
    # mmoe+equal has the highest auc and the lowest rmse of all.
    (line,) = of(figure, meta="front")
    best = row_of(comparison, "mmoe+equal").metrics
    assert (line.x, line.y) == ((best["buy"].mean,), (best["spend"].mean,))
    assert figure.layout.xaxis.range[0] < figure.layout.xaxis.range[1]
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # lower is better: turned round
    logistic = next(trace for trace in of(figure, meta="trivial") if trace.name == "logistic")
    assert logistic.x[0] == comparison.trivial["logistic"]["buy"]
    assert of(figure, name="global_mean") == []  # an auc of one half would flatten all that matters


def test_the_front_is_withheld_with_the_winners(comparison, look):
    refused = dataclasses.replace(comparison, refused=("no winners",))
    (line,) = of(pareto(refused, look), meta="front")
    assert not line.x
    flagged = tuple(dataclasses.replace(r, flags=("leak",)) if r.arm == "mmoe+equal" else r for r in comparison.rows)
    (line,) = of(pareto(dataclasses.replace(comparison, rows=flagged), look), meta="front")
    assert line.x and line.x[0] != row_of(comparison, "mmoe+equal").metrics["buy"].mean


def test_three_tasks_make_a_menu_of_pairs(comparison, look):
    tasks = comparison.tasks | {"third": comparison.tasks["buy"]}
    rows = tuple(dataclasses.replace(r, metrics=r.metrics | {"third": r.metrics["buy"]}) for r in comparison.rows)
    figure = pareto(dataclasses.replace(comparison, tasks=tasks, rows=rows), look)
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["buy and spend", "buy and third", "spend and third"]
    shown = np.array([button.args[0]["visible"] for button in menu.buttons])
    assert (shown.sum(axis=0) == 1).all()
    assert [trace.visible for trace in figure.data] == shown[0].tolist()


def test_the_grid_has_the_mean_of_each_cell_and_no_cell_for_the_baseline(comparison):
    figure = figures.heat_maps(comparison)
    names = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert names == ["delta_m, %", "buy: auc (higher is better)", "spend: rmse (lower is better)"]
    gain, buy, spend = figure.data
    assert gain.y == ("shared_bottom", "mmoe", "ple") and gain.x == ("equal", "pcgrad")
    assert gain.z[1][0] == row_of(comparison, "mmoe+equal").delta_m.mean
    assert buy.z[1][1] == row_of(comparison, "mmoe+pcgrad").metrics["buy"].mean
    assert "n = 4" in buy.text[0][1]
    assert not buy.reversescale and spend.reversescale  # bright = good in both


def test_there_is_no_grid_where_one_choice_varies(comparison):
    equal = tuple(row for row in comparison.rows if row.method["balancing"] == "equal")
    assert "no grid" in figures.heat_maps(dataclasses.replace(comparison, rows=equal))
    doubled = (*comparison.rows, dataclasses.replace(comparison.rows[-1], arm="again"))
    assert "differ in something else" in figures.heat_maps(dataclasses.replace(comparison, rows=doubled))


def test_bars_of_ranks_overlap_exactly_when_the_test_does_not_tell_them_apart(comparison, look):
    figure = figures.ranks(comparison, look)
    width = comparison.critical_difference
    assert len(figure.data) == len(comparison.rows)
    for trace in figure.data:
        assert trace.x[0] == row_of(comparison, trace.y[0]).seed_rank
        assert 2 * trace.error_x.array[0] == pytest.approx(width)
    noise = dataclasses.replace(comparison, friedman_p=0.3)
    assert "Friedman" in figures.ranks(noise, look)
    assert "three" in figures.ranks(dataclasses.replace(comparison, critical_difference=None), look)


def test_gate_use_is_averaged_over_seeds(ablation, comparison):
    figure = figures.gate_use(ablation, comparison)
    (heat,) = figure.data
    assert heat.x == ("expert 0", "expert 1") and heat.y == ("buy/gate", "spend/gate")
    assert np.array(heat.z) == pytest.approx(np.array([[0.7, 0.3], [0.4, 0.6]]))
    records = {run: {k: v for k, v in record.items() if k != "diagnostics"} for run, record in ablation.records.items()}
    assert "no use of gates" in figures.gate_use(dataclasses.replace(ablation, records=records), comparison)


def test_without_a_baseline_or_a_second_task_a_sentence_says_so(comparison, look):
    bare = tuple(dataclasses.replace(row, differences={}, delta_m=None) for row in comparison.rows)
    assert "no baseline" in figures.differences(dataclasses.replace(comparison, rows=bare, baseline=None), look)
    one = dataclasses.replace(comparison, tasks={"buy": comparison.tasks["buy"]})
    assert "one task" in pareto(one, look)


def test_seventy_arms_look_different_and_the_baseline_is_ink(comparison):
    rows = tuple(dataclasses.replace(comparison.rows[0], arm=f"arm {index}") for index in range(71))
    found = marks([dataclasses.replace(comparison, rows=rows, baseline="arm 0")])
    assert len(set(found.values())) == 71
    assert found["arm 0"].colour == "#222222"


def test_texts_from_records_cannot_become_markup():
    assert label('<b onclick="x">%{y} $a$\nb') == "&lt;b onclick=&quot;x&quot;&gt;&#37;&#123;y} &#36;a&#36; b"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        ((0.798, 0.802), "0.8000 ± 0.0020"),
        ((0.79975, 0.80025), "0.80000 ± 0.00025"),
        ((-9.2, 10.8), "1 ± 10"),
        (None, "0.8000"),
    ],
)
def test_means_have_as_many_digits_as_their_interval_deserves(interval, text):
    assert mean_text(Summary(0.8, None, interval, 3, {})) == text


def test_figures_are_plain_json(comparison, look):
    """No NaN in the text that a browser parses."""
    text = figures.differences(comparison, look).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
