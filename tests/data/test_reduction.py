"""Reductions: nested prefixes of the hash order of train and valid, test untouched, everything fitted on what is kept."""

import itertools

import numpy as np
import polars as pl
import pytest

import mtl_jax
from mtl_jax.data import PARTS, splits
from mtl_jax.data.folds import Folds
from mtl_jax.data.reduction import Reduction, reduce
from mtl_jax.errors import SchemaError

SMALL = {
    "synthetic": {"recipe": "kinds", "num_rows": 600, "dim": 3},
    "countries": {
        **{"rho": [1.0, 0.5], "rows": [400, 400], "ctr": [0.5, 0.5], "cvr": [0.5, 0.5]},
        **{"users": 90, "items": 20},
    },
    "linear_gaussian": {"dim": 3, "source_rows": 100, "target_rows": 100, "valid_rows": 20, "test_rows": 20},
    "table": {"tasks": {"buy": "binary"}, "user": "user"},
}
FETCHED = ("movielens_100k", "complete_journey")
WHOLE = {"complete_journey": "d1ec1c6816e0ec81", "movielens_1m": "2145a069f3953bb1", "synthetic": "84f5757619f5ba6c"}
"""What the identity of whole sets begins with since before there were fractions."""


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A data set by name; the table is written once."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("own") / "visits.csv"
    amount = rng.normal(size=500)
    table = {"user": [f"u{code}" for code in rng.integers(0, 50, 500)], "amount": amount}
    pl.DataFrame(table | {"buy": (amount + rng.normal(size=500) > 0).astype(int)}).write_csv(path)

    def loaded(name, **options):
        given = SMALL.get(name, {}) | ({"path": str(path)} if name == "table" else {})
        return mtl_jax.data.load(name, **given, **options)

    return loaded


@pytest.fixture(params=[*SMALL, *(pytest.param(name, marks=pytest.mark.data) for name in FETCHED)])
def name(request):
    return request.param


def parts_of(num_train, num_valid, num_test):
    rows = np.random.default_rng(1).permutation(num_train + num_valid + num_test)
    return dict(zip(PARTS, np.split(rows, [num_train, num_train + num_valid]), strict=True))


def test_what_is_kept_comes_first_in_the_hash_order():
    parts = parts_of(2_000, 1_500, 300)
    kept = reduce(parts, Reduction(0.8), seed=5)
    for part, count in (("train", 1_600), ("valid", 1_200)):
        order = sorted(parts[part].tolist(), key=lambda row: splits.key_hash(row, 5))
        assert kept[part].tolist() == sorted(order[:count])
    assert np.array_equal(kept["test"], parts["test"])
    other = reduce(parts, Reduction(0.8), seed=6)
    assert not np.array_equal(other["train"], kept["train"])


@pytest.mark.parametrize(
    ("fraction", "valid", "num_valid", "sizes"),
    [
        (0.5, None, 4_000, (5_000, 2_000)),
        (0.2, None, 4_000, (2_000, 1_000)),  # 800 would be too few
        (0.01, None, 999, (100, 999)),
        (0.01, "full", 4_000, (100, 4_000)),
        (0.29, "full", 100, (2_900, 100)),  # .29 of 10,000 is 2899.9999999999995 in floats
        (0.00019, None, 10, (1, 10)),
    ],
)
def test_sizes(fraction, valid, num_valid, sizes):
    kept = reduce(parts_of(10_000, num_valid, 50), Reduction(fraction, valid), seed=0)
    assert tuple(len(kept[part]) for part in PARTS) == (*sizes, 50)


@pytest.mark.parametrize("split", ["rows", "cold_user"])
def test_a_row_split_reduced_is_the_row_split_with_the_end_of_train_cut_off(split):
    """The hash order of rows is one order: a fraction of train is what a smaller first share would have been."""
    frame = pl.DataFrame({"user": np.arange(3_000) // 7})
    parts = splits.split(frame, split, user="user", seed=2, reduction=Reduction(0.25, "full"))
    whole = splits.split(frame, split, user="user", seed=2)
    if split == "rows":
        assert np.array_equal(parts["train"], splits.rows(frame, fractions=(0.2, 0.1, 0.7), seed=2)["train"])
    assert set(parts["train"]) < set(whole["train"]) and len(parts["train"]) == len(whole["train"]) // 4
    assert np.array_equal(parts["valid"], whole["valid"]) and np.array_equal(parts["test"], whole["test"])


def test_folds_come_first():
    frame = pl.DataFrame({"x": np.arange(4_000)})
    fold = splits.split(frame, "rows", folds=Folds(2, 1))
    kept = splits.split(frame, "rows", folds=Folds(2, 1), reduction=Reduction(0.1))
    assert set(kept["train"]) < set(fold["train"]) and set(kept["valid"]) < set(fold["valid"])
    assert (len(kept["train"]), len(kept["valid"])) == (180, 1_000)


def test_a_data_set_is_nested_and_its_test_part_is_the_same(name, load):
    fractions = (0.2, 1.0) if name == "complete_journey" else (0.05, 0.2, 1.0)
    sets = {fraction: load(name, target_fraction=fraction) for fraction in fractions}
    whole = sets[1.0]
    for small, large in itertools.pairwise(fractions):
        for part in ("train", "valid"):
            assert set(sets[small].splits[part]) <= set(sets[large].splits[part])
    for fraction, dataset in sets.items():
        assert len(dataset.splits["train"]) == int(len(whole.splits["train"]) * fraction)
        assert dataset.splits["test"].tobytes() == whole.splits["test"].tobytes()
        assert dataset.part("test").equals(whole.part("test"))
        assert dataset.info["target_fraction"] == fraction
    assert len({dataset.identity for dataset in sets.values()}) == len(fractions)
    if name == "complete_journey":
        assert whole.identity.startswith(WHOLE[name])


def test_everything_is_fitted_on_the_rows_that_are_kept(load):
    dataset = load("synthetic", target_fraction=0.2)
    train = dataset.part("train")
    assert train.height == 100
    assert set(dataset.schema.vocabulary("user").values) == set(train["user"])
    for numeric in dataset.schema.numerics:
        assert numeric.mean == pytest.approx(train[numeric.name].cast(pl.Float64).mean(), abs=1e-9)
    assert dataset.for_training().train.num_rows == 100


def test_the_same_options_give_the_same_set_and_whole_sets_have_the_identity_of_before(load):
    first, second = (load("table", target_fraction=0.3) for _ in range(2))
    assert first.identity == second.identity and np.array_equal(first.splits["train"], second.splits["train"])
    assert first.info["split_options"] == {"reduction": {"fraction": 0.3, "valid": None}}
    full = load("table", target_fraction=0.3, valid_fraction="full")
    assert full.identity != first.identity and np.array_equal(full.splits["train"], first.splits["train"])
    whole = load("table")
    assert whole.identity == load("table", target_fraction=1, valid_fraction="full").identity
    assert whole.info["split_options"] == {} and whole.info["target_fraction"] == 1.0


@pytest.mark.parametrize("name", ["synthetic", pytest.param("movielens_1m", marks=pytest.mark.data)])
def test_the_identity_of_a_whole_set_is_that_of_before(name):
    assert mtl_jax.data.load(name).identity.startswith(WHOLE[name])


@pytest.mark.parametrize("value", [0, 1.5, -0.1, float("nan"), float("inf"), "a", None, True, [0.1]])
def test_a_fraction_that_is_none_is_refused(value, load):
    message = r"target_fraction is .*; expected a number above 0 and at most 1, .* Set data\.target_fraction"
    with pytest.raises(SchemaError, match=message):
        load("synthetic", target_fraction=value)


@pytest.mark.parametrize("value", ["half", 0.5, 1, True])
def test_what_valid_keeps_is_its_share_or_all(value, load):
    with pytest.raises(
        SchemaError, match=r"valid_fraction is .*; expected null.* or 'full'\. Set data\.valid_fraction"
    ):
        load("synthetic", target_fraction=0.5, valid_fraction=value)


def test_a_fraction_of_no_row_is_refused(load):
    with pytest.raises(
        SchemaError, match=r"0\.001 of 500 training rows, which is none; .* Raise data\.target_fraction"
    ):
        load("synthetic", target_fraction=0.001)
