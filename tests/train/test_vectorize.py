"""Tests of the run axis: each member equals the same run alone."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_jax
from mtl_jax.balancing import fixed, pcgrad, uncertainty
from mtl_jax.data.dataset import TrainingData
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.nn import Encoder, Tower
from mtl_jax.sharing import MMoE
from mtl_jax.train import Member, Optimizer, fit, fit_many
from mtl_jax.train.setup import Setup
from mtl_jax.train.state import Functional
from mtl_jax.train.vectorize import Plan, plan_axis, train_members

ADAM = optax.scale_by_adam()  # one object: what a program is compiled for
OPTIONS = {"epochs": 4, "batch_size": 8, "patience": 1, "steps_per_call": 2, "table_updates": {"user": "sparse"}}
EVERYTHING = {"training": "staged", "average": 0.6, "micro_batches": 2}
ONE_BY_ONE, TOGETHER = Plan("map", 1), Plan("vmap", 3)
DEVICES_PROGRAM = pathlib.Path(__file__).with_name("run_axis_program.py")


@pytest.fixture(scope="module")
def data(small_schema, make_rows):
    return TrainingData(
        "world", small_schema, make_rows(small_schema, 30), make_rows(small_schema, 20, seed=1), "0" * 64
    )


@pytest.fixture(scope="module")
def setup(data):
    """What compiles, once for all tests."""
    return Setup.of(data, **OPTIONS)


@pytest.fixture(scope="module")
def staged(data):
    """Stages, an average and micro-batches."""
    return Setup.of(data, **OPTIONS | EVERYTHING)


@pytest.fixture(scope="module")
def member(small_schema):
    def make(seed=0, *, rate=0.02, dropout=0.2, decay=0.1, weights=(1.0, 0.5), **options):
        def model():
            return mtl_jax.MultiTaskModel(
                small_schema,
                encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5, dropout=dropout),
                sharing=functools.partial(MMoE, num_experts=2, expert_units=(5,), dropout=dropout),
                towers=functools.partial(Tower, units=()),
                rngs=nnx.Rngs(seed),
            )

        decays = {"shared": decay} if decay else 0.0
        optimizer = Optimizer(ADAM, learning_rate=rate, weight_decay=decays, clip_norm=5.0)
        options = {"balancer": fixed(weights=weights), "optimizer": optimizer} | options
        return Member(model, seed=seed, name=f"{seed} {rate} {dropout}", **options)

    return make


@pytest.fixture(scope="module")
def grid(member):
    """Seeds, learning rates, decays, dropout and loss weights that all differ; some stop early."""
    return [
        member(0),
        member(1, rate=0.3),
        member(2, dropout=0.4),
        member(3, rate=0.05, dropout=0.1, decay=0.01, weights=(0.1, 2.0)),
        member(4, rate=1.0),
    ]


@pytest.fixture(scope="module")
def pair(member):
    return [member(0, balancer=pcgrad()), member(1, balancer=pcgrad(), rate=0.3)]


@pytest.fixture(scope="module")
def grid_alone(setup, grid):
    """The same runs one after the other; that this is ``fit`` to the last digit is a test of its own."""
    return alone(setup, grid)


@pytest.fixture(scope="module")
def pair_alone(staged, pair):
    return alone(staged, pair)


def alone(setup, members):
    return [result for _, result in train_members(setup, members, ONE_BY_ONE)]


def arrays(result):
    _, params, rest = Functional.of(result.model)
    return {path: np.asarray(array) for path, array in (params | rest).items()}


def assert_equal_runs(one, other, tolerance=0.0):
    for path, array in arrays(other).items():
        np.testing.assert_allclose(arrays(one)[path], array, rtol=tolerance, atol=tolerance, err_msg=path)
    assert one.monitor["step"] == other.monitor["step"]
    assert one.timing["steps"] == other.timing["steps"]
    for row, expected in zip(one.history, other.history, strict=True):
        value, known = row["value"], expected["value"]
        assert row | {"value": None} == expected | {"value": None}
        assert value == known or value == pytest.approx(known, rel=max(10 * tolerance, 1e-12), abs=10 * tolerance)


def test_one_after_the_other_each_member_equals_fit_to_the_last_digit(data, grid):
    results = dict(fit_many(grid, data, axis="map", **OPTIONS))
    assert sorted(results) == [0, 1, 2, 3, 4]
    own = grid[3]  # differs in every number from the first one, for which the program was compiled
    parts = {"balancer": own.balancer, "optimizer": own.optimizer, "order_seed": own.order_seed}
    assert_equal_runs(results[3], fit(own.model(), data, seed=own.seed, **parts, **OPTIONS))


def test_together_each_member_equals_the_same_run_alone(setup, grid, grid_alone):
    """Up to the order of sums in matrix products. Five members in chunks of three: the second one is filled up."""
    results = dict(train_members(setup, grid, TOGETHER))
    assert sorted(results) == [0, 1, 2, 3, 4]
    for number, expected in enumerate(grid_alone):
        assert_equal_runs(results[number], expected, 2e-5)
    for chunk in ((0, 1, 2), (3, 4)):
        stops = {results[number].timing["steps"] for number in chunk}
        assert len(stops) > 1, "no member stopped before another: the test does not reach frozen members"


def test_every_way_of_training_has_a_run_axis(staged, pair, pair_alone):
    results = dict(train_members(staged, pair, Plan("vmap", 2)))
    for number, expected in enumerate(pair_alone):
        assert_equal_runs(results[number], expected, 2e-5)


def test_constants_of_a_balancer_ride_along(setup, member):
    members = [member(0, balancer=uncertainty(weight_lr=rate)) for rate in (0.001, 0.3)]
    weights, expected = (
        [result.diagnostics["task_weights"] for _, result in train_members(setup, members, plan)]
        for plan in (Plan("vmap", 2), ONE_BY_ONE)
    )
    assert weights == [pytest.approx(known, rel=1e-4) for known in expected]
    assert weights[0] != pytest.approx(weights[1], rel=0.01)


def test_members_with_one_order_see_the_same_batches(data, setup, member):
    members = [member(seed, order_seed=7) for seed in (0, 1)]
    results = dict(fit_many(members, data, axis="vmap", **OPTIONS))
    assert sorted(results) == [0, 1]
    for number, expected in enumerate(alone(setup, members)):
        assert_equal_runs(results[number], expected, 2e-5)


def test_a_member_that_is_not_finite_ends_alone(setup, grid, grid_alone, member):
    members = [grid[0], member(1, rate=1e30), grid[2]]
    results = dict(train_members(setup, members, TOGETHER))
    one_by_one = alone(setup, members)
    for kinds in (results.values(), one_by_one):
        assert [type(result).__name__ for result in kinds] == ["Result", "TrainingError", "Result"]
    assert str(results[1]).split("; expected")[0] == str(one_by_one[1]).split("; expected")[0]
    for number in (0, 2):
        assert_equal_runs(results[number], grid_alone[number], 2e-5)


@pytest.mark.parametrize("case", ["joint", "staged"])
def test_a_stack_goes_on_where_it_was_stopped(request, setup, staged, grid, pair, tmp_path, case):
    """Stopped twice, in the middle of epochs: what comes out is what comes out undisturbed, to the last digit."""
    setup, members, plan = (setup, grid, TOGETHER) if case == "joint" else (staged, pair, Plan("vmap", 2))
    undisturbed = dict(train_members(setup, members, plan))
    for calls in (2, 3):
        asked = iter(range(1, 1000))
        stopping = dataclasses.replace(
            setup, checkpoint_seconds=0, should_stop=lambda c=calls, a=asked: next(a) == c
        )  # with the programs of the setup
        with pytest.raises(Interrupted):
            list(train_members(stopping, members, plan, tmp_path))
    resumed = dict(train_members(dataclasses.replace(setup, checkpoint_seconds=0), members, plan, tmp_path))
    for number, result in resumed.items():
        assert_equal_runs(result, undisturbed[number])


def test_one_program_serves_all_numbers(setup, grid_alone, member):
    known = len(setup.programs)
    alone(setup, [member(8, rate=0.004, dropout=0.7, decay=0.3, weights=(3.0, 0.2))])
    assert len(setup.programs) == known
    alone(setup, [member(9, dropout=0.0)])
    assert len(setup.programs) == known + 1  # no dropout is another program


def test_the_plan_fits_memory_and_follows_the_measurement(setup, grid, grid_alone, monkeypatch):
    members = grid[:3]
    plan = plan_axis(setup, members)
    assert plan.seconds.keys() == {"map", "vmap"}
    assert plan.axis == min(plan.seconds, key=plan.seconds.get)
    assert plan.member_bytes > 2 * sum(array.nbytes for array in arrays(grid_alone[0]).values())
    each = plan_axis(setup, members, axis="vmap").member_bytes
    monkeypatch.setattr("mtl_jax.train.vectorize._free_bytes", lambda: 3 * each)
    assert plan_axis(setup, members, axis="vmap").chunk == 2  # 80 % of three members


def test_a_chunk_that_needs_more_than_its_states_is_cut_down(setup, grid, monkeypatch):
    """Of two members, whose states fit, the program wants more on the side than there is."""
    members = grid[:2]
    held = plan_axis(setup, members[:2], axis="vmap", chunk=2).member_bytes
    monkeypatch.setattr("mtl_jax.train.vectorize._free_bytes", lambda: 10 * held)
    monkeypatch.setattr("mtl_jax.train.vectorize._temporary_bytes", lambda program: 20 * held)
    assert plan_axis(setup, members, axis="vmap").axis == "map"
    monkeypatch.undo()
    assert plan_axis(setup, members, axis="vmap").chunk == 2


def test_members_without_room_for_two_run_alone(setup, grid, grid_alone, monkeypatch):
    members, plan = grid[:3], plan_axis(setup, grid[:3])
    monkeypatch.setattr("mtl_jax.train.vectorize._free_bytes", lambda: plan.member_bytes)
    too_many = plan_axis(setup, members, axis="vmap")
    assert (too_many.axis, too_many.chunk, too_many.free_bytes) == ("map", 1, plan.member_bytes)


def test_members_that_differ_in_more_than_numbers_are_refused(data, setup, member):
    for other in (member(1, dropout=0.0), member(1, balancer=pcgrad()), member(1, decay=0.0)):
        with pytest.raises(ConfigError, match="run 1 differs from run 0 in more than numbers"):
            list(train_members(setup, [member(0), other], TOGETHER))
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


@pytest.mark.slow
def test_the_run_axis_shards_over_devices(tmp_path):
    """Five members on four devices, whose eight places are filled up: the parameters and stops of one device.

    And with one data order for all: those of runs whose steps the devices share.
    """
    out = tmp_path / "outcomes.npz"
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"}
    run = subprocess.run([sys.executable, DEVICES_PROGRAM, out], env=os.environ | flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    stops = json.loads(out.with_suffix(".json").read_text())
    with np.load(out) as found:
        places = {key: found[key] for key in found.files}
    for one, other in (("vmap 1", "vmap 4"), ("one order, map 4", "one order, vmap 4")):
        assert stops[one] == stops[other]
        keys = [key for key in places if key.startswith(f"{one}|")]
        assert len(keys) >= 5 * len(stops[one])
        for key in keys:
            expected = places[f"{other}|{key.split('|', 1)[1]}"]
            np.testing.assert_allclose(places[key], expected, rtol=2e-5, atol=2e-5, err_msg=key)
    assert len({steps for steps, _ in stops["vmap 4"]}) > 1, "no member stopped before another"
