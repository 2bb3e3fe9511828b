"""The gradient-based transfer update against closed forms, brute-force Jacobians and finite differences."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.errors import ConfigError
from mtl_jax.transfer import gradient_transfer, gradient_update

A, B, C, RATE, THETA = 2.0, 3.0, 1.0, 0.1, 2.0


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def source(x):
    return A * x**2 / 2


def target(x):
    return B * (x - C) ** 2 / 2


def transfer(params=THETA, **options):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
    return jax.jit(lambda p: gradient_transfer(source, target, p, **{"step_size": RATE} | options))(params)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-10)


# Two parabolas, a = 2 at 0 and b = 3 at 1, from theta = 2 with rate .1: all by hand.


@pytest.mark.parametrize(("sign", "moved", "of_source", "of_target"), [(-1, 1.6, 2.56, 0.54), (1, 2.4, 5.76, 2.94)])
def test_the_update_and_what_it_does_to_both_losses(sign, moved, of_source, of_target):
    value, gradient, adapted = transfer(mode="update", sign=sign)
    assert gradient is None
    close([adapted, value, source(adapted)], [moved, of_target, of_source])


@pytest.mark.parametrize(
    ("sign", "mode", "steps", "expected"),
    [
        (-1, "first_order", 1, 1.8),
        (1, "first_order", 1, 4.2),
        (-1, "constrained", 1, 1.44),
        (1, "constrained", 1, 5.04),
        (-1, "constrained", 3, 0.036864),
        (1, "constrained", 3, 12.731904),
    ],
)
def test_gradients_of_the_constrained_objective(sign, mode, steps, expected):
    close(transfer(mode=mode, sign=sign, num_steps=steps)[1], expected)


@pytest.mark.parametrize(("sign", "minimisers"), [(-1, (1.25, 30 / 49)), (1, (1 / 1.2, 45 / 79))])
def test_the_constrained_objective_has_its_known_minimum(sign, minimisers):
    """c / k without the source loss, and k b c / (k^2 b + a) with it at weight 1."""
    for weight, minimiser in zip((0.0, 1.0), minimisers, strict=True):
        gradient = transfer(minimiser, sign=sign, source_weight=weight)[1]
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
        value = transfer(minimiser, sign=sign, source_weight=weight)[0]
        assert value < min(transfer(minimiser + move, sign=sign, source_weight=weight)[0] for move in (-1e-3, 1e-3))


@pytest.mark.parametrize(
    ("sign", "of_source", "of_target", "stationary"),
    [(-1, 4.48, -0.6, (15 / 62, 99 / 124)), (1, 5.68, -1.4, (45 / 154, 129 / 154))],
)
def test_the_joint_objective(sign, of_source, of_target, stationary):
    """The pair (theta_s, theta_t); at (2, 1) the distance from T(theta_s) is -.6 or -1.4."""
    value, gradients, adapted = transfer((2.0, 1.0), mode="joint", sign=sign)
    close(gradients, (of_source, of_target))
    close([value, adapted], [4.0 + of_target**2 / 2, 1.0])
    np.testing.assert_allclose(transfer(stationary, mode="joint", sign=sign)[1], (0, 0), atol=1e-12)


def test_the_implicit_gradient():
    """phi = 6/8 theta, and the gradient at it times 6/8."""
    value, gradient, adapted = transfer(mode="implicit", proximal=6.0, num_steps=64)
    close([adapted, gradient, value], [1.5, 1.125, target(1.5)])


MATRIX = np.array([[2.0, 1.0], [1.0, 3.0]])
PLANE = {
    ("first_order", -1): (-0.4, 2.3),
    ("constrained", -1): (-0.55, 1.65),
    ("first_order", 1): (0.4, 3.7),
    ("constrained", 1): (0.85, 4.85),
    ("implicit", -1): (-0.50228129, 1.56754612),
}


@pytest.mark.parametrize(("mode", "sign"), PLANE)
def test_in_the_plane(mode, sign):
    found = gradient_transfer(
        lambda x: x @ MATRIX @ x / 2,
        lambda x: jnp.sum((x - jnp.array([1.0, -1.0])) ** 2) / 2,
        jnp.array([1.0, 2.0]),
        step_size=0.1,
        sign=sign,
        mode=mode,
        proximal=6.0,
        num_steps=200 if mode == "implicit" else 1,
    )
    np.testing.assert_allclose(found[1], PLANE[mode, sign], rtol=1e-7)
    if mode != "implicit":
        close(found[2], (0.6, 1.3) if sign == -1 else (1.4, 2.7))


# A network with a table, whose source and target read different ids


def network(seed=0):
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"table": (7, 3), "hidden": (3, 4), "source_head": (4,), "target_head": (4,)}
    return {name: jnp.asarray(0.5 * draw(shape)) for name, shape in shapes.items()}


def loss(head, ids, labels):
    def of(params):
        hidden = jnp.tanh(params["table"][ids] @ params["hidden"])
        return jnp.mean((hidden @ params[head] - labels) ** 2)

    return of


LABELS = np.random.default_rng(1).standard_normal((2, 6))
OF_SOURCE = loss("source_head", np.array([0, 1, 1, 2, 3, 0]), LABELS[0])
OF_TARGET = loss("target_head", np.array([3, 4, 5, 0, 4, 6]), LABELS[1])
MASK = {"table": True, "hidden": True, "source_head": True, "target_head": False}


def differences(value_of, params, size=1e-6):
    """Central differences of a function of the parameters."""
    flat, rebuild = jax.flatten_util.ravel_pytree(params)
    value_of = jax.jit(value_of)
    steps = size * np.eye(len(flat))
    return rebuild(
        jnp.asarray([(value_of(rebuild(flat + s)) - value_of(rebuild(flat - s))) / (2 * size) for s in steps])
    )


def assert_trees_close(found, expected, rtol=1e-4):
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], rtol=rtol, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_constrained_gradient_is_that_of_the_whole(sign, steps):
    options = {"step_size": 0.3, "sign": sign, "num_steps": steps, "mask": MASK, "source_weight": 0.7}

    def value_of(params):
        return gradient_transfer(OF_SOURCE, OF_TARGET, params, **options)[0]

    value, gradient, adapted = gradient_transfer(OF_SOURCE, OF_TARGET, network(), **options)
    assert_trees_close(gradient, differences(value_of, network()))
    np.testing.assert_allclose(value, OF_TARGET(adapted) + 0.7 * OF_SOURCE(network()), rtol=1e-12)
    np.testing.assert_array_equal(adapted["target_head"], network()["target_head"])
    np.testing.assert_array_equal(adapted["table"][4:], network()["table"][4:])  # no row of the source


def test_the_joint_gradient_is_that_of_the_whole():
    pair = network(), network(2)
    flat = {f"{side}/{path}": leaf for side, tree in zip("st", pair, strict=True) for path, leaf in tree.items()}
    options = {"step_size": 0.3, "mode": "joint", "rho": 0.5, "mask": MASK}

    def value_of(flat):
        pair = tuple({path[2:]: leaf for path, leaf in flat.items() if path[0] == side} for side in "st")
        return gradient_transfer(OF_SOURCE, OF_TARGET, pair, **options)[0]

    _, gradients, _ = gradient_transfer(OF_SOURCE, OF_TARGET, pair, **options)
    found = {f"{side}/{path}": leaf for side, tree in zip("st", gradients, strict=True) for path, leaf in tree.items()}
    assert_trees_close(found, differences(value_of, flat))
    # What is outside of the mask is not coupled.
    np.testing.assert_allclose(found["t/target_head"], jax.grad(OF_TARGET)(pair[1])["target_head"], rtol=1e-12)
    np.testing.assert_array_equal(found["s/target_head"], 0)


@pytest.mark.parametrize("outside", ["target_head", "hidden"])
def test_the_implicit_gradient_is_that_of_the_minimum(outside):
    """Also of leaves outside of the mask on which the minimum depends."""
    mask = dict.fromkeys(MASK, True) | {outside: False}
    options = {"mode": "implicit", "proximal": 2.0, "step_size": 0.2, "mask": mask, "num_cg_steps": 100}

    def value_of(params):
        return gradient_transfer(OF_SOURCE, OF_TARGET, params, num_steps=400, **options)[0]

    _, gradient, _ = gradient_transfer(OF_SOURCE, OF_TARGET, network(), num_steps=400, **options)
    assert_trees_close(gradient, differences(value_of, network(), 1e-5))


def test_each_step_has_its_batch():
    ids, labels = np.array([[0, 1], [2, 3], [4, 4]]), LABELS[:, :3].T

    def of_batch(params, batch):
        return loss("source_head", *batch)(params)

    params = network()
    for row in zip(ids, labels, strict=True):
        gradients = jax.grad(of_batch)(params, row)
        params = {path: leaf - 0.2 * gradients[path] for path, leaf in params.items()}
    batches = jnp.asarray(ids), jnp.asarray(labels)
    update = gradient_update(of_batch, step_size=0.2, num_steps=3, batches=batches)
    assert_trees_close(jax.jit(update)(network()), params, rtol=1e-12)
    whole = gradient_transfer(
        of_batch, OF_TARGET, network(), step_size=0.2, num_steps=3, source_batches=batches, source_weight=1.0
    )
    mean = np.mean([of_batch(network(), row) for row in zip(ids, labels, strict=True)])
    np.testing.assert_allclose(whole[0], OF_TARGET(params) + mean, rtol=1e-12)


# What holds whatever the losses


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "update", "sign": 1},
        {"mode": "constrained", "num_steps": 3, "source_weight": 0.7, "mask": MASK},
        {"mode": "constrained", "sign": 1},
        {"mode": "first_order", "source_weight": 0.7},
        {"mode": "joint", "rho": 0.5, "num_steps": 2, "mask": MASK},
        {"mode": "implicit", "num_steps": 20, "proximal": 2.0, "mask": MASK},
    ],
    ids=lambda options: " ".join(map(str, (options["mode"], options.get("sign", -1)))),
)
def test_devices_that_share_the_rows_find_what_one_does(options):
    """Each has three of the six rows, and all have the same value, gradient and adapted parameters."""
    params = (network(), network(2)) if options["mode"] == "joint" else network()
    ids = jnp.array([[0, 1, 1, 2, 3, 0], [3, 4, 5, 0, 4, 6]])

    def found(ids, labels, axis=None):
        def of(head, side):
            part = loss(head, ids[side], labels[side])
            return part if axis is None else lambda params: jax.lax.psum(part(params) / 2, axis)

        return gradient_transfer(
            of("source_head", 0), of("target_head", 1), params, step_size=0.3, axis=axis, **options
        )

    whole = found(ids, jnp.asarray(LABELS))
    halves = [part.reshape(2, 2, 3).swapaxes(0, 1) for part in (ids, jnp.asarray(LABELS))]
    of_each = jax.vmap(lambda *rows: found(*rows, axis="device"), axis_name="device")(*halves)
    for expected, leaf in zip(jax.tree.leaves(whole), jax.tree.leaves(of_each), strict=True):
        np.testing.assert_allclose(leaf, np.stack([expected] * 2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["constrained", "first_order"])
def test_without_a_step_it_trains_the_target(mode):
    plain = jax.value_and_grad(OF_TARGET)(network())
    for options in ({"step_size": 0.0}, {"step_size": 0.1, "num_steps": 0}):
        value, gradient, adapted = gradient_transfer(OF_SOURCE, OF_TARGET, network(), mode=mode, **options)
        jax.tree.map(np.testing.assert_array_equal, adapted, network())
        assert_trees_close(gradient, plain[1], rtol=1e-12)
        np.testing.assert_allclose(value, plain[0], rtol=1e-12)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_sign_says_what_becomes_of_the_source_loss(sign):
    moved = gradient_update(OF_SOURCE, step_size=1e-3, sign=sign)(network())
    assert np.sign(OF_SOURCE(moved) - OF_SOURCE(network())) == sign


def test_the_first_order_takes_no_second_derivative():
    """One pass over each loss, forward and back; the exact gradient has a Hessian-vector product besides."""

    def matrix_products(mode, steps):
        options = {"step_size": 0.1, "mode": mode, "num_steps": steps}
        jaxpr = jax.make_jaxpr(lambda params: gradient_transfer(OF_SOURCE, OF_TARGET, params, **options)[1])(network())
        return str(jaxpr).count("dot_general")

    one_pass = str(jax.make_jaxpr(jax.grad(OF_SOURCE))(network())).count("dot_general")
    assert matrix_products("first_order", 1) == 2 * one_pass
    assert 2 * one_pass < matrix_products("constrained", 1) <= 4 * one_pass


def test_numbers_ride_a_run_axis():
    rates = jnp.array([0.05, 0.1, 0.2])
    runs = jax.vmap(
        lambda rate, rho: gradient_transfer(source, target, (THETA, 1.0), step_size=rate, rho=rho, mode="joint")
    )
    values, gradients, _ = runs(rates, rates)
    for index, rate in enumerate(rates):
        value, gradient, _ = gradient_transfer(source, target, (THETA, 1.0), step_size=rate, rho=rate, mode="joint")
        close([values[index], *(g[index] for g in gradients)], [value, *gradient])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "second_order"}, r"mode is 'second_order'; expected one of \['update'"),
        ({"mode": "implicit", "sign": 1}, "mode 'implicit' fits the source and has sign 1"),
        ({"mode": "joint", "source_weight": 1.0}, "mode 'joint' has source_weight 1.0; expected 0"),
        ({"mode": "implicit", "proximal": 0.0}, "proximal is 0.0; expected a number > 0"),
        ({"sign": 2}, "sign is 2; expected -1"),
        ({"step_size": -0.1}, "step_size is -0.1; expected a number >= 0"),
        ({"num_steps": 1.5}, "num_steps is 1.5; expected a whole number"),
        ({"mask": {"a": True}}, "the mask does not fit the parameters"),
        ({"mask": 1.0}, r"the mask has \[1.0\]; expected True and False"),
        ({"source_batches": jnp.ones((2, 1))}, r"batches have the leading sizes \[2\] and num_steps is 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        gradient_transfer(source, target, jnp.array(2.0), **{"step_size": 0.1} | options)


def test_where_there_is_no_minimum_the_implicit_gradient_is_finite():
    """Along the first direction H + proximal is -1: as if H were 0; and one positive direction is still solved."""
    curvature = jnp.array([-2.0, 3.0])

    def gradient(slope):
        found = gradient_transfer(
            lambda p: 0.5 * p @ (curvature * p),
            lambda p: jnp.dot(jnp.array(slope), p),
            jnp.array([0.5, 0.5]),
            step_size=0.01,
            mode="implicit",
            proximal=1.0,
        )
        return np.asarray(found[1])

    np.testing.assert_allclose(gradient([1.0, 0.0]), [1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(gradient([0.0, 1.0]), [0.0, 0.25], rtol=1e-5)
    assert np.isfinite(gradient([1.0, 1.0])).all()
