"""Training that owes something to a source: order of its rows, stages by phases, and what is loaded as a candidate."""

import dataclasses
import functools
import itertools
from typing import ClassVar

import jax
import numpy as np
import pytest

from mtl_jax.balancing.base import register
from mtl_jax.data.batching import epoch_order
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.model import label
from mtl_jax.train import Member, Optimizer, fit
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Setup
from mtl_jax.train.stages import stages_of
from mtl_jax.train.state import Functional
from mtl_jax.train.vectorize import Plan, plan_axis, train_members
from mtl_jax.transfer import FineTune, GradientTransfer, LinearProbe, Pooled, Scratch, ZeroShot

TARGET, SOURCE, BATCH = 50, 37, 16


@register
@dataclasses.dataclass(frozen=True)
class Beside(Adaptation):
    """Reads batches of the source beside each of the target's, and does nothing with them."""

    adapts: ClassVar[bool] = True
    number: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def source_batches(self):
        return self.number


@pytest.fixture(scope="module")
def data(small_schema, make_data):
    return make_data(small_schema, TARGET, 40)


@pytest.fixture(scope="module")
def source(small_schema, make_rows):
    return make_rows(small_schema, SOURCE, seed=5)


@pytest.fixture(scope="module")
def setup_of(data, source):
    def build(adaptation=None, **options):
        rows = source if adaptation is not None and adaptation.needs_rows else None
        return Setup.of(data, **{"batch_size": BATCH, "adaptation": adaptation, "source": rows} | options)

    return build


@pytest.fixture(scope="module")
def trained(data, make_model):
    """A model that has learned the data: of a large learning rate it can only suffer."""
    optimizer = Optimizer(learning_rate=0.03)
    return fit(make_model(data.schema), data, optimizer=optimizer, epochs=12, batch_size=BATCH, patience=0).model


def member_of(seed=0, **options):
    return Member(lambda: None, seed=seed, **options)


def rows(order):
    """What is no padding."""
    return order[order >= 0].tolist()


def parted(order, number):
    """The target's rows [steps, batch], and those of the source [steps, number, batch]."""
    together = order.reshape(len(order), -1, 1 + number)
    return together[..., 0], together[..., 1:].transpose(0, 2, 1)


def arrays(result):
    model = getattr(result, "model", result)
    _, params, rest = Functional.of(model)
    return {path: np.asarray(array) for path, array in (params | rest).items()}


def assert_same_arrays(one, other):
    jax.tree.map(np.testing.assert_array_equal, arrays(one), arrays(other))


def steps_of(result, name="mean_gain"):
    return [row["step"] for row in result.history if row["name"] == name]


# --- the order of rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epoch_steps", "passes"), [(None, 1), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (30, 8)])
def test_an_epoch_passes_over_all_rows_as_often_as_its_steps_ask(setup_of, epoch_steps, passes):
    setup = setup_of(epoch_steps=epoch_steps)
    order = setup.order(member_of(), 2)
    assert order.shape == (4 * passes, BATCH)
    assert sorted(rows(order)) == sorted(passes * list(range(TARGET)))
    for number, part in enumerate(np.split(order, passes)):
        expected = epoch_order(TARGET, BATCH, seed=0, epoch=2 * passes + number)
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("adaptation", [None, FineTune(), Pooled(), Beside(), Beside(3)])
@pytest.mark.parametrize("epoch_steps", [None, 9])
def test_the_order_is_a_function_of_seed_and_epoch_alone(setup_of, adaptation, epoch_steps):
    setup, other = (setup_of(adaptation, epoch_steps=epoch_steps) for _ in range(2))
    first = [setup.order(member_of(3), epoch) for epoch in range(4)]
    for epoch in (3, 0, 2):
        np.testing.assert_array_equal(other.order(member_of(3), epoch), first[epoch])
    np.testing.assert_array_equal(setup.order(member_of(7, order_seed=3), 1), first[1])
    for one, two in itertools.combinations([*first, setup.order(member_of(4), 0)], 2):
        assert one.shape == two.shape and not np.array_equal(one, two)
    assert first[0].dtype == np.int32


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("epoch_steps", [None, 9])
def test_batches_of_the_source_take_turns_with_the_targets_row_by_row(setup_of, number, epoch_steps):
    plain, setup = setup_of(epoch_steps=epoch_steps), setup_of(Beside(number), epoch_steps=epoch_steps)
    for epoch in range(3):
        order = setup.order(member_of(), epoch)
        assert order.shape[1] == BATCH * (1 + number) == setup.padded_size(member_of())
        target, source = parted(order, number)
        np.testing.assert_array_equal(target, plain.order(member_of(), epoch))
        found = np.array(rows(source))
        assert found.min() >= TARGET and found.max() < TARGET + SOURCE


@pytest.mark.parametrize("number", [1, 2, 3])
def test_rows_of_the_source_go_on_from_epoch_to_epoch(setup_of, number):
    """Three batches are a pass over the 37 rows: all were seen before one comes again, wherever epochs end."""
    setup = setup_of(Beside(number))
    orders = [parted(setup.order(member_of(), epoch), number)[1].reshape(-1, BATCH) for epoch in range(6)]
    stream = np.concatenate(orders)
    each = -(-SOURCE // BATCH)
    passes = len(stream) // each
    assert passes >= 6
    for first in range(0, passes * each, each):
        assert sorted(rows(stream[first : first + each])) == list(range(TARGET, TARGET + SOURCE))
    assert not np.array_equal(stream[:each], stream[each : 2 * each])


def test_a_source_of_fewer_rows_than_a_batch_is_padded(data, make_rows, small_schema):
    setup = Setup.of(data, batch_size=BATCH, adaptation=Beside(2), source=make_rows(small_schema, 5, seed=5))
    _, source = parted(setup.order(member_of(), 1), 2)
    for batch in source.reshape(-1, BATCH):
        assert sorted(rows(batch)) == list(range(TARGET, TARGET + 5))


@pytest.mark.parametrize("num_batches", [1, 2])
def test_more_rows_of_a_step_are_whole_groups_of_target_and_source(setup_of, num_batches):
    """Two micro-batches of 17 rows: the padding must not tear batches of target and source apart."""
    setup = setup_of(Beside(num_batches), batch_size=17, micro_batches=2)
    assert setup.padded_size(member_of()) == 18 * (1 + num_batches)


def test_pooled_rows_are_trained_on_like_the_targets(setup_of, data, source):
    setup = setup_of(Pooled(weight=0.25))
    assert (setup.num_trained, setup.num_source, setup.num_batches) == (TARGET + SOURCE, SOURCE, 1)
    order = setup.order(member_of(), 3)
    np.testing.assert_array_equal(order, epoch_order(TARGET + SOURCE, BATCH, seed=0, epoch=3))
    weight = np.asarray(setup.train["weight"])
    np.testing.assert_allclose(weight, np.concatenate([data.train.weight, 0.25 * source.weight]), rtol=1e-6)
    np.testing.assert_array_equal(setup.valid["ids"], data.valid.ids)
    assert setup_of(Pooled(), batch_size=1000).batch_size == TARGET + SOURCE
    assert setup_of(Beside(), batch_size=1000).batch_size == TARGET


@pytest.mark.parametrize("adaptation", [FineTune(), Scratch(), ZeroShot(), LinearProbe()])
def test_what_needs_no_row_of_the_source_puts_none_on_the_device(data, source, adaptation):
    setup = Setup.of(data, batch_size=BATCH, adaptation=adaptation, source=source)
    assert setup.num_source == 0 and len(setup.train["weight"]) == TARGET


def test_calls_to_the_device_may_be_as_long_as_an_epoch(setup_of):
    assert setup_of(steps_per_call=100).steps_per_call == 4
    assert setup_of(steps_per_call=100, epoch_steps=12).steps_per_call == 12
    assert setup_of(steps_per_call=100, epoch_steps=2).steps_per_call == 4


@pytest.mark.parametrize("adaptation", [Pooled(), Beside(), GradientTransfer()])
def test_rows_of_the_source_must_be_given_where_they_are_needed(data, adaptation):
    name = type(adaptation).__name__
    with pytest.raises(ConfigError, match=f"transfer '{name}' trains on rows of the source and there are none"):
        Setup.of(data, adaptation=adaptation)


def test_staged_training_is_refused(data):
    with pytest.raises(ConfigError, match="transfer 'FineTune' with training=staged; expected joint"):
        Setup.of(data, training="staged", adaptation=FineTune())


# --- stages and selection ---------------------------------------------------------------------------------------------


def test_phases_are_stages_that_the_monitor_selects(small_schema, trained):
    trivial = {"click": {"auc": 0.5}, "spend": {"rmse": 1.0}}
    stages = functools.partial(stages_of, "joint", "mean_gain", small_schema.tasks, trivial)
    assert len(stages(FineTune())) == len(stages(LinearProbe())) == len(stages(None)) == 1
    probe, everything = stages(LinearProbe(then_all=True))
    assert not probe.by_task and probe.monitors == everything.monitors == stages(None)[0].monitors
    paths = list(arrays(trained))
    assert [path for path in paths if probe.trainable(path)] == [p for p in paths if label(p).startswith("task/")]
    assert all(map(everything.trainable, paths))


@pytest.fixture(params=[False, True], ids=["in memory", "on disk"])
def place(request, tmp_path):
    """Folder for checkpoints, or none."""
    return tmp_path / "checkpoints" if request.param else None


@pytest.fixture(scope="module")
def adapt(trained, data):
    """Two epochs from the trained model's values, or from others; each program is compiled once."""
    transform, programs = Optimizer().transform, {}

    def run(adaptation, *, model=trained, rate=0.003, scale=None, checkpoints=None, **options):
        setup = Setup.of(data, **{"epochs": 2, "batch_size": BATCH, "patience": 0, "steps_per_call": 1} | options,
                         adaptation=adaptation)  # fmt: skip
        setup.programs = programs
        optimizer = Optimizer(transform, learning_rate=rate, rate_scale=scale or {})
        member = Member(lambda: model, optimizer=optimizer, adaptation=adaptation, checkpoints=checkpoints)
        return Session(setup, member).run()

    return run


@pytest.fixture(scope="module")
def untrained(data, make_model):
    return make_model(data.schema)


def test_what_came_from_the_source_is_selected_where_training_makes_it_worse(adapt, trained, place):
    result = adapt(FineTune(), rate=3.0, checkpoints=place)
    assert steps_of(result) == [0, 4, 8]
    assert result.monitor["step"] == 0 and result.timing["steps"] == 8
    assert_same_arrays(result, trained)
    first = next(row for row in result.history if row["name"] == "mean_gain")
    assert first["value"] == result.monitor["value"]
    click = [row["value"] for row in result.history if row["task"] == "click" and row["name"] == "auc"]
    assert click[0] == result.metrics["valid"]["click"]["auc"]


def test_without_an_adaptation_the_first_candidate_is_the_first_epoch(adapt):
    result = adapt(None, rate=3.0)
    assert steps_of(result) == [4, 8] and result.monitor["step"] > 0


def test_training_is_the_same_with_and_without_the_look_at_its_beginning(adapt):
    one, other = adapt(FineTune(), rate=0.03), adapt(None, rate=0.03)
    assert [row for row in one.history if row["step"] > 0] == other.history


def test_stale_evaluations_are_counted_from_the_beginning(adapt):
    assert steps_of(adapt(FineTune(), rate=3.0, epochs=9, patience=1)) == [0, 4]


def test_a_strategy_that_trains_nothing_ends_at_step_0(adapt, trained, place):
    result = adapt(ZeroShot(), checkpoints=place)
    assert_same_arrays(result, trained)
    assert {row["step"] for row in result.history} == {0} and result.monitor["step"] == 0
    assert result.timing["steps"] == 0 and result.metrics["valid"]["spend"]["rmse"] > 0
    if place is not None:  # what a killed run left is gone on from
        again = adapt(ZeroShot(), checkpoints=place)
        assert (again.history, again.metrics) == (result.history, result.metrics)


def test_a_probe_trains_the_tasks_own_parameters_only(adapt, trained, place):
    result = adapt(LinearProbe(), rate=0.01, checkpoints=place, epochs=1, monitor="spend/mae")
    before, after = arrays(trained), arrays(result)
    for path, array in before.items():
        if not label(path).startswith("task/"):
            np.testing.assert_array_equal(after[path], array)


def test_the_second_stage_begins_with_what_the_first_has_selected(adapt, untrained, place):
    """From initial values, which both stages improve."""
    options = {"model": untrained, "rate": 0.02, "epochs": 3}
    probe = adapt(LinearProbe(), **options)
    both = adapt(LinearProbe(then_all=True), checkpoints=place, **options)
    assert both.history[: len(probe.history)] == probe.history
    assert steps_of(both) == [0, 4, 8, 12, 16, 20, 24] and both.timing["steps"] == 24
    assert both.monitor["step"] > 12, "the second stage was of use"
    shared = [path for path in arrays(both) if label(path) == "shared"]
    assert any(not np.array_equal(arrays(both)[path], arrays(probe)[path]) for path in shared)


def test_the_first_stage_is_the_result_where_the_second_makes_it_worse(adapt, untrained, place):
    """What the second stage begins with is its first candidate, though its checkpoint has other arrays."""
    options = {"model": untrained, "rate": 0.02, "epochs": 3, "scale": {"sharing": 400.0, "tables": 400.0}}
    probe = adapt(LinearProbe(), **options)
    both = adapt(LinearProbe(then_all=True), checkpoints=place, **options)
    assert 0 < both.monitor["step"] == probe.monitor["step"] <= 12
    assert_same_arrays(both, probe)
    assert both.metrics == probe.metrics


@pytest.fixture(scope="module")
def undisturbed(adapt, untrained):
    return adapt(LinearProbe(then_all=True), model=untrained, rate=0.02)


@pytest.mark.parametrize("at", [3, 4, 8, 11])
def test_stages_resume_where_they_stopped(adapt, untrained, undisturbed, tmp_path, at):
    """In either stage, in the middle and at the end of an epoch: the same run as without a break."""
    asked = iter(range(1, 1000))
    run = functools.partial(adapt, LinearProbe(then_all=True), model=untrained, rate=0.02, checkpoints=tmp_path)
    with pytest.raises(Interrupted):
        run(should_stop=lambda: next(asked) == at)
    resumed = run()
    for name in ("history", "monitor", "metrics", "support"):
        assert getattr(resumed, name) == getattr(undisturbed, name), name
    assert_same_arrays(resumed, undisturbed)


# --- the run axis -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def members(trained):
    def build(adaptation, rates=(0.003, 3.0), seeds=(0, 0)):
        transform = Optimizer().transform
        return [
            Member(
                lambda: trained,
                seed=seed,
                optimizer=Optimizer(transform, learning_rate=rate),
                adaptation=adaptation,
                name=f"{seed} {rate}",
            )
            for rate, seed in zip(rates, seeds, strict=True)
        ]

    return build


@pytest.mark.parametrize("adaptation", [FineTune(), LinearProbe(then_all=True)], ids=lambda a: type(a).__name__)
def test_members_that_train_together_are_the_runs_alone(setup_of, members, trained, adaptation):
    found = {}
    for axis in ("map", "vmap"):
        setup = setup_of(adaptation, epochs=2, patience=0)
        results = train_members(setup, members(adaptation), Plan(axis, 2 if axis == "vmap" else 1))
        found[axis] = [result for _, result in results]
    for alone, together in zip(*found.values(), strict=True):
        assert steps_of(together) == steps_of(alone) and steps_of(together)[0] == 0
        assert together.monitor["step"] == alone.monitor["step"]
        for path, array in arrays(alone).items():
            np.testing.assert_allclose(arrays(together)[path], array, rtol=1e-3, atol=1e-4)
    for _, ruined in found.values():  # what was loaded is left
        assert ruined.monitor["step"] == 0
        assert_same_arrays(ruined, trained)


def test_what_is_not_trained_has_no_use_for_the_run_axis(setup_of, members):
    for axis in ("vmap", "auto", "map"):
        setup = setup_of(ZeroShot())
        plan = plan_axis(setup, members(ZeroShot()), axis=axis)
        assert (plan.axis, plan.chunk) == ("map", 1)
    assert [result.timing["steps"] for _, result in train_members(setup, members(ZeroShot()), plan)] == [0, 0]
