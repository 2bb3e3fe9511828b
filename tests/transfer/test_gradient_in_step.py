"""The gradient-based update inside of the train step, against the same computation written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing import pcgrad
from mtl_jax.data.batching import take
from mtl_jax.errors import ConfigError
from mtl_jax.sharing import ResFlow
from mtl_jax.train import BalancingOptions, Member, Optimizer
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Setup
from mtl_jax.transfer import FineTune, GradientTransfer

ETA, RATE, ROWS = 0.3, 0.1, 16


def layer(params, path, x):
    return x @ params[f"{path}/kernel"] + params[f"{path}/bias"]


def task_losses(params, batch):
    """Weighted means over observed labels, 0 without one, of a model that is written out layer by layer."""
    x = jnp.concatenate([params["tables/user/rows"][batch["ids"][:, 0]], batch["dense"]], axis=1)
    for number in (0, 1):
        x = jax.nn.relu(layer(params, f"sharing/bottom/layers/{number}", x))
    losses = {}
    for task in ("click", "spend"):
        z = layer(params, f"task/{task}/tower/head", x)
        y = jnp.where(batch["mask"][task] > 0, batch["labels"][task], 0)
        elements = jax.nn.softplus(z[:, 0]) - y * z[:, 0] if task == "click" else jnp.square(z[:, 0] - y)
        weight = batch["weight"] * batch["mask"][task]
        losses[task] = jnp.sum(weight * elements) / jnp.maximum(jnp.sum(weight), 1e-9)
    return losses


def loss(params, batch):
    return sum(task_losses(params, batch).values())


def moved(params, sources, *, sign=-1, scope=("tables", "sharing", "task"), first_order=False):
    """T: a step on each batch of the source, of the arrays in the scope."""
    for batch in sources:
        gradient = jax.grad(loss)(params, batch)
        gradient = jax.lax.stop_gradient(gradient) if first_order else gradient
        params = {
            path: array + sign * ETA * gradient[path] if path.split("/")[0] in scope else array
            for path, array in params.items()
        }
    return params


@pytest.fixture
def one_step(make_model, make_step, make_batch, in_turn, perturbed):
    """(strategy, ...) -> parameters before, after a step of SGD, batch of the target, those of the source."""

    def run(strategy, **options):
        optimizer = Optimizer(optax.identity(), learning_rate=RATE)
        step, state = make_step(make_model(), strategy, optimizer=optimizer, **options)
        state = perturbed(state, 0.2)
        target, *sources = (make_batch(ROWS, seed) for seed in range(strategy.batches_beside + 1))
        after, _ = jax.jit(step)(state, in_turn(target, *sources))
        return state.params | state.tables, after.params | after.tables, target, sources

    return run


def close(found, expected):
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=2e-6, err_msg=path)


def descended(params, gradient):
    return {path: array - RATE * gradient[path] for path, array in params.items()}


def slope(params, target, sources, **options):
    """Gradient of the target's loss after the update, by the parameters before it."""
    return jax.jit(jax.grad(lambda params: loss(moved(params, sources, **options), target)))(params)


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"sign": 1}, {"sign": 1}),
        ({"mode": "first_order", "num_steps": 2}, {"first_order": True}),
        ({"scope": ("shared",)}, {"scope": ("sharing",)}),
        ({"scope": ("embedding", "task"), "sign": 1}, {"scope": ("tables", "task"), "sign": 1}),
    ],
    ids=str,
)
def test_a_step_descends_the_target_loss_after_the_update(options, same, one_step):
    """theta - rate * d/dtheta L_t(theta + sign * eta * grad L_s(theta)), whatever moves and however often."""
    before, after, target, sources = one_step(GradientTransfer(ETA, **options))
    gradient = slope(before, target, sources, **same)
    close(after, descended(before, gradient))
    if not same:  # so that the modes tell each other apart
        plain = slope(before, target, sources, first_order=True)
        assert max(np.abs(gradient[path] - plain[path]).max() for path in gradient) > 1e-2


@pytest.mark.parametrize("options", [{"table_updates": {"user": "sparse"}}, {"micro_batches": 4}], ids=str)
def test_a_step_in_parts_or_by_rows_is_the_same(options, one_step):
    """Wherever a batch is cut, target and source have their share; all rows of the table are named."""
    before, after, target, sources = one_step(GradientTransfer(ETA, num_steps=3), **options)
    close(after, descended(before, slope(before, target, sources)))


def test_balanced_gradients_are_taken_after_the_update_and_pulled_back_once(one_step):
    """PCGrad of two tasks: each gradient loses its part along the other one, where they conflict."""
    options = BalancingOptions(scope="encoder", head_gradient="plain")
    before, after, target, sources = one_step(GradientTransfer(ETA), balancer=pcgrad(), options=options)
    adapted, pull = jax.vjp(jax.jit(lambda params: moved(params, sources)), before)
    one, other = (
        jax.jit(jax.grad(lambda params, task=task: task_losses(params, target)[task]))(adapted)
        for task in ("click", "spend")
    )
    in_scope = [path for path in before if path.startswith("sharing/")]
    product, *squares = (
        sum(float(jnp.vdot(a[path], b[path])) for path in in_scope)
        for a, b in ((one, other), (one, one), (other, other))
    )
    weights = [1 - min(product, 0) / square for square in squares]
    balanced = {
        path: one[path] + other[path] if path.startswith("task/") else weights[0] * one[path] + weights[1] * other[path]
        for path in before
    }
    assert product < -1e-3
    close(after, descended(before, pull(balanced)[0]))


def stacked(*batches):
    return jax.tree.map(lambda *columns: jnp.stack(columns), *batches)


@pytest.mark.parametrize(("sign", "num_steps"), [(-1, 1), (1, 2)])
def test_the_deployed_model_is_the_source_after_the_update(
    sign, num_steps, make_model, make_step, make_batch, perturbed
):
    """On batches that are drawn once."""
    sources = [make_batch(ROWS, 20 + seed) for seed in range(num_steps)]
    strategy = GradientTransfer(ETA, sign, num_steps)
    step, state = make_step(make_model(), strategy, batches=stacked(*sources))
    state = perturbed(state, 0.2)
    close(step.evaluated(state), jax.jit(lambda params: moved(params, sources, sign=sign))(state.params))
    close(step.evaluated(state._replace(step=state.step + 5)), step.evaluated(state))
    assert step.started(state) is state


def test_update_moves_once_before_training_and_then_fine_tunes(make_model, make_step, make_batch):
    sources, target = [make_batch(ROWS, 20), make_batch(ROWS, 21)], make_batch(ROWS)
    optimizer = Optimizer(optax.identity(), learning_rate=RATE)
    strategy = GradientTransfer(ETA, num_steps=2, mode="update")
    assert strategy.batches_beside == 0 and strategy.needs_rows
    step, state = make_step(make_model(), strategy, batches=stacked(*sources), optimizer=optimizer)
    started = step.started(state)
    close(started.params, jax.jit(lambda params: moved(params, sources))(state.params))
    assert started.kept.batches is None
    after, _ = jax.jit(step)(started, target)
    close(after.params, descended(started.params, slope(started.params, target, [])))
    close(step.evaluated(after), after.params)


def test_dropout_is_off_in_the_model_that_is_deployed_and_on_in_the_steps_of_training(
    make_model, make_step, make_batch, in_turn
):
    rows = make_batch(ROWS)
    step, state = make_step(make_model(dropout=0.5), GradientTransfer(ETA), batches=stacked(rows))
    states = state, state._replace(key=jax.random.key(1))

    def differ(one, other):
        return any(np.any(one[path] != other[path]) for path in one)

    assert not differ(*map(step.evaluated, states))
    run = jax.jit(step)
    assert differ(*(run(state, in_turn(rows, rows))[0].params for state in states))


def test_rows_of_target_and_source_take_turns_and_every_source_row_has_its_turn(make_data, make_rows, make_model):
    """Row i of a batch belongs to batch i mod (1 + K); sources go on from epoch to epoch."""
    data, source, strategy = make_data(22), make_rows(17, 30), GradientTransfer(num_steps=2)
    setup = Setup.of(data, adaptation=strategy, source=source, batch_size=8)
    member = Member(make_model, adaptation=strategy)
    seen = []
    for epoch in range(3):
        order = setup.order(member, epoch)
        assert order.shape == (3, 24) and setup.padded_size(member) == 24
        np.testing.assert_array_equal(order[:, ::3], setup_of_target(setup, data).order(member, epoch))
        beside = np.stack([order[:, 1::3], order[:, 2::3]], axis=1).reshape(-1, 8)
        assert np.all((beside == -1) | (beside >= 22)) and beside.max() < 22 + 17
        seen.append(beside)
    passes = np.concatenate(seen)
    for first in range(0, len(passes), 3):  # three batches pass over the 17 rows once
        rows = passes[first : first + 3]
        assert sorted(rows[rows >= 0]) == list(range(22, 39))


def setup_of_target(setup, data):
    return Setup.of(data, adaptation=FineTune(), batch_size=setup.batch_size)


def test_a_run_is_its_steps_one_after_the_other(make_data, make_rows, make_model, arrays_of):
    """Written out from the order of rows; the last epoch is selected or the best one before it."""

    strategy, optimizer = GradientTransfer(ETA), Optimizer(optax.identity(), learning_rate=RATE)
    setup = Setup.of(make_data(22), adaptation=strategy, source=make_rows(17, 30), batch_size=8, epochs=1, patience=0)
    member = Member(make_model, adaptation=strategy, optimizer=optimizer)
    session = Session(setup, member)
    state, _ = session.resume()
    params = arrays_of(make_model())
    close(state.params, params)
    step, slope_of = jax.jit(session.step), jax.jit(lambda p, target, source: slope(p, target, [source]))
    for rows in setup.order(member, 0):
        batch = take(setup.train, jnp.asarray(rows))
        target, source = (jax.tree.map(lambda column, n=n: column[n::2], batch) for n in (0, 1))
        params = descended(params, slope_of(params, target, source))
        state, _ = step(state, batch)
    close(state.params, params)
    deployed = state.kept.batches
    assert deployed["ids"].shape == (1, 8, 1)
    close(session.evaluated(state), moved(params, [jax.tree.map(lambda column: column[0], deployed)]))


def test_statistics_of_batches_and_devices_of_their_own_are_refused(make_model, make_step):
    with pytest.raises(ConfigError, match="'GradientTransfer' takes gradient steps inside of a step"):
        make_step(make_model(sharing=ResFlow, units=(4,), logits=False), GradientTransfer())
    with pytest.raises(ConfigError, match="'GradientTransfer' with parallel=pmap"):
        make_step(make_model(), GradientTransfer(), axis="device")
