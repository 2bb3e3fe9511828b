"""Countries of chosen relatedness: cosines, rates, and the best possible prediction."""

import numpy as np
import polars as pl
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

import mtl_jax
from mtl_jax.data.countries import CTR, CVR, FIELDS, RHO, ROWS, TRUTH, bayes, countries, expected_auc
from mtl_jax.data.dataset import Dataset
from mtl_jax.data.domains import of_domains
from mtl_jax.data.schema import Numeric
from mtl_jax.errors import ConfigError, LeakageError

SMALL = {
    "rho": [1.0, 0.5],
    "rows": [3_000, 2_000],
    "ctr": [0.3, 0.2],
    "cvr": [0.4, 0.3],
    "users": 400,
    "items": 200,
}


@pytest.fixture(scope="module", params=["linear", "mlp"])
def data(request):
    return countries(teacher=request.param, seed=0)


@pytest.fixture(scope="module")
def dataset():
    return mtl_jax.data.load("countries", seed=1)


def rows_of(data):
    return [data.country == d for d in range(len(data.theta))]


@pytest.mark.parametrize(("rho", "tau"), [(RHO, 0.6), ((1.0, -0.7, *np.linspace(0, 1, 10)), -0.2), ((1.0,), 1.0)])
def test_cosines_between_countries_and_between_tasks_are_exact(rho, tau):
    few = {"rows": [9] * len(rho), "ctr": [0.5] * len(rho), "cvr": [0.5] * len(rho)}
    theta = countries(rho, tau=tau, **few, users=5, items=5, seed=2).theta
    np.testing.assert_allclose(np.linalg.norm(theta, axis=2), 1, atol=1e-12)
    np.testing.assert_allclose(np.einsum("dtk,tk->dt", theta, theta[0]), np.outer(rho, [1, 1]), atol=1e-12)
    np.testing.assert_allclose(np.einsum("dk,dk->d", *theta.swapaxes(0, 1)), tau, atol=1e-12)


def test_probabilities_have_the_asked_rates_and_labels_follow_within_4_standard_errors(data):
    for rows, count, ctr, cvr in zip(rows_of(data), ROWS, CTR, CVR, strict=True):
        click, conv = data.p_click[rows], data.p_conv[rows]
        assert (rows.sum(), click.mean()) == (count, pytest.approx(ctr, abs=1e-9))
        assert np.average(conv, weights=click) == pytest.approx(cvr, abs=1e-9)
        both = data.click & data.conv_if_click
        for label, p in ((data.click, click), (data.conv_if_click, conv), (both, click * conv)):
            error = np.sqrt((p * (1 - p)).sum()) / count
            assert abs(label[rows].mean() - p.mean()) <= 4 * error


def test_inputs_are_uncorrelated_and_of_unit_variance(data):
    np.testing.assert_allclose(data.phi.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(np.cov(data.phi.T), np.eye(24), atol=0.12)
    octiles = np.stack([np.bincount(column, minlength=8) for column in data.fields.T]) / len(data.fields)
    np.testing.assert_allclose(octiles, 1 / 8, atol=0.02)


def test_logits_are_linear_in_phi_and_fields_alone_decide_them(data):
    for d, rows in enumerate(rows_of(data)):
        for t, p in enumerate((data.p_click, data.p_conv)):
            logit = np.log(p[rows]) - np.log1p(-p[rows])
            np.testing.assert_allclose(logit, data.bias[d, t] + data.phi[rows] @ data.theta[d, t], atol=1e-9)
    table = pl.DataFrame(np.column_stack([data.country, data.fields])).with_columns(p=data.p_click.round(9))
    assert table.n_unique() == table.drop("p").n_unique()


def test_what_country_0_knows_helps_less_the_less_others_are_related(data):
    """Its own ranking, without a look at the other country; the figures are those of linear and large worlds, about."""
    for t, (p, weights) in enumerate([(data.p_click, None), (data.p_conv, data.p_click)]):
        found = []
        for rows in rows_of(data):
            of_rows = None if weights is None else weights[rows]
            found.append(expected_auc(data.phi[rows] @ data.theta[0, t], p[rows], of_rows))
        assert found == sorted(found, reverse=True) and len(set(found)) == 4
        np.testing.assert_allclose(found, [0.755, 0.735, 0.637, 0.5], atol=0.05)


def test_nothing_ranks_better_than_the_truth_and_the_click_auc_is_about_three_quarters(data):
    rng = np.random.default_rng(0)
    for rows in rows_of(data):
        p = data.p_click[rows]
        best = bayes(p)["auc"]
        assert 0.73 < best < 0.78
        for scores in (p + 0.02 * rng.normal(size=len(p)), data.p_conv[rows], rng.normal(size=len(p))):
            assert expected_auc(scores, p) < best
        assert expected_auc(np.log(p), p) == pytest.approx(best)


def test_expected_auc_and_entropy_are_the_means_over_draws_of_the_labels():
    rng = np.random.default_rng(1)
    p, weights = rng.uniform(0.05, 0.9, 40), rng.uniform(size=40)
    scores = np.round(p + 0.2 * rng.normal(size=40), 1)
    pairs = np.where(scores[:, None] == scores, 0.5, scores[:, None] > scores)
    mass = np.outer(weights * p, weights * (1 - p))
    assert expected_auc(scores, p, weights) == pytest.approx((pairs * mass).sum() / mass.sum())
    p = np.repeat(p, 5_000)
    labels = rng.random(len(p)) < p
    assert bayes(p)["auc"] == pytest.approx(roc_auc_score(labels, p), abs=0.005)
    assert bayes(p)["logloss"] == pytest.approx(log_loss(labels, p), abs=0.005)


def test_no_model_exceeds_the_best_possible_prediction():
    """A logistic regression, which has the form of the truth and comes close, and one that finds the form itself."""
    data = countries(seed=5)
    rows = np.flatnonzero(data.country == 0)
    train, test = rows[::2], rows[1::2]
    clicks = data.click[test]
    linear = LogisticRegression(C=1.0).fit(data.phi[train], data.click[train])
    trees = HistGradientBoostingClassifier(max_iter=15, random_state=0).fit(data.fields[train], data.click[train])
    best = bayes(data.p_click[test])["auc"]
    error = np.sqrt(best * (1 - best) / clicks.sum())  # an upper bound of it
    found = [
        roc_auc_score(clicks, model.predict_proba(inputs[test])[:, 1])
        for model, inputs in ((linear, data.phi), (trees, data.fields))
    ]
    assert max(found) <= best + 3 * error
    assert found[0] >= best - 3 * error and found[1] > 0.6


def test_models_of_the_sources_rank_them_as_they_are_related():
    """Fitted on a source's clicks and scored on the target's, as any ranking of sources is: order and cosines of rho."""
    data = countries(seed=6)
    target, *sources = rows_of(data)
    scores, cosines = [], []
    for rows in sources:
        fitted = LogisticRegression(C=1.0).fit(data.phi[rows], data.click[rows])
        scores.append(roc_auc_score(data.click[target], fitted.decision_function(data.phi[target])))
        direction = fitted.coef_[0] / np.linalg.norm(fitted.coef_[0])
        cosines.append(direction @ data.theta[0, 0])
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(cosines, RHO[1:], atol=0.15)


def test_shared_users_and_items_are_those_of_every_country():
    data = countries(**SMALL, share_users=0.25, share_items=1.0, seed=0)
    first, second = rows_of(data)
    users = [set(data.user[rows].tolist()) for rows in (first, second)]
    assert users[0] & users[1] <= set(range(100)) and len(users[0] & users[1]) > 90
    assert max(users[0]) < 400 <= max(users[1])
    assert data.item.max() < 200
    table = pl.DataFrame({"user": data.user, "octile": data.fields[:, 0]})
    assert table.n_unique() == table["user"].n_unique()
    alone = countries(**SMALL, seed=0)
    assert not set(alone.user[first].tolist()) & set(alone.user[second].tolist())


def test_a_shift_moves_the_inputs_of_a_country_and_not_what_a_pair_does():
    data = countries(**SMALL | {"users": 5_000, "items": 5_000}, shift=[0.0, 1.0], share_users=1.0, seed=3)
    plain, moved = (data.phi[rows, :8].sum(1).mean() / 8**0.5 for rows in rows_of(data))
    assert plain == pytest.approx(0, abs=0.08) and moved == pytest.approx(1, abs=0.2)
    assert data.p_click[data.country == 1].mean() == pytest.approx(0.2)


# The data set.


def test_the_data_set_has_the_three_tasks_and_the_rates(dataset):
    frame, schema = dataset.frame, dataset.schema
    assert schema.task_names == ("ctr", "cvr_click", "ctcvr")
    assert [feature.name for feature in schema.features] == ["country", *FIELDS]
    assert schema.domains == tuple(f"country_{d}" for d in range(4))
    assert frame.group_by("country", maintain_order=True).len()["len"].to_list() == list(ROWS)
    assert frame.filter(~pl.col("click") & pl.col("conversion")).is_empty()
    test, encoded = dataset.part("test"), dataset.open_test()
    np.testing.assert_array_equal(encoded.mask["cvr_click"], test["click"].to_numpy())
    np.testing.assert_array_equal(encoded.labels["ctcvr"] == 1, (test["click"] & test["conv_if_click"]).to_numpy())


def test_the_best_possible_scores_are_in_the_record(dataset):
    found, test = dataset.info["bayes"], dataset.part("test")
    assert set(found) == {*dataset.schema.domains, "all"}
    assert set(found["all"]) == {"ctr", "cvr_click", "ctcvr", "cvr_all"}
    p, click = test["p_click"].to_numpy(), test["click"].to_numpy()
    error = np.sqrt(0.2 / click.sum())
    assert found["all"]["ctr"]["auc"] == pytest.approx(roc_auc_score(click, p), abs=3 * error)
    assert found["all"]["ctr"]["logloss"] == pytest.approx(log_loss(click, p), abs=0.01)


@pytest.mark.parametrize("column", TRUTH)
def test_the_truth_cannot_be_a_feature(column, dataset):
    schema = dataset.schema
    leaking = {"features": (*schema.features, Numeric(column)), "domains": ()}
    with pytest.raises(LeakageError, match=f"'{column}' is an excluded column"):
        Dataset.from_frame(dataset.frame, type(schema)(**vars(schema) | leaking))


def test_countries_are_data_sets_of_their_own(dataset):
    part = of_domains(dataset, ["country_2"])
    assert sum(map(len, part.splits.values())) == 30_000 and part.for_training().train.num_rows > 23_000


def test_parameters_seeds_and_ids():
    first, again, other, ids = (
        mtl_jax.data.load("countries", **SMALL, **options)
        for options in ({}, {}, {"kappa": 2.0}, {"with_ids": True, "tasks": ["ctr"]})
    )
    assert first.identity == again.identity and len({first.identity, other.identity, ids.identity}) == 3
    assert first.frame.equals(again.frame)
    assert [feature.name for feature in ids.schema.features][-2:] == ["user", "item"]
    assert ids.schema.task_names == ("ctr",)
    cold = mtl_jax.data.load("countries", **SMALL, split="cold_user")
    assert not set(cold.part("train")["user"]) & set(cold.part("test")["user"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": [0.5, 1.0]}, r"rho\[0\] is 0.5; expected 1"),
        ({"rho": [1.0, 1.5]}, r"rho\[1\] is 1.5; expected a number in \[-1, 1\]"),
        ({"rho": [1.0]}, "rows has 2 values and rho 1; expected one for each country"),
        ({"rho": [1.0] * 13}, "the number of countries .* is 13; expected a whole number from 1 to 12"),
        ({"ctr": [0.1, 1.0]}, r"ctr\[1\] is 1.0; expected a number in \(0, 1\)"),
        ({"shift": [0.0, 9.0]}, r"shift\[1\] is 9.0; expected a number in \[-2, 2\]"),
        ({"share_items": 1.1}, "share_items is 1.1; expected a number in"),
        ({"teacher": "tree"}, r"teacher is 'tree'; expected one of \['linear', 'mlp'\]"),
        ({"split": "time"}, r"unknown split 'time' of 'countries'; expected one of \['rows', 'cold_user'\]"),
        ({"split": "cold_user", "with_ids": True}, "with_ids is True with split 'cold_user'"),
    ],
)
def test_what_cannot_be_generated(options, message):
    with pytest.raises(ConfigError, match=message):
        mtl_jax.data.load("countries", **SMALL | options)
