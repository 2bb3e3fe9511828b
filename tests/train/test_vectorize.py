"""Tests of the run axis: each member equals the same run alone."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_jax
from mtl_jax.balancing import fixed, pcgrad, uncertainty
from mtl_jax.data.dataset import TrainingData
from mtl_jax.errors import ConfigError, Interrupted, TrainingError
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import MMoE
from mtl_jax.train import Member, Optimizer, fit, fit_many
from mtl_jax.train.setup import Setup
from mtl_jax.train.state import Functional
from mtl_jax.train.vectorize import Plan, plan_axis, train_members

pytestmark = pytest.mark.usefixtures("quick_compilation_of_module")

ADAM = optax.scale_by_adam()  # one object: what a program is compiled for
OPTIONS = {"epochs": 4, "batch_size": 8, "patience": 1, "steps_per_call": 2, "table_updates": {"user": "sparse"}}


@pytest.fixture(scope="module")
def data(small_schema, make_rows):
    return TrainingData(
        "world", small_schema, make_rows(small_schema, 30), make_rows(small_schema, 20, seed=1), "0" * 64
    )


@pytest.fixture(scope="module")
def member(small_schema):
    def make(seed=0, *, rate=0.02, dropout=0.2, decay=0.1, weights=(1.0, 0.5), **options):
        def model():
            return mtl_jax.MultiTaskModel(
                small_schema,
                encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5, dropout=dropout),
                sharing=functools.partial(MMoE, num_experts=2, expert_units=(5,), dropout=dropout),
                towers=functools.partial(Tower, units=(4,), dropout=dropout),
                rngs=nnx.Rngs(seed),
            )

        decays = {"shared": decay} if decay else 0.0
        optimizer = Optimizer(ADAM, learning_rate=rate, weight_decay=decays, clip_norm=5.0)
        options = {"balancer": fixed(weights=weights), "optimizer": optimizer} | options
        return Member(model, seed=seed, name=f"{seed} {rate} {dropout}", **options)

    return make


def arrays(result):
    _, params, rest = Functional.of(result.model)
    return {path: np.asarray(array) for path, array in (params | rest).items()}


def alone(member, data, **options):
    parts = {"balancer": member.balancer, "optimizer": member.optimizer, "order_seed": member.order_seed}
    return fit(member.model(), data, seed=member.seed, **parts, **OPTIONS | options)


def assert_equal_runs(one, other, tolerance=0.0):
    for path, array in arrays(other).items():
        np.testing.assert_allclose(arrays(one)[path], array, rtol=tolerance, atol=tolerance, err_msg=path)
    assert one.monitor["step"] == other.monitor["step"]
    assert one.timing["steps"] == other.timing["steps"]
    for row, expected in zip(one.history, other.history, strict=True):
        value, known = row.pop("value"), expected.pop("value")
        assert row == expected
        assert value == known or value == pytest.approx(known, rel=max(10 * tolerance, 1e-12), abs=10 * tolerance)


def grid(member, **options):
    """Seeds, learning rates, decays, dropout and loss weights that all differ; some stop early."""
    return [
        member(0, **options),
        member(1, rate=0.3, **options),
        member(2, dropout=0.4, **options),
        member(3, rate=0.05, decay=0.01, weights=(0.1, 2.0), **options),
        member(4, rate=1.0, **options),
    ]


@pytest.mark.parametrize(("axis", "chunk", "tolerance"), [("map", None, 0.0), ("vmap", None, 2e-5), ("vmap", 3, 2e-5)])
def test_each_member_equals_the_same_run_alone(data, member, axis, chunk, tolerance):
    """One after the other to the last digit; together up to the order of sums in matrix products. Chunks are filled up."""
    members = grid(member)
    results = dict(fit_many(members, data, axis=axis, chunk=chunk, **OPTIONS))
    assert sorted(results) == [0, 1, 2, 3, 4]
    for number, one in enumerate(members):
        assert_equal_runs(results[number], alone(one, data), tolerance)
    stops = {result.timing["steps"] for result in results.values()}
    assert len(stops) > 1, "no member stopped before another: the test does not reach frozen members"


@pytest.mark.parametrize("options", [{"average": 0.6, "training": "staged"}, {"micro_batches": 2}], ids=str)
def test_every_way_of_training_has_a_run_axis(data, member, options):
    members = [member(0, balancer=pcgrad()), member(1, balancer=pcgrad(), rate=0.3)]
    results = dict(fit_many(members, data, axis="vmap", **OPTIONS | options))
    for number, one in enumerate(members):
        assert_equal_runs(results[number], alone(one, data, **options), 2e-5)


def test_constants_of_a_balancer_ride_along(data, member):
    members = [member(0, balancer=uncertainty(weight_lr=rate)) for rate in (0.001, 0.3)]
    weights = [result.diagnostics["task_weights"] for _, result in fit_many(members, data, axis="vmap", **OPTIONS)]
    assert weights == [pytest.approx(alone(one, data).diagnostics["task_weights"], rel=1e-4) for one in members]
    assert weights[0] != pytest.approx(weights[1], rel=0.01)


def test_members_with_one_order_see_the_same_batches(data, member):
    members = [member(seed, order_seed=7) for seed in (0, 1)]
    for number, result in fit_many(members, data, axis="vmap", **OPTIONS):
        assert_equal_runs(result, alone(members[number], data), 2e-5)


def test_a_member_that_is_not_finite_ends_alone(data, member):
    members = [member(0), member(1, rate=1e30), member(2)]
    results = dict(fit_many(members, data, axis="vmap", **OPTIONS))
    assert isinstance(results[1], TrainingError)
    with pytest.raises(TrainingError) as expected:
        alone(members[1], data)
    assert str(results[1]).split("; expected")[0] == str(expected.value).split("; expected")[0]
    for number in (0, 2):
        assert_equal_runs(results[number], alone(members[number], data), 2e-5)
    results = dict(fit_many(members, data, axis="map", **OPTIONS))
    assert [type(results[number]).__name__ for number in range(3)] == ["Result", "TrainingError", "Result"]


@pytest.mark.parametrize("training", ["joint", "staged"])
def test_a_stack_goes_on_where_it_was_stopped(data, member, tmp_path, training):
    options = {**OPTIONS, "axis": "vmap", "checkpoint_seconds": 0, "training": training}
    undisturbed = dict(fit_many(grid(member), data, **options))
    for calls in (2, 3):
        asked = iter(range(1, 1000))
        with pytest.raises(Interrupted):
            list(
                fit_many(
                    grid(member),
                    data,
                    checkpoints=tmp_path,
                    should_stop=lambda c=calls, a=asked: next(a) == c,
                    **options,
                )
            )
    resumed = dict(fit_many(grid(member), data, checkpoints=tmp_path, **options))
    for number, result in resumed.items():
        assert_equal_runs(result, undisturbed[number])


def test_one_program_serves_all_numbers(data, member):
    setup = Setup.of(data, **OPTIONS)
    members = grid(member)
    list(train_members(setup, members, Plan("map", 1)))
    assert len(setup.programs) == 1
    list(train_members(setup, [member(9, dropout=0.0)], Plan("map", 1)))
    assert len(setup.programs) == 2  # no dropout is another program


def test_the_plan_fits_memory_and_follows_the_measurement(data, member, monkeypatch):
    setup, members = Setup.of(data, **OPTIONS), grid(member)
    plan = plan_axis(setup, members)
    assert plan.seconds.keys() == {"map", "vmap"}
    assert plan.axis == min(plan.seconds, key=plan.seconds.get)
    assert plan.member_bytes > 2 * sum(array.nbytes for array in arrays(alone(members[0], data)).values())
    monkeypatch.setattr("mtl_jax.train.vectorize._free_bytes", lambda: 3 * plan.member_bytes)
    assert plan_axis(setup, members, axis="vmap").chunk == 2  # 80 % of three members
    monkeypatch.setattr("mtl_jax.train.vectorize._free_bytes", lambda: plan.member_bytes)
    assert plan_axis(setup, members, axis="vmap") == Plan("map", 1, plan.member_bytes, plan.member_bytes)


def test_members_that_differ_in_more_than_numbers_are_refused(data, member):
    for other in (member(1, dropout=0.0), member(1, balancer=pcgrad()), member(1, decay=0.0)):
        with pytest.raises(ConfigError, match="run 1 differs from run 0 in more than numbers"):
            list(fit_many([member(0), other], data, axis="vmap", **OPTIONS))
    with pytest.raises(ConfigError, match=r"vectorize.axis is 'pmap'; expected one of \['auto', 'vmap', 'map'\]"):
        list(fit_many([member(0)], data, axis="pmap", **OPTIONS))
    with pytest.raises(ConfigError, match="vectorize.chunk is 0; expected a whole number >= 1"):
        list(fit_many([member(0)], data, chunk=0, **OPTIONS))
    with pytest.raises(ConfigError, match="'vmap' with parallel=pmap"):
        list(fit_many([member(0), member(1)], data, axis="vmap", parallel="pmap", **OPTIONS))


def test_functional_views_of_models_that_differ_in_numbers_are_equal(member):
    views = [Functional.of(member(seed, dropout=0.1 + seed / 10).model())[0] for seed in range(2)]
    assert views[0] == views[1]
    assert hash(views[0]) == hash(views[1])
    assert views[0] != Functional.of(member(0, dropout=0.0).model())[0]
    assert jax.tree.structure(member().balancer) == jax.tree.structure(member(weights=(3.0, 4.0)).balancer)
