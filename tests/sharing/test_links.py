"""Task links: their equations, which towers they share, and steps of models that they tie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references_links as references
from flax import nnx

from mtl_jax.balancing import equal
from mtl_jax.data.schema import Categorical, Numeric, Schema, Vocabulary
from mtl_jax.errors import ConfigError
from mtl_jax.model import MultiTaskModel, label
from mtl_jax.nn import Context, Encoder, Tower
from mtl_jax.sharing import (
    CGC,
    ESCM2,
    ESMM,
    FallingChances,
    Link,
    LogitResidual,
    MMoE,
    SharedBottom,
    SingleTask,
    Strategy,
    chain,
)
from mtl_jax.tasks import Task
from mtl_jax.train.optimizer import Optimizer
from mtl_jax.train.state import Functional
from mtl_jax.train.step import Step

TASKS = ("ctr", "cvr_click", "ctcvr")
LINKS = {
    "none": Link,
    "esmm": functools.partial(ESMM, order=("ctr", "ctcvr"), given={"ctcvr": "cvr_click"}),
    "escm2_ips": functools.partial(ESCM2, estimator="ips"),
    "escm2_dr": ESCM2,
    "logit_residual": functools.partial(LogitResidual, order=("ctr", "ctcvr")),
    "logit_residual, detached": functools.partial(LogitResidual, order=("ctr", "ctcvr"), detach_previous=True),
    "falling": functools.partial(FallingChances, order=("ctr", "ctcvr")),
}
SHARING = {
    "single_task": functools.partial(SingleTask, units=(4,), share_embeddings=True, dropout=0.0),
    "shared_bottom": functools.partial(SharedBottom, units=(4,), dropout=0.0),
    "mmoe": functools.partial(MMoE, num_experts=2, expert_units=(4,), dropout=0.0),
    "cgc": functools.partial(CGC, expert_units=(4,), dropout=0.0),
}


def draw(rows=7, seed=0, scale=2.0):
    return (scale * np.random.default_rng(seed).standard_normal(rows)).astype(np.float32)


def clicks(rows=7, seed=0):
    """Labels of a funnel, and where they are observed."""
    rng = np.random.default_rng(seed)
    click, bought = rng.random(rows) < 0.6, rng.random(rows) < 0.5
    labels = {"ctr": click, "cvr_click": np.where(click, bought, np.nan), "ctcvr": click & bought}
    mask = {"ctr": np.ones(rows), "cvr_click": click, "ctcvr": np.ones(rows)}
    as_float = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    return as_float(labels), as_float(mask)


# Chains


@pytest.mark.parametrize("number", [2, 3])
def test_a_chain_is_the_logit_of_a_product(number):
    logits = [draw(seed=seed) for seed in range(number)]
    expected = functools.reduce(references.chain, logits)
    np.testing.assert_allclose(chain(*map(jnp.asarray, logits)), expected, rtol=1e-5)
    np.testing.assert_allclose(chain(jnp.zeros(1), jnp.zeros(1)), -np.log(3), rtol=1e-6)


def test_a_chain_of_extreme_logits_keeps_its_digits_and_its_gradient():
    grid = [-80.0, -30.0, 0.0, 30.0, 80.0]
    a, b = (side.ravel() for side in np.meshgrid(grid, grid))
    value, slopes = (
        chain(*map(jnp.float32, (a, b))),
        jax.vmap(jax.grad(chain, argnums=(0, 1)))(*map(jnp.float32, (a, b))),
    )
    expected = -np.logaddexp.reduce([-a, -b, -a - b])
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    both = np.logaddexp.reduce([-a, -b, -a - b])
    for slope, one, other in zip(slopes, (a, b), (b, a), strict=True):  # shares of what the logarithm sums
        exact = np.exp(np.logaddexp(-one, -one - other) - both)
        np.testing.assert_allclose(slope, exact, rtol=2e-5, atol=1e-30)


# Equations


def test_esmm_equals_its_reference_for_any_number_of_steps():
    tasks, order = ("buy", "view", "pay", "other"), ("view", "buy", "pay")
    logits = {task: draw(seed=seed) for seed, task in enumerate(tasks)}
    found = ESMM(tasks, order=order)(jax.tree.map(jnp.asarray, logits)).logits
    labels = {task: np.ones(7) for task in order}
    expected, _, _ = references.esmm({task: logits[task] for task in order}, labels, order)
    for task in order:
        np.testing.assert_allclose(found[task], expected[task], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["other"], logits["other"])
    assert np.all(found["pay"] <= found["buy"]) and np.all(found["buy"] <= found["view"])


def test_esmm_goes_by_names_not_by_positions():
    logits = {task: jnp.asarray(draw(seed=seed)) for seed, task in enumerate(TASKS)}
    one = LINKS["esmm"](TASKS)(logits).logits
    other = LINKS["esmm"](TASKS[::-1])(dict(reversed(logits.items()))).logits
    for task in TASKS:
        np.testing.assert_array_equal(one[task], other[task])
    np.testing.assert_array_equal(one["cvr_click"], logits["ctcvr"])  # the tower's own logit


@pytest.mark.parametrize("estimator", ["ips", "dr"])
def test_escm2_equals_its_reference(estimator):
    (labels, mask), a, b, c = clicks(40), draw(40), draw(40, 1), draw(40, 2)
    link = ESCM2(TASKS, estimator=estimator, floor=0.3)
    logits = {"ctr": a, "cvr_click": b} | ({"imputation": c} if estimator == "dr" else {})
    found = jax.jit(lambda logits: link(logits, labels, mask))(logits)
    imputation = c if estimator == "dr" else None
    conversion = np.nan_to_num(labels["cvr_click"])
    expected = references.escm2(a, b, imputation, labels["ctr"], conversion, None, 0.3, 0.1, 1.0)[2]
    np.testing.assert_allclose(found.losses["cvr_click"], expected["cvr_click"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.logits["ctcvr"], references.chain(a, b), rtol=1e-5, atol=1e-6)
    assert set(found.logits) == set(TASKS)


def corrected(estimator, labels, mask, floor=0.01):
    """The mean loss R of a ESCM2 as a function of the logits a, b, c."""
    link = ESCM2(TASKS, estimator=estimator, floor=floor)

    def mean(a, b, c):
        logits = {"ctr": a, "cvr_click": b} | ({"imputation": c} if estimator == "dr" else {})
        return link(logits, labels, mask).losses["cvr_click"].mean()

    return mean


def test_escm2_stops_gradients_at_the_propensity_and_at_the_imputed_error():
    (labels, mask), logits = clicks(40), [draw(40, seed) for seed in range(3)]
    of_ips, of_dr = (jax.grad(corrected(e, labels, mask), argnums=(0, 1, 2))(*logits) for e in ("ips", "dr"))
    assert not np.any(of_ips[0]) and not np.any(of_dr[0])
    np.testing.assert_allclose(of_dr[1], of_ips[1], rtol=1e-5, atol=1e-7)
    assert np.any(of_dr[2]) and not np.any(of_ips[2])


def test_escm2_with_sure_clicks_is_the_sum_over_clicks():
    labels, mask = clicks(40)
    b = draw(40, 1)
    found = corrected("ips", labels, mask, floor=1.0)(draw(40), b, None)
    y, o = np.nan_to_num(labels["cvr_click"]), np.asarray(labels["ctr"])
    np.testing.assert_allclose(found, (o * (np.logaddexp(0, b) - y * b)).sum() / 40, rtol=1e-5)


def test_escm2_without_a_click_is_zero_and_finite():
    zeros, ones = jnp.zeros(5), jnp.ones(5)
    labels = {"ctr": zeros, "cvr_click": jnp.full(5, jnp.nan), "ctcvr": zeros}
    mask = {"ctr": ones, "cvr_click": zeros, "ctcvr": ones}
    value, slope = jax.value_and_grad(corrected("ips", labels, mask), argnums=1)(draw(5), draw(5, 1), None)
    assert value == 0 and not np.any(slope)
    of_dr = jax.grad(corrected("dr", labels, mask), argnums=(1, 2))(draw(5), draw(5, 1), draw(5, 2))
    assert all(np.all(np.isfinite(part)) for part in of_dr)


def test_doubly_robust_is_unbiased_where_either_model_is_right():
    """Over draws of clicks: with the true propensity whatever is imputed, with the true error whatever the propensity."""
    rng = np.random.default_rng(0)
    rows, draws = 400, 4000
    a, b = rng.normal(-0.5, 0.7, rows), rng.normal(size=rows)
    y = (rng.random(rows) < 0.4).astype(float)
    error = np.logaddexp(0, b) - y * b
    p = 1 / (1 + np.exp(-a))
    clicked = (rng.random((draws, rows)) < p).astype(np.float32)

    def estimate(a, imputed):
        c = np.log(np.expm1(imputed))
        link = ESCM2(TASKS, estimator="dr", floor=1e-6)

        def one(o):
            labels = {"ctr": o, "cvr_click": y, "ctcvr": o * y}
            mask = {"ctr": jnp.ones(rows), "cvr_click": o, "ctcvr": jnp.ones(rows)}
            whole = link({"ctr": a, "cvr_click": b, "imputation": c}, labels, mask).losses["cvr_click"]
            square = o / jax.nn.sigmoid(a) * jnp.square(error - imputed)  # which trains the imputation alone
            return (whole - square).mean()

        found = np.asarray(jax.jit(jax.vmap(one))(jnp.asarray(clicked, jnp.float32)))
        return found.mean(), found.std() / np.sqrt(draws)

    for propensity, imputed in ((a, np.full(rows, 0.7)), (a + 0.8, error)):
        mean, noise = estimate(jnp.asarray(propensity, jnp.float32), jnp.asarray(imputed, jnp.float32))
        assert abs(mean - error.mean()) < 4 * noise + 1e-4
    mean, noise = estimate(jnp.asarray(a + 0.8, jnp.float32), jnp.full(rows, 0.7))
    assert abs(mean - error.mean()) > 10 * noise  # with neither it is off


@pytest.mark.parametrize("detached", [False, True])
def test_logit_residuals_add_up_and_gradients_say_which_towers_they_reach(detached):
    order = ("b", "c", "a")
    link = LogitResidual(("a", "b", "c", "d"), order=order, detach_previous=detached)
    logits = {task: jnp.asarray(draw(seed=seed)) for seed, task in enumerate("abcd")}
    expected = references.logit_residual(logits, order)
    for task, found in link(logits).logits.items():
        np.testing.assert_allclose(found, expected[task], rtol=1e-5, atol=1e-6)
    slopes = jax.jacrev(lambda logits: {task: a.sum() for task, a in link(logits).logits.items()})(logits)
    for last, task in enumerate(order):
        reached = {tower for tower in order if np.any(slopes[task][tower] != 0)}
        assert reached == ({task} if detached else set(order[: last + 1]))


def test_falling_chances_cost_nothing():
    link = FallingChances(("a", "b"), weight=0.6)
    low, high = jnp.full(3, -1.0), jnp.full(3, 1.0)
    (fell,), (rose,) = (link({"a": a, "b": b}).aux.values() for a, b in ((high, low), (low, high)))
    np.testing.assert_array_equal(fell, 0)
    np.testing.assert_allclose(rose, 0.6 * (jax.nn.sigmoid(1.0) - jax.nn.sigmoid(-1.0)), rtol=1e-6)
    slope = jax.grad(lambda b: link({"a": low, "b": b}).aux["a", "b"].sum())(high)
    np.testing.assert_allclose(slope, 0.6 * jax.nn.sigmoid(1.0) * jax.nn.sigmoid(-1.0), rtol=1e-5)


# In a model


def schema(tasks=None):
    tasks = tasks or (
        Task("ctr", "binary"),
        Task("cvr_click", "binary", space="ctr"),
        Task("ctcvr", "binary"),
        Task("spend", "regression"),
    )
    features = (Categorical("user", "user"), Numeric("price"))
    return Schema(features, (Vocabulary("user", ("u", "v")),), tasks)


def make(link, sharing="cgc", seed=0, tasks=None):
    model = MultiTaskModel(
        schema(tasks),
        encoder=functools.partial(Encoder, embedding_dim=3, stddev=0.5),
        sharing=SHARING[sharing],
        towers=functools.partial(Tower, units=(4,), dropout=0.0),
        link=LINKS.get(link, link),
        rngs=nnx.Rngs(seed),
    )
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("bias", "kernel"):  # so that no unit is off in all rows
            variable[...] = jnp.asarray(0.7 * rng.standard_normal(variable.shape), jnp.float32)
    return model


def batch(rows=32):
    rng = np.random.default_rng(0)
    labels, mask = clicks(rows)
    return {
        "ids": jnp.asarray(rng.integers(1, 4, (rows, 1)), jnp.int32),
        "dense": jnp.asarray(rng.standard_normal((rows, 1)), jnp.float32),
        "bags": {},
        "sequences": {},
        "labels": labels | {"spend": jnp.asarray(draw(rows))},
        "mask": mask | {"spend": jnp.ones(rows)},
        "task_weight": {},
        "weight": jnp.ones(rows),
    }


def losses(model, data):
    """Each task's mean loss, written down from the definition, whole."""
    outputs = model(data)
    linked = None
    if model.link.observed_by:
        common = model.common(model.inputs(data))
        linked = model.linked(tuple(model.link.observed_by), common, Context(), data["labels"], data["mask"]).losses
    found = {}
    for task in model.task_names:
        if task in model.link.evaluated:
            continue
        mask = data["mask"][model.link.observed_by.get(task, task)]
        y = jnp.where(data["mask"][task] > 0, data["labels"][task], 0)
        z = outputs[task]
        each = jnp.square(z - y) if task == "spend" else jax.nn.softplus(z) - y * z
        each = linked[task] if linked and task in linked else each
        found[task] = (mask * each).sum() / mask.sum()
    return found


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("link", LINKS)
def test_labels_are_what_gradients_of_the_losses_say(link, sharing):
    """A parameter is a task's own exactly if the loss of no other task reaches it."""
    model, data = make(link, sharing), batch()
    functional, params, rest = Functional.of(model)
    slopes = jax.jit(jax.jacrev(lambda p: losses(functional.merge(p, rest), data)))(params)
    for path in params:
        reached = {task for task in slopes if np.any(np.asarray(slopes[task][path]) != 0)}
        assert reached, path
        own = label(path).removeprefix("task/") if label(path).startswith("task/") else None
        if path.split("/")[0] in ("tables", "encoder"):
            continue
        if own is None:
            assert len(reached) > 1, path
        else:
            assert len(reached) == 1 and reached == {own}, path


@pytest.mark.parametrize("link", LINKS)
def test_the_step_balances_the_same_gradients(link):
    """Plain sum of losses through the cut equals the gradient of the whole, one task axis row a task."""
    model, data = make(link), batch()
    optimizer = Optimizer(transform=optax.identity(), learning_rate=1.0)
    step, state = Step.of(model, schema().tasks, key=jax.random.key(0), balancer=equal(), optimizer=optimizer)
    after, sums = jax.jit(step)(state, data)
    functional, params, rest = Functional.of(model)

    def whole(params):
        model = functional.merge(params, rest)
        return sum(losses(model, data).values()) + penalty(model, data)

    slopes = jax.jit(jax.grad(whole))(params)
    for path, old in state.params.items():
        np.testing.assert_allclose(old - after.params[path], slopes[path], rtol=2e-4, atol=2e-6, err_msg=path)
    for index, task in enumerate(model.task_names):
        assert (sums.denominator[index] == 0) == (task in model.link.evaluated)


def penalty(model, data):
    if not model.link.penalised:
        return 0.0
    outputs = model(data)
    chances = {task: jax.nn.sigmoid(outputs[task]) for task in ("ctr", "ctcvr")}
    return 0.6 * jnp.maximum(chances["ctcvr"] - chances["ctr"], 0).mean()


def test_a_conversion_without_a_click_is_an_error():
    link = LINKS["esmm"](TASKS)
    labels = {"ctr": np.array([1, 0, 0]), "ctcvr": np.array([1, 1, 0])}
    mask = {"ctr": np.ones(3, bool), "ctcvr": np.ones(3, bool)}
    with pytest.raises(ConfigError, match="1 training rows have ctcvr=1 and ctr=0"):
        link.check_labels(labels, mask)
    link.check_labels(labels, mask | {"ctr": np.array([1, 0, 1], bool)})


@pytest.mark.parametrize(
    ("link", "said"),
    [
        (functools.partial(ESMM, order=("ctr",)), r"link.order is \('ctr',\).*expected 2 or more"),
        (functools.partial(ESMM, order=("ctr", "cvr")), r"link.order is .*of the tasks \['ctr', 'cvr_click'"),
        (functools.partial(ESMM, order=("ctr", "ctcvr"), given={"ctr": "cvr_click"}), "link.given has"),
        (functools.partial(ESMM, order=("ctr", "spend")), "ties task 'spend', which is regression"),
        (functools.partial(ESMM, order=("ctcvr", "ctr"), given={"ctr": "cvr_click"}), "its label has the space 'ctr'"),
        (functools.partial(ESCM2, estimator="mean"), "link.estimator is 'mean'; expected one of"),
        (functools.partial(ESCM2, floor=0.0), "link.floor is 0"),
        (functools.partial(LogitResidual, order=("ctr", "ctr")), "link.order is"),
        (functools.partial(FallingChances, weight=-1.0), "link.weight is -1"),
    ],
)
def test_what_cannot_be_tied_is_refused(link, said):
    with pytest.raises(ConfigError, match=said):
        make(link)


def test_a_link_needs_shared_tables():
    with pytest.raises(ConfigError, match="gives each task tables of its own; expected shared tables"):
        MultiTaskModel(schema(), sharing=SingleTask, link=LINKS["esmm"], rngs=nnx.Rngs(0))


def test_a_strategy_with_a_link_of_its_own_takes_no_other():
    class Tied(SharedBottom):
        def link(self):
            return functools.partial(LogitResidual, order=("ctr", "ctcvr"))

    assert isinstance(MultiTaskModel(schema(), sharing=Tied, rngs=nnx.Rngs(0)).link, LogitResidual)
    with pytest.raises(ConfigError, match="'Tied' ties tasks by itself, and link is ESMM"):
        MultiTaskModel(schema(), sharing=Tied, link=LINKS["esmm"], rngs=nnx.Rngs(0))
    assert Strategy.link(None) is None
