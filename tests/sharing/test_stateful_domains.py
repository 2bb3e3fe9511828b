"""The multi-domain strategies with state: what each is besides an equation, in training too."""

import functools

import cases_stateful_domains as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.nn import BatchNorm, Context
from mtl_jax.nn.domain_linear import domain_linear
from mtl_jax.nn.partitioned_norm import PartitionedNorm
from mtl_jax.nn.state import State
from mtl_jax.sharing.adapt_dhm import AdaptDHM
from mtl_jax.sharing.adasparse import AdaSparse
from mtl_jax.sharing.hamur import HAMUR
from mtl_jax.sharing.sar_net import SARNet
from mtl_jax.sharing.star import STAR

references = cases.references
TASKS, WIDTH = ("click", "buy"), 6
ALL = ["star", "sar_net", "hamur", "adapt_dhm", "adasparse"]
X = np.random.default_rng(1).standard_normal((12, WIDTH)).astype(np.float32)
DOMAIN = np.array([0, 2, 1, 0, 1, 1, 0, 2, 0, 2, 1, 0], np.int32)
WEIGHT = np.array([1, 2, 0.5, 1, 0, 1, 1, 1, 0, 1, 2, 0.5], np.float32)


def drawn(module, seed=0):
    """The module with all parameters and states drawn."""
    generator = np.random.default_rng(seed)
    for _, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        variable[...] = jax.device_put(np.asarray(0.6 * generator.standard_normal(variable.shape), variable.dtype))
    cases.cases.draw_states(module, generator)
    return module


def make(name, seed=0):
    return drawn(cases.CASES[name].make(WIDTH, TASKS, rngs=nnx.Rngs(seed)), seed)


def output(module, x, context):
    y = module(x, context)
    return y if isinstance(y, jax.Array) else y[TASKS[0]]


def pure(module, train=True, axis=None, dtype=np.float32):
    """``(x, domain, weight, params, states) -> output, states`` of the module, and its parameters and states."""
    graphdef, params, states, rest = nnx.split(module, nnx.Param, State, ...)
    function = functools.partial(_call, graphdef, train, axis, rest)
    return function, jax.tree.map(lambda array: array.astype(dtype), params), jax.tree.map(jnp.copy, states)


def _call(graphdef, train, axis, rest, x, domain, weight, params, states):
    states = jax.tree.map(lambda array: array, states)  # variables of this trace
    built = nnx.merge(graphdef, params, states, rest)
    y = output(built, x, Context(train=train, domain=domain, weight=weight, rngs=jax.random.key(0), axis=axis))
    return y, nnx.state(built, State)


_compiled = jax.jit(_call, static_argnums=(0, 1, 2))  # once for all modules of one structure


def by_path(state):
    return {"/".join(map(str, path)): np.asarray(one[...]) for path, one in nnx.to_flat_state(state)}


def step(module, x=X, domain=DOMAIN, weight=WEIGHT, train=True, dtype=np.float32):
    """The output, and the states by path."""
    function, params, states = pure(module, train, dtype=dtype)
    y, states = _compiled(*function.args, x, domain, weight, params, states)
    return np.asarray(y), by_path(states)


def close(one, other, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def gradients(module, x=X, domain=DOMAIN, dtype=np.float32):
    """In training, of the sum of squares of the outputs: path -> array, that of x as ``x``."""
    function, params, states = pure(module, dtype=dtype)

    def loss(params, x):
        return (function(x, domain, WEIGHT, params, states)[0].astype(jnp.float32) ** 2).sum()

    found, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, jnp.asarray(x))
    return by_path(found) | {"x": of_x}


# Layers


@pytest.mark.parametrize("num_domains", [1, 2, 70])
def test_rows_pass_through_the_layer_of_their_domain(num_domains):
    """More rows than a block, domains without rows; values and gradients are those of one kernel a row."""
    generator = np.random.default_rng(num_domains)
    domain = generator.integers(0, min(num_domains, 60), 150).astype(np.int32)
    shapes = (150, 5), (num_domains, 5, 3), (num_domains, 3)
    arrays = [generator.standard_normal(shape).astype(np.float32) for shape in shapes]

    def plain(x, kernel, bias):
        return jnp.einsum("bi,bio->bo", x, kernel[domain]) + bias[domain]

    def both(function):
        def squares(*arrays):
            y = function(*arrays)
            return (y**2).sum(), y

        return jax.jit(jax.value_and_grad(squares, argnums=(0, 1, 2), has_aux=True))(*arrays)

    found, expected = both(lambda *arrays: domain_linear(*arrays, domain)), both(plain)
    close(found, expected, 1e-4)
    assert np.all(np.asarray(found[1][1])[60:] == 0)


@pytest.mark.parametrize("axes", [(None, 0, 0, None), (0, 0, None, None), (0, 0, 0, 0)])
def test_layers_of_domains_run_side_by_side(axes):
    generator = np.random.default_rng(0)
    shapes = (9, 5), (3, 5, 2), (3, 2)
    args = [generator.standard_normal(((2,) if a == 0 else ()) + s) for s, a in zip(shapes, axes[:3], strict=True)]
    args = [*map(jnp.float32, args), jnp.int32(generator.integers(0, 3, (2, 9) if axes[3] == 0 else 9))]

    def gradient(x, kernel, bias, domain):
        return jax.grad(lambda *a: (domain_linear(*a, domain) ** 2).sum(), argnums=(0, 1, 2))(x, kernel, bias)

    together = jax.jit(jax.vmap(gradient, in_axes=axes))(*args)
    one = jax.jit(gradient)
    for run in range(2):
        alone = one(*(a if axis is None else a[run] for a, axis in zip(args, axes, strict=True)))
        close([part[run] for part in together], alone, 1e-4)


def test_narrow_gradients_of_domains_add_up_in_wide_numbers():
    """4096 equal rows in blocks: in bfloat16 the sum of the blocks would stop growing."""
    x, kernel = jnp.ones((4096, 1)), jnp.ones((2, 1, 1), jnp.bfloat16)
    domain = jnp.zeros(4096, jnp.int32)
    found = jax.jit(jax.grad(lambda kernel: domain_linear(x, kernel, None, domain).astype(jnp.float32).sum()))(kernel)
    np.testing.assert_allclose(np.asarray(found, np.float32)[:, 0, 0], [4096, 0])


def test_partitioned_norm_in_training():
    """Against the loop; one domain has a row of weight alone, one has no rows."""
    norm = drawn(PartitionedNorm(WIDTH, num_domains=5))
    params, stored = cases.norm(norm), cases.moments(norm)
    domain = np.where(np.arange(12) == 5, 3, DOMAIN)
    y, states = step(norm, domain=domain)
    expected, moments = references.partitioned_norm_train(params, stored, X.astype(np.float64), domain, WEIGHT)
    close(y, expected)
    for name in ("mean", "variance"):
        close(states[name], np.stack(moments[name]))
        for kept in (3, 4):
            np.testing.assert_array_equal(states[name][kept], np.float32(stored[name][kept]))


def test_partitioned_norm_of_one_domain_is_batch_norm():
    norm, plain = drawn(PartitionedNorm(WIDTH, num_domains=1)), BatchNorm(WIDTH)
    plain.scale[...] = norm.scale[...] * norm.domain_scale[...][0]
    plain.bias[...] = norm.bias[...] + norm.domain_bias[...][0]
    plain.mean[...], plain.variance[...] = norm.mean[...][0], norm.variance[...][0]
    plain.seen[...] = norm.seen[...][0, 0]
    for train in (True, False):
        (y, states), (expected, of_plain) = (step(one, domain=0 * DOMAIN, train=train) for one in (norm, plain))
        close(y, expected)
        close({name: state[0] for name, state in states.items()}, of_plain)


# What all of them owe in training


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("adapt_dhm", "sar_net")])
def test_domains_do_not_influence_each_other(name):
    """Not through moments either. (Clusters have common rows, and the experts of SAR-Net a common norm.)"""
    module, others = make(name), np.where((DOMAIN == 1)[:, None], 5 - 2 * X, X)
    (y, states), (moved, moved_states) = step(module), step(module, x=others)
    np.testing.assert_array_equal(y[DOMAIN != 1], moved[DOMAIN != 1])
    assert not np.allclose(y[DOMAIN == 1], moved[DOMAIN == 1])
    for state in states.keys() - {"alpha"}:
        np.testing.assert_array_equal(states[state][[0, 2]], moved_states[state][[0, 2]])


@pytest.mark.parametrize("name", [name for name in ALL if name != "adasparse"])
def test_padding_does_not_enter_and_devices_add_up(name):
    module = make(name)
    whole, states = step(module)
    padded, same = step(module, x=np.where((WEIGHT == 0)[:, None], 9 - X, X))
    close((padded[WEIGHT > 0], same), (whole[WEIGHT > 0], states), 1e-6)

    function, params, start = pure(module, axis="batch")
    halves = [part.reshape(2, 6, *part.shape[1:]) for part in (X, DOMAIN, WEIGHT)]
    on_devices = jax.vmap(function, in_axes=(0, 0, 0, None, None), axis_name="batch")
    y, moved = jax.jit(on_devices)(*halves, params, start)
    close(y.reshape(whole.shape), whole)
    for path, state in by_path(moved).items():
        close((state[0], state[1]), (states[path], states[path]))


@pytest.mark.parametrize("name", ALL)
def test_training_runs_side_by_side(name):
    """A leading run axis of parameters and states is a loop over runs, what training leaves behind included."""
    function, *first = pure(make(name))
    _, *second = pure(make(name, seed=4))
    both = jax.tree.map(lambda *leaves: np.stack(leaves), first, second)
    together = jax.jit(jax.vmap(function, in_axes=(None, None, None, 0, 0)))
    found = together(X, DOMAIN, WEIGHT, *both)
    for run, arrays in enumerate((first, second)):
        close(
            jax.tree.map(lambda leaf, run=run: np.asarray(leaf)[run], found),
            _compiled(*function.args, X, DOMAIN, WEIGHT, *arrays),
            2e-5,
        )


@pytest.mark.parametrize("name", ALL)
def test_narrow_parameters_leave_wide_states_and_finite_gradients(name):
    """With a domain of one row, a domain without rows, and a column that does not vary."""
    module = make(name)
    x, domain = X.copy(), np.where(np.arange(12) == 0, 0, 1).astype(np.int32)
    x[:, 0] = 1.0
    wide, _ = step(module, x=x, domain=domain)
    y, states = step(module, x=x, domain=domain, dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16 and all(state.dtype == np.float32 for state in states.values())
    np.testing.assert_allclose(y.astype(np.float32), wide, rtol=0.15, atol=0.1 * (1 + np.abs(wide).max()))
    found = gradients(module, x=x, domain=domain, dtype=jnp.bfloat16)
    assert all(np.all(np.isfinite(np.float32(one))) for one in found.values())


@pytest.mark.parametrize("name", [name for name in ALL if name != "adapt_dhm"])
def test_domains_are_needed(name):
    with pytest.raises(ConfigError, match=r"context\.domain is None; expected .* Choose"):
        make(name)(jnp.asarray(X))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SARNet, {"num_domains": 2, "num_shared": 0, "num_specific": 0}),
        (HAMUR, {"num_domains": 2, "units": (4,), "adapter_layers": (1,)}),
        (AdaSparse, {"num_domains": 2, "mode": "sign"}),
        (STAR, {"num_domains": 0}),
        (AdaptDHM, {"num_clusters": 0}),
    ],
)
def test_bad_options_are_named(kind, options):
    with pytest.raises(ConfigError, match="expected"):
        kind(WIDTH, TASKS, **options, rngs=nnx.Rngs(0))


# STAR


def test_star_starts_as_one_network():
    strategy = STAR(WIDTH, TASKS, num_domains=3, units=(7, 4), auxiliary_units=(2,), dropout=0.0, rngs=nnx.Rngs(0))
    x = jnp.asarray(X)
    z = output(strategy, x, Context(domain=jnp.asarray(DOMAIN)))
    h = x / np.sqrt(1 + 1e-5)  # moments of the start
    for layer in strategy.network.layers:
        h = nnx.relu(h @ layer.kernel[...] + layer.bias[...])
    close(z[:, :4], h)


def test_star_of_one_domain_is_the_mlp_of_the_products():
    strategy = drawn(STAR(WIDTH, TASKS, num_domains=1, units=(7, 4), dropout=0.0, rngs=nnx.Rngs(0)))
    context = Context(domain=jnp.zeros(len(X), jnp.int32))
    h = strategy.norm(jnp.asarray(X), context)
    for layer in strategy.network.layers:
        h = nnx.relu(h @ (layer.kernel[...] * layer.own_kernel[...][0]) + layer.bias[...] + layer.own_bias[...][0])
    close(output(strategy, jnp.asarray(X), context)[:, :4], h)


def test_a_domain_that_is_absent_keeps_what_is_its_own():
    found = gradients(make("star"), domain=np.where(DOMAIN == 1, 0, DOMAIN))
    own = [path for path in found if path.split("/")[-1] in ("own_kernel", "own_bias", "domain_scale", "embedding")]
    assert len(own) == 6
    for path in own:
        assert np.all(found[path][1] == 0) and np.any(found[path][0] != 0) and np.any(found[path][2] != 0), path


# SAR-Net


def test_shared_experts_behind_equal_gates_know_no_domain():
    strategy = SARNet(WIDTH, TASKS, num_domains=3, num_specific=0, units=(7, 4), dropout=0.0, rngs=nnx.Rngs(0))
    strategy.gate.kernel[...] = jnp.broadcast_to(strategy.gate.kernel[...][:1], strategy.gate.kernel.shape)
    one, other = (step(strategy, domain=domain, train=False)[0] for domain in (DOMAIN, (DOMAIN + 1) % 3))
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_foreign_experts_get_no_gradient():
    found = gradients(make("sar_net"), domain=0 * DOMAIN + 2)
    for path, own in (
        ("specific/kernel", slice(4, 6)),
        ("specific/bias", slice(4, 6)),
        ("gate/kernel", 2),
        ("scale", 2),
    ):
        assert np.any(found[path][own] != 0)
        assert np.all(np.delete(found[path], np.arange(len(found[path]))[own], axis=0) == 0), path


# HAMUR


def test_adapters_off_leave_the_networks_of_the_domains():
    strategy = make("hamur")
    for adapter in strategy.adapters:
        adapter.norm.scale[...] = 0 * adapter.norm.scale[...]
        adapter.norm.bias[...], adapter.norm.domain_bias[...] = jnp.zeros_like(adapter.norm.bias), jnp.zeros((3, 1))
    layers = [cases.layer(one) for one in strategy.layers]
    expected = [references.mlp(row, [(w[m], b[m]) for w, b in layers]) for row, m in zip(X, DOMAIN, strict=True)]
    close(step(strategy, train=False)[0], np.stack(expected))


# AdaSparse


def test_pruners_of_zeros_leave_the_network():
    strategy = make("adasparse")
    for pruner in strategy.pruners:
        pruner.kernel[...] = jnp.zeros_like(pruner.kernel)
    expected = [references.mlp(row, cases.mlp(strategy.network)) for row in X]
    close(step(strategy, train=False)[0], np.stack(expected))


def test_units_below_the_threshold_are_off():
    strategy = make("adasparse, high threshold")
    weights = jax.jit(lambda x, domain: strategy.gates(x, Context(domain=domain)))(X, DOMAIN)
    for weight in map(np.asarray, weights.values()):
        assert np.any(weight == 0) and np.any(weight > 0) and np.all((weight == 0) | (weight >= 0.9))


def test_alpha_grows_in_training_only():
    strategy = AdaSparse(WIDTH, TASKS, num_domains=3, units=(4,), growth=0.5, dropout=0.0, rngs=nnx.Rngs(0))
    first, states = step(strategy)
    assert states == {"alpha": 1.5}
    strategy.alpha[...] = jnp.asarray(states["alpha"])
    second, states = step(strategy, train=False)
    assert states == {"alpha": 1.5} and not np.allclose(first, second)  # it is read, and left


# AdaptDHM


def test_clusters_in_training():
    strategy = make("adapt_dhm")
    params, centres = {"layers": cases.star_layers(strategy.network)}, cases.array(strategy.centres)
    x = X.astype(np.float64)
    expected, moved = references.adapt_dhm_train(params, centres, x, TASKS, WEIGHT)
    y, states = step(strategy)
    close((y, states["centres"]), (expected[TASKS[0]], moved))
    assert np.abs(moved - centres).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(states["centres"], axis=1), 1.0, rtol=1e-6)
    assert len({*references.adapt_dhm_route(centres, x, WEIGHT)[0]}) > 1
    np.testing.assert_array_equal(step(strategy, train=False)[1]["centres"], np.float32(centres))


def test_one_cluster_is_one_network():
    strategy = AdaptDHM(WIDTH, TASKS, num_clusters=1, units=(7, 4), dropout=0.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.linalg.norm(strategy.centres[...], axis=1), 1.0, rtol=1e-6)
    layers = [cases.layer(one) for one in strategy.network.layers]
    close(step(strategy)[0], np.stack([references.mlp(row, layers) for row in X]))
    close(step(strategy, x=0 * X)[1]["centres"], strategy.centres[...])  # nothing pulls
