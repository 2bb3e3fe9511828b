"""What modules change without a gradient: running moments of a step that is taken, of one that is not, and of parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.balancing import equal, graddrop, modo
from mtl_jax.data.batching import as_batch
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.nn import BatchNorm, Context, PartitionedNorm, StackedBatchNorm, State, stream
from mtl_jax.sharing import ResFlow
from mtl_jax.train import BalancingOptions, Member, Objective, Step, fit, fit_many
from mtl_jax.train.state import Functional

SHARING = functools.partial(ResFlow, units=(4, 3), logits=False, dropout=0.0)
ROWS = 24


@pytest.fixture
def problem(small_schema, make_model, make_rows):
    """A model that normalises by moments of the batch, and rows, the last four of which are padding."""
    batch = as_batch(make_rows(small_schema, ROWS))
    weight = jnp.asarray(np.where(np.arange(ROWS) < ROWS - 4, batch["weight"], 0))
    return make_model(small_schema, SHARING), small_schema, batch | {"weight": weight}


def one_step(problem, batch=None, **options):
    model, schema, rows = problem
    options = {"balancer": equal()} | options
    step, state = Step.of(model, schema.tasks, key=jax.random.key(0), **options)
    return step, state, jax.jit(step)(state, rows if batch is None else batch)[0]


def test_a_step_takes_over_what_its_forward_pass_assigned(problem):
    model, _, batch = problem
    step, before, after = one_step(problem)
    assert len(step.functional.state_paths) == 3 * 2 * 2  # mean, variance and their share, of two layers, of two tasks
    functional, params, rest = Functional.of(model)
    alone = functional.merge(params, rest)
    context = Context(train=True, rngs=stream(jax.random.key(0), "any"), step=jnp.int32(0))
    common = alone.common(alone.inputs(batch), context)
    for task in alone.task_names:
        alone.head(task, common, context)
    for path, expected in functional.states(alone).items():
        np.testing.assert_allclose(after.rest[path], expected, rtol=1e-5, atol=1e-6)
        assert np.any(np.asarray(after.rest[path]) != before.rest[path]), path


def test_padding_rows_do_not_enter(problem):
    _, _, batch = problem
    other = batch | {"dense": batch["dense"].at[-4:].set(1e3)}
    expected = one_step(problem)[2].rest
    for path, found in one_step(problem, other)[2].rest.items():
        np.testing.assert_allclose(found, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_a_step_that_is_skipped_leaves_them(problem):
    _, _, batch = problem
    labels = batch["labels"] | {"spend": jnp.full(ROWS, jnp.inf)}
    mask = batch["mask"] | {"spend": jnp.ones(ROWS)}
    skip = Objective(nonfinite="skip")
    _, before, after = one_step(problem, batch | {"labels": labels, "mask": mask}, objective=skip)
    for path, array in before.rest.items():
        np.testing.assert_array_equal(after.rest[path], array)


@pytest.mark.parametrize("steps", [1, 3, 40])
@pytest.mark.parametrize("kind", ["batch", "stacked", "partitioned"])
def test_a_model_of_few_steps_is_evaluated_as_it_was_trained(kind, steps):
    """The running moments start at 0; what is left of that does not enter. Inputs are as small as new tables."""
    norm = {"batch": BatchNorm(3), "stacked": StackedBatchNorm(2, 3), "partitioned": PartitionedNorm(3, 2)}[kind]
    x = jnp.asarray(0.3 + 0.1 * np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)
    x = jnp.stack([x, 2 * x]) if kind == "stacked" else x
    context = Context(domain=jnp.arange(8) % 2)
    for _ in range(steps):
        trained = norm(x, context._replace(train=True))
    np.testing.assert_allclose(norm(x, context), trained, rtol=1e-3, atol=1e-3)
    assert np.abs(np.asarray(norm.mean[...])).max() < 0.7 * (1 - 0.99**steps)  # the stored ones are on their way


def test_they_stay_in_float32(problem):
    step, _, after = one_step(problem, precision="bfloat16")
    exact = one_step(problem)[2]
    for path in step.functional.state_paths:
        assert after.rest[path].dtype == jnp.float32
        np.testing.assert_allclose(after.rest[path], exact.rest[path], rtol=0.02, atol=1e-3)


def test_independent_batches_of_a_method_move_them_one_after_the_other(problem):
    """modo cuts a batch in three: the weight of the first moments is that of three steps."""
    step, before, after = one_step(problem, balancer=modo())
    for path in step.functional.state_paths:
        if path.endswith("variance"):
            gone = np.asarray(after.rest[path]) - 0.99**3 * np.asarray(before.rest[path])
            assert np.all(gone >= -1e-6), path  # what was added are variances


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"micro_batches": 2}, "'ResFlow' keeps statistics of whole batches, and trainer.micro_batches=2 computes"),
        (
            {"balancer": graddrop(), "options": BalancingOptions(scope="representation")},
            "'ResFlow' keeps statistics of whole batches, and balancing 'GradDrop' at scope 'representation'",
        ),
    ],
)
def test_batches_in_parts_are_refused(problem, options, said):
    with pytest.raises(ConfigError, match=said):
        one_step(problem, **options)


def test_selection_and_resume_keep_them(small_schema, make_model, make_data, tmp_path):
    """A run that was stopped after every call ends with the moments of one that was not."""
    data, options = make_data(small_schema), {"epochs": 3, "batch_size": 16, "steps_per_call": 1}

    def run(**more):
        return fit(make_model(small_schema, SHARING), data, patience=0, **options, **more)

    whole = run()
    calls = iter(range(100))
    more = {"checkpoints": tmp_path, "checkpoint_seconds": 0, "should_stop": lambda: next(calls) == 4}
    with pytest.raises(Interrupted):
        run(**more)
    resumed = run(checkpoints=tmp_path)
    for one, other in zip(states(whole.model), states(resumed.model), strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(np.any(array != 0) for array in states(whole.model))


def test_runs_side_by_side_keep_their_own(small_schema, make_model, make_data):
    data, options = make_data(small_schema), {"epochs": 2, "batch_size": 16, "patience": 0, "steps_per_call": 2}
    members = [Member(functools.partial(make_model, small_schema, SHARING, seed=seed), seed=seed) for seed in (0, 1)]
    together = dict(fit_many(members, data, axis="vmap", **options))
    for seed in (0, 1):
        alone = fit(make_model(small_schema, SHARING, seed=seed), data, seed=seed, **options)
        for one, other in zip(states(alone.model), states(together[seed].model), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    assert any(np.any(one != other) for one, other in zip(*(states(together[s].model) for s in (0, 1)), strict=True))


def states(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, State))]
