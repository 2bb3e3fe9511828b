"""What inner steps cost: matrix products with and without second derivatives, and memory from step to step."""

import jax
import jax.extend
import jax.numpy as jnp
import optax
import pytest
from written_out import inside, loss

from mtl_jax.train import Optimizer
from mtl_jax.train.adaptation import RowsLoss
from mtl_jax.transfer import MAML

LABELS = ("embedding", "shared", "task")
SCOPES = {"all": LABELS, "towers": ("task",)}
DOMAINS, ETA = 2, 0.3
SGD = Optimizer(optax.identity(), learning_rate=0.1)


@pytest.fixture(scope="module")
def build(make_model, make_step, make_batch, in_turn):
    """(strategy or None, rows of a block, ...) -> (step, state, batch)."""

    def made(strategy, rows=16, **model):
        step, state = make_step(make_model(**model), strategy, optimizer=SGD)
        blocks = 1 if strategy is None else DOMAINS * strategy.blocks
        return step, state, in_turn(*(make_batch(rows, number) for number in range(blocks)))

    return made


# Matrix products


def products(jaxpr):
    """Products of two matrices in a program and all that it calls; a loop's body counts once, an inner product does not."""
    inner = [value for equation in jaxpr.eqns for value in equation.params.values()]
    return sum(map(_is_product, jaxpr.eqns)) + sum(products(part) for value in inner for part in _programs(value))


def _is_product(equation):
    if equation.primitive.name != "dot_general":
        return False
    summed, batched = equation.params["dimension_numbers"]
    sides = zip(equation.invars, summed, batched, strict=True)
    return all(side.aval.ndim > len(over) + len(along) for side, over, along in sides)


def _programs(value):
    if isinstance(value, jax.extend.core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, jax.extend.core.Jaxpr):
        return [value]
    return [part for one in value for part in _programs(one)] if isinstance(value, tuple | list) else []


def products_of(function, *arguments):
    return products(jax.make_jaxpr(function)(*arguments).jaxpr)


def products_of_step(build, strategy):
    step, *arguments = build(strategy)
    return products_of(step, *arguments)


def test_products_are_counted_wherever_they_are():
    """In a loop, a recomputed part and a compiled one; the inner product at the end is none."""

    def program(x):
        again = jax.checkpoint(lambda x: jax.jit(jnp.matmul)(x, x))
        x, _ = jax.lax.scan(lambda x, _: (again(x), None), x @ x, length=3)
        return jnp.vdot(x, x)

    assert products_of(program, jnp.eye(3)) == 2


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_of_first_order_differentiates_no_inner_gradient(scope, num_steps, build, make_batch):
    """It has the products of a plain step and those of the inner gradient. An exact one has more of them."""
    plain = products_of_step(build, None)
    _, state, _ = build(None)
    params = state.params | state.tables
    moved = {path: array for path, array in params.items() if inside(path, SCOPES[scope])}
    inner = products_of(jax.grad(lambda moved: loss(params | moved, make_batch(16))), moved)
    assert plain >= 12 and inner >= 6, "two shared layers and two towers, forward and back"
    options = {"num_steps": num_steps, "scope": SCOPES[scope]}
    first, exact = (
        products_of_step(build, MAML(DOMAINS, ETA, **options, first_order=order)) for order in (True, False)
    )
    assert first == plain + inner
    assert exact >= first + inner


# Memory. Two layers of 32 units: what one of them says of the rows of a block is a hundred times as large as its kernel.

ROWS, UNITS = 2000, (32, 32)
ACTIVATION = DOMAINS * ROWS * UNITS[0] * 4
"""Bytes of what a layer says of the support rows of all domains."""


def copy_of(state, scope):
    """Bytes of what inner steps move, for all domains."""
    params = state.params | state.tables
    return DOMAINS * sum(array.nbytes for path, array in params.items() if inside(path, SCOPES[scope]))


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_stored_for_the_way_back_grows_by_the_moved_parameters_alone(scope, build, make_batch):
    """One copy a step; of activations, several steps store none at all, and a single one those of its layers."""
    blocks = [make_batch(ROWS, number) for number in range(DOMAINS)]
    rows = jax.tree.map(lambda *columns: jnp.stack(columns)[:, None], *blocks)

    def stored(num_steps):
        strategy = MAML(DOMAINS, ETA, num_steps=num_steps, scope=SCOPES[scope])
        _, state, _ = build(strategy, 16, units=UNITS)

        def pull(params, rows):
            return jax.vjp(lambda params: strategy.adapt_to_domains(params, {}, RowsLoss(loss), rows), params)[1]

        leaves = jax.tree.leaves(jax.eval_shape(pull, state.params | state.tables, rows))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), copy_of(state, scope)

    (one, each), (two, _), (five, _) = map(stored, (1, 2, 5))
    assert five - two == 3 * each
    assert one - two > ACTIVATION > 40 * each


def test_a_compiled_step_needs_no_more_memory_with_more_inner_steps(build):
    """A copy a step, and a twentieth of an activation. One step, which is not recomputed, needs more than five."""

    def needed(num_steps):
        strategy = MAML(DOMAINS, ETA, num_steps=num_steps)
        step, state, batch = build(strategy, ROWS, units=UNITS)
        program = jax.jit(step).lower(state, batch).compile()
        return program.memory_analysis().temp_size_in_bytes, copy_of(state, "all")

    (one, each), (two, _), (five, _) = map(needed, (1, 2, 5))
    assert five - two < 4 * each + ACTIVATION / 20
    assert five < one + 4 * each
    assert two > ACTIVATION
