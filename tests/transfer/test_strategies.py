"""What holds for every strategy of transfer, from the first step to the result of a run."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.data.batching import take
from mtl_jax.data.dataset import concatenated
from mtl_jax.errors import ConfigError, Interrupted
from mtl_jax.tasks import Task
from mtl_jax.train import Member, Optimizer, fit, fit_many
from mtl_jax.train.adaptation import Adaptation, structure
from mtl_jax.train.session import Session
from mtl_jax.train.setup import Setup
from mtl_jax.train.state import Functional
from mtl_jax.transfer import (
    BSS,
    IMAML,
    L2SP,
    MAML,
    MLDG,
    Adapter,
    BitFit,
    CoTuning,
    Delta,
    DiscriminativeLR,
    Distill,
    DomainNegotiation,
    DomainRegularisation,
    FeatureDistill,
    FineTune,
    GradientTransfer,
    GradualUnfreeze,
    LinearMap,
    LinearProbe,
    LinInt,
    LoRA,
    LwF,
    MetaSGD,
    NonlinearMap,
    Pooled,
    Pred,
    Reptile,
    Scratch,
    ZeroShot,
)

ROWS, STEPS = 20, 3
TABLE = {"tables/user/rows"}
KERNELS = {f"sharing/bottom/layers/{n}/kernel" for n in (0, 1)}
BIASES = {f"sharing/bottom/layers/{n}/bias" for n in (0, 1)}
TOWERS = {f"task/{task}/tower/head/{name}" for task in ("click", "spend") for name in ("kernel", "bias")}
SHARED = KERNELS | BIASES
ALL = TABLE | SHARED | TOWERS
ADAPTERS = {
    f"sharing/bottom/aux/adapter/{n}/{part}/{name}"
    for n in (0, 1)
    for part in ("down", "up")
    for name in ("kernel", "bias")
}


def named(value):
    return type(value).__name__ if isinstance(value, Adaptation) else str(value)


CLASSES = (Task("click", "binary"), Task("kind", "multiclass", classes=("a", "b", "c")))
OF_CLASSES = {path.replace("spend", "kind") for path in ALL}


def beside(prefix, paths, *names):
    return {f"{prefix}/{path}/{name}" for path in paths for name in names}


@dataclasses.dataclass(frozen=True)
class Case:
    """A strategy with what it trains, what of the model then moves, whether it deploys at first what was loaded, after how
    many epochs, what is deployed beside that, and of which phase and tasks all that is."""

    strategy: object
    trained: frozenset
    moved: frozenset = frozenset(ALL)
    same_at_first: bool = True
    epochs: int = 0
    added: frozenset = frozenset()
    phase: int = 0
    tasks: tuple = ()

    @property
    def batches(self):
        of_domains = self.strategy.episodes
        return math.prod(of_domains) if of_domains else self.strategy.batches_beside + 1


CASES = {
    "scratch": Case(Scratch(), ALL),
    "fine_tune": Case(FineTune(), ALL),
    "linear_probe": Case(LinearProbe(), TOWERS, TOWERS),
    "linear_probe then all": Case(LinearProbe(then_all=True), TOWERS, TOWERS),
    "bitfit": Case(BitFit(), BIASES | TOWERS, BIASES | TOWERS),
    "discriminative_lr": Case(DiscriminativeLR(), ALL),
    "gradual_unfreeze": Case(GradualUnfreeze(), ALL, epochs=3),
    "pooled": Case(Pooled(0.5), ALL),
    "pred": Case(Pred(), ALL),
    "lin_int": Case(LinInt(), ALL),
    "l2_sp": Case(L2SP(), ALL),
    "distill": Case(Distill(), ALL),
    "feature_distill": Case(FeatureDistill(), ALL),
    "bss": Case(BSS(), ALL),
    "lwf": Case(LwF(), ALL | {f"aux/copy/{path}" for path in TOWERS}),
    "adapter": Case(Adapter(3), ADAPTERS | TOWERS, ADAPTERS | TOWERS, added=ADAPTERS),
    "co_tuning": Case(
        CoTuning(),
        OF_CLASSES | {f"aux/copy/{path}" for path in OF_CLASSES if path.startswith("task/")},
        OF_CLASSES,
        tasks=CLASSES,
    ),
    "delta": Case(Delta(), TOWERS, TOWERS),
    "delta after its probe": Case(Delta(), ALL, phase=1),
    "lora": Case(LoRA(2), beside("aux/lora", KERNELS, "a", "b") | TOWERS, KERNELS | TOWERS),
    "lora of one": Case(
        LoRA(2, targets=".*/0/kernel", rank_stabilised=True),
        beside("aux/lora", ["sharing/bottom/layers/0/kernel"], "a", "b") | TOWERS,
        {"sharing/bottom/layers/0/kernel"} | TOWERS,
    ),
    "scalar": Case(LinearMap("scalar"), beside("aux/map", KERNELS, "a") | TOWERS, KERNELS | TOWERS),
    "diagonal": Case(LinearMap(), beside("aux/map", KERNELS, "a", "b") | TOWERS, SHARED | TOWERS),
    "left_right": Case(LinearMap("left_right"), beside("aux/map", KERNELS, "p", "q") | TOWERS, KERNELS | TOWERS),
    "nonlinear_map": Case(
        NonlinearMap(3), beside("aux/map", KERNELS, "v1", "c1", "v2", "c2") | TOWERS, SHARED | TOWERS
    ),
    "update": Case(GradientTransfer(mode="update"), ALL),
    "constrained": Case(GradientTransfer(), ALL, same_at_first=False),
    "ascent of shared layers": Case(GradientTransfer(0.1, 1, scope=("shared",)), ALL, same_at_first=False),
    "first_order": Case(GradientTransfer(mode="first_order", num_steps=2), ALL, same_at_first=False),
    "maml": Case(MAML(2), ALL),
    "meta_sgd": Case(MetaSGD(2), ALL | {f"aux/rate/{path}" for path in ALL}),
    "imaml": Case(IMAML(2, num_steps=2), ALL),
    "mldg": Case(MLDG(2), ALL),
    "reptile": Case(Reptile(2, num_steps=2), ALL),
    "mamdr_dn": Case(DomainNegotiation(), ALL),
    "mamdr_dr": Case(DomainRegularisation(), ALL),
}


ALIKE = {
    "scratch", "pooled", "pred", "lin_int", "linear_probe then all", "lora of one", "update", "delta", "mamdr_dn",
    "mamdr_dr",
}  # fmt: skip
"""Their first stage is the program of another case."""


@pytest.fixture(scope="module")
def batches(make_batch, in_turn):
    """(how many take turns, tasks) -> a batch of the target and of so many sources."""

    @functools.cache
    def made(number, tasks=()):
        options = {"tasks": tasks} if tasks else {}
        return in_turn(*(make_batch(ROWS, seed, **options) for seed in range(number)))

    return made


@pytest.fixture(scope="module")
def begun(schema, make_model, make_step, sources, studied, batches):
    """Case -> its model, and the step and state that its phase begins with."""

    def build(case, **options):
        tasks = case.tasks or schema.tasks
        model = make_model(of=dataclasses.replace(schema, tasks=tasks))
        kept = sources(case.strategy.source_batches)
        step, state = make_step(model, case.strategy, phase=case.phase, tasks=tasks, batches=kept, **options)
        return model, step, studied(step, state, batches(1, case.tasks))

    return build


@pytest.fixture(scope="module")
def sources(make_batch):
    """How many -> batches of the source that a model is deployed with."""

    def stacked(number):
        made = [make_batch(ROWS, 10 + seed) for seed in range(number)]
        return jax.tree.map(lambda *columns: jnp.stack(columns), *made) if made else None

    return stacked


@dataclasses.dataclass
class Built:
    case: Case
    step: object
    start: object
    run: object


@pytest.fixture(scope="module", params=[name for name in CASES if name not in ALIKE])
def built(request, begun, perturbed):
    """A strategy's step at a point where no factor is zero, compiled once."""
    case = CASES[request.param]
    _, step, state = begun(case, optimizer=Optimizer(learning_rate=0.01))
    state = perturbed(step.started(state))
    for _ in range(case.epochs):
        state = step.end_epoch(state)
    return Built(case, step, state, jax.jit(step))


def changed(before, after):
    assert before.keys() == after.keys()
    return {path for path in before if np.any(before[path] != after[path])}


def test_what_moves_is_what_is_declared_and_the_rest_stays_to_the_last_bit(built, batches):
    state = built.start
    for _ in range(STEPS):
        state, _ = built.run(state, batches(built.case.batches, built.case.tasks))
    trained = built.start.params, state.params
    assert trained[0].keys() == built.case.trained == changed(*trained)
    deployed = [built.step.functional.own(built.step.evaluated(one)) for one in (built.start, state)]
    assert changed(*deployed) == built.case.moved
    assert changed(built.start.rest, state.rest) == set()
    jax.tree.map(np.testing.assert_array_equal, state.kept, built.start.kept)


def test_a_batch_of_padding_or_without_labels_is_finite(built, batches):
    whole = batches(built.case.batches, built.case.tasks)
    task = built.step.tasks[1].name
    silent = whole | {"mask": whole["mask"] | {task: jnp.zeros_like(whole["mask"][task])}}
    padding = whole | {"weight": jnp.zeros_like(whole["weight"])}
    for batch in (silent, padding):
        state, sums = built.run(built.start, batch)
        assert bool(state.live) and int(sums.skipped) == 0
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, sums)))
    assert np.all(sums.denominator == 0)


@pytest.mark.parametrize("name", CASES)
def test_the_deployed_model_is_an_ordinary_one_and_at_first_the_one_that_was_loaded(name, begun, arrays_of, make_batch):
    case = CASES[name]
    model, step, state = begun(case)
    loaded, deployed = arrays_of(model), step.functional.own(step.evaluated(state))
    assert deployed.keys() == loaded.keys() | case.added
    assert changed(loaded, {path: deployed[path] for path in loaded}) == (
        set() if case.same_at_first else case.moved - _out_of_scope(case)
    )
    outputs = step.functional.merge(deployed)(make_batch(ROWS))
    assert all(np.all(np.isfinite(output)) for output in outputs.values())


def _out_of_scope(case):
    scope = case.strategy.scope
    return set().union(*(paths for kind, paths in KINDS.items() if kind not in scope))


KINDS = {"embedding": TABLE, "shared": SHARED, "task": TOWERS}


@pytest.fixture(scope="module")
def after(make_model, make_step, batches):
    """Strategy -> the trained parameters after a few steps on one batch."""

    def run(strategy):
        step, state = make_step(make_model(), strategy, optimizer=Optimizer(learning_rate=0.01))
        one = jax.jit(step)
        for _ in range(STEPS):
            state, _ = one(state, batches(1))
        return state.params | state.kept.arrays

    return functools.cache(run)


@pytest.mark.parametrize(
    "strategy",
    [
        None,
        L2SP(0.0, 0.0),
        Distill(0.0),
        FeatureDistill(0.0),
        BSS(0.0),
        CoTuning(0.0),
        DiscriminativeLR(1),
        GradientTransfer(0.0),
    ],
    ids=named,
)
def test_a_coefficient_of_zero_is_plain_fine_tuning_to_the_last_bit(strategy, after, assert_same):
    assert_same(after(strategy), after(FineTune()))


RUN = {"epochs": 2, "batch_size": 8, "patience": 0, "steps_per_call": 1, "checkpoint_seconds": 0}


@pytest.fixture(scope="module")
def setup_of(make_data, make_rows):
    """Strategy -> setup of short runs, whose compiled programs it keeps."""

    @functools.cache
    def build(strategy):
        return Setup.of(make_data(domains=2), adaptation=strategy, source=make_rows(17, 30, domains=2), **RUN)

    return build


@pytest.fixture(scope="module")
def member_of(make_model, arrays_of):
    def build(strategy, **options):
        origin = dict.fromkeys(arrays_of(make_model()), True)
        return Member(make_model, seed=1, adaptation=strategy, origin=origin, **options)

    return build


@pytest.mark.parametrize(
    ("strategy", "left"),
    [(GradientTransfer(0.0), FineTune()), (Delta(0.0, beta=0.0), LinearProbe(then_all=True))],
    ids=named,
)
def test_a_whole_run_with_a_coefficient_of_zero_is_one_of_what_is_left(
    strategy, left, setup_of, member_of, arrays_of, assert_same
):
    """No row of the source is then trained on, and none of the target studied."""
    found, expected = (Session(setup_of(one), member_of(one)).run() for one in (strategy, left))
    assert [row["step"] for row in found.history] == [row["step"] for row in expected.history]
    assert_same(arrays_of(found.model), arrays_of(expected.model))


@pytest.mark.parametrize(
    ("strategy", "stops"),
    [
        (L2SP(), (2, 3)),
        (LoRA(2), (2, 3)),
        (Adapter(2), (2, 3)),
        (LinearProbe(then_all=True), (4, 4)),
        (Delta(), (4, 4)),
        (GradientTransfer(), (2, 3)),
        (GradualUnfreeze(allow_partial=True), (3, 1)),
        (MAML(), (2, 3)),
        (DomainNegotiation(), (2, 3)),
    ],
    ids=named,
)
def test_a_run_that_was_stopped_twice_ends_as_one_that_was_not(
    strategy, stops, setup_of, member_of, arrays_of, assert_same, tmp_path
):
    """In the middle of epochs; the probe is stopped in its second stage, too."""
    setup = setup_of(strategy)
    undisturbed = Session(setup, member_of(strategy)).run()
    for calls in stops:
        asked = iter(range(1, 100))
        stopping = dataclasses.replace(setup, should_stop=lambda c=calls, a=asked: next(a) == c)
        with pytest.raises(Interrupted):
            Session(stopping, member_of(strategy, checkpoints=tmp_path)).run()
    resumed = Session(setup, member_of(strategy, checkpoints=tmp_path)).run()
    assert_same(arrays_of(resumed.model), arrays_of(undisturbed.model))
    assert resumed.metrics == undisturbed.metrics


def test_a_probe_that_fine_tuning_ruins_is_what_is_selected(make_model, make_data, arrays_of, tmp_path):
    """With checkpoints and without: what a second stage begins with is the first candidate of its selection."""
    data = make_data()
    source = fit(make_model(), data, optimizer=Optimizer(learning_rate=0.03), **RUN | {"epochs": 20}).model
    ruinous = Optimizer(learning_rate={"task": 1e-3, "shared": 30.0, "embedding": 30.0})
    for more in ({}, {"checkpoints": tmp_path}):
        found = fit(source, data, adaptation=LinearProbe(then_all=True), optimizer=ruinous, **RUN, **more)
        for path in TABLE | SHARED:
            np.testing.assert_array_equal(arrays_of(found.model)[path], arrays_of(source)[path])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (L2SP(0.1, 0.01), L2SP(5.0, 0.3)),
        (LoRA(2, 1.0), LoRA(2, 16.0)),
        (Delta(0.01), Delta(20.0, 0.05, 0.3)),
        (GradientTransfer(0.01), GradientTransfer(0.3)),
        (MAML(step_size=0.01), MAML(step_size=0.3)),
        (DomainNegotiation(0.1), DomainNegotiation(1.0)),
    ],
    ids=named,
)
def test_runs_with_other_numbers_side_by_side_are_those_runs_alone(
    one, other, make_data, make_rows, member_of, arrays_of
):
    assert structure(one) == structure(other)
    members = [member_of(strategy, optimizer=Optimizer(learning_rate=0.01)) for strategy in (one, other)]
    options = RUN | {"adaptation": one, "source": make_rows(17, 30, domains=2)}
    data = make_data(domains=2)
    together, alone = (dict(fit_many(members, data, axis=axis, **options)) for axis in ("vmap", "map"))
    for number in (0, 1):
        found, expected = arrays_of(together[number].model), arrays_of(alone[number].model)
        for path in expected:
            np.testing.assert_allclose(found[path], expected[path], rtol=2e-5, atol=2e-5, err_msg=path)
    assert changed(*(arrays_of(result.model) for result in alone.values()))


def test_members_of_several_strategies_share_no_program(make_data, member_of):
    with pytest.raises(ConfigError, match="differs from run 0 in more than numbers"):
        list(fit_many([member_of(LoRA(2)), member_of(LoRA(3))], make_data(), axis="vmap", adaptation=LoRA(2), **RUN))


@pytest.mark.parametrize(
    ("strategy", "near"),
    [
        (L2SP(0.5, 0.2), 1e-7),
        (GradientTransfer(0.1), 1e-6),
    ],
    ids=named,
)
def test_tables_updated_by_rows_are_those_updated_as_a_whole(strategy, near, make_model, make_step, batches, arrays_of):
    """Every row of the table is in the batch; under SGD a row that is touched is then moved alike."""
    origin = dict.fromkeys(arrays_of(make_model()), True) | {"tables/user/rows": np.arange(10) % 3 > 0}
    found = []
    for way in ("dense", "sparse"):
        step, state = make_step(
            make_model(),
            strategy,
            origin=origin,
            optimizer=Optimizer(optax.identity(), learning_rate=0.1),
            table_updates={"user": way},
        )
        run = jax.jit(step)
        for _ in range(2):
            state, _ = run(state, batches(strategy.batches_beside + 1))
        found.append(state.params | state.tables)
    dense, sparse = found
    for path in dense:
        np.testing.assert_allclose(sparse[path], dense[path], rtol=0, atol=near, err_msg=path)


def test_rows_that_a_batch_does_not_name_are_left_alone_by_a_spring(make_model, make_step, batches):
    """As weight decay is: a table of a million rows is not read whole."""
    optimizer = Optimizer(optax.identity(), learning_rate=0.1)
    step, state = make_step(make_model(), L2SP(), origin={}, optimizer=optimizer, table_updates={"user": "sparse"})
    batch = take(batches(1), jnp.array([4, 5, 6, 7]))
    table = "tables/user/rows"
    moved = np.any(jax.jit(step)(state, batch)[0].tables[table] != state.tables[table], axis=1)
    assert np.flatnonzero(moved).tolist() == [4, 5, 6, 7]


def test_nothing_is_trained_at_zero_shot(make_model, make_data, arrays_of, assert_same):
    model = make_model()
    result = fit(model, make_data(), adaptation=ZeroShot(), **RUN)
    assert_same(arrays_of(result.model), arrays_of(model))
    assert result.timing["steps"] == 0 and result.metrics["valid"]["spend"]["rmse"] > 0


def test_what_was_loaded_is_the_first_candidate_of_the_selection(make_model, make_data, arrays_of, assert_same):
    """With a ruinous rate no epoch is better than no step."""
    result = fit(make_model(), make_data(), adaptation=FineTune(), optimizer=Optimizer(learning_rate=30.0), **RUN)
    assert_same(arrays_of(result.model), arrays_of(make_model()))


def test_pooling_is_training_on_the_rows_of_both(make_model, make_data, make_rows, arrays_of, assert_same):
    data, source = make_data(), make_rows(17, 30)
    pooled = fit(make_model(), data, adaptation=Pooled(0.25), source=source, **RUN)
    both = dataclasses.replace(data, train=concatenated(data.train, source, 0.25))
    plain = fit(make_model(), both, adaptation=Scratch(), **RUN)
    assert_same(arrays_of(pooled.model), arrays_of(plain.model))


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (L2SP, {"alpha": -0.1}, r"transfer.alpha is -0.1; expected a number in \[0"),
        (L2SP, {"beta": float("nan")}, "transfer.beta is nan"),
        (Distill, {"weight": -1.0}, r"transfer.weight is -1.0; expected a number in \[0"),
        (Distill, {"temperature": 0.0}, r"transfer.temperature is 0.0; expected a number in \(0"),
        (FeatureDistill, {"weight": "1"}, "transfer.weight is '1'; expected a number"),
        (BSS, {"weight": -1e-3}, "transfer.weight is -0.001"),
        (CoTuning, {"weight": -1.0}, "transfer.weight is -1.0"),
        (Delta, {"weight": -1.0}, "transfer.weight is -1.0"),
        (Delta, {"tau": 0.0}, r"transfer.tau is 0.0; expected a number in \(0"),
        (Delta, {"beta": -0.1}, "transfer.beta is -0.1"),
        (BSS, {"k": 0}, "transfer.k is 0; expected a whole number from 1"),
        (DiscriminativeLR, {"xi": 0.0}, r"transfer.xi is 0.0; expected a number in \(0"),
        (GradualUnfreeze, {"epochs_per_group": 0}, "transfer.epochs_per_group is 0; expected a whole number from 1"),
        (Adapter, {"width": 0}, "transfer.width is 0; expected a whole number from 1"),
        (Adapter, {"targets": "["}, r"transfer.targets is '\[', no pattern"),
        (LoRA, {"rank": 0}, "transfer.rank is 0; expected a whole number from 1"),
        (LoRA, {"alpha": 0.0}, "transfer.alpha is 0.0"),
        (LoRA, {"targets": "("}, r"transfer.targets is '\(', no pattern"),
        (LinearMap, {"form": "affine"}, r"transfer.form is 'affine'; expected one of \['scalar'"),
        (LinearMap, {"targets": 3}, "transfer.targets is 3, no pattern"),
        (NonlinearMap, {"hidden": 1.5}, "transfer.hidden is 1.5; expected a whole number"),
        (NonlinearMap, {"targets": "*"}, r"transfer.targets is '\*', no pattern"),
        (Pooled, {"weight": 0.0}, r"transfer.weight is 0.0; expected a number in \(0"),
        (GradientTransfer, {"step_size": -1.0}, r"transfer.step_size is -1.0; expected a number in \[0"),
        (GradientTransfer, {"sign": 0}, r"transfer.sign is 0; expected one of \[-1, 1\]"),
        (GradientTransfer, {"num_steps": 0}, "transfer.num_steps is 0; expected a whole number from 1"),
        (GradientTransfer, {"mode": "second_order"}, r"transfer.mode is 'second_order'; expected one of \['update'"),
        (GradientTransfer, {"scope": ["tables"]}, r"transfer.scope is \['tables'\]; expected some of"),
        (GradientTransfer, {"scope": []}, r"transfer.scope is \[\]; expected some of"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(strategy, options, message):
    with pytest.raises(ConfigError, match=message):
        strategy(**options)


@pytest.mark.parametrize("strategy", [LoRA, LinearMap, NonlinearMap], ids=lambda strategy: strategy.__name__)
def test_a_pattern_has_to_fit_kernels_of_shared_layers(strategy, make_model, make_step):
    for pattern in ("head/kernel", "task/.*/kernel", "kernel"):
        with pytest.raises(ConfigError, match="which no shared parameter has as its path"):
            make_step(make_model(), strategy(targets=pattern))
    with pytest.raises(ConfigError, match="which are no matrices"):
        make_step(make_model(), strategy(targets="sharing/.*"))


@pytest.mark.parametrize("strategy", [Pooled(), GradientTransfer(), GradientTransfer(mode="update")], ids=named)
def test_rows_of_the_source_have_to_be_there(strategy, make_model, make_data):
    with pytest.raises(ConfigError, match=f"transfer '{type(strategy).__name__}' trains on rows of the source"):
        fit(make_model(), make_data(), adaptation=strategy, **RUN)


def test_strategies_have_stages_of_their_own(make_model, make_data):
    with pytest.raises(ConfigError, match="transfer 'FineTune' with training=staged; expected joint"):
        fit(make_model(), make_data(), adaptation=FineTune(), training="staged", **RUN)


def test_a_strategy_is_a_tree_of_its_numbers():
    leaves, rebuilt = jax.tree.flatten(LoRA(3, 0.5))
    assert leaves == [0.5] and jax.tree.unflatten(rebuilt, leaves) == LoRA(3, 0.5)
    assert structure(L2SP(0.1)) == structure(L2SP(0.2)) != structure(FeatureDistill())
    assert jax.tree.leaves((FineTune(), LinearProbe(), Distill(0.2, 3.0))) == [0.2, 3.0]


def test_the_model_is_a_source_in_every_array_that_training_reads(make_model):
    """The table of cases covers all parameters of the model that it is about."""
    assert set(Functional.of(make_model())[1]) == ALL
