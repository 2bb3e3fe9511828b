"""The gradient-based update inside of the train step, against the same computation written out."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import written_out
from written_out import ROOTS, close, inside, loss, task_losses

from mtl_jax.balancing import equal, fixed, pcgrad
from mtl_jax.data.batching import as_batch, take
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.sharing import ResFlow
from mtl_jax.train import BalancingOptions, Member, Optimizer, fit
from mtl_jax.train.adaptation import structure
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Setup
from mtl_jax.transfer import Delta, FineTune, GradientTransfer, gradient_transfer

ETA, RATE, ROWS = 0.3, 0.1, 16
SGD = Optimizer(optax.identity(), learning_rate=RATE)
SPARSE = {"table_updates": {"user": "sparse"}}
SOURCE = "aux/copy/"


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


def descended(params, gradient):
    return written_out.descended(params, gradient, RATE)


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


def test_a_run_in_parts_that_do_not_divide_its_batches_is_the_run_in_one(make_data, make_rows, make_model, arrays_of):
    options = {"batch_size": 8, "epochs": 1, "steps_per_call": 4, "adaptation": GradientTransfer(ETA), "optimizer": SGD}
    whole, parts = (
        arrays_of(fit(make_model(), make_data(), source=make_rows(17, 30), micro_batches=number, **options).model)
        for number in (1, 3)
    )
    for path in whole:
        np.testing.assert_allclose(parts[path], whole[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("strategy", [GradientTransfer(ETA), Delta()], ids=["a step on the source", "a study of rows"])
def test_a_run_whose_devices_sum_by_name_is_the_run_whose_compiler_does(
    strategy, make_data, make_rows, make_model, arrays_of
):
    """What lies around the steps, too: batches for deployment, a study, the choice of an epoch."""
    options = {"batch_size": 8, "epochs": 2, "steps_per_call": 4, "adaptation": strategy, "optimizer": SGD}
    options |= {"source": make_rows(17, 30)} if strategy.needs_rows else {}
    of_compiler, by_name = (
        arrays_of(fit(make_model(), make_data(), parallel=how, **options).model) for how in ("jit", "pmap")
    )
    close(by_name, of_compiler)


def test_statistics_of_batches_are_refused(make_model, make_step):
    with pytest.raises(ConfigError, match="'GradientTransfer' takes gradient steps inside of a step"):
        make_step(make_model(sharing=ResFlow, units=(4,), logits=False), GradientTransfer())


# The losses of the source as a term of the objective


def pure(*, scope=tuple(ROOTS), weights=(1.0, 1.0), **options):
    """(parameters, batches of target and sources) -> gradient, by the function that knows no model and no training."""

    def gradient(params, target, sources, **numbers):
        def of_target(params):
            losses = task_losses(params, target)
            return weights[0] * losses["click"] + weights[1] * losses["spend"]

        mask = {path: inside(path, scope) for path in (params[0] if isinstance(params, tuple) else params)}
        more = options | numbers | {"mask": mask, "source_batches": stacked(*sources)}
        return gradient_transfer(loss, of_target, params, **{"step_size": ETA} | more)[1]

    return jax.jit(gradient)


def mean_loss(params, sources):
    return sum(loss(params, batch) for batch in sources) / len(sources)


@pytest.mark.parametrize(
    ("options", "same", "more"),
    [
        ({"sign": 1, "num_steps": 2}, {"sign": 1}, SPARSE),
        (
            {"mode": "first_order", "scope": ("shared",)},
            {"first_order": True, "scope": ("sharing",)},
            {"micro_batches": 4},
        ),
    ],
    ids=str,
)
def test_the_source_weight_adds_the_losses_of_the_source_before_the_update(options, same, more, one_step):
    """theta - rate * (d/dtheta L_t(T(theta)) + lambda_s * grad L_s(theta)), whatever T moves."""
    before, after, target, sources = one_step(GradientTransfer(ETA, source_weight=0.7, **options), **more)
    of_source = jax.jit(jax.grad(mean_loss))(before, sources)
    of_target = slope(before, target, sources, **same)
    close(after, descended(before, {path: of_target[path] + 0.7 * of_source[path] for path in before}))
    assert max(np.abs(gradient).max() for gradient in of_source.values()) > 1e-1


def test_with_a_source_weight_a_step_size_of_zero_is_not_plain_fine_tuning():
    assert GradientTransfer(0.0).simplified() == FineTune()
    weighted = GradientTransfer(0.0, source_weight=0.7)
    assert weighted.simplified() is weighted and weighted.penalises


# Mode joint: two sets of parameters and a spring between them


def paired(params):
    """(theta_s, theta_t)."""
    source = {path.removeprefix(SOURCE): array for path, array in params.items() if path.startswith(SOURCE)}
    return source, {path: array for path, array in params.items() if not path.startswith(SOURCE)}


def unpaired(pair):
    return {f"{SOURCE}{path}": array for path, array in pair[0].items()} | pair[1]


@pytest.mark.parametrize("more", [{}, SPARSE], ids=str)
def test_joint_training_begins_with_two_copies_of_the_source_and_deploys_that_of_the_target(
    more, make_model, make_step, make_batch, perturbed, arrays_of, assert_same
):
    sources = stacked(make_batch(ROWS, 20))
    step, state = make_step(make_model(), GradientTransfer(ETA, mode="joint"), batches=sources, **more)
    loaded = arrays_of(make_model())
    of_source, of_target = paired(state.params | state.tables)
    assert_same(of_source, loaded)
    assert_same(of_target, loaded)
    assert len(state.tables) == (2 if more else 0) and step.started(state) is state
    state = perturbed(state, 0.2)
    of_source, of_target = paired(state.params | state.tables)
    assert_same(step.functional.own(step.evaluated(state)), of_target)
    assert all(np.any(of_source[path] != of_target[path]) for path in of_source)


@pytest.fixture(scope="module")
def program(make_model, make_step, perturbed):
    """(strategy, ...) -> numbers of such a step with another coupling, a state where no two arrays are the same, and
    (numbers, state, batch) -> state after."""

    def build(strategy, **options):
        step, state = make_step(make_model(), strategy, optimizer=SGD, **options)
        name = {"joint": "rho", "implicit": "proximal"}[strategy.mode]

        def coupled(value):
            return dataclasses.replace(step, adaptation=dataclasses.replace(strategy, **{name: value})).numbers()

        run = jax.jit(lambda numbers, state, batch: step.with_numbers(numbers)(state, batch)[0])
        return coupled, perturbed(state, 0.2), run

    return build


@pytest.fixture(scope="module")
def joint(program):
    return program(GradientTransfer(0.1, mode="joint"))


@pytest.mark.parametrize(
    ("options", "more", "weights"),
    [
        ({}, {}, (1.0, 1.0)),
        ({"sign": 1, "num_steps": 2, "scope": ("embedding", "task")}, SPARSE | {"micro_batches": 4}, (2.0, 0.5)),
    ],
    ids=str,
)
def test_joint_steps_descend_both_losses_and_the_distance_between_the_parameters(
    options, more, weights, joint, program, make_batch, in_turn
):
    """L_s(theta_s) + L_t(theta_t) + rho/2 |theta_t - T(theta_s)|^2, twice; the balancer weighs the tasks of L_t alone."""
    strategy = GradientTransfer(0.1, mode="joint", **options)
    if more:
        of_tasks = {"balancer": fixed(weights=weights), "options": BalancingOptions(head_gradient="weighted")}
        coupled, start, run = program(strategy, **of_tasks, **more)
    else:
        coupled, start, run = joint
    expected_slope, ends = pure(mode="joint", step_size=0.1, weights=weights, **options), []
    for rho in (0.0, 0.7):
        state, expected = start, start.params | start.tables
        for seed in (0, 10):
            target, *sources = (make_batch(ROWS, seed + place) for place in range(strategy.num_steps + 1))
            gradient = expected_slope(paired(expected), target, sources, rho=rho)
            expected = descended(expected, unpaired(gradient))
            state = run(coupled(rho), state, in_turn(target, *sources))
            close(state.params | state.tables, expected)
        ends.append(expected)
    pulled = {path for path in expected if np.abs(ends[0][path] - ends[1][path]).max() > 1e-3}
    assert pulled >= {path for path in expected if inside(path.removeprefix(SOURCE), strategy.scope)}


def test_a_joint_step_on_padding_leaves_all_but_the_spring_at_rest(joint, make_batch, in_turn):
    coupled, state, run = joint
    padding = make_batch(ROWS) | {"weight": jnp.zeros(ROWS)}
    after = run(coupled(0.7), state, in_turn(padding, padding))
    of_source, of_target = paired(state.params)
    forces = {path: 0.7 * (of_target[path] - of_source[path]) for path in of_target}
    against = {path: -force for path, force in forces.items()}
    close(after.params, descended(state.params, unpaired((against, forces))))
    assert int(after.step) == 1


def test_a_joint_step_by_rows_moves_what_target_or_source_name_in_both_tables_and_nothing_else(
    make_model, make_step, make_batch, in_turn, perturbed
):
    """Written out: T moves the rows of the source, and the spring acts on the rows of both."""
    target, source = (take(make_batch(ROWS, seed), jnp.arange(*rows)) for seed, rows in enumerate([(2, 6), (4, 8)]))
    step, state = make_step(make_model(), GradientTransfer(ETA, 1, mode="joint", rho=0.7), optimizer=SGD, **SPARSE)
    state = perturbed(state, 0.2)
    before = state.params | state.tables
    after, _ = jax.jit(step)(state, in_turn(target, source))
    named = jnp.isin(jnp.arange(10), jnp.arange(2, 8))[:, None]

    def objective(params):
        of_source, of_target = paired(params)
        expected = moved(of_source, [source], sign=1)
        apart = {path: jnp.square(of_target[path] - expected[path]) for path in expected}
        apart["tables/user/rows"] *= named
        return loss(of_source, source) + loss(of_target, target) + 0.35 * sum(map(jnp.sum, apart.values()))

    close(after.params | after.tables, descended(before, jax.jit(jax.grad(objective))(before)))
    for path, table in after.tables.items():
        changed = np.any(table != state.tables[path], axis=1)
        assert np.flatnonzero(changed).tolist() == [2, 3, 4, 5, 6, 7]


def test_a_joint_run_that_was_stopped_ends_with_the_parameters_of_both_sides_to_the_last_bit(
    make_data, make_rows, make_model, arrays_of, assert_same, tmp_path
):
    """Also what its checkpoints hold, the table of the source among it."""
    strategy = GradientTransfer(ETA, mode="joint")
    options = {"epochs": 1, "batch_size": 8, "patience": 0, "steps_per_call": 1, "table_updates": "sparse"}
    setup = Setup.of(make_data(), adaptation=strategy, source=make_rows(17, 30), **options)

    def session(folder, setup=setup):
        origin = dict.fromkeys(arrays_of(make_model()), True)
        member = Member(make_model, seed=1, adaptation=strategy, origin=origin, checkpoints=tmp_path / folder)
        return Session(setup, member)

    whole = session("whole").run()
    asked = iter((False, True))
    with pytest.raises(Interrupted):
        session("stopped", dataclasses.replace(setup, should_stop=lambda: next(asked))).run()
    stopped = session("stopped").run()
    assert_same(arrays_of(stopped.model), arrays_of(whole.model))
    assert stopped.metrics == whole.metrics
    (state, _), (expected, _) = session("stopped").resume(), session("whole").resume()
    assert_same(state.params | state.tables, expected.params | expected.tables)
    of_source, of_target = paired(state.params | state.tables)
    assert of_source.keys() == of_target.keys() == arrays_of(whole.model).keys()
    assert all(np.any(of_source[path] != of_target[path]) for path in of_source)


# Mode implicit: the minimum of the source's losses nearby


def minimum(params, sources, *, proximal, scope=tuple(ROOTS)):
    """Where the descent ends, a step on each batch."""
    found = params
    for batch in sources:
        gradient = jax.grad(loss)(found, batch)
        found = {
            path: array - ETA * (gradient[path] + proximal * (array - params[path])) if inside(path, scope) else array
            for path, array in found.items()
        }
    return found


def slope_of_minimum(params, target, sources, *, proximal, scope):
    """As of a minimum, with the Hessian of the mean over the batches written out and inverted."""
    found = jax.jit(lambda params: minimum(params, sources, proximal=proximal, scope=scope))(params)
    flat, rebuild = jax.flatten_util.ravel_pytree(found)
    hessian = np.asarray(jax.jit(jax.hessian(lambda flat: mean_loss(rebuild(flat), sources)))(flat), np.float64)
    gradient = np.array(jax.flatten_util.ravel_pytree(jax.jit(jax.grad(loss))(found, target))[0], np.float64)
    fitted = {path: jnp.full(array.shape, inside(path, scope)) for path, array in params.items()}
    fitted = np.asarray(jax.flatten_util.ravel_pytree(fitted)[0])
    solved = np.linalg.solve(hessian[fitted][:, fitted] + proximal * np.eye(fitted.sum()), gradient[fitted])
    gradient[fitted] = proximal * solved
    gradient[~fitted] -= hessian[~fitted][:, fitted] @ solved
    return rebuild(jnp.asarray(gradient, jnp.float32))


def test_an_implicit_step_descends_the_target_loss_at_the_minimum(one_step):
    """Also what is not fitted, on which the minimum depends; it is that of two batches."""
    options = {"proximal": 3.0, "scope": ("embedding", "task")}
    before, after, target, sources = one_step(GradientTransfer(ETA, num_steps=2, mode="implicit", **options), **SPARSE)
    gradient = slope_of_minimum(before, target, sources, **options)
    close(after, descended(before, gradient))
    plain = jax.jit(jax.grad(loss))(before, target)
    for fitted in (True, False):
        differences = [gradient[path] - plain[path] for path in plain if inside(path, options["scope"]) == fitted]
        assert max(np.abs(array).max() for array in differences) > 5e-2


IMPLICIT = {"mode": "implicit", "num_cg_steps": 4}


@pytest.fixture(scope="module")
def implicit(program):
    """Its pulls are to be stronger than the source's losses are concave: rounding then stays small."""
    return program(GradientTransfer(ETA, **IMPLICIT))


def test_implicit_steps_are_those_of_the_pure_function(implicit, make_batch, in_turn):
    """With iterations that do not end at the inverse, for a strong pull and a weak one."""
    coupled, state, run = implicit
    target, *sources = make_batch(ROWS), make_batch(ROWS, 1)
    gradient = pure(**IMPLICIT)
    for proximal in (3.0, 9.0):
        after = run(coupled(proximal), state, in_turn(target, *sources))
        close(after.params, descended(state.params, gradient(state.params, target, sources, proximal=proximal)))


def test_implicit_steps_of_several_pulls_side_by_side_are_those_alone(implicit, make_batch, in_turn):
    """On a run axis, where iterations end for one and go on for another."""
    coupled, state, run = implicit
    batch, numbers = in_turn(make_batch(ROWS), make_batch(ROWS, 1)), [coupled(value) for value in (3.0, 5.0, 9.0)]
    together = jax.jit(jax.vmap(run, in_axes=(0, None, None)))(stacked(*numbers), state, batch).params
    for place, one in enumerate(numbers):
        for path, array in run(one, state, batch).params.items():
            np.testing.assert_allclose(together[path][place], array, rtol=2e-5, atol=2e-5, err_msg=path)
    assert max(np.abs(array[0] - array[2]).max() for array in together.values()) > 1e-3


def test_the_deployed_model_of_implicit_training_is_the_minimum(make_model, make_step, make_batch, perturbed):
    """On batches that are drawn once; the conjugate gradients have no part in it."""
    sources = [make_batch(ROWS, 20 + seed) for seed in range(2)]
    options = {"proximal": 2.0, "scope": ("shared", "task")}
    strategy = GradientTransfer(ETA, num_steps=2, mode="implicit", **options)
    step, state = make_step(make_model(), strategy, batches=stacked(*sources))
    state = perturbed(state, 0.2)
    deployed = step.evaluated(state)
    close(deployed, jax.jit(lambda params: minimum(params, sources, **options))(state.params))
    np.testing.assert_array_equal(deployed["tables/user/rows"], state.params["tables/user/rows"])


# Numbers, combinations and devices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "implicit", "sign": 1}, "transfer.mode 'implicit' fits the source and has sign 1; expected -1"),
        ({"mode": "joint", "source_weight": 0.5}, "transfer.source_weight is 0.5 in mode 'joint'"),
        ({"mode": "implicit", "source_weight": 0.5}, "transfer.source_weight is 0.5 in mode 'implicit'"),
        ({"mode": "update", "source_weight": 0.5}, "transfer.source_weight is 0.5 in mode 'update'"),
        ({"source_weight": -0.5}, r"transfer.source_weight is -0.5; expected a number in \[0"),
        ({"mode": "joint", "rho": -1.0}, r"transfer.rho is -1.0; expected a number in \[0"),
        ({"mode": "joint", "rho": float("inf")}, "transfer.rho is inf; expected a number"),
        ({"mode": "implicit", "proximal": 0.0}, r"transfer.proximal is 0.0; expected a number in \(0"),
        ({"mode": "implicit", "num_cg_steps": 0}, "transfer.num_cg_steps is 0; expected a whole number from 1"),
    ],
    ids=str,
)
def test_numbers_out_of_range_or_of_another_mode_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GradientTransfer(**options)


def test_the_source_weight_belongs_to_the_program_and_the_couplings_are_numbers():
    one, other = (GradientTransfer(source_weight=weight) for weight in (0.1, 0.2))
    assert structure(one) != structure(other)
    assert jax.tree.leaves(GradientTransfer(0.1, rho=0.2, proximal=0.3)) == [0.1, 0.2, 0.3]


def train_on_devices(path):
    """Writes what a few steps on one and on four devices lead to, of a program for virtual devices."""
    sys.path.append(str(pathlib.Path(__file__).parents[1] / "train"))
    from devices_program import rows, train

    for count in (1, 4):
        strategy = GradientTransfer(0.1, source_weight=0.5)
        found = train(("jit", count), adaptation=strategy, balancer=equal(), batches=stacked(as_batch(rows())))
        np.savez(f"{path}/{count}.npz", **{name: array for name, array in found.items() if array is not None})


@pytest.mark.slow
def test_four_devices_train_what_one_does(tmp_path):
    """Rows of target and source lie on all of them, and the parameters on each."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ.get('XLA_FLAGS', '')}"}
    command = [sys.executable, __file__, tmp_path]
    run = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "1.npz") as alone, np.load(tmp_path / "4.npz") as spread:
        assert alone.files == spread.files and "sharing/experts/layers/0/kernel" in alone
        for name in alone.files:
            np.testing.assert_allclose(spread[name], alone[name], rtol=1e-5, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    train_on_devices(sys.argv[1])
