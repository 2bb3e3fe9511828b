"""The lines of Complete Journey that are merchandise, and what is summed from them before any recipe."""

import polars as pl

NOT_MERCHANDISE_CATEGORIES = ("COUPON/MISC ITEMS", "COUPONS/STORE & MFG", "FUEL")
NOT_MERCHANDISE_DEPARTMENTS = ("FUEL", "MISCELLANEOUS", "COUPON")
DEPARTMENT_DOMAINS = {
    "GROCERY": "grocery",
    "DRUG GM": "drug_gm",
    "PRODUCE": "produce",
    "MEAT": "meat",
    "MEAT-PCKGD": "meat",
    "SEAFOOD": "meat",
    "SEAFOOD-PCKGD": "meat",
    "DELI": "deli_bakery",
    "PASTRY": "deli_bakery",
    "SALAD BAR": "deli_bakery",
    "NUTRITION": "nutrition",
    "COSMETICS": "cosmetics",
}
DOMAINS = ("grocery", "drug_gm", "produce", "meat", "deli_bakery", "nutrition", "cosmetics", "other")
DEMOGRAPHICS = (
    "age",
    "income",
    "home_ownership",
    "marital_status",
    "household_size",
    "household_comp",
    "kids_count",
)
UNKNOWN = "unknown"


def merchandise_lines(
    transactions: pl.DataFrame, products: pl.DataFrame, *, merchandise_only: bool = True
) -> pl.DataFrame:
    """Lines of products with a category, without coupons, fuel and miscellany.

    Lines without a price stay: a coupon may pay all.
    """
    wanted = pl.col("product_category").is_not_null()
    if merchandise_only:
        wanted &= ~pl.col("product_category").is_in(NOT_MERCHANDISE_CATEGORIES)
        wanted &= ~pl.col("department").is_in(NOT_MERCHANDISE_DEPARTMENTS)
    # The enumeration comes from the product list, which is no part of the year, so codes do not depend on later weeks.
    goods = products.filter(wanted).select(
        "product_id",
        category=pl.col("product_category").cast(_enum(products["product_category"])),
        department=pl.col("department").cast(_enum(products["department"])),
        private=pl.col("brand") == "Private",
    )
    return transactions.join(goods, on="product_id").select(
        household=pl.col("household_id").cast(pl.Int32),
        store=pl.col("store_id").cast(pl.Int32),
        basket=pl.col("basket_id"),
        time=pl.col("transaction_timestamp"),
        week=pl.col("week").cast(pl.Int16),
        category=pl.col("category"),
        department=pl.col("department"),
        product=pl.col("product_id"),
        dollars=pl.col("sales_value"),
        cents=(pl.col("sales_value") * 100).round().cast(pl.Int64),
        quantity=pl.col("quantity"),
        promo=pl.col("retail_disc") > 0,
        private=pl.col("private"),
        coupon=pl.col("coupon_disc") > 0,
    )


def category_domains(lines: pl.DataFrame, *, last_week: int) -> pl.DataFrame:
    """(category, domain) by the department of most lines in weeks 1..``last_week`` (ties: first by name)."""
    counted = lines.filter(pl.col("week") <= last_week).group_by("category", "department").len()
    majority = counted.sort("category", -pl.col("len").cast(pl.Int64), "department").unique(
        "category", keep="first", maintain_order=True
    )
    domain = pl.col("department").cast(pl.String).replace_strict(DEPARTMENT_DOMAINS, default="other")
    return majority.select("category", domain=domain.cast(pl.Enum(DOMAINS)))


def category_visits(lines: pl.DataFrame) -> pl.DataFrame:
    """One row a (basket, category), with sums over its lines, in the order of (household, time, basket, category)."""
    visits = (
        lines.lazy()
        .group_by("basket", "category")
        .agg(
            pl.col("household", "store", "time", "week").first(),
            pl.col("dollars", "cents", "quantity").sum(),
            pl.len().alias("lines"),
            pl.col("promo", "private", "coupon").sum(),
        )
    )
    return visits.sort("household", "time", "basket", "category").collect()


def known_demographics(demographics: pl.DataFrame) -> pl.DataFrame:
    """Demographics by household, with :data:`UNKNOWN` for null."""
    return demographics.select(
        pl.col("household_id").cast(pl.Int32).alias("household"),
        *(
            pl.col(name).fill_null(UNKNOWN).cast(pl.Enum(sorted({*demographics[name].drop_nulls(), UNKNOWN})))
            for name in DEMOGRAPHICS
        ),
    )


def _enum(values: pl.Series) -> pl.Enum:
    return pl.Enum(values.drop_nulls().unique().sort())
