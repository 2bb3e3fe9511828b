"""What the strategies for domains, for a prior and for several sets of tables claim beyond their equations."""

import functools

import cases_domains as domains
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.nn import mix
from mtl_jax.sharing import Context, MMoE, SharedBottom, SingleTask
from mtl_jax.sharing.epnet import EPNet
from mtl_jax.sharing.ppnet import PPNet
from mtl_jax.sharing.stem import STEM
from mtl_jax.train.state import Functional

cases, CASES, TASKS = domains.cases, domains.CASES, domains.cases.TASKS
X, CONTEXT = cases.rows(), cases.context()
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def draw(strategy, seed=0):
    """All parameters anew, biases and scalars too."""
    generator = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(strategy, nnx.Param)):
        variable[...] = jnp.asarray(0.6 * generator.standard_normal(variable.shape), jnp.float32)
    return strategy


def make(name, tasks=TASKS, **options):
    return draw(CASES[name].make(cases.WIDTH, tasks, rngs=nnx.Rngs(0), **options))


def run(strategy, context=CONTEXT, x=X):
    return jax.jit(lambda x: strategy(x, context))(x)


# M2M


def test_m2m_with_one_scenario_for_all_domains_does_not_know_them():
    strategy = make("m2m")
    other = CONTEXT._replace(domain=CONTEXT.domain[::-1])
    outputs = jax.jit(lambda embedding, domain: _with(strategy, embedding)(X, CONTEXT._replace(domain=domain)))
    embedding = strategy.embedding[...]
    constant = jnp.broadcast_to(embedding[0], embedding.shape)
    for task in TASKS:
        assert np.abs(outputs(embedding, CONTEXT.domain)[task] - outputs(embedding, other.domain)[task]).max() > 1e-3
        close(outputs(constant, CONTEXT.domain)[task], outputs(constant, other.domain)[task])


def _with(strategy, embedding):
    functional, params, rest = Functional.of(strategy)
    return functional.merge(params | {"embedding": embedding}, rest)


def test_m2m_tells_tasks_apart_by_their_embeddings_alone():
    strategy = make("m2m")
    strategy.task["buy"]["embedding"][...] = strategy.task["click"]["embedding"][...]
    outputs = run(strategy)
    np.testing.assert_array_equal(outputs["buy"], outputs["click"])
    assert np.abs(outputs["return"] - outputs["click"]).max() > 1e-3


# EPNet


def test_epnet_changes_nothing_at_the_start():
    strategy = CASES["epnet"].make(cases.WIDTH, TASKS, rngs=nnx.Rngs(0))
    outputs, alone = run(strategy), run(strategy.inner)
    for task in TASKS:
        close(outputs[task], alone[task])


def test_factors_of_epnet_lie_between_0_and_gamma_and_pass_no_gradient():
    strategy = make("epnet, wider gate")
    gated, pull = jax.vjp(jax.jit(lambda x: strategy.gated(x, CONTEXT)), X)
    factors = np.asarray(gated) / X
    assert factors.min() > 0 and factors.max() < 3 and factors.max() - factors.min() > 0.3
    c = np.random.default_rng(5).standard_normal(X.shape).astype(np.float32)
    close(pull(c)[0], c * factors, rtol=1e-4)


def test_epnet_hands_on_what_its_inner_strategy_takes():
    prior = functools.partial(PPNet, units=(4,), dropout=0.0)
    made = functools.partial(EPNet, 6, TASKS, num_domains=3, rngs=nnx.Rngs(0))
    assert made(inner=prior, prior_features=4, dropout=0.5).inner.task["buy"].dropout is not None
    assert made(inner=functools.partial(prior, prior_features=2)).inner.task["buy"].dropout is None
    nested = made(inner=functools.partial(EPNet, inner=prior), prior_features=4)
    assert nested.inner.inner.out_features == nested.out_features == 4
    for options, message in (
        ({"inner": prior}, "'PPNet' reads one; expected prior_features"),
        ({"inner": SingleTask}, "'SingleTask' with tables of its own"),
        ({"inner": STEM}, "'STEM' with tables of its own"),
        ({"num_domains": 0}, "num_domains is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(**options)


@pytest.mark.parametrize("name", ["m2m", "epnet", "ppnet", "m3oe"])
def test_rows_without_domain_or_prior_are_an_error(name):
    with pytest.raises(ConfigError, match=r"context.(domain|prior) is None; expected"):
        make(name).common(X, Context())


# PPNet


def test_ppnet_with_open_gates_is_single_task_on_shared_tables():
    strategy = PPNet(6, TASKS, prior_features=4, units=(7, 4), dropout=0.0, rngs=nnx.Rngs(0))
    alone = SingleTask(6, TASKS, units=(7, 4), dropout=0.0, share_embeddings=True, rngs=nnx.Rngs(1))
    for task in TASKS:
        nnx.update(alone.task[task].layers, nnx.state(strategy.task[task].layers))
    outputs, expected = run(strategy), run(alone)
    for task in TASKS:
        close(outputs[task], expected[task])


def with_constant_gates(networks, factors, x):
    """Sum of squares over tasks, the factors of every gate given."""
    total = 0.0
    for task in TASKS:
        h = x
        for layer, factor in zip(networks[task].layers, factors[task], strict=True):
            h = nnx.relu(layer(h)) * factor
        total = total + (h**2).sum()
    return total


def squares(outputs):
    return sum((outputs[task] ** 2).sum() for task in TASKS)


def test_gates_of_ppnet_train_the_prior_and_not_the_input():
    strategy = make("ppnet")
    of_x, of_prior = jax.jit(
        jax.grad(lambda x, prior: squares(strategy(x, CONTEXT._replace(prior=prior))), argnums=(0, 1))
    )(X, CONTEXT.prior)
    factors = {task: strategy.task[task].factors(X, CONTEXT.prior) for task in TASKS}
    close(of_x, jax.grad(lambda x: with_constant_gates(strategy.task, factors, x))(X), rtol=1e-4)
    assert np.abs(of_x).max() > 1e-3 and np.abs(of_prior).max() > 1e-3


def test_ppnet_takes_a_batch_of_one():
    strategy = make("ppnet")
    one = run(strategy, Context(prior=CONTEXT.prior[3:4]), X[3:4])
    for task, z in run(strategy).items():
        close(one[task], z[3:4])


def test_pepnet_is_both_one_after_the_other():
    """And no gradient passes through what the gates of either see of their input."""
    strategy = make("pepnet")
    gated = strategy.gated(X, CONTEXT)
    by_hand = run(strategy.inner, x=gated)
    for task, z in run(strategy).items():
        close(z, by_hand[task])
    factors = {task: strategy.inner.task[task].factors(gated, CONTEXT.prior) for task in TASKS}
    outer = np.asarray(gated) / X
    expected = jax.grad(lambda x: with_constant_gates(strategy.inner.task, factors, x * outer))(X)
    close(jax.jit(jax.grad(lambda x: squares(strategy(x, CONTEXT))))(X), expected, rtol=1e-4)


# M3oE


def test_m3oe_leaves_out_foreign_experts_or_all_but_the_shared_ones():
    strategy = make("m3oe")
    strategy.b_d[...] = strategy.b_t[...] = jnp.float32(40.0)  # b = 1
    functional, params, rest = Functional.of(strategy)
    rows = np.asarray(CONTEXT.domain) == 0

    def of_click(params):
        return (functional.merge(params, rest)(X, CONTEXT)["click"][rows] ** 2).sum()

    gradients = jax.jit(jax.grad(of_click))(params)
    for path, gradient in gradients.items():
        if path.startswith(("of_domains", "of_tasks")):  # click is the first task, 0 the domain
            assert np.abs(gradient[0]).max() > 1e-4 and np.abs(gradient[1:]).max() < 1e-12, path

    strategy.a_d[...] = strategy.a_t[...] = jnp.float32(-40.0)  # a = 0
    outputs, common, gates = jax.jit(
        lambda x: (strategy(x, CONTEXT), strategy.common(x, CONTEXT), strategy.gates(x, CONTEXT))
    )(X)
    for task in TASKS:
        close(outputs[task], mix(gates[f"{task}/gate"], common.shared))


def test_m3oe_for_one_domain_and_one_task_has_no_others():
    strategy = make("m3oe", ("buy",), num_domains=1)
    context = CONTEXT._replace(domain=jnp.zeros(5, jnp.int32))
    (expected,) = CASES["m3oe"].arguments(strategy)
    close(run(strategy, context)["buy"], expected(X.astype(np.float64), context, ("buy",))["buy"], rtol=1e-5, atol=1e-5)


def test_no_gradient_passes_through_the_gates_of_m3oe():
    """Where experts are constants, the output varies with x through the gates alone."""
    strategy = make("m3oe")
    for experts in (strategy.shared, strategy.of_domains, strategy.of_tasks):
        experts.layers[-1].kernel[...] = jnp.zeros_like(experts.layers[-1].kernel[...])
    x_gradient = jax.jit(jax.grad(lambda x: squares(strategy(x, CONTEXT))))(X)
    np.testing.assert_array_equal(x_gradient, 0.0)
    outputs = jax.jit(lambda x: strategy(x, CONTEXT))
    assert any(np.abs(outputs(X)[task] - outputs(-X)[task]).max() > 1e-3 for task in TASKS)


# STEM

NUMBERS = {"click": 2, "buy": 1, "return": 1}
TABLES = np.random.default_rng(7).standard_normal((5, 4, cases.WIDTH)).astype(np.float32)


def stem(stop_cross=True, **options):
    """Both kinds from the same numbers: names of the tasks' experts differ, so these are set one by one."""
    options = {"expert_units": (7, 4), "num_specific": NUMBERS, "num_shared": 2, "dropout": 0.0} | options
    strategy = STEM(cases.WIDTH, TASKS, stop_cross=stop_cross, **options, rngs=nnx.Rngs(0))
    draw(strategy.shared, 1)
    for index, task in enumerate(TASKS):
        draw(experts_of(strategy, task), 2 + index)
        draw(strategy.task[task]["gate"], 5 + index)
    return strategy


def experts_of(strategy, task):
    own = strategy.task[task]
    return own["experts"] if "experts" in own else strategy.specific[TASKS.index(task)]


@pytest.fixture(scope="module")
def stems():
    """Stopped or not -> strategy, outputs, gradients of every task's squares in parameters and in the inputs."""
    found = {}
    for stop_cross in (True, False):
        strategy = stem(stop_cross)
        functional, params, rest = Functional.of(strategy)

        def squared(params, x, functional=functional, rest=rest):
            outputs = functional.merge(params, rest)(x)
            return jnp.stack([(outputs[task] ** 2).sum() for task in TASKS])

        found[stop_cross] = (
            strategy,
            run(strategy, Context(), TABLES),
            jax.jit(jax.jacrev(squared, (0, 1)))(params, TABLES),
        )
    return found


@pytest.mark.parametrize("stop_cross", [True, False])
def test_stem_equals_its_reference_stopped_or_not(stems, stop_cross):
    strategy, outputs, _ = stems[stop_cross]
    level = {
        "specific": {task: cases.bank(experts_of(strategy, task)) for task in TASKS},
        "shared": cases.bank(strategy.shared),
        "gates": cases.by_task(strategy, lambda own: cases.gate(own["gate"])),
    }
    expected = cases.references.stem(TABLES.astype(np.float64), TASKS, [level])
    for task in TASKS:
        close(outputs[task], expected[task], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(outputs[task], stems[True][1][task], rtol=1e-6)


def test_a_task_of_stem_trains_no_other_ones_experts_and_tables(stems):
    of_params, of_tables = stems[True][2]
    for k in range(3):
        for j in range(3):
            assert (np.abs(of_tables[k, :, j]).max() > 1e-4) == (j == k)
        assert np.abs(of_tables[k, :, 3]).max() > 1e-4  # the shared tables
    for path, gradient in of_params.items():
        reached = tuple(task for task, g in zip(TASKS, gradient, strict=True) if np.abs(g).max() > 0)
        assert reached == ((label(path).removeprefix("task/"),) if path.startswith("task") else TASKS), path


def test_without_the_stop_every_task_of_stem_trains_all(stems):
    of_params, of_tables = stems[False][2]
    assert np.abs(of_tables).max(axis=(1, 3)).min() > 1e-4
    for path, gradient in of_params.items():
        owned = label(path).startswith("task/")
        assert owned == path.endswith("gate/kernel")
        reached = [task for task, g in zip(TASKS, gradient, strict=True) if np.abs(g).max() > 0]
        assert len(reached) == (1 if owned else 3), path


def test_a_gate_of_stem_is_trained_in_the_columns_of_other_tasks(stems):
    strategy, _, (of_params, _) = stems[True]
    assert strategy.gate_members()["buy/gate"] == ("click 0", "click 1", "buy 0", "return 0", "shared 0", "shared 1")
    for k, task in enumerate(TASKS):
        assert np.abs(of_params[f"task/{task}/gate/kernel"][k]).max(axis=0).min() > 1e-5
        close(strategy.gates(TABLES)[f"{task}/gate"].sum(-1), 1.0)


def test_heads_of_stem_drop_the_units_that_other_tasks_see_dropped():
    """So the values of the forward pass are those without a stop, in training too."""
    context = Context(train=True, rngs=jax.random.key(0))
    stopped, free = (run(stem(stop_cross, dropout=0.5), context, TABLES) for stop_cross in (True, False))
    evaluated = run(stem(dropout=0.5), Context(), TABLES)
    for task in TASKS:
        close(stopped[task], free[task])
        assert np.abs(stopped[task] - evaluated[task]).max() > 1e-3


def test_stem_says_which_inputs_it_reads():
    assert STEM.private_tables and STEM.shared_tables
    strategy = STEM(6, TASKS, expert_units=(4,), rngs=nnx.Rngs(0))
    for shape in ((5, 6), (5, 3, 6)):
        with pytest.raises(ConfigError, match="expected .batch, 4, in., one of each task and a shared one"):
            strategy.common(jnp.ones(shape))
    with pytest.raises(ConfigError, match="num_shared is 0"):
        STEM(6, TASKS, num_shared=0, rngs=nnx.Rngs(0))


def test_epnet_keeps_the_labels_of_its_inner_strategy():
    for inner in (MMoE, SharedBottom):
        _, params, _ = Functional.of(EPNet(6, TASKS, num_domains=2, inner=inner, rngs=nnx.Rngs(0)))
        alone = {f"inner/{path}": label(path) for path in Functional.of(inner(6, TASKS, rngs=nnx.Rngs(0)))[1]}
        assert {path: label(path) for path in params if path.startswith("inner/")} == alone
        assert all(label(path) == "shared" for path in params if not path.startswith("inner/"))
