"""Meta-learning over domains, against loops over domains that are written out."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from written_out import close, descended, inside, loss, losses_of, task_losses

from mtl_jax.balancing import equal, graddrop, mgda, modo, pcgrad
from mtl_jax.data.batching import take
from mtl_jax.errors import ConfigError
from mtl_jax.nn import Context
from mtl_jax.sharing import DSelectK, ResFlow, SoftSharing
from mtl_jax.train import BalancingOptions, Member, Optimizer, fit_many, samo
from mtl_jax.train.adaptation import RowsLoss
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Setup
from mtl_jax.transfer import (
    IMAML,
    MAML,
    MLDG,
    DomainNegotiation,
    DomainRegularisation,
    GradientTransfer,
    MetaSGD,
    Reptile,
    gradient_transfer,
)

ETA, RATE, ROWS = 0.3, 0.1, 16
SGD = Optimizer(optax.identity(), learning_rate=RATE)
SPARSE = {"table_updates": {"user": "sparse"}}
LABELS = ("embedding", "shared", "task")
OF_RATES = "aux/rate/"

# What the inner steps make of one number. The source's loss is a/2 w^2 and the target's b/2 (w - c)^2, with
# a = 2, b = 3, c = 1 and w = 2; both domains have the same.

A, B, C, W = 2.0, 3.0, 1.0, 2.0


def adapted_number(strategy, params=None):
    """The adapted number of each domain, and the gradient of the mean of the target's losses, by the trained numbers."""
    strategy = dataclasses.replace(strategy, num_domains=2)
    params = params or strategy.init({"w": jnp.array(W)}, {}, jax.random.key(0))[0]
    blocks = jnp.full((2, strategy.episodes.blocks), A)

    def found(params):
        return strategy.adapt_to_domains(params, {}, RowsLoss(lambda params, a: a / 2 * params["w"] ** 2), blocks)["w"]

    adapted, pull = jax.vjp(found, params)
    (gradient,) = pull(strategy.domain_weights() * B * (adapted - C))
    return np.asarray(adapted), {path: float(array) for path, array in gradient.items()}


@pytest.mark.parametrize(
    ("strategy", "adapted", "gradient"),
    [
        (MAML(step_size=0.1), 1.6, 1.44),
        (MAML(step_size=0.1, num_steps=3), 1.024, 0.036864),
        (MAML(step_size=0.1, first_order=True), 1.6, 1.8),
        (MAML(step_size=0.0), 2.0, 3.0),
        (MAML(step_size=0.1, scope=("task",)), 2.0, 3.0),
        (MetaSGD(step_size=0.1), 1.6, 1.44),
        (MetaSGD(step_size=0.1, num_steps=3), 1.024, 0.036864),
        (IMAML(step_size=0.1, num_steps=32, proximal=6.0), 1.5, 1.125),
    ],
    ids=str,
)
def test_the_published_numbers_of_a_quadratic(strategy, adapted, gradient):
    """With kappa = 1 - 0.1 a = 0.8: w kappa^K and kappa^K b (w kappa^K - c); the minimum is 6 w / (a + 6)."""
    found, slope = adapted_number(strategy)
    np.testing.assert_allclose(found, [adapted, adapted], rtol=1e-6)
    assert slope["w"] == pytest.approx(gradient, rel=1e-5)


def test_a_rate_has_the_gradient_of_the_step_that_it_scales():
    """d/dalpha of b/2 (w - alpha a w - c)^2, with a rate below 0."""
    _, slope = adapted_number(MetaSGD(), {"w": jnp.array(W), f"{OF_RATES}w": jnp.array(-0.1)})
    assert slope[f"{OF_RATES}w"] == pytest.approx(-A * W * B * (W * 1.2 - C), rel=1e-6)


def test_reptile_goes_a_part_of_the_way_to_where_training_ends():
    """theta = 2, a = 2, alpha = 0.1, K = 2: the end is 1.28, and half of the way is 1.64."""
    found, _ = adapted_number(Reptile(step_size=0.1, num_steps=2, inner="sgd"))
    np.testing.assert_allclose(found, [1.28, 1.28], rtol=1e-6)
    assert W + 0.5 * (found.mean() - W) == pytest.approx(1.64)


# Steps of the small world. Rows of one of the domains have no label of one task, and some are padding.


@pytest.fixture(scope="module")
def episode(make_batch):
    """(domains, blocks, seed) -> rows of each domain, block by block."""

    @functools.cache
    def build(domains, blocks, seed=0):
        found = [[make_batch(ROWS, seed + 10 * domain + block) for block in range(blocks)] for domain in range(domains)]
        for rows in found[1]:
            rows["mask"]["click"] = jnp.zeros(ROWS)
        found[0][-1]["weight"] = found[0][-1]["weight"].at[:5].set(0)
        return found

    return build


@dataclasses.dataclass
class Program:
    """A compiled step of episodes.

    Attributes:
      step: The step.
      start: A state where no two arrays are the same.
      run: (numbers, state, batch) -> (state, sums).
      rows: As of ``episode``.
      batch: All of them, by turns.
    """

    step: object
    start: object
    run: object
    rows: list
    batch: dict

    @property
    def before(self):
        return self.start.params | self.start.tables

    def after(self, start=None, **numbers):
        """Parameters after a step, with other numbers of the strategy."""
        strategy = dataclasses.replace(self.step.adaptation, **numbers)
        numbers = dataclasses.replace(self.step, adaptation=strategy).numbers()
        state, sums = self.run(numbers, start or self.start, self.batch)
        assert bool(state.live) and int(sums.steps) == 1
        return state.params | state.tables


@pytest.fixture(scope="module")
def compiled(make_model, make_step, episode, in_turn, perturbed):
    """(strategy, ...) -> program of its step; the optimizer is SGD."""

    def build(strategy, *, model=None, seed=0, **options):
        step, state = make_step(make_model() if model is None else model, strategy, optimizer=SGD, **options)
        rows = episode(*strategy.episodes, seed)
        run = jax.jit(lambda numbers, state, batch: step.with_numbers(numbers)(state, batch))
        batch = in_turn(*(block for blocks in rows for block in blocks))
        return Program(step, perturbed(state, 0.2), run, rows, batch)

    return build


@pytest.fixture(scope="module")
def maml(compiled):
    return compiled(MAML(2, ETA))


def adapted_to(params, support, *, rates=ETA, num_steps=1, scope=LABELS, first_order=False):
    """Steps of SGD on the support rows, of the arrays in the scope."""
    for _ in range(num_steps):
        gradient = jax.grad(loss)(params, support)
        gradient = jax.lax.stop_gradient(gradient) if first_order else gradient
        params = {
            path: array - (rates[path] if isinstance(rates, dict) else rates) * gradient[path]
            if inside(path, scope)
            else array
            for path, array in params.items()
        }
    return params


def mean_over_domains(gradient, rows, *args):
    """Of gradient(*args, support, query), one domain after the other."""
    found = [gradient(*args, support, query) for support, query in rows]
    return jax.tree.map(lambda *arrays: sum(arrays) / len(arrays), *found)


@functools.partial(jax.jit, static_argnames=("num_steps", "scope", "first_order"))
def slope_of_domain(params, rates, support, query, **options):
    return jax.grad(lambda params: loss(adapted_to(params, support, rates=rates, **options), query))(params)


def slope(params, rows, rates=ETA, **options):
    """Gradient of the mean over domains of the query loss after the inner steps."""
    return mean_over_domains(functools.partial(slope_of_domain, **options), rows, params, rates)


def apart(one, other, *roots):
    """Greatest difference between arrays under some roots."""
    return max(np.abs(one[path] - other[path]).max() for path in one if path.startswith(roots))


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"num_steps": 3}, {}),
        ({"num_steps": 2, "first_order": True, "scope": ("embedding", "shared"), "num_domains": 3}, {}),
        ({"scope": ("task",)}, SPARSE),
    ],
    ids=str,
)
def test_a_step_descends_the_mean_query_loss_after_the_inner_steps(options, more, compiled):
    """theta - rate * d/dtheta 1/D sum_d L_d(theta - eta grad l_d(theta) ...), whatever moves and however often."""
    program = compiled(MAML(**{"num_domains": 2, "step_size": ETA} | options), **more)
    options = {name: value for name, value in options.items() if name != "num_domains"}
    close(program.after(), descended(program.before, slope(program.before, program.rows, **options), RATE))


def test_one_inner_step_of_any_size(maml):
    """Of size 0 it is training on the query rows; of another one it is neither that nor of first order."""
    before, rows = maml.before, maml.rows
    gradient = slope(before, rows)
    plain = mean_over_domains(jax.jit(lambda params, _, query: jax.grad(loss)(params, query)), rows, before)
    close(maml.after(), descended(before, gradient, RATE))
    close(maml.after(step_size=0.0), descended(before, plain, RATE))
    assert apart(gradient, plain, "") > 1e-2 and apart(gradient, slope(before, rows, first_order=True), "") > 1e-2


def test_the_encoder_of_anil_gets_the_gradient_through_the_steps_of_the_towers(maml):
    """Which first order lacks."""
    exact, plain = (slope(maml.before, maml.rows, scope=("task",), first_order=first) for first in (False, True))
    assert apart(exact, plain, "sharing", "tables") > 1e-3


def test_a_step_counts_the_losses_of_the_query_rows_at_the_adapted_parameters(maml):
    _, sums = maml.run(maml.step.numbers(), maml.start, maml.batch)
    found = [(task_losses(adapted_to(maml.before, support), query), query) for support, query in maml.rows]
    for place, task in enumerate(("click", "spend")):
        weights = [float(jnp.sum(query["weight"] * query["mask"][task])) for _, query in found]
        values = [float(losses[task]) for losses, _ in found]
        assert sums.denominator[place] == pytest.approx(sum(weights), rel=1e-5)
        assert sums.numerator[place] == pytest.approx(np.dot(weights, values), rel=1e-5)


def test_the_learned_initial_values_are_what_is_deployed(maml):
    close(maml.step.functional.own(maml.step.evaluated(maml.start)), maml.before)


def split(params):
    """The model's, and the rates by the paths that they belong to."""
    rates = {path.removeprefix(OF_RATES): array for path, array in params.items() if path.startswith(OF_RATES)}
    return {path: array for path, array in params.items() if not path.startswith(OF_RATES)}, rates


@pytest.fixture(scope="module")
def meta_sgd(compiled):
    return compiled(MetaSGD(2, ETA, num_steps=2, scope=("embedding", "task")), **SPARSE)


def test_rates_are_trained_beside_the_parameters_that_they_move(meta_sgd):
    """Each has a value of its own here."""

    def query_loss(params, support, query):
        model, rates = split(params)
        return loss(adapted_to(model, support, rates=rates, num_steps=2, scope=("embedding", "task")), query)

    gradient = mean_over_domains(jax.jit(jax.grad(query_loss)), meta_sgd.rows, meta_sgd.before)
    assert set(split(gradient)[1]) == {path for path in split(gradient)[0] if inside(path, ("embedding", "task"))}
    assert all(np.any(array != 0) for array in gradient.values())
    close(meta_sgd.after(), descended(meta_sgd.before, gradient, RATE))


def test_with_equal_rates_meta_sgd_is_maml(meta_sgd):
    start, (model, rates) = meta_sgd.start, split(meta_sgd.before)
    alike = {f"{OF_RATES}{path}": jnp.full_like(array, ETA) for path, array in rates.items()}
    params, tables = ({path: (model | alike)[path] for path in part} for part in (start.params, start.tables))
    start = start._replace(params=params, tables=tables)
    gradient = slope(model, meta_sgd.rows, num_steps=2, scope=("embedding", "task"))
    close(split(meta_sgd.after(start))[0], descended(model, gradient, RATE))


def test_rows_of_a_table_that_no_domain_names_stay_and_so_do_their_rates(meta_sgd, in_turn):
    """Blocks name three rows each, of which one and the next block have two in common."""
    blocks = [block for blocks in meta_sgd.rows for block in blocks]
    named = [block | {"ids": 2 + number + block["ids"] % 3} for number, block in enumerate(blocks)]
    state, _ = meta_sgd.run(meta_sgd.step.numbers(), meta_sgd.start, in_turn(*named))
    table, rates = "tables/user/rows", "aux/rate/tables/user/rows"
    assert state.tables.keys() == {table, rates}
    moved = {
        path: set(np.flatnonzero(np.any(array != meta_sgd.start.tables[path], axis=1)))
        for path, array in state.tables.items()
    }
    assert set() < moved[rates] < moved[table] <= {2, 3, 4, 5, 6, 7}
    assert moved[rates] <= {2, 3, 4, 5, 6}, "of support rows"


def slope_near_minimum(params, rows, proximal, size, num_steps):
    """Mean over domains of (I + H / proximal)^-1 grad L_d where the inner descent ends, with H written out."""
    flat, rebuild = jax.flatten_util.ravel_pytree(params)
    gradient = jax.jit(jax.grad(lambda flat, batch: loss(rebuild(flat), batch)))
    hessian = jax.jit(jax.hessian(lambda flat, batch: loss(rebuild(flat), batch)))
    found = []
    for support, query in rows:
        moved = flat
        for _ in range(num_steps):
            moved = moved - size * (gradient(moved, support) + proximal * (moved - flat))
        matrix = np.eye(len(flat)) + np.asarray(hessian(moved, support), np.float64) / proximal
        assert np.linalg.eigvalsh(matrix).min() > 0, "otherwise there is no minimum"
        found.append(np.linalg.solve(matrix, np.asarray(gradient(moved, query), np.float64)))
    return rebuild(jnp.asarray(np.mean(found, axis=0), jnp.float32))


def test_the_gradient_of_imaml_is_that_of_a_minimum(compiled):
    """And with an infinite pull that of first order."""
    program = compiled(IMAML(2, 0.05, num_steps=3, proximal=12.0, num_cg_steps=30))
    gradient = slope_near_minimum(program.before, program.rows, 12.0, 0.05, 3)
    close(program.after(), descended(program.before, gradient, RATE))
    plain = slope(program.before, program.rows, num_steps=0)
    assert apart(gradient, plain, "") > 1e-2
    close(program.after(step_size=0.0, proximal=1e7), descended(program.before, plain, RATE))


@pytest.fixture(scope="module")
def mldg(compiled):
    return compiled(MLDG(3, ETA, weight=0.7), **SPARSE)


def of_seen_and_unseen(params, rows, weight, first_order=False):
    """F(theta) + weight G(theta - eta grad F(theta)); the last domain is the unseen one."""

    def seen(params):
        return sum(loss(params, block) for (block,) in rows[:-1]) / (len(rows) - 1)

    gradient = jax.grad(seen)(params)
    gradient = jax.lax.stop_gradient(gradient) if first_order else gradient
    return seen(params) + weight * loss(descended(params, gradient, ETA), rows[-1][0])


def test_a_step_of_mldg_serves_the_seen_domains_and_the_unseen_one_after_it(mldg):
    """With weight 0 it is training on the seen ones."""
    gradient = jax.jit(jax.grad(lambda params, weight: of_seen_and_unseen(params, mldg.rows, weight)))
    for weight in (0.7, 0.0):
        close(mldg.after(weight=weight), descended(mldg.before, gradient(mldg.before, weight), RATE))
    pooled = jax.grad(lambda params: (loss(params, mldg.rows[0][0]) + loss(params, mldg.rows[1][0])) / 2)
    close(mldg.after(weight=0.0), descended(mldg.before, jax.jit(pooled)(mldg.before), RATE))


@pytest.mark.parametrize("first_order", [False, True])
def test_mldg_of_two_domains_is_the_constrained_transfer_from_one_to_the_other(first_order, compiled):
    program = compiled(MLDG(2, ETA, first_order=first_order))
    (source,), (target,) = program.rows

    def transferred(params):
        mode = "first_order" if first_order else "constrained"
        of_source, of_target = (functools.partial(loss, batch=batch) for batch in (source, target))
        return gradient_transfer(of_source, of_target, params, step_size=ETA, mode=mode, source_weight=1.0)[1]

    close(program.after(), descended(program.before, jax.jit(transferred)(program.before), RATE))


def trained_by(optimizer, params, blocks):
    """Where a fresh optimizer ends, a step on each block."""
    state = optimizer.init(params)
    for block in blocks:
        updates, state = optimizer.update(jax.grad(loss)(params, block), state)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("options", "inner", "more"),
    [
        ({"step_size": ETA, "num_steps": 1, "inner": "sgd"}, optax.sgd(ETA), {}),
        ({"step_size": 0.01, "num_steps": 2}, optax.adam(0.01, b1=0.0), SPARSE),
    ],
    ids=["one step of sgd", "two of adam"],
)
def test_reptile_goes_towards_the_mean_of_where_training_on_each_domain_ends(options, inner, more, compiled):
    program = compiled(Reptile(2, **options), **more)
    ends = [jax.jit(functools.partial(trained_by, inner))(program.before, blocks) for blocks in program.rows]
    distance = {path: array - (ends[0][path] + ends[1][path]) / 2 for path, array in program.before.items()}
    close(program.after(), descended(program.before, distance, RATE))
    if options["num_steps"] == 1:  # one joint step of SGD, of rate RATE * ETA

        def joint(params):
            return sum(loss(params, block) for (block,) in program.rows) / 2

        close(program.after(), descended(program.before, jax.grad(joint)(program.before), RATE * ETA))


# Balancers and penalties

adapted_once = jax.jit(adapted_to)


@jax.jit
def slope_of_tasks(params, batch, weights):
    return jax.grad(lambda params: sum(weights[task] * value for task, value in task_losses(params, batch).items()))(
        params
    )


def weights_of_pcgrad(product, squares):
    """Each gradient loses its part along the other one, where they conflict."""
    return [1 - min(product, 0) / square for square in squares]


def weights_of_mgda(product, squares):
    """The shortest convex combination."""
    first = (squares[1] - product) / (squares[0] + squares[1] - 2 * product)
    return [np.clip(first, 0, 1), 1 - np.clip(first, 0, 1)]


@pytest.mark.parametrize(
    ("balancer", "weights_of"), [(pcgrad(), weights_of_pcgrad), (mgda(), weights_of_mgda)], ids=["pcgrad", "mgda"]
)
def test_gradients_of_all_adapted_parameters_are_balanced_and_pulled_back_once(balancer, weights_of, compiled):
    """A task's gradient is stacked over domains."""
    options = BalancingOptions(scope="encoder", head_gradient="plain")
    program = compiled(MAML(2, ETA), seed=100, balancer=balancer, options=options)
    before, rows = program.before, program.rows
    adapted, pulls = zip(*(jax.vjp(lambda params, s=s: adapted_once(params, s), before) for s, _ in rows), strict=True)

    def of_task(task):
        chosen = {name: float(name == task) / len(rows) for name in ("click", "spend")}
        return [slope_of_tasks(params, query, chosen) for params, (_, query) in zip(adapted, rows, strict=True)]

    one, other = map(of_task, ("click", "spend"))

    def product(a, b):
        pairs = zip(a, b, strict=True)
        return sum(float(jnp.vdot(x[path], y[path])) for x, y in pairs for path in x if path.startswith("sharing/"))

    weights = weights_of(product(one, other), (product(one, one), product(other, other)))
    assert product(one, other) < -1e-3 and abs(weights[0] - weights[1]) > 1e-2
    balanced = [
        {
            path: a[path] + b[path] if path.startswith("task/") else weights[0] * a[path] + weights[1] * b[path]
            for path in before
        }
        for a, b in zip(one, other, strict=True)
    ]
    pulled = [pull(gradient)[0] for pull, gradient in zip(pulls, balanced, strict=True)]
    close(program.after(), descended(before, jax.tree.map(jnp.add, *pulled), RATE))


def undropped(sharing):
    return functools.partial(sharing, dropout=0.0)


def loss_of(program):
    """(params, batch) -> the sum of the tasks' losses of whatever model the program has."""

    def of_model(params, batch):
        found = program.step.functional.merge(params, program.start.rest)(batch)
        return sum(losses_of({task: output.reshape(-1) for task, output in found.items()}, batch).values())

    return of_model


def test_penalties_of_a_sharing_strategy_are_those_of_the_adapted_parameters(compiled, make_model):
    """The mean over domains, outside of balancing; the inner losses have none."""
    program = compiled(MAML(2, ETA), model=make_model(sharing=undropped(SoftSharing), units=(4,), strength=0.5))
    of_model = loss_of(program)

    def penalty(params):
        pairs = [
            (params[path], params[path.replace("/click/", "/spend/")]) for path in params if "/click/tower" not in path
        ]
        return 0.5 * sum(jnp.sum(jnp.square(one - other)) for one, other in pairs)

    def objective(params, strength):
        total = 0.0
        for support, query in program.rows:
            adapted = descended(params, jax.grad(of_model)(params, support), ETA)
            total += of_model(adapted, query) + strength * penalty(adapted)
        return total / 2

    gradient = jax.jit(jax.grad(objective))
    close(program.after(), descended(program.before, gradient(program.before, 1.0), RATE))
    assert apart(gradient(program.before, 1.0), gradient(program.before, 0.0), "sharing") > 1e-2


def test_penalties_on_rows_are_weighed_as_the_losses_of_their_domains(compiled, make_model):
    """The mean over a domain's rows, times what the domain counts: of the unseen one with weight 0 nothing is left."""
    options = {"num_experts": 2, "expert_units": (3,), "num_selected": 1, "entropy": 0.5}
    program = compiled(MLDG(3, 0.0), model=make_model(sharing=undropped(DSelectK), **options))
    of_model = loss_of(program)

    def penalty(params, batch):
        model = program.step.functional.merge(params, program.start.rest)
        of_rows = model.sharing.row_regulariser(model.common(model.inputs(batch), Context()))
        return jnp.vdot(batch["weight"], of_rows) / batch["weight"].sum()

    def objective(params, weight, strength):
        values = [of_model(params, batch) + strength * penalty(params, batch) for (batch,) in program.rows]
        return (values[0] + values[1]) / 2 + weight * values[2]

    gradient = jax.jit(jax.grad(objective))
    for weight in (0.0, 1.0):
        close(program.after(weight=weight), descended(program.before, gradient(program.before, weight, 1.0), RATE))
    assert apart(gradient(program.before, 0.0, 1.0), gradient(program.before, 0.0, 0.0), "sharing") > 1e-3


# Runs


@pytest.fixture
def after_epochs(make_model, arrays_of):
    """(setup, strategy, optimizer, epochs) -> what a run deploys after its epochs, whatever is selected."""

    def run(setup, strategy, optimizer, epochs=2):
        origin = dict.fromkeys(arrays_of(make_model()), True)
        session = Session(setup, Member(make_model, optimizer=optimizer, adaptation=strategy, origin=origin))
        state, position = session.resume()
        session.compile(state)
        for _ in range(epochs):
            state = session.close_epoch(session.end_epoch(session.run_epoch(state, position)), position)
        return {path: np.asarray(array) for path, array in session.evaluated(state).items()}

    return run


def negotiated(setup, params, optimizer, share, epochs=2):
    """Epochs of training with a fresh optimizer, after each of which a share of the way is gone."""

    @jax.jit
    def step(params, moments, rows):
        updates, moments = optimizer.update(jax.grad(loss)(params, take(setup.train, rows)), moments)
        return optax.apply_updates(params, updates), moments

    for epoch in range(epochs):
        moved, moments = params, optimizer.init(params)
        for rows in setup.order(Member(None), epoch):
            moved, moments = step(moved, moments, jnp.asarray(rows))
        params = {path: array + share * (moved[path] - array) for path, array in params.items()}
    return params


RUN = {"epochs": 2, "batch_size": 12, "patience": 0}


def test_domain_negotiation_goes_a_share_of_the_way_of_sequential_training(
    make_data, make_model, arrays_of, after_epochs
):
    """With share 1 it is sequential training; Adam begins anew with every epoch."""
    setup = Setup.of(make_data(40, domains=3), adaptation=DomainNegotiation(), **RUN)
    optimizer = Optimizer(learning_rate=0.01)
    for share in (1.0, 0.3):
        expected = negotiated(setup, arrays_of(make_model()), optax.adam(0.01), share)
        close(after_epochs(setup, DomainNegotiation(share), optimizer), expected)


def test_domain_regularisation_goes_a_share_of_the_way_by_a_helper_and_the_target(
    make_data, make_rows, make_model, arrays_of, after_epochs, assert_same
):
    """With share 0 the model of the source stays to the last bit. Tables are updated by rows."""
    options = RUN | {"source": make_rows(16, 30, domains=3), "table_updates": "sparse"}
    setup = Setup.of(make_data(20, domains=1), adaptation=DomainRegularisation(), **options)
    expected = negotiated(setup, arrays_of(make_model()), optax.sgd(RATE), 0.4)
    close(after_epochs(setup, DomainRegularisation(0.4), SGD), expected)
    assert_same(after_epochs(setup, DomainRegularisation(0.0), SGD), arrays_of(make_model()))


def test_runs_whose_epochs_differ_in_length_are_those_runs_alone(make_data, make_rows, make_model, arrays_of):
    """Each draws a helper of its own, of 4, 4 or 8 rows in batches of 4: who is done with an epoch waits for the others."""
    strategy = DomainRegularisation(0.5)
    options = {"epochs": 3, "batch_size": 4, "patience": 0, "adaptation": strategy, "steps_per_call": 3}
    options |= {"source": make_rows(16, 30, domains=3)}
    origin = dict.fromkeys(arrays_of(make_model()), True)
    members = [
        Member(make_model, seed=seed, adaptation=strategy, optimizer=Optimizer(learning_rate=0.01), origin=origin)
        for seed in (1, 2, 3)
    ]
    data = make_data(12, domains=1)
    setup = Setup.of(data, **options)
    assert len({tuple(len(setup.order(member, epoch)) for epoch in range(3)) for member in members}) > 1
    together, alone = (dict(fit_many(members, data, axis=axis, **options)) for axis in ("vmap", "map"))
    for number in range(3):
        assert together[number].timing["steps"] == alone[number].timing["steps"]
        assert [row["step"] for row in together[number].history] == [row["step"] for row in alone[number].history]
        found, expected = arrays_of(together[number].model), arrays_of(alone[number].model)
        for path in expected:
            np.testing.assert_allclose(found[path], expected[path], rtol=2e-5, atol=2e-5, err_msg=path)


def test_a_few_steps_on_rows_of_the_target_are_all_that_adapts_a_model(make_data, make_model, arrays_of):
    """Plain descent on two batches of 16 of its 40 rows."""
    strategy = GradientTransfer(ETA, num_steps=2, mode="update", rows="target", then_train=False)
    setup = Setup.of(make_data(40), adaptation=strategy, **RUN | {"batch_size": 16})
    result = Session(setup, Member(make_model, adaptation=strategy)).run()
    _, state = setup.build(Member(make_model, adaptation=strategy), setup.stages[0], make_model(), 1)
    batches = [jax.tree.map(lambda column, n=n: column[n], state.kept.batches) for n in range(2)]
    named = {row.tobytes() for batch in batches for row in np.asarray(batch["dense"])}
    assert len(named) == 32 and named <= {row.tobytes() for row in setup.data.train.dense}
    close(arrays_of(result.model), trained_by(optax.sgd(ETA), arrays_of(make_model()), batches))
    assert result.timing["steps"] == 0 and result.params["trainable"] == 0


# What does not go together


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (
            MAML(2),
            {"micro_batches": 2},
            "by domain, and there is trainer.micro_batches=2; expected a method that weighs",
        ),
        (MLDG(2), {"balancer": modo()}, "there is balancing 'MoDo', which compares parts of a batch"),
        (Reptile(2), {"balancer": pcgrad()}, "transfer 'Reptile' goes to where training on one domain ends, and bal"),
        (MAML(2), {"options": BalancingOptions(row_stride=2), "balancer": mgda()}, "there is balancing.row_stride=2"),
        (
            MetaSGD(2),
            {"balancer": graddrop(), "options": BalancingOptions(scope="representation")},
            "there is balancing 'GradDrop' at scope 'representation'",
        ),
        (IMAML(2), {"balancer": samo(equal())}, "there is balancing 'Samo', which takes steps of its own"),
        (
            DomainNegotiation(),
            {"average": 0.9},
            "'DomainNegotiation' goes back at the end of an epoch, and trainer.aver",
        ),
    ],
    ids=str,
)
def test_what_takes_a_batch_apart_or_keeps_what_is_left_is_refused(strategy, options, message, make_model, make_step):
    with pytest.raises(ConfigError, match=message):
        make_step(make_model(), strategy, **options)


def test_layers_with_statistics_of_batches_are_refused(make_model, make_step):
    with pytest.raises(
        ConfigError, match="'Reptile' takes gradient steps inside of a step, and this sharing keeps stat"
    ):
        make_step(make_model(sharing=ResFlow, units=(4,), logits=False), Reptile(2))


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (MAML, {"num_domains": 0}, "transfer.num_domains is 0; expected a whole number from 1"),
        (MAML, {"step_size": -1.0}, r"transfer.step_size is -1.0; expected a number in \[0"),
        (MAML, {"num_steps": 0}, "transfer.num_steps is 0; expected a whole number from 1"),
        (MAML, {"scope": ()}, r"transfer.scope is \[\]; expected some of"),
        (MetaSGD, {"scope": ("head",)}, r"transfer.scope is \['head'\]; expected some of"),
        (IMAML, {"proximal": 0.0}, r"transfer.proximal is 0.0; expected a number in \(0"),
        (IMAML, {"num_cg_steps": 0}, "transfer.num_cg_steps is 0; expected a whole number from 1"),
        (MLDG, {"num_domains": 1}, "transfer.num_domains is 1; expected a whole number from 2"),
        (MLDG, {"weight": -0.1}, r"transfer.weight is -0.1; expected a number in \[0"),
        (Reptile, {"inner": "lion"}, r"transfer.inner is 'lion'; expected one of \['adam', 'sgd'\]"),
        (DomainNegotiation, {"step_size": 1.5}, r"transfer.step_size is 1.5; expected a number in \[0"),
        (DomainRegularisation, {"step_size": -0.5}, r"transfer.step_size is -0.5; expected a number in \[0"),
    ],
    ids=str,
)
def test_options_out_of_their_range_are_refused(strategy, options, message):
    with pytest.raises(ConfigError, match=message):
        strategy(**options)
