"""Balanced gradients against a brute-force Jacobian over all parameters and whole tables, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtl_jax.balancing import (
    db_mtl,
    equal,
    excess_mtl,
    famo,
    fixed,
    graddrop,
    mgda,
    modo,
    pcgrad,
    trimmed_mean,
    uncertainty,
)
from mtl_jax.balancing.graddrop import draw_uniform
from mtl_jax.data.batching import as_batch
from mtl_jax.errors import ConfigError
from mtl_jax.model import label
from mtl_jax.nn import Context
from mtl_jax.sharing import Strategy
from mtl_jax.train import BalancingOptions, Objective, Optimizer, Step, balanced_gradients
from mtl_jax.train.gradients import SCOPES, check_scope, scope_template
from mtl_jax.train.objective import TaskLoss
from mtl_jax.train.state import Functional

KEY = jax.random.key(7)


def written_out(tasks, model, batch):
    """L_k = c_k sum(m s l) / sum(m s), from the definition of each loss."""
    losses = []
    for task, outputs in zip(tasks, model(batch).values(), strict=True):
        mask = batch["mask"][task.name] > 0
        labels = jnp.where(mask, batch["labels"][task.name], 0)
        if task.kind == "binary":
            elements = jnp.log1p(jnp.exp(-(2 * labels - 1) * outputs))
        elif task.kind == "regression":
            elements = (outputs - labels) ** 2
        else:
            elements = -jnp.log(jax.nn.softmax(outputs))[jnp.arange(labels.size), labels]
        scale = mask * batch["weight"] * batch["task_weight"].get(task.name, 1.0)
        losses.append(task.loss_weight * jnp.sum(scale * elements) / jnp.maximum(jnp.sum(scale), 1e-30))
    return jnp.stack(losses)


@dataclasses.dataclass
class World:
    """A model in float64, a batch, and the per-task losses with their Jacobian in every array."""

    functional: Functional
    tasks: tuple
    params: dict
    batch: dict

    def __post_init__(self):
        def losses(params):
            values = written_out(self.tasks, self.functional.merge(params), self.batch)
            return values, values

        self.jacobian, self.losses = jax.jit(jax.jacrev(losses, has_aux=True))(self.params)
        self.active = jnp.array([bool(jnp.any(self.batch["mask"][task.name] > 0)) for task in self.tasks])

    def common(self, below, part=None):
        return self.functional.merge(self.params | dict(below)).common(
            self.functional.merge(self.params).inputs(self.batch)
        )

    def head(self, task):
        def loss(own, cut, part=None):
            outputs = self.functional.merge(self.params | dict(own)).head(task.name, cut, Context())
            return Objective()(task, outputs, self.batch)

        return loss

    def balanced(self, balancer, *, regulariser=None, **options):
        heads = {task.name: self.head(task) for task in self.tasks}
        balancer = balancer.for_tasks(self.tasks)
        options = BalancingOptions(**options)
        state = balancer.init(len(self.tasks), scope_template(self.params, options.scope))

        @jax.jit
        def run(params):
            return balanced_gradients(
                self.common,
                heads,
                params,
                balancer=balancer,
                state=state,
                key=KEY,
                options=options,
                regulariser=regulariser,
            )

        return run(self.params)

    def gramian(self, scope):
        """Inner products of flat rows over the arrays in the scope."""
        if scope == "representation":
            heads = [self.head(task) for task in self.tasks]
            rows = jax.jit(jax.jacrev(lambda cut: jnp.stack([head({}, cut).loss for head in heads])))(self.common({}))
        else:
            labels = {"encoder": ("shared",), "shared": ("shared", "embedding"), "all": ("shared", "embedding", "task")}
            rows = {p: j for p, j in self.jacobian.items() if label(p).split("/")[0] in labels[scope]}
        flat = np.concatenate([np.asarray(leaf).reshape(len(self.tasks), -1) for leaf in jax.tree.leaves(rows)], axis=1)
        return flat @ flat.T

    def expected(self, weights, *, weighted_heads):
        """sum_k w_k g_k below the cut, and g_k or w_k g_k in a task's own arrays."""
        factors = {
            path: weights if weighted_heads or not label(path).startswith("task/") else jnp.ones_like(weights)
            for path in self.params
        }
        return {path: jnp.tensordot(factors[path], self.jacobian[path], 1) for path in self.params}


@pytest.fixture(scope="module")
def world(three_task_schema, make_rows, make_model, as_float64, with_columns):
    """Builds a world once per sharing strategy."""
    built = {}

    def build(sharing, *, without=()):
        if (sharing, without) not in built:
            rows = make_rows(three_task_schema, 16)
            rng = np.random.default_rng(5)
            mask = {name: values & (name not in without) for name, values in rows.mask.items()}
            rows = with_columns(rows, mask=mask, task_weight={"spend": rng.uniform(0, 2, 16).astype(np.float32)})
            model = as_float64(make_model(three_task_schema, sharing, towers=()))
            functional, params, _ = Functional.of(model)
            built[sharing, without] = World(functional, three_task_schema.tasks, params, as_float64(as_batch(rows)))
        return built[sharing, without]

    with jax.enable_x64(True):
        yield build


def assert_equal(actual, expected):
    assert set(actual) == set(expected)
    for path in expected:
        np.testing.assert_allclose(actual[path], expected[path], rtol=1e-9, atol=1e-9, err_msg=path)


CASES = [
    pytest.param("mmoe", (), id="mmoe"),
    pytest.param("mmoe", ("click",), id="mmoe, a task without labels"),
    pytest.param("shared_bottom", (), id="shared bottom"),
    pytest.param("single_task", (), id="single task, private tables"),
    pytest.param("single_task_shared", (), id="single task, shared tables"),
]


@pytest.mark.parametrize(("sharing", "without"), CASES)
def test_losses_and_their_weighted_sum(world, sharing, without):
    here = world(sharing, without=without)
    weights = jnp.array([0.5, 2.0, 3.0]) * here.active
    balanced = here.balanced(fixed(weights=[0.5, 2.0, 3.0]))
    np.testing.assert_allclose(balanced.losses.loss, here.losses, rtol=1e-9)
    np.testing.assert_allclose(balanced.weights, weights)
    assert_equal(balanced.gradients, here.expected(weights, weighted_heads=True))


@pytest.mark.parametrize("sharing", ["mmoe", "single_task"])
def test_plain_heads_under_weights_from_losses(world, sharing):
    """Shared arrays are weighted, a task's own arrays (private tables included) are not."""
    here = world(sharing)
    balanced = here.balanced(fixed(weights=[0.5, 2.0, 3.0]), head_gradient="plain")
    assert_equal(balanced.gradients, here.expected(jnp.array([0.5, 2.0, 3.0]), weighted_heads=False))


def test_no_gradient_flows_through_the_weights(world):
    """Uncertainty weights depend on the losses only through the state: the step is sum_k w_k g_k with w as numbers."""
    here = world("mmoe")
    balanced = here.balanced(uncertainty(initial=[0.3, -0.2, 0.1]))
    weights = jnp.array([1.0, 0.5, 1.0]) * jnp.exp(-jnp.array([0.3, -0.2, 0.1]))
    np.testing.assert_allclose(balanced.weights, weights, rtol=1e-7)
    assert_equal(balanced.gradients, here.expected(balanced.weights, weighted_heads=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossAsWeight(type(equal())):
    """w_k = L_k: a weight that a gradient could flow through."""

    def weigh(self, gramian, losses, state, key, *, active=None):
        return losses, state


@pytest.mark.parametrize("head_gradient", ["plain", "weighted"])
def test_weights_are_constants_of_the_step(world, head_gradient):
    """With w_k = L_k the step is sum L_k g_k. Differentiating through w would give twice that."""
    here = world("shared_bottom")
    balanced = here.balanced(LossAsWeight("sum"), head_gradient=head_gradient)
    assert_equal(balanced.gradients, here.expected(here.losses, weighted_heads=head_gradient == "weighted"))


@pytest.mark.parametrize(
    ("sharing", "without", "scope", "options"),
    [
        ("mmoe", (), "representation", {}),
        ("mmoe", (), "encoder", {}),
        ("mmoe", (), "shared", {"jacobian": "vmap"}),
        ("mmoe", (), "all", {"head_gradient": "weighted"}),
        ("mmoe", ("click",), "encoder", {"jacobian": "vmap", "head_gradient": "plain"}),
        ("shared_bottom", (), "representation", {"head_gradient": "weighted"}),
        ("shared_bottom", ("kind",), "all", {"jacobian": "vmap"}),
        ("single_task_shared", (), "shared", {}),
    ],
)
def test_gramian_methods(world, sharing, without, scope, options):
    """PCGrad's weights from the flat Jacobian of the scope, then the weighted sum over all shared arrays."""
    here = world(sharing, without=without)
    balanced = here.balanced(pcgrad(), scope=scope, **options)
    gramian = jnp.asarray(here.gramian(scope))
    weights, _ = pcgrad().weigh(gramian, here.losses, pcgrad().init(3), KEY, active=here.active)
    np.testing.assert_allclose(balanced.weights, weights, rtol=1e-9)
    norms = np.sqrt(np.diagonal(gramian))
    cosines = gramian / np.where(np.outer(norms, norms) > 0, np.outer(norms, norms), 1)
    np.testing.assert_allclose(balanced.cosines, cosines, atol=1e-9)
    assert_equal(balanced.gradients, here.expected(weights, weighted_heads=options.get("head_gradient") == "weighted"))


@pytest.mark.parametrize(
    ("balancer", "sharing", "without", "options"),
    [
        (graddrop(), "mmoe", (), {"scope": "encoder"}),
        (graddrop(leak=0.3), "shared_bottom", ("click",), {"scope": "shared", "jacobian": "vmap"}),
        (trimmed_mean(), "mmoe", (), {"scope": "encoder"}),
        (db_mtl(), "shared_bottom", (), {"scope": "encoder"}),
        (excess_mtl(), "shared_bottom", ("kind",), {"scope": "encoder"}),
    ],
    ids=["graddrop", "graddrop, tables", "trimmed_mean", "db_mtl", "excess_mtl"],
)
def test_entry_wise_methods(world, balancer, sharing, without, options):
    """What the method makes of the brute-force Jacobian inside the scope, weighted sums outside, plain heads."""
    here = world(sharing, without=without)
    balanced = here.balanced(balancer, **options)
    inside = scope_template(here.params, options["scope"])
    rows = {path: here.jacobian[path] for path in inside}
    combine = jax.jit(balancer.combine)
    direction, state = combine(rows, here.losses, balancer.init(3, inside), KEY, active=here.active)
    weights = jnp.where(here.active, balancer.weights_outside(here.losses, state), 0)
    assert any(label(path) == "embedding" for path in here.params)
    assert_equal(balanced.gradients, here.expected(weights, weighted_heads=False) | direction)


def norm_in(here, gradients, scope):
    return np.sqrt(sum(np.sum(np.square(gradients[path])) for path in scope_template(here.params, scope)))


@pytest.mark.parametrize("balancer", [mgda(), graddrop()], ids=["mgda", "graddrop"])
def test_lengths_of_the_direction(world, balancer):
    """Options on length change the length in the scope, and nothing else about the direction."""
    here = world("shared_bottom")
    native = here.balanced(balancer)
    plain = here.expected(jnp.ones(3), weighted_heads=False)
    length = norm_in(here, native.gradients, "encoder")
    np.testing.assert_allclose(native.info["direction_norm"], length, rtol=1e-6)
    for options, expected in (
        ({"length": "unit"}, 1.0),
        ({"length": "sum_norm"}, norm_in(here, plain, "encoder")),
        ({"max_norm": 0.5 * length}, 0.5 * length),
        ({"max_norm": 2.0 * length}, length),
    ):
        changed = here.balanced(balancer, **options)
        for path in scope_template(here.params, "encoder"):
            factor = expected / length
            np.testing.assert_allclose(changed.gradients[path], factor * native.gradients[path], rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(changed.info["direction_norm"], expected, rtol=1e-6)
        np.testing.assert_allclose(changed.info["direction_cosine"], native.info["direction_cosine"], rtol=1e-6)


def test_scales_of_sums_and_means(world):
    here = world("shared_bottom", without=("click",))  # two tasks count
    for balancer, scale, factor in ((mgda(), "sum", 2.0), (pcgrad(), "mean", 0.5), (mgda(), "mean", 1.0)):
        native, changed = here.balanced(balancer), here.balanced(balancer, scale=scale)
        np.testing.assert_allclose(changed.weights, factor * native.weights, rtol=1e-6)
    with pytest.raises(ConfigError, match="need gradients, and 'Equal' weighs losses"):
        check_scope(here.params, equal(), BalancingOptions(length="unit"))


def test_diagnostics_are_those_of_the_gramian(world):
    here = world("mmoe")
    products = here.gramian("encoder")
    info = here.balanced(pcgrad()).info
    pairs = products[np.triu_indices(3, 1)]
    np.testing.assert_allclose(info["conflict_rate"], np.mean(pairs < 0))
    values = np.linalg.eigvalsh(products)
    np.testing.assert_allclose(info["log10_gramian_condition"], np.log10(values[-1] / values[0]), rtol=1e-6)


def of_rows(here, first, step):
    """The world of every ``step``-th row."""
    batch = jax.tree.map(lambda leaf: leaf[first::step], here.batch)
    return World(here.functional, here.tasks, here.params, batch)


def one_step(here, balancer):
    """Old minus new parameters of a step with rate 1, and the state after it."""
    step, state = Step.of(
        here.functional.merge(here.params),
        here.tasks,
        key=jax.random.key(0),
        balancer=balancer,
        optimizer=Optimizer(optax.identity(), learning_rate=1.0),
    )
    new, sums = jax.jit(step)(state, here.batch)
    return {path: state.params[path] - new.params[path] for path in state.params}, new, sums


def test_three_batches_are_independent(world):
    """The weights come from the gradients of two thirds of the rows, and act on those of the third one."""
    here = world("shared_bottom")
    rows = World(here.functional, here.tasks, here.params, jax.tree.map(lambda leaf: leaf[:15], here.batch))
    a, b, c = (of_rows(rows, first, 3) for first in range(3))
    encoder = scope_template(here.params, "encoder")
    flat = [np.concatenate([np.reshape(part.jacobian[p], (3, -1)) for p in encoder], axis=1) for part in (a, b)]
    cross = jnp.asarray(flat[0] @ flat[1].T)
    weights, _ = modo().weigh(cross, c.losses, modo().init(3), None, active=jnp.ones(3, bool))
    moved, new, _ = one_step(rows, modo())
    assert_equal(moved, c.expected(weights, weighted_heads=False))
    np.testing.assert_allclose(new.balancer.mixture, weights, rtol=1e-6)
    assert np.abs(weights - 1 / 3).max() > 1e-4


def test_losses_after_the_update_are_those_of_the_same_batch(world):
    here = world("shared_bottom")
    _, new, _ = one_step(here, famo())
    after = World(here.functional, here.tasks, dict(new.params), here.batch).losses
    expected = famo().weigh(None, here.losses, famo().init(3), None, active=here.active)[1]
    expected = famo().observe(after, expected, active=here.active)
    assert np.any(expected.logits.value != 0)
    np.testing.assert_allclose(new.balancer.logits.value, expected.logits.value, rtol=1e-6)


@pytest.mark.parametrize(
    ("balancer", "options", "micro_batches", "message"),
    [
        (
            db_mtl(),
            {"scope": "representation"},
            1,
            r"'DbMtl' remembers a number for each dense parameter.*\['encoder'\]",
        ),
        (db_mtl(), {"scope": "shared"}, 1, "'DbMtl' remembers a number"),
        (graddrop(), {"scope": "all"}, 1, r"'GradDrop' acts on entries.*\['representation', 'encoder', 'shared'\]"),
        (graddrop(), {"scope": "representation"}, 2, "'GradDrop' cuts a batch itself"),
        (trimmed_mean(), {"scope": "representation"}, 1, r"'TrimmedMean' acts on entries.*\['encoder', 'shared'\]"),
        (modo(), {"scope": "representation"}, 1, "'MoDo' multiplies gradients of different batches"),
        (modo(), {}, 2, "'MoDo' cuts a batch itself; expected trainer.micro_batches=1, got 2"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(world, balancer, options, micro_batches, message):
    with pytest.raises(ConfigError, match=message):
        check_scope(world("shared_bottom").params, balancer, BalancingOptions(**options), micro_batches)


@pytest.mark.parametrize("leak", [0.0, [0.0, 0.5, 1.0]])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_mask_for_all_rows_of_a_unit(leak, transposed):
    """GradDrop at the representation from its definition; units may lie before or after the rows in the cut."""
    rng = np.random.default_rng(0)
    x, slopes = rng.normal(size=(6, 3)), rng.normal(size=(3, 4))
    kernel = rng.normal(size=(3, 4))
    with jax.enable_x64(True):

        def common(below, part):
            z = part["x"] @ below["shared/kernel"]
            return z.T if transposed else z

        def head(number):
            def loss(own, cut, part):
                z = cut.T if transposed else cut
                return TaskLoss(jnp.sum(jnp.tanh(z) @ slopes[number]) / 6, jnp.ones(()), jnp.ones(()))

            return loss

        @jax.jit
        def run(kernel):
            return balanced_gradients(
                common,
                {f"t{number}": head(number) for number in range(3)},
                {"shared/kernel": kernel},
                parts={"x": jnp.asarray(x)[:, None]},
                balancer=graddrop(leak=leak),
                state=graddrop(leak=leak).init(3),
                key=KEY,
                options=BalancingOptions(scope="representation"),
            )

        balanced = run(kernel)
        z = x @ kernel
        rows = slopes[:, None] * (1 - np.tanh(z) ** 2) / 6
        sums = np.sum(np.sign(z) * rows, axis=1)
        shape = (3, 4, 1) if transposed else (3, 1, 4)
        draws = np.asarray(draw_uniform(KEY, [jnp.asarray(sums.reshape(shape))])[0]).reshape(4)
    purity = 0.5 * (1 + sums.sum(axis=0) / np.abs(sums).sum(axis=0))
    survives = np.where(purity > draws, sums > 0, sums < 0)
    factors = np.where(survives, 1, np.broadcast_to(leak, 3)[:, None])
    np.testing.assert_allclose(balanced.gradients["shared/kernel"], x.T @ (factors[:, None] * rows).sum(axis=0))
    assert 0 < survives.sum() < survives.size


@pytest.mark.parametrize("sharing", ["mmoe", "shared_bottom"])
def test_graddrop_that_leaks_all_is_the_sum_at_the_representation(
    world, sharing, three_task_schema, make_model, as_float64
):
    """In a whole step, which cuts its batch into rows."""
    found = []
    for balancer, chosen in ((graddrop(leak=1.0), {"scope": "representation"}), (equal(), {"head_gradient": "plain"})):
        model = as_float64(make_model(three_task_schema, sharing, towers=()))
        options, optimizer = BalancingOptions(**chosen), Optimizer(optax.identity(), learning_rate=1.0)
        step, state = Step.of(
            model, three_task_schema.tasks, key=KEY, balancer=balancer, options=options, optimizer=optimizer
        )
        found.append(jax.jit(step)(state, world(sharing).batch))
    assert_equal(found[0][0].params, found[1][0].params)
    np.testing.assert_allclose(found[0][1].numerator, found[1][1].numerator)


def test_scopes_differ(world):
    """The Gramians that the scopes read are not the same, so the test above tells them apart."""
    here = world("mmoe")
    gramians = [here.gramian(scope) for scope in SCOPES]
    for index, one in enumerate(gramians):
        assert all(np.abs(one - other).max() > 1e-3 for other in gramians[index + 1 :])


@pytest.mark.parametrize("choice", ["dense", "sparse"])
def test_the_step_descends_along_it(world, choice):
    """Plain descent with rate 1 shows the gradient as old minus new, over whole tables or over touched rows."""
    here = world("mmoe")
    step, state = Step.of(
        here.functional.merge(here.params),
        here.tasks,
        key=jax.random.key(0),
        balancer=pcgrad(),
        options=BalancingOptions(scope="shared"),
        optimizer=Optimizer(optax.identity(), learning_rate=1.0),
        table_updates={"item": choice},
    )
    assert set(state.tables) == ({"tables/item/rows"} if choice == "sparse" else set())
    new, sums = jax.jit(step)(state, here.batch)
    before, after = state.params | state.tables, new.params | new.tables
    expected = here.expected(sums.weight, weighted_heads=False)
    assert_equal({path: before[path] - after[path] for path in before}, expected)


def test_regulariser_is_added_after_balancing(world):
    """Its gradient has factor 1 whatever the weights are, and reaches heads and shared parameters alike."""
    here = world("shared_bottom")
    chosen = ["sharing/bottom/layers/0/kernel", "task/spend/tower/head/kernel"]
    penalty = lambda params: sum(jnp.sum(params[path] ** 2) for path in chosen)  # noqa: E731
    balanced = here.balanced(fixed(weights=[5.0, 0.0, 0.0]), regulariser=penalty)
    expected = here.expected(jnp.array([5.0, 0, 0]), weighted_heads=True)
    expected |= {path: expected[path] + 2 * here.params[path] for path in chosen}
    assert_equal(balanced.gradients, expected)


class Penalised(Strategy):
    """z = x + theta with the penalty theta^2."""

    def __init__(self, in_features, tasks, *, rngs):
        self.tasks, self.out_features = tuple(tasks), in_features
        self.theta = nnx.Param(jnp.full((in_features,), 3.0))

    def common(self, x, context=None):
        return x + self.theta[...]

    def head(self, task, common):
        return common

    def regulariser(self):
        return jnp.sum(self.theta[...] ** 2)


def test_a_strategys_regulariser_reaches_the_step(small_schema, make_rows, make_model):
    """Without a labelled row the step is the penalty's alone: 3 - 0.1 * 2 * 3."""
    rows = make_rows(small_schema, 8, observed=0.0)
    step, state = Step.of(
        make_model(small_schema, Penalised),
        small_schema.tasks,
        key=jax.random.key(0),
        balancer=equal(),
        optimizer=Optimizer(optax.identity(), learning_rate=0.1),
    )
    new, _ = jax.jit(step)(state, as_batch(rows))
    np.testing.assert_allclose(new.params["sharing/theta"], 2.4, rtol=1e-6)


@pytest.mark.parametrize(
    ("sharing", "scope", "message"),
    [
        ("single_task", "encoder", "the model has none.*balancing=equal"),
        ("single_task", "representation", "the model has none"),
        ("single_task_shared", "encoder", r"holds no parameter.*\['representation', 'shared', 'all'\]"),
    ],
)
def test_empty_scopes_are_refused(small_schema, make_model, sharing, scope, message):
    _, params, _ = Functional.of(make_model(small_schema, sharing))
    with pytest.raises(ConfigError, match=message):
        check_scope(params, pcgrad(), BalancingOptions(scope=scope))
    check_scope(params, equal(), BalancingOptions(scope=scope))


@pytest.mark.parametrize("field", ["scope", "head_gradient", "jacobian"])
def test_unknown_options_are_refused(field):
    with pytest.raises(ConfigError, match=rf"balancing.{field} is 'nothing'; expected one of"):
        BalancingOptions(**{field: "nothing"})
