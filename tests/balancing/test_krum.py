"""Krum: goldens, the paper's scores on explicit rows, and its limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.balancing.base import NoState, aggregate
from mtl_jax.balancing.krum import krum
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task


def weights_of(balancer, jacobian, active=None):
    gramian = jnp.asarray(np.asarray(jacobian) @ np.asarray(jacobian).T)
    return balancer.weigh(gramian, jnp.zeros(len(jacobian)), NoState(), None, active=active)[0]


def scores(jacobian, num_byzantine):
    """Sums of the squared distances to the K - f - 2 nearest others."""
    num_tasks = len(jacobian)
    return [
        sum(
            sorted(np.sum((jacobian[i] - jacobian[j]) ** 2) for j in range(num_tasks) if j != i)[
                : num_tasks - num_byzantine - 2
            ]
        )
        for i in range(num_tasks)
    ]


def test_goldens(krum_case, dtype, assert_golden):
    case = krum_case
    jacobian = jnp.asarray(case["jacobian"], dtype)
    weights, _ = krum(**case["params"]).weigh(jacobian @ jacobian.T, jnp.zeros(len(jacobian), dtype), NoState(), None)
    assert weights.dtype == dtype
    assert_golden(weights, case["weights"], case, dtype)
    assert_golden(weights @ jacobian, case["direction"], case, dtype)


@pytest.mark.parametrize(("num_tasks", "num_byzantine", "num_selected"), [(4, 1, 2), (7, 2, 3), (8, 0, 1)])
def test_selects_the_lowest_scores_of_the_paper(num_tasks, num_byzantine, num_selected):
    rng = np.random.default_rng(num_tasks)
    for _ in range(5):
        jacobian = rng.normal(size=(num_tasks, 12))
        expected = np.zeros(num_tasks)
        expected[np.argsort(scores(jacobian, num_byzantine))[:num_selected]] = 1 / num_selected
        balancer = krum(num_byzantine=num_byzantine, num_selected=num_selected)
        np.testing.assert_allclose(weights_of(balancer, jacobian), expected)


def test_without_byzantine_tasks_and_selecting_all_it_is_the_mean():
    jacobian = np.random.default_rng(0).normal(size=(5, 7))
    np.testing.assert_allclose(weights_of(krum(num_byzantine=0, num_selected=5), jacobian), np.full(5, 0.2))


def test_outliers_have_no_say():
    """Two of eight rows of one cluster are replaced by far ones: neither is selected, however far."""
    rng = np.random.default_rng(1)
    cluster = 1 + 0.1 * rng.normal(size=(8, 4))
    for far in (10.0, 1e4):
        jacobian = cluster.copy()
        jacobian[[2, 5]] = far * np.array([[1.0, 1, 1, 1], [-1, 1, 0, 0]])
        weights = weights_of(krum(num_byzantine=2, num_selected=4), jacobian)
        assert np.all(weights[np.array([2, 5])] == 0) and np.sum(weights > 0) == 4


def test_ties_go_to_the_first_task():
    np.testing.assert_array_equal(weights_of(krum(), np.ones((4, 2))), [1, 0, 0, 0])


def test_inactive_tasks_are_neither_candidates_nor_neighbours():
    rng = np.random.default_rng(2)
    jacobian = rng.normal(size=(8, 5))
    jacobian[[0, 4]] = jacobian[6]  # would be the best neighbours of all
    active = np.array([i not in (0, 4) for i in range(8)])
    balancer = krum(num_byzantine=1, num_selected=3)
    weights = weights_of(balancer, jacobian, jnp.asarray(active))
    np.testing.assert_array_equal(weights[active], weights_of(balancer, jacobian[active]))
    assert not np.any(weights[~active])


def test_too_few_candidates_are_averaged():
    jacobian = np.random.default_rng(3).normal(size=(5, 6))
    active = jnp.array([True, False, True, False, True])
    np.testing.assert_allclose(weights_of(krum(), jacobian, active), np.array([1, 0, 1, 0, 1]) / 3, rtol=1e-6)
    few = jnp.array([True, True, True, False, True])
    weights = weights_of(krum(num_byzantine=0, num_selected=5), jacobian, few)
    np.testing.assert_allclose(weights, np.array([1, 1, 1, 0, 1]) / 4)


def test_too_few_tasks_are_refused():
    tasks = [Task(name, "binary") for name in ("view", "click", "buy")]
    for call in (lambda: krum().for_tasks(tasks), lambda: krum().init(3), lambda: krum(num_selected=9).init(8)):
        with pytest.raises(ConfigError, match="expected at least"):
            call()
    with pytest.raises(ConfigError, match="expected at least 5"):
        aggregate(krum(num_byzantine=2), jnp.ones((4, 2)), NoState())


@pytest.mark.parametrize(
    "options", [{"num_byzantine": -1}, {"num_selected": 0}, {"num_byzantine": 0.5}, {"num_selected": True}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=f"krum\\({next(iter(options))}\\)"):
        krum(**options)
