"""Random tables, schemas and configurations: either they work, or an error says what to mend.

What is drawn is what people have: nulls, constants, NaN, odd names, other alphabets, huge numbers, empty tables, columns
of every type; and every key of the configuration with values of right and wrong types. An exception of any class but
``MtlJaxError`` is a defect of ours, wherever it comes from. Examples are drawn the same way in every run.
"""

import collections
import copy
import functools
import io
import json
import math
import string
import warnings

import hydra
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from mtl_jax.config import build, plain
from mtl_jax.data import Categorical, Dataset, MultiHot, Numeric, Schema, SequenceFeature, Vocabulary
from mtl_jax.data.batching import as_batch
from mtl_jax.data.datasets import table
from mtl_jax.data.schema import NUMERIC_TRANSFORMS
from mtl_jax.data.splits import SPLITS
from mtl_jax.errors import MtlJaxError
from mtl_jax.run import run
from mtl_jax.run_config import build_model, build_parts, check_config
from mtl_jax.tasks import KINDS, Task

FAST = {"files": 80, "schemas": 150, "configurations": 200, "runs": 12}
MANY = {name: 10 * count for name, count in FAST.items()}
COUNTS = collections.Counter()


def examples(property_, count):
    """Runs a property on so many examples, and prints how many were tried, and how many of them worked."""
    COUNTS.clear()
    chosen = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # the first counterexample is small enough, and a smaller one takes minutes to find
    )
    chosen(property_)()
    worked, refused = COUNTS["worked"], COUNTS["refused"]
    print(f"{worked + refused} tried: {worked} worked, {refused} were refused with a message")
    assert refused and worked, COUNTS


def attempt(job):
    """The result of a job, or None where it was refused with a message that has an expectation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = job()
        except MtlJaxError as error:
            COUNTS["refused"] += 1
            assert len(str(error)) > 20, error
            return None
    COUNTS["worked"] += 1
    return result


def either(name):
    """The fast variant of a property and the slow one with many examples."""
    return pytest.mark.parametrize(
        "count", [FAST[name], pytest.param(MANY[name], marks=pytest.mark.slow)], ids=["fast", "many"]
    )


# Tables

names = st.one_of(
    st.sampled_from(
        ["a", "b", "buy", "user", "time", "id", "x__missing", "domain", "weight", "task", "a/b", "a.b", "", " "]
    ),
    st.text(max_size=4),
)
numbers = st.one_of(
    st.floats(-5, 5), st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e300, 5e-324, 0.0, -0.0, 1e38, 3.5])
)
wholes = st.one_of(st.integers(-2, 5), st.sampled_from([2**31, -(2**31), 2**53 + 1, 2**63 - 1, -(2**63)]))
texts = st.one_of(
    st.sampled_from(["", "a", "b", "NaN", "null", "<null>", "1", "ß", "日本", "a|b", "\0", "\n"]), st.text(max_size=3)
)
KINDS_OF_COLUMNS = {
    "whole": (wholes, pl.Int64),
    "small": (st.integers(0, 3), pl.Int8),
    "binary": (st.integers(0, 1), pl.UInt8),
    "unsigned": (st.sampled_from([0, 1, 2**64 - 1]), pl.UInt64),
    "float": (numbers, pl.Float64),
    "single": (st.floats(-5, 5, width=32), pl.Float32),
    "text": (texts, pl.String),
    "boolean": (st.booleans(), pl.Boolean),
    "date": (st.dates(), pl.Date),
    "moment": (st.datetimes(), pl.Datetime),
    "span": (st.timedeltas(), pl.Duration),
    "bytes": (st.binary(max_size=2), pl.Binary),
    "texts": (st.lists(texts, max_size=3), pl.List(pl.String)),
    "wholes": (st.lists(st.integers(0, 9), max_size=3), pl.List(pl.Int64)),
    "floats": (st.lists(numbers, max_size=3), pl.List(pl.Float64)),
    "lists": (st.lists(st.lists(st.integers(0, 2), max_size=2), max_size=2), pl.List(pl.List(pl.Int64))),
    "struct": (st.fixed_dictionaries({"p": st.integers(0, 3)}), pl.Struct({"p": pl.Int64})),
    "category": (st.sampled_from(["a", "b", "c"]), pl.Categorical),
    "nothing": (st.none(), pl.Null),
}


@st.composite
def columns(draw, height):
    kind = draw(st.sampled_from(sorted(KINDS_OF_COLUMNS)))
    values, dtype = KINDS_OF_COLUMNS[kind]
    if draw(st.booleans()):
        values = st.just(draw(values))  # a constant
    if draw(st.booleans()):
        values = st.one_of(values, values, values, st.none())
    drawn = draw(st.lists(values, min_size=height, max_size=height))
    return pl.Series(drawn, dtype=dtype, strict=False)


def sound(height):
    """A table that loads; what is drawn spoils it, or does not."""
    rows = np.random.default_rng(0)
    return pl.DataFrame(
        {
            "shop": rows.choice(["n", "s", "w"], height).tolist(),
            "price": rows.gamma(2.0, 5.0, height),
            "tags": pl.Series(
                [[f"t{i}" for i in rows.integers(0, 4, 2)] for _ in range(height)], dtype=pl.List(pl.String)
            ),
            "user": rows.integers(0, 9, height),
            "buy": rows.integers(0, 2, height),
            "stars": rows.integers(0, 4, height),
            "spend": rows.normal(size=height),
        }
    )


@st.composite
def frames(draw):
    """A sound table with some columns replaced or added, or another number of rows."""
    height = draw(st.sampled_from([120, 120, 120, 120, 60, 5, 1, 0]))
    frame = sound(height)
    # Few drawn values, repeated, because drawing is what takes the time.
    order = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 8, height)
    for name in draw(st.lists(st.one_of(names, st.sampled_from(frame.columns)), max_size=3, unique=True)):
        frame = frame.with_columns(draw(columns(8)).alias(name)[order])
    return frame


@st.composite
def loader_options(draw, frame):
    some = st.sampled_from([*frame.columns, "absent"])
    lists = st.one_of(st.none(), st.lists(some, max_size=2))
    tasks = st.one_of(
        st.lists(some, min_size=1, max_size=2, unique=True),
        st.dictionaries(some, st.sampled_from([*KINDS, "other"]), min_size=1, max_size=2),
        st.sampled_from(
            [["buy"], {"buy": "binary", "spend": "regression"}, {"x": {"column": "buy", "kind": "binary"}}]
        ),
        st.sampled_from(
            [None, [], {"buy": {"positive": "> 0"}}, {"spend": {"transform": "log1p"}}, {"buy": {"classes": [1]}}]
        ),
    )
    optional = {
        **{kind: lists for kind in ("categorical", "numeric", "multihot", "sequence", "exclude")},
        **{role: st.one_of(st.none(), some) for role in ("user", "item", "time", "domain", "group", "weight")},
        "split": st.sampled_from([None, *SPLITS, "other"]),
        "split_fractions": st.sampled_from(
            [(0.6, 0.2, 0.2), (1.0,), (0.5, 0.6), (0.5, 0.25, 0.25), (-1, 1, 1), (math.nan, 0, 1)]
        ),
        "split_options": st.sampled_from(
            [None, {}, {"k": 2}, {"k": 0}, {"held": "a"}, {"cuts": [1, 2]}, {"cuts": [1]}, {"what": 1}]
        ),
        "min_count": st.sampled_from([1, 2, 0, -1, 10**6]),
        "max_len": st.sampled_from([1, 3, 0, 10**9]),
        "allow_leak": st.sampled_from([None, {name: "drawn" for name in frame.columns}]),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(optional)), max_size=2, unique=True))
    options = {
        "tasks": {"buy": "binary", "spend": "regression"},
        "allow_leak": {name: "drawn" for name in frame.columns},
    }
    if draw(st.booleans()):
        options["tasks"] = draw(tasks)
    return options | {name: value for name in chosen if (value := draw(optional[name])) is not None}


def check_encoded(dataset):
    """What a model relies on: finite numbers, ids inside their tables, labels inside their range."""
    training = dataset.for_training()
    schema = dataset.schema
    json.dumps(dataset.summary())
    json.dumps(schema.to_dict())
    assert Schema.from_dict(schema.to_dict()) == schema
    for part in (training.train, training.valid, dataset.open_test()):
        assert np.isfinite(part.dense).all()
        for position, feature in enumerate(schema.categoricals):
            assert (
                0
                <= part.ids[:, position].min()
                <= part.ids[:, position].max()
                < schema.vocabulary(feature.vocabulary).size
            )
        for feature in (*schema.bags, *schema.sequences):
            ids = part.bags[feature.name][0] if feature in schema.bags else part.sequences[feature.name]
            assert ids.shape == (part.num_rows, feature.max_len)
            assert 0 <= ids.min() <= ids.max() < schema.vocabulary(feature.vocabulary).size
        for task in schema.tasks:
            assert np.isfinite(part.labels[task.name]).all(), task
            assert part.mask[task.name].dtype == bool
        assert np.isfinite(part.weight).all() and (part.weight >= 0).all()
        as_batch(part)


@either("files")
def test_a_file_of_any_table_loads_or_is_refused(count, tmp_path):
    def property_(data):
        frame = data.draw(frames())
        options = data.draw(loader_options(frame))
        path = tmp_path / "table.parquet"
        frame.write_parquet(path)
        dataset = attempt(lambda: table.load(path=path, **options))
        if dataset is not None:
            check_encoded(dataset)

    examples(given(st.data())(property_), count)


cells = st.one_of(
    st.sampled_from(["", "1", "0", "2.5", "x", "NaN", "inf", "2020-01-01", '"', '"a,b"', "a|b", "é", "9" * 40]),
    st.text(string.printable, max_size=3),
)


@either("files")
def test_a_text_file_of_anything_loads_or_is_refused(count, tmp_path):
    def property_(data):
        frame = sound(120).select("shop", "price", pl.col("buy").alias("bought"))
        lines = [line.split(",") for line in frame.write_csv().splitlines()]
        for _ in range(
            data.draw(st.integers(0, 3))
        ):  # a cell, a column or the header is spoilt, or the file is cut short
            column, cell = data.draw(st.integers(0, 2)), data.draw(cells)
            rows = data.draw(st.sampled_from([[0], [5], range(1, 121), range(50, 121), range(1, 60, 7)]))
            for row in rows:
                lines[row][column] = cell
        lines = lines[: data.draw(st.sampled_from([121, 121, 121, 2, 1, 0]))]
        content = "\n".join(",".join(line) for line in lines).encode(
            data.draw(st.sampled_from(["utf-8"] * 9 + ["utf-16"]))
        )
        path = tmp_path / f"table.{data.draw(st.sampled_from(['csv'] * 9 + ['tsv']))}"
        path.write_bytes(content)
        dataset = attempt(lambda: table.load(path=path, tasks=["bought"]))
        if dataset is not None:
            check_encoded(dataset)

    examples(given(st.data())(property_), count)


# Schemas


ODD = [None, True, -1, 0, 3.5, "3", "", math.nan, [1], {"a": 1}, 10**30]
"""Values of other types than a field wants, or out of its range."""


def one_of(*right):
    """Mostly a right value, now and then an odd one."""
    return st.one_of(*[st.sampled_from(right)] * 5, st.sampled_from(ODD))


@st.composite
def features(draw, frame):
    name = draw(st.one_of(st.sampled_from(frame.columns), st.just("absent")))
    vocabulary = draw(one_of("v", "w", "absent"))
    made = draw(st.sampled_from(["categorical", "numeric", "multihot", "sequence"]))
    if made == "categorical":
        return Categorical(name, vocabulary)
    if made == "numeric":
        options = {"transform": one_of(*NUMERIC_TRANSFORMS), "fill": one_of(None, 0.0), "clip": one_of(10.0, 1)}
        return Numeric(name, **{option: draw(value) for option, value in options.items()})
    if made == "multihot":
        return MultiHot(name, vocabulary, draw(one_of(1, 3)), weights=draw(one_of(None, "floats")))
    return SequenceFeature(name, vocabulary, draw(one_of(1, 3)))


@st.composite
def tasks(draw, frame):
    column = draw(st.sampled_from(["buy", "stars", "spend", "spend", *frame.columns, "absent"]))
    right = {"buy": "binary", "stars": "multiclass", "spend": "regression"}.get(column, "binary")
    kind = draw(one_of(*[right] * 6, *KINDS))
    losses = [None, *(KINDS[kind].losses if isinstance(kind, str) and kind in KINDS else ())]
    fields = {
        "loss": one_of(*losses),
        "space": one_of("all", "buy", "absent"),
        "mask": one_of(None, "buy", "absent"),
        "weight": one_of(1.0, 0.0, "price"),
        "implies": one_of(None, "buy", "absent"),
        "transform": one_of("none", "log1p"),
        "positive": one_of(None, "> 1", "stars > 1", "> nan", "1"),
        "smoothing": one_of(0.0, 0.5),
        "delta": one_of(1.0, 0.5),
        "num_sampled": one_of(0, 1),
        "classes": one_of(None, (), ("0", "1", "2", "3"), ("a",), "ab", (1, 1)),
        "standardise": one_of(True, False),
        "positive_weight": one_of(1.0, 2),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True))
    name = draw(st.sampled_from([*[column] * 6, "renamed", "", "a/b"]))
    return Task(name, kind, column, **{field: draw(fields[field]) for field in chosen})


@st.composite
def schemas(draw, frame):
    """Of a sound schema some parts are drawn."""
    fields = {
        "features": (Categorical("shop", "v"), Numeric("price"), MultiHot("tags", "w", 3)),
        "vocabularies": (Vocabulary("v"), Vocabulary("w")),
        "tasks": (Task("buy", "binary"), Task("spend", "regression")),
        "allow_leak": {name: "drawn" for name in frame.columns},
    }
    vocabulary = st.builds(Vocabulary, one_of("v", "w"), min_count=one_of(1, 2), hash_buckets=one_of(None, 7))
    columns_ = one_of(*frame.columns, "absent")
    drawn = {
        "features": st.lists(features(frame), max_size=3).map(tuple),
        "vocabularies": st.lists(vocabulary, max_size=2).map(tuple),
        "tasks": st.lists(tasks(frame), max_size=2).map(tuple),
        **{role: columns_ for role in ("domain", "user", "item", "group", "time", "weight")},
        "domains": one_of((), ("n", "s", "w"), ("a",)),
        "excluded": one_of({}, {"price": "reason"}),
        "logistic_features": one_of((), ("price",), ("absent",)),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(drawn)), max_size=2, unique=True))
    return Schema(**fields | {field: draw(drawn[field]) for field in chosen})


@either("schemas")
def test_any_schema_fits_or_is_refused(count):
    def property_(data):
        frame = data.draw(frames()) if data.draw(st.booleans()) else sound(120)
        split = data.draw(st.sampled_from([*["rows"] * 12, *SPLITS, *ODD]))
        dataset = attempt(lambda: Dataset.from_frame(frame, data.draw(schemas(frame)), split))
        if dataset is not None:
            check_encoded(dataset)

    examples(given(st.data())(property_), count)


# Configurations


GROUPS = {
    "sharing": ["mmoe", "shared_bottom", "single_task"],
    "balancing": ["equal", "pcgrad", "uncertainty"],
    "optimizer": ["adam", "adagrad", "sgd", "adam_cosine", "adam_slanted"],
    "parallel": ["jit"],
}
QUICK = [
    "data=synthetic",
    "data.num_rows=300",
    "data.dim=4",
    "towers.units=[3]",
    "trainer.epochs=1",
    "trainer.batch_size=125",
]
STRANGE = [
    *(None, True, False, -1, 0, 1, 2, 3, 10**12, -(10**12), 2**64, 10**400),
    *(0.5, -0.5, 0.0, 1.0, 1e-3, 1e300, math.nan, math.inf),
    *("", "3", "none", "mean", "sum", "y1", "y1/rmse", "map", "plain", "adam", "../x", "/", "${seed}", "\0"),
    *([], [1], [0], [-1], [2, 3], [[1]], ["y1"], ["y1", "y2"], [10**12], [math.nan]),
    *(
        {},
        {"y1": 1.0},
        {"a": None},
        {"_target_": "os.getcwd"},
        {"_target_": "optax.scale_by_adam"},
        {"shared": 0.1},
        {1: 2},
    ),
]
UNTOUCHED = {"output_dir"}  # where the test writes


@functools.cache
def composed(*overrides):
    with hydra.initialize_config_module("conf", version_base="1.3"):
        return plain(hydra.compose("train", overrides=[*QUICK, *overrides]))


def leaves(node, path=()):
    """Dotted paths of everything in a configuration, sections included."""
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@st.composite
def configurations(draw):
    """A configuration with up to three values replaced, by values of the kind that is there and of others."""
    config = copy.deepcopy(composed(*(f"{group}={draw(st.sampled_from(names))}" for group, names in GROUPS.items())))
    for narrow in ("units", "expert_units"):
        if narrow in config["sharing"]:
            config["sharing"][narrow] = [4]
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(sorted(leaves(config))))
        node = functools.reduce(lambda inner, key: inner[key], path[:-1], config)
        if path[0] not in UNTOUCHED:
            alike = [value for value in STRANGE if type(value) is type(node[path[-1]])] or STRANGE
            node[path[-1]] = copy.deepcopy(draw(st.sampled_from(draw(st.sampled_from([alike, alike, STRANGE])))))
        if path[0] not in config or not isinstance(config[path[0]], dict):
            break
    return config


def as_far_as_the_model(config):
    check_config(config)
    build_parts(config)
    dataset = build(config["data"], allow=config["allow"], place="data")
    if not isinstance(dataset, Dataset):
        raise MtlJaxError("what run() says of a node that makes something else")
    return build_model(config, dataset)


@either("configurations")
def test_any_configuration_builds_or_is_refused(count):
    def property_(config):
        attempt(lambda: as_far_as_the_model(config))

    examples(given(configurations())(property_), count)


@either("runs")
def test_what_builds_also_runs_or_is_refused(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    number = iter(range(10**9))

    def property_(config):
        epochs = config["trainer"].get("epochs") if isinstance(config.get("trainer"), dict) else None
        if isinstance(epochs, int) and epochs > 2:
            config["trainer"]["epochs"] = 2  # as many as asked for would be right, and take for ever
        folder = tmp_path / str(next(number))
        record = attempt(lambda: run(config, folder=folder, console=Console(file=io.StringIO())))
        if record is not None:
            assert record["status"] == "completed"

    examples(given(configurations())(property_), count)
