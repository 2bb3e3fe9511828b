"""The gate from configuration to objects: what it lets through, and what it says otherwise."""

import functools

import optax
import pytest

from mtl_jax.balancing.equal import Equal
from mtl_jax.config import build, check_keys
from mtl_jax.errors import ConfigError
from mtl_jax.sharing import MMoE
from mtl_jax.train import Optimizer


def test_builds_an_object():
    assert build({"_target_": "mtl_jax.balancing.equal", "reduction": "mean"}) == Equal(reduction="mean")


def test_builds_a_constructor_with_options():
    part = build({"_target_": "mtl_jax.sharing.MMoE", "_partial_": True, "num_experts": 3})
    assert isinstance(part, functools.partial)
    assert part.func is MMoE
    assert part.keywords == {"num_experts": 3}


def test_builds_nested_nodes():
    node = {
        "_target_": "mtl_jax.train.Optimizer",
        "transform": {"_target_": "optax.scale_by_adam", "b1": 0.5},
        "learning_rate": {"_target_": "optax.constant_schedule", "value": 0.25},
    }
    optimizer = build(node)
    assert isinstance(optimizer, Optimizer)
    assert isinstance(optimizer.transform, optax.GradientTransformation)
    assert optimizer.learning_rate(7) == 0.25


def test_a_package_of_ones_own_has_to_be_allowed(tmp_path, monkeypatch):
    (tmp_path / "mypaper.py").write_text("def half(*, of):\n    return of / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "mypaper.half", "of": 3}
    with pytest.raises(ConfigError, match=r"expected an object of one of .* add allow=\[mypaper\]"):
        build(node)
    assert build(node, allow=["mypaper"]) == 1.5


@pytest.mark.parametrize(
    ("node", "message"),
    [
        pytest.param(
            {"_target_": "os.system", "command": "true"}, "'os.system'; expected an object of one of", id="os"
        ),
        pytest.param(
            {"_target_": "mtl_jax.report.folder.os.system", "command": "true"},
            "expected an object of one of",
            id="another package behind an allowed name",
        ),
        pytest.param(
            {"_target_": "mtl_jax.train.Optimizer", "transform": {"_target_": "builtins.eval"}},
            r"transform has _target_ 'builtins.eval'",
            id="nested",
        ),
        pytest.param(
            {"_target_": "mtl_jaxed.evil"}, "expected an object of one of", id="a name that only starts alike"
        ),
        pytest.param({"_target_": "mtl_jax.sharing.MMOE"}, "cannot be imported", id="misspelt"),
        pytest.param(
            {"_target_": "mtl_jax.sharing.MMoE", "_partial_": True, "experts": 3},
            r"option 'experts'; expected one of .*'num_experts'",
            id="unknown option",
        ),
        pytest.param(
            {"_target_": "mtl_jax.balancing.equal", "reduction": "median"}, "median", id="the constructor's own check"
        ),
    ],
)
def test_refuses(node, message):
    with pytest.raises(ConfigError, match=message):
        build(node)


def test_nothing_is_called_before_all_targets_are_checked(tmp_path, monkeypatch):
    (tmp_path / "side.py").write_text("calls = []\n\ndef effect():\n    calls.append(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import side

    node = {
        "_target_": "mtl_jax.train.Optimizer",
        "transform": {"_target_": "side.effect"},
        "x": {"_target_": "os.getcwd"},
    }
    with pytest.raises(ConfigError):
        build(node, allow=["side"])
    assert side.calls == []


def test_a_key_that_nothing_reads():
    check_keys({"seed": 1}, ("seed", "data"))
    with pytest.raises(ConfigError, match=r"nothing reads 'trainer.epoch'; expected keys of \['epochs'\]"):
        check_keys({"epoch": 1}, ("epochs",), place="trainer")
