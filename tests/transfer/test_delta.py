"""DELTA: which units a probe needs, how they are held, and what its two stages begin with."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.data.batching import epoch_order
from mtl_jax.errors import Interrupted
from mtl_jax.model import label
from mtl_jax.sharing import CrossStitch, MMoE
from mtl_jax.train import Member, Optimizer, fit
from mtl_jax.train.session import Session
from mtl_jax.train.setup import STUDIED, Setup
from mtl_jax.transfer import Delta, LinearProbe

RUN = {"epochs": 2, "batch_size": 8, "patience": 0, "steps_per_call": 1, "checkpoint_seconds": 0}
HIGH = Optimizer(learning_rate=0.03)


def loss_of(task, arrays, features, batch, rows=slice(None)):
    """The mean loss of a task with a linear tower on features [row, unit], in float64."""
    kernel, bias = (np.asarray(arrays[f"task/{task}/tower/head/{name}"], np.float64) for name in ("kernel", "bias"))
    z = (features @ kernel + bias)[rows, 0]
    weight = np.asarray(batch["weight"] * batch["mask"][task], np.float64)[rows]
    y = np.where(weight > 0, np.asarray(batch["labels"][task], np.float64)[rows], 0)
    losses = np.logaddexp(0, z) - y * z if task == "click" else (z - y) ** 2
    return weight @ losses / weight.sum()


def rises(tasks, arrays, features, *batch):
    """By how much the sum of some tasks' losses rises without each unit."""
    features = np.asarray(features, np.float64)

    def loss(kept):
        return sum(loss_of(task, arrays, features * kept, *batch) for task in tasks)

    return np.array([loss(kept) - loss(1) for kept in 1 - np.eye(features.shape[1])])


def rises_of_all(model, arrays, *batch):
    """The same, where all tasks read what a model has in common."""
    return rises(("click", "spend"), arrays, model.common(model.inputs(batch[0])), *batch)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


@pytest.mark.parametrize("strategy", [Delta(), Delta(tau=0.2), Delta(tau=5.0, standardise=True)], ids=str)
def test_attention_is_the_softmax_of_what_the_losses_rise_by_without_a_unit(
    strategy, make_model, make_step, make_batch, studied, arrays_of
):
    """Over all rows that are studied, whatever the batches; the last unit is always 0 and nothing rises without it."""
    model, batch = make_model(3, dropout=0.5), make_batch(20)
    model.sharing.bottom.layers[1].bias[...] = model.sharing.bottom.layers[1].bias[...].at[-1].set(-100.0)
    expected = rises_of_all(model, arrays_of(model), batch)
    assert expected[-1] == 0 and np.ptp(expected) > 0.05
    if strategy.standardise:
        expected = (expected - expected.mean()) / expected.std()
    expected = softmax(expected / strategy.tau)
    for size in (20, 8):
        step, state = make_step(model, strategy, phase=1)
        found = studied(step, state, batch, size).kept.arrays["attention"]["units"]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        np.testing.assert_allclose(np.sum(found), 1, rtol=1e-6)


def test_at_most_ten_batches_are_studied(make_data, make_model, arrays_of):
    data, model = make_data(23), make_model(3)
    setup = Setup.of(data, adaptation=Delta(tau=0.2), **RUN | {"batch_size": 2})
    member = Member(lambda: model, adaptation=Delta(tau=0.2), order_seed=5)
    _, state = setup.build(member, setup.stages[1], model, study=True)
    rows = epoch_order(23, 2, seed=5, epoch=STUDIED)[:10].ravel()
    assert len(set(rows)) == 20
    expected = softmax(rises_of_all(model, arrays_of(model), setup.train, rows) / 0.2)
    np.testing.assert_allclose(state.kept.arrays["attention"]["units"], expected, rtol=1e-4)


def penalty(strategy, features, before, attention, weight, **towers):
    """Value and gradient, of a model whose features are a parameter."""
    view = types.SimpleNamespace(axis=None, weight=jnp.asarray(weight), features=lambda params, train: params["h"])
    kept = {"teacher": {"h": jnp.asarray(before)}, "attention": {"units": jnp.asarray(attention)}}
    params = {"h": jnp.asarray(features)} | {path.replace("__", "/"): jnp.asarray(a) for path, a in towers.items()}
    return jax.value_and_grad(lambda params: strategy.penalty(params, kept, view))(params)


def test_units_are_held_by_their_attention_and_towers_pulled_to_zero():
    rng = np.random.default_rng(0)
    features, before = rng.normal(size=(2, 4, 3))
    attention, weight = np.array([0.5, 0.2, 0.3]), np.array([1, 0, 0.5, 2])
    tower, gate = rng.normal(size=(3, 1)), rng.normal(size=(3, 2))
    per_unit = np.mean((features - before)[[0, 2, 3]] ** 2, axis=0)
    expected = 0.8 / 2 * 3 * attention @ per_unit + 0.3 / 2 * np.sum(tower**2)
    with jax.enable_x64(True):
        own = {"task__click__tower__head__kernel": tower, "sharing__task__click__kernel": gate}
        value, gradient = penalty(Delta(0.8, beta=0.3), features, before, attention, weight, **own)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(gradient["task/click/tower/head/kernel"], 0.3 * tower, rtol=1e-9)
    assert not np.any(gradient["sharing/task/click/kernel"])
    by_hand = 0.8 * 3 * attention * (features - before) / 3 * (weight > 0)[:, None]
    np.testing.assert_allclose(gradient["h"], by_hand, rtol=1e-9)


def test_at_the_source_only_the_towers_are_pulled(make_model, make_step, make_batch, studied):
    """And elsewhere shared layers and tables are held, too."""
    model, batch, moved = make_model(), make_batch(20), {}
    for strategy in (Delta(1e-30, beta=0.0), Delta(5.0, beta=0.0), Delta(5.0, beta=0.3)):
        step, state = make_step(model, strategy, phase=1, optimizer=Optimizer(optax.identity(), 0.1))
        run, first = jax.jit(step), studied(step, state, batch)
        once = run(first, batch)[0]
        moved[strategy] = once.params, run(once, batch)[0].params
    plain, held, pulled = moved.values()
    for path, start in state.params.items():
        np.testing.assert_allclose(held[0][path], plain[0][path], rtol=1e-6, atol=1e-7)
        tower = label(path).startswith("task/")
        expected = plain[0][path] - (0.1 * 0.3 * start if tower else 0)
        np.testing.assert_allclose(pulled[0][path], expected, rtol=1e-5, atol=1e-6)
        assert np.allclose(held[1][path], plain[1][path], rtol=1e-6, atol=1e-7) == tower, path


def test_the_second_stage_begins_with_the_probe_and_keeps_it_as_what_units_are_held_to(
    make_model, make_data, arrays_of, assert_same
):
    """The first stage is the probe to the last bit: it knows of no term."""
    model, data = make_model(3), make_data()
    member = {"seed": 1, "optimizer": HIGH}
    probe = fit(model, data, adaptation=LinearProbe(), **RUN, **member)
    assert probe.monitor["step"] > 0
    setup = Setup.of(data, adaptation=Delta(), **RUN)
    session = Session(setup, Member(lambda: model, adaptation=Delta(), **member))
    state, position = session.resume()
    assert state.kept.arrays == {}
    state = session.begin_next(session.run_stage(state, position), position)
    assert_same(state.params, arrays_of(probe.model))
    assert_same(state.kept.arrays["teacher"], arrays_of(probe.model))
    rows = epoch_order(22, 8, seed=1, epoch=STUDIED).ravel()
    expected = softmax(rises_of_all(probe.model, arrays_of(probe.model), setup.train, rows[rows >= 0]))
    np.testing.assert_allclose(state.kept.arrays["attention"]["units"], expected, rtol=1e-4)


def test_a_run_that_goes_on_in_its_second_stage_weighs_no_unit_again(make_model, make_data, arrays_of, tmp_path):
    model = make_model(3)
    options = {"adaptation": Delta(), "seed": 1, "optimizer": HIGH, **RUN}
    asked = iter(range(1, 100))
    with pytest.raises(Interrupted):
        fit(model, make_data(), checkpoints=tmp_path, should_stop=lambda: next(asked) == 8, **options)
    setup = Setup.of(make_data(), adaptation=Delta(), **RUN)
    member = Member(lambda: model, seed=1, optimizer=HIGH, adaptation=Delta(), checkpoints=tmp_path)
    session = Session(setup, member)
    state, position = session.resume()
    assert position.stage == 1 and not setup.programs
    np.testing.assert_allclose(np.sum(state.kept.arrays["attention"]["units"]), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("sharing", "options"),
    [(MMoE, {"num_experts": 2, "expert_units": (4,)}), (CrossStitch, {"units": (4,)})],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_where_tasks_read_features_of_their_own_each_has_its_units(
    way, sharing, options, make_model, make_step, make_batch, studied, arrays_of
):
    """Four for each of two tasks; without a unit of one task only its own loss rises."""
    model, batch = make_model(sharing=sharing, **options), make_batch(20)
    step, state = make_step(model, Delta(5.0), phase=1, table_updates={"user": way})
    state = studied(step, state, batch)
    attention = state.kept.arrays["attention"]["units"]
    assert attention.shape == (8,)
    cut, arrays = model.common(model.inputs(batch)), arrays_of(model)
    expected = [rises([task], arrays, model.sharing.head(task, cut), batch) for task in ("click", "spend")]
    np.testing.assert_allclose(attention, softmax(np.concatenate(expected)), rtol=1e-4)
    after, sums = jax.jit(step)(state, batch)
    assert int(sums.steps) == 1 and all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after.params))
