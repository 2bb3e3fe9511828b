"""fit: against a textbook loop; interrupted, resumed, stopped, selected."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_jax
from mtl_jax.balancing import fixed, pcgrad
from mtl_jax.data import Dataset
from mtl_jax.data.batching import as_batch, epoch_order, take
from mtl_jax.errors import ConfigError, RunFolderError, TrainingError
from mtl_jax.metrics import evaluate
from mtl_jax.model import MultiTaskModel
from mtl_jax.nn import Context, Encoder, Tower
from mtl_jax.sharing import SharedBottom
from mtl_jax.train import Objective, Optimizer, Quiet, fit
from mtl_jax.train.checkpoint import Checkpoints
from mtl_jax.train.predict import _pass_over
from mtl_jax.train.state import Functional


@pytest.fixture(scope="module")
def data(small_schema, make_data):
    """50 rows to train on: four steps of 16 an epoch, the last one padded."""
    return make_data(small_schema)


@pytest.fixture(scope="module")
def train(data, make_model):
    """A run with dropout, a stochastic balancer and a table by rows, unless told otherwise."""

    def run(data=data, *, dropout=0.2, sharing="shared_bottom", model_seed=0, **options):
        defaults = {"balancer": pcgrad(), "optimizer": Optimizer(learning_rate=0.03), "epochs": 3, "batch_size": 16}
        defaults |= {"patience": 0, "steps_per_call": 1, "table_updates": "sparse"}
        model = make_model(data.schema, sharing, seed=model_seed, dropout=dropout)
        return fit(model, data, **defaults | options)

    return run


@pytest.fixture(scope="module")
def undisturbed(train):
    return train()


def arrays(result):
    _, params, rest = Functional.of(result.model)
    return {path: np.asarray(array) for path, array in (params | rest).items()}


def assert_same_run(one, other):
    jax.tree.map(np.testing.assert_array_equal, arrays(one), arrays(other))
    assert one.history == other.history
    assert one.monitor == other.monitor
    assert one.metrics == other.metrics
    assert one.support == other.support


class Interrupting(Quiet):
    """Raises when a call of ``advanced`` begins, and keeps what it was told."""

    def __init__(self, at=None):
        self.at, self.begun, self.steps, self.epochs, self.closed = at, None, [], [], False

    def started(self, *, total_steps, done_steps):
        self.begun = (total_steps, done_steps)

    def advanced(self, *, steps, epoch, losses, weights, examples_per_second):
        self.steps.append(steps)
        assert all(type(loss) is float or isinstance(loss, np.floating) for loss in losses.values())
        if len(self.steps) == self.at:
            raise KeyboardInterrupt

    def evaluated(self, *, epoch, values, monitor, best, history):
        self.epochs.append((epoch, monitor, best))

    def finished(self):
        self.closed = True


def test_equals_a_textbook_loop(data, make_model):
    """Adam on 2 L_click + L_spend over the batches of the epochs, written with jax.grad on the model's output."""
    model = make_model(data.schema)
    options = {"balancer": fixed(weights=[2.0, 1.0]), "optimizer": optax.adam(0.02), "table_updates": "dense"}
    result = fit(model, data, epochs=3, batch_size=16, seed=4, patience=0, **options)
    functional, params, _ = Functional.of(model)

    @jax.jit
    def gradient(params, batch):
        def objective(params):
            outputs, total, sums = functional.merge(params)(batch), 0.0, []
            for name, factor in (("click", 2.0), ("spend", 1.0)):
                scale = batch["mask"][name] * batch["weight"]
                labels = jnp.where(scale > 0, batch["labels"][name], 0)
                logits = outputs[name]
                losses = jnp.logaddexp(0, logits) - labels * logits if name == "click" else (logits - labels) ** 2
                total += factor * (scale * losses).sum() / jnp.maximum(scale.sum(), 1e-30)
                sums.append(jnp.stack([(scale * losses).sum(), scale.sum()]))
            return total, jnp.stack(sums)

        return jax.grad(objective, has_aux=True)(params)

    adam, rows = optax.adam(0.02), as_batch(data.train)
    state, scores, losses = adam.init(params), [], []
    for epoch in range(3):
        total = 0.0
        for order in epoch_order(50, 16, seed=4, epoch=epoch):
            gradients, sums = gradient(params, take(rows, jnp.asarray(order)))
            updates, state = adam.update(gradients, state, params)
            params, total = optax.apply_updates(params, updates), total + sums
        losses.extend(total[:, 0] / total[:, 1])  # of the rows as the epoch met them
        outputs = jax.tree.map(np.asarray, functional.merge(params)(as_batch(data.valid)))
        scores.append(evaluate(data.schema.tasks, outputs, data.valid)[0])
    last = {path: array for path, array in arrays(result).items()}
    assert result.monitor["step"] == 12, "the world is easy: the last epoch is the best"
    for path in params:
        np.testing.assert_allclose(last[path], params[path], rtol=2e-4, atol=2e-5, err_msg=path)
    recorded = [row["value"] for row in result.history if row["name"] == "auc"]
    np.testing.assert_allclose(recorded, [score["click"]["auc"] for score in scores], rtol=1e-6)
    recorded = [row["value"] for row in result.history if row["name"] == "loss"]
    np.testing.assert_allclose(recorded, losses, rtol=1e-4)
    assert result.monitor["value"] > 0


def test_result_tells_what_happened(undisturbed, data):
    """Every epoch has losses, weights and metrics; the selection is the best epoch; numbers fit the model and data."""
    gains = {row["step"]: row["value"] for row in undisturbed.history if row["name"] == "mean_gain"}
    assert sorted(gains) == [4, 8, 12]
    assert undisturbed.monitor == {"name": "mean_gain", "step": max(gains, key=gains.get), "value": max(gains.values())}
    selected = {(row["task"], row["name"]): row["value"] for row in undisturbed.history
                if row["part"] == "valid" and row["task"] and row["step"] == undisturbed.monitor["step"]}  # fmt: skip
    assert selected == {(t, m): v for t, metrics in undisturbed.metrics["valid"].items() for m, v in metrics.items()}
    outputs = undisturbed.predict(data.valid)
    compiled = _pass_over._cache_size()
    jax.tree.map(np.testing.assert_array_equal, undisturbed.predict(data.valid), outputs)
    assert _pass_over._cache_size() == compiled
    assert evaluate(data.schema.tasks, outputs, data.valid)[0] == undisturbed.metrics["valid"]
    losses = [row for row in undisturbed.history if row["part"] == "train" and row["name"] == "loss"]
    assert [row["task"] for row in losses] == ["click", "spend"] * 3
    assert losses[-1]["value"] < losses[1]["value"]
    cosines = [row for row in undisturbed.history if row["name"] == "cosine click spend"]
    assert [row["step"] for row in cosines] == [4, 8, 12]
    assert all(-1 <= row["value"] <= 1 for row in cosines)
    assert undisturbed.timing["steps"] == 12
    counts = undisturbed.params
    assert counts["embedding"] == 20 * 3
    assert counts["total"] == sum(array.size for array in Functional.of(undisturbed.model)[1].values())
    assert counts["embedding"] + counts["shared"] + counts["task"] == counts["total"]
    assert undisturbed.table_updates == {"user": "sparse"}
    assert undisturbed.diagnostics["skipped_steps"] == 0


def test_seeds(train, undisturbed):
    """The same seed gives the same bits, another one another order, other dropout and other parameters."""
    assert_same_run(train(), undisturbed)
    other = train(seed=1)
    drawn = [path for path in arrays(other) if not path.endswith("/dropout")]
    assert all(np.any(arrays(other)[path] != arrays(undisturbed)[path]) for path in drawn)


def test_the_model_stays_as_it_was(data, make_model, undisturbed):
    model = make_model(data.schema)
    before = {path: np.asarray(array) for path, array in Functional.of(model)[1].items()}
    fit(model, data, epochs=1, batch_size=16)
    jax.tree.map(np.testing.assert_array_equal, before, Functional.of(model)[1])


@pytest.mark.parametrize("at", [3, 6])
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, train, undisturbed, at):
    """An exception in the third (sixth) of twelve steps, between two checkpoints: the rest gives the same bits."""
    first = Interrupting(at)
    options = {"checkpoints": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        train(observer=first, **options)
    assert first.closed and first.begun == (12, 0)
    assert Checkpoints(tmp_path).steps()[-1] == at - 1
    second = Interrupting()
    resumed = train(observer=second, **options)
    assert second.begun == (12, at - 1) and sum(second.steps) == 12 - (at - 1)
    assert_same_run(resumed, undisturbed)

    third = Interrupting()
    again = train(observer=third, **options)
    assert third.steps == [] and again.timing["compile_seconds"] == 0
    assert_same_run(again, undisturbed)


def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(tmp_path, train, undisturbed):
    options = {"checkpoints": tmp_path, "checkpoint_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        train(observer=Interrupting(7), **options)
    newest = tmp_path / "6"
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    observer = Interrupting()
    assert_same_run(train(observer=observer, **options), undisturbed)
    assert observer.begun == (12, 5)


def test_checkpoints_of_another_run_are_refused(tmp_path, train):
    with pytest.raises(KeyboardInterrupt):
        train(observer=Interrupting(2), checkpoints=tmp_path, checkpoint_seconds=0)
    with pytest.raises(RunFolderError, match="expected the state of this model and optimizer"):
        train(sharing="mmoe", checkpoints=tmp_path)
    with pytest.raises(RunFolderError, match="start in a new run folder"):
        train(optimizer=Optimizer(optax.trace(0.9)), checkpoints=tmp_path)


def rise_and_fall(epochs, steps_an_epoch=4):
    """Descends for some epochs and climbs afterwards."""
    return lambda step: jnp.where(step < epochs * steps_an_epoch, 0.03, -0.03)


@pytest.mark.parametrize("keeps", [True, False], ids=["checkpoints", "in memory"])
def test_stops_early_and_selects_the_best(tmp_path, train, keeps):
    """Training turns round after two epochs: with patience 2 it ends after four, with the parameters of the second."""
    observer = Interrupting()
    options = {"dropout": 0.0, "checkpoints": tmp_path if keeps else None}
    climbing = Optimizer(learning_rate=rise_and_fall(2))
    result = train(optimizer=climbing, epochs=9, patience=2, observer=observer, **options)
    assert [best for _, _, best in observer.epochs] == [True, True, False, False]
    assert result.monitor["step"] == 8 and result.timing["steps"] == 16
    short = train(optimizer=climbing, epochs=2, dropout=0.0)
    jax.tree.map(np.testing.assert_array_equal, arrays(result), arrays(short))
    assert result.metrics == short.metrics and result.history[: len(short.history)] == short.history
    assert (tmp_path / "8").exists() == keeps


def test_without_patience_all_epochs_run(train):
    observer = Interrupting()
    optimizer = Optimizer(learning_rate=rise_and_fall(1))
    result = train(optimizer=optimizer, epochs=5, patience=0, dropout=0.0, monitor="spend/rmse", observer=observer)
    assert len(observer.epochs) == 5
    values = [value for _, value, _ in observer.epochs]
    assert result.monitor == {"name": "spend/rmse", "value": min(values), "step": 4} and values[0] == min(values)


def test_dropout_is_for_training_only(train, data, make_model):
    """With frozen parameters the training loss shows dropout, predictions and validation do not."""
    frozen = Optimizer(optax.set_to_zero(), learning_rate=1.0)
    plain, dropped = (train(dropout=rate, optimizer=frozen, epochs=1) for rate in (0.0, 0.5))
    loss = lambda result: [row["value"] for row in result.history if row["name"] == "loss"]  # noqa: E731
    outputs = make_model(data.schema)(as_batch(data.train))
    scale = data.train.mask["spend"] * data.train.weight
    elements = (np.asarray(outputs["spend"]) - np.nan_to_num(data.train.labels["spend"])) ** 2
    assert loss(plain)[1] == pytest.approx((scale * elements).sum() / scale.sum(), rel=1e-5)
    assert loss(dropped)[1] != pytest.approx(loss(plain)[1], rel=1e-3)
    assert plain.metrics == dropped.metrics
    jax.tree.map(np.testing.assert_array_equal, plain.predict(data.valid), dropped.predict(data.valid))


def poisoned(data, field, row):
    """The data with a NaN feature, or with one label that float32 cannot square."""
    if field == "dense":
        dense = data.train.dense.copy()
        dense[row] = np.nan
        rows = dataclasses.replace(data.train, dense=dense)
    else:
        labels = {name: values.copy() for name, values in data.train.labels.items()}
        mask = {name: values.copy() for name, values in data.train.mask.items()}
        labels["spend"][row], mask["spend"][row] = 1e30, True
        rows = dataclasses.replace(data.train, labels=labels, mask=mask)
    return dataclasses.replace(data, train=rows)


def test_a_nonfinite_loss_stops_the_run(tmp_path, train, data):
    """The row is met in the third step: the message says so, and the checkpoint of the second one is whole."""
    row = epoch_order(50, 16, seed=0, epoch=0)[2, 5]
    spoilt = poisoned(data, "labels", row)
    message = rf"loss of \['spend'\] is not finite in step 3 \(epoch 1\).*checkpoint of step 2 in '{tmp_path}'.*skip"
    with pytest.raises(TrainingError, match=message):
        train(spoilt, checkpoints=tmp_path, checkpoint_seconds=0)
    assert Checkpoints(tmp_path).steps() == [1, 2]
    with pytest.raises(TrainingError, match="no checkpoint was written"):
        train(spoilt, steps_per_call=8)


def test_nonfinite_steps_can_be_skipped(train, data, undisturbed):
    row = epoch_order(50, 16, seed=0, epoch=0)[2, 5]
    result = train(poisoned(data, "dense", row), objective=Objective(nonfinite="skip"))
    assert result.diagnostics["skipped_steps"] == 3, "the row is met once an epoch"
    assert result.timing["steps"] == 12
    assert all(np.all(np.isfinite(array)) for array in arrays(result).values())
    assert all(row["value"] is not None for row in result.history if row["name"] == "loss")


class Sealed(Dataset):
    """A data set whose test part must not be touched."""

    def open_test(self):
        raise AssertionError("the test part was opened")

    def part(self, part):
        assert part != "test", "test rows were read"
        return super().part(part)


def test_the_test_part_stays_closed(make_model):
    """A run neither opens it nor depends on it."""
    whole = mtl_jax.data.load("synthetic", num_rows=200, dim=3)
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    options = {"epochs": 2, "batch_size": 64}
    results = [fit(make_model(whole.schema), data, **options) for data in (Sealed(**fields), whole.for_training())]
    assert_same_run(*results)


def test_single_task_is_separate_runs(train, data):
    """Private tables and towers, no clipping: each task trains as it would alone, dropout and lazy rows included."""
    together = arrays(train(sharing="single_task", balancer=fixed(weights=1.0), epochs=1))
    for name in data.schema.task_names:
        alone = dataclasses.replace(data, schema=data.schema.with_tasks([name]))
        separate = arrays(train(alone, sharing="single_task", balancer=fixed(weights=1.0), epochs=1))
        assert set(separate) == {path for path in together if f"task/{name}/" in path}
        for path, array in separate.items():
            np.testing.assert_allclose(array, together[path], rtol=1e-6, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("keeps", [True, False], ids=["checkpoints", "in memory"])
def test_staged_training_goes_on_from_the_best_epoch(tmp_path, train, keeps):
    """Shared parameters are those of the best joint epoch; each task's own are at its own best, never worse than there."""
    options = {"optimizer": Optimizer(learning_rate=0.02), "dropout": 0.0, "epochs": 4, "balancer": fixed(weights=1.0)}
    joint = train(**options)
    staged = train(training="staged", checkpoints=tmp_path if keeps else None, **options)
    assert staged.timing["steps"] == 2 * joint.timing["steps"] == 32
    own = [path for path in arrays(joint) if path.startswith("task/")]
    for path, array in arrays(staged).items():
        same = np.array_equal(array, arrays(joint)[path])
        assert same or path in own, path
    assert staged.history[: len(joint.history)] == joint.history
    rows = [row for row in staged.history if row["part"] == "valid" and row["task"]]
    for task, metric, best in (("click", "auc", max), ("spend", "rmse", min)):
        chosen = staged.monitor["tasks"][task]
        of_stage = [row["value"] for row in rows if (row["task"], row["name"]) == (task, metric) and row["step"] > 16]
        assert chosen["value"] == best([joint.metrics["valid"][task][metric], *of_stage])
        assert staged.metrics["valid"][task][metric] == pytest.approx(chosen["value"], rel=1e-6)
        assert chosen["name"] == f"{task}/{metric}"
        assert chosen["step"] == joint.monitor["step"] or 16 < chosen["step"] <= 32
    assert any(chosen["step"] > 16 for chosen in staged.monitor["tasks"].values()), "some task gained from its stage"
    assert len([row for row in staged.history if row["name"] == "weight"]) == 2 * 4, "no balancing in the second stage"


def test_each_task_stops_by_its_own_monitor(train):
    """Rates turn round after two epochs of each stage: both stages end early, each task with what it had before."""
    turning = Optimizer(learning_rate=rise_and_fall(2))
    observer = Interrupting()
    result = train(training="staged", optimizer=turning, dropout=0.0, epochs=9, patience=2, observer=observer)
    assert observer.begun == (2 * 9 * 4, 0)
    assert result.timing["steps"] < 2 * 9 * 4
    rows = [row for row in result.history if row["part"] == "valid" and row["step"] > 16]
    assert len({row["step"] for row in rows}) < 9
    for task, metric, sign in (("click", "auc", 1), ("spend", "rmse", -1)):
        chosen = result.monitor["tasks"][task]
        curve = [(r["step"], sign * r["value"]) for r in rows if (r["task"], r["name"]) == (task, metric)]
        after = [value for step, value in curve if step > chosen["step"]][:2]
        assert len(after) == 2 and max(after) <= sign * chosen["value"], "two evaluations without a better one"


@pytest.mark.parametrize("at", [5, pytest.param(14, marks=pytest.mark.slow)])
def test_staged_runs_resume(tmp_path, train, at):
    """Interrupted in the joint stage, or in the second one: the same bits at the end."""
    options = {"training": "staged", "epochs": 2, "average": 0.9}
    whole = train(**options)
    with pytest.raises(KeyboardInterrupt):
        train(observer=Interrupting(at), checkpoints=tmp_path, checkpoint_seconds=0, **options)
    observer = Interrupting()
    resumed = train(observer=observer, checkpoints=tmp_path, checkpoint_seconds=0, **options)
    assert observer.begun == (16, at - 1)
    assert_same_run(resumed, whole)
    assert Checkpoints(tmp_path).steps() == [15, 16], "the second stage needs none of the first"


class Scaled(Tower):
    """A tower with an array of its own that no optimizer touches."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.scale = nnx.Variable(jnp.asarray(2.0))

    def __call__(self, z, context=Context()):
        return super().__call__(z, context) / self.scale[...]


def test_staged_runs_resume_with_arrays_that_are_not_trained(tmp_path, data):
    model = MultiTaskModel(
        data.schema, encoder=functools.partial(Encoder, embedding_dim=3),
        sharing=functools.partial(SharedBottom, units=(5,)), towers=functools.partial(Scaled, units=()),
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    options = {"training": "staged", "epochs": 1, "batch_size": 16, "steps_per_call": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(model, data, observer=Interrupting(7), checkpoints=tmp_path, checkpoint_seconds=0, **options)
    assert_same_run(fit(model, data, checkpoints=tmp_path, **options), fit(model, data, **options))


def test_a_second_stage_needs_staged_training(tmp_path, train):
    train(training="staged", epochs=1, checkpoints=tmp_path)
    message = r"stand in stage 2 of training; expected a run of 1. Go back to training=staged"
    with pytest.raises(RunFolderError, match=message):
        train(epochs=1, checkpoints=tmp_path)


def test_the_average_is_what_is_selected(train, data):
    """Predictions are those of averaged parameters, and differ from those of the last ones."""
    plain, averaged = train(epochs=2), train(epochs=2, average=0.9)
    losses = [[row["value"] for row in result.history if row["name"] == "loss"] for result in (plain, averaged)]
    assert losses[0] == losses[1], "training itself is the same"
    assert plain.metrics != averaged.metrics
    assert evaluate(data.schema.tasks, averaged.predict(data.valid), data.valid)[0] == averaged.metrics["valid"]


def test_micro_batches_and_half_precision_train(train):
    """Both come near the plain run; a batch of 16 in three parts is padded to 18 rows."""
    plain, parts = train(dropout=0.0), train(dropout=0.0, micro_batches=3)
    for path, array in arrays(plain).items():
        np.testing.assert_allclose(arrays(parts)[path], array, rtol=1e-3, atol=1e-4)
    half = train(dropout=0.0, precision="bfloat16")
    assert half.monitor["value"] == pytest.approx(plain.monitor["value"], abs=0.05)
    assert half.metrics != plain.metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"training": "alternating"}, r"training is 'alternating'; expected one of \['joint', 'staged'\]"),
        ({"micro_batches": 0}, "trainer.micro_batches is 0; expected a number >= 1"),
        ({"micro_batches": 17}, "trainer.micro_batches is 17 for batches of 16 rows; expected at most one a row"),
        ({"devices": 99}, "parallel.devices is 99; expected a number from 1 to"),
        ({"epochs": 0}, "trainer.epochs is 0; expected a number >= 1"),
        ({"batch_size": 0}, "trainer.batch_size is 0"),
        ({"patience": -1}, "trainer.patience is -1"),
        ({"steps_per_call": 0}, "trainer.steps_per_call is 0"),
        ({"checkpoint_seconds": float("nan")}, "trainer.checkpoint_seconds is nan"),
        ({"monitor": "spend/auc"}, "trainer.monitor is 'spend/auc'; expected one of"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"table_updates": "lazy"}, "'lazy'.*expected auto, dense or sparse"),
        ({"table_updates": {"shop": "dense"}}, "names 'shop'"),
        ({"sharing": "single_task"}, "balancing 'PCGrad'.*the model has none"),
        ({"balancer": fixed(weights=[1.0, 2.0, 3.0])}, "fixed"),
        ({"parallel": "magic"}, "parallel is 'magic'"),
    ],
)
def test_wrong_options_are_refused(train, options, message):
    with pytest.raises(ConfigError, match=message):
        train(**options)
