"""Maps of parameters: every form slice by slice, units that are exchanged, and a least-squares scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.sharing import MMoE
from mtl_jax.transfer import LinearMap, NonlinearMap


@pytest.fixture(scope="module")
def stacked(make_model):
    """A model whose shared kernels are those of three experts."""
    return make_model(sharing=MMoE, num_experts=3, expert_units=(6, 5), dropout=0.0)


@pytest.fixture
def mapped(make_step, stacked, perturbed):
    """Strategy -> kernels and biases of the source, the map of a kernel by name, and those of the target."""

    def build(strategy):
        step, state = make_step(stacked, strategy)
        state = perturbed(state, 0.3)
        maps = {path: np.asarray(array, np.float64) for path, array in state.params.items() if path.startswith("aux")}
        source = {
            path: np.asarray(array, np.float64) for path, array in (state.kept.arrays["frozen"] | state.rest).items()
        }
        return source, maps, step.evaluated(state)

    return build


LAYERS = [f"sharing/experts/layers/{n}" for n in (0, 1)]


def test_a_scalar_scales_the_kernel_of_each_expert(mapped):
    source, maps, target = mapped(LinearMap("scalar"))
    for layer in LAYERS:
        scale = maps[f"aux/map/{layer}/kernel/a"]
        assert scale.shape == (3, 1, 1)
        for expert in range(3):
            expected = scale[expert, 0, 0] * source[f"{layer}/kernel"][expert]
            np.testing.assert_allclose(target[f"{layer}/kernel"][expert], expected, rtol=1e-6)
        np.testing.assert_array_equal(target[f"{layer}/bias"], source[f"{layer}/bias"])


def test_a_diagonal_scales_units_and_moves_their_biases(mapped):
    source, maps, target = mapped(LinearMap())
    for layer in LAYERS:
        a, b = (maps[f"aux/map/{layer}/kernel/{name}"] for name in "ab")
        for expert in range(3):
            kernel, bias = source[f"{layer}/kernel"][expert], source[f"{layer}/bias"][expert]
            np.testing.assert_allclose(target[f"{layer}/kernel"][expert], kernel @ np.diag(a[expert]), rtol=1e-6)
            np.testing.assert_allclose(target[f"{layer}/bias"][expert], a[expert] * bias + b[expert], rtol=1e-6)


def test_left_and_right_multiply_each_kernel(mapped):
    source, maps, target = mapped(LinearMap("left_right"))
    for layer in LAYERS:
        p, q = (maps[f"aux/map/{layer}/kernel/{name}"] for name in "pq")
        for expert in range(3):
            expected = p[expert] @ source[f"{layer}/kernel"][expert] @ q[expert]
            np.testing.assert_allclose(target[f"{layer}/kernel"][expert], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(target[f"{layer}/bias"], source[f"{layer}/bias"])


def test_a_nonlinear_map_moves_units_one_by_one(mapped):
    source, maps, target = mapped(NonlinearMap(7))
    for layer in LAYERS:
        v1, c1, v2, c2 = (maps[f"aux/map/{layer}/kernel/{name}"] for name in ("v1", "c1", "v2", "c2"))
        for expert in range(3):
            kernel, bias = source[f"{layer}/kernel"][expert], source[f"{layer}/bias"][expert]
            for unit in range(kernel.shape[1]):
                u = np.append(kernel[:, unit], bias[unit])
                u = u + v2[expert] @ np.tanh(v1[expert] @ u + c1[expert][:, 0]) + c2[expert][:, 0]
                np.testing.assert_allclose(target[f"{layer}/kernel"][expert][:, unit], u[:-1], rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(target[f"{layer}/bias"][expert][unit], u[-1], rtol=1e-5, atol=1e-6)


def adapted(strategy, params, seed=0, frozen=None):
    """The target of some parameters under a random map; ``frozen`` replaces those of the source."""
    trained, kept = strategy.init(params, {}, jax.random.key(0))
    rng = np.random.default_rng(seed)
    trained = {path: trained[path] + 0.3 * rng.normal(size=trained[path].shape) for path in sorted(trained)}
    return strategy.adapt(trained, kept if frozen is None else {"frozen": frozen}, None, None)


@pytest.mark.parametrize("bias", [True, False])
def test_units_of_the_source_that_are_exchanged_are_exchanged_in_the_target(bias):
    rng = np.random.default_rng(1)
    source = {"sharing/kernel": jnp.asarray(rng.normal(size=(4, 6)))}
    source |= {"sharing/bias": jnp.asarray(rng.normal(size=6))} if bias else {}
    order = rng.permutation(6)
    exchanged = {path: array[..., order] for path, array in source.items()}
    target, other = adapted(NonlinearMap(5), source), adapted(NonlinearMap(5), source, frozen=exchanged)
    for path in source:
        np.testing.assert_allclose(other[path], target[path][..., order], rtol=1e-5, atol=1e-6)
        assert np.abs(target[path] - source[path]).max() > 0.01


def test_a_kernel_without_a_bias_has_no_map_of_one():
    source = {"sharing/kernel": jnp.ones((2, 3))}
    trained, _ = LinearMap().init(source, {}, jax.random.key(0))
    assert set(trained) == {"aux/map/sharing/kernel/a"}
    assert set(adapted(LinearMap(), source)) == {"sharing/kernel"}
    trained, _ = NonlinearMap(4).init(source, {}, jax.random.key(0))
    assert trained["aux/map/sharing/kernel/v2"].shape == (2, 4)


def test_the_best_scalar_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, y, kernel = rng.normal(size=(20, 3)), rng.normal(size=(20, 1)), jnp.asarray(rng.normal(size=(3, 1)))
        strategy = LinearMap("scalar")
        params, kept = strategy.init({"sharing/kernel": kernel}, {}, jax.random.key(0))

        def loss(params):
            return jnp.mean(jnp.square(x @ strategy.adapt(params, kept, None, None)["sharing/kernel"] - y))

        path = "aux/map/sharing/kernel/a"
        slope, curvature = jax.grad(loss)(params)[path], jax.hessian(loss)(params)[path][path]
        found = params[path].item() - slope.item() / curvature.item()  # the loss is quadratic in it
        predicted = np.asarray(x @ kernel)
    assert found == pytest.approx(np.vdot(predicted, y) / np.vdot(predicted, predicted), rel=1e-10)


def test_only_the_kernels_of_the_pattern_are_mapped(make_step, stacked, perturbed, arrays_of):
    for strategy in (LinearMap(targets=".*/layers/0/kernel"), NonlinearMap(3, targets=".*/layers/0/kernel")):
        step, state = make_step(stacked, strategy)
        target, source = step.evaluated(perturbed(state, 0.3)), arrays_of(stacked)
        moved = {path for path in source if np.any(target[path] != source[path]) and path.startswith("sharing/experts")}
        assert moved == {f"{LAYERS[0]}/kernel", f"{LAYERS[0]}/bias"}
