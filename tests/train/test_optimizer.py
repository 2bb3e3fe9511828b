"""The optimizer against hand-written update rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.balancing import equal
from mtl_jax.data.batching import as_batch
from mtl_jax.errors import ConfigError
from mtl_jax.train import Optimizer, Step
from mtl_jax.train.optimizer import as_optimizer, clip

PARAMS = {
    "tables/user/rows": jnp.array([[2.0, -1.0]]),
    "sharing/bottom/kernel": jnp.array([3.0]),
    "task/buy/tower/bias": jnp.array([-4.0]),
}
GRADIENTS = {
    "tables/user/rows": jnp.array([[1.0, 2.0]]),
    "sharing/bottom/kernel": jnp.array([-2.0]),
    "task/buy/tower/bias": jnp.array([4.0]),
}


def descend(optimizer, steps=1, gradients=GRADIENTS):
    params, transform = PARAMS, optimizer.dense()
    state = transform.init(params)
    for _ in range(steps):
        updates, state = transform.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_decay_is_by_label():
    """p - rate (g + decay p), the decay of the label; a kind that is not named does not decay."""
    for decay, rates in (
        ({"shared": 0.1, "task": 0.5}, (0.0, 0.1, 0.5)),
        (0.2, (0.2, 0.2, 0.2)),
        ({"embedding": 0.3}, (0.3, 0, 0)),
    ):
        new = descend(Optimizer(optax.identity(), learning_rate=0.01, weight_decay=decay))
        for (path, old), rate in zip(PARAMS.items(), rates, strict=True):
            np.testing.assert_allclose(new[path], old - 0.01 * (GRADIENTS[path] + rate * old), rtol=1e-6)


def test_decay_is_decoupled_from_adam():
    """AdamW: the decay is not divided by the root of the second moment. At the first step Adam's part is sign(g)."""
    new = descend(Optimizer(learning_rate=0.01, weight_decay=0.1))
    for path, old in PARAMS.items():
        np.testing.assert_allclose(new[path], old - 0.01 * (jnp.sign(GRADIENTS[path]) + 0.1 * old), rtol=1e-5)


@pytest.mark.parametrize("path", PARAMS)
def test_rows_move_as_the_whole_table_would(path):
    """For arrays that are touched as a whole both transforms are one."""
    optimizer = Optimizer(optax.scale_by_rms(), learning_rate=0.1, weight_decay={"embedding": 0.3, "task": 0.2})
    transform = optimizer.rows(path)
    updates, _ = transform.update(GRADIENTS[path], transform.init(PARAMS[path]), PARAMS[path])
    np.testing.assert_allclose(PARAMS[path] + updates, descend(optimizer)[path], rtol=1e-6)


def test_schedule_counts_updates():
    """Rates 1, 1/2, 0 move p by 3/2 of the gradient in three steps."""
    new = descend(Optimizer(optax.identity(), learning_rate=optax.linear_schedule(1.0, 0.0, 2)), steps=3)
    for path, old in PARAMS.items():
        np.testing.assert_allclose(new[path], old - 1.5 * GRADIENTS[path], rtol=1e-6)


def test_rates_by_label():
    """Each label moves by its own rate, the one for a single task before that of all tasks, the rest by the default."""
    params = PARAMS | {"task/see/tower/bias": jnp.array([1.0])}
    gradients = GRADIENTS | {"task/see/tower/bias": jnp.array([1.0])}
    schedule = optax.linear_schedule(1.0, 0.0, 2)
    optimizer = Optimizer(
        optax.identity(), learning_rate={"embedding": 0.5, "task/buy": schedule, "task": 0.1, "default": 0.01}
    )
    transform, new = optimizer.dense(), params
    state = transform.init(params)
    for _ in range(2):
        updates, state = transform.update(gradients, state, new)
        new = optax.apply_updates(new, updates)
    moved = {path: (params[path] - new[path]) / gradients[path] for path in params}
    expected = dict(zip(PARAMS, (1.0, 0.02, 1.5), strict=True)) | {"task/see/tower/bias": 0.2}
    for path, total in expected.items():
        np.testing.assert_allclose(moved[path], total, rtol=1e-5)
        by_row = optimizer.rows(path)
        updates, _ = by_row.update(gradients[path], by_row.init(params[path]), params[path])
        first, _ = transform.update(gradients, transform.init(params), params)
        np.testing.assert_allclose(updates, first[path], rtol=1e-6)


def test_rates_are_scaled_by_a_name_in_the_path():
    """After Adam, which would take the factor out of the gradient; and in tables, and with rates by label."""
    scale = {"bias": 100.0, "tables": 0.5}
    for rate in (1e-3, {"task": 1e-3, "default": 1e-2}):
        plain, scaled = Optimizer(learning_rate=rate), Optimizer(learning_rate=rate, rate_scale=scale)
        first, other = (
            transform.update(GRADIENTS, transform.init(PARAMS), PARAMS)[0]
            for transform in (plain.dense(), scaled.dense())
        )
        for path, step in first.items():
            factor = next((factor for name, factor in scale.items() if name in path.split("/")), 1.0)
            np.testing.assert_allclose(other[path], factor * step, rtol=1e-6)
            np.testing.assert_allclose(scaled.rate(path, 0), factor * plain.rate(path, 0), rtol=1e-6)
            by_row = scaled.rows(path)
            updates, _ = by_row.update(GRADIENTS[path], by_row.init(PARAMS[path]), PARAMS[path])
            np.testing.assert_allclose(updates, factor * step, rtol=1e-6)


def test_a_name_that_no_parameter_has_is_refused(small_schema, make_model):
    options = {"key": jax.random.key(0), "balancer": equal()}
    model = make_model(small_schema)
    with pytest.raises(ConfigError, match=r"rate_scale names \['stitch'\], which no parameter of this model has"):
        Step.of(model, small_schema.tasks, optimizer=Optimizer(rate_scale={"stitch": 100.0}), **options)


def test_a_label_without_a_rate_is_refused():
    optimizer = Optimizer(learning_rate={"shared": 0.1, "task": 0.1})
    with pytest.raises(
        ConfigError, match=r"has rates for \['shared', 'task'\]; expected one for the label 'embedding'"
    ):
        optimizer.dense().init(PARAMS)


def test_clip_bounds_the_global_norm():
    """The norm of (1, 2, -2, 4) is 5."""
    clipped, norm = clip(GRADIENTS, 1.0)
    assert float(norm) == pytest.approx(5.0)
    for path in GRADIENTS:
        np.testing.assert_allclose(clipped[path], GRADIENTS[path] / 5, rtol=1e-6)
    for bound in (None, 5.1):
        jax.tree.map(np.testing.assert_array_equal, clip(GRADIENTS, bound)[0], GRADIENTS)
    nothing, norm = clip(jax.tree.map(jnp.zeros_like, GRADIENTS), 1.0)
    assert float(norm) == 0 and all(not np.any(leaf) for leaf in nothing.values())


def test_clipping_counts_touched_rows(three_task_schema, make_model, make_rows):
    """The norm of one step over all arrays is the bound, whether tables are updated whole or by rows."""
    batch = as_batch(make_rows(three_task_schema, 30))
    moved = []
    for choice, bound in (("dense", 0.25), ("sparse", 0.25), ("sparse", None)):
        step, state = Step.of(
            make_model(three_task_schema, towers=()),
            three_task_schema.tasks,
            key=jax.random.key(0),
            balancer=equal(),
            optimizer=Optimizer(optax.identity(), learning_rate=1.0, clip_norm=bound),
            table_updates={"item": choice},
        )
        new, _ = jax.jit(step)(state, batch)
        before, after = state.params | state.tables, new.params | new.tables
        moved.append({path: np.asarray(before[path] - after[path]) for path in before})
    norms = [np.sqrt(sum((part**2).sum() for part in parts.values())) for parts in moved]
    np.testing.assert_allclose(norms[:2], 0.25, rtol=1e-4)
    assert norms[2] > 0.5
    for path in moved[0]:
        np.testing.assert_allclose(moved[0][path], moved[1][path], rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(moved[1][path] * norms[2] / 0.25, moved[2][path], rtol=1e-3, atol=1e-5)


def test_bare_adam_is_the_default():
    """``optax.adam(1e-3)`` and ``Optimizer()`` make the same updates, to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, descend(as_optimizer(optax.adam(1e-3)), 5), descend(Optimizer(), 5))


def test_bare_transforms_descend():
    new = descend(as_optimizer(optax.sgd(0.1)))
    for path, old in PARAMS.items():
        np.testing.assert_allclose(new[path], old - 0.1 * GRADIENTS[path], rtol=1e-6)
    given = Optimizer()
    assert as_optimizer(given) is given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a number > 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": {"tower": 0.1}}, r"names the label 'tower'; expected some of \['embedding'"),
        ({"learning_rate": {"task": -0.1}}, "expected a number > 0 or a schedule, or one by label"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1'; expected a number > 0"),
        ({"clip_norm": 0}, "clip_norm is 0; expected a number > 0 or null"),
        ({"weight_decay": {"tower": 0.1}}, r"'tower'.*expected rates >= 0 for labels of \['embedding'"),
        ({"weight_decay": -0.1}, "expected rates >= 0"),
        ({"rate_scale": {"stitch": 0.0}}, "rate_scale is {'stitch': 0.0}; expected a number > 0 by a name"),
        ({"transform": "adam"}, "transform is 'adam'; expected an optax transform"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Optimizer(**options)


def test_something_else_is_refused():
    with pytest.raises(ConfigError, match="optimizer is 'adam'; expected"):
        as_optimizer("adam")
