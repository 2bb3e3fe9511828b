"""Linear probing, BitFit and rates by depth: what is trained, and how far it moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.sharing import PLE, MMoE, ResFlow, SharedBottom
from mtl_jax.train import Optimizer, SlantedTriangular
from mtl_jax.transfer import BitFit, DiscriminativeLR, FineTune, LinearProbe
from mtl_jax.transfer.discriminative_lr import groups

LAYERS = "sharing/bottom/layers"


def test_a_linear_probe_with_decay_is_ridge_regression_on_what_the_source_computes(
    make_model, make_step, make_batch, arrays_of
):
    """Of the regression task, with a linear tower: (2 H'W H / w + a I) theta = 2 H'W y / w, the bias among H."""
    model, batch, decay = make_model(3, towers=(), units=(4,)), make_batch(30), 0.2
    optimizer = Optimizer(optax.identity(), learning_rate=0.2, weight_decay=decay)
    step, state = make_step(model, LinearProbe(), optimizer=optimizer)
    state = jax.jit(lambda state: jax.lax.fori_loop(0, 1500, lambda _, s: step(s, batch)[0], state))(state)

    features = np.asarray(model.common(model.inputs(batch)), np.float64)
    features = np.concatenate([features, np.ones((30, 1))], axis=1)
    weight = np.asarray(batch["weight"] * batch["mask"]["spend"], np.float64)
    weight, labels = weight / weight.sum(), np.where(weight > 0, batch["labels"]["spend"], 0)
    normal = 2 * features.T @ np.diag(weight) @ features + decay * np.eye(5)
    expected = np.linalg.solve(normal, 2 * features.T @ (weight * labels))
    found = [state.params[f"task/spend/tower/head/{name}"] for name in ("kernel", "bias")]
    np.testing.assert_allclose(np.append(*found), expected, rtol=1e-5, atol=1e-6)
    for path, array in arrays_of(model).items():
        if not path.startswith("task/"):
            np.testing.assert_array_equal(step.evaluated(state)[path], array)


@pytest.mark.parametrize(("strategy", "same"), [(FineTune(), False), (LinearProbe(), True)])
def test_what_lies_below_a_probe_runs_without_dropout(strategy, same, make_model, make_step, make_batch):
    """Shared layers have dropout here and towers have none: nothing is then drawn."""
    step, state = make_step(make_model(dropout=0.5, towers=()), strategy)
    run, keys = jax.jit(step), (jax.random.key(0), jax.random.key(1))
    after = [run(state._replace(key=key), make_batch(20))[0].params for key in keys]
    assert all(np.array_equal(after[0][path], after[1][path]) for path in after[0]) == same


@pytest.mark.parametrize(("strategy", "same"), [(FineTune(), False), (LinearProbe(), True)])
def test_running_moments_below_a_probe_stay(strategy, same, make_model, make_step, make_batch):
    model = make_model(sharing=ResFlow, units=(4,), logits=False, dropout=0.0)
    step, state = make_step(model, strategy)
    after, _ = jax.jit(step)(state, make_batch(20))
    shared = [path for path in step.functional.state_paths if "/task/" not in path]
    assert shared and all(np.array_equal(after.rest[path], state.rest[path]) for path in shared) == same


def test_a_probe_may_be_followed_by_fine_tuning_of_all(arrays_of, make_model):
    paths = arrays_of(make_model())
    probe, everything = LinearProbe(then_all=True).phases()
    assert {path for path in paths if probe(path)} == {path for path in paths if path.startswith("task/")}
    assert all(map(everything, paths))
    assert len(LinearProbe().phases()) == 1


PATHS = {
    "sharing/layers/0/kernel": False,
    "sharing/layers/0/bias": True,
    "sharing/norms/0/scale": False,
    "sharing/task/click/kernel": True,
    "task/click/tower/head/kernel": True,
    "tables/bias/rows": False,
    "encoder/norm/bias": None,
    "sharing/batch_norm/bias": None,
    "sharing/norms/0/bias": None,
}
"""Path -> whether it is trained; None: where shifts of normalisations are."""


@pytest.mark.parametrize("include_norm", [False, True])
def test_bitfit_trains_biases_and_what_is_a_tasks_own(include_norm):
    (trained,) = BitFit(include_norm=include_norm).phases()
    for path, expected in PATHS.items():
        assert trained(path) == (include_norm if expected is None else expected), path


def test_bitfit_needs_a_bias_in_shared_layers(make_model, make_step):
    """Those of towers are trained in any case."""
    with pytest.raises(ConfigError, match="transfer 'BitFit' trains biases and the shared layers have none"):
        make_step(make_model(sharing=SharedBottom, units=()), BitFit())


@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_updates_under_adam_are_scaled_exactly(way, make_model, make_step, make_batch):
    """A gradient that is scaled would leave Adam's update as it is."""
    found = {}
    for strategy in (FineTune(), DiscriminativeLR(2.6)):
        optimizer = Optimizer(learning_rate=0.01, weight_decay=0.1)
        step, state = make_step(make_model(), strategy, optimizer=optimizer, table_updates={"user": way})
        gone = state.params | state.tables
        zero = {path: jnp.zeros_like(array) for path, array in gone.items()}
        after, _ = jax.jit(step)(state, make_batch(20))
        moved = after.params | after.tables
        found[type(strategy)] = {path: np.asarray(moved[path], np.float64) - gone[path] for path in zero}
    for path, depth in groups(found[FineTune]).items():
        expected = found[FineTune][path] / 2.6**depth
        np.testing.assert_allclose(found[DiscriminativeLR][path], expected, atol=1.5e-7, err_msg=path)
        assert np.any(np.abs(expected) > 3e-4), path


def test_under_a_schedule_a_group_moves_by_its_factor_of_the_top_groups_step(make_model, make_step):
    """All arrays have one gradient, another in every step: while the rate rises, falls, and after its end."""
    schedule = SlantedTriangular(0.01, 10, cut_frac=0.3)
    step, state = make_step(make_model(), DiscriminativeLR(2.6), optimizer=Optimizer(learning_rate=schedule))
    paths = [*state.params, *state.tables]
    params = {path: jnp.zeros(3) for path in paths}
    together, alone = step.optimizer.dense(), {path: step.optimizer.rows(path) for path in paths}
    states = together.init(params), {path: one.init(params[path]) for path, one in alone.items()}
    plain = optax.scale_by_adam()
    state_of_plain = plain.init(jnp.zeros(3))
    for number in range(13):
        gradient = jnp.asarray(np.random.default_rng(number).normal(size=3), jnp.float32)
        dense, first = together.update(dict.fromkeys(paths, gradient), states[0], params)
        rows = {path: one.update(gradient, states[1][path], params[path]) for path, one in alone.items()}
        states = first, {path: own for path, (_, own) in rows.items()}
        direction, state_of_plain = plain.update(gradient, state_of_plain)
        top = dense["task/click/tower/head/kernel"]
        np.testing.assert_allclose(top, -schedule(number) * direction, rtol=1e-6)
        for path, depth in groups(params).items():
            np.testing.assert_array_equal(dense[path], 2.6**-depth * top, err_msg=path)
            np.testing.assert_allclose(rows[path][0], dense[path], rtol=3e-7, err_msg=path)
    assert sorted(set(groups(params).values())) == [0, 1, 2, 3]


def test_factors_of_rates_are_powers_of_xi(make_model, make_step):
    step, _ = make_step(make_model(), DiscriminativeLR(2.6), optimizer=Optimizer(rate_scale={"bias": 3.0}))
    factors = {path: step.optimizer.rate(path, 0) / step.optimizer.learning_rate for path in groups(step_paths(step))}
    assert factors["task/click/tower/head/kernel"] == 1
    assert factors[f"{LAYERS}/1/kernel"] == pytest.approx(2.6**-1, rel=1e-12)
    assert factors[f"{LAYERS}/0/kernel"] == pytest.approx(2.6**-2, rel=1e-12)
    assert factors["tables/user/rows"] == pytest.approx(2.6**-3, rel=1e-12)
    assert factors[f"{LAYERS}/0/bias"] == pytest.approx(3 * 2.6**-2, rel=1e-12)


def step_paths(step):
    return dict.fromkeys(step.functional.param_paths)


def test_groups_go_from_towers_over_layers_from_the_top_to_tables(make_model, arrays_of):
    found = groups(arrays_of(make_model(sharing=MMoE, num_experts=2, expert_units=(5, 4), towers=(4,))))
    assert {depth: path for path, depth in found.items() if path.endswith(("kernel", "rows"))} == {
        0: "task/spend/tower/hidden/layers/0/kernel",
        1: "sharing/experts/layers/1/kernel",
        2: "sharing/experts/layers/0/kernel",
        3: "tables/user/rows",
    }
    assert found["sharing/task/click/kernel"] == 0
    assert groups({"encoder/kernel": 0, "task/a/kernel": 0, "tables/x/rows": 0}) == {
        "encoder/kernel": 1,
        "task/a/kernel": 0,
        "tables/x/rows": 2,
    }


def test_a_level_nearer_to_the_input_is_a_group_further_down(make_model, arrays_of):
    """Layers of experts are numbered inside of each level, and the last level has no number."""
    options = {"sharing": PLE, "levels": ((6,), (5,), (4,))}
    found = groups(arrays_of(make_model(**options)))
    parts = ("levels/0/experts", "levels/1/experts", "shared")
    depths = [{depth for path, depth in found.items() if path.startswith(f"sharing/{part}/")} for part in parts]
    for lower, upper in zip(depths[:-1], depths[1:], strict=True):
        assert min(lower) > max(upper) >= 1


def test_without_a_factor_no_rate_is_scaled(make_model, make_step):
    step, _ = make_step(make_model(), DiscriminativeLR(1.0))
    assert step.optimizer.rate_scale == {}
