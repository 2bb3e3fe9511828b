"""What every balancer keeps to: one suite over all methods, each against a NumPy loop written from its formula.

All cases share one shape (8 rows masked by ``active``, 50 columns, zero where a case has fewer), so that a method
compiles a handful of times, however many cases there are. A case is a training of three steps, and its direction is
that of the last: states are not initial ones. Cases here are ordinary; odd ones are drawn in ``test_drawn_gradients.py``.
"""

import functools
import itertools

import formulas
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from methods import FIXED, INITIAL, METHODS, NUM_PARAMS, NUM_STEPS, NUM_TASKS, batches_of, train

from mtl_jax import balancing
from mtl_jax.balancing import aggregate
from mtl_jax.balancing.solvers import SolverState

NUM_CASES = 200

PRECISIONS = [
    pytest.param(np.float32, 1e-3, id="f32"),
    pytest.param(np.float64, 1e-8, id="f64", marks=pytest.mark.slow),
]


@functools.cache
def cases():
    """Jacobians [case, step, task, column] of all ranks with norm ratios to 1e3, losses and which rows are tasks."""
    rng = np.random.default_rng(0)
    jacobians = np.zeros((NUM_CASES, NUM_STEPS, NUM_TASKS, NUM_PARAMS))
    active = np.zeros((NUM_CASES, NUM_TASKS), bool)
    for jacobian, present in zip(jacobians, active, strict=True):
        num_tasks = rng.choice([1, 2, 3, 5, 8])
        num_params = rng.choice([2, num_tasks, NUM_PARAMS])
        rank = rng.integers(1, min(num_tasks, num_params) + 1)
        rows = rng.normal(size=(num_tasks, rank)) @ rng.normal(size=(rank, num_params))
        rows *= 10 ** rng.uniform(-1.5, 1.5, size=(num_tasks, 1))
        tasks = np.sort(rng.permutation(NUM_TASKS)[:num_tasks])
        for step in range(NUM_STEPS):
            factors = rng.choice([-1, 1], num_params) * rng.uniform(0.5, 2.0, num_params)
            jacobian[step, tasks, :num_params] = factors * rows
        present[tasks] = True
    losses = 10 ** rng.uniform(-2, 1, size=(NUM_CASES, NUM_STEPS, NUM_TASKS))
    return jacobians, losses, active


@functools.cache
def keys():
    return jax.random.split(jax.random.key(0), NUM_CASES)


@functools.cache
def expected(name, dtype):
    """Directions of the reference, and for each case the largest entry of a term of their sums."""
    method = METHODS[name]
    draws = [None] * NUM_CASES
    if method.draw:
        with jax.enable_x64(dtype == np.float64):
            draws = np.asarray(jax.jit(jax.vmap(method.draw))(keys()))
    directions, scales = [], []
    for jacobian, loss, present, draw in zip(*cases(), draws, strict=True):
        step = method.reference()
        tasks = np.flatnonzero(present)
        for number in range(NUM_STEPS - 1 if method.instant else 0, NUM_STEPS):
            rows = jacobian[number, tasks]
            if method.run_axis[0].num_batches > 1:
                rows = np.roll(jacobian, -number, axis=0)[:, tasks]
            terms = step(rows, loss[number, tasks], tasks, draw)
            if hasattr(step, "observe"):
                step.observe(loss[(number + 1) % NUM_STEPS, tasks])
        directions.append(terms.sum(axis=0))
        scales.append(np.abs(terms).max())
    return np.array(directions), np.array(scales)


@functools.cache
def margins():
    """How far a case is from gradients whose mixture vanishes and from dependent ones; the least of its steps."""
    least = []
    for jacobian, _, present in zip(*cases(), strict=True):
        steps = [rows[present] for rows in jacobian]
        smallest, independent = zip(*map(formulas.independence, steps), strict=True)
        least.append((min(map(formulas.stationarity, steps)), min(smallest), all(independent)))
    return tuple(np.array(values) for values in zip(*least, strict=True))


def chosen(where):
    """Which cases: ``all``, those with ``two`` or ``independent`` gradients, or ``away`` from where a mixture vanishes."""
    stationarity, smallest, independent = margins()
    return {
        "all": np.ones(NUM_CASES, bool),
        "two": (cases()[2].sum(axis=1) == 2) & independent & (stationarity > 1e-2),
        "independent": independent & (smallest > 3e-2),
        "away": stationarity > 3e-2,
    }[where]


def settled(name, dtype=np.float32):
    """Cases whose direction is not decided by rounding."""
    stationarity, smallest, _ = margins()
    single = dtype == np.float32
    return {
        "": chosen("all"),
        "ill-conditioned": chosen("all"),  # these cases are not
        "tied": chosen("all"),  # nor these
        "near stationary": stationarity > (3e-2 if single else 1e-3),
        "nearly dependent": smallest > (1e-2 if single else 1e-6),
        "dependent": chosen("independent") if single else expected(name, dtype)[1] > 0,
    }[METHODS[name].unsettled]


@functools.cache
def compiled(function, kind):
    """One program for each type of balancer: some versions of jaxlib take types with the same fields for each other."""
    return jax.jit(lambda *arguments: function(*arguments))  # anew, or jax.jit shares what it has for the function


trained = jax.vmap(train, in_axes=(None, 0, 0, 0, 0))


def evaluate(balancer, jacobians, losses, active, *, dtype=np.float32, draws=None):
    arrays = jnp.asarray(jacobians, dtype), jnp.asarray(losses, dtype), jnp.asarray(active)
    return jax.tree.map(
        np.asarray, compiled(trained, type(balancer))(balancer, *arrays, keys() if draws is None else draws)
    )


@functools.cache
def usual(method, number=0):
    """Weights, directions and state of all cases as they are."""
    return evaluate(method.run_axis[number], *cases())


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def method(name):
    return METHODS[name]


def assert_close(actual, expected, scale, tolerance, where=None):
    """Case by case, relative to ``scale``."""
    excess = np.abs(actual - expected).max(axis=-1) - tolerance * scale
    excess = np.where(np.ones(len(excess), bool) if where is None else where, excess, -np.inf)
    assert np.max(excess) <= 0, f"case {np.argmax(excess)} is off by more than {tolerance}"


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_direction_is_that_of_the_numpy_loop(name, dtype, tolerance):
    method, where = METHODS[name], settled(name, dtype)
    if dtype == np.float32:
        weights, directions, _ = usual(method)
    else:
        with jax.enable_x64(True):
            weights, directions, _ = evaluate(method.run_axis[0], *cases(), dtype=dtype)
    assert weights.dtype == directions.dtype == dtype
    assert np.sum(where) >= NUM_CASES // 4
    assert_close(directions, *expected(name, dtype), max(tolerance, method.tolerance), where)


def test_results_are_finite_and_absent_tasks_weigh_nothing(method):
    active = cases()[2]
    weights, directions, _ = usual(method)
    assert weights.shape == (NUM_CASES, NUM_TASKS)
    assert directions.shape == (NUM_CASES, NUM_PARAMS)
    assert np.all(np.isfinite(weights)) and np.all(np.isfinite(directions))
    assert np.all(weights[~active] == 0)
    assert np.any(directions != 0)
    assert np.any(weights[active] != 0) != (method.run_axis[0].needs == "jacobian")


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_homogeneity(name, factor):
    """By a power of 2, about a million, which scales without rounding."""
    balancer = METHODS[name].run_axis[0]
    if balancer.homogeneity is None:
        pytest.skip("the direction is not homogeneous")
    jacobians, losses, active = cases()
    _, directions, _ = usual(METHODS[name])
    _, scaled, _ = evaluate(balancer, factor * jacobians, losses, active)
    assert_close(scaled / factor**balancer.homogeneity, directions, expected(name, np.float32)[1], 1e-4, settled(name))


def test_order_of_the_tasks_does_not_matter(name):
    """Permuting rows, losses and per-task options leaves the direction; in the mean over keys where it draws."""
    method = METHODS[name]
    if method.ordered:
        pytest.skip(f"it does: {method.ordered}")
    order = np.random.default_rng(1).permutation(NUM_TASKS)
    jacobians, losses, active = cases()
    balancer = method.run_axis[0]
    permuted = jax.tree.map(lambda leaf: leaf[order] if np.shape(leaf) == (NUM_TASKS,) else leaf, balancer)
    if balancer.stochastic:
        case = np.flatnonzero((active.sum(axis=1) == 8) & chosen("independent"))[0]
        jacobians, losses, active = (np.repeat(array[case : case + 1], NUM_CASES, axis=0) for array in cases())
    _, directions, _ = evaluate(balancer, jacobians, losses, active)
    _, moved, _ = evaluate(permuted, jacobians[:, :, order], losses[:, :, order], active[:, order])
    if balancer.stochastic:
        difference = np.mean(moved, axis=0) - np.mean(directions, axis=0)
        error = np.sqrt((np.var(moved, axis=0) + np.var(directions, axis=0)) / NUM_CASES)
        assert np.all(np.abs(difference) <= 4 * error + 1e-5 * np.max(np.abs(directions)))
        assert np.any(moved != directions)
    else:
        assert_close(moved, directions, expected(name, np.float32)[1], 1e-3, settled(name))


def test_linear_in_positive_factors_of_the_rows(name):
    method = METHODS[name]
    if not method.linear:
        pytest.skip("the method is not linear under row scaling")
    jacobians, losses, active = cases()
    first, second = np.random.default_rng(2).uniform(0.1, 2.0, size=(2, NUM_TASKS, 1))
    balancer = method.run_axis[0]
    _, one, _ = evaluate(balancer, first * jacobians, losses, active)
    _, other, _ = evaluate(balancer, second * jacobians, losses, active)
    weights, both, _ = evaluate(balancer, (first + second) * jacobians, losses, active)
    largest_term = np.max(np.abs(weights[:, :, None] * (first + second) * jacobians[:, -1]), axis=(1, 2))
    assert_close(one + other, both, largest_term, 1e-3, settled(name))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_direction_conflicts_with_no_task(name, dtype, tolerance):
    method = METHODS[name]
    if not method.agrees:
        pytest.skip("the direction may conflict with a task")
    jacobians, losses, active = cases()
    with jax.enable_x64(dtype == np.float64):
        _, directions, _ = evaluate(method.run_axis[0], jacobians, losses, active, dtype=dtype)
    rows = jacobians[:, -1]
    gains = np.einsum("ctp,cp->ct", rows, directions) / np.maximum(np.linalg.norm(rows, axis=2), 1e-30)
    where = chosen(method.agrees)
    assert np.sum(where) >= 10
    assert_close(np.minimum(gains, 0), 0, expected(name, dtype)[1], tolerance, where)
    _, plain, _ = evaluate(balancing.equal(), jacobians, losses, active)
    assert np.any(np.einsum("ctp,cp->ct", rows, plain)[where] < 0), "no case to tell from the sum"


def test_equal_gradients_are_summed_or_averaged_as_the_method_says(method):
    balancer = method.run_axis[0]
    if balancer.scaling == "own":
        pytest.skip("the method has a length of its own")
    jacobians, losses, active = cases()
    rows = jacobians[np.arange(NUM_CASES), -1, np.argmax(active, axis=1)]
    equal = np.where(active[:, None, :, None], rows[:, None, None], 0) + np.zeros_like(jacobians)
    _, directions, _ = evaluate(balancer, equal, np.ones_like(losses), active)
    factors = active.sum(axis=1) if balancer.scaling == "sum" else np.ones(NUM_CASES)
    largest = factors * np.max(np.abs(rows), axis=1)
    assert_close(directions, method.gain * factors[:, None] * rows, largest, 1e-4)


@functools.partial(jax.vmap, in_axes=(None, 0, 0, None, None))
def called_directly(balancer, jacobian, losses, active, key):
    state = balancer.init(NUM_TASKS, jnp.zeros(NUM_PARAMS))
    if balancer.needs == "jacobian":
        return balancer.combine(jacobian, losses, state, key, active=active)
    return balancer.weigh(balancer.products(jacobian), losses, state, key, active=active)


def test_absent_tasks_are_not_read_and_keep_their_state(method):
    """Called directly, too: garbage in their entries changes nothing, and their entries of the state stay."""
    jacobians, losses, active = cases()
    case = np.flatnonzero((active.sum(axis=1) == 3) & chosen("independent"))[0]
    balancer, present = method.run_axis[0], active[case]
    jacobian = jacobians[case] if balancer.num_batches > 1 else jacobians[case, -1]
    garbage = np.where(present[:, None], jacobian, 7.0), np.where(present, losses[case, -1], 1e9)
    both = (
        jnp.asarray(np.stack(pair), jnp.float32) for pair in zip((jacobian, losses[case, -1]), garbage, strict=True)
    )
    (expected, weights), after = compiled(called_directly, type(balancer))(
        balancer, *both, jnp.asarray(present), keys()[0]
    )
    np.testing.assert_array_equal(weights, expected)
    for old, new in zip(
        jax.tree.leaves(balancer.init(NUM_TASKS, jnp.zeros(NUM_PARAMS))), jax.tree.leaves(after), strict=True
    ):
        if np.shape(old)[:1] == (NUM_TASKS,):
            np.testing.assert_array_equal(np.asarray(new)[1][~present], np.asarray(old)[~present])


def assert_nothing_happened(balancer, results):
    weights, directions, state = results
    assert not np.any(weights) and not np.any(directions)
    initial = balancer.init(NUM_TASKS, jnp.zeros(NUM_PARAMS))
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, np.stack([old] * NUM_CASES)), state, initial)


def test_without_active_tasks_nothing_happens(method):
    jacobians, losses, active = cases()
    balancer = method.run_axis[0]
    assert_nothing_happened(balancer, evaluate(balancer, jacobians, losses, np.zeros_like(active)))


def test_nothing_happens_where_a_loss_is_not_finite(method):
    jacobians, losses, active = cases()
    balancer, first = method.run_axis[0], np.argmax(active, axis=1)
    broken = losses.copy()
    broken[np.arange(NUM_CASES), :, first] = np.array([np.nan, np.inf, -np.inf])
    assert_nothing_happened(balancer, evaluate(balancer, jacobians, broken, active))


def test_null_rows_are_as_inactive_for_methods_of_gradients(method):
    """Methods of losses do not see them."""
    jacobians, losses, active = cases()
    balancer, first = method.run_axis[0], np.argmax(active, axis=1)
    nulled, without = jacobians.copy(), active.copy()
    nulled[np.arange(NUM_CASES), :, first] = 0
    weights, directions, _ = evaluate(balancer, nulled, losses, active)
    if balancer.needs == "losses":
        expected, _, _ = usual(method)
    else:
        without[np.arange(NUM_CASES), first] = False
        expected, expected_directions, _ = evaluate(balancer, jacobians, losses, without)
        np.testing.assert_array_equal(directions, expected_directions)
    np.testing.assert_array_equal(weights, expected)


def test_only_methods_that_say_so_read_the_losses(method):
    jacobians, losses, active = cases()
    _, directions, _ = usual(method)
    _, others, _ = evaluate(method.run_axis[0], jacobians, losses[:, :, ::-1] + 3.0, active)
    assert np.array_equal(directions, others) != method.run_axis[0].reads_losses


def test_one_key_gives_one_result_and_only_methods_that_say_so_draw(method):
    balancer = method.run_axis[0]
    _, directions, _ = usual(method)
    _, again, _ = evaluate(balancer, *cases())
    np.testing.assert_array_equal(again, directions)
    _, redrawn, _ = evaluate(balancer, *cases(), draws=keys()[::-1])
    assert np.array_equal(redrawn, directions) != balancer.stochastic


def leaves_but_of_solvers(results):
    """Rounding decides what residual and how many iterations a solver ends with."""
    leaves = jax.tree.leaves(results, is_leaf=lambda node: isinstance(node, SolverState))
    return [leaf for leaf in leaves if not isinstance(leaf, SolverState)]


@pytest.mark.slow
def test_a_run_axis_over_hyperparameters_is_a_loop(method):
    if not jax.tree.leaves(method.run_axis):
        pytest.skip("there is no number to map")
    few = np.flatnonzero(chosen("independent") & chosen("away") & cases()[2][:, 0] & (cases()[2].sum(axis=1) > 1))[:4]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, float) for leaf in leaves]), *method.run_axis)
    jacobians, losses, active = (jnp.asarray(array[few]) for array in cases())
    runs = jax.jit(
        jax.vmap(jax.vmap(train, in_axes=(None, 0, 0, 0, 0)), in_axes=(0, None, None, None, None), axis_size=2)
    )
    mapped = runs(stacked, jacobians.astype("f"), losses.astype("f"), active, keys()[few])
    loop = [jax.tree.map(lambda leaf: leaf[few], usual(method, number)) for number in range(2)]
    for together, *alone in zip(*map(leaves_but_of_solvers, (mapped, *loop)), strict=True):
        np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-4 * max(1, np.max(np.abs(alone))))
    assert not np.array_equal(loop[0][1], loop[1][1])


@pytest.mark.slow
def test_compiled_and_not_agree(name):
    """And :func:`aggregate` is what the suite calls."""
    balancer = METHODS[name].run_axis[0]
    case = np.flatnonzero((cases()[2].sum(axis=1) == 3) & chosen("independent") & chosen("away"))[0]
    jacobians, losses, active = (jnp.asarray(array[case]) for array in cases())
    _, directions, _ = usual(METHODS[name])
    with jax.disable_jit():
        state = balancer.init(NUM_TASKS, jnp.zeros(NUM_PARAMS))
        for jacobian, loss, after in zip(
            batches_of(balancer, jacobians), losses, jnp.roll(losses, -1, axis=0), strict=True
        ):
            direction, state = aggregate(balancer, jacobian, state, losses=loss, key=keys()[case], active=active)
            if balancer.observes:
                state = balancer.observe(after, state, active=active)
    assert_close(direction[None], directions[case], expected(name, np.float32)[1][case], 1e-4)


def test_one_trace_serves_all_steps_and_hyperparameters(method):
    traces = []

    @jax.jit
    def step(balancer, jacobian, losses, state, key):
        traces.append(1)
        draw = key if balancer.stochastic else None
        return aggregate(balancer, jacobian, state, losses=losses, key=draw)

    for balancer in method.run_axis:
        state = balancer.init(NUM_TASKS, jnp.zeros(NUM_PARAMS))
        jacobians = batches_of(balancer, jnp.asarray(cases()[0][0], jnp.float32))
        for number in range(2):
            losses = jnp.asarray(cases()[1][0, number], jnp.float32)
            # Shapes and types are all that decides about a new trace.
            _, state = jax.eval_shape(step, balancer, jacobians[number], losses, state, keys()[number])
    assert len(traces) == 1


def test_methods_with_the_same_fields_are_told_apart():
    """By the structure of the pytree, by which a jitted function chooses the program that it runs."""
    kinds = {type(method.run_axis[0]): jax.tree.structure(method.run_axis[0]) for method in METHODS.values()}
    assert not [(a, b) for a, b in itertools.combinations(kinds, 2) if kinds[a] == kinds[b]]
    for kind, structure in kinds.items():
        rebuilt = jax.tree.unflatten(structure, range(structure.num_leaves))
        assert type(rebuilt) is kind and jax.tree.structure(rebuilt) == structure
        assert jax.tree.leaves(rebuilt) == list(range(structure.num_leaves))


@pytest.mark.slow
def test_padding_changes_nothing(name):
    """Three cases by themselves, without the rows and columns that others need."""
    balancer = METHODS[name].run_axis[0]
    if balancer.stochastic:
        pytest.skip("a draw for fewer tasks or parameters is another one")
    jacobians, losses, active = cases()
    columns = np.any(jacobians, axis=(1, 2))
    with jax.enable_x64(True):
        _, directions, _ = evaluate(balancer, jacobians, losses, active, dtype=np.float64)
        for num_params in (2, 5, NUM_PARAMS):
            # Among them the first task, which may be the main one.
            fitting = (active.sum(axis=1) == 5) & active[:, 0] & (columns.sum(axis=1) == num_params)
            case = np.flatnonzero(fitting & settled(name, np.float64))[0]
            present, used = active[case], columns[case]
            few = jax.tree.map(
                lambda leaf, kept=present: leaf[kept] if np.shape(leaf) == (NUM_TASKS,) else leaf, balancer
            )
            rows = jnp.asarray(jacobians[case][:, present][:, :, used])
            _, direction, _ = jax.jit(train)(few, rows, jnp.asarray(losses[case][:, present]), jnp.ones(5, bool), None)
            assert_close(direction[None], directions[case, used], expected(name, np.float64)[1][case], 1e-8)


def directions_of(balancer):
    return evaluate(balancer, *cases())[1]


SAME = {
    "nash_mtl without clipping is fairgrad(1)": (
        balancing.nash_mtl(max_norm=None, reg_eps=1e-6),
        balancing.fairgrad(alpha=1.0, reg_eps=1e-6),
        "away",
    ),
    "pcgrad is twice upgrad for two tasks": (balancing.pcgrad(), balancing.upgrad(preference=1.0), "two"),
    "gradvac that expects no agreement is pcgrad": (balancing.gradvac(beta=0.0), balancing.pcgrad(), "all"),
    "cr_mogm without memory is its base": (balancing.cr_mogm(balancing.mgda(), alpha=0.0), balancing.mgda(), "all"),
    "cagrad in a ball of no size is the mean": (balancing.cagrad(c=0.0), balancing.equal(reduction="mean"), "away"),
    "moco that neither remembers nor mixes is the mean": (
        balancing.moco(beta=1.0, beta_sigma=0.0, gamma=0.0, rho=0.1),
        balancing.equal(reduction="mean"),
        "all",
    ),
    "excess_mtl that does not move is the mean": (
        balancing.excess_mtl(eta=0.0),
        balancing.equal(reduction="mean"),
        "all",
    ),
    "graddrop that leaks all is the sum": (balancing.graddrop(leak=np.ones(NUM_TASKS)), balancing.equal(), "all"),
    "metabalance without scaling is the sum": (balancing.metabalance(relax=0.0), balancing.equal(), "all"),
    "ntkmtl to the power of 0 is the sum": (balancing.ntkmtl(exponent=0.0), balancing.equal(), "all"),
    "ple_schedule without decay is fixed": (
        balancing.ple_schedule(initial=FIXED, decay=np.ones(NUM_TASKS), period=1),
        balancing.fixed(weights=FIXED),
        "all",
    ),
    "dwa at a high temperature is the sum": (balancing.dwa(temperature=1e9, period=1), balancing.equal(), "all"),
    "imtl_l is twice uncertainty with the other sign": (
        balancing.imtl_l(initial=INITIAL + np.log(0.5), weight_lr=0.0),
        balancing.uncertainty(likelihood="regression", initial=-INITIAL, weight_lr=0.0),
        "all",
    ),
}


@pytest.mark.parametrize("identity", SAME)
def test_methods_that_are_the_same(identity):
    one, other, where = SAME[identity]
    jacobians, losses, active = cases()
    weights, directions, _ = evaluate(other, jacobians, losses, active)
    largest_term = np.max(np.abs(weights[:, :, None] * jacobians[:, -1]), axis=(1, 2))
    assert_close(directions_of(one), directions, largest_term, 1e-3, chosen(where))


PARALLEL = {
    "config and imtl_g for independent gradients": (
        balancing.config(preference=np.ones(NUM_TASKS)),
        balancing.imtl_g(),
        "independent",
    ),
    "db_mtl without memory and ntkmtl": (balancing.db_mtl(beta=0.0, sigma=0.5), balancing.ntkmtl(), "away"),
    "geometric and scale_invariant": (balancing.geometric(), balancing.scale_invariant(), "independent"),
    "geometric and famo before it learns": (
        balancing.geometric(),
        balancing.famo(weight_lr=0.0, bound=0.0),
        "independent",
    ),
}


def units(directions):
    return directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-30)


@pytest.mark.parametrize("identity", PARALLEL)
def test_methods_of_one_direction(identity):
    one, other, where = PARALLEL[identity]
    assert_close(units(directions_of(one)), units(directions_of(other)), 1, 1e-3, chosen(where))


BISECTORS = {
    "imtl_g": balancing.imtl_g(),
    "nash_mtl": METHODS["nash_mtl"].run_axis[0],
    "fairgrad": balancing.fairgrad(alpha=1.0, reg_eps=1e-6),
    "config": balancing.config(preference=np.ones(NUM_TASKS)),
    "ntkmtl": balancing.ntkmtl(),
    "db_mtl": balancing.db_mtl(beta=0.0, sigma=0.5),
}


@pytest.mark.parametrize("name", BISECTORS)
def test_two_gradients_have_one_bisector(name):
    bisectors = np.sum(units(cases()[0][:, -1].reshape(-1, NUM_PARAMS)).reshape(-1, NUM_TASKS, NUM_PARAMS), axis=1)
    assert_close(units(directions_of(BISECTORS[name])), units(bisectors), 1, 1e-3, chosen("two"))


def test_config_is_zero_where_the_preferences_cancel():
    """Pairs of opposite gradients along two lines with a small angle: U has rank 2, and U+ p = 0."""
    one, other = np.array([1.0, 0.0]), np.array([np.cos(0.03), np.sin(0.03)])
    rows = np.outer([3.0, -5.0, 0.0, 0.0], one) + np.outer([0.0, 0.0, 2.0, -7.0], other)
    balancer = balancing.config()
    direction, _ = aggregate(balancer, jnp.asarray(rows, jnp.float32), balancer.init(4))
    assert np.max(np.abs(direction)) <= 1e-4
