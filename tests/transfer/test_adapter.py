"""Adapters: the identity at first, their formula by hand, what is trained with them, and where they cannot go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import pcgrad
from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.nn import Context
from mtl_jax.sharing import MMoE, SingleTask
from mtl_jax.train import Member, Optimizer, fit, fit_many
from mtl_jax.train.state import Functional
from mtl_jax.transfer import Adapter, Artefact, ZeroShot, load

RUN = {"epochs": 2, "batch_size": 8, "patience": 0}
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def stacked(make_model):
    """A model whose shared layers are those of three experts."""
    return lambda seed=0: make_model(seed, sharing=MMoE, num_experts=3, expert_units=(6, 5), dropout=0.0)


def added(arrays):
    return {path: array for path, array in arrays.items() if "/aux/" in path}


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def residual(h, arrays, path, index=()):
    """h + gelu(h W_d + b_d) W_u + b_u, of one expert where there are several."""
    down, up = ([arrays[f"{path}/{part}/{name}"][index] for name in ("kernel", "bias")] for part in ("down", "up"))
    return h + gelu(h @ down[0] + down[1]) @ up[0] + up[1]


def in_double(state):
    return {path: np.asarray(array, np.float64) for path, array in (state.params | state.rest).items()}


@pytest.mark.parametrize("train", [False, True])
def test_a_model_with_new_adapters_is_the_model_without(make_model, make_batch, train):
    """To the last bit, dropout included; and the one that was given has none."""
    model, batch, context = make_model(dropout=0.5), make_batch(12), Context(train=train, rngs=jax.random.key(1))
    before, prepared = model(batch, context), Adapter(4).prepared(model, KEY)
    assert added(Functional.of(prepared)[1]) and not added(Functional.of(model)[1])
    for task, outputs in prepared(batch, context).items():
        np.testing.assert_array_equal(outputs, before[task])


def test_new_adapters_end_in_zeros_and_begin_with_the_fans_of_one_layer(stacked):
    prepared = Adapter(4).prepared(stacked(), KEY)
    arrays = added(Functional.of(prepared)[1])
    for number, width in enumerate((6, 5)):
        path = f"sharing/experts/aux/adapter/{number}"
        kernel = np.asarray(arrays[f"{path}/down/kernel"])
        assert kernel.shape == (3, width, 4) and arrays[f"{path}/up/kernel"].shape == (3, 4, width)
        assert np.abs(kernel).max() <= np.sqrt(6 / (width + 4)) and np.unique(kernel).size == kernel.size
        assert not any(np.any(arrays[f"{path}/{name}"]) for name in ("down/bias", "up/kernel", "up/bias"))
    assert {label(path) for path in arrays} == {"aux/adapter"}


def test_draws_follow_from_the_key_and_the_layer(make_model, assert_same):
    every, again, other = (
        added(Functional.of(Adapter(4).prepared(make_model(), key))[1]) for key in (KEY, KEY, jax.random.key(4))
    )
    one = added(Functional.of(Adapter(4, targets="sharing/bottom/layers/1").prepared(make_model(), KEY))[1])
    assert_same(every, again)
    assert_same(one, {path: array for path, array in every.items() if "/adapter/1/" in path})
    assert np.any(
        every["sharing/bottom/aux/adapter/0/down/kernel"] != other["sharing/bottom/aux/adapter/0/down/kernel"]
    )


def test_a_bottom_with_adapters_by_hand(make_model, make_step, perturbed, make_batch):
    batch = make_batch(12)
    step, state = make_step(make_model(), Adapter(3))
    arrays = in_double(perturbed(state, 0.3))
    h = np.concatenate([arrays["tables/user/rows"][batch["ids"][:, 0]], np.asarray(batch["dense"])], axis=1)
    for number in (0, 1):
        layer = f"sharing/bottom/layers/{number}"
        h = np.maximum(h @ arrays[f"{layer}/kernel"] + arrays[f"{layer}/bias"], 0)
        h = residual(h, arrays, f"sharing/bottom/aux/adapter/{number}")
    model = step.functional.merge({path: jnp.float32(array) for path, array in arrays.items()})
    np.testing.assert_allclose(model.common(model.inputs(batch)), h, rtol=1e-5, atol=1e-5)


def test_experts_have_adapters_of_their_own(stacked, make_step, perturbed):
    step, state = make_step(stacked(), Adapter(3))
    state = perturbed(state, 0.3)
    x, arrays = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32), in_double(state)
    outputs = step.functional.merge(state.params, state.rest).sharing.experts(jnp.asarray(x))
    for expert, found in enumerate(outputs):
        h = x
        for number in (0, 1):
            kernel, bias = (arrays[f"sharing/experts/layers/{number}/{name}"][expert] for name in ("kernel", "bias"))
            h = residual(np.maximum(h @ kernel + bias, 0), arrays, f"sharing/experts/aux/adapter/{number}", expert)
        np.testing.assert_allclose(found, h, rtol=1e-5, atol=1e-5)


def test_scales_and_shifts_of_normalisations_are_trained_too():
    (trained,) = Adapter().phases()
    kept = ["sharing/psi/layers/0/kernel", "sharing/psi/layers/0/bias", "encoder/kernel", "tables/norm/rows"]
    moved = ["sharing/psi/norms/0/scale", "sharing/norm/domain_bias", "encoder/batch_norm/bias", "task/a/tower/head/bias",
             "sharing/psi/aux/adapter/0/up/bias", "linked/a/tower/hidden/aux/adapter/1/down/kernel"]  # fmt: skip
    assert [path for path in kept + moved if trained(path)] == moved


def test_tasks_are_compared_in_the_adapters(make_model, make_step, perturbed, make_batch):
    """Cosines of PCGrad in the scope of the encoder are those of the gradients of the adapters, which alone are shared."""
    batch = make_batch(30)
    step, state = make_step(make_model(), Adapter(3), balancer=pcgrad())
    state = perturbed(state, 0.3)
    _, sums = jax.jit(step)(state, batch)

    def loss(adapters, task):
        outputs = step.functional.merge(state.params | adapters, state.rest)(batch)[task]
        weight, label = (
            batch["weight"] * batch["mask"][task],
            jnp.where(batch["mask"][task] > 0, batch["labels"][task], 0),
        )
        each = jnp.square(outputs - label) if task == "spend" else jnp.logaddexp(0, outputs) - label * outputs
        return jnp.sum(weight * each) / jnp.sum(weight)

    one, other = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.grad(loss)(added(state.params), task))])
        for task in ("click", "spend")
    )
    expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    assert 0.01 < abs(expected) < 0.99
    np.testing.assert_allclose(sums.cosines[0, 1], expected, rtol=1e-4)


def test_a_run_deploys_its_adapters(make_model, make_data, arrays_of):
    """It begins at the source's model, trains what it says, and the model that was given stays as it is."""
    model, data = make_model(), make_data()
    before = arrays_of(model)
    result = fit(model, data, adaptation=Adapter(3), optimizer=Optimizer(learning_rate=0.01), **RUN)
    first = {(row["task"], row["name"]): row["value"] for row in result.history if row["step"] == 0}
    zero = fit(model, data, adaptation=ZeroShot(), **RUN)
    assert first["spend", "rmse"] == zero.metrics["valid"]["spend"]["rmse"]
    found = arrays_of(result.model)
    assert found.keys() - before.keys() == added(found).keys() and any(map(np.any, added(found).values()))
    sizes = [array.size for path, array in found.items() if path in added(found) or path.startswith("task/")]
    assert result.params["trainable"] == sum(sizes)
    assert result.params["aux"] == sum(array.size for array in added(found).values())
    assert arrays_of(model).keys() == before.keys()
    outputs, rows = result.predict(data.valid), zero.predict(data.valid)
    assert np.any(outputs["spend"] != rows["spend"])


def test_runs_side_by_side_are_those_runs_alone(make_model, make_data, arrays_of):
    """Seeds differ, and with them what adapters begin with."""
    adaptation = Adapter(3)
    members = [
        Member(make_model, seed=seed, adaptation=adaptation, optimizer=Optimizer(learning_rate=0.01)) for seed in (0, 1)
    ]
    together, alone = (
        dict(fit_many(members, make_data(), axis=axis, adaptation=adaptation, **RUN | {"epochs": 1}))
        for axis in ("vmap", "map")
    )
    kernel = "sharing/bottom/aux/adapter/0/down/kernel"
    for number in (0, 1):
        found, expected = arrays_of(together[number].model), arrays_of(alone[number].model)
        assert found.keys() == expected.keys()
        for path in expected:
            np.testing.assert_allclose(found[path], expected[path], rtol=2e-5, atol=2e-5, err_msg=path)
    assert np.abs(arrays_of(alone[0].model)[kernel] - arrays_of(alone[1].model)[kernel]).max() > 0.1


def test_what_was_saved_with_adapters_fits_a_model_with_adapters_only(make_model, schema, tmp_path, assert_same):
    prepared = Adapter(3).prepared(make_model(), KEY)
    Artefact.of(prepared, schema).save(tmp_path / "artefact")
    artefact = Artefact.read(tmp_path / "artefact")
    with pytest.raises(
        ConfigError, match=r"8 arrays of the source have no place: .*bottom/aux/adapter/0/down/kernel \[5, 3\]"
    ):
        load(make_model(), schema, artefact)
    loaded = load(Adapter(3).prepared(make_model(5), jax.random.key(5)), schema, artefact).model
    assert_same(Functional.of(loaded)[1], Functional.of(prepared)[1])


@pytest.mark.parametrize(
    "targets", ["sharing/bottom/layers", "sharing/bottom/layers/2", "task/.*", "sharing/.*/kernel"]
)
def test_a_pattern_has_to_fit_a_shared_layer(make_model, targets):
    with pytest.raises(ConfigError, match=f"transfer.targets is '{targets}', which no shared layer of 'SharedBottom'"):
        Adapter(targets=targets).prepared(make_model(towers=(4,)), KEY)


def test_tasks_that_share_no_layer_have_no_place_for_adapters(make_model, make_data):
    with pytest.raises(ConfigError, match=r"transfer.targets is '\.\*', which no shared layer of 'SingleTask'"):
        fit(make_model(sharing=SingleTask, units=(4,), dropout=0.0), make_data(), adaptation=Adapter(), **RUN)
