"""Closed forms of transfer between two linear regressions, against simulation and the updates of mtl_jax.transfer."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax.data.dataset import PARTS, concatenated
from mtl_jax.data.domains import of_domains
from mtl_jax.data.linear_gaussian import (
    OPTIONS,
    best_strength,
    closed_form_risk,
    linear_gaussian,
    transfer_is_negative,
)
from mtl_jax.errors import ConfigError
from mtl_jax.transfer import L2SP, gradient_update

FACTS = {"delta": 0.3**0.5, "dim": 20, "source_rows": 200, "target_rows": 40}
UNEQUAL = {"source_noise": 0.5, "target_noise": 1.5, "norm": 0.7}
DRAWS = 1_500
STEPS = {"step_size": 0.3, "num_steps": 3}
CASES = [
    ("target", {}),
    ("source", {}),
    ("zero", {}),
    ("mix", {}),
    ("mix", {"share": 0.8}),
    ("pooled", {}),
    ("l2_sp", {}),
    ("l2_sp", {"strength": 10.0}),
    ("gradient_steps", STEPS),
    ("ascent", {"step_size": 0.1}),
    ("ascent", {"step_size": 0.1, "num_steps": 2}),
]
SMALL = {"dim": 3, "source_rows": 12, "target_rows": 8, "valid_rows": 6, "test_rows": 50}


@pytest.fixture(scope="module", params=[{}, UNEQUAL], ids=["equal noise", "unequal noise"])
def facts(request):
    return FACTS | request.param


@pytest.fixture(scope="module")
def draws(facts):
    """Field -> its values in many draws, stacked."""
    found = [linear_gaussian(**facts, seed=seed) for seed in range(DRAWS)]
    return {name: np.stack([getattr(draw, name) for draw in found]) for name in vars(found[0])}


@pytest.fixture(scope="module")
def of_source(draws):
    return solved(*moments(draws, "source"))


def moments(draws, domain):
    """X'X and X'y of each draw."""
    x, y = draws[f"x_{domain}"], draws[f"y_{domain}"]
    return np.swapaxes(x, 1, 2) @ x, np.einsum("sni,sn->si", x, y)


def solved(matrix, vector):
    return np.linalg.solve(matrix, vector[..., None])[..., 0]


def estimate(estimator, draws, facts, of_source, share=None, strength=None, step_size=None, num_steps=1):
    """What the estimator is, without use of the designs being orthogonal."""
    matrix, vector = moments(draws, "target")
    of_target = solved(matrix, vector)
    if estimator in ("target", "source", "zero"):
        return {"target": of_target, "source": of_source, "zero": np.zeros_like(of_target)}[estimator]
    if estimator == "mix":
        excess, variance = (closed_form_risk(name, **facts) for name in ("source", "target"))
        share = variance / (excess + variance) if share is None else share
        return share * of_source + (1 - share) * of_target
    if estimator == "pooled":
        return solved(*(a + b for a, b in zip(moments(draws, "source"), (matrix, vector), strict=True)))
    if estimator == "l2_sp":
        strength = best(facts) if strength is None else strength
        return solved(matrix + strength * np.eye(facts["dim"]), vector + strength * of_source)
    found = of_source
    for _ in range(num_steps):
        gradient = (np.einsum("sij,sj->si", matrix, found) - vector) / facts["target_rows"]
        found = found + (step_size if estimator == "ascent" else -step_size) * gradient
    return found


def best(facts):
    return best_strength(**{name: value for name, value in facts.items() if name != "norm"})


def assert_mean_is(expected, found, beta):
    """The mean squared distance to the truth is the expected one, within 5 standard errors."""
    risks = np.square(np.asarray(found, float) - beta).sum(1)
    error = risks.std(ddof=1) / math.sqrt(len(risks))
    assert abs(risks.mean() - expected) <= 5 * error + 1e-12
    assert error <= 0.02 * expected + 1e-12  # the test would see a wrong formula


def test_the_published_figures():
    expected = {"target": 0.5, "source": 0.4, "pooled": 0.2917, "l2_sp": 0.2222, "gradient_steps": 0.2629}
    for estimator, risk in expected.items():
        options = STEPS if estimator == "gradient_steps" else {}
        assert closed_form_risk(estimator, **FACTS, **options) == pytest.approx(risk, abs=5e-5)


@pytest.mark.parametrize(("estimator", "options"), CASES, ids=str)
def test_closed_forms_are_the_mean_of_a_simulation(estimator, options, draws, facts, of_source):
    found = estimate(estimator, draws, facts, of_source, **options)
    assert_mean_is(closed_form_risk(estimator, **facts, **options), found, draws["beta_target"])


@pytest.mark.parametrize(("sign", "estimator"), [(-1, "gradient_steps"), (1, "ascent")])
@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_the_gradient_update_lands_on_the_closed_form(sign, estimator, num_steps, draws, facts, of_source):
    """Steps on the target's loss from the source's estimate, a draw at a time under ``vmap``."""
    options = {"step_size": 0.1, "num_steps": num_steps}

    def moved(start, x, y):
        return gradient_update(lambda b: jnp.mean(jnp.square(y - x @ b)) / 2, sign=sign, **options)(start)

    found = np.asarray(jax.jit(jax.vmap(moved))(of_source, draws["x_target"], draws["y_target"]))
    np.testing.assert_allclose(found, estimate(estimator, draws, facts, of_source, **options), atol=2e-4)
    assert_mean_is(closed_form_risk(estimator, **facts, **options), found, draws["beta_target"])


@pytest.mark.parametrize("strength", [None, 4.0, 60.0])
def test_the_pull_of_l2_sp_to_the_source_lands_on_the_closed_form(strength, draws, facts, of_source):
    """The curvature of loss and pull is 1 + lambda/n everywhere, so that one step of its inverse is the minimum."""
    options = {} if strength is None else {"strength": strength}
    pull = (best(facts) if strength is None else strength) / facts["target_rows"]

    def fitted(start, x, y):
        strategy = L2SP(alpha=pull, beta=0.0)
        params, kept = strategy.init({"w": start}, {"w": True}, None)

        def objective(params):
            return jnp.mean(jnp.square(y - x @ params["w"])) / 2 + strategy.penalty(params, kept, None)

        return gradient_update(objective, step_size=1 / (1 + pull))(params)["w"]

    found = np.asarray(jax.jit(jax.vmap(fitted))(of_source, draws["x_target"], draws["y_target"]))
    np.testing.assert_allclose(found, estimate("l2_sp", draws, facts, of_source, **options), atol=2e-4)
    assert_mean_is(closed_form_risk("l2_sp", **facts, **options), found, draws["beta_target"])


def test_designs_are_orthogonal_and_coefficients_as_far_apart_as_asked():
    data = linear_gaussian(0.8, dim=7, source_rows=30, target_rows=8, norm=2.5, seed=4)
    for x in (data.x_source, data.x_target):
        np.testing.assert_allclose(x.T @ x, len(x) * np.eye(7), atol=1e-12 * len(x))
        np.testing.assert_allclose(x.sum(0), 0.0, atol=1e-12)
    assert np.linalg.norm(data.beta_target) == pytest.approx(2.5)
    assert np.linalg.norm(data.beta_source - data.beta_target) == pytest.approx(0.8)


def test_without_noise_least_squares_finds_the_truth_and_a_seed_decides_everything():
    options = {"dim": 4, "source_rows": 9, "target_rows": 5, "source_noise": 0.0, "target_noise": 0.0}
    data, again, other = (linear_gaussian(1.0, **options, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_allclose(data.x_source.T @ data.y_source / 9, data.beta_source, atol=1e-12)
    np.testing.assert_allclose(data.x_target.T @ data.y_target / 5, data.beta_target, atol=1e-12)
    for name, value in vars(data).items():
        np.testing.assert_array_equal(value, getattr(again, name))
        assert not np.array_equal(value, getattr(other, name))


def test_no_mix_and_no_strength_is_better_than_the_best():
    risk = closed_form_risk("mix", **FACTS)
    assert risk == closed_form_risk("l2_sp", **FACTS) < closed_form_risk("pooled", **FACTS)
    assert closed_form_risk("l2_sp", **FACTS, strength=best(FACTS)) == pytest.approx(risk)
    for share, factor in zip(np.linspace(-0.5, 1.5, 21), np.geomspace(0.1, 10, 21), strict=True):
        assert closed_form_risk("mix", **FACTS, share=float(share)) >= risk
        assert closed_form_risk("l2_sp", **FACTS, strength=float(factor * best(FACTS))) >= risk - 1e-12


def test_sources_equal_to_the_target_without_noise_are_taken_as_they_are():
    facts = FACTS | {"delta": 0.0, "source_noise": 0.0}
    assert best(facts) == math.inf and closed_form_risk("l2_sp", **facts) == closed_form_risk("mix", **facts) == 0
    assert closed_form_risk("mix", **facts, target_noise=0.0) == 0


@pytest.mark.parametrize("noise", [0.5, 2.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_transfer_is_negative_exactly_from_the_stated_distance_on(noise, share):
    of_source, of_target = noise**2 * 20 / 200, 20 / 40
    pooled = 200 / 240
    bounds = {"source": of_target - of_source, "mix": of_target * (2 - share) / share - of_source}
    bounds["pooled"] = of_target * (2 - pooled) / pooled - of_source
    for (estimator, bound), side in itertools.product(bounds.items(), (-1e-6, 1e-6)):
        options = {"share": share} if estimator == "mix" else {}
        if (square := bound + side) < 0:  # negative at every distance
            square, side = 0.0, 1
        facts = FACTS | {"delta": math.sqrt(square), "source_noise": noise}
        assert transfer_is_negative(estimator, **facts, **options) == (side > 0)


def test_the_best_mix_is_never_negative_and_ascent_always_where_the_source_is():
    for delta in (0.0, 0.1, 1.0, 10.0):
        facts = FACTS | {"delta": delta}
        assert not transfer_is_negative("mix", **facts)
        if transfer_is_negative("source", **facts):
            assert transfer_is_negative("ascent", **facts, step_size=0.1)


# The data set.


@pytest.fixture(scope="module")
def dataset():
    return mtl_jax.data.load("linear_gaussian", **FACTS, seed=3)


def truth(dataset, domain):
    return np.array(dataset.info["coefficients"][domain])


def test_parts_and_domains_have_the_rows_that_were_asked_for(dataset):
    assert [len(dataset.splits[part]) for part in PARTS] == [240, 2_000, 20_000]
    assert dataset.summary()["domains"]["target"]["train"]["rows"] == 40
    assert dataset.schema.domains == ("source", "target") and not dataset.schema.categoricals
    assert np.linalg.norm(truth(dataset, "source") - truth(dataset, "target")) == pytest.approx(0.3**0.5)
    assert dataset.info["risk"]["pooled"] == pytest.approx(0.2917, abs=5e-5)
    assert dataset.info["warnings"] == []


@pytest.mark.parametrize("domains", [["source"], ["target"], ["source", "target"]])
def test_inputs_and_labels_reach_a_model_as_they_were_drawn(dataset, domains):
    part = of_domains(dataset, domains)
    training, drawn = part.for_training().train, linear_gaussian(**FACTS, seed=3)
    np.testing.assert_allclose(
        training.dense, np.concatenate([getattr(drawn, f"x_{name}") for name in domains]), rtol=2e-7, atol=1e-7
    )
    np.testing.assert_allclose(
        training.labels["y"], np.concatenate([getattr(drawn, f"y_{name}") for name in domains]), rtol=1e-6
    )
    rows = concatenated(training, part.for_training().valid)
    assert np.square(rows.dense).mean() == pytest.approx(1, abs=1e-6)


def test_the_error_on_test_is_the_noise_and_the_distance_to_the_truth(dataset):
    test = of_domains(dataset, ["target"]).open_test()
    train = of_domains(dataset, ["source"]).for_training().train
    guess = train.dense.T @ train.labels["y"] / train.num_rows
    distance = np.square(guess - truth(dataset, "target")).sum()
    clean = test.dense @ truth(dataset, "target")
    assert np.square(clean - test.dense @ guess).mean() == pytest.approx(distance, rel=1e-5)
    error = np.square(test.labels["y"] - test.dense @ guess).astype(float)
    assert error.mean() == pytest.approx(1 + distance, abs=5 * float(error.std()) / math.sqrt(test.num_rows))


def test_parameters_are_part_of_the_identity_and_held_out_rows_change_no_training_row():
    first, other, longer = (
        mtl_jax.data.load("linear_gaussian", **SMALL | options)
        for options in ({}, {"delta": 0.1}, {"valid_rows": 9, "test_rows": 80})
    )
    assert len({first.identity, other.identity, longer.identity}) == 3
    assert first.part("train").equals(longer.part("train"))
    assert first.info["parameters"]["delta"] == 0.3**0.5 and first.with_tasks(["y"]).schema.task_names == ("y",)


def test_folds_and_fractions_cut_train_and_valid_and_leave_test():
    whole = mtl_jax.data.load("linear_gaussian", **SMALL)
    for options in ({"split_folds": 2, "split_fold": 1}, {"target_fraction": 0.5}):
        cut = mtl_jax.data.load("linear_gaussian", **SMALL, **options)
        assert cut.splits["test"].tobytes() == whole.splits["test"].tobytes()
        assert len(cut.splits["train"]) < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, "delta is -0.1; expected a number in"),
        ({"target_rows": 20}, "target_rows is 20 for 20 inputs; expected at least 21, since columns are orthogonal"),
        ({"test_rows": 3}, "test_rows is 3 for 20 inputs; expected at least 21"),
        ({"source_noise": math.nan}, "source_noise is nan; expected"),
        ({"split": "rows"}, "unknown split 'rows' of 'linear_gaussian'; expected 'given'"),
        ({"recipe": "countries"}, "unknown recipe 'countries' of 'linear_gaussian'; expected 'two_domains'"),
        ({"dim": 10**5}, "dim is 100000; expected a whole number from 1"),
    ],
)
def test_what_cannot_be_generated(options, message):
    with pytest.raises(ConfigError, match=message):
        mtl_jax.data.load("linear_gaussian", **options)


@pytest.mark.parametrize(
    ("estimator", "options", "message"),
    [
        ("ridge", {}, r"unknown estimator 'ridge'; expected one of \['target', 'source'"),
        ("pooled", {"share": 0.5}, r"estimator 'pooled' has no \['share'\]; expected some of \[\]"),
        ("gradient_steps", {}, "estimator 'gradient_steps' has no step_size; expected a number >= 0"),
        ("gradient_steps", {"step_size": 0.1, "num_steps": 1.5}, "num_steps is 1.5; expected a whole number from 0"),
        ("l2_sp", {"strength": -1.0}, "strength is -1.0; expected a number in"),
    ],
)
def test_estimators_and_options_that_do_not_exist(estimator, options, message):
    assert estimator == "ridge" or estimator in OPTIONS
    with pytest.raises(ConfigError, match=message):
        closed_form_risk(estimator, **FACTS, **options)
