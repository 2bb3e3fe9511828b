import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import machine, train_throughput, worker

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    sizes = np.array([5, 9, 3])
    parts = {
        f"{part}_{name}": array
        for part, num_rows in (("train", 40), ("test", 12))
        for name, array in {
            "ids": generator.integers(0, sizes, (num_rows, 3)).astype(np.int32),
            "dense": generator.standard_normal((num_rows, 1)).astype(np.float32),
            "labels": generator.integers(0, 2, (num_rows, 2)).astype(np.float32),
        }.items()
    }
    return parts | {"table_sizes": sizes}


@pytest.fixture
def runs():
    """Two competitors, three rounds; the second round is disturbed and slows both by ten."""
    return [
        {
            "name": name,
            "round": turn,
            "examples_per_second": rate * slow,
            "warmup_seconds": 1.0,
            "peak_rss_bytes": 2**20,
            "test_auc": {"click": 0.7 + 0.01 * turn, "like": 0.8},
            "versions": {"numpy": "2"},
            "busy_elsewhere": busy,
        }
        for turn, (slow, busy) in enumerate(((1.0, 0.0), (0.1, 0.6), (1.02, 0.0)))
        for name, rate in (("torch_loop", 100_000.0), ("mtl_jax", 150_000.0))
    ]


def summarise(runs):
    return train_throughput.summary(runs, flop_per_example=500_000, gemm_gflops=100.0)


def test_flop_of_a_training_step_counts_every_product_three_times():
    """Counted on the matrices themselves: the forward product and two of the same size in the backward pass."""
    products = 8 * [(1, 113, 64), (1, 64, 32)]  # experts
    products += 2 * [(1, 113, 8), (1, 8, 32), (1, 32, 32), (1, 32, 1)]  # gate, mixture, tower, logit of each task
    assert worker.training_flop(113) == 3 * sum(2 * m * k * n for m, k, n in products)
    assert worker.training_flop(113) == pytest.approx(0.47e6, rel=0.01)


def test_input_width_is_an_embedding_a_feature_and_the_dense_columns(arrays):
    assert worker.input_width(arrays) == 3 * 16 + 1


def test_every_round_has_everyone_once_and_positions_even_out():
    names = ["a", "b", "c"]
    rounds = train_throughput.schedule(names, 6)
    assert len(rounds) == 6
    assert all(sorted(order) == names for order in rounds)
    assert all([order[place] for order in rounds].count(name) == 2 for name in names for place in range(3))


def test_warmup_is_not_part_of_the_speed(monkeypatch):
    ticks = iter([0.0, 7.0, 10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(ticks))
    epochs = []
    warmup, seconds = worker.time_epochs(lambda: epochs.append(None), 2)
    assert (warmup, seconds, len(epochs)) == (7.0, [1.0, 3.0], 3)
    result = worker.measurement(
        rows_per_epoch=600,
        warmup_seconds=warmup,
        seconds_per_epoch=seconds,
        test_auc={"click": np.float64(0.5), "like": 0.6},
        versions={},
    )
    assert result["examples_per_second"] == 2 * 600 / 4.0
    json.dumps(result)


def test_ratio_survives_a_disturbed_round(runs):
    record = summarise(runs)
    assert record["ratios"] == {"mtl_jax/torch_loop": pytest.approx(1.5)}
    assert record["examples_per_second"] == {"torch_loop": 100_000.0, "mtl_jax": 150_000.0}
    assert record["test_auc"]["mtl_jax"] == {"click": pytest.approx(0.71), "like": 0.8}
    assert record["gflops"]["mtl_jax"] == pytest.approx(75.0)
    assert record["share_of_gemm"]["mtl_jax"] == pytest.approx(0.75)


def test_table_shows_the_ratio_of_peers_only_and_the_caption_warns_of_a_busy_machine(runs):
    record = summarise(runs) | {
        "runs": runs,
        "machine": {"cpu": "a cpu"},
        "settings": {"threads": 2, "train_rows": 10, "epochs": 1, "repeats": 3},
        "commit": None,
        "date": "today",
    }
    rows = {row[0]: dict(zip(train_throughput.COLUMNS, row, strict=True)) for row in train_throughput.table(record)}
    assert rows["torch_loop"]["ours is"] == "1.50 x"
    assert rows["mtl_jax"]["ours is"] == ""
    assert rows["mtl_jax"]["range"] == "15,000 - 153,000"
    assert rows["mtl_jax"]["of GEMM"] == "75%"
    assert "60%" in train_throughput.caption(record)
    quiet = record | {"runs": [run for run in runs if run["busy_elsewhere"] == 0.0]}
    assert "quiet machine" not in train_throughput.caption(quiet)


def test_our_row_alone_has_no_ratios(runs):
    alone = summarise([run for run in runs if run["name"] == "mtl_jax"])
    assert alone["ratios"] == {}
    assert list(train_throughput.commands(None)) == ["mtl_jax"]


def test_an_interpreter_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        train_throughput.commands(tmp_path / "nowhere")


def test_arrays_survive_the_file_and_a_quarter_is_made_of_their_rows(arrays, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    data = worker.load(path)
    assert all(np.array_equal(data[name], array) for name, array in arrays.items())
    quarter = worker.load(train_throughput.write_quarter(path, tmp_path / "quarter.npz"))
    assert len(quarter["train_ids"]) == 10
    assert len(quarter["test_ids"]) == 3

    def whole(part):
        return [
            np.hstack([part[f"train_{name}"][k] for name in ("ids", "dense", "labels")])
            for k in range(len(part["train_ids"]))
        ]

    assert {row.tobytes() for row in whole(quarter)} < {row.tobytes() for row in whole(arrays)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_ids": None}, "lacks \\['train_ids'\\]"),
        ({"table_sizes": np.array([5, 2, 3])}, "table_sizes \\[5, 2, 3\\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(arrays, tmp_path, change, message):
    path = tmp_path / "data.npz"
    np.savez(path, **{name: array for name, array in (arrays | change).items() if array is not None})
    with pytest.raises(ValueError, match=message):
        worker.load(path)


def test_work_and_memory_of_processes_are_seen():
    if machine.busy_seconds() is None:
        pytest.skip("the kernel tells no per-core times")
    busy, children, peak = machine.busy_seconds(), machine.children_seconds(), machine.peak_resident_bytes()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    worked = machine.children_seconds() - children
    assert worked > 0.05
    assert machine.busy_seconds() - busy >= 0.5 * worked  # ticks are counted in hundredths of a second
    block = np.ones(2**26, np.uint8)
    assert machine.peak_resident_bytes() >= peak
    assert machine.peak_resident_bytes() > block.nbytes


def test_facts_of_the_machine_are_plain_json():
    facts = json.loads(
        subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / "machine.py")], check=True, capture_output=True, text=True
        ).stdout
    )
    assert set(facts) == {"machine", "commit", "gemm_gflops"}
    assert facts["gemm_gflops"] > 0.1
    assert facts["machine"]["cores"] == machine.usable_cores()


def test_parts_of_the_benchmark_import_neither_jax_nor_polars():
    """So that help, peers and old results need no training environment."""
    heavy = ["jax", "polars", "hydra", "mtl_jax"]
    code = f"import benchmarks.train_throughput, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_our_worker_writes_the_contract(arrays, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays)
    command = [sys.executable, "benchmarks/train_throughput.py", "--worker", str(tmp_path / "data.npz")]
    options = ["--epochs", "1", "--batch-size", "16", "--json", str(tmp_path / "out.json")]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["rows_per_epoch"] == 40
    assert len(result["seconds_per_epoch"]) == 1
    assert all(0 <= result["test_auc"][task] <= 1 for task in worker.TASKS)
    assert result["peak_rss_bytes"] > 0
