"""References of strategies and links that are still to come, held to what is known of them in closed form."""

import numpy as np
import references as strategies
import references_domains as domains
import references_links as links

TASKS = ("click", "buy")
X = np.random.default_rng(0).standard_normal((6, 4))
DOMAIN = np.array([0, 1, 1, 0, 1, 2])


def draw(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape)


def network(*widths, seed=1):
    return [
        (draw(i, o, seed=seed + n), draw(o, seed=seed + n + 9))
        for n, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    ]


def test_aitm_of_one_task_is_its_network():
    found = strategies.aitm(X, ("buy",), {"buy": network(4, 3)}, {}, (np.eye(3),) * 3)
    np.testing.assert_allclose(found["buy"], np.maximum(X @ draw(4, 3) + draw(3, seed=10), 0))


def test_aitm_penalty_is_zero_for_chances_that_fall():
    falling = {"click": np.array([0.9, 0.5]), "buy": np.array([0.4, 0.5])}
    assert strategies.aitm_penalty(TASKS, falling) == 0
    assert np.isclose(strategies.aitm_penalty(TASKS[::-1], falling), 0.6 * 0.25)


def test_resflow_with_an_empty_network_repeats_the_task_before():
    layers = {
        "click": [{"layer": (draw(4, 3), draw(3)), "slope": 0.25, "norm": None}],
        "buy": [{"layer": (np.zeros((4, 3)), np.zeros(3)), "slope": 0.25, "norm": None}],
    }
    found = strategies.resflow(X, TASKS, layers)
    np.testing.assert_allclose(found["buy"], found["click"])


def test_branches_of_one_node_are_a_shared_bottom():
    experts = [network(4, 3)]
    found = strategies.ltb(X, TASKS, [experts], [None], {task: np.zeros(1) for task in TASKS})
    np.testing.assert_allclose(found["buy"], strategies.shared_bottom(X, TASKS, experts[0])["buy"])


def test_partitioned_norm_is_a_norm_within_each_domain():
    plain = {"gain": np.ones(4), "bias": np.zeros(4), "domain_gain": [np.ones(4)] * 3, "domain_bias": [np.zeros(4)] * 3}
    before = {"mean": [np.zeros(4)] * 3, "variance": [np.ones(4)] * 3}
    found, after = domains.partitioned_norm_train(plain, before, X, DOMAIN)
    for number in (0, 1):
        own = X[DOMAIN == number]
        np.testing.assert_allclose(found[DOMAIN == number], (own - own.mean(0)) / np.sqrt(own.var(0) + 1e-5))
        np.testing.assert_allclose(after["mean"][number], 0.01 * own.mean(0))
    np.testing.assert_allclose(found[5], X[5] / np.sqrt(1 + 1e-5))  # one row has no moments of its own
    np.testing.assert_allclose(after["mean"][2], 0)


def test_gates_of_pepnet_without_weights_are_open():
    closed = {"hidden": (np.zeros((6, 4)), np.zeros(4)), "output": (np.zeros((4, 4)), np.zeros(4))}
    np.testing.assert_allclose(domains.epnet({"domain_embedding": [np.ones(2)] * 3, "gate": closed}, X, DOMAIN), X)


def test_adapt_dhm_keeps_unit_centres():
    centres = draw(3, 4) / np.linalg.norm(draw(3, 4), axis=1, keepdims=True)
    cluster, after = domains.adapt_dhm_route(centres, X)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1)
    assert set(cluster) <= {0, 1, 2}


def test_chains_are_products_of_chances():
    a, b = draw(6), draw(6, seed=2)
    np.testing.assert_allclose(links.chain(a, b), -np.logaddexp.reduce([-a, -b, -a - b]))
    assert np.isclose(links.chain(np.zeros(1), np.zeros(1))[0], -np.log(3))


def test_escm2_without_a_click_has_nothing_to_weigh():
    losses, _, _ = links.escm2_ips(draw(6), draw(6, seed=2), np.zeros(6), np.zeros(6))
    assert losses["cvr_click"] == 0


def test_logit_residuals_add_up():
    logits = {task: draw(6, seed=seed) for seed, task in enumerate(TASKS)}
    found = links.logit_residual(logits, TASKS)
    np.testing.assert_allclose(found["buy"], logits["click"] + logits["buy"])
