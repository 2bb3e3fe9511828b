"""Recipe ``repurchase`` of Complete Journey: features of one dated block and its labels.

All features see weeks 1..H. Window n is weeks H-n+1..H; baskets are distinct baskets of merchandise.

| columns | meaning |
|---|---|
| ``n_baskets_{4,12,40}`` | baskets of the household with the category |
| ``weeks_since_last`` | H - last week of purchase, at most 40 |
| ``gap_mean`` | mean weeks between weeks of purchase, 40 if there is one, at most 40 |
| ``log_spend_40``, ``price_mean_40`` | log1p of dollars; dollars / quantity, 0 if none |
| ``promo_share_40`` | share of lines with a retail discount, 0 if none |
| ``private_share_40``, ``coupon_share_40`` | share of lines of the private brand, with a coupon; 0 if none |
| ``h_*`` | the same of the household over all categories; ``h_categories_40`` distinct categories |
| ``c_reach_{40,4}`` | households that bought the category / households active in 40 weeks |
| ``c_promo_share_4`` | share of the category's lines with a retail discount, 0 if none |
| ``main_store`` | store of most baskets in 40 weeks (ties: lowest id) |
| ``recent_categories`` | the last 20 categories over the household's baskets, oldest first, by name within a basket |
| ``last_basket`` | categories of the household's last basket |
"""

import polars as pl

from mtl_jax.data.datasets.complete_journey_lines import DEMOGRAPHICS, DOMAINS, UNKNOWN, known_demographics
from mtl_jax.data.schema import Categorical, MultiHot, Numeric, Schema, Sequence, Vocabulary
from mtl_jax.tasks import Task

LAST_WEEKS = {"train": 40, "valid": 44, "test": 48}
LABEL_WEEKS = 4
WINDOW = 40
"""Weeks of the longest feature window, and the cap of ages and gaps in weeks."""

NUMERICS = (
    "n_baskets_4",
    "n_baskets_12",
    "n_baskets_40",
    "weeks_since_last",
    "gap_mean",
    "log_spend_40",
    "price_mean_40",
    "promo_share_40",
    "private_share_40",
    "coupon_share_40",
    "h_baskets_4",
    "h_baskets_12",
    "h_baskets_40",
    "h_log_spend_40",
    "h_categories_40",
    "h_weeks_since_last",
    "c_reach_40",
    "c_reach_4",
    "c_promo_share_4",
)
RECENT_LENGTH = 20
BASKET_LENGTH = 32
"""Categories kept of the last basket; one row in 27 has more, up to 63."""


def block(visits: pl.DataFrame, domains: pl.DataFrame, demographics: pl.DataFrame, *, last_week: int) -> pl.DataFrame:
    """Features of weeks 1..``last_week`` and labels of the four weeks after it.

    Args:
      visits: One row a (basket, category), in time order.
      domains: (category, domain).
      demographics: The table as fetched.
      last_week: H, the last week that features may see.

    Returns:
      One row a (household, category) with the columns of :func:`repurchase_schema` and ``week``, which is H.
    """
    past = visits.filter(pl.col("week") <= last_week)
    pairs = _pairs(past, last_week)
    future = visits.filter(pl.col("week").is_between(last_week + 1, last_week + LABEL_WEEKS))
    households = _households(past, last_week).join(known_demographics(demographics), on="household", how="left")
    frame = (
        pairs.join(households, on="household", how="left")
        .join(_categories(past, pairs, last_week), on="category", how="left")
        .join(domains, on="category", how="left")
        .join(_labels(future), on=["household", "category"], how="left")
        .sort("household", "category")
    )
    return frame.select(
        "household",
        "category",
        pl.col("domain").fill_null("other"),
        pl.col(DEMOGRAPHICS).fill_null(UNKNOWN),
        "main_store",
        pl.col(NUMERICS).cast(pl.Float32),
        "recent_categories",
        "last_basket",
        pl.col("buy", "promo", "private", "coupon").fill_null(False).cast(pl.Int8),
        pl.col("spend").fill_null(0.0).cast(pl.Float32),
        week=pl.lit(last_week, pl.Int16),
    )


def repurchase_schema() -> Schema:
    """Unfitted schema; both lists share the embedding table of ``category``."""
    singles = ("household", "category", "domain", *DEMOGRAPHICS, "main_store")
    return Schema(
        features=(
            *(Categorical(name, name) for name in singles),
            *(Numeric(name, "log1p") for name in NUMERICS),
            Sequence("recent_categories", "category", RECENT_LENGTH),
            MultiHot("last_basket", "category", BASKET_LENGTH),
        ),
        vocabularies=tuple(Vocabulary(name) for name in singles),
        tasks=(
            Task("buy", "binary"),
            *(Task(name, "binary", implies="buy") for name in ("promo", "private", "coupon")),
            Task("spend", "regression", space="buy"),
        ),
        domain="domain",
        domains=DOMAINS,
        user="household",
        item="category",
        time="week",
        logistic_features=NUMERICS,
        excluded={"week": "it is the same in all rows of a part"},
    )


def _pairs(past: pl.DataFrame, last_week: int) -> pl.DataFrame:
    """Numeric features of (household, category)."""
    in_window = _since(last_week, WINDOW)
    sums = ("cents", "quantity", "lines", "promo", "private", "coupon")
    grouped = (
        past.lazy()
        .group_by("household", "category")
        .agg(
            *(_since(last_week, weeks).sum().alias(f"n_baskets_{weeks}") for weeks in (4, 12, WINDOW)),
            *((pl.col(name) * in_window).sum() for name in sums),
            first=pl.col("week").min(),
            last=pl.col("week").max(),
            weeks=pl.col("week").n_unique(),
        )
    )
    span = pl.col("last") - pl.col("first")
    gap = pl.when(pl.col("weeks") > 1).then(span / (pl.col("weeks") - 1)).otherwise(WINDOW)
    return grouped.select(
        "household",
        "category",
        pl.col("^n_baskets_.*$"),
        weeks_since_last=_age(pl.col("last"), last_week),
        gap_mean=gap.clip(upper_bound=WINDOW),
        log_spend_40=_log_dollars(pl.col("cents")),
        price_mean_40=_share(pl.col("cents") / 100, pl.col("quantity")),
        promo_share_40=_share(pl.col("promo"), pl.col("lines")),
        private_share_40=_share(pl.col("private"), pl.col("lines")),
        coupon_share_40=_share(pl.col("coupon"), pl.col("lines")),
    ).collect()


def _households(past: pl.DataFrame, last_week: int) -> pl.DataFrame:
    """Numeric features, main store, recent categories and last basket of each household."""
    in_window = _since(last_week, WINDOW)
    baskets = past.select("household", "basket", "store", "week").unique("basket", maintain_order=True)
    counts = baskets.group_by("household").agg(
        *(_since(last_week, weeks).sum().alias(f"h_baskets_{weeks}") for weeks in (4, 12, WINDOW)),
        h_weeks_since_last=_age(pl.col("week").max(), last_week),
        basket=pl.col("basket").last(),
    )
    # ``past`` is in time order within a household, so a tail is the most recent part.
    sums = past.group_by("household", maintain_order=True).agg(
        h_log_spend_40=_log_dollars((pl.col("cents") * in_window).sum()),
        h_categories_40=pl.col("category").filter(in_window).n_unique(),
        recent_categories=pl.col("category").tail(RECENT_LENGTH),
    )
    last_baskets = (
        past.join(counts.select("basket"), on="basket", how="semi", maintain_order="left")
        .group_by("household", maintain_order=True)
        .agg(last_basket=pl.col("category"))
    )
    stores = (
        baskets.filter(in_window)
        .group_by("household", "store")
        .len()
        .sort("household", -pl.col("len").cast(pl.Int64), "store")
        .unique("household", keep="first", maintain_order=True)
        .select("household", main_store=pl.col("store"))
    )
    joined = counts.drop("basket")
    for part in (sums, last_baskets, stores):
        joined = joined.join(part, on="household", how="left")
    return joined


def _categories(past: pl.DataFrame, pairs: pl.DataFrame, last_week: int) -> pl.DataFrame:
    """Reach among the households active in the window, and the share of recent lines on promotion."""
    active = max(past.filter(_since(last_week, WINDOW))["household"].n_unique(), 1)
    reach = pairs.group_by("category").agg(
        *((pl.col(f"n_baskets_{weeks}") > 0).sum().truediv(active).alias(f"c_reach_{weeks}") for weeks in (WINDOW, 4))
    )
    recent = _since(last_week, 4)
    promoted = past.group_by("category").agg(
        c_promo_share_4=_share((pl.col("promo") * recent).sum(), (pl.col("lines") * recent).sum())
    )
    return reach.join(promoted, on="category")


def _labels(future: pl.DataFrame) -> pl.DataFrame:
    """Labels of the pairs that were bought; all others are 0."""
    return future.group_by("household", "category").agg(
        pl.col("promo", "private", "coupon").sum() > 0,
        buy=pl.lit(True),
        spend=pl.col("dollars").sum().log1p(),
    )


def _since(last_week: int, weeks: int) -> pl.Expr:
    return pl.col("week") > last_week - weeks


def _age(week: pl.Expr, last_week: int) -> pl.Expr:
    return (last_week - week).clip(upper_bound=WINDOW)


def _share(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    return pl.when(whole > 0).then(part / whole).otherwise(0.0)


def _log_dollars(cents: pl.Expr) -> pl.Expr:
    return (cents / 100).log1p()
