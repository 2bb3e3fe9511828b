"""A strategy's penalty on rows enters a step as the gradient of its weighted mean over the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing import equal, pcgrad
from mtl_jax.data.batching import as_batch, take
from mtl_jax.sharing import DSelectK
from mtl_jax.train import Optimizer, Step
from mtl_jax.train.state import Functional


@pytest.mark.parametrize(("balancer", "micro_batches"), [(equal(), 2), (pcgrad(), 1)], ids=["equal, parts", "pcgrad"])
def test_it_is_added_after_balancing(small_schema, make_model, make_rows, balancer, micro_batches):
    descent = Optimizer(optax.identity(), learning_rate=1.0)
    batch = take(as_batch(make_rows(small_schema, 12)), jnp.array([*range(10), -1, -1]))  # two rows are padding

    def after(entropy):
        sharing = functools.partial(DSelectK, num_experts=3, expert_units=(4,), entropy=entropy)
        model = make_model(small_schema, sharing)
        step, state = Step.of(
            model,
            small_schema.tasks,
            key=jax.random.key(0),
            balancer=balancer,
            optimizer=descent,
            micro_batches=micro_batches,
        )
        return model, jax.jit(step)(state, batch)[0].params

    model, without = after(0.0)
    _, penalised = after(2.0)
    functional, params, rest = Functional.of(model)

    def entropy(params):
        """2 H of all tasks' selectors, by the part of the penalty that has the factor."""
        merged = functional.merge(params, rest)
        inputs = merged.inputs(batch)
        x = merged.common(inputs).x
        penalties = sum(
            merged.sharing.task[t].penalty(x, 2.0) - merged.sharing.task[t].penalty(x, 0.0) for t in merged.task_names
        )
        return jnp.vdot(batch["weight"], penalties) / batch["weight"].sum()

    expected = jax.jit(jax.grad(entropy))(params)
    moved = [path for path in params if np.abs(expected[path]).max() > 1e-6]
    assert any("code" in path for path in moved) and any("tables" in path for path in moved)
    for path in params:
        np.testing.assert_allclose(without[path] - penalised[path], expected[path], rtol=1e-3, atol=2e-6, err_msg=path)
