"""The leakage guard: what it catches, what it lets through, and its scores against definitions."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from mtl_jax.data import leakage
from mtl_jax.data.dataset import Dataset
from mtl_jax.data.labels import labels
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.data.validate import inspect, validate
from mtl_jax.errors import LeakageError
from mtl_jax.tasks import Task

PARTS = {"train": np.arange(600), "valid": np.arange(600, 800), "test": np.arange(800, 1000)}
RNG = np.random.default_rng(0)
# As many positives as negatives in each part: no warning about few of them.
LABEL = np.concatenate([RNG.permutation(np.arange(size) % 2) for size in (600, 200, 200)])
SPEND = RNG.normal(size=1000)
NOISE = RNG.normal(size=1000)


def dataset(features: dict, *, categorical=(), tasks=None, parts=PARTS, info=None, **fields) -> Dataset:
    """A table of these features beside a binary label ``visit`` and a regression label ``spend``."""
    frame = pl.DataFrame({"noise": NOISE, **features, "visit": LABEL, "spend": SPEND})
    roles = {value for value in fields.values() if isinstance(value, str)}
    names = [name for name in frame.columns if name not in ("visit", "spend") and name not in roles]
    return Dataset(
        "rand_hie",
        "own",
        frame,
        Schema(
            features=tuple(Categorical(n, n) if n in categorical else Numeric(n) for n in names),
            vocabularies=tuple(Vocabulary(name) for name in categorical),
            tasks=tasks or (Task("visit", "binary"), Task("spend", "regression")),
            **fields,
        ),
        parts,
        "id",
        "none",
        info or {},
    )


def flipped(share: float) -> np.ndarray:
    """The label with this share of its values flipped: AUC 1 - share."""
    return np.where(np.random.default_rng(1).random(1000) < share, 1 - LABEL, LABEL)


def test_excluded_columns_are_no_features():
    reason = {"meddol": "outcome of the same year"}
    message = (
        r"feature 'meddol' is an excluded column of rand_hie \(outcome of the same year\). Remove it, or state a reason"
    )
    with pytest.raises(LeakageError, match=message):
        validate(dataset({"meddol": NOISE**2}, excluded=reason))
    assert validate(dataset({"meddol": NOISE**2}, excluded=reason, allow_leak={"meddol": "known before"})) == []
    assert validate(dataset({}, excluded=reason)) == []


def test_labels_are_no_features():
    tasks = (Task("liked", "binary", positive="rating > 3"), Task("visit", "binary"))
    message = "feature 'rating' is the label of task 'liked'; expected no label among the features"
    with pytest.raises(LeakageError, match=message):
        validate(
            dataset({"rating": RNG.integers(1, 6, 1000)}, tasks=tasks, allow_leak={"rating": "no reason is enough"})
        )


@pytest.mark.parametrize(
    ("feature", "categorical", "message"),
    [
        pytest.param(
            flipped(0.02),
            (),
            r"feature 'totadm' alone has AUC 0.98\d for 'visit' on train; expected < 0.95",
            id="value",
        ),
        pytest.param(-1.0 * flipped(0.02), (), "feature 'totadm' alone has AUC 0.98", id="downwards"),
        pytest.param(
            pl.Series([None if y else float(i % 7) for i, y in enumerate(LABEL)]),
            (),
            "feature 'totadm__missing' alone has AUC 1.000 for 'visit'",
            id="missing flag",
        ),
        pytest.param(
            [f"{i % 5}-{y}" for i, y in enumerate(flipped(0.02))],
            ("totadm",),
            "'totadm' alone has AUC 0.98",
            id="category",
        ),
        pytest.param(np.exp(SPEND), (), r"feature 'totadm' alone has \|Spearman\| 1.000 for 'spend'", id="regression"),
        pytest.param(
            [str(int(4 * s)) for s in SPEND],
            ("totadm",),
            r"\|Spearman\| 0.9\d\d for 'spend'",
            id="category for regression",
        ),
    ],
)
def test_a_feature_that_tells_the_label(feature, categorical, message):
    with pytest.raises(LeakageError, match=message):
        validate(dataset({"totadm": feature}, categorical=categorical))
    allowed = dataset({"totadm": feature}, categorical=categorical, allow_leak={"totadm": "asked at entry"})
    assert not any("alone has" in warning for warning in validate(allowed))


def test_a_strong_feature_is_a_warning():
    [warning] = validate(dataset({"totadm": flipped(0.075)}))
    assert warning.startswith("feature 'totadm' alone has AUC 0.93") and "for 'visit' on train" in warning
    assert validate(dataset({"totadm": flipped(0.2)})) == []


def test_a_category_of_many_values_is_judged_out_of_fold():
    """In sample, the mean label of each of 300 values over 600 rows has AUC above .8; out of fold it is chance."""
    values = RNG.integers(0, 300, 1000)
    train = pl.DataFrame({"v": values[:600], "y": LABEL[:600]})
    in_sample = train.with_columns(pl.col("y").mean().over("v").alias("m"))
    assert roc_auc_score(train["y"], in_sample["m"]) > 0.8
    report = inspect(dataset({"code": values}, categorical=("code",)))
    assert dict(report.leakage["top"]["visit"])["code"] < 0.56


def test_scores_equal_their_definitions():
    """Ties, nulls and a label space included."""
    coarse = np.round(NOISE * 2)
    column = pl.Series([None if i % 9 == 0 else value for i, value in enumerate(coarse + LABEL)])
    tasks = (Task("visit", "binary"), Task("spend", "regression", space="visit"))
    data = dataset({"x": column}, tasks=tasks)
    train = data.part("train")
    scores = leakage.single_feature_scores(data, train, labels(train, data.schema))
    present = train.drop_nulls("x")
    area = roc_auc_score(present["visit"], present["x"])
    assert scores["visit"]["x"] == pytest.approx(max(area, 1 - area), abs=1e-12)
    flag = roc_auc_score(train["visit"], train["x"].is_null())
    assert scores["visit"]["x__missing"] == pytest.approx(max(flag, 1 - flag), abs=1e-12)
    buyers = present.filter(pl.col("visit") == 1)
    expected = abs(stats.spearmanr(buyers["x"], buyers["spend"]).statistic)
    assert scores["spend"]["x"] == pytest.approx(expected, abs=1e-12)


def test_out_of_fold_means_equal_the_loop():
    groups, fold = RNG.integers(0, 6, 200), RNG.integers(0, 2, 200)
    values = (RNG.random(200) < 0.3 + 0.1 * groups).astype(float)
    groups[:2], fold[:2] = (7, 8), (0, 1)  # values that the other fold lacks
    means = [
        values[(fold != f) & (groups == g)].mean() if ((fold != f) & (groups == g)).any() else values[fold != f].mean()
        for g, f in zip(groups, fold, strict=True)
    ]
    codes = leakage._out_of_fold_codes(groups, values, fold)
    np.testing.assert_array_equal(stats.rankdata(codes), stats.rankdata(np.round(means, 12)))


def test_too_few_positives_prove_nothing():
    rare = np.zeros(1000, int)
    rare[:9] = 1
    data = dataset({"copy": rare}, tasks=(Task("rare", "binary"),))
    train = data.frame.with_columns(rare=pl.Series(rare))[PARTS["train"]]
    assert leakage.single_feature_scores(data, train, labels(train, data.schema)) == {"rare": {}}


def test_only_train_rows_count():
    leaky_later = np.where(np.arange(1000) < 600, RNG.integers(0, 2, 1000), LABEL)
    assert validate(dataset({"x": leaky_later})) == []


def test_large_parts_are_sampled_by_the_hash_of_the_row_number(monkeypatch):
    monkeypatch.setattr(leakage, "MAX_ROWS", 250)
    data = dataset({})
    train = data.part("train")
    score = leakage.single_feature_scores(data, train, labels(train, data.schema))["visit"]["noise"]
    chosen = np.sort(np.argsort(leakage._row_hashes(np.arange(600)))[:250])
    area = roc_auc_score(LABEL[chosen], NOISE[chosen])
    assert score == pytest.approx(max(area, 1 - area), abs=1e-12)


def test_row_hashes_are_splitmix64():
    """First outputs of the published generator from seed 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert leakage._row_hashes(np.arange(3)).tolist() == published


def test_ids_are_no_features():
    ids = {"search_id": [f"q{i % 990}" for i in range(1000)]}
    with pytest.raises(
        LeakageError, match="'search_id' has 100 % distinct values; expected a feature. Use it as group or"
    ):
        validate(dataset(ids, categorical=("search_id",), parts=PARTS))
    half = {"search_id": [f"q{i % 300}" for i in range(1000)]}
    assert validate(dataset(half, categorical=("search_id",))) == []
    assert validate(dataset({"number": np.arange(1000)})) == [
        "'number' has 100 % distinct values; if it is an id, remove it from the features"
    ]


def test_a_renamed_class_is_a_leak():
    stars = RNG.integers(1, 4, 1000)
    tasks = (Task("stars", "multiclass"), Task("visit", "binary"))
    data = dataset({"letter": pl.Series(stars).replace_strict({1: "x", 2: "y", 3: "z"})}, categorical=("letter",))
    data = dataclasses.replace(data, frame=data.frame.with_columns(stars=pl.Series(stars)))
    data = dataclasses.replace(data, schema=dataclasses.replace(data.schema, tasks=tasks))
    with pytest.raises(LeakageError, match="feature 'letter' is a one-to-one code of the label of 'stars'"):
        validate(data)
    other = data.frame.with_columns(letter=pl.col("letter").shift(1, fill_value="x"))
    assert validate(dataclasses.replace(data, frame=other)) == []


def test_units_may_not_cross_parts():
    crossing, apart = np.arange(1000) % 400, np.arange(1000) // 100
    message = (
        r"200 values of 'home' are in train and valid, 200 values of 'home' are in train and test; expected none for"
    )
    for fields in ({"group": "home"}, {"user": "home", "info": {"split": "cold_user"}}):
        with pytest.raises(LeakageError, match=message):
            validate(dataset({"home": crossing}, **fields))
        assert validate(dataset({"home": apart}, **fields)) == []
    assert validate(dataset({"home": crossing}, user="home", info={"split": "rows"})) == []


def test_time_must_run_from_train_to_test():
    day = np.arange(1000)
    info = {"split": "time"}
    assert validate(dataset({"day": day}, time="day", info=info)) == []
    assert validate(dataset({"day": np.repeat(day[:250], 4)}, time="day", info=info)) == []
    with pytest.raises(
        LeakageError, match="split 'train' has rows up to day 999 and 'valid' from 200; expected train to end"
    ):
        validate(dataset({"day": day[::-1]}, time="day", info=info))


def test_features_must_end_before_labels():
    week = {"train": (40, 41, 44), "valid": (44, 45, 48), "test": (48, 49, 52)}
    windows = {p: dict(zip(("feature_end", "label_start", "label_end"), w, strict=True)) for p, w in week.items()}
    assert validate(dataset({"week": NOISE}, time="week", info={"windows": windows})) == []
    late = windows | {"test": windows["test"] | {"feature_end": 49}}
    message = (
        "split 'test' has features up to week 49 and labels from week 49; expected features to end first. Move the cut"
    )
    with pytest.raises(LeakageError, match=message):
        validate(dataset({"week": NOISE}, time="week", info={"windows": late}))
    long = windows | {"valid": windows["valid"] | {"label_end": 50}}
    assert validate(dataset({"week": NOISE}, time="week", info={"windows": long})) == [
        "label windows of valid and test overlap from week 49 to 50; set purge=true to drop these rows"
    ]


def test_repeated_rows_are_a_warning():
    frame = {"noise": np.concatenate([NOISE[:964], NOISE[:36]])}
    assert validate(dataset(frame)) == ["18 % of test rows equal a train row in all features"]
    assert validate(dataset({"noise": np.concatenate([NOISE[:998], NOISE[:2]])})) == []


def test_the_report_keeps_the_five_highest_scores():
    report = inspect(dataset({f"x{i}": flipped(0.07 + 0.05 * i) for i in range(7)}))
    assert [name for name, _ in report.leakage["top"]["visit"]] == ["x0", "x1", "x2", "x3", "x4"]
    assert report.leakage["flagged"] == {"visit": ["x0"], "spend": []}
