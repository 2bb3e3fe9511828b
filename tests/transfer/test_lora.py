"""LoRA: how factors begin, the merged kernels, their rank, and that full rank is no restriction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.sharing import MMoE
from mtl_jax.train import Optimizer
from mtl_jax.transfer import LoRA

PATH = "sharing/bottom/layers/0/kernel"


@pytest.fixture(scope="module")
def stacked(make_model):
    """A model whose shared kernels are those of three experts."""
    return lambda seed=0: make_model(seed, sharing=MMoE, num_experts=3, expert_units=(6, 5), dropout=0.0)


def factors(params, path):
    return (np.asarray(params[f"aux/lora/{path}/{name}"], np.float64) for name in "ab")


def slices(kernel):
    return kernel.reshape(-1, *kernel.shape[-2:])


def test_factors_begin_within_their_bounds_and_at_zero(make_step, stacked):
    _, state = make_step(stacked(), LoRA(2))
    frozen = state.kept.arrays["frozen"]
    assert sorted(frozen) == [f"sharing/experts/layers/{n}/kernel" for n in (0, 1)]
    for path, kernel in frozen.items():
        (*stack, m, n), (a, b) = kernel.shape, factors(state.params, path)
        assert a.shape == (*stack, m, 2) and b.shape == (*stack, 2, n)
        assert not np.any(b) and np.all(np.abs(a) <= 1 / np.sqrt(m))
        assert len(np.unique(a)) == a.size  # experts start from draws of their own
    wide, _ = LoRA(64).init({PATH: jnp.zeros((100, 3))}, {}, jax.random.key(0))
    assert np.abs(wide[f"aux/lora/{PATH}/a"]).max() == pytest.approx(0.1, rel=0.01)
    assert np.std(wide[f"aux/lora/{PATH}/a"]) == pytest.approx(0.1 / np.sqrt(3), rel=0.05)


def test_draws_follow_from_the_key_of_the_run(make_step, make_model):
    first, again, other = (make_step(make_model(), LoRA(2), key=key)[1].params for key in (0, 0, 1))
    path = f"aux/lora/{PATH}/a"
    np.testing.assert_array_equal(first[path], again[path])
    assert np.any(first[path] != other[path])


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 6 / 2), (True, 6 / np.sqrt(2))])
def test_kernels_of_all_experts_are_merged_slice_by_slice(make_step, stacked, perturbed, arrays_of, stabilised, scale):
    model = stacked()
    step, state = make_step(model, LoRA(2, 6.0, rank_stabilised=stabilised))
    state = perturbed(state, 0.3)
    merged = step.evaluated(state)
    for path, kernel in arrays_of(model).items():
        if path not in state.kept.arrays["frozen"]:
            np.testing.assert_array_equal(merged[path], (state.params | state.rest)[path])
            continue
        a, b = factors(state.params, path)
        changes = slices(np.asarray(merged[path], np.float64) - kernel)
        for change, of_a, of_b in zip(changes, slices(a), slices(b), strict=True):
            np.testing.assert_allclose(change, scale * of_a @ of_b, atol=1e-6)
            assert np.linalg.svd(change, compute_uv=False)[2:].max() < 1e-6 < np.abs(change).max()


def test_the_merged_model_predicts_what_the_two_paths_do(make_model, make_step, perturbed, make_batch):
    """y = x W + alpha / r (x A) B, by hand through the shared layers."""
    model, batch = make_model(), make_batch(12)
    step, state = make_step(model, LoRA(2, 3.0))
    state = perturbed(state, 0.3)
    arrays = {path: np.asarray(array, np.float64) for path, array in (state.params | state.rest).items()}
    x = np.concatenate([arrays["tables/user/rows"][batch["ids"][:, 0]], np.asarray(batch["dense"])], axis=1)
    for number in (0, 1):
        layer = f"sharing/bottom/layers/{number}"
        kernel = np.asarray(state.kept.arrays["frozen"][f"{layer}/kernel"], np.float64)
        a, b = factors(state.params, f"{layer}/kernel")
        x = np.maximum(x @ kernel + 3.0 / 2 * (x @ a) @ b + arrays[f"{layer}/bias"], 0)
    merged = step.functional.merge(step.evaluated(state))
    np.testing.assert_allclose(merged.common(merged.inputs(batch)), x, rtol=1e-5, atol=1e-6)


def test_full_rank_reaches_least_squares():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, y, kernel = rng.normal(size=(30, 4)), rng.normal(size=(30, 2)), jnp.asarray(rng.normal(size=(4, 2)))
        strategy = LoRA(2, 2.0)
        params, kept = strategy.init({"sharing/kernel": kernel}, {}, jax.random.key(0))

        def loss(params):
            return jnp.mean(jnp.square(x @ strategy.adapt(params, kept, None, None)["sharing/kernel"] - y))

        def descend(_, params):
            return jax.tree.map(lambda leaf, slope: leaf - 0.2 * slope, params, jax.grad(loss)(params))

        params = jax.lax.fori_loop(0, 5000, descend, params)
        found = strategy.adapt(params, kept, None, None)["sharing/kernel"]
    np.testing.assert_allclose(found, np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-6)


def test_decay_acts_on_factors_and_not_on_what_is_frozen(make_model, make_step, make_batch):
    step, state = make_step(make_model(), LoRA(2), optimizer=Optimizer(weight_decay=0.1))
    after, _ = jax.jit(step)(state, make_batch(20))
    jax.tree.map(np.testing.assert_array_equal, after.kept, state.kept)
    jax.tree.map(np.testing.assert_array_equal, after.rest, state.rest)
