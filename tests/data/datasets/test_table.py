"""An own table: file formats, inference of columns and kinds, and what is refused."""

import datetime
import json

import numpy as np
import polars as pl
import pytest
import yaml

from mtl_jax.data.datasets import table
from mtl_jax.errors import ConfigError, LeakageError, MissingFile, SchemaError

ROWS = 400


def make_frame() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "order": [f"o{i}" for i in range(ROWS)],
            "customer": [f"c{i}" for i in rng.integers(0, 50, ROWS)],
            "shop": rng.choice(["north", "south"], ROWS).tolist(),
            "zip": rng.integers(1000, 1090, ROWS),
            "steps": rng.integers(0, 5000, ROWS) // 10,
            "ticket": rng.permutation(ROWS),
            "member": rng.random(ROWS) < 0.5,
            "price": rng.gamma(2.0, 5.0, ROWS).round(3),
            "born": [datetime.date(1990, 1, 1) + datetime.timedelta(days=int(d)) for d in rng.integers(0, 900, ROWS)],
            "day": np.sort(rng.integers(0, 60, ROWS)),
            "buy": rng.integers(0, 2, ROWS),
            "opened": rng.random(ROWS) < 0.5,
            "stars": rng.integers(1, 6, ROWS),
            "channel": rng.choice(["app", "web"], ROWS).tolist(),
            "spend": rng.gamma(1.0, 20.0, ROWS).round(3),
        }
    )


@pytest.fixture
def parquet(tmp_path):
    make_frame().write_parquet(tmp_path / "orders.parquet")
    return tmp_path / "orders.parquet"


def kinds(dataset) -> dict[str, str]:
    return {f.name: type(f).__name__ for f in dataset.schema.features}


def test_formats_give_equal_arrays(tmp_path, parquet):
    frame = make_frame()
    frame.write_csv(tmp_path / "orders.csv")
    frame.write_csv(tmp_path / "orders.tsv", separator="\t")
    options = {"tasks": {"buy": "binary", "spend": "regression"}, "user": "customer", "split": "rows"}
    datasets = [table.load(path=tmp_path / f"orders.{suffix}", **options) for suffix in ("parquet", "csv", "tsv")]
    assert [d.schema for d in datasets] == [datasets[0].schema] * 3
    assert len({d.identity for d in datasets}) == 3
    first, *others = (d.for_training().train for d in datasets)
    for other in others:
        np.testing.assert_array_equal(first.ids, other.ids)
        np.testing.assert_array_equal(first.dense, other.dense)
        np.testing.assert_array_equal(first.user, other.user)
        np.testing.assert_array_equal(first.labels["spend"], other.labels["spend"])


def test_columns_are_inferred(parquet):
    dataset = table.load(path=parquet, tasks=["buy"], user="customer", split="rows", exclude=["channel"])
    assert kinds(dataset) == {
        "shop": "Categorical",
        "zip": "Categorical",
        "steps": "Numeric",
        "member": "Categorical",
        "price": "Numeric",
        "day": "Categorical",
        "opened": "Categorical",
        "stars": "Categorical",
        "spend": "Numeric",
    }
    assert dataset.schema.excluded == {
        "channel": "excluded by the user",
        "order": "100 % distinct values",
        "ticket": "100 % distinct values",
        "born": "a date or time; derive features from it",
    }


def test_listed_columns_are_what_they_are_said_to_be(parquet):
    dataset = table.load(
        path=parquet,
        tasks=["buy"],
        user="customer",
        time="day",
        categorical=["customer", "steps"],
        numeric=["zip", "day"],
        exclude=["order", "ticket", "opened", "stars", "channel", "spend", "born"],
    )
    expected = {"customer": "Categorical", "steps": "Categorical", "zip": "Numeric", "day": "Numeric"}
    assert expected.items() <= kinds(dataset).items()


def test_roles_are_no_features_unless_listed(parquet):
    roles = {"user": "shop", "item": "zip", "time": "day", "group": "member", "weight": "price", "domain": "channel"}
    with pytest.raises(LeakageError, match="values of 'member' are in train and test"):
        table.load(path=parquet, tasks=["buy"], split="rows", **roles)
    dataset = table.load(path=parquet, tasks=["buy"], split="rows", **roles | {"group": None})
    assert not {"shop", "zip", "day", "price"} & set(kinds(dataset))
    assert kinds(dataset)["channel"] == "Categorical"
    assert dataset.schema.domains == ("app", "web")


def test_lists(tmp_path):
    rng = np.random.default_rng(1)
    tags = [[f"t{i}" for i in rng.integers(0, 5, rng.integers(0, 4))] for _ in range(ROWS)]
    frame = make_frame().select("price", "buy").with_columns(tags=pl.Series(tags), seen=pl.Series(tags))
    frame.write_parquet(tmp_path / "lists.parquet")
    joined = frame.with_columns(pl.col("tags", "seen").list.join("|"))
    joined.write_csv(tmp_path / "lists.csv", quote_style="always")
    options = {"tasks": ["buy"], "sequence": ["seen"], "max_len": 2}
    inferred = table.load(path=tmp_path / "lists.parquet", **options)
    assert kinds(inferred) == {"price": "Numeric", "tags": "MultiHot", "seen": "Sequence"}
    text = table.load(path=tmp_path / "lists.csv", multihot=["tags"], **options)
    one, other = inferred.for_training().train, text.for_training().train
    assert one.sequences["seen"].shape == (320, 2)
    np.testing.assert_array_equal(one.bags["tags"][0], other.bags["tags"][0])
    np.testing.assert_array_equal(one.sequences["seen"], other.sequences["seen"])


def test_kinds_of_tasks_are_inferred(parquet):
    tasks = ["buy", "opened", "stars", "channel", "steps", "spend"]
    dataset = table.load(path=parquet, tasks=tasks, user="customer")
    found = {task.name: task.kind for task in dataset.schema.tasks}
    assert list(found.values()) == ["binary", "binary", "multiclass", "multiclass", "regression", "regression"]
    assert not set(tasks) & set(kinds(dataset))


def test_tasks_with_fields(parquet):
    fields = {"liked": {"positive": "stars > 3"}, "bought": {"kind": "binary", "column": "buy", "weight": 2.0}}
    dataset = table.load(path=parquet, tasks=fields, user="customer")
    liked = dataset.part("train")["stars"].to_numpy() > 3
    np.testing.assert_array_equal(dataset.for_training().train.labels["liked"], liked)
    assert dataset.schema.task("bought").loss_weight == 2.0
    assert not {"stars", "buy"} & set(kinds(dataset))


@pytest.mark.parametrize(
    ("roles", "split"),
    [({}, "rows"), ({"user": "customer"}, "cold_user"), ({"user": "customer", "time": "day"}, "time")],
)
def test_the_default_split(parquet, roles, split):
    dataset = table.load(path=parquet, tasks=["buy"], **roles)
    assert dataset.info["split"] == split
    assert dataset.name == "orders"


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_schema_file_is_the_whole_schema(tmp_path, parquet, suffix):
    dataset = table.load(path=parquet, tasks=["buy", "stars"], user="customer", time="day")
    plain = dataset.schema.to_dict()
    path = tmp_path / f"schema{suffix}"
    path.write_text(json.dumps(plain) if suffix == ".json" else yaml.safe_dump(plain))
    again = table.load(path=parquet, schema=path)
    assert again.schema == dataset.schema
    assert again.info["split"] == "time"
    assert table.load(path=parquet, schema=path, tasks=["stars"]).schema.task_names == ("stars",)
    path.write_text("features: 3")
    with pytest.raises(SchemaError, match=f"schema{suffix} is not a schema"):
        table.load(path=parquet, schema=path)
    with pytest.raises(MissingFile, match="other.yaml not found; expected a schema"):
        table.load(path=parquet, schema=tmp_path / "other.yaml")


def test_identity_is_of_file_schema_and_split(tmp_path, parquet):
    options = {"path": parquet, "tasks": ["buy"], "user": "customer", "exclude": ["spend"]}
    identity = table.load(**options).identity
    assert table.load(**options).identity == identity
    others = [{"split_seed": 1}, {"split": "rows"}, {"min_count": 2}, {"tasks": ["opened"]}]
    assert len({identity, *(table.load(**options | other).identity for other in others)}) == 5
    make_frame().with_columns(unused=pl.col("born")).write_parquet(parquet)
    more = table.load(**options)
    assert more.identity != identity
    assert "unused" not in kinds(more)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"tasks": ["bye"]},
            SchemaError,
            r"columns \['bye'\] not in table 'orders' \(has .*\); expected by task 'bye'",
        ),
        ({"tasks": {"bye": "binary"}}, SchemaError, r"columns \['bye'\] not in table 'orders'.* expected by tasks bye"),
        (
            {"user": "cust", "numeric": ["cost"]},
            SchemaError,
            r"\['cost', 'cust'\] not in.*expected by data.user, data.numeric",
        ),
        ({"categorical": ["buy"]}, LeakageError, "feature 'buy' is the label of task 'buy'; expected no label among"),
        ({"categorical": ["shop"], "numeric": ["shop"]}, SchemaError, r"columns \['shop'\] are listed as two kinds"),
        ({"tasks": {}}, ConfigError, "has no tasks; expected columns to predict. Set data.tasks"),
        ({"tasks": ["born"]}, SchemaError, "label column 'born' has type Date; expected numbers, booleans or text"),
        ({"tasks": {"buy": {"king": "binary"}}}, SchemaError, r"task 'buy' has fields \['king'\]; expected some of"),
        ({"split_fractions": (1.0, 0.0, 0.0)}, SchemaError, r"splits \['valid', 'test'\] have 0 of 400 rows"),
        ({"multihot": ["price"]}, SchemaError, "'price' has type Float64, expected a list column for MultiHot"),
    ],
)
def test_refused(parquet, options, error, message):
    with pytest.raises(error, match=message):
        table.load(**{"path": parquet, "tasks": ["buy"]} | options)


def test_a_label_left_among_the_features_by_another_name(tmp_path):
    make_frame().with_columns(outcome=pl.col("buy") * 3.5).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(LeakageError, match="feature 'outcome' alone has AUC 1.000 for 'buy' on train"):
        table.load(path=tmp_path / "t.parquet", tasks=["buy"])
    table.load(path=tmp_path / "t.parquet", tasks=["buy"], allow_leak={"outcome": "a price fixed before"})


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingFile, match="none.csv not found; expected a .parquet, .csv, .tsv file. Set data.path"):
        table.load(path=tmp_path / "none.csv", tasks=["buy"])
    with pytest.raises(SchemaError, match="has suffix '.xlsx'; expected one of"):
        table.load(path=tmp_path / "book.xlsx", tasks=["buy"])
