"""Gradual unfreezing: which groups move when, how their optimizers begin, and how long training goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing import pcgrad
from mtl_jax.data.batching import as_batch, take
from mtl_jax.data.dataset import Encoded, TrainingData
from mtl_jax.data.schema import Numeric, Schema
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.train import Member, Optimizer, fit, fit_many
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Setup
from mtl_jax.train.state import Functional
from mtl_jax.train.vectorize import Plan, train_members
from mtl_jax.transfer import FineTune, GradualUnfreeze

TABLE = "tables/user/rows"
GROUPS = [
    {f"task/{task}/tower/head/{name}" for task in ("click", "spend") for name in ("kernel", "bias")},
    {f"sharing/bottom/layers/1/{name}" for name in ("kernel", "bias")},
    {f"sharing/bottom/layers/0/{name}" for name in ("kernel", "bias")},
    {TABLE},
]
"""Of the model that the other files of this folder have, too."""
RUN = {"batch_size": 11, "steps_per_call": 1, "patience": 0}


def begun(number):
    return set().union(*GROUPS[:number])


def arrays(state):
    return {path: np.asarray(array, np.float64) for path, array in (state.params | state.tables).items()}


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("balancer", [None, pcgrad()], ids=["equal", "pcgrad"])
def test_groups_move_in_their_turn_and_the_others_stay_to_the_last_bit(
    balancer, way, make_model, make_step, make_batch
):
    """Under decay, which moves whatever is updated at all; two epochs of two steps for each group."""
    optimizer = Optimizer(weight_decay=0.1)
    step, state = make_step(
        make_model(), GradualUnfreeze(2), balancer=balancer, optimizer=optimizer, table_updates={"user": way}
    )
    assert set().union(*GROUPS) == set(arrays(state))
    run, batches = jax.jit(step), [make_batch(20, seed) for seed in range(2)]
    for epoch in range(2 * len(GROUPS) + 1):
        before = arrays(state)
        for batch in batches:
            state, _ = run(state, batch)
        now = arrays(state)
        expected = begun(epoch // 2 + 1)
        assert {path for path in before if np.any(before[path] != now[path])} == expected
        waiting = [jax.tree.leaves(own) for group, own in state.opt.items() if group > epoch // 2]
        waiting += [jax.tree.leaves(own) for path, own in state.row_opt.items() if path not in expected]
        assert not any(np.any(leaf) for leaves in waiting for leaf in leaves)
        state = step.end_epoch(state)


def loss_of(model, batch):
    """Of both tasks, the weighted mean over labelled rows; and its gradient."""
    functional, _, rest = Functional.of(model)

    def loss(params, batch):
        outputs = functional.merge(params, rest)(batch)
        labels = {task: jnp.where(batch["mask"][task], batch["labels"][task], 0) for task in outputs}
        losses = {
            "click": optax.sigmoid_binary_cross_entropy(outputs["click"], labels["click"]),
            "spend": (outputs["spend"] - labels["spend"]) ** 2,
        }
        weights = {task: batch["weight"] * batch["mask"][task] for task in outputs}
        return sum(jnp.vdot(weights[task], losses[task]) / jnp.sum(weights[task]) for task in outputs)

    return jax.jit(jax.grad(loss))


@pytest.mark.parametrize("way", ["dense", "sparse"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_first_step_of_a_group_is_that_of_an_adam_that_has_just_begun(
    number, way, make_model, make_step, make_batch
):
    """-rate (g / (|g| + eps) + decay p), whatever came before; every row of the table is in the batch."""
    batch, model = make_batch(20), make_model()
    optimizer = Optimizer(learning_rate=0.01, weight_decay=0.1)
    step, state = make_step(model, GradualUnfreeze(), optimizer=optimizer, table_updates={"user": way})
    run = jax.jit(step)
    for _ in range(number):
        for _ in range(3):
            state, _ = run(state, batch)
        state = step.end_epoch(state)
    before = arrays(state)
    gradient = loss_of(model, batch)(state.params | state.tables, batch)
    moved = arrays(run(state, batch)[0])
    for path in GROUPS[number]:
        g = np.asarray(gradient[path], np.float64)
        expected = -0.01 * (g / (np.abs(g) + 1e-8) + 0.1 * before[path])
        clear = np.abs(g) > 1e-5  # rounding decides about the sign of the others
        np.testing.assert_allclose((moved[path] - before[path])[clear], expected[clear], rtol=2e-3, atol=1e-7)
        assert np.mean(clear) > 0.5, path


def test_a_run_is_one_stage_after_the_other(make_model, make_data, member_of):
    """Written out: in each epoch the gradient of what has begun, clipped by its own norm, an Adam for each array."""
    rate, decay, bound, data, model = 0.02, 0.05, 0.8, make_data(), make_model()
    optimizer = Optimizer(learning_rate=rate, weight_decay=decay, clip_norm=bound)
    setup = Setup.of(data, epochs=5, adaptation=GradualUnfreeze(), table_updates="dense", **RUN)
    member = member_of(GradualUnfreeze(), optimizer)
    session = Session(setup, member)
    found = arrays(session.run_stage(*session.resume()))

    rows, params = as_batch(data.train), {path: np.array(array) for path, array in Functional.of(model)[1].items()}
    gradient_of = loss_of(model, rows)
    moments = {path: (np.zeros_like(array), np.zeros_like(array), 0) for path, array in params.items()}
    norms = []
    for epoch in range(5):
        for numbers in setup.order(member, epoch):
            gradient = gradient_of(params, take(rows, numbers))
            gradient = {path: np.asarray(gradient[path]) for path in begun(epoch + 1)}
            norms.append(np.sqrt(sum(np.sum(g**2) for g in gradient.values())))
            for path, g in gradient.items():
                g = g * min(1, bound / norms[-1])
                first, second, count = moments[path]
                first, second, count = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2, count + 1
                moments[path] = first, second, count
                direction = first / (1 - 0.9**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
                params[path] = params[path] - rate * (direction + decay * params[path])
    assert np.mean(np.asarray(norms) > bound) > 0.3, "the bound acts"
    for path, expected in params.items():
        np.testing.assert_allclose(found[path], expected, rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def member_of(make_model):
    def build(adaptation, optimizer=None, seed=1):
        return Member(make_model, seed=seed, adaptation=adaptation, optimizer=optimizer)

    return build


def test_one_group_is_plain_fine_tuning_to_the_last_bit(schema, make_model, make_rows, assert_same):
    """Numbers that towers read as they are: nothing is shared."""
    numeric = Schema((Numeric("price"), Numeric("age")), (), schema.tasks)

    def without_ids(rows):
        return Encoded(rows.ids[:, :0], rows.dense, {}, {}, rows.labels, rows.mask, {}, rows.weight)

    data = TrainingData("numeric", numeric, without_ids(make_rows(22)), without_ids(make_rows(20, 50)), "0" * 64)
    model, optimizer = make_model(of=numeric, units=()), Optimizer(learning_rate=0.1, weight_decay=0.01, clip_norm=1.0)
    assert {path.split("/")[0] for path in Functional.of(model)[1]} == {"task"}
    one, other = (
        fit(model, data, adaptation=strategy, optimizer=optimizer, epochs=2, **RUN)
        for strategy in (GradualUnfreeze(2), FineTune())
    )
    assert one.history == other.history and one.monitor["step"] > 0
    assert_same(*(Functional.of(result.model)[1] for result in (one, other)))


@pytest.fixture(scope="module")
def trained(make_model, make_data):
    """A model that has learned the data: of a large learning rate it can only suffer."""
    return fit(make_model(), make_data(), optimizer=Optimizer(learning_rate=0.03), epochs=15, **RUN).model


@pytest.mark.parametrize(
    ("strategy", "patience", "epochs", "axis"),
    [
        (FineTune(), 2, 2, "map"),
        (GradualUnfreeze(1), 1, 4, "map"),
        (GradualUnfreeze(2), 2, 8, "map"),
        (GradualUnfreeze(2), 1, 7, "vmap"),
    ],
    ids=str,
)
def test_patience_begins_with_the_last_group(strategy, patience, epochs, axis, trained, make_data):
    """No epoch is as good as what was loaded."""
    members = [
        Member(lambda: trained, seed=seed, adaptation=strategy, optimizer=Optimizer(learning_rate=3.0))
        for seed in range(1 + (axis == "vmap"))
    ]
    options = RUN | {"patience": patience, "epochs": 9, "adaptation": strategy}
    for _, result in fit_many(members, make_data(), axis=axis, **options):
        assert result.monitor["step"] == 0 and result.timing["steps"] == 2 * epochs


@pytest.mark.parametrize("build", ["fit", "stack"])
def test_each_group_needs_its_epochs(build, make_model, make_data, member_of):
    message = r"trainer.epochs is 7 for 4 groups .*, transfer.epochs_per_group=2; expected at least 8. Raise it, or"
    options = RUN | {"epochs": 7}
    with pytest.raises(ConfigError, match=message):
        if build == "fit":
            fit(make_model(), make_data(), adaptation=GradualUnfreeze(2), **options)
        members = [member_of(GradualUnfreeze(2), seed=seed) for seed in range(2)]
        list(fit_many(members, make_data(), axis="vmap", adaptation=GradualUnfreeze(2), **options))


def test_with_too_few_epochs_the_last_groups_stay_where_that_is_allowed(make_model, make_data, arrays_of):
    strategy, optimizer = GradualUnfreeze(2, allow_partial=True), Optimizer(learning_rate=0.03)
    result = fit(make_model(), make_data(), adaptation=strategy, optimizer=optimizer, epochs=3, **RUN)
    assert result.monitor["step"] > 4, "the second group was of use"
    before, after = arrays_of(make_model()), arrays_of(result.model)
    assert {path for path in before if np.any(before[path] != after[path])} == begun(2)


def test_runs_side_by_side_are_those_runs_alone_also_after_a_break(make_data, member_of, arrays_of, tmp_path):
    """Broken off at the end of an epoch, before the next group has begun, and in the middle of the one after it."""
    strategy, transform = GradualUnfreeze(), Optimizer().transform
    members = [member_of(strategy, Optimizer(transform, rate), seed) for seed, rate in enumerate((0.01, 0.03))]
    setup, plan = Setup.of(make_data(), epochs=5, adaptation=strategy, **RUN), Plan("vmap", 2)
    together, alone = (dict(train_members(setup, members, each)) for each in (plan, Plan("map", 1)))
    for calls in (2, 3):
        asked = iter(range(1, 100))
        stopping = dataclasses.replace(setup, should_stop=lambda c=calls, a=asked: next(a) == c)
        with pytest.raises(Interrupted):
            list(train_members(stopping, members, plan, tmp_path))
    resumed = dict(train_members(setup, members, plan, tmp_path))
    for number in range(2):
        expected = arrays_of(alone[number].model)
        assert resumed[number].history == together[number].history
        for path, array in arrays_of(together[number].model).items():
            np.testing.assert_array_equal(arrays_of(resumed[number].model)[path], array)
            np.testing.assert_allclose(array, expected[path], rtol=2e-4, atol=2e-5, err_msg=path)
        assert together[number].timing["steps"] == 10
