"""Recipe ``cross_department`` of Complete Journey: pairs of households and products, for transfer between departments.

**Which product of a department will a household buy for the first time?** Domains are six departments, which share
households and no product. A row is a pair (household, product): bought (``buy`` 1), or sampled among the products that
the household did not buy (``buy`` 0). ``rebuy``, whether a pair was bought in two distinct weeks or more, is observed on
bought training pairs only; it is an auxiliary task, without metrics on valid and test.

| split | train | valid | test |
|---|---|---|---|
| ``time``: the week of the first purchase | 1..40 | 41..44 | 45..52 |
| ``cold_start``, the target: the household | all others | a tenth of those that are not test | the first floor(beta n) |
| ``cold_start``, grocery: the pair | .9 | .05 | .05 |

With ``time``, household and product of every pair of valid and test are in train, in that department.
``cold_start`` is the protocol of EMCDR (Man, Shen, Jin, Cheng, *Cross-Domain Recommendation: An Embedding and Mapping
Approach*, IJCAI 2017): n households with at least five products of both departments, in hash order; what the held-out
ones bought in the target is withheld, what they bought in grocery stays. Pairs of other households in the target are
left out; what held-out households bought stays even where train has not seen the product. Unlike there, a tenth of the
grocery pairs, in hash order, selects and judges the model of the source.

**Sampling.** All products of a department's training pairs are candidates. A household gets, of those that it has not
bought in this part or an earlier one, the ones with the smallest hashes of (part, household, product): ``negatives`` for
each of its bought pairs in train and valid, and 99 in test. No random generator is involved, and no later part is looked
at: what is bought in test may be a negative in train, as may the negatives of test, neither more often than the other. A
hash is mixed from ``key_hash("part|household")`` and ``key_hash("product")``: 3e8 pairs are too many to hash one by one.

**What the metrics mean.** ``auc`` is the probability that a bought pair of any household gets a higher score than a
sampled one of any household, so knowing who buys much counts; ``gauc_impr`` compares within households. Sampling is
uniform: popular products alone score high. Log loss is that of the sampled rates, which are those of train in valid, and
others in test. Neither is a ranking of all products: Recall@10 and NDCG@10, by which this protocol is usually judged, wait
for ranking metrics.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl

from mtl_jax.data.dataset import PARTS
from mtl_jax.data.datasets.complete_journey_lines import DEMOGRAPHICS, UNKNOWN, known_demographics, merchandise_lines
from mtl_jax.data.hash_order import cut, cuts, hash_ranking, key_hash, mixed
from mtl_jax.data.schema import Categorical, Schema, Vocabulary
from mtl_jax.tasks import Task

SOURCE_DOMAIN = "grocery"
DEPARTMENTS = {
    "GROCERY": SOURCE_DOMAIN,
    "DRUG GM": "drug_gm",
    "PRODUCE": "produce",
    "MEAT": "meat",
    "NUTRITION": "nutrition",
    "COSMETICS": "cosmetics",
}
DOMAINS = tuple(DEPARTMENTS.values())
TARGETS = DOMAINS[1:]
LABEL_ENDS = {"train": 40, "valid": 44, "test": 52}
NEGATIVES = 4
"""Sampled pairs for each bought one, as in He et al., *Neural Collaborative Filtering*, WWW 2017."""
TEST_NEGATIVES = 99
LEAST_PRODUCTS = 5
"""Products of each department that a household of ``cold_start`` has bought."""
VALID_SHARE = 0.1
"""Of the households of ``cold_start`` that are not test."""
SOURCE_FRACTIONS = (0.9, 0.05, 0.05)
FACTS = ("manufacturer", "category", "brand")


def cross_department(
    transactions: pl.DataFrame,
    products: pl.DataFrame,
    demographics: pl.DataFrame,
    *,
    merchandise_only: bool = True,
    negatives: int = NEGATIVES,
    target_domain: str | None = None,
    beta: float | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """The rows of train, valid and test, each sorted by (household, product).

    Args:
      transactions, products, demographics: The tables as fetched.
      merchandise_only: Whether coupons, fuel and miscellaneous lines are left out.
      negatives: Sampled pairs for each bought one of train and valid.
      target_domain: One of :data:`TARGETS` for the rows of ``cold_start``; None for those of ``time``.
      beta: Share of the households of ``cold_start`` that is test.
      seed: Of all hashes.

    Returns:
      The columns of :func:`cross_department_schema`, with ``week``, the last label week of the part; or ``part``, for
      ``cold_start``.
    """
    lines = merchandise_lines(transactions, products, merchandise_only=merchandise_only)
    if target_domain is None:
        bought = by_week(first_purchases(lines, last_week=LABEL_ENDS["train"]))
    else:
        pairs = first_purchases(lines, last_week=LABEL_ENDS["test"])
        bought = by_household(pairs, target=target_domain, beta=beta, seed=seed)
    rows = with_facts(with_negatives(bought, negatives=negatives, seed=seed), products, demographics)
    if target_domain is not None:
        return rows
    return rows.with_columns(week=pl.col("part").replace_strict(LABEL_ENDS, return_dtype=pl.Int16)).drop("part")


def by_week(pairs: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Part -> bought pairs of split ``time``."""
    week = pl.col("first_week")
    train = pairs.filter(week <= LABEL_ENDS["train"])
    known = pairs.join(train, on=["household", "domain"], how="semi").join(train, on="product", how="semi")
    return {
        "train": train,
        "valid": known.filter(week.is_between(LABEL_ENDS["train"] + 1, LABEL_ENDS["valid"])),
        "test": known.filter(week.is_between(LABEL_ENDS["valid"] + 1, LABEL_ENDS["test"])),
    }


def by_household(pairs: pl.DataFrame, *, target: str, beta: float, seed: int) -> dict[str, pl.DataFrame]:
    """Part -> bought pairs of split ``cold_start``: those of grocery in hash order, those of the target by household."""
    source, own = (pairs.filter(domain=name) for name in (SOURCE_DOMAIN, target))
    keys = [f"{household}|{product}" for household, product in source.select("household", "product").iter_rows()]
    places = cut(hash_ranking(keys, seed), SOURCE_FRACTIONS)
    households = cold_households(source, own, beta=beta, seed=seed)
    return {
        part: pl.concat([source[places[part]], own.filter(pl.col("household").is_in(households[part]))])
        for part in PARTS
    }


def first_purchases(lines: pl.DataFrame, *, last_week: int) -> pl.DataFrame:
    """One row a (household, product) bought in weeks 1..52, sorted, with ``domain``, ``first_week`` and ``rebuy``: whether
    it was bought in two weeks or more, up to ``last_week``."""
    wanted = lines.filter(
        pl.col("week") <= LABEL_ENDS["test"], pl.col("department").cast(pl.String).is_in(list(DEPARTMENTS))
    )
    pairs = wanted.group_by("household", "product").agg(
        pl.col("department").first(),
        first_week=pl.col("week").min(),
        rebuy=pl.col("week").filter(pl.col("week") <= last_week).n_unique() > 1,
    )
    return pairs.select(
        "household",
        "product",
        "first_week",
        domain=pl.col("department").cast(pl.String).replace_strict(DEPARTMENTS, return_dtype=pl.Enum(DOMAINS)),
        rebuy=pl.col("rebuy").cast(pl.Int8),
    ).sort("household", "product")


def cold_households(source: pl.DataFrame, target: pl.DataFrame, *, beta: float, seed: int) -> dict[str, list[int]]:
    """Part -> the households with at least five products of both departments, in hash order: the first floor(beta n) are
    test, a tenth of the rest, rounded down, valid."""
    enough = [
        pairs.group_by("household").len().filter(pl.col("len") >= LEAST_PRODUCTS)["household"]
        for pairs in (source, target)
    ]
    shared = enough[0].filter(enough[0].is_in(enough[1].implode())).to_list()
    order = np.array(shared)[hash_ranking(shared, seed)]
    num_test = cuts(len(order), (beta, 1 - beta))[0]
    num_valid = cuts(len(order) - num_test, (VALID_SHARE, 1 - VALID_SHARE))[0]
    test, valid, train = (some.tolist() for some in np.split(order, [num_test, num_test + num_valid]))
    return {"train": train, "valid": valid, "test": test}


def with_negatives(bought: Mapping[str, pl.DataFrame], *, negatives: int, seed: int) -> pl.DataFrame:
    """Bought and sampled pairs of each part, as the module says.

    Args:
      bought: Part -> its pairs, in the order of the parts, with ``household``, ``product``, ``domain`` and ``rebuy``.
      negatives: Sampled pairs for each bought one of train and valid.
      seed: Of the hashes.

    Returns:
      ``household``, ``product``, ``buy``, ``rebuy`` (null outside the bought pairs of train) and ``part``, sorted by
      (household, product) within each part.
    """
    rows, seen = [], []
    for part, pairs in bought.items():
        seen.append(pairs)
        number = pl.lit(TEST_NEGATIVES) if part == "test" else pl.len() * negatives
        sampled = [
            unseen(
                bought["train"].filter(domain=domain)["product"],
                pairs.filter(domain=domain).group_by("household").agg(number=number),
                pl.concat(seen).filter(domain=domain),
                salt=part,
                seed=seed,
            )
            for domain in DOMAINS
        ]
        both = pl.concat(
            [
                pairs.select(
                    "household",
                    "product",
                    buy=pl.lit(1, pl.Int8),
                    rebuy="rebuy" if part == "train" else pl.lit(None, pl.Int8),
                ),
                pl.concat(sampled).with_columns(buy=pl.lit(0, pl.Int8), rebuy=pl.lit(None, pl.Int8)),
            ]
        )
        rows.append(both.sort("household", "product").with_columns(part=pl.lit(part, pl.Enum(PARTS))))
    return pl.concat(rows)


def unseen(products: pl.Series, numbers: pl.DataFrame, seen: pl.DataFrame, *, salt: str, seed: int) -> pl.DataFrame:
    """For each household its ``number`` of products with the smallest hashes, among those that it has not seen.

    Args:
      products: The candidates, with repetitions.
      numbers: ``household`` and ``number``.
      seen: Pairs ``household`` and ``product``.
      salt: Another one gives another choice.
      seed: Of the hashes.

    Returns:
      Pairs ``household`` and ``product``: all unseen ones where there are fewer.
    """
    products = products.unique().sort()
    product_hashes = np.array([key_hash(product, seed) for product in products], np.uint64)
    places = pl.DataFrame({"product": products}).with_row_index("place")
    places = seen.join(places, on="product").group_by("household").agg("place")
    households = numbers.join(places, on="household", how="left").sort("household")
    chosen = []
    for household, number, place in households.select("household", "number", "place").iter_rows():
        left = np.delete(np.arange(len(products)), place or [])
        if number < len(left):
            hashes = mixed(product_hashes[left] ^ np.uint64(key_hash(f"{salt}|{household}", seed)))
            left = left[np.argpartition(hashes, number)[:number]]
        chosen.append(left)
    return pl.DataFrame(
        {
            "household": households["household"].to_numpy().repeat([len(left) for left in chosen]),
            "product": products.gather(np.concatenate([np.zeros(0, np.int64), *chosen])),
        }
    )


def with_facts(rows: pl.DataFrame, products: pl.DataFrame, demographics: pl.DataFrame) -> pl.DataFrame:
    """The rows, in their order, with what is known of product and household whatever they buy."""
    facts = products.select(
        pl.col("product_id").alias("product"),
        pl.col("manufacturer_id").cast(pl.Int32).alias("manufacturer"),
        pl.col("product_category").cast(pl.Categorical).alias("category"),
        pl.col("brand").cast(pl.Categorical),
        domain=pl.col("department").replace_strict(DEPARTMENTS, default=None, return_dtype=pl.Enum(DOMAINS)),
    )
    return (
        rows.join(facts, on="product", how="left", maintain_order="left")
        .join(known_demographics(demographics), on="household", how="left", maintain_order="left")
        .with_columns(pl.col(DEMOGRAPHICS).fill_null(UNKNOWN))
    )


def cross_department_schema(target_domain: str | None = None) -> Schema:
    """Unfitted schema of both tasks, of split ``time``, or of ``cold_start`` with that target."""
    names = ("household", "product", "domain", *FACTS, *DEMOGRAPHICS)
    time = "week" if target_domain is None else None
    return Schema(
        features=tuple(Categorical(name, name) for name in names),
        vocabularies=tuple(Vocabulary(name) for name in names),
        tasks=(Task("buy", "binary"), Task("rebuy", "binary", space="buy")),
        domain="domain",
        domains=DOMAINS if target_domain is None else (SOURCE_DOMAIN, target_domain),
        user="household",
        item="product",
        time=time,
        excluded={} if time is None else {time: "it is the same in all rows of a part"},
    )
