"""Touched rows: compaction against NumPy, and updates against a loop over the distinct rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.model import Inputs
from mtl_jax.nn import Lookup
from mtl_jax.train.tables import ROWS_PER_LOOKUP, choose, compact, renumber, update_rows

LIVE = jnp.array(True)


@pytest.mark.parametrize("num_ids", [1, 6, 200])
def test_compact_finds_every_distinct_id_once(num_ids):
    """With 200 ids in 12 rows most are repeated many times. What the scratch held before does not matter."""
    rng = np.random.default_rng(num_ids)
    ids = rng.integers(0, 12, num_ids).astype(np.int32)
    slots, rows = compact(jnp.asarray(rng.integers(-5, 99, 12), jnp.int32), jnp.asarray(ids))
    touched = np.asarray(rows.touched)
    np.testing.assert_array_equal(np.sort(touched[touched < 12]), np.unique(ids))
    np.testing.assert_array_equal(ids[rows.representatives], ids)
    assert len(np.unique(rows.representatives)) == len(np.unique(ids))
    np.testing.assert_array_equal(np.flatnonzero(touched < 12), np.unique(rows.representatives))
    first = [np.flatnonzero(ids == one)[0] for one in ids]
    np.testing.assert_array_equal(rows.representatives, first, "all devices have to choose the same place")
    _, again = compact(slots, jnp.asarray(ids))
    assert len(np.unique(again.representatives)) == len(np.unique(ids))


def inputs_of_one_vocabulary(rng):
    """A categorical, a bag and a history that read one table of 10 rows; sets and histories may be empty."""
    bag = rng.integers(0, 10, (6, 3)).astype(np.int32)
    history = np.where(np.arange(4) < rng.integers(0, 5, (6, 1)), rng.integers(1, 10, (6, 4)), 0).astype(np.int32)
    lookups = {
        "item": Lookup(jnp.asarray(rng.integers(0, 10, 6), jnp.int32)),
        "bag": Lookup(jnp.asarray(bag), jnp.asarray((bag > 0) * rng.uniform(0.5, 2, bag.shape), jnp.float32)),
        "history": Lookup(jnp.asarray(history), jnp.asarray(history > 0, jnp.float32)),
        "user": Lookup(jnp.arange(6)),
    }
    return Inputs(lookups, jnp.zeros((6, 0)), None, None)


def test_renumbered_lookups_read_the_same_and_collect_the_whole_gradient():
    """Reading gathered rows equals reading the table; the gradient at a representative is the table's at its id."""
    rng = np.random.default_rng(0)
    names = ("item", "bag", "history")
    inputs = inputs_of_one_vocabulary(rng)
    table = jnp.asarray(rng.normal(size=(10, 3)), jnp.float32)
    targets = {name: jnp.asarray(rng.normal(size=(6, 3)), jnp.float32) for name in names}
    renumbered, _, rows = renumber(inputs, names, jnp.zeros(10, jnp.int32))
    assert renumbered.lookups["user"] is inputs.lookups["user"]

    def read(inputs, table):
        return sum(jnp.vdot(inputs.lookups[name](table), targets[name]) for name in names)

    whole, whole_gradient = jax.value_and_grad(read, argnums=1)(inputs, table)
    compacted, gradient = jax.value_and_grad(read, argnums=1)(renumbered, table[rows.ids])
    assert float(whole) == pytest.approx(float(compacted), rel=1e-6)
    scattered = np.zeros((11, 3), np.float32)
    scattered[np.asarray(rows.touched)] += gradient
    np.testing.assert_allclose(scattered[:10], whole_gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient[np.asarray(rows.touched) == 10], 0)


def stream_of_updates(num_steps=4, num_rows=11, width=3):
    """Ids of each step with many duplicates, and the gradient that every place of the lookup got."""
    rng = np.random.default_rng(3)
    for _ in range(num_steps):
        ids = rng.integers(0, num_rows - 4, 15).astype(np.int32)  # the last four rows are never touched
        ids[:6] = ids[0]
        yield ids, rng.normal(size=(15, width)).astype(np.float32)


def sparse_run(transform, table):
    """The table and state after the stream, through compaction and ``update_rows``."""

    @jax.jit
    def one(slots, table, state, ids, at_places):
        slots, rows = compact(slots, ids)
        gradient = jnp.zeros(at_places.shape, table.dtype).at[rows.representatives].add(at_places)
        return slots, *update_rows(transform, table, state, rows, gradient, LIVE)

    slots, state = jnp.zeros(table.shape[0], jnp.int32), transform.init(table)
    for ids, at_places in stream_of_updates():
        slots, table, state = one(slots, table, state, ids, at_places)
    return np.asarray(table), state


def table_of(rows=11, width=3):
    return jnp.asarray(np.random.default_rng(1).normal(size=(rows, width)), jnp.float32)


def test_descent_on_touched_rows_is_descent_on_the_table():
    """Plain SGD moves nothing without a gradient, so both are the same, to the last bit but for the order of sums."""
    table = expected = table_of()
    for ids, at_places in stream_of_updates():
        expected = expected - 0.1 * jnp.zeros_like(table).at[ids].add(at_places)
    np.testing.assert_allclose(sparse_run(optax.sgd(0.1), table)[0], expected, rtol=1e-6, atol=1e-7)


def test_adam_is_lazy():
    """A NumPy loop: moments of a row decay when it is touched; the step count of the bias correction is the run's."""
    table = np.array(table_of(), np.float64)
    first, second = np.zeros_like(table), np.zeros_like(table)
    for count, (ids, at_places) in enumerate(stream_of_updates(), start=1):
        for row in np.unique(ids):
            gradient = at_places[ids == row].astype(np.float64).sum(0)
            first[row] = 0.9 * first[row] + 0.1 * gradient
            second[row] = 0.999 * second[row] + 0.001 * gradient**2
            corrected = first[row] / (1 - 0.9**count), second[row] / (1 - 0.999**count)
            table[row] -= 0.1 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    with jax.enable_x64(True):
        actual, state = sparse_run(optax.adam(0.1), table_of().astype(jnp.float64))
    np.testing.assert_allclose(actual, table, rtol=1e-6)  # optax keeps the powers of the decays in float32
    np.testing.assert_allclose(state[0].mu, first, rtol=1e-9)
    np.testing.assert_allclose(state[0].nu, second, rtol=1e-9)
    assert int(state[0].count) == 4


@pytest.mark.parametrize(
    "transform",
    [
        optax.adagrad(0.1),
        optax.rmsprop(0.1),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.chain(optax.scale_by_lion(), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
        optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.5),
    ],
    ids=["adagrad", "rmsprop", "nesterov", "lion with decay", "schedule"],
)
def test_any_transform_by_rows(transform):
    """As if the optimizer had been given the distinct rows of the step alone, with their own state."""
    table = np.array(table_of())
    state = transform.init(jnp.asarray(table))
    by_row = lambda leaf: np.ndim(leaf) > 0 and leaf.shape[0] == len(table)  # noqa: E731
    for ids, at_places in stream_of_updates():
        rows = np.unique(ids)
        gradient = np.stack([at_places[ids == row].sum(0) for row in rows])
        own = jax.tree.map(lambda leaf, rows=rows: leaf[rows] if by_row(leaf) else leaf, state)
        updates, own = transform.update(jnp.asarray(gradient), own, jnp.asarray(table[rows]))
        table[rows] += updates
        put = lambda leaf, new, rows=rows: leaf.at[rows].set(new) if by_row(leaf) else new  # noqa: E731
        state = jax.tree.map(put, state, own)
    actual, actual_state = sparse_run(transform, table_of())
    np.testing.assert_allclose(actual, table, rtol=1e-5, atol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), actual_state, state)


def test_untouched_rows_and_dead_steps_change_nothing():
    table = table_of()
    after, state = sparse_run(optax.adam(0.1), table)
    np.testing.assert_array_equal(after[-4:], table[-4:])
    assert np.all(np.any(after[:-4] != table[:-4], axis=1))
    ids, gradient = next(stream_of_updates())
    _, rows = compact(jnp.zeros(11, jnp.int32), jnp.asarray(ids))
    dead = update_rows(optax.adam(0.1), jnp.asarray(after), state, rows, gradient * jnp.nan, jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, dead, (jnp.asarray(after), state))


def test_choice_by_size_and_by_name():
    """By rows where the table has more than so many times the ids of a step."""
    sizes, ids = {"user": 100 * ROWS_PER_LOOKUP + 1, "item": 100 * ROWS_PER_LOOKUP}, {"user": 100, "item": 100}
    assert choose(sizes, ids) == {"user": "sparse", "item": "dense"}
    assert choose(sizes, ids, "sparse") == {"user": "sparse", "item": "sparse"}
    assert choose(sizes, ids, "dense") == {"user": "dense", "item": "dense"}
    assert choose(sizes, ids, {"item": "sparse"}) == {"user": "sparse", "item": "sparse"}
    assert choose(sizes, ids, {"user": "dense", "item": "auto"}) == {"user": "dense", "item": "dense"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lazy", "'lazy'.*expected auto, dense or sparse"),
        ({"user": "lazy"}, "'lazy' for 'user'.*expected auto, dense or sparse"),
        ({"shop": "dense"}, r"names 'shop'; expected vocabularies of \['item', 'user'\]"),
    ],
)
def test_wrong_choices_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        choose({"user": 10, "item": 10}, {"user": 1, "item": 1}, override)
