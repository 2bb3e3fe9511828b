"""NTKMTL-SR against gradients of parts of a batch that are taken one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing import ntkmtl
from mtl_jax.balancing.ntkmtl import kernel_weights
from mtl_jax.data.batching import as_batch
from mtl_jax.errors import ConfigError
from mtl_jax.train import BalancingOptions, Step, ntkmtl_sr


@pytest.fixture
def step_of(three_task_schema, make_model, as_float64):
    """One step at the representation in float64: what it gives, and the step itself."""

    def run(balancer, rows, sharing="mmoe"):
        model = as_float64(make_model(three_task_schema, sharing, towers=()))
        options = BalancingOptions(scope="representation")
        step, state = Step.of(model, three_task_schema.tasks, key=jax.random.key(0), balancer=balancer, options=options)
        return jax.jit(step)(state, rows)

    with jax.enable_x64(True):
        yield run


@pytest.fixture
def rows(three_task_schema, make_rows, as_float64):
    with jax.enable_x64(True):
        yield as_float64(as_batch(make_rows(three_task_schema, 24)))


def test_of_one_part_it_is_ntkmtl(step_of, rows):
    (state, sums), (other_state, other_sums) = step_of(ntkmtl_sr(num_micro=1), rows), step_of(ntkmtl(), rows)
    np.testing.assert_allclose(sums.weight, other_sums.weight, rtol=1e-9)
    for path, array in other_state.params.items():
        np.testing.assert_allclose(state.params[path], array, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(sums.diagnostics["direction_norm"], other_sums.diagnostics["direction_norm"], rtol=1e-5)


@pytest.mark.parametrize("sharing", ["mmoe", pytest.param("shared_bottom", marks=pytest.mark.slow)])
def test_the_fastest_part_of_each_task_decides(step_of, rows, sharing):
    """The kernel of a part is that of ntkmtl on the rows of this part alone."""
    _, sums = step_of(ntkmtl_sr(num_micro=4), rows, sharing)
    kernels = []
    for part in range(4):
        alone = jax.tree.map(lambda column, part=part: column[part::4], rows)
        state, _ = step_of(ntkmtl_sr(num_micro=1), alone, sharing)
        kernels.append(state.balancer.kernels)
    expected = kernel_weights(jnp.max(jnp.stack(kernels), axis=0), 0.5)
    np.testing.assert_allclose(sums.weight, expected, rtol=1e-6)


def test_losses_are_those_of_the_batch(step_of, rows):
    (_, sums), (_, whole) = step_of(ntkmtl_sr(num_micro=4), rows), step_of(ntkmtl(), rows)
    np.testing.assert_allclose(sums.numerator, whole.numerator, rtol=1e-9)
    np.testing.assert_allclose(sums.denominator, whole.denominator, rtol=1e-9)


def test_weights_of_given_eigenvalues():
    """The published example: gradients of two parts with largest eigenvalues 1 and 9."""
    kernels = [np.array([[1.0, 0], [0, 1]]), np.array([[2.0, 1], [1, 2]])]
    largest = jnp.array([np.linalg.eigvalsh(z @ z.T)[-1] for z in kernels])
    np.testing.assert_allclose(kernel_weights(largest, 0.5), [3.16227766017, 1.05409255339], rtol=1e-6)


def test_other_scopes_are_refused(three_task_schema, make_model):
    with pytest.raises(ConfigError, match="expected balancing.scope one of \\['representation'\\], got 'encoder'"):
        Step.of(make_model(three_task_schema), three_task_schema.tasks, key=jax.random.key(0), balancer=ntkmtl_sr())
