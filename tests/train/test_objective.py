"""The objective against hand-worked numbers, through the real step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtl_jax.balancing import equal
from mtl_jax.data.schema import Numeric, Schema
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel
from mtl_jax.sharing import Strategy
from mtl_jax.tasks import Task
from mtl_jax.train import Objective, Optimizer, Step


class Scale(Strategy):
    """h = theta x."""

    def __init__(self, in_features, tasks, *, rngs):
        self.tasks, self.out_features = tuple(tasks), in_features
        self.theta = nnx.Param(jnp.ones(()))

    def common(self, x, context=None):
        return self.theta[...] * x

    def head(self, task, common):
        return common


class Slope(nnx.Module):
    """a = phi h."""

    def __init__(self, in_features, out_features, *, rngs):
        self.phi = nnx.Param(jnp.ones(()))

    def __call__(self, z, context=None):
        return self.phi[...] * z[:, 0]


SCHEMA = Schema((Numeric("x"),), (), (Task("one", "regression"), Task("two", "regression")))
DESCENT = Optimizer(optax.identity(), learning_rate=1.0)


@pytest.fixture
def model():
    """theta = 1, phi = (1, 2)."""
    built = MultiTaskModel(SCHEMA, sharing=Scale, towers=Slope, rngs=nnx.Rngs(0))
    built.task["two"].tower.phi[...] = jnp.array(2.0)
    return built


def batch(num_rows=3, *, masked=False):
    """x = (1, 2, 3) and two rows of labels; with ``masked`` the last label of task two is unobserved."""
    columns = {
        "ids": np.zeros((3, 0), np.int32),
        "dense": np.array([[1.0], [2], [3]], np.float32),
        "bags": {},
        "sequences": {},
        "labels": {"one": np.array([0.0, 2, 5]), "two": np.array([1, 4, np.nan if masked else 3])},
        "mask": {"one": np.ones(3), "two": np.array([1.0, 1, 0 if masked else 1])},
        "task_weight": {},
        "weight": np.ones(3),
    }
    return jax.tree.map(lambda column: jnp.asarray(column[:num_rows]), columns)


def one_step(model, batch, objective, balancer, tasks=SCHEMA.tasks):
    """The value sum_k w_k L_k and the gradient, which plain descent with rate 1 shows as old minus new."""
    step, state = Step.of(
        model, tasks, key=jax.random.key(0), objective=objective, balancer=balancer, optimizer=DESCENT
    )
    new, sums = step(state, batch)
    moved = {path.split("/")[1]: state.params[path] - new.params[path] for path in state.params}
    losses = sums.numerator if objective.reduction == "sum" else sums.numerator / sums.denominator
    return float(sums.weight @ losses), float(moved["theta"]), [float(moved["one"]), float(moved["two"])]


@pytest.mark.parametrize(
    ("reduction", "over_tasks", "value", "theta", "phi", "masked_value", "masked_theta", "masked_phi_two"),
    [
        # residuals (1, 0, -2) and (1, 0, 3); sums of squares 5 and 10 (1 when masked); slopes in theta -10, 40 (4)
        ("sum", "mean", 7.5, 15, (-5, 10), 3, -3, 1),
        ("sum", "sum", 15, 30, (-10, 20), 6, -6, 2),
        ("mean", "sum", 5, 10, (-10 / 3, 20 / 3), 13 / 6, -4 / 3, 1),
        ("mean", "mean", 2.5, 5, (-5 / 3, 10 / 3), 13 / 12, -2 / 3, 0.5),
    ],
)
def test_hand_example(model, reduction, over_tasks, value, theta, phi, masked_value, masked_theta, masked_phi_two):
    objective, balancer = Objective(reduction), equal(reduction=over_tasks)
    np.testing.assert_allclose(
        np.hstack(one_step(model, batch(), objective, balancer)), [value, theta, *phi], rtol=1e-6
    )
    masked = one_step(model, batch(masked=True), objective, balancer)
    np.testing.assert_allclose(np.hstack(masked), [masked_value, masked_theta, phi[0], masked_phi_two], rtol=1e-6)


def test_textbook_form(model):
    """reduction=sum with equal(mean) is the gradient of (1/n) sum_i sum_j l(theta, phi_i; x_ij, y_ij) as written."""

    def written_out(theta, phi):
        x = jnp.array([1.0, 2, 3])
        y = jnp.array([[0.0, 2, 5], [1, 4, 3]])
        return sum((phi[i] * theta * x[j] - y[i, j]) ** 2 for i in range(2) for j in range(3)) / 2

    value, (theta, phi) = jax.value_and_grad(written_out, argnums=(0, 1))(1.0, jnp.array([1.0, 2]))
    step = one_step(model, batch(), Objective("sum"), equal(reduction="mean"))
    np.testing.assert_allclose(np.hstack(step), [value, theta, *phi], rtol=1e-6)


def test_batches_add_up_under_sum_only(model):
    """The sum over rows of a batch is the sum of the sums over its parts; a mean is not."""
    first, rest = batch(1), jax.tree.map(lambda column: column[1:], batch())
    balancer = equal()
    values = [one_step(model, part, Objective("sum"), balancer)[0] for part in (first, rest, batch())]
    assert values[0] + values[1] == pytest.approx(values[2])
    values = [one_step(model, part, Objective("mean"), balancer)[0] for part in (first, rest, batch())]
    assert values[0] + values[1] != pytest.approx(values[2])


def test_weights_of_tasks_rows_and_labels(model):
    """A row of weight 2 is the row twice; task_weight weighs one task's rows; Task.weight scales a task's loss."""
    plain = batch()
    twice = jax.tree.map(lambda column: jnp.concatenate([column, column[2:]]), plain)
    for reduction in ("sum", "mean"):
        heavy = plain | {"weight": jnp.array([1.0, 1, 2])}
        expected = one_step(model, twice, Objective(reduction), equal())
        actual = one_step(model, heavy, Objective(reduction), equal())
        np.testing.assert_allclose(np.hstack(actual), np.hstack(expected), rtol=1e-6)
    half = plain | {"task_weight": {"two": jnp.array([0.0, 1, 0.5])}}
    value, _, phi = one_step(model, half, Objective("mean"), equal())
    assert value == pytest.approx(5 / 3 + 0.5 * 9 / 1.5)
    assert phi[1] == pytest.approx(0.5 * 2 * 3 * 3 / 1.5)
    tasks = (SCHEMA.tasks[0], dataclasses.replace(SCHEMA.tasks[1], weight=0.25))
    step, state = Step.of(model, tasks, key=jax.random.key(0), balancer=equal(), optimizer=DESCENT)
    new, _ = step(state, plain)
    moved = state.params["task/two/tower/phi"] - new.params["task/two/tower/phi"]
    assert float(moved) == pytest.approx(0.25 * 20 / 3)


def test_task_without_labels_is_inactive(model):
    """Loss 0, gradient 0, and the mean over tasks counts the others only."""
    empty = batch()
    empty["mask"] = {"one": jnp.ones(3), "two": jnp.zeros(3)}
    empty["labels"] = empty["labels"] | {"two": jnp.full(3, jnp.nan)}
    assert one_step(model, empty, Objective("sum"), equal(reduction="mean")) == (5.0, -10.0, [-10.0, 0.0])


@pytest.mark.parametrize("options", [{"reduction": "median"}, {"nonfinite": "ignore"}])
def test_unknown_options_are_refused(options):
    (value,) = options.values()
    with pytest.raises(ConfigError, match=rf"{value}.*expected one of"):
        Objective(**options)
