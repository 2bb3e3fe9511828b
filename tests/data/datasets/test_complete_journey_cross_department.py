"""Complete Journey across departments: every published count, parts and sampled pairs by hand, and no look ahead."""

import hashlib
import math

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_jax.data import load, tables
from mtl_jax.data.datasets import complete_journey as cj
from mtl_jax.data.datasets import complete_journey_cross_department as recipe
from mtl_jax.data.datasets.complete_journey_lines import DEMOGRAPHICS, merchandise_lines
from mtl_jax.data.domains import of_domains
from mtl_jax.errors import SchemaError

PRODUCTS = pl.DataFrame(
    [
        (1, "GROCERY", "MILK"),
        (2, "GROCERY", "BREAD"),
        (3, "GROCERY", "BREAD"),
        (4, "DRUG GM", "SOAP"),
        (5, "DRUG GM", "SOAP"),
        (6, "DRUG GM", "COUPON/MISC ITEMS"),
        (7, "MEAT-PCKGD", "BACON"),
        *((number, "GROCERY", "MILK") for number in (50, 51)),
        *((number, "PRODUCE", "FRUIT") for number in range(100, 112)),
    ],
    schema=["product_id", "department", "product_category"],
    orient="row",
).with_columns(manufacturer_id=pl.format("{}", "product_id"), brand=pl.lit("Private"))
# household, product, week
LINES = [
    (1, 1, 1),
    (1, 1, 40),
    (1, 2, 30),
    (2, 3, 40),
    (2, 3, 41),  # in a second week, which train does not see
    (2, 4, 12),
    (2, 6, 12),  # no merchandise
    (1, 7, 12),  # of another department
    (1, 3, 41),
    (2, 1, 44),
    (2, 5, 44),  # no product of train
    (1, 4, 45),  # no household of train, in this department
    (2, 2, 52),
    (3, 1, 50),
    (1, 100, 53),  # in no week of the recipe
]


def source(lines):
    frame = pl.DataFrame(lines, schema=["household_id", "product_id", "week"], orient="row")
    transactions = frame.with_columns(
        store_id=pl.lit(1),
        basket_id=pl.int_range(pl.len()),
        quantity=pl.lit(1),
        sales_value=pl.lit(1.0),
        retail_disc=pl.lit(0.0),
        coupon_disc=pl.lit(0.0),
        transaction_timestamp=pl.datetime(2017, 1, 1) + pl.duration(weeks="week"),
    )
    types = {"household_id": pl.Int64, **dict.fromkeys(DEMOGRAPHICS, pl.String)}
    demographics = pl.DataFrame(
        [(1, *("65+" if name == "age" else None for name in DEMOGRAPHICS))], types, orient="row"
    )
    return {"transactions": transactions, "products": PRODUCTS, "demographics": demographics}


def fruit(num_households, num_products=6):
    """Households that all buy the first products of produce in week 1."""
    return [(household, 100 + product, 1) for household in range(num_households) for product in range(num_products)]


def pairs_of(frame, *columns):
    return set(frame.select("household", "product", *columns).iter_rows())


def test_bought_pairs_are_in_the_part_of_their_first_week_where_train_knows_household_and_product():
    rows = recipe.cross_department(**source(LINES))
    assert pairs_of(rows.filter(buy=1), "week", "domain", "rebuy") == {
        (1, 1, 40, "grocery", 1),
        (1, 2, 40, "grocery", 0),
        (2, 3, 40, "grocery", 0),
        (2, 4, 40, "drug_gm", 0),
        (1, 3, 44, "grocery", None),
        (2, 1, 44, "grocery", None),
        (2, 2, 52, "grocery", None),
    }


def test_what_is_not_bought_by_the_end_of_a_part_is_sampled_from_the_products_of_train():
    rows = recipe.cross_department(**source(LINES))
    # So few products that all of them are taken; household 2 has bought all of grocery in test.
    assert pairs_of(rows.filter(buy=0), "week", "rebuy") == {(1, 3, 40, None), (2, 1, 40, None), (2, 2, 40, None)} | {
        (2, 2, 44, None)
    }


def test_facts_of_product_and_household_are_those_of_the_tables():
    rows = recipe.cross_department(**source(LINES)).filter(week=40)
    one, two = (rows.filter(household=h, product=p).row(0, named=True) for h, p in ((1, 2), (2, 4)))
    assert (one["manufacturer"], one["category"], one["brand"], one["age"]) == (2, "BREAD", "Private", "65+")
    assert (one["income"], two["age"], two["category"]) == ("unknown", "unknown", "SOAP")


@pytest.mark.parametrize(("negatives", "seed"), [(1, 0), (2, 0), (1, 3)])
def test_sampled_pairs_have_the_smallest_hashes(negatives, seed):
    lines = [*fruit(4, 3), *((9, product, 2) for product in range(103, 112)), *((0, 105 + h, 42) for h in range(2))]
    rows = recipe.cross_department(**source(lines), negatives=negatives, seed=seed)
    bought = {(0, 42): {100, 101, 102, 105, 106}} | {(h, 40): {100, 101, 102} for h in range(4)}
    for (household, _), products in bought.items():
        part, last = ("train", 40) if len(products) == 3 else ("valid", 44)
        number = negatives * (3 if part == "train" else 2)
        left = set(range(100, 112)) - products
        expected = sorted(left, key=lambda product: pair_hash(part, household, product, seed))[:number]
        sampled = rows.filter(household=household, buy=0, week=last)["product"]
        assert sorted(sampled) == sorted(expected) and len(expected) == number


def pair_hash(part, household, product, seed):
    """Of whole numbers, as the papers print it: SplitMix64's finaliser of two 64-bit BLAKE2b hashes."""

    def key_hash(key):
        return int.from_bytes(hashlib.blake2b(f"{seed}|{key}".encode(), digest_size=8).digest(), "big")

    x = key_hash(f"{part}|{household}") ^ key_hash(product)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_no_row_depends_on_the_order_of_lines():
    lines = [*fruit(5), *LINES]
    assert_frame_equal(recipe.cross_department(**source(lines)), recipe.cross_department(**source(lines[::-1])))


@pytest.mark.parametrize("last", [40, 44])
def test_no_part_sees_weeks_after_its_own(last):
    before, week = recipe.cross_department(**source([*fruit(5), *LINES])), pl.col("week")
    after = recipe.cross_department(**source([line for line in [*fruit(5), *LINES] if line[2] <= last]))
    assert_frame_equal(after, before.filter(week <= last), categorical_as_str=True)


def test_cold_start_withholds_what_held_out_households_bought_in_the_target_and_nothing_else():
    groceries = [(h, p, p) for h in range(20) for p in (1, 2, 3, 50, 51)]
    read = source([*groceries, *fruit(20), (30, 100, 1)])  # 30 has no five products of each department
    order = sorted(range(20), key=lambda h: hashlib.blake2b(f"0|{h}".encode(), digest_size=8).digest())
    for beta, num_test, num_valid in ((0.2, 4, 1), (0.5, 10, 1), (0.8, 16, 0)):
        rows = recipe.cross_department(**read, target_domain="produce", beta=beta)
        target = rows.filter(domain="produce", buy=1)
        households = {part: set(target.filter(part=part)["household"]) for part in ("train", "valid", "test")}
        assert households["test"] == set(order[:num_test])
        assert households["valid"] == set(order[num_test : num_test + num_valid])
        assert households["train"] == set(order[num_test + num_valid :])
        grocery = rows.filter(domain="grocery", buy=1)
        assert pairs_of(grocery) == {(h, p) for h, p, _ in groceries} and grocery.height == len(groceries)
        assert [grocery.filter(part=part).height for part in households] == [90, 5, 5]
        observed = rows.filter(pl.col("rebuy").is_not_null())
        assert_frame_equal(observed, rows.filter(part="train", buy=1))


def test_schema_has_six_departments_or_the_two_of_cold_start():
    warm, cold = recipe.cross_department_schema(), recipe.cross_department_schema("meat")
    assert warm.domains == recipe.DOMAINS and cold.domains == ("grocery", "meat")
    assert (warm.time, cold.time) == ("week", None) and "week" in warm.excluded
    assert (warm.user, warm.item, warm.task("rebuy").space) == ("household", "product", "buy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "rows"}, r"unknown split 'rows'; expected one of \['time', 'cold_start'\]"),
        ({"tasks": ["spend"]}, r"unknown task 'spend'; the schema has \['buy', 'rebuy'\]"),
        ({"tasks": ["rebuy"]}, "Add buy to data.tasks"),
        ({"negatives": 0}, "negatives is 0 .* expected a whole number >= 1. Set data.negatives"),
        ({"beta": 0.5}, "beta is 0.5 with recipe 'cross_department' and split 'time'.*Remove data.beta"),
        ({"recipe": "repurchase", "negatives": 2}, "negatives is 2 with recipe 'repurchase'.*Remove data.negatives"),
        (
            {"split": "cold_start", "beta": 0.5},
            r"target_domain is None .* expected one of \['drug_gm', .*'cosmetics'\]",
        ),
        ({"split": "cold_start", "beta": 0.5, "target_domain": "grocery"}, "target_domain is 'grocery'"),
        ({"split": "cold_start", "target_domain": "meat"}, "beta is None .* expected a number between 0 and 1"),
        ({"split": "cold_start", "target_domain": "meat", "beta": 1.0}, "beta is 1.0"),
        (
            {"split": "cold_start", "target_domain": "meat", "beta": 0.5, "split_folds": 2, "split_fold": 0},
            "'cold_start' has folds",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(SchemaError, match=message):
        load(**{"name": "complete_journey", "recipe": "cross_department", **options})


# The published facts about the pinned bytes.

COUNTS = {
    # train pairs, households, products, share bought again; valid pairs, households; test pairs, households
    "grocery": (423_495, 2_433, 26_676, 0.2371, 33_770, 1_889, 72_192, 2_130),
    "drug_gm": (87_663, 2_357, 19_172, 0.1337, 6_645, 1_441, 13_273, 1_774),
    "produce": (57_338, 2_281, 2_058, 0.3297, 3_522, 1_149, 6_799, 1_558),
    "meat": (24_586, 2_070, 1_544, 0.2442, 1_785, 827, 3_467, 1_209),
    "nutrition": (8_577, 1_269, 2_040, 0.2423, 604, 265, 926, 384),
    "cosmetics": (3_085, 861, 1_700, 0.0473, 145, 101, 271, 169),
}
POPULARITY = {
    # Recall@10, NDCG@10, HR@10 of the most bought products of train, among all that the household has not bought
    "grocery": (0.0222, 0.0633, 0.3948),
    "drug_gm": (0.0382, 0.0329, 0.1731),
    "produce": (0.1583, 0.1111, 0.4390),
    "meat": (0.1756, 0.1219, 0.3797),
    "nutrition": (0.1077, 0.0683, 0.1510),
    "cosmetics": (0.0877, 0.0405, 0.1243),
}
COLD_HOUSEHOLDS = {"drug_gm": 2_186, "produce": 2_063, "meat": 1_591, "nutrition": 577, "cosmetics": 290}
COLD_COUNTS = {
    # beta -> train, valid and test pairs of the target
    "drug_gm": {0.2: (82_482, 7_880, 23_072), 0.5: (52_560, 5_003, 55_871), 0.8: (22_952, 1_954, 88_528)},
    "produce": {0.2: (49_359, 5_097, 13_446), 0.5: (30_915, 3_582, 33_405), 0.8: (12_633, 1_137, 54_132)},
    "meat": {0.2: (21_324, 2_163, 5_610), 0.5: (13_296, 1_332, 14_469), 0.8: (5_504, 492, 23_101)},
    "nutrition": {0.2: (6_862, 635, 1_520), 0.5: (4_096, 782, 4_139), 0.8: (1_492, 165, 7_360)},
    "cosmetics": {0.2: (1_959, 204, 558), 0.5: (1_248, 120, 1_353), 0.8: (482, 47, 2_192)},
}


@pytest.fixture(scope="module")
def purchases():
    read = {name: tables.read(cj.SOURCE, name) for name in ("transactions", "products")}
    lines = merchandise_lines(**read)
    return {last: recipe.first_purchases(lines, last_week=last) for last in (40, 52)}


@pytest.fixture(scope="module")
def parts(purchases):
    return recipe.by_week(purchases[40])


@pytest.mark.data
@pytest.mark.parametrize("domain", COUNTS)
def test_counts(parts, domain):
    train, valid, test = (pairs.filter(domain=domain) for pairs in parts.values())
    found = (train.height, train["household"].n_unique(), train["product"].n_unique(), round(train["rebuy"].mean(), 4))
    assert (
        found + (valid.height, valid["household"].n_unique(), test.height, test["household"].n_unique())
        == (COUNTS[domain])
    )


@pytest.mark.data
@pytest.mark.parametrize("domain", POPULARITY)
def test_most_bought_products_reach_the_published_floor(parts, domain):
    train, valid, test = (pairs.filter(domain=domain) for pairs in parts.values())
    ranking = train.group_by("product").len().sort("len", "product", descending=[True, False])["product"].to_list()
    seen, wanted = ({} for _ in range(2))
    for known, pairs in ((seen, pl.concat([train, valid])), (wanted, test)):
        known |= {household: set(products) for household, products in pairs.group_by("household").agg("product").rows()}
    sums = [0.0, 0.0, 0.0]
    for household, products in wanted.items():
        ten = []
        for product in ranking:
            if product not in seen[household]:
                ten.append(product)
            if len(ten) == 10:
                break
        hits = [1 / math.log2(place + 2) for place, product in enumerate(ten) if product in products]
        best = sum(1 / math.log2(place + 2) for place in range(min(10, len(products))))
        found = len(hits) / len(products), sum(hits) / best, float(bool(hits))
        sums = [total + value for total, value in zip(sums, found, strict=True)]
    assert [total / len(wanted) for total in sums] == pytest.approx(POPULARITY[domain], abs=5e-5)


@pytest.mark.data
@pytest.mark.parametrize("domain", COLD_COUNTS)
def test_cold_start_counts_and_nested_test_households(purchases, domain):
    source, target = (purchases[52].filter(domain=name) for name in ("grocery", domain))
    assert source.height == 535_076
    before = set()
    for beta, counts in COLD_COUNTS[domain].items():
        households = recipe.cold_households(source, target, beta=beta, seed=0)
        assert sum(map(len, households.values())) == COLD_HOUSEHOLDS[domain]
        found = tuple(target.filter(pl.col("household").is_in(some)).height for some in households.values())
        assert found == counts and before < set(households["test"])
        before = set(households["test"])


@pytest.mark.slow
@pytest.mark.data
def test_departments_are_data_sets_of_their_own():
    dataset = load("complete_journey", recipe="cross_department")
    rows = dataset.summary()["domains"]
    for domain, (train, _, _, _, valid, _, test, households) in COUNTS.items():
        assert [rows[domain][part]["rows"] for part in rows[domain]] == [5 * train, 5 * valid, test + 99 * households]
    grocery, nutrition = (of_domains(dataset, [domain]) for domain in ("grocery", "nutrition"))
    assert len(nutrition.schema.vocabulary("product").values) == 2_040
    assert not {*nutrition.schema.vocabulary("product").values} & {*grocery.schema.vocabulary("product").values}
    assert nutrition.summary()["known_in_train"] == {key: {"rows": 1.0, "values": 1.0} for key in ("user", "item")}


@pytest.mark.slow
@pytest.mark.data
def test_households_of_cold_start_are_known_from_grocery_alone():
    options = {"target_domain": "nutrition", "beta": 0.5, "negatives": 1, "tasks": ["buy", "rebuy"]}
    dataset = load("complete_journey", recipe="cross_department", split="cold_start", **options)
    assert (dataset.info["split"], dataset.info["parameters"]["beta"]) == ("cold_start", 0.5)
    target = of_domains(dataset, ["nutrition"])
    found = [dataset.summary()["tasks"]["rebuy"][part]["observed"] for part in ("train", "valid", "test")]
    assert found == [481_568 + 4_096, 0, 0]
    assert [target.part(part)["buy"].sum() for part in ("train", "valid", "test")] == [4_096, 782, 4_139]
    assert target.summary()["known_in_train"]["user"] == {"rows": 0.0, "values": 0.0}
    held_out = target.part("test")["household"].unique()
    assert held_out.is_in(of_domains(dataset, ["grocery"]).part("train")["household"].unique().implode()).all()
