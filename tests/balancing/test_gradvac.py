"""GradVac against the paper's loop on explicit gradients, and PCGrad as its first step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import aggregate
from mtl_jax.balancing.gradvac import GradVacState, gradvac, vaccine_weights
from mtl_jax.balancing.pcgrad import projection_weights
from mtl_jax.errors import ConfigError


def paper_loop(jacobian, phi, beta, orders):
    """Algorithm 1 of the paper; changes phi in place."""
    total = np.zeros(jacobian.shape[1])
    for task, order in enumerate(orders):
        p = jacobian[task].copy()
        for other in order:
            if other == task:
                continue
            g, length = jacobian[other], np.linalg.norm(p)
            cosine, usual = p @ g / (length * np.linalg.norm(g)), phi[task, other]
            if cosine < usual:
                top = length * (usual * np.sqrt(1 - cosine**2) - cosine * np.sqrt(1 - usual**2))
                p = p + top / (np.linalg.norm(g) * np.sqrt(1 - usual**2)) * g
            phi[task, other] = (1 - beta) * usual + beta * cosine
        total += p
    return total


def random_orders(rng, num_tasks):
    return np.stack([rng.permutation(num_tasks) for _ in range(num_tasks)])


def test_goldens(gradvac_case, dtype, assert_golden):
    case = gradvac_case
    num_tasks = len(case["jacobian"])
    order = jnp.asarray(case.get("order", [range(num_tasks)] * num_tasks))
    phi = jnp.zeros((num_tasks, num_tasks), dtype)
    for call in [*case.get("history", []), case]:
        jacobian = jnp.asarray(call["jacobian"], dtype)
        weights, phi = vaccine_weights(jacobian @ jacobian.T, phi, case["params"]["beta"], order)
    assert weights.dtype == phi.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jacobian, case["direction"], case, dtype)
    assert_golden(phi, case["state_after"]["phi"], case, dtype)


@pytest.mark.parametrize("num_tasks", [1, 2, 4, 8])
def test_equals_the_papers_loop(num_tasks):
    """Over five steps on new gradients, so that the usual cosines are neither 0 nor the present ones."""
    rng = np.random.default_rng(num_tasks)
    expected_phi = np.zeros((num_tasks, num_tasks))
    with jax.enable_x64(True):
        phi = jnp.zeros((num_tasks, num_tasks))
        for _ in range(5):
            jacobian, orders = rng.normal(size=(num_tasks, 12)), random_orders(rng, num_tasks)
            expected = paper_loop(jacobian, expected_phi, 0.3, orders)
            weights, phi = vaccine_weights(jnp.asarray(jacobian @ jacobian.T), phi, 0.3, jnp.asarray(orders))
            np.testing.assert_allclose(weights @ jacobian, expected, rtol=1e-8, atol=1e-10)
            np.testing.assert_allclose(phi, expected_phi, rtol=1e-8, atol=1e-10)


def test_the_first_step_is_pcgrads():
    """In the same orders; at any rank, opposite rows included."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(4, rank)) @ rng.normal(size=(rank, 6)) for rank in (1, 2, 3, 4)]
    orders = jnp.asarray(random_orders(rng, 4))
    with jax.enable_x64(True):
        gramians = jnp.stack([row @ row.T for row in rows])
        weights, _ = jax.vmap(lambda g: vaccine_weights(g, jnp.zeros((4, 4)), 0.5, orders))(gramians)
        expected = jax.vmap(lambda g: projection_weights(g, orders))(gramians)
    np.testing.assert_allclose(weights, expected, atol=1e-10 * np.max(np.abs(expected)))


@pytest.mark.parametrize("usual", [-0.5, 0.0, 0.3, 0.9])
def test_an_edit_reaches_the_usual_cosine(usual):
    """Of the first task's gradient, with the second's, which it conflicts with more than usual."""
    jacobian = np.array([[-4.0, 1, 1], [6, 1, 1]])
    with jax.enable_x64(True):
        both = jnp.full((2, 2), usual)
        rest = jnp.array([[usual, usual], [-1.0, -1.0]])  # the second task accepts any angle
        weights, _ = vaccine_weights(jnp.asarray(jacobian @ jacobian.T), rest, 0.0, jnp.array([[0, 1], [0, 1]]))
        edited = np.asarray(weights) @ jacobian - jacobian[1]
        _, phi = vaccine_weights(jnp.asarray(jacobian @ jacobian.T), both, 1.0, jnp.array([[0, 1], [0, 1]]))
    lengths = np.linalg.norm(edited) * np.linalg.norm(jacobian[1])
    np.testing.assert_allclose(edited @ jacobian[1] / lengths, usual, atol=1e-9)
    cosine = -22 / np.sqrt(18 * 38)
    np.testing.assert_allclose(phi[0, 1], cosine, rtol=1e-12)  # what is remembered is the angle before the edit


def test_beta_zero_stays_pcgrad():
    rng = np.random.default_rng(1)
    state, balancer = gradvac(beta=0.0).init(3), gradvac(beta=0.0)
    for seed in range(3):
        jacobian = rng.normal(size=(3, 5))
        _, state = balancer.weigh(jnp.asarray(jacobian @ jacobian.T), jnp.ones(3), state, jax.random.key(seed))
    np.testing.assert_array_equal(state.phi, np.zeros((3, 3)))


def test_inactive_pairs_keep_their_cosine_and_are_not_visited():
    rng = np.random.default_rng(2)
    jacobian, phi = rng.normal(size=(3, 5)), rng.uniform(-0.5, 0.5, (3, 3)).astype(np.float32)
    jacobian[1] = 1e6
    active = jnp.array([True, False, True])
    with_gap = gradvac(beta=0.2).weigh(
        jnp.asarray(jacobian @ jacobian.T),
        jnp.ones(3),
        GradVacState(jnp.asarray(phi)),
        jax.random.key(0),
        active=active,
    )
    alone = jacobian[[0, 2]]
    small = jnp.asarray(phi[np.ix_([0, 2], [0, 2])])
    weights, expected = vaccine_weights(jnp.asarray(alone @ alone.T), small, 0.2, jnp.array([[0, 1], [0, 1]]))
    np.testing.assert_allclose(with_gap[0], [weights[0], 0, weights[1]], rtol=1e-5)
    after = np.asarray(with_gap[1].phi)
    off_diagonal = ~np.eye(2, dtype=bool)
    np.testing.assert_allclose(after[np.ix_([0, 2], [0, 2])][off_diagonal], expected[off_diagonal], rtol=1e-5)
    np.testing.assert_array_equal(after[1], phi[1])
    np.testing.assert_array_equal(after[:, 1], phi[:, 1])


@pytest.mark.parametrize(
    ("gramian", "expected"),
    [
        pytest.param([[2.0, -4], [-4, 8]], [1.0 + 2, 1.0 + 0.5], id="opposite tasks cancel"),
        pytest.param([[0.0, 0], [0, 25]], [1, 1], id="a zero gradient changes nothing"),
        pytest.param([[1.0, 0], [0, 4]], [1, 1], id="orthogonal tasks are summed"),
    ],
)
def test_limits(gramian, expected):
    weights, phi = vaccine_weights(jnp.array(gramian), jnp.zeros((2, 2)), 0.5, jnp.array([[0, 1], [0, 1]]))
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    assert np.all(np.isfinite(phi))


def test_identical_tasks_stay_finite():
    """Their usual cosine tends to 1, where the edit has a pole."""
    state, balancer = gradvac(beta=1.0).init(2), gradvac(beta=1.0)
    for gramian in ([[1.0, 1], [1, 1]], [[1.0, 0.999], [0.999, 1]], [[1.0, -1], [-1, 1]]):
        weights, state = balancer.weigh(jnp.array(gramian), jnp.ones(2), state, jax.random.key(0))
        assert np.all(np.isfinite(weights)) and np.all(np.isfinite(state.phi))


@pytest.mark.parametrize("beta", [-0.1, 1.1, np.nan])
def test_options_out_of_range_are_refused(beta):
    with pytest.raises(ConfigError, match=r"gradvac\(beta\)"):
        gradvac(beta=beta)


@pytest.mark.parametrize(("groups", "parts"), [("tensor", [["a/kernel"], ["a/bias"], ["b/kernel"]]),
                                               ("layer", [["a/kernel", "a/bias"], ["b/kernel"]])])  # fmt: skip
def test_groups_have_cosines_of_their_own(groups, parts):
    """Each is what the whole method makes of its arrays alone, under the same orders, over several steps."""
    rng = np.random.default_rng(5)
    shapes = {"a/bias": (3,), "a/kernel": (2, 3), "b/kernel": (4,)}
    template = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    balancer = gradvac(beta=0.3, groups=groups)
    state, alone = balancer.init(3, template), [gradvac(beta=0.3).init(3) for _ in parts]
    for step in range(3):
        jacobian = {path: jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32) for path, shape in shapes.items()}
        key, active = jax.random.key(step), jnp.array([True, step != 1, True])
        direction, state = aggregate(balancer, jacobian, state, key=key, active=active)
        for number, paths in enumerate(parts):
            rows = {path: jacobian[path] for path in paths}
            expected, alone[number] = aggregate(gradvac(beta=0.3), rows, alone[number], key=key, active=active)
            for path in paths:
                np.testing.assert_allclose(direction[path], expected[path], rtol=1e-4, atol=1e-5)


def test_unknown_groups_are_refused():
    with pytest.raises(ConfigError, match="gradvac\\(groups\\) is 'block'; expected one of"):
        gradvac(groups="block")
