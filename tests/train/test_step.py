"""The train step: padding, non-finite steps, runs side by side, and what its program contains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing import equal, fixed, mgda, ntkmtl, pcgrad, uncertainty
from mtl_jax.data.batching import as_batch, epoch_order, take
from mtl_jax.errors import ConfigError
from mtl_jax.sharing import SharedBottom
from mtl_jax.tasks import Task
from mtl_jax.train import BalancingOptions, Objective, Optimizer, Step, compile_step
from mtl_jax.train.loop import run_steps
from mtl_jax.train.parallel import Devices


@pytest.fixture(scope="module")
def make_step(make_model):
    """(schema, sharing) -> step and state, the larger tables by rows."""

    def build(schema, sharing="shared_bottom", *, seed=0, dropout=0.0, sparse=True, **options):
        options.setdefault("balancer", equal())
        return Step.of(
            make_model(schema, sharing, seed=seed, dropout=dropout),
            schema.tasks,
            key=jax.random.key(seed),
            table_updates={schema.vocabularies[-1].name: "sparse" if sparse else "dense"},
            **options,
        )

    return build


def everything(state):
    """All arrays that carry meaning, as NumPy; the key as its words, the scratch left out."""
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key), slots={}))


def assert_same(one, other, **tolerance):
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: compare(a, b, **tolerance), everything(one), everything(other))


def test_padding_changes_nothing(rich_schema, make_step, make_rows):
    """Rows of weight 0 with NaN labels and other ids: the same step, also for the moments of the rows they name."""
    rows = as_batch(make_rows(rich_schema, 40))
    rows["labels"] = {name: jnp.where(jnp.arange(40) < 24, y, y.dtype.type(np.nan) if y.dtype == np.float32 else -1)
                      for name, y in rows["labels"].items()}  # fmt: skip
    step, state = make_step(rich_schema)
    program = jax.jit(step)
    state, _ = program(state, take(rows, jnp.arange(24)))  # every moment is at work
    order = jnp.concatenate([jnp.arange(8), jnp.full(16, -1)])
    padded = take(rows, jnp.arange(24)) | {"weight": jnp.where(order >= 0, rows["weight"][:24], 0)}
    other = take(rows, jnp.concatenate([jnp.arange(8), jnp.arange(24, 40)])) | {"weight": padded["weight"]}
    outcomes = [program(state, batch) for batch in (take(rows, order), padded, other)]
    alone = jax.jit(step)(state, take(rows, jnp.arange(8)))
    for outcome in outcomes:
        assert_same(outcome[0], alone[0], rtol=1e-5, atol=1e-7)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), outcome[1], alone[1])


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_nonfinite_steps(small_schema, make_step, make_rows, nonfinite):
    """The step of a NaN feature leaves every array alone; ``raise`` stops for good, ``skip`` counts it and goes on."""
    rows = as_batch(make_rows(small_schema, 24, observed=1.5))
    rows["dense"] = rows["dense"].at[9].set(jnp.nan)
    step, before = make_step(small_schema, balancer=uncertainty(), objective=Objective(nonfinite=nonfinite))
    program = jax.jit(step)
    good, _ = program(before, take(rows, jnp.arange(8)))
    bad, sums = program(good, take(rows, jnp.arange(8, 16)))
    after, later = program(bad, take(rows, jnp.arange(16, 24)))
    raises = nonfinite == "raise"
    assert_same(bad, good._replace(live=jnp.array(not raises), step=good.step + (not raises)))
    assert (int(sums.steps), int(sums.skipped), sums.nonfinite.tolist()) == (0, 1, [1, 1])
    assert not np.any(sums.numerator) and not np.any(sums.denominator) and not np.any(sums.weight)
    if raises:
        assert_same(after, bad)
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(later))
    else:
        assert bool(after.live) and int(later.steps) == 1 and int(after.step) == 3
        changed = {path for path in after.params if np.any(after.params[path] != bad.params[path])}
        assert changed >= {path for path in after.params if "kernel" in path}


def test_one_tasks_overflow_is_told_from_the_others(small_schema, make_step, make_rows):
    """A label beyond float32 makes one loss infinite; only that task is named."""
    rows = as_batch(make_rows(small_schema, 8, observed=1.5))
    rows["labels"]["spend"] = rows["labels"]["spend"].at[3].set(1e30)
    step, state = make_step(small_schema)
    new, sums = jax.jit(step)(state, rows)
    assert sums.nonfinite.tolist() == [0, 1]
    assert_same(new, state._replace(live=jnp.array(False)))


def test_a_gradient_can_break_without_a_loss(small_schema, make_step, make_rows):
    """A NaN feature in a row that no task observes reaches the gradient only: no update, and no task is blamed."""
    rows = as_batch(make_rows(small_schema, 8, observed=1.5))
    rows["dense"] = rows["dense"].at[3].set(jnp.nan)
    rows["mask"] = {name: mask.at[3].set(0) for name, mask in rows["mask"].items()}
    step, state = make_step(small_schema)
    new, sums = jax.jit(step)(state, rows)
    assert (int(sums.skipped), sums.nonfinite.tolist()) == (1, [0, 0])
    assert_same(new, state._replace(live=jnp.array(False)))


def test_weighted_sums(small_schema, make_step, make_rows):
    """Numerators over denominators of three steps give the mean loss over all their rows."""
    rows = as_batch(make_rows(small_schema, 24))
    frozen = Optimizer(optax.set_to_zero(), learning_rate=1.0)
    step, state = make_step(small_schema, optimizer=frozen, balancer=equal(reduction="mean"))
    program = jax.jit(step)
    _, first = program(state, take(rows, jnp.arange(8)))
    _, rest = program(state, take(rows, jnp.arange(8, 16)))
    _, last = program(state, take(rows, jnp.arange(16, 24)))
    _, whole = jax.jit(step)(state, rows)
    for name in ("numerator", "denominator"):
        total = sum(getattr(sums, name) for sums in (first, rest, last))
        np.testing.assert_allclose(total, getattr(whole, name), rtol=1e-5)
    expected = (rows["weight"] * rows["mask"]["click"]).sum()
    np.testing.assert_allclose(whole.denominator[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(whole.weight, [0.5, 0.5])


def test_runs_side_by_side(small_schema, make_step, make_rows):
    """vmap over stacked states equals each run by itself, dropout and balancer draws included."""
    rows = as_batch(make_rows(small_schema, 16))
    made = [make_step(small_schema, "mmoe", seed=seed, dropout=0.2, balancer=pcgrad()) for seed in range(3)]
    step = made[0][0]
    run = run_steps(step)
    order = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(16), (3, 1)), axis=1))
    arguments = (rows, order, jnp.int32(3))
    alone = [jax.jit(run)(state, *arguments)[0] for _, state in made]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in made))
    together, _ = jax.jit(jax.vmap(run, in_axes=(0, None, None, None)))(stacked, *arguments)
    for index, state in enumerate(alone):
        assert_same(jax.tree.map(lambda leaf, index=index: leaf[index], together), state, rtol=1e-5, atol=1e-6)
    assert np.any(everything(alone[0]).params["task/click/tower/head/kernel"]
                  != everything(alone[1]).params["task/click/tower/head/kernel"])  # fmt: skip


def equations(jaxpr):
    """All equations of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_program_stays_on_the_device(rich_schema, make_step, make_rows):
    """Twenty steps are one trace and one program, without callbacks and without transfers; the state is donated."""
    traces = []

    class Counting(SharedBottom):
        def common(self, x, context=None):
            traces.append(1)
            return super().common(x, context)

    step, state = make_step(rich_schema, functools.partial(Counting, units=(5,)), dropout=0.1, balancer=pcgrad())
    rows = as_batch(make_rows(rich_schema, 40))
    run = run_steps(step)
    orders = [epoch_order(40, 16, seed=0, epoch=epoch) for epoch in range(7)]
    arguments = jax.device_put([(np.pad(order, ((0, 1), (0, 0)), constant_values=-1), np.int32(3)) for order in orders])
    traced = jax.jit(run, donate_argnums=0).trace(state, rows, *arguments[0])
    names = {equation.primitive.name for equation in equations(traced.jaxpr.jaxpr)}
    assert {"dot_general", "while", "scatter"} <= names
    assert not {name for name in names if "callback" in name or "debug" in name or name in ("infeed", "outfeed")}
    program = compile_step(run)
    state, _ = program(state, rows, *arguments[0])
    counted, first = len(traces), state.params["task/click/tower/head/kernel"]
    with jax.transfer_guard("disallow"):
        for padded in arguments[1:]:
            state, sums = program(state, rows, *padded)
    assert int(state.step) == 21
    assert len(traces) == counted
    assert program._cache_size() == 1
    assert first.is_deleted()
    assert np.all(np.isfinite(sums.numerator))


def test_results_do_not_depend_on_steps_per_call(small_schema, make_step, make_rows):
    """Seven steps in one call, one by one, and in calls of three: the same bits."""
    rows = as_batch(make_rows(small_schema, 40))
    orders = jnp.asarray(np.concatenate([epoch_order(40, 12, seed=1, epoch=epoch) for epoch in range(2)]))[:7]
    finals = []
    for size in (7, 1, 3):
        step, state = make_step(small_schema, dropout=0.3, balancer=pcgrad())
        program, total = compile_step(run_steps(step)), 0.0
        for start in range(0, 7, size):
            part = orders[start : start + size]
            padded = jnp.concatenate([part, jnp.full((size - len(part), 12), -1, jnp.int32)])
            state, sums = program(state, rows, padded, jnp.int32(len(part)))
            total += np.asarray(sums.numerator, np.float64)
        assert int(state.step) == 7
        finals.append((state, total))
    for state, total in finals[1:]:
        assert_same(state, finals[0][0])
        np.testing.assert_allclose(total, finals[0][1], rtol=1e-5)


def test_state_keeps_its_structure(rich_schema, make_step, make_rows):
    """Shapes and types after a step are those before, so that a loop can carry it and a checkpoint can hold it."""
    step, state = make_step(rich_schema, "mmoe", balancer=uncertainty())
    new, _ = jax.eval_shape(step, state, as_batch(make_rows(rich_schema, 8)))
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert describe(new) == describe(state)


def test_the_models_arrays_are_copied(small_schema, make_model, make_step, make_rows):
    """A donated state must not take the model's arrays with it."""
    model = make_model(small_schema)
    step, state = Step.of(model, small_schema.tasks, key=jax.random.key(0), balancer=equal())
    compile_step(step)(state, as_batch(make_rows(small_schema, 8)))
    outputs = model(as_batch(make_rows(small_schema, 8)))
    assert np.all(np.isfinite(outputs["click"]))


def test_tasks_must_be_the_models(small_schema, make_model):
    tasks = small_schema.tasks[::-1]
    with pytest.raises(ConfigError, match=r"\['spend', 'click'\].*built for \['click', 'spend'\]"):
        Step.of(make_model(small_schema), tasks, key=jax.random.key(0), balancer=equal())


def test_unknown_compilation_is_refused():
    with pytest.raises(ConfigError, match="parallel is 'magic'; expected one of"):
        Devices("magic")


@pytest.mark.parametrize(
    ("balancer", "options"),
    [
        pytest.param(equal(), {}, id="losses", marks=pytest.mark.slow),
        pytest.param(uncertainty(), {}, id="weights from losses"),
        pytest.param(equal(), {"head_gradient": "plain"}, id="plain heads", marks=pytest.mark.slow),
        pytest.param(pcgrad(), {"scope": "representation"}, id="representation"),
        *(
            pytest.param(pcgrad(), {"scope": scope}, id=scope, marks=pytest.mark.slow)
            for scope in ("encoder", "shared", "all")
        ),
    ],
)
def test_micro_batches_are_the_same_step(rich_schema, make_step, make_rows, balancer, options):
    """A batch in one, two and four parts, whose labels differ in number, after three steps."""
    rows = as_batch(make_rows(rich_schema, 24))
    finals = []
    for parts in (1, 2, 4):
        step, state = make_step(
            rich_schema, "mmoe", balancer=balancer, options=BalancingOptions(**options), micro_batches=parts,
            optimizer=Optimizer(optax.trace(0.9), learning_rate=0.02),
        )  # fmt: skip
        program = jax.jit(step)
        for start in (0, 8, 16):
            order = jnp.where(jnp.arange(8) < 7, jnp.arange(start, start + 8), -1)
            state, sums = program(state, take(rows, order))
        finals.append((state, sums))
    for state, sums in finals[1:]:
        assert_same(state, finals[0][0], rtol=1e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sums, finals[0][1])


def test_the_mean_of_the_parts_means_is_another_step(small_schema, make_step, make_rows):
    """What summing before dividing avoids: averaged gradients of unevenly labelled halves move elsewhere."""
    rows = as_batch(make_rows(small_schema, 8, observed=1.5))
    rows["mask"]["click"] = (jnp.arange(8) < 5).astype(jnp.float32)
    descent = Optimizer(optax.identity(), learning_rate=1.0)
    step, state = make_step(small_schema, sparse=False, optimizer=descent)
    whole, halves = (jax.jit(step)(state, take(rows, jnp.arange(*span)))[0].params for span in ((0, 8), (0, 4)))
    other = jax.jit(step)(state, take(rows, jnp.arange(4, 8)))[0].params
    path = "task/click/tower/head/bias"
    averaged = (halves[path] + other[path]) / 2
    assert np.abs(averaged - whole[path]).max() > 1e-3
    parts, state = make_step(small_schema, sparse=False, optimizer=descent, micro_batches=2)
    np.testing.assert_allclose(jax.jit(parts)(state, rows)[0].params[path], whole[path], rtol=1e-5, atol=1e-6)


def test_dropout_differs_between_micro_batches(small_schema, make_step, make_rows):
    """Two equal halves draw different masks: their common step is not the step of one of them."""
    rows = as_batch(make_rows(small_schema, 8, observed=1.5))
    twice = jnp.repeat(jnp.arange(8), 2)  # neighbours go to different parts
    losses = {}
    for parts, order in ((1, jnp.arange(8)), (2, twice)):
        step, state = make_step(small_schema, dropout=0.5, micro_batches=parts)
        _, sums = jax.jit(step)(state, take(rows, order))
        losses[parts] = np.asarray(sums.numerator) / parts
    assert np.all(losses[1] != losses[2])


def test_half_precision_is_in_the_network_only(rich_schema, make_step, make_rows):
    """bfloat16 matrix products over float32 parameters, tables, moments and losses; the step is near that of float32."""
    rows = as_batch(make_rows(rich_schema, 24))
    finals = {}
    for precision in ("float32", "bfloat16"):
        step, state = make_step(
            rich_schema, "mmoe", balancer=pcgrad(), precision=precision, optimizer=Optimizer(optax.trace(0.9), 0.01)
        )
        traced = jax.make_jaxpr(step)(state, rows)
        kinds = {
            str(e.invars[0].aval.dtype) for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"
        }  # fmt: skip
        assert kinds == {"float32"} if precision == "float32" else kinds == {"float32", "bfloat16"}
        new, sums = jax.jit(step)(state, rows)
        types = {str(leaf.dtype) for leaf in jax.tree.leaves(everything(new)) if leaf.dtype.kind == "f"}
        assert types == {"float32"} and sums.numerator.dtype == jnp.float32
        finals[precision] = new, sums
    one, other = (finals[name][1].numerator for name in finals)
    np.testing.assert_allclose(one, other, rtol=0.02)
    assert np.any(one != other)
    for path, array in finals["float32"][0].params.items():
        np.testing.assert_allclose(array, finals["bfloat16"][0].params[path], atol=2e-2, err_msg=path)


def test_parameters_of_losses_keep_their_digits(small_schema, make_step, make_rows):
    """Two dispersions that are one number in bfloat16 give two losses."""
    schema = dataclasses.replace(small_schema, tasks=(Task("visits", "count", loss="negative_binomial"),))
    rows = as_batch(make_rows(schema, 8))
    rows["labels"] = {"visits": jnp.abs(rows["labels"]["visits"])}
    step, state = make_step(schema, precision="bfloat16")
    program, path, losses = jax.jit(step), "task/visits/outputs/kappa", []
    for kappa in (0.5, 0.501):
        _, sums = program(state._replace(params=state.params | {path: jnp.float32(kappa)}), rows)
        losses.append(sums.numerator[0])
    assert jnp.bfloat16(0.501) == jnp.bfloat16(0.5) and losses[0] != losses[1]


def test_average_of_a_run(small_schema, make_step, make_rows):
    """Evaluated arrays are the weighted mean of all states, dense and by rows; training itself is as without it."""
    rows = as_batch(make_rows(small_schema, 24))
    plain, state = make_step(small_schema)
    step, kept = make_step(small_schema, average=0.8)
    run, program, history = jax.jit(plain), jax.jit(step), []
    for number in range(5):
        batch = take(rows, jnp.arange(4) + 4 * number)
        state, kept = run(state, batch)[0], program(kept, batch)[0]
        history.append(plain.evaluated(state))
    assert_same(kept._replace(average={}), state)
    assert_averages(step.evaluated(kept), history, 0.8)


def assert_averages(evaluated, history, decay):
    powers = decay ** np.arange(len(history))[::-1]
    for path, array in evaluated.items():
        expected = np.tensordot(powers / powers.sum(), np.stack([arrays[path] for arrays in history]), 1)
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("sparse", [True, False])
def test_average_over_a_skipped_step(small_schema, make_step, make_rows, sparse):
    """What a step left as it was counts once more, in tables by rows, in whole tables and elsewhere alike."""
    rows = as_batch(make_rows(small_schema, 24))
    rows["dense"] = rows["dense"].at[9].set(jnp.nan)
    step, state = make_step(small_schema, average=0.8, sparse=sparse, objective=Objective(nonfinite="skip"))
    program, history = jax.jit(step), []
    for number in range(5):
        state, _ = program(state, take(rows, jnp.arange(4) + 4 * number))
        history.append(step.evaluated(state._replace(average={})))
    jax.tree.map(np.testing.assert_array_equal, history[2], history[1])
    assert_averages(step.evaluated(state), history, 0.8)


def test_frozen_parameters_are_not_differentiated(rich_schema, make_step, make_rows):
    """Only towers are trained: the program has no scatter into a table, and everything else stays bit for bit."""
    rows = as_batch(make_rows(rich_schema, 16))
    step, state = make_step(rich_schema, "mmoe", trainable=lambda path: path.startswith("task/"))
    assert state.tables == {} and all(path.startswith("task/") for path in state.params)
    traced = jax.make_jaxpr(step)(state, rows)
    assert not any(e.primitive.name.startswith("scatter") and e.outvars[0].aval.shape[:1] == (40,)
                   for e in equations(traced.jaxpr))  # fmt: skip
    new, _ = jax.jit(step)(state, rows)
    jax.tree.map(np.testing.assert_array_equal, new.rest, state.rest)
    assert all(np.any(array != state.params[path]) for path, array in new.params.items() if "kernel" in path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, r"trainer.precision is 'float16'; expected one of \['float32', 'bfloat16'\]"),
        ({"average": 1.0}, r"trainer.average is 1.0; expected a decay in \(0, 1\), or null"),
        ({"average": 0.0}, r"trainer.average is 0.0; expected a decay in \(0, 1\), or null"),
    ],
)
def test_wrong_options_are_refused(small_schema, make_step, options, message):
    with pytest.raises(ConfigError, match=message):
        make_step(small_schema, **options)


@pytest.mark.parametrize("scope", ["representation", "encoder", pytest.param("all", marks=pytest.mark.slow)])
def test_weights_between_comparisons(small_schema, make_step, make_rows, scope):
    """With parameters that stay, steps 0 and 2 find the weights of their batch, and 1 and 3 have those of before."""
    rows, seen = as_batch(make_rows(small_schema, 32, observed=1.5)), {}
    frozen = Optimizer(optax.set_to_zero(), learning_rate=1.0)
    for every in (1, 2):
        options = BalancingOptions(scope=scope, update_every=every)
        step, state = make_step(small_schema, balancer=ntkmtl(), options=options, optimizer=frozen)
        program, seen[every] = jax.jit(step), []
        for start in range(0, 32, 8):
            state, sums = program(state, take(rows, jnp.arange(start, start + 8)))
            seen[every].append((sums.weight, sums.diagnostics["direction_norm"]))
    fresh, kept = seen[1], seen[2]
    assert len({float(weights[0]) for weights, _ in fresh}) == 4
    for number in range(4):
        weights, norm = kept[number]
        np.testing.assert_allclose(weights, fresh[number - number % 2][0], rtol=1e-4)
        np.testing.assert_allclose(norm, fresh[number - number % 2][1], rtol=1e-4)


def test_weights_from_losses_are_not_kept(small_schema, make_step):
    with pytest.raises(
        ConfigError, match="update_every reuses the weights of 'Equal'; expected a method that compares"
    ):
        make_step(small_schema, options=BalancingOptions(update_every=2))
    with pytest.raises(ConfigError, match="balancing.update_every is 0; expected a whole number"):
        BalancingOptions(update_every=0)


@pytest.mark.parametrize("scope", ["representation", "encoder", pytest.param("all", marks=pytest.mark.slow)])
def test_gradients_compared_on_some_rows(small_schema, make_step, make_rows, scope):
    """Weights are those of a step on every third row; the gradient is that of fixed weights on all rows."""
    rows = as_batch(make_rows(small_schema, 24, observed=1.5))
    some = jax.tree.map(lambda column: column[::3], rows)

    def one_step(balancer, rows, **options):
        options = BalancingOptions(scope=scope, head_gradient="weighted", **options)
        step, state = make_step(small_schema, balancer=balancer, options=options, sparse=False)
        return jax.jit(step)(state, rows)

    state, sums = one_step(ntkmtl(), rows, row_stride=3)
    _, alone = one_step(ntkmtl(), some)
    np.testing.assert_allclose(sums.weight, alone.weight, rtol=1e-4)
    other, _ = one_step(fixed(weights=np.asarray(sums.weight)), rows)
    assert_same(state._replace(balancer=()), other._replace(balancer=()), rtol=1e-4, atol=1e-6)


def test_rows_are_left_out_of_comparisons_only(small_schema, make_step):
    for options in ({"balancer": equal()}, {"balancer": mgda(), "micro_batches": 2}):
        with pytest.raises(ConfigError, match="balancing.row_stride is 2 with .*; expected a method that compares"):
            make_step(small_schema, options=BalancingOptions(row_stride=2), **options)
