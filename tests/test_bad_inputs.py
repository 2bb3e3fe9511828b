"""Bad inputs, one a row: what is wrong with it, and the three parts of the answer: the value, the expectation, the fix.

Every row is also checked to leave no file behind that was not there before; the few that are noticed only after the run
folder was opened leave a whole record that says ``failed``, and nothing half written.
"""

import copy
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import hydra
import numpy as np
import polars as pl
import pytest
from rich.console import Console

from experiments import train
from experiments.cli import command_line
from mtl_jax import errors
from mtl_jax.config import plain
from mtl_jax.data import Categorical, Dataset, MultiHot, Numeric, Schema, SequenceFeature, Vocabulary
from mtl_jax.data.datasets import table
from mtl_jax.report.record import validate
from mtl_jax.run import run
from mtl_jax.tasks import Task

ROOT = Path(train.__file__).parents[1]
GONE = object()
SMALL = ["data=synthetic", "data.num_rows=240", "data.dim=4", "sharing=shared_bottom", "sharing.units=[4]",
         "towers.units=[3]", "trainer.epochs=1", "trainer.batch_size=100"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
      name: What is wrong.
      given: The input; its form belongs to the table that the row is in.
      says: Patterns of the value, the expectation and the fix, which the message has in this order, with `` … `` between.
      error: Class of the error.
      record: Whether a failed record is left, because only data or a model could tell.
    """

    name: str
    given: object
    says: str
    error: str = "ConfigError"
    record: bool = False


def rows(table):
    return pytest.mark.parametrize("row", table, ids=[row.name for row in table])


def answers(row, message):
    """Whether the message has the value, the expectation and the fix, one after the other."""
    parts = row.says.split(" … ")
    assert len(parts) == 3 and all(parts)
    assert re.search("[\\s\\S]*".join(f"(?:{part})" for part in parts), message), message
    assert "Traceback" not in message


def files(*folders):
    """Path -> content of every file; an empty lock is no content."""
    found = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file() or path.is_symlink())
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() for path in found}


def only_a_failed_record(new, folder):
    """The files that a run left, which failed after its folder was opened."""
    names = {Path(path).name for path in new}
    assert names <= {"config.yaml", "schema.json", "result.json", "run.json", "run.log", "log.jsonl", ".lock"}, names
    (path,) = [path for path in new if path.endswith("result.json")]
    record = json.loads(Path(path).read_text())
    validate(record)
    assert record["status"] == "failed"


# Tables and schemas: the argument is a change of (frame, schema fields, options of from_frame).

ROWS = 60


def sound():
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "shop": rng.choice(["north", "south", "west"], ROWS).tolist(),
            "price": rng.gamma(2.0, 5.0, ROWS),
            "tags": [[f"t{i}" for i in rng.integers(0, 4, 2)] for _ in range(ROWS)],
            "user": np.arange(ROWS) // 6,
            "day": np.arange(ROWS),
            "site": rng.choice(["app", "web"], ROWS).tolist(),
            "weight": rng.random(ROWS),
            "buy": np.arange(ROWS) % 2,
            "again": (np.arange(ROWS) % 4 == 3).astype(int),
            "spend": rng.normal(size=ROWS),
            "part": (["train"] * 4 + ["valid", "test"]) * (ROWS // 6),
        }
    )
    fields = {
        "features": (Categorical("shop", "shop"), Numeric("price"), MultiHot("tags", "tags", 3)),
        "vocabularies": (Vocabulary("shop"), Vocabulary("tags")),
        "tasks": (Task("buy", "binary"), Task("spend", "regression")),
    }
    return frame, fields, {"split": {"train": np.arange(40), "valid": np.arange(40, 50), "test": np.arange(50, 60)}}


def with_columns(**columns):
    """Columns replaced; a function is given the old ones as NumPy."""

    def change(frame, fields, options):
        new = {n: c(frame[n].to_numpy().astype(float).copy()) if callable(c) else c for n, c in columns.items()}
        return frame.with_columns(**{n: pl.Series(n, values) for n, values in new.items()}), fields, options

    return change


def with_fields(**changes):
    def change(frame, fields, options):
        return frame, fields | {name: make() for name, make in changes.items()}, options

    return change


def with_options(**changes):
    return lambda frame, fields, options: (frame, fields, options | changes)


def at(position, value):
    def put(values):
        values[position] = value
        return values

    return put


def tasks(*made):
    return with_fields(tasks=lambda: tuple(Task(*one[0], **one[1]) for one in made))


def features(*made):
    return with_fields(features=lambda: tuple(made))


def keys(**roles):
    return with_fields(**{role: (lambda column=column: column) for role, column in roles.items()})


def both(*changes):
    def change(frame, fields, options):
        for one in changes:
            frame, fields, options = one(frame, fields, options)
        return frame, fields, options

    return change


TABLES = [
    Row(
        "a feature without its column",
        lambda f, s, o: (f.drop("price"), s, o),
        r"\['price'\] not in table … expected by features price … Rename them",
        "SchemaError",
    ),
    Row(
        "a task without its column",
        lambda f, s, o: (f.drop("buy"), s, o),
        r"\['buy'\] not in table … expected by tasks buy … Rename them",
        "SchemaError",
    ),
    Row(
        "a role without its column",
        keys(user="customer"),
        r"\['customer'\] not in … expected by keys user … Rename",
        "SchemaError",
    ),
    Row(
        "text as a number",
        with_columns(price=["dear"] * ROWS),
        "'price' has type String … expected a number … Cast the column",
        "SchemaError",
    ),
    Row(
        "lists as a category",
        with_columns(shop=[["a"]] * ROWS),
        "'shop' has type List … expected one value a row … Cast",
        "SchemaError",
    ),
    Row(
        "text as a set",
        with_columns(tags=["a"] * ROWS),
        "'tags' has type String … expected a list column … Cast",
        "SchemaError",
    ),
    Row(
        "dates as labels",
        with_columns(buy=pl.date_range(pl.date(2020, 1, 1), pl.date(2020, 2, 29), eager=True)),
        "'buy' has type Date … expected a number … Cast",
        "SchemaError",
    ),
    Row(
        "a NaN among numbers",
        with_columns(price=at(3, np.nan)),
        "'price' has 1 NaN in train … expected numbers … Convert them to null or set Numeric.fill",
        "SchemaError",
    ),
    Row(
        "an infinite number",
        with_columns(price=at(45, np.inf)),
        "'price' has 1 infinite values in valid … expected numbers … Convert",
        "SchemaError",
    ),
    Row(
        "a logarithm of negatives",
        both(with_columns(price=at(55, -1.0)), features(Numeric("price", transform="log1p"))),
        "'price' has 1 values below 0 in test … expected none … Use 'signed_log1p'",
        "SchemaError",
    ),
    Row(
        "a binary label of three values",
        with_columns(buy=at(7, 2.0)),
        r"task 'buy' has values \[0, 1, 2\] … expected 0 or 1 … map 2",
        "LabelError",
    ),
    Row(
        "a NaN label",
        with_columns(spend=at(7, np.nan)),
        "task 'spend' has 1 NaN or infinite … expected finite … Convert them to null",
        "LabelError",
    ),
    Row(
        "a constant label",
        with_columns(buy=np.zeros(ROWS)),
        "task 'buy' has 0 positives of 40 in train … expected both labels … Drop the task",
        "LabelError",
    ),
    Row(
        "a constant target",
        with_columns(spend=np.ones(ROWS)),
        "task 'spend' has one value in train … expected several … Drop the task",
        "LabelError",
    ),
    Row(
        "a label that is never there",
        with_columns(buy=pl.Series([None] * ROWS, dtype=pl.Float64)),
        "task 'buy' has no observed label … expected some … Check mask",
        "LabelError",
    ),
    Row(
        "labels that contradict their nesting",
        both(
            with_columns(again=np.arange(ROWS) % 4 == 2),
            tasks((("buy", "binary"), {}), (("again", "binary"), {"implies": "buy"})),
        ),
        "15 rows have again=1 and buy=0 … again implies buy … Fix the labels",
        "LabelError",
    ),
    Row(
        "a class that train lacks",
        both(with_columns(buy=at(55, 7.0)), tasks((("buy", "multiclass"), {}))),
        r"task 'buy' has values \['7'\] in test … expected its classes … Set Task.classes",
        "LabelError",
    ),
    Row(
        "an unknown domain",
        both(keys(domain="site"), with_fields(domains=lambda: ("app",))),
        r"unknown domains \['web'\] … the schema has … Set Schema.domains",
        "SchemaError",
    ),
    Row(
        "a null domain",
        both(keys(domain="site"), with_columns(site=[None] + ["app"] * (ROWS - 1))),
        r"\['null'\] … the schema has … drop these rows",
        "SchemaError",
    ),
    Row(
        "a negative weight",
        both(keys(weight="weight"), with_columns(weight=at(0, -1.0))),
        "'weight' has 1 negative … expected finite numbers >= 0 … Drop these rows",
        "SchemaError",
    ),
    Row(
        "a weight of NaN",
        both(keys(weight="weight"), with_columns(weight=at(0, np.nan))),
        "'weight' has 1 null, NaN … expected finite … Drop",
        "SchemaError",
    ),
    Row(
        "no rows",
        lambda f, s, o: (f.clear(), s, o | {"split": "rows"}),
        "0 of 0 rows … expected at least 1 … Change the split",
        "SchemaError",
    ),
    Row(
        "an empty part",
        with_options(split="rows", fractions=(1.0, 0.0, 0.0)),
        r"splits \['valid', 'test'\] have 0 … expected at least 1 … Change the split",
        "SchemaError",
    ),
    Row(
        "parts that share rows",
        with_options(split={"train": [0, 1], "valid": [1], "test": [2]}),
        "1 row numbers occur twice … expected disjoint … Correct",
        "SchemaError",
    ),
    Row(
        "rows beyond the table",
        with_options(split={"train": [0], "valid": [1], "test": [60]}),
        "row numbers 0 to 60 … expected 0 to 59 … Fix",
        "SchemaError",
    ),
    Row(
        "a split without train",
        with_options(split={"valid": [1], "test": [2]}),
        r"\['train'\] have 0 … expected at least 1 … Change",
        "SchemaError",
    ),
    Row(
        "shares above one",
        with_options(split="rows", fractions=(0.9, 0.9)),
        r"fractions are \(0.9, 0.9\) … expected shares … Set data.split_fractions",
        "SchemaError",
    ),
    Row(
        "shares that are text",
        with_options(split="rows", fractions=("a", "b")),
        r"fractions are \('a', 'b'\) … expected shares … Set data.split_fractions",
        "SchemaError",
    ),
    Row(
        "an unknown split",
        with_options(split="random"),
        "unknown split 'random' … expected one of … Set data.split",
        "SchemaError",
    ),
    Row(
        "an option that no split has",
        with_options(split="rows", split_options={"fold": 3}),
        "'fold' … expected … Remove",
        "SchemaError",
    ),
    Row(
        "a split by users without users",
        with_options(split="cold_user"),
        "split 'cold_user' has no 'user' … expected one … Pass user=",
        "SchemaError",
    ),
    Row(
        "a time with holes",
        both(keys(time="day"), with_columns(day=[None] + list(range(ROWS - 1))), with_options(split="time")),
        "'day' has 1 nulls … expected none … Drop or fill",
        "SchemaError",
    ),
    Row(
        "cuts in the wrong order",
        both(keys(time="day"), with_options(split="time", split_options={"cuts": [50, 40]})),
        r"cuts are \[50, 40\] … expected the first time … Set",
        "SchemaError",
    ),
    Row(
        "cuts of another type",
        both(keys(time="day"), with_options(split="time", split_options={"cuts": ["may", "june"]})),
        "may … expected … Set|Change",
        "SchemaError",
    ),
    Row(
        "a key that repeats",
        with_options(key=["shop"]),
        "rows of train repeat another's key … expected one row a key … Aggregate",
        "SchemaError",
    ),
    Row(
        "a group across parts",
        both(keys(group="site")),
        "values of 'site' are in train and test|'site' … expected none … Split|split",
        "LeakageError",
    ),
    Row(
        "a label among the features",
        features(Categorical("shop", "shop"), Numeric("spend")),
        "feature 'spend' is the label … expected no label … Remove|Drop|drop|allow_leak",
        "LeakageError",
    ),
    Row(
        "a feature that tells the label",
        both(with_columns(price=np.arange(ROWS) % 2 * 9.0 + 1)),
        "feature 'price' alone has AUC 1.000 for 'buy' … expected < 0.95 … exclude it",
        "LeakageError",
    ),
    Row(
        "two features of one name",
        features(Numeric("price"), Numeric("price")),
        r"feature names \['price'\] occur twice … expected unique … Rename",
        "SchemaError",
    ),
    Row(
        "two tasks of one name",
        tasks((("buy", "binary"), {}), (("buy", "binary"), {})),
        r"task names \['buy'\] … expected unique … Rename",
        "SchemaError",
    ),
    Row(
        "a feature of no vocabulary",
        features(Categorical("shop", "shops")),
        "points to vocabulary 'shops' … the schema has … Add the vocabulary",
        "SchemaError",
    ),
    Row(
        "a space of no task",
        tasks((("buy", "binary"), {"space": "click"})),
        "space='click' … expected a binary task … Set Task.space",
        "SchemaError",
    ),
    Row(
        "spaces in a circle",
        tasks((("buy", "binary"), {"space": "again"}), (("again", "binary"), {"space": "buy"})),
        "form a circle … expected one with space 'all' … Set Task.space",
        "SchemaError",
    ),
    Row(
        "an unknown kind",
        tasks((("buy", "boolean"), {})),
        "kind 'boolean' … expected one of … Set its kind",
        "SchemaError",
    ),
    Row(
        "a loss of another kind",
        tasks((("buy", "binary"), {"loss": "squared"})),
        "loss 'squared' … expected one of … Change",
        "SchemaError",
    ),
    Row(
        "a negative delta",
        tasks((("spend", "regression"), {"delta": -1.0})),
        "delta -1.0 … expected a number > 0 … Change",
        "SchemaError",
    ),
    Row(
        "an infinite task weight",
        tasks((("buy", "binary"), {"weight": float("inf")})),
        "weight inf … expected a finite number … Change",
        "SchemaError",
    ),
    Row(
        "code as a comparison",
        tasks((("buy", "binary"), {"positive": "__import__('os')"})),
        "positive '__import__ … expected .* operator number … Write it so",
        "SchemaError",
    ),
    Row(
        "an unknown transform",
        lambda f, s, o: (f, s | {"features": (Numeric("price", transform="sqrt"),)}, o),
        "transform 'sqrt' … expected one of … Change",
        "SchemaError",
    ),
    Row(
        "an empty list length",
        lambda f, s, o: (f, s | {"features": (SequenceFeature("tags", "tags", 0),)}, o),
        "'tags' has max_len 0 … expected a whole number … Change",
        "SchemaError",
    ),
    Row(
        "a negative count",
        lambda f, s, o: (f, s | {"vocabularies": (Vocabulary("shop", min_count=-1), Vocabulary("tags"))}, o),
        "'shop' has min_count -1 … expected a whole number … Change",
        "SchemaError",
    ),
    Row(
        "no buckets",
        lambda f, s, o: (f, s | {"vocabularies": (Vocabulary("shop", hash_buckets=-5), Vocabulary("tags"))}, o),
        "'shop' has hash_buckets -5 … expected a whole number … Change",
        "SchemaError",
    ),
    Row("no tasks", with_fields(tasks=tuple), "no tasks … expected … Add", "SchemaError"),
]


@rows(TABLES)
def test_a_bad_table(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(getattr(errors, row.error)) as refused:
        frame, fields, options = row.given(*sound())
        Dataset.from_frame(frame, Schema(**fields), **options)
    answers(row, str(refused.value))
    assert files(tmp_path) == {}


# Files: the argument is a function of an empty folder that gives the options of the loader ``table``.


def a_file(name, content=None, **options):
    """A file of these bytes (a sound table by default), read with these options."""

    def make(folder):
        frame = sound()[0].drop("tags", "day", "part")
        if content is not None:
            (folder / name).write_bytes(content)
        elif name.endswith(".parquet"):
            frame.write_parquet(folder / name)
        else:
            frame.write_csv(folder / name)
        return {"path": folder / name, "tasks": ["buy"], "exclude": ["again", "spend"]} | options

    return make


def with_schema(text):
    def make(folder):
        (folder / "schema.yaml").write_text(text)
        return a_file("t.csv")(folder) | {"schema": folder / "schema.yaml"}

    return make


def with_broken_parquet(folder):
    options = a_file("t.parquet")(folder)
    options["path"].write_bytes(options["path"].read_bytes()[:-40])
    return options


FILES = [
    Row(
        "no file",
        lambda folder: {"path": folder / "none.csv"},
        "none.csv not found … expected a .parquet … Set data.path",
        "MissingFile",
    ),
    Row(
        "a folder",
        lambda folder: {"path": folder},
        "has suffix '' … expected one of … Convert or rename",
        "SchemaError",
    ),
    Row(
        "another format",
        a_file("t.xlsx", b"PK"),
        "has suffix '.xlsx' … expected one of … Convert or rename",
        "SchemaError",
    ),
    Row(
        "an empty file",
        a_file("t.csv", b""),
        "t.csv cannot be read … expected a whole .csv file … Write it anew",
        "SchemaError",
    ),
    Row(
        "a header only",
        a_file("t.csv", b"shop,price,site,weight,user,buy,again,spend\n"),
        "0 of 0 rows|'buy' … expected … Change|Drop|Check",
        "SchemaError",
    ),
    Row(
        "rows of unequal length",
        a_file("t.csv", b"a,b\n1,2\n1,2,3\n"),
        "t.csv cannot be read … expected a whole … Write it anew",
        "SchemaError",
    ),
    Row(
        "text in another encoding",
        a_file("t.csv", "a,b\n\xe9,1\n".encode("latin-1")),
        "t.csv cannot be read … expected .* text in UTF-8 … Write it anew",
        "SchemaError",
    ),
    Row(
        "noise with the ending of Parquet",
        a_file("t.parquet", bytes(range(256)) * 9),
        "t.parquet cannot be read … expected a whole .parquet … Write it anew",
        "SchemaError",
    ),
    Row(
        "half a Parquet file",
        with_broken_parquet,
        "t.parquet cannot be read … expected a whole .parquet … Write it anew",
        "SchemaError",
    ),
    Row(
        "no tasks",
        a_file("t.csv", tasks=None),
        "t.csv' has no tasks … expected columns to predict … Set data.tasks",
        "ConfigError",
    ),
    Row(
        "a task of no column",
        a_file("t.csv", tasks=["click"]),
        r"columns \['click'\] not in table 't' … expected by task 'click' … Rename",
        "SchemaError",
    ),
    Row(
        "a field that no task has",
        a_file("t.csv", tasks={"buy": {"losses": "bce"}}),
        r"fields \['losses'\] … expected some of … Drop or rename",
        "SchemaError",
    ),
    Row(
        "a kind that is a list",
        a_file("t.csv", tasks={"buy": {"kind": ["binary"]}}),
        r"tasks.buy.kind is \['binary'\] … expected text … Change",
        "ConfigError",
    ),
    Row(
        "a delta that is text",
        a_file("t.csv", tasks={"spend": {"kind": "regression", "delta": "big"}}),
        "spend.delta is 'big' … expected a finite number … Change",
        "ConfigError",
    ),
    Row(
        "a column listed twice",
        a_file("t.csv", categorical=["shop"], numeric=["shop"]),
        r"\['shop'\] are listed as two kinds … expected one … Drop them",
        "SchemaError",
    ),
    Row(
        "a role of no column",
        a_file("t.csv", user="customer"),
        r"\['customer'\] not in table … expected by data.user … Rename",
        "SchemaError",
    ),
    Row(
        "a schema that is no mapping",
        with_schema("- 1\n- 2\n"),
        "schema.yaml is not a schema … expected the keys … Correct it",
        "SchemaError",
    ),
    Row(
        "a schema that is no YAML",
        with_schema("features: [\x00"),
        "schema.yaml is not a schema … expected the keys … Correct it",
        "SchemaError",
    ),
    Row(
        "a schema with an object of Python's",
        with_schema("features: !!python/object/apply:os.system ['true']"),
        "schema.yaml is not a schema … expected the keys … Correct it",
        "SchemaError",
    ),
    Row(
        "a schema with another feature",
        with_schema("features: [{type: Image, name: a}]\nvocabularies: []\ntasks: []"),
        "schema.yaml is not a schema … expected the keys … Correct it",
        "SchemaError",
    ),
    Row(
        "a schema of other columns",
        with_schema("features: [{type: Numeric, name: a}]\nvocabularies: []\ntasks: [{name: buy, kind: binary}]"),
        r"\['a'\] not in table … expected by features a … Rename",
        "SchemaError",
    ),
]


@rows(FILES)
def test_a_bad_file(row, tmp_path):
    options = row.given(tmp_path)
    before = files(tmp_path)
    with pytest.raises(getattr(errors, row.error)) as refused:
        table.load(**options)
    answers(row, str(refused.value))
    assert files(tmp_path) == before


# Configurations: the argument is dotted key -> value; GONE removes the key.


@pytest.fixture(scope="module")
def composed():
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return plain(hydra.compose("train", overrides=SMALL))


def changed(config, changes):
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node.pop(last) if value is GONE else node.update({last: value})
    return config


NAN, INF = float("nan"), float("inf")
CONFIGURATIONS = [
    Row("no section", {"sharing": GONE}, r"configuration has no \['sharing'\] … expected all of … Put them back"),
    Row(
        "a section that is null", {"optimizer": None}, "optimizer is None … expected a mapping with a _target_ … Choose"
    ),
    Row("a section that is text", {"sharing": "mmoe"}, "sharing is 'mmoe' … expected a mapping … Choose one"),
    Row("a section that is a list", {"data": ["synthetic"]}, r"data is \['synthetic'\] … expected a mapping … Choose"),
    Row(
        "a section without target",
        {"towers": {"units": [3]}},
        "towers is {'units': … expected a mapping with a _target_ … set towers._target_",
    ),
    Row("a trainer that is a number", {"trainer": 3}, "trainer is 3 … expected a mapping … Change it"),
    Row("a trainer without epochs", {"trainer.epochs": GONE}, r"trainer has no \['epochs'\] … expected all of … Put"),
    Row("an unknown key at the top", {"surplus": 1}, "nothing reads 'surplus' … expected keys of … Remove or rename"),
    Row(
        "an unknown key of the trainer",
        {"trainer.epoch": 1},
        "nothing reads 'trainer.epoch' … expected keys of … Remove",
    ),
    Row(
        "an unknown key of parallel", {"parallel.mesh": 1}, "nothing reads 'parallel.mesh' … expected keys of … Remove"
    ),
    *(
        Row(
            f"an unknown option of {node}",
            {f"{node}.surplus": 1},
            f"{node} has option 'surplus' … expected one of … Remove",
        )
        for node in ("sharing", "balancing", "optimizer", "objective", "encoder", "history", "towers")
    ),
    Row("a size that is text", {"match_parameters": "big"}, "match_parameters is 'big' … expected a whole … Change"),
    Row("a size of 0", {"match_parameters": 0}, "match_parameters is 0 … expected a whole number from 1 … Change"),
    Row(
        "a size below any width",
        {"match_parameters": 7},
        "parameters at the widths … at most 1% … Ask for",
        record=True,
    ),
    Row("no history", {"history": None}, "history is None … expected … Choose|Change"),
    Row("an unknown option of the data", {"data.rows": 1}, "'rows' … expected one of … Choose", "SchemaError"),
    Row("a seed that is text", {"seed": "one"}, "seed is 'one' … expected a whole number … Change it"),
    Row("a negative seed", {"seed": -1}, "seed is -1 … expected a whole number from 0 … Change it"),
    Row("a seed beyond 32 bits", {"seed": 2**40}, "seed is 1099511627776 … expected a whole number … Change it"),
    Row("a seed that is true", {"seed": True}, "seed is True … expected a whole number … Change it"),
    Row(
        "epochs that are text",
        {"trainer.epochs": "many"},
        "trainer.epochs is 'many' … expected a whole number … Change",
    ),
    Row("half an epoch", {"trainer.epochs": 1.5}, "trainer.epochs is 1.5 … expected a whole number … Change"),
    Row("epochs of null", {"trainer.epochs": None}, "trainer.epochs is None … expected a whole number … Change"),
    Row(
        "a list of batch sizes",
        {"trainer.batch_size": [64, 128]},
        r"batch_size is \[64, 128\] … expected a whole … Change",
    ),
    Row(
        "a batch size of NaN",
        {"trainer.batch_size": NAN},
        "trainer.batch_size is nan … expected a whole number … Change",
    ),
    Row(
        "checkpoints never",
        {"trainer.checkpoint_seconds": INF},
        "checkpoint_seconds is inf … expected a finite … Change",
    ),
    Row("a monitor that is a list", {"trainer.monitor": ["y1/rmse"]}, "trainer.monitor is … expected text … Change"),
    Row(
        "progress in other words",
        {"trainer.progress": "some"},
        "trainer.progress is 'some' … expected auto, true … Change",
    ),
    Row("tables of another type", {"trainer.tables": 3}, "is 3 … expected text or a mapping … Change"),
    Row("an unknown precision", {"trainer.precision": "float8"}, "float8 … expected … Change"),
    Row("an average of everything", {"trainer.average": 1.0}, "average is 1.0 … expected a decay in … Change"),
    Row("no epoch", {"trainer.epochs": 0}, "trainer.epochs is 0 … expected a number >= 1 … Change", record=True),
    Row(
        "a negative batch",
        {"trainer.batch_size": -4},
        "batch_size is -4 … expected a number >= 1 … Change",
        record=True,
    ),
    Row("a monitor of no task", {"trainer.monitor": "buy/auc"}, "'buy/auc' … expected one of … Change", record=True),
    Row(
        "a table of no vocabulary",
        {"trainer.tables": {"item": "sparse"}},
        "'item' … expected vocabularies … Remove",
        record=True,
    ),
    Row(
        "an unknown strategy of devices",
        {"parallel.strategy": "threads"},
        "'threads' … expected one of … Change",
    ),
    Row(
        "more devices than there are",
        {"parallel.devices": 4096},
        "devices is 4096 … expected a number from 1 … Lower it",
    ),
    Row("an unknown training", {"training": "later"}, "training is 'later' … expected one of … Change"),
    Row(
        "a negative learning rate",
        {"optimizer.learning_rate": -1},
        "learning_rate is -1 … expected a number > 0 … Change",
    ),
    Row(
        "a learning rate that is text",
        {"optimizer.learning_rate": "fast"},
        "learning_rate is 'fast' … expected a finite number … Change",
    ),
    Row(
        "a learning rate of NaN",
        {"optimizer.learning_rate": NAN},
        "learning_rate is nan … expected a finite number … Change",
    ),
    Row(
        "a learning rate that is true",
        {"optimizer.learning_rate": True},
        "learning_rate is True … expected a finite … Change",
    ),
    Row(
        "a learning rate of infinity",
        {"optimizer.learning_rate": INF},
        "learning_rate is inf … expected a finite … Change",
    ),
    Row(
        "a decay of no label",
        {"optimizer.weight_decay": {"tables": 1.0}},
        "weight_decay is .*tables … expected rates … Change",
    ),
    Row(
        "a decay that is text",
        {"optimizer.weight_decay": {"task": "some"}},
        "weight_decay is .*some … expected … Change",
    ),
    Row("a clip of zero", {"optimizer.clip_norm": 0}, "clip_norm is 0 … expected a number > 0 or null … Change"),
    Row(
        "a transform that is text",
        {"optimizer.transform": "adam"},
        "transform is 'adam' … expected an object of GradientTransformation … Change",
    ),
    Row("an unknown reduction", {"objective.reduction": "max"}, r"reduction is 'max' … expected one of … Change"),
    Row(
        "a reduction that is a list",
        {"objective.reduction": ["mean"]},
        r"reduction is \['mean'\] … expected text … Change",
    ),
    Row("an unknown scope", {"balancing.scope": "whole"}, "scope is 'whole' … expected one of … Change|Choose"),
    Row("a scope that is a number", {"balancing.scope": 3}, "scope is (3|'3') … expected … Change|Choose"),
    Row(
        "widths that are text",
        {"sharing.units": "64,32"},
        "sharing.units is '64,32' … expected a list of a whole number … Change",
    ),
    Row(
        "a width of zero",
        {"sharing.units": [4, 0]},
        r"units is \[4, 0\] … expected a list of whole numbers … Change",
        record=True,
    ),
    Row(
        "a width beyond memory",
        {"sharing.units": [10**12]},
        r"units is \[10{12}\] … expected .* to 65,536 … Change",
        record=True,
    ),
    Row(
        "a dropout of one",
        {"towers.dropout": 1.0},
        r"dropout is 1.0 … expected a number in \[0, 1\) … Change",
        record=True,
    ),
    Row("a dropout of NaN", {"encoder.dropout": NAN}, "encoder.dropout is nan … expected a finite number … Change"),
    Row(
        "an embedding of no width",
        {"encoder.embedding_dim": 0},
        "embedding_dim is 0 … expected a whole number … Change",
        record=True,
    ),
    Row(
        "an embedding of half a width",
        {"encoder.embedding_dim": 1.5},
        "embedding_dim is 1.5 … expected a whole … Change",
    ),
    Row(
        "a constructor that is called at once",
        {"sharing._partial_": False},
        "sharing.* cannot be built … expected other options … Change",
    ),
    Row(
        "a balancer for a strategy",
        {"sharing": {"_target_": "mtl_jax.balancing.pcgrad"}},
        "sharing has _target_ 'mtl_jax.balancing.pcgrad' … expected the constructor of a Strategy … Choose",
    ),
    Row("a strategy for towers", {"towers": {"_target_": "mtl_jax.sharing.MMoE"}}, "towers.* … expected … Ch"),
    Row(
        "an optimizer for a balancer",
        {"balancing": {"_target_": "optax.scale_by_adam"}},
        "balancing has _target_ 'optax.scale_by_adam', which makes … expected a Balancer … Choose",
    ),
    Row(
        "a balancer for the data",
        {"data": {"_target_": "mtl_jax.balancing.equal"}},
        "data has _target_ .* makes … expected a Dataset … Choose",
    ),
    Row(
        "a misspelt target",
        {"sharing._target_": "mtl_jax.sharing.MMOE"},
        "has no 'MMOE' … expected one of .*MMoE … Correct the path",
    ),
    Row(
        "a target elsewhere",
        {"sharing._target_": "os.system"},
        "_target_ 'os.system' … expected an object of one of … allow=",
    ),
    Row(
        "what may be allowed is not",
        {"allow": ["os"]},
        r"allow is \['os'\] … expected a list of packages of your own … Change",
    ),
    Row("allowed in one word", {"allow": "mypaper"}, "allow is 'mypaper' … expected a list … Change"),
    Row("an output folder that is a number", {"output_dir": 3}, "output_dir is 3 … expected the path … Change"),
    Row(
        "an unknown data set",
        {"data.name": "netflix"},
        "unknown data set 'netflix' … expected one of … Choose",
        "SchemaError",
    ),
    Row(
        "data in another word", {"data.num_rows": "many"}, "data.num_rows is 'many' … expected a whole number … Change"
    ),
    Row("a negative number of rows", {"data.num_rows": -5}, "num_rows is -5 … expected a whole number from 1 … Change"),
    Row(
        "rows beyond memory",
        {"data.num_rows": 10**9, "data.dim": 1000},
        "num_rows is 1000000000 … expected at most … Lower",
    ),
    Row("inputs beyond memory", {"data.dim": 10**12}, "dim is 1000000000000 … expected a whole number … Change"),
    Row("too few inputs", {"data.dim": 1}, "dim is 1 for 2 tasks … expected at least 2 … Raise dim"),
    Row("a correlation beyond one", {"data.p": 1.5}, r"p is 1.5 … expected a number in \[-1, 1\] … Change p"),
    Row("noise of NaN", {"data.noise": NAN}, "data.noise is nan … expected a finite number … Change"),
    Row(
        "a task of no data set",
        {"data.tasks": ["click"]},
        "unknown task 'click' … the schema has … Set data.tasks",
        "SchemaError",
    ),
    Row("tasks in one word", {"data.tasks": "y1"}, "data.tasks is 'y1' … expected a list of text … Change"),
    Row("an unknown recipe", {"data.recipe": "cake"}, "'cake' … expected one of … Set data.recipe"),
    Row(
        "an unknown split of the data",
        {"data.split": "random"},
        "unknown split 'random' … expected one of … Set data.split",
        "SchemaError",
    ),
    Row(
        "a split that is a number",
        {"data.split": 3},
        "data.split is 3 … expected text or null|expected null or text|expected text … Change",
    ),
    Row(
        "weights of other tasks",
        {"balancing": {"_target_": "mtl_jax.balancing.fixed", "weights": {"a": 1.0}}},
        r"names \['a'\] … the tasks are … Give",
        record=True,
    ),
    Row(
        "weights that are negative",
        {"balancing": {"_target_": "mtl_jax.balancing.fixed", "weights": [1, -1]}},
        r"is \[1, -1\] … expected finite numbers … Change",
    ),
    Row(
        "gradients of nothing shared",
        {
            "sharing": {"_target_": "mtl_jax.sharing.SingleTask", "_partial_": True, "units": [4]},
            "balancing": {"_target_": "mtl_jax.balancing.pcgrad"},
        },
        "shared parameters … expected|need … balancing=equal",
        record=True,
    ),
    Row(
        "data that was not fetched",
        {"data": {"_target_": "mtl_jax.data.load", "name": "movielens_1m", "cache_dir": "nowhere"}},
        "'movielens_1m' is not in … expected a converted copy … Run: python -m mtl_jax.data fetch",
        "NotCached",
    ),
]


@rows(CONFIGURATIONS)
def test_a_bad_configuration(row, composed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(getattr(errors, row.error)) as refused:
        run(changed(composed, row.given), console=Console(file=io.StringIO()))
    answers(row, str(refused.value))
    new = files(tmp_path)
    if row.record:
        only_a_failed_record(new, tmp_path)
    else:
        assert new == {}


# Run folders: the argument prepares what the run will find, given the folder and the configuration.


def run_into(folder, config, **options):
    return run(config, folder=folder, console=Console(file=io.StringIO()), **options)


@pytest.fixture(scope="module")
def finished(composed, tmp_path_factory):
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_into(folder, composed | {"output_dir": str(folder.parent / "outputs")})
    return folder


def a_file_instead(folder):
    shutil.rmtree(folder)
    folder.write_text("something else")


def of_another_run(folder):
    (folder / "run.json").write_text('{"run_id": "000000000000-00000000-s0"}')


def content(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def without(*keys):
    def change(folder):
        record = json.loads((folder / "result.json").read_text())
        for key in keys:
            del record[key]
        (folder / "result.json").write_text(json.dumps(record))

    return change


def unfinished(folder):
    """A run that was killed: its checkpoints are there, its record is not."""
    (folder / "result.json").unlink()


def with_damaged_checkpoints(folder):
    unfinished(folder)
    for path in (folder / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")


def with_a_checkpoint_that_is_a_file(folder):
    unfinished(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").write_text("not a folder")


def in_use(folder):
    lock = filelock.FileLock(folder / ".lock")
    lock.acquire()
    HELD.append(lock)


def linked(name):
    """Something of the folder leads to the outside, where a run would write, truncate or remove."""

    def change(folder):
        outside = folder.parent / "outside"
        outside.mkdir()
        (outside / "precious").write_text("not of a run")
        place = folder / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        place.symlink_to(outside / "precious" if "." in name else outside)

    return change


HELD = []
FOLDERS = [
    Row(
        "a file in the place of the folder",
        a_file_instead,
        "cannot write '.*run' … expected a writable folder … Choose another",
    ),
    Row(
        "the folder of another run",
        of_another_run,
        "holds run '000000000000-00000000-s0' … expected '.*' or an empty folder … choose another folder",
    ),
    Row(
        "a claim that is no JSON",
        content("run.json", b"{"),
        "run.json' is not JSON … expected a file written by a run … Remove",
    ),
    Row("a claim that is a list", content("run.json", b"[1]"), "run.json' .* … expected … Remove"),
    Row("a claim of bytes", content("run.json", bytes(range(200, 256))), "run.json' is not JSON … expected … Remove"),
    Row(
        "a record that is cut short",
        content("result.json", b'{"status": "comp'),
        "result.json' is not JSON … expected a file written by a run … Remove the file",
    ),
    Row("a record that is empty", content("result.json", b""), "result.json' is not JSON … expected … Remove"),
    Row("a record that is a number", content("result.json", b"3"), "result.json' .* … expected … Remove"),
    Row("a record without status", without("status"), "result.json' .* … expected … Remove"),
    Row("a record without metrics", without("metrics"), "result.json' .* … expected … Remove"),
    Row("curves that are damaged", content("history.parquet", b"PAR1"), "history.parquet' .* … expected … Remove"),
    Row(
        "a ledger that was edited",
        lambda folder: (unfinished(folder), content("test_ledger.jsonl", b"{}\n")(folder))[0],
        "test_ledger.jsonl' .* … expected … new folder",
    ),
    Row(
        "checkpoints that are damaged",
        with_damaged_checkpoints,
        "checkpoints are damaged … expected one that is whole … remove|Remove",
    ),
    Row(
        "a file in the place of the checkpoints",
        with_a_checkpoint_that_is_a_file,
        "cannot write checkpoint … expected a writable folder … mend the folder",
    ),
    Row(
        "a log that is a link",
        linked("run.log"),
        "has links in it .run.log. … expected files and folders of its own … Remove",
    ),
    Row(
        "checkpoints that are a link",
        linked("checkpoints"),
        "has links in it .checkpoints. … expected files and folders … Remove",
    ),
    Row(
        "a checkpoint that is a link",
        linked("checkpoints/99"),
        "links in it .checkpoints/99. … expected files … Remove",
    ),
    Row("a lock that is a link", linked(".lock"), "has links in it ..lock. … expected files and folders … Remove"),
    Row("a folder in use", in_use, "in use by another process … expected one process … Wait"),
]


@rows(FOLDERS)
def test_a_bad_run_folder(row, composed, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    row.given(folder)
    before = files(tmp_path)
    try:
        with pytest.raises(errors.RunFolderError) as refused:
            run_into(folder, composed | {"output_dir": str(tmp_path / "outputs")})
    finally:
        while HELD:
            HELD.pop().release()
    answers(row, str(refused.value))
    after = files(tmp_path)
    appended = {str(folder / name) for name in ("result.json", "run.log", "log.jsonl", "config.yaml", "schema.json")}
    assert {path for path in after if after[path] != before.get(path)} <= appended | {str(folder / ".lock")}
    assert not [path for path in after if "partial" in path or ".tmp" in path]


# The command line: the argument is what follows ``python -m experiments.train``.

COMMANDS = [
    Row(
        "an unknown key",
        ["trainer.epoch=3"],
        "unknown option 'trainer.epoch' … expected one of .*'epochs' … Did you mean",
    ),
    Row("an unknown key at the top", ["speed=3"], "unknown option 'speed' … expected one of … Did you mean 'seed'"),
    Row("an unknown option of a group", ["sharing=mmeo"], "Could not find 'sharing/mmeo' … mmoe … Correct it"),
    Row(
        "an unknown experiment",
        ["experiment=slow_look"],
        "Could not find 'experiment/slow_look' … quick_look … Correct it",
    ),
    Row("no equals sign", ["epochs"], "unknown option 'epochs' … expected one of … See --help"),
    Row(
        "brackets left open",
        ["trainer.epochs=[1"],
        r"'trainer.epochs=\[1' cannot be composed … expected key=value … Correct it",
    ),
    Row("no key", ["=3"], "'=3' cannot be composed … expected key=value … Correct it"),
    Row("nothing", [""], "'' cannot be composed … expected key=value … Correct it"),
    Row("a zero byte", ["trainer.epochs=\0"], "cannot be composed … expected key=value … Correct it"),
    Row(
        "a value that the user must give", ["balancing=fixed"], "'balancing.weights' has no value … expected one … Set"
    ),
    Row(
        "a reference to nothing", ["trainer.epochs=${nothing}"], "'nothing' not found … expected key=value … Correct it"
    ),
    Row("a command in a reference", ["trainer.epochs=${shell:ls}"], "interpolation type shell … expected … Correct it"),
    Row("an unset variable", ["seed=${oc.env:NOT_SET_AT_ALL}"], "'NOT_SET_AT_ALL' not found … expected … Correct it"),
    Row("text for a number", ["trainer.epochs=many"], "trainer.epochs is 'many' … expected a whole number … Change"),
    Row("null for a number", ["trainer.batch_size=null"], "batch_size is None … expected a whole number … Change"),
    Row("a section deleted", ["~objective"], r"no \['objective'\] … expected all of … Put them back"),
    Row("a key deleted", ["~trainer.epochs"], r"trainer has no \['epochs'\] … expected all of … Put them back"),
    Row("a section set to null", ["sharing=null"], "'sharing=null' cannot be composed … expected … Correct it"),
    Row("a section set to a number", ["trainer=3"], "'trainer=3' cannot be composed … expected … Correct it"),
    Row("a group given twice", ["+sharing=mmoe"], "sharing appears more than once … expected … Correct it"),
    Row("a sweep without --multirun", ["seed=0,1"], "'seed=0,1' cannot be composed … expected … Correct it"),
    Row("an output folder that is a file", ["output_dir=taken"], "taken' cannot be made … expected a folder … Choose"),
    Row(
        "an output folder below a file",
        ["output_dir=taken/out"],
        "taken/out' cannot be made … expected a folder … Choose",
    ),
    Row("a run folder that is a file", ["hydra.run.dir=taken"], "taken' cannot be made … expected a folder … Choose"),
    Row(
        "the folder of something else",
        ["hydra.run.dir=used"],
        "used' holds letter.txt … expected one of this run … Choose",
    ),
]


@rows(COMMANDS)
def test_a_bad_command_line(row, tmp_path, monkeypatch, capsys):
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("not a run")
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    small = [o for o in SMALL if not (row.given[0].startswith("sharing=") and o.startswith("sharing"))]
    small = [o for o in small if not (row.given[0].startswith("trainer=") and o.startswith("trainer"))]
    monkeypatch.setattr(sys, "argv", ["train", *small, *row.given])
    with pytest.raises(SystemExit) as stopped:
        command_line(train.main, "train")
    assert stopped.value.code in (1, 2)
    answers(row, capsys.readouterr().err)
    after = files(tmp_path)
    assert {path for path in after if after[path] != before.get(path)} <= {str(tmp_path / "used" / ".lock")}


PROCESSES = [
    Row(
        "text for a number",
        ["experiments.train", *SMALL, "seed=one"],
        "seed is 'one' … expected a whole number … Change",
    ),
    Row(
        "an unknown key",
        ["experiments.train", *SMALL, "sed=1"],
        "unknown option 'sed' … expected one of … Did you mean",
    ),
    Row(
        "an unknown data set",
        ["mtl_jax.data", "fetch", "netflix"],
        "unknown data set 'netflix' … expected one of … Choose",
    ),
    Row("no data set", ["mtl_jax.data", "fetch"], "no data set named … expected some of … Name one"),
    Row(
        "nothing to verify",
        ["mtl_jax.data", "verify", "inst_eval", "--cache-dir", "nowhere"],
        "'inst_eval' is not in … expected a converted copy … Run: python -m",
    ),
]


def test_bad_command_lines_of_real_processes(tmp_path):
    """Started together, since most of each is the start of Python."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m"]
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [(row, subprocess.Popen([*command, *row.given], **options)) for row in PROCESSES]
    for row, process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode in (1, 2), row.name
        answers(row, said)
    assert files(tmp_path) == {}


def test_the_table_has_enough_rows():
    tables = (TABLES, FILES, CONFIGURATIONS, FOLDERS, COMMANDS, PROCESSES)
    counts = [len(table) for table in tables]
    print(f"{sum(counts)} bad inputs: {counts}")
    assert sum(counts) >= 70
    assert all(len({row.name for row in table}) == len(table) for table in tables)
