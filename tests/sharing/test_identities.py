"""Where one strategy becomes another, what penalties are, and what gates do at their ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtl_jax.errors import ConfigError
from mtl_jax.nn import Gate
from mtl_jax.sharing import (
    CGC,
    DBMTL,
    MTAN,
    PLE,
    AdaTT,
    AdaTTSp,
    Context,
    CrossStitch,
    DSelectK,
    MMoE,
    OMoE,
    SharedBottom,
    SingleTask,
    Sluice,
    SNRAver,
    SNRTrans,
    SoftSharing,
)
from mtl_jax.sharing.dselect_k import smooth_step
from mtl_jax.sharing.snr import LOWER, TEMPERATURE, UPPER, hard_concrete

TASKS = ("click", "buy", "return")
X = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)


def make(kind, tasks=TASKS, seed=0, **options):
    return kind(6, tasks, dropout=0.0, rngs=nnx.Rngs(seed), **options)


def assert_equal(one, other, tasks=TASKS):
    outputs, expected = jax.jit(lambda x: (one(x), other(x)))(X)
    for task in tasks:
        np.testing.assert_allclose(outputs[task], expected[task], rtol=1e-5, atol=1e-6)


def set_experts(experts, kernels_and_biases):
    for layer, (kernel, bias) in zip(experts.layers, kernels_and_biases, strict=True):
        layer.kernel[...], layer.bias[...] = kernel, bias


def of_experts(experts):
    return [(layer.kernel[...], layer.bias[...]) for layer in experts.layers]


@pytest.mark.parametrize("kind", [OMoE, MMoE, DSelectK])
def test_one_expert_is_a_shared_bottom(kind):
    mixture = make(kind, num_experts=1, expert_units=(7, 4))
    bottom = make(SharedBottom, units=(7, 4))
    for layer, (kernel, bias) in zip(bottom.bottom.layers, of_experts(mixture.experts), strict=True):
        layer.kernel[...], layer.bias[...] = kernel[0], bias[0]
    assert_equal(mixture, bottom)


def test_mmoe_with_one_gate_for_all_is_omoe():
    many, one = make(MMoE, num_experts=3, expert_units=(7, 4)), make(OMoE, num_experts=3, expert_units=(7, 4), seed=1)
    set_experts(many.experts, of_experts(one.experts))
    for task in TASKS:
        many.task[task].kernel[...] = one.gate.kernel[...]
    assert_equal(many, one)


def test_cgc_is_ple_with_one_level():
    cgc, ple = make(CGC, expert_units=(7, 4), num_shared=2), make(PLE, levels=((7, 4),), num_shared=2)
    assert_equal(cgc, ple)
    assert isinstance(cgc, PLE)


def test_cgc_without_own_experts_is_mmoe():
    cgc, mmoe = (
        make(CGC, expert_units=(7, 4), num_specific=0, num_shared=3),
        make(MMoE, num_experts=3, expert_units=(7, 4)),
    )
    set_experts(mmoe.experts, of_experts(cgc.shared))
    for task in TASKS:
        mmoe.task[task].kernel[...] = cgc.task[task].gate.kernel[...]
    assert_equal(cgc, mmoe)


def test_cgc_without_shared_experts_shares_nothing():
    cgc = make(CGC, expert_units=(7, 4), num_specific=2, num_shared=0)
    assert cgc(X)["buy"].shape == (5, 4)
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(cgc, nnx.Param))} == {"task"}


def test_a_single_task_reads_all_experts():
    """PLE with one task: a chain of mixtures over its own and the shared experts."""
    ple = make(PLE, tasks=("buy",), levels=((7,), (4,)), num_specific=2, num_shared=1)
    assert ple(X)["buy"].shape == (5, 4)
    assert ple.gates(X)["buy/level 1"].shape == (5, 3)


@pytest.mark.parametrize("per_unit", [False, True])
def test_cross_stitch_with_the_identity_is_single_task(per_unit):
    stitched = make(CrossStitch, units=(7, 4), own=1.0, per_unit=per_unit)
    single = make(SingleTask, units=(7, 4), share_embeddings=True)
    for k, task in enumerate(TASKS):
        for mine, layer in zip(single.task[task].layers, stitched.layers, strict=True):
            mine.kernel[...], mine.bias[...] = layer.kernel[...][k], layer.bias[...][k]
    assert_equal(stitched, single)


def test_cross_stitch_starts_with_rows_that_add_up_to_one():
    strategy = make(CrossStitch, units=(7, 4))
    np.testing.assert_allclose(strategy.stitch[0][...].sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(strategy.task["buy"].stitch[...], [0.05, 0.9, 0.05], rtol=1e-6)
    alone = make(CrossStitch, tasks=("buy",), units=(7, 4))
    np.testing.assert_array_equal(alone.task["buy"].stitch[...], [1.0])


def test_sluice_with_the_identity_and_the_last_level_is_single_task():
    sluice = make(Sluice, width=4, num_layers=2, own=1.0)
    single = make(SingleTask, units=(4, 4), share_embeddings=True)
    for k, task in enumerate(TASKS):
        sluice.task[task].beta[...] = jnp.array([0.0, 1.0])
        for mine, layer in zip(single.task[task].layers, sluice.layers, strict=True):
            mine.kernel[...], mine.bias[...] = layer.kernel[...][k], layer.bias[...][k]
    assert_equal(sluice, single)


def test_sluice_penalty_is_zero_for_orthogonal_subspaces_and_a_sum_over_pairs_else():
    sluice = make(Sluice, width=4, num_layers=2, orthogonality=0.1)
    by_hand = 0.0
    for layer in sluice.layers:
        for kernel in np.asarray(layer.kernel[...], np.float64):
            by_hand += sum((kernel[:, a] @ kernel[:, b]) ** 2 for a in range(2) for b in (2, 3))
    np.testing.assert_allclose(sluice.regulariser(), 0.1 * by_hand, rtol=1e-5)
    for layer in sluice.layers:
        kernel = np.zeros(layer.kernel.shape, np.float32)
        kernel[:, 0, :2] = kernel[:, 1, 2:] = 1.0  # one subspace reads one input, the other another one
        layer.kernel[...] = kernel
    assert float(sluice.regulariser()) == 0.0


def test_mtan_with_open_masks_is_a_shared_bottom():
    mtan = make(MTAN, units=(4,), norm="none")
    for task in TASKS:
        mtan.task[task][0].second.bias[...] = jnp.full(4, 50.0)
    trunk = np.maximum(X @ mtan.inner[0].kernel[...] + mtan.inner[0].bias[...], 0)
    trunk = np.maximum(trunk @ mtan.outer[0].kernel[...] + mtan.outer[0].bias[...], 0)
    for z in mtan(X).values():
        np.testing.assert_allclose(z, trunk, rtol=1e-5, atol=1e-6)


def test_soft_sharing_pulls_networks_together():
    """R over pairs, by hand; its gradient 2 alpha (K theta_k - sum theta_j); 0 and a finite gradient at equal networks."""
    strategy = make(SoftSharing, units=(4,), strength=0.01)
    graph, state = nnx.split(strategy, nnx.Param)

    def penalty(state):
        return nnx.merge(graph, state).regulariser()

    kernels = np.stack([np.asarray(strategy.task[task].layers[0].kernel[...], np.float64) for task in TASKS])
    pairs = [(0, 1), (0, 2), (1, 2)]
    by_hand = 0.01 * sum(((kernels[a] - kernels[b]) ** 2).sum() for a, b in pairs)  # biases are 0
    np.testing.assert_allclose(strategy.regulariser(), by_hand, rtol=1e-5)
    gradient = jax.grad(penalty)(state)
    for k, task in enumerate(TASKS):
        expected = 2 * 0.01 * (3 * kernels[k] - kernels.sum(axis=0))
        np.testing.assert_allclose(gradient["task"][task]["layers"][0]["kernel"][...], expected, rtol=1e-4, atol=1e-6)
    for task in TASKS[1:]:
        nnx.update(strategy.task[task], nnx.state(strategy.task["click"]))
    assert float(strategy.regulariser()) < 1e-12
    zero = jax.grad(penalty)(nnx.state(strategy, nnx.Param))
    assert all(float(jnp.abs(leaf).max()) < 1e-6 for leaf in jax.tree.leaves(zero))


def test_soft_sharing_without_strength_is_single_task():
    soft, single = make(SoftSharing, units=(7, 4), strength=0.0), make(SingleTask, units=(7, 4), share_embeddings=True)
    assert_equal(soft, single)
    assert float(soft.regulariser()) == 0.0


def test_adatt_without_a_shared_module_is_adatt_sp():
    options = {"levels": ((7,), (4,)), "num_specific": 2}
    assert_equal(make(AdaTT, num_shared=0, **options), make(AdaTTSp, **options))


def test_adatt_with_one_task_and_one_expert_doubles_it():
    strategy = make(AdaTTSp, tasks=("buy",), levels=((4,),))
    np.testing.assert_allclose(strategy(X)["buy"], 2 * strategy.experts[0](X)[0], rtol=1e-6)


def test_dbmtl_without_parents_is_a_shared_bottom_with_towers():
    strategy = make(DBMTL, bottom=(7,), units=())
    for z in strategy(X).values():
        np.testing.assert_array_equal(z, strategy.bottom(X))


def test_dbmtl_does_not_depend_on_the_order_in_which_parents_are_written():
    options = {"bottom": (7,), "units": (4,), "relation_units": (4,)}
    one = make(DBMTL, parents={"return": ["click", "buy"], "buy": ["click"]}, **options)
    other = make(DBMTL, parents={"buy": ["click"], "return": ["buy", "click"]}, **options)
    assert_equal(one, other)


def test_dbmtl_children_leave_detached_parents_alone():
    options = {"parents": {"buy": ["click"]}, "bottom": (7,), "units": (4,), "relation_units": (4,)}
    attached, detached = make(DBMTL, **options), make(DBMTL, detach_parents=True, **options)
    assert_equal(attached, detached)
    assert set(attached.task) == {"buy", "return"} and set(detached.task) == set(TASKS)


# Gates


def test_smooth_step_has_a_continuous_derivative():
    slope = jax.vmap(jax.grad(lambda t: smooth_step(t, 2.0)))
    t = jnp.array([-3.0, -1.0, -0.999, 0.0, 0.999, 1.0, 3.0])
    np.testing.assert_allclose(smooth_step(t, 2.0), [0, 0, 0.75e-6, 0.5, 1 - 0.75e-6, 1, 1], atol=1e-6)
    np.testing.assert_allclose(slope(t), [0, 0, 0, 0.75, 0, 0, 0], atol=2e-3)


@pytest.mark.parametrize("num_experts", [4, 6, 8])
def test_saturated_selectors_choose_at_most_as_many_experts_as_asked_for(num_experts):
    strategy = make(DSelectK, num_experts=num_experts, expert_units=(4,), num_selected=2)
    gate = strategy.task["buy"]
    start = gate(X)
    if num_experts != 6:
        np.testing.assert_allclose(start.sum(axis=1), 1.0, rtol=1e-5)
    assert ((np.asarray(start) > 0).sum(axis=1) == num_experts).all()
    gate.code[...] = 1e4 * gate.code[...]
    chosen = (np.asarray(gate(X)) > 0).sum(axis=1)
    assert (chosen <= 2).all() and np.isfinite(gate(X)).all()


def test_dselect_k_regulariser_is_that_of_the_paper_for_every_task():
    strategy = make(DSelectK, num_experts=6, expert_units=(4,), entropy=0.5)
    by_hand = np.zeros(len(X))
    for task in TASKS:
        r = np.asarray(strategy.task[task].codes(jnp.asarray(X)), np.float64)[..., :6]
        by_hand += 0.5 * -(r * np.log(r)).sum(-1).mean(-1) + (1 / r.sum(-1)).mean(-1)
    np.testing.assert_allclose(strategy.row_regulariser(strategy.common(X)), by_hand, rtol=1e-5)


def test_dselect_k_regulariser_is_finite_where_a_selector_has_chosen():
    strategy = make(DSelectK, num_experts=4, expert_units=(4,))
    graph, state = nnx.split(strategy, nnx.Param)
    for task in TASKS:
        state["task"][task]["code"][...] = 1e4 * state["task"][task]["code"][...]

    def penalty(state):
        module = nnx.merge(graph, state)
        return module.row_regulariser(module.common(X)).sum()

    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(jax.jit(jax.grad(penalty))(state)))


def test_hard_concrete_gates_are_open_as_often_as_the_penalty_says():
    log_alpha = jnp.array([-2.0, 0.0, 2.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.vmap(lambda key: hard_concrete(log_alpha, key))(keys))
    assert drawn.min() == 0.0 and drawn.max() == 1.0
    expected = jax.nn.sigmoid(log_alpha - TEMPERATURE * np.log(-LOWER / UPPER))
    np.testing.assert_allclose((drawn > 0).mean(axis=0), expected, atol=0.012)
    np.testing.assert_array_equal(hard_concrete(jnp.array([-50.0, 50.0]), None), [0.0, 1.0])


@pytest.mark.parametrize("kind", [SNRTrans, SNRAver])
def test_snr_penalty_is_the_expected_number_of_open_connections(kind):
    strategy = make(kind, num_nodes=(3, 2), units=(4, 4, 4), penalty=0.1, log_alpha=1.0)
    open_ = 1 / (1 + np.exp(-(1.0 - TEMPERATURE * np.log(-LOWER / UPPER))))
    np.testing.assert_allclose(strategy.regulariser(), 0.1 * open_ * (3 * 2 + 2 * 3), rtol=1e-5)


def test_snr_gates_are_drawn_once_a_step_for_all_rows():
    """One key for all devices decides; that of the rows does not."""
    strategy = make(SNRTrans, num_nodes=(3, 2), units=(4, 4, 4), log_alpha=0.0)
    context = Context(train=True, rngs=jax.random.key(0), step_rngs=jax.random.key(1))
    first = strategy(X, context)["buy"]
    np.testing.assert_array_equal(first, strategy(X, context._replace(rngs=jax.random.key(7)))["buy"])
    assert not np.allclose(first, strategy(X, context._replace(step_rngs=jax.random.key(7)))["buy"])
    np.testing.assert_allclose(first[2:3], strategy(X[2:3], context)["buy"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs a key"):
        strategy(X, Context(train=True))


def test_gate_options():
    """Each of them changes the weights or the parameters, and the default is a linear softmax."""
    x = jnp.asarray(X)
    plain = Gate(6, 3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(plain(x), jax.nn.softmax(x @ plain.kernel[...]), rtol=1e-6)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(plain))] == [("kernel",)]
    cold = Gate(6, 3, temperature=0.25, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(cold(x), jax.nn.softmax(4 * x @ plain.kernel[...]), rtol=1e-5)
    biased = Gate(6, 3, bias=True, rngs=nnx.Rngs(0))
    biased.bias[...] = jnp.array([5.0, 0.0, 0.0])
    assert float(biased(x)[:, 0].min()) > float(plain(x)[:, 0].min())
    assert Gate(6, 3, hidden=(5, 4), rngs=nnx.Rngs(0)).kernel.shape == (4, 3)
    normed = Gate(6, 3, norm="layer", rngs=nnx.Rngs(0))
    assert not np.allclose(normed(x), plain(x))
    dropped = Gate(6, 3, dropout=0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(dropped(x), plain(x))
    assert not np.allclose(dropped(x, Context(train=True, rngs=jax.random.key(0))), plain(x))


WRONG = {
    "no levels": (PLE, {"levels": ()}, "levels is empty"),
    "numbers a level": (PLE, {"num_specific": (1, 2, 3)}, "one for each of 2 levels"),
    "no experts": (CGC, {"num_specific": 0, "num_shared": 0}, "both 0"),
    "unknown task": (CGC, {"num_specific": {"clik": 1}}, "a number for each of"),
    "negative": (CGC, {"num_shared": -1}, "num_shared is -1"),
    "no own experts": (AdaTT, {"num_specific": 0}, "at least one expert"),
    "odd width": (Sluice, {"width": 5}, "even number"),
    "own": (CrossStitch, {"own": 1.5}, "own is 1.5"),
    "no layers": (CrossStitch, {"units": ()}, "units is empty"),
    "strength": (SoftSharing, {"strength": -1.0}, "strength is -1.0"),
    "norm": (MTAN, {"norm": "batch"}, "norm is 'batch'"),
    "widths": (SNRTrans, {"units": (4, 4)}, "a width for each shared level"),
    "unequal": (SNRAver, {"units": (4, 4, 5)}, "equal widths"),
    "gamma": (DSelectK, {"gamma": 0.0}, "gamma is 0"),
    "circle": (DBMTL, {"parents": {"buy": ["click"], "click": ["buy"]}}, "go in a circle"),
    "parent": (DBMTL, {"parents": {"buy": ["clik"]}}, "clik"),
    "relation": (DBMTL, {"parents": {"buy": ["click"]}, "units": (4,), "relation_units": (5,)}, "one width of all"),
    "temperature": (MMoE, {"gate": functools.partial(Gate, temperature=0.0)}, "gate.temperature is 0"),
    "gate norm": (MMoE, {"gate": functools.partial(Gate, norm="batch")}, "gate.norm is 'batch'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_refused_with_the_reason(name):
    kind, options, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        make(kind, **options)
