import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sharing_cost, sharing_summary, sharing_torch, sharing_worker
from benchmarks.sharing_worker import COMPARED, PEERS, STRATEGIES
from benchmarks.train_throughput import OURS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, "benchmarks/sharing_cost.py"]
TINY = sharing_worker.Case(strategies=("shared_bottom", "mmoe"), parameters=None, batch_size=16, steps=2)
ONE = sharing_worker.Case(strategies=("mmoe",), parameters=None, batch_size=16, steps=2)
NEEDING_MORE = (  # than x and the parameters: a context, a state of their own, a link, or several inputs
    "ltb", "home", "aitm", "resflow", "stem", "star", "sar_net", "m2m", "adasparse", "hamur", "epnet", "ppnet", "pepnet",
    "adapt_dhm", "m3oe",
)  # fmt: skip
PAIRS = [(peer, name) for name, entry in COMPARED.items() for peer in entry.peers]
OF_THE_PEERS = "is not installed; it is the peers', see benchmarks/README.md"


def equal_run(name, seconds, *, turn):
    return {"name": name, "round": turn, "seconds": seconds, "parameters": 1000, "forward_flop": 2e6, "flop": 5e6}


def compared_run(name, *, turn, slow, **peers):
    """A round in which ours needs 1 s, and everything is ``slow`` times slower."""
    seconds = {OURS: slow} | {peer.replace("_", "-"): slow * value for peer, value in peers.items()}
    return {"name": name, "round": turn, "seconds": seconds, "parameters": dict.fromkeys(seconds, 1000)}


@pytest.fixture
def record():
    """What was measured in two rounds, of which the second is disturbed."""
    rounds = list(enumerate((1.0, 10.0)))
    return {
        "equal_runs": [
            equal_run(name, slow * seconds, turn=turn)
            for turn, slow in rounds
            for name, seconds in (("ple", 0.04), ("mmoe", 0.02))
        ],
        "compared_runs": [
            compared_run(name, turn=turn, slow=slow, **peers)
            for turn, slow in rounds
            for name, peers in (
                ("shared_bottom", {"torch_rechub": 3.0, "deepctr_torch": 1.2}),
                ("mmoe", {"torch_rechub": 3.0, "deepctr_torch": 1.4}),
                ("ple", {"torch_rechub": 1.7}),
                ("ple_repeated", {"torch_rechub": 0.9}),
                ("esmm", {"torch_rechub": 1.1, "deepctr_torch": 0.8}),
                ("aitm", {"torch_rechub": 1.3}),
            )
        ],
        "expert_runs": [
            {"number": number, "round": turn, "seconds": {"stacked": slow, "loop": slow * loop}}
            for turn, slow in rounds
            for number, loop in ((8, 1.3), (4, 1.1), (2, 0.5))
        ],
        "widths": {"ple": {"levels": [[81], [41]]}, "mmoe": {"expert_units": [64, 32]}},
        "target": 1000,
        "unmatched": {"mtan": "too few"},
        "missing": {"deepctr-torch": "ModuleNotFoundError: No module named 'deepctr_torch'"},
        "peer": sharing_cost.NOT_ASKED,
        "busy_elsewhere": 0.4,
        "machine": {"cpu": "a cpu"},
        "settings": {"threads": 2, "batch_size": 2000, "steps": 32, "repeats": 2},
        "gemm_gflops": 100.0,
        "device": "cpu: cpu",
        "versions": {"jax": "0"},
        "commit": None,
        "date": "today",
    }


def test_help_needs_no_training_environment():
    heavy = ["jax", "polars", "hydra", "torch", "torch_rechub", "deepctr_torch", "mtl_jax"]
    code = f"import benchmarks.sharing_cost, benchmarks.sharing_torch, sys; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([*SCRIPT, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for option in ("--quick", "--strategies", "--repeats", "--threads", "--json", "--peer-python", "--parameters"):
        assert option in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [["--repeats", "0"], ["--strategies", "magic"], ["--experts", "4", "0"], ["--parameters", "0"], ["--steps", "0"]],
)
def test_impossible_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        sharing_cost.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_what_is_given_goes_before_what_quick_means():
    options = sharing_cost.parse(["--quick", "--strategies", "cgc", "cgc", "--experts"])
    assert (options.strategies, options.experts, options.repeats) == (["cgc"], [], 3)
    assert sharing_cost.parse([]).strategies == list(STRATEGIES)


def test_every_strategy_is_measured():
    configured = [path.stem for path in (ROOT / "conf" / "sharing").glob("*.yaml")]
    assert sorted(STRATEGIES) == sorted(configured) and {*NEEDING_MORE} < {*STRATEGIES}


@pytest.mark.parametrize("parameters", [None, 5000])
def test_a_case_survives_its_command_line(parameters):
    case = sharing_worker.Case(("ple", "mmoe"), parameters, 16, 3)
    assert sharing_worker.Case.parse(None, case.arguments()) == case
    assert list(case.compared()) == ["mmoe", "ple", "ple_repeated"]
    linked = sharing_worker.Case(("aitm", "single_task"), parameters, 16, 3).compared()
    assert {name: entry.title for name, entry in linked.items()} == {"esmm": "ESMM", "aitm": "AITM"}


def test_an_interpreter_that_cannot_be_used_is_named(tmp_path):
    assert sharing_cost.peer_command(None) == (None, sharing_cost.NOT_ASKED)
    with pytest.raises(SystemExit, match="nowhere"):
        sharing_cost.peer_command(tmp_path / "nowhere")
    command, line = sharing_cost.peer_command(Path(sys.executable))
    assert command[0] == sys.executable in line


def test_a_library_that_cannot_be_imported_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_rechub", None)
    monkeypatch.setitem(sys.modules, "deepctr_torch", None)
    passes = sharing_torch.Passes(TINY)
    assert passes.peers == {} and list(passes.missing) == list(PEERS)
    assert all("Error" in reason for reason in passes.missing.values())


def test_ratios_survive_a_disturbed_round(record):
    found = sharing_summary.summary(record)
    mmoe, ple = found["equal"]  # in the order of the strategies, not of the rounds
    assert (mmoe["name"], mmoe["relative"], ple["relative"]) == ("mmoe", 1.0, pytest.approx(0.5))
    assert mmoe["seconds"] == pytest.approx(0.11)
    assert mmoe["examples_per_second"] == pytest.approx(2000 / 0.11)
    assert mmoe["share_of_gemm"] == pytest.approx(2000 * 5e6 / 0.11 / 1e9 / 100)
    models = {row["name"]: row for row in found["compared"]}
    assert models["mmoe"]["speed"] == {"torch-rechub": pytest.approx(3.0), "deepctr-torch": pytest.approx(1.4)}
    assert models["mmoe"]["seconds"][OURS] == pytest.approx(5.5)
    assert {row["number"]: row["speed"] for row in found["experts"]}[8] == pytest.approx(1.3)


def test_goals_go_by_the_slowest_comparison(record):
    goals = sharing_summary.summary(record)["goals"]
    said = {goal["text"]: (goal["met"], goal["where"], goal["lacking"]) for goal in goals}
    faster, by_half = " is faster than both other libraries", " is at least 1.5 x as fast as both other libraries"
    assert said["SharedBottom (64-32)" + faster] == (True, "deepctr-torch", [])
    assert said["MMoE (8 x 64-32)" + by_half] == (False, "deepctr-torch", [])
    assert said["PLE (6 x 64, 6 x 32)" + by_half] == (None, "torch-rechub", ["deepctr-torch"])
    assert said["PLE (6 x 64-32, twice)" + faster] == (False, "torch-rechub", ["deepctr-torch"])
    assert said["Stacked experts are at least as fast as a loop over 4 or more"] == (True, "4 experts", [])
    assert said["ESMM (2 x 64-32)" + faster] == (False, "deepctr-torch", [])
    only = " is faster than torch-rechub, the only other library that has it"
    assert said["AITM (2 x 64-32)" + only] == (True, "torch-rechub", [])
    assert [text for text in said if "1.5 x" in text] == [
        name + by_half for name in ("MMoE (8 x 64-32)", "PLE (6 x 64, 6 x 32)", "PLE (6 x 64-32, twice)")
    ]
    assert len(goals) == 10


def test_a_run_without_other_libraries_says_so(record):
    runs = [compared_run(name, turn=0, slow=1.0) for name in ("shared_bottom", "mmoe")]
    found = record | {"compared_runs": runs, "expert_runs": [], "missing": {}}
    found |= sharing_summary.summary(found)
    assert [goal["met"] for goal in found["goals"]] == [None] * 3
    assert all(line.endswith(": not measured.") for line in sharing_summary.sentences(found))
    assert sharing_summary.DIFFERENCES not in sharing_summary.caption(found)


def test_tables_and_sentences(record, capsys):
    record |= sharing_summary.summary(record)
    (mmoe, ple), compared = sharing_summary.equal_table(record), sharing_summary.compared_table(record)
    assert mmoe == ("mmoe", "expert_units 64-32", "1,000", "2000", "110.00", "18,182", "1.00 x", "91", "91%")
    assert (ple[1], ple[6]) == ("levels 81/41", "0.50 x")
    assert compared[0] == ("SharedBottom", "64-32", "mtl_jax", "1,000", "5500.00", "364", "")
    assert compared[1][2:] == ("torch-rechub", "1,000", "16500.00", "121", "3.00 x")
    assert sharing_summary.expert_table(record)[0] == ("2", "5500.00", "2750.00", "0.50 x")
    lines = "\n".join(sharing_summary.caption(record))
    for part in ("no --peer-python", "mtan has no such size", "deepctr-torch was not measured", "40%", "100 GFLOP/s"):
        assert part in lines
    assert "quiet machine" not in "\n".join(sharing_summary.caption(record | {"busy_elsewhere": 0.01}))
    said = sharing_summary.sentences(record)
    assert said[0].endswith("met, 1.20 x (deepctr-torch).")
    assert said[2].endswith("not known, 1.70 x (torch-rechub, deepctr-torch not measured).")
    sharing_summary.show(record)
    assert capsys.readouterr().out.rstrip().endswith("met, 1.10 x (4 experts).")


def test_strategies_are_of_one_size_and_passes_are_timed():
    passes = sharing_worker.Passes(TINY)
    assert passes.unmatched == {}
    for name in TINY.strategies:
        answer = passes.measure(part="equal", name=name)
        assert answer["parameters"] == pytest.approx(passes.target, rel=0.01)
        assert 0 < answer["forward_flop"] < answer["flop"] and answer["seconds"] > 0
        # About twice a parameter, for they are in a product once an example.
        assert answer["forward_flop"] == pytest.approx(2 * answer["parameters"], rel=0.05)
    assert sharing_worker.widths_of("mmoe", passes.strategies["mmoe"]) == {"expert_units": (64, 32)}


def test_a_size_that_a_strategy_cannot_have_is_named():
    case = sharing_worker.Case(("shared_bottom", "mmoe"), 4000, 16, 2)
    passes = sharing_worker.Passes(case)
    assert {*passes.strategies, *passes.unmatched} == set(case.strategies)
    assert "'MMoE' has" in passes.unmatched["mmoe"]


def test_a_penalty_of_a_strategy_is_in_its_loss():
    losses = {}
    for penalty in (0.0, 1e6):
        passes = sharing_worker.Passes(ONE)
        strategy = sharing_worker.constructor("DSelectK", {"num_experts": 3, "expert_units": (4,), "entropy": penalty})
        losses[penalty] = passes.passes_of(strategy)[0]()
    assert losses[1e6] > 1e3 > losses[0.0]


FAST = ("aitm", "stem", "pepnet")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NEEDING_MORE]
)
def test_strategies_that_need_more_are_of_the_same_size_and_timed(name):
    passes = sharing_worker.Passes(dataclasses.replace(ONE, strategies=(name,)))
    assert passes.unmatched == {}
    answer = passes.measure(part="equal", name=name)
    assert answer["parameters"] == pytest.approx(passes.target, rel=0.01)
    assert 0 < answer["forward_flop"] < answer["flop"] and answer["seconds"] > 0
    widths = sharing_worker.widths_of(name, passes.strategies[name])
    assert widths and json.loads(json.dumps(widths))


def test_widths_of_what_is_inside_are_named():
    strategy = sharing_worker.constructor(*STRATEGIES["pepnet"])
    assert sharing_worker.widths_of("pepnet", strategy) == {"units": (64, 32)}
    assert strategy.keywords["inner"].keywords["dropout"] == 0.0


@pytest.mark.parametrize(("growth", "moves"), [(0.0, False), (10.0, True)])
def test_what_a_pass_assigns_goes_into_the_next(growth, moves):
    options = {"units": (4,), "num_domains": 3, "growth": growth}
    passes, _ = sharing_worker.Passes(ONE).passes_of(sharing_worker.constructor("AdaSparse", options))
    first, second = passes(), passes()
    assert (first != second) == moves


def test_chances_that_rise_are_in_the_loss_of_aitm():
    losses = {}
    for factor in (0.0, 1e6):
        strategy = sharing_worker.constructor("AITM", {"units": (4,), "calibration": factor})
        losses[factor] = sharing_worker.Passes(ONE).passes_of(strategy)[0]()
    assert losses[1e6] > 1e3 > losses[0.0]


def test_esmm_is_trained_on_the_product_of_chances():
    from flax import nnx

    from mtl_jax.nn import Context

    strategy, passes = sharing_worker.compared_constructor("esmm"), sharing_worker.Passes(ONE)
    network = sharing_worker.network(strategy, sharing_worker.NUM_DENSE, sharing_worker.TASKS, rngs=nnx.Rngs(0))
    logits, _ = sharing_worker.outputs(network, passes.batch["dense"], Context())
    click, given = (1 / (1 + np.exp(-np.asarray(logits[task], np.float64))) for task in sharing_worker.TASKS)
    expected = 0.0
    for chance, labels in zip((click, click * given), passes.batch["labels"].T, strict=True):
        expected -= np.mean(np.where(labels == 1, np.log(chance), np.log(1 - chance)))
    loss, _ = passes.compared("esmm")
    assert loss() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("number", [3, 4])
def test_both_layouts_of_experts_compute_the_same(number):
    passes = sharing_worker.Passes(ONE)
    stacked, loop = (passes.experts(number, way)[0]() for way in sharing_worker.WAYS)
    assert stacked == pytest.approx(loop, rel=1e-5) and stacked > 0


def test_one_batch_is_given_to_all():
    arrays = sharing_worker.generate(TINY)
    assert {name: array.shape for name, array in arrays.items()} == {"dense": (16, 191), "labels": (16, 2)}
    assert all(np.array_equal(arrays[name], again) for name, again in sharing_worker.generate(TINY).items())
    rows = sharing_worker.facts_of_rows(TINY)
    assert {name: (array.shape, array.dtype.name) for name, array in rows.items()} == {
        "domain": ((16,), "int32"),
        "prior": ((16, 32), "float32"),
    }
    assert {*rows["domain"].tolist()} == {0, 1, 2}


@pytest.mark.parametrize("peer", PEERS)
def test_each_library_makes_the_models_that_it_has(peer):
    makers = {entry.maker for entry in COMPARED.values() if peer in entry.peers}
    others = {entry.maker for entry in COMPARED.values()} - makers
    assert makers <= {*dir(sharing_torch.PEERS[peer])} and others.isdisjoint(dir(sharing_torch.PEERS[peer]))


@pytest.mark.parametrize(("peer", "name"), PAIRS)
def test_models_of_other_libraries_have_the_same_layers(peer, name):
    """Their products are those of ours, up to what the summary names."""
    torch = pytest.importorskip("torch", reason=f"torch {OF_THE_PEERS}")
    package = peer.replace("-", "_")
    if peer == "deepctr-torch":
        sharing_torch.DeepCTR()  # does without what its import would load
    pytest.importorskip(package, reason=f"{package} {OF_THE_PEERS}")

    entry, library = COMPARED[name], sharing_torch.PEERS[peer]()
    model = getattr(library, entry.maker)(**entry.options)
    kernels = sorted(tuple(m.weight.T.shape) for m in model.modules() if isinstance(m, torch.nn.Linear))
    expected = sorted(kernels_of(sharing_worker.compared_constructor(name)))
    if peer == "deepctr-torch" and entry.strategy == "ple":
        expected = sorted([*expected, (entry.options["levels"][-2][-1], 6)])  # the gate that nothing reads
    assert kernels == expected

    passes = sharing_torch.Passes(TINY)
    answer = passes.measure(peer=peer, name=name)
    assert answer["seconds"] > 0 and answer["parameters"] >= sum(np.prod(shape) for shape in expected)


def kernels_of(strategy):
    """Shapes of all kernels of a strategy and its towers, those of a bank one by one."""
    from flax import nnx

    module = nnx.eval_shape(
        lambda: sharing_worker.network(strategy, sharing_worker.NUM_DENSE, sharing_worker.TASKS, rngs=nnx.Rngs(0))
    )
    for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        if "kernel" in path:
            yield from [leaf.shape[-2:]] * (leaf.shape[0] if len(leaf.shape) == 3 else 1)


def test_a_tiny_run_measures_and_says_what_is_met(tmp_path):
    arguments = ["--strategies", "shared_bottom", "--experts", "4", "--batch-size", "16", "--steps", "1"]
    arguments += ["--parameters", "20000", "--repeats", "2", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*SCRIPT, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    record = json.loads((tmp_path / "out.json").read_text())
    (row,), (compared,), (experts,) = record["equal"], record["compared"], record["experts"]
    assert row["parameters"] == pytest.approx(20_000, rel=0.01) and row["relative"] is None
    assert 0 < row["share_of_gemm"] and compared["speed"] == {} and experts["speed"] > 0
    for name in ("machine", "versions", "commit", "date", "command"):
        assert record[name]
    assert sharing_cost.NOT_ASKED in done.stdout
    assert "SharedBottom (64-32) is faster than both other libraries: not measured." in done.stdout
