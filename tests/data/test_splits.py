"""Splits: disjoint, complete, reproducible anywhere, and never looking into the future."""

import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from mtl_jax.data import splits
from mtl_jax.data.dataset import PARTS
from mtl_jax.errors import SchemaError

NUM_ROWS = 400
WINDOWS = {"train": 40, "valid": 44, "test": 48}


@pytest.fixture(scope="module")
def frame():
    rng = np.random.default_rng(0)
    user = rng.zipf(1.5, NUM_ROWS) % 60
    return pl.DataFrame(
        {
            "user": [f"u{code}" for code in user],
            "time": rng.integers(0, 90, NUM_ROWS),
            "domain": rng.choice(["nl", "es", "fr"], NUM_ROWS),
            "week": rng.choice([40, 44, 48], NUM_ROWS),
        }
    )


OPTIONS = {
    "rows": {},
    "time": {},
    "user_time": {},
    "leave_last": {},
    "cold_user": {},
    "domain_holdout": {"held": "fr"},
    "given": {"parts": np.random.default_rng(1).permutation(NUM_ROWS)},
}
KEYS = {"user": "user", "time": "time", "domain": "domain"}


@pytest.mark.parametrize("name", splits.SPLITS)
def test_parts_are_sorted_disjoint_and_cover_all_rows(frame, name):
    parts = splits.split(frame, name, **KEYS, **OPTIONS[name])
    assert list(parts) == list(PARTS)
    for rows in parts.values():
        assert rows.dtype == np.int64 and len(rows)
        assert np.all(np.diff(rows) > 0)
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(NUM_ROWS))


def test_key_hash_is_the_one_of_coreutils():
    # printf '0|a' | b2sum -l 64
    assert splits.key_hash("a") == 0x7158A4589409364E
    assert splits.key_hash("1m_1", seed=7) == 0xDB3AC58A66D0C300
    assert splits.key_hash(12) == 0x9A3E3EA8AEACAB5D


def test_hash_order_is_the_order_of_hash_and_text():
    keys = [f"k{i}" for i in range(53)]
    order = splits.hash_order(keys, seed=3)
    expected = sorted(keys, key=lambda key: (splits.key_hash(key, 3), key))
    assert [key for part in PARTS for key in order[part]] == expected
    # floor(53 * .8) = 42, floor(53 * .9) = 47
    assert [len(order[part]) for part in PARTS] == [42, 5, 6]


def test_hash_order_ignores_order_and_repetition_of_keys():
    keys = list(range(30))
    assert splits.hash_order(keys) == splits.hash_order([*reversed(keys), 3, 3])


def test_cuts_do_not_lose_a_unit_to_float_rounding():
    # .7 + .2 is .8999999999999999 in floats; nine of ten keys are train and valid all the same
    assert [len(keys) for keys in splits.hash_order(range(10), (0.7, 0.2, 0.1)).values()] == [7, 2, 1]


def test_smaller_train_shares_are_nested():
    small, large = (set(splits.hash_order(range(200), (share, 1 - share))["train"]) for share in (0.05, 0.2))
    assert small < large and len(small) == 10


def test_rows_are_the_hash_order_of_row_numbers(frame):
    expected = splits.hash_order(range(NUM_ROWS), seed=5)
    assert {part: rows.tolist() for part, rows in splits.rows(frame, seed=5).items()} == {
        part: sorted(keys) for part, keys in expected.items()
    }
    assert not np.array_equal(splits.rows(frame, seed=5)["test"], splits.rows(frame, seed=6)["test"])


def test_splits_do_not_depend_on_the_hash_seed_of_the_process():
    program = (
        "import polars as pl; from mtl_jax.data import splits; "
        "f = pl.DataFrame({'u': [f'u{i * i % 37}' for i in range(99)]}); "
        "print(splits.cold_user(f, column='u')['test'].tolist())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] != "[]\n"


def test_time_puts_the_future_last_and_breaks_ties_by_row():
    frame = pl.DataFrame({"t": [5, 1, 3, 3, 3, 2, 9, 8, 7, 6]})
    parts = splits.time(frame, column="t", fractions=(0.3, 0.3, 0.4))
    assert {part: rows.tolist() for part, rows in parts.items()} == {
        "train": [1, 2, 5],
        "valid": [0, 3, 4],
        "test": [6, 7, 8, 9],
    }


def test_time_keeps_ties_together_in_the_earlier_part():
    frame = pl.DataFrame({"t": [5, 1, 3, 3, 3, 2, 9, 8, 7, 6]})
    parts = splits.time(frame, column="t", fractions=(0.3, 0.3, 0.4), ties="together")
    assert parts["train"].tolist() == [1, 2, 3, 4, 5]
    assert parts["valid"].tolist() == [0]


@pytest.mark.parametrize("ties", splits.TIES)
def test_time_never_trains_on_the_future(frame, ties):
    parts = splits.time(frame, column="time", ties=ties)
    time = frame["time"].to_numpy()
    assert time[parts["train"]].max() <= time[parts["valid"]].min()
    assert time[parts["valid"]].max() <= time[parts["test"]].min()
    if ties == "together":
        assert time[parts["train"]].max() < time[parts["valid"]].min()


def test_time_cuts_are_the_first_times_of_valid_and_test(frame):
    parts = splits.time(frame, column="time", cuts=(30, 60))
    time = frame["time"].to_numpy()
    assert set(time[parts["train"]]) == set(range(30)) & set(time)
    assert set(time[parts["valid"]]) == set(range(30, 60)) & set(time)
    assert time[parts["test"]].min() == 60


def test_time_windows_select_by_value(frame):
    parts = splits.time(frame, column="week", windows=WINDOWS)
    for part, week in WINDOWS.items():
        assert set(frame["week"].to_numpy()[parts[part]]) == {week}


def test_user_time_cuts_each_user_by_time_and_keeps_short_users_in_train():
    frame = pl.DataFrame(
        {"u": ["a"] * 10 + ["b"] * 4 + ["c"] * 5, "t": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 4, 3, 2, 1, 1, 1, 1, 1, 1]}
    )
    parts = splits.user_time(frame, user="u", time="t")
    # a: times to 7 train, 8 valid, 9 test. b: four rows, all train. c: 4 train, floor(4.5) - 4 = 0 valid, 1 test.
    assert parts["valid"].tolist() == [1]
    assert parts["test"].tolist() == [0, 18]


def test_leave_last_takes_the_last_rows_of_each_user(frame):
    for k in (1, 2):
        parts = splits.leave_last(frame, user="user", time="time", k=k)
        for (user,), rows in frame.with_row_index().sort("time", "index").group_by("user", maintain_order=True):
            order = rows["index"].to_list()
            found = {part: [row for row in order if row in set(parts[part].tolist())] for part in PARTS}
            if len(order) < 2 * k + 1:
                assert found["train"] == order, user
            else:
                assert (found["valid"], found["test"]) == (order[-2 * k : -k], order[-k:]), user


def test_cold_user_lets_no_user_cross(frame):
    parts = splits.cold_user(frame, column="user")
    users = {part: set(frame["user"][rows]) for part, rows in parts.items()}
    assert not users["train"] & (users["valid"] | users["test"]) and not users["valid"] & users["test"]
    order = splits.hash_order(frame["user"])
    assert users == {part: set(keys) for part, keys in order.items()}


def test_cold_user_follows_the_key_not_the_row(frame):
    shuffled = frame.with_row_index("row").sample(fraction=1, shuffle=True, seed=1)
    before = splits.cold_user(frame, column="user")
    after = splits.cold_user(shuffled, column="user")
    for part in PARTS:
        assert sorted(shuffled["row"][after[part]]) == before[part].tolist()


@pytest.mark.parametrize("by", ["rows", "cold_user"])
def test_domain_holdout_shows_the_held_domain_to_test_only(frame, by):
    parts = splits.domain_holdout(frame, column="domain", held="es", by=by, user="user")
    domain = frame["domain"].to_numpy()
    assert np.array_equal(parts["test"], np.flatnonzero(domain == "es"))
    rest = NUM_ROWS - len(parts["test"])
    if by == "rows":
        assert len(parts["train"]) == int(0.9 * rest)
    else:
        assert not set(frame["user"][parts["train"]]) & set(frame["user"][parts["valid"]])


def test_given_reads_a_column_a_mapping_and_an_order():
    frame = pl.DataFrame({"part": ["test", "train", "valid", "train"], "u": list("abcd")})
    expected = {"train": [1, 3], "valid": [2], "test": [0]}
    for parts in ("part", expected):
        found = splits.given(frame, parts=parts)
        assert {part: rows.tolist() for part, rows in found.items()} == expected
    order = splits.given(frame, parts=[3, 1, 0, 2], fractions=(0.5, 0.25, 0.25))
    assert {part: rows.tolist() for part, rows in order.items()} == {"train": [1, 3], "valid": [0], "test": [2]}


def test_given_carves_valid_out_of_train_by_group():
    frame = pl.DataFrame({"part": ["train"] * 40 + ["test"] * 10, "household": [i // 2 for i in range(50)]})
    parts = splits.given(frame, parts="part", group="household")
    assert parts["test"].tolist() == list(range(40, 50))
    assert len(parts["valid"]) == 4
    assert not set(frame["household"][parts["train"]]) & set(frame["household"][parts["valid"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "random"}, r"unknown split 'random'; expected one of \['rows', 'time', 'user_time'"),
        ({"name": "time"}, "split 'time' has no 'time'"),
        ({"name": "time", "time": "day"}, r"time column 'day' is not in the table; expected one of \['user', 'time'"),
        ({"name": "time", "time": "time", "ties": "random"}, "ties is 'random'"),
        ({"name": "time", "time": "time", "cuts": (60, 30)}, "cuts are"),
        ({"name": "time", "time": "week", "windows": {**WINDOWS, "test": 52}}, "rows are in none of the windows"),
        ({"name": "time", "time": "week", "windows": {"train": 40}}, "expected one distinct value for each of"),
        ({"name": "cold_user", "user": "shopper"}, "user column 'shopper' is not in the table"),
        ({"name": "cold_user"}, "split 'cold_user' has no 'user'"),
        ({"name": "leave_last", "user": "user", "time": "time", "k": 0}, "k is 0"),
        ({"name": "domain_holdout", "domain": "domain"}, "split 'domain_holdout' has no 'held'"),
        ({"name": "domain_holdout", "domain": "domain", "held": "uk"}, r"has \['es', 'fr', 'nl'\]"),
        ({"name": "domain_holdout", "domain": "domain", "held": "fr", "by": "item"}, "by is 'item'"),
        ({"name": "given", "parts": "domain"}, r"has parts \['es', 'fr', 'nl'\]"),
        ({"name": "given", "parts": {"train": [0, 1], "test": [1]}}, "3 row numbers, 2 of them distinct"),
        ({"name": "rows", "fractions": (0.8, 0.1)}, "fractions are"),
    ],
)
def test_what_cannot_be_split_is_an_error_that_says_what_can(frame, options, message):
    with pytest.raises(SchemaError, match=message):
        splits.split(frame, **options)


def test_nulls_in_a_column_that_splits_are_an_error():
    with pytest.raises(SchemaError, match="has 1 nulls"):
        splits.cold_user(pl.DataFrame({"u": ["a", None]}), column="u")
