"""Artefacts of what was tuned: what they hold, that base and tuning are the deployed model, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError, RunFolderError
from mtl_jax.model import label
from mtl_jax.sharing import MMoE, ResFlow
from mtl_jax.train import Optimizer, fit
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.train.predict import outputs_of
from mtl_jax.train.state import Functional
from mtl_jax.transfer import (
    Adapter,
    Artefact,
    BitFit,
    FineTune,
    GradientTransfer,
    LinearMap,
    LinearProbe,
    LoRA,
    LwF,
    ZeroShot,
    check_tuning,
    load,
    on_base,
    tuning_of,
)

RUN = {"epochs": 2, "batch_size": 8, "patience": 0, "optimizer": Optimizer(learning_rate=0.02)}
BOTTOM = [f"sharing/bottom/layers/{number}" for number in (0, 1)]
STRATEGIES = {
    "lora": LoRA(2, 3.0, rank_stabilised=True),
    "adapter": Adapter(2),
    "bitfit": BitFit(),
    "probe": LinearProbe(),
    "map": LinearMap(),
}


@register
@dataclasses.dataclass(frozen=True)
class SomeTowers(Adaptation):
    """Only the tower of the first task."""

    def phases(self):
        return (lambda path: label(path) == "task/click",)


def state_of(model):
    _, params, rest = Functional.of(model)
    return params | rest


@pytest.fixture(scope="module")
def base(make_model, schema):
    return Artefact.of(make_model(), schema)


@pytest.fixture(scope="module")
def trained(make_model, make_data, schema, base):
    """Name of a strategy -> its result and the artefact of what it tuned; the base is loaded into a model of seed 1."""
    loading, found = load(make_model(1), schema, base), {}

    def run(name):
        if name not in found:
            strategy = STRATEGIES[name]
            result = fit(loading.model, make_data(), adaptation=strategy, origin=loading.origin, **RUN)
            found[name] = result, tuning_of(result, strategy, loading, base, schema, note="kept")
        return found[name]

    return run


@pytest.mark.parametrize("name", STRATEGIES)
def test_base_and_what_was_tuned_are_the_deployed_model_to_the_last_bit(
    name, trained, base, make_model, make_rows, assert_same, tmp_path
):
    """After both were written and read, in a model of other values; and the tuning did change it."""
    result, artefact = trained(name)
    artefact.save(tmp_path / "tuning")
    base.save(tmp_path / "base")
    found, read = Artefact.read(tmp_path / "tuning"), Artefact.read(tmp_path / "base")
    assert (found.hash, found.tuning, found.facts) == (artefact.hash, artefact.tuning, {"note": "kept"})
    model, rows = make_model(5), make_rows(30, 3)
    made = on_base(model, found, read)
    assert_same(state_of(made), state_of(result.model))
    assert_same(outputs_of(made, rows), result.predict(rows))
    assert np.any(result.predict(rows)["spend"] != outputs_of(make_model(), rows)["spend"])
    assert_same(state_of(model), state_of(make_model(5)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora", [f"aux/lora/{layer}/kernel/{factor}" for layer in BOTTOM for factor in "ab"]),
        (
            "adapter",
            [
                f"sharing/bottom/aux/adapter/{number}/{part}/{kind}"
                for number in (0, 1)
                for part in ("down", "up")
                for kind in ("bias", "kernel")
            ],
        ),
        ("bitfit", [f"{layer}/bias" for layer in BOTTOM]),
        ("probe", []),
    ],
)
def test_it_holds_what_was_trained_and_the_hash_of_the_base(name, expected, trained, base):
    """The towers always, and neither kernels nor tables."""
    _, artefact = trained(name)
    towers = [path for path in base.arrays if path.startswith("task/")]
    assert sorted(artefact.arrays) == sorted([*expected, *towers])
    assert artefact.tuning.base == base.hash
    assert artefact.tuning.loaded.keys() == base.arrays.keys() - artefact.arrays.keys()


def test_it_is_much_smaller_than_its_base(make_model, make_data, schema):
    def wide(seed):
        return make_model(seed, units=(64, 64))

    base = Artefact.of(wide(0), schema)
    loading = load(wide(1), schema, base)
    result = fit(loading.model, make_data(), adaptation=LoRA(1), origin=loading.origin, **RUN | {"epochs": 1})
    assert tuning_of(result, LoRA(1), loading, base, schema).num_numbers < base.num_numbers / 5


def test_factors_of_all_experts(make_model, make_data, schema, make_rows, assert_same):
    def stacked(seed):
        return make_model(seed, sharing=MMoE, num_experts=3, expert_units=(6, 5), dropout=0.0)

    base = Artefact.of(stacked(0), schema)
    loading = load(stacked(1), schema, base)
    result = fit(loading.model, make_data(), adaptation=LoRA(2), origin=loading.origin, **RUN)
    model = on_base(stacked(2), tuning_of(result, LoRA(2), loading, base, schema), base)
    assert_same(outputs_of(model, make_rows(30)), result.predict(make_rows(30)))


def test_rows_that_the_base_never_saw_are_part_of_it(make_model, make_data, schema, assert_same):
    """Its vocabulary lacks two ids of the target and has them in another order; a table stays, but for its new rows."""
    (vocabulary,) = schema.vocabularies
    source = dataclasses.replace(
        schema, vocabularies=(dataclasses.replace(vocabulary, values=vocabulary.values[:1:-1]),)
    )
    base = Artefact.of(make_model(of=source), source)
    loading = load(make_model(1), schema, base)
    result = fit(loading.model, make_data(), adaptation=LoRA(2), origin=loading.origin, **RUN)
    artefact = tuning_of(result, LoRA(2), loading, base, schema)
    np.testing.assert_array_equal(artefact.arrays["tables/user/rows"], state_of(make_model(1))["tables/user/rows"][2:4])
    assert_same(state_of(on_base(make_model(2), artefact, base)), state_of(result.model))


def test_what_was_not_loaded_is_part_of_it(make_model, make_data, schema, base, assert_same):
    """A kernel that began anew, which factors then change; and towers of other names."""
    loading = load(
        make_model(1),
        schema,
        base,
        map=[("task/click/(.*)", r"task/click/\1"), ("(tables|sharing)/(.*)", r"\1/\2")],
        drop=["task/spend/.*", f"{BOTTOM[0]}/kernel"],
        reinit=["task/spend/.*", f"{BOTTOM[0]}/kernel"],
    )
    result = fit(loading.model, make_data(), adaptation=LoRA(2), origin=loading.origin, **RUN)
    artefact = tuning_of(result, LoRA(2), loading, base, schema)
    np.testing.assert_array_equal(
        artefact.arrays[f"{BOTTOM[0]}/kernel"], state_of(make_model(1))[f"{BOTTOM[0]}/kernel"]
    )
    assert_same(state_of(on_base(make_model(2), artefact, base)), state_of(result.model))


def test_states_go_along(make_model, make_data, schema, assert_same):
    """Running moments, which training moves without a gradient."""

    def flow(seed):
        return make_model(seed, sharing=ResFlow, units=(4,), logits=False, dropout=0.0)

    base = Artefact.of(flow(0), schema)
    loading = load(flow(1), schema, base)
    result = fit(loading.model, make_data(), adaptation=LinearProbe(), origin=loading.origin, **RUN)
    artefact = tuning_of(result, LinearProbe(), loading, base, schema)
    states = Functional.of(flow(0))[0].state_paths
    assert states and set(states) <= artefact.arrays.keys()
    assert_same(state_of(on_base(flow(2), artefact, base)), state_of(result.model))


def test_an_average_of_factors_is_what_is_deployed(make_model, make_data, schema, base, assert_same, tmp_path):
    """And a run with checkpoints takes the factors of its best step from there."""
    loading = load(make_model(1), schema, base)
    for options in ({"average": 0.9}, {"checkpoints": tmp_path / "checkpoints"}):
        result = fit(loading.model, make_data(), adaptation=LoRA(2), origin=loading.origin, **RUN | options)
        artefact = tuning_of(result, LoRA(2), loading, base, schema)
        assert_same(state_of(on_base(make_model(2), artefact, base)), state_of(result.model))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_another_base_is_refused_with_both_hashes(trained, base, make_model, schema):
    _, artefact = trained("lora")
    other = Artefact.of(make_model(9), schema)
    with pytest.raises(
        ConfigError, match=f"{other.hash} and this was tuned on {base.hash}; .* Read the artefact with that"
    ):
        on_base(make_model(), artefact, other)


def test_the_two_kinds_of_artefacts_are_told_apart(trained, base, make_model, schema):
    _, artefact = trained("bitfit")
    with pytest.raises(ConfigError, match=f"only what was tuned on the base {base.hash}.*on_base"):
        load(make_model(), schema, artefact)
    with pytest.raises(ConfigError, match="has all arrays of a model; expected what was tuned"):
        on_base(make_model(), base, base)


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_arrays_that_are_missing_left_over_or_of_another_shape_are_listed(name, trained, base, make_model):
    _, artefact = trained(name)
    arrays = dict(artefact.arrays)
    first = arrays.pop("task/click/tower/head/bias")
    arrays["task/click/tower/head/scale"] = first
    of_strategy = next(path for path in arrays if "aux/" in path and arrays[path].ndim == 2)
    *_, n = arrays[of_strategy].shape
    arrays[of_strategy] = arrays[of_strategy][:-1]
    arrays["task/spend/tower/head/bias"] = arrays["task/spend/tower/head/bias"].astype(np.float64)
    with pytest.raises(ConfigError) as found:
        on_base(make_model(), dataclasses.replace(artefact, arrays=arrays), base)
    for line in (
        "1 arrays of the artefact have no place: task/click/tower/head/scale [1]",
        "1 arrays of the model are not in the artefact: task/click/tower/head/bias [1]",
        f"{of_strategy}: the artefact has float32[{len(arrays[of_strategy])}, {n}], the model float32[",
        "task/spend/tower/head/bias: the artefact has float64[1], the model float32[1]",
    ):
        assert line in str(found.value)


def test_a_model_of_other_layers_is_refused_with_paths_and_shapes(trained, base, make_model):
    _, artefact = trained("bitfit")
    with pytest.raises(ConfigError, match=r"the source has float32\[5, 5\], the target float32\[5, 7\]"):
        on_base(make_model(units=(7, 4)), artefact, base)
    with pytest.raises(
        ConfigError, match=r"not in the artefact: sharing/bottom/layers/2/bias \[4\], .*/kernel \[4, 4\]"
    ):
        on_base(make_model(units=(5, 4, 4)), artefact, base)


def test_nothing_is_saved_without_a_tower(trained, tmp_path):
    _, artefact = trained("lora")
    arrays = {path: array for path, array in artefact.arrays.items() if not path.startswith("task/spend/")}
    with pytest.raises(ConfigError, match=r"no tower of the tasks \['spend'\]; expected those of all tasks"):
        dataclasses.replace(artefact, arrays=arrays).save(tmp_path / "tuning")
    assert not (tmp_path / "tuning").exists()


def test_a_strategy_that_trains_some_towers_only_has_none(make_model, schema, base):
    with pytest.raises(ConfigError, match=r"no tower of the tasks \['spend'\]"):
        check_tuning(SomeTowers(), load(make_model(1), schema, base), schema)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FineTune(), "'FineTune' leaves nothing of its source as it was"),
        (LwF(), "'LwF' leaves nothing of its source as it was"),
        (ZeroShot(), "'ZeroShot' trains nothing that came from a source"),
        (LinearProbe(then_all=True), "'LinearProbe' trains in 2 stages"),
        (GradientTransfer(), "'GradientTransfer' deploys what follows from rows, too"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Adaptation) else None,
)
def test_strategies_that_change_everything_have_no_such_artefact(strategy, message, make_model, schema, base):
    with pytest.raises(ConfigError, match=f"{message}.* expected one like lora, adapter, bitfit"):
        check_tuning(strategy, load(make_model(1), schema, base), schema)


def test_the_result_of_another_run_is_noticed(trained, base, make_model, make_data, schema):
    loading = load(make_model(1), schema, base)
    with pytest.raises(ConfigError, match="the result has no aux/lora/.*, which mtl_jax.transfer.lora.LoRA trains"):
        tuning_of(trained("bitfit")[0], LoRA(2), loading, base, schema)
    with pytest.raises(ConfigError, match=r"do not make the arrays \['sharing/bottom/layers/0/bias'"):
        tuning_of(trained("bitfit")[0], LinearProbe(), loading, base, schema)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "mypaper.Mine"}, "tuned by 'mypaper.Mine', which no imported module has; .* Import its module"),
        ({"options": {"ranks": 2}}, r"LoRA' with the options \['ranks'\]"),
        ({"options": {"rank": 0}}, "transfer.rank is 0"),
    ],
    ids=["strategy", "name of an option", "value of an option"],
)
def test_a_strategy_that_cannot_be_made_is_named(changes, message, trained, base, make_model):
    _, artefact = trained("lora")
    other = dataclasses.replace(artefact, tuning=dataclasses.replace(artefact.tuning, **changes))
    with pytest.raises(ConfigError, match=message):
        on_base(make_model(), other, base)


def test_damage_is_found(trained, tmp_path):
    """Of the arrays and of what they mean: another alpha would be another model."""
    _, artefact = trained("lora")
    artefact.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for change in ({"options": manifest["tuning"]["options"] | {"alpha": 9.0}}, {"base": "0" * 64}):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"tuning": manifest["tuning"] | change}))
        with pytest.raises(RunFolderError, match="has changed: what its arrays mean is not that of its manifest"):
            Artefact.read(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"tuning": {"base": 3}}))
    with pytest.raises(RunFolderError, match="cannot be read"):
        Artefact.read(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    whole = (tmp_path / "arrays.npz").read_bytes()
    (tmp_path / "arrays.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match="cannot be read"):
        Artefact.read(tmp_path)
    np.savez(tmp_path / "arrays.npz", **{path: array + 1 for path, array in artefact.arrays.items()})
    with pytest.raises(RunFolderError, match="the arrays are not those of its manifest"):
        Artefact.read(tmp_path)
