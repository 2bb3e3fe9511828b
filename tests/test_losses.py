"""Losses against worked values, float64 reference formulas and finite differences, and the rule of masks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

SKEWED = (0.6, 0.25, 0.15)


def sampled(draws, **options):
    return lambda a, y: losses.sampled_softmax_from(a, y, jnp.array(draws), jnp.array(SKEWED), **options)


WORKED = [
    pytest.param(losses.bce, 2.0, 1, 0.12692801, id="bce, positive"),
    pytest.param(losses.bce, 2.0, 0, 2.12692801, id="bce, negative"),
    pytest.param(losses.bce, 2.0, 0.3, 1.52692801, id="bce, soft label"),
    pytest.param(losses.softmax, (2.0, 0.0, -1.0), 0, 0.16984602, id="softmax, likely class"),
    pytest.param(losses.softmax, (2.0, 0.0, -1.0), 2, 3.16984602, id="softmax, unlikely class"),
    pytest.param(
        lambda a, y: losses.softmax(a, y, smoothing=0.1), (2.0, 0.0, -1.0), 0, 0.33651269, id="softmax, smoothed"
    ),
    pytest.param(sampled([1, 2]), (1.0, 0.0, -1.0), 0, 0.78247427, id="sampled softmax"),
    pytest.param(sampled([0, 2]), (1.0, 0.0, -1.0), 0, 0.37233403, id="sampled softmax drops the label's draw"),
    pytest.param(
        sampled([1, 2], correct_positive=True),
        (1.0, 0.0, -1.0),
        0,
        0.88552294,
        id="sampled softmax, corrected positive",
    ),
    pytest.param(losses.huber, 0.5, 0, 0.125, id="huber inside"),
    pytest.param(losses.huber, -3.0, 0, 2.5, id="huber outside"),
    pytest.param(losses.squared, -3.0, 1, 16.0, id="squared has no factor ½"),
]


@pytest.mark.parametrize(("loss", "output", "label", "expected"), WORKED)
def test_worked_values(loss, output, label, expected):
    found = jax.jit(loss)(np.float32([output]), np.array([label]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6, atol=1e-7)


def logsumexp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def reference_softmax(a, y, smoothing=0.0):
    return logsumexp(a) - (1 - smoothing) * a[y] - smoothing * sum(a) / len(a)


def reference_sampled(a, y, draws):
    corrected = [a[c] - math.log(len(draws) * SKEWED[c]) for c in draws if c != y]
    return logsumexp([a[y], *corrected]) - a[y]


def reference_huber(a, y, delta):
    r = abs(a - y)
    return r * r / 2 if r <= delta else delta * (r - delta / 2)


REFERENCES = {
    "bce": (losses.bce, lambda a, y: math.log1p(math.exp(a)) - y * a),
    "weighted bce": (
        lambda a, y: losses.bce(a, y, positive_weight=3.0),
        lambda a, y: (3 * y + (1 - y)) * math.log1p(math.exp(-a if y else a)),
    ),
    "softmax": (losses.softmax, reference_softmax),
    "smoothed softmax": (
        lambda a, y: losses.softmax(a, y, smoothing=0.2),
        lambda a, y: reference_softmax(a, y, 0.2),
    ),
    "sampled softmax": (sampled([2, 0, 1, 1]), lambda a, y: reference_sampled(a, y, [2, 0, 1, 1])),
    "squared": (losses.squared, lambda a, y: (a - y) ** 2),
    "huber": (lambda a, y: losses.huber(a, y, delta=0.7), lambda a, y: reference_huber(a, y, 0.7)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_values_and_gradients_in_float64(name, assert_loss_matches):
    loss, reference = REFERENCES[name]
    rng = np.random.default_rng(0)
    classes = 3 if "softmax" in name else 0
    outputs = rng.normal(scale=2, size=(12, classes) if classes else 12)
    labels = rng.integers(0, classes or 2, size=12)
    assert_loss_matches(loss, reference, outputs, labels)


@pytest.mark.parametrize("name", REFERENCES)
def test_finite_in_float32_far_out(name):
    """Values and gradients at |a| of 0, 1e-30 and 1e4; far out on the wrong side the loss is as large as the logit."""
    loss, _ = REFERENCES[name]
    points = jnp.array([0.0, 1e-30, -1e-30, 1e4, -1e4])
    outputs = jnp.stack([points, -points, 0 * points], axis=1) if "softmax" in name else points
    labels = jnp.ones(5, jnp.int32)
    values, pull = jax.vjp(lambda a: loss(a, labels), outputs)
    assert np.isfinite(values).all() and np.isfinite(pull(jnp.ones_like(values))[0]).all()
    assert float(values.max()) > 6e3


def test_bce_is_smooth_everywhere():
    """The first derivative is σ(a) - y and the second σ(1 - σ), also at a = 0 and far out."""
    points = jnp.array([-1e4, -30.0, 0.0, 30.0, 1e4])
    sigma = 1 / (1 + np.exp(-np.clip(np.asarray(points, np.float64), -700, 700)))
    first = jax.vmap(jax.grad(losses.bce), in_axes=(0, None))(points, jnp.float32(1))
    second = jax.vmap(jax.grad(jax.grad(losses.bce)), in_axes=(0, None))(points, jnp.float32(1))
    np.testing.assert_allclose(first, sigma - 1, atol=1e-7)
    np.testing.assert_allclose(second, sigma * (1 - sigma), atol=1e-7)
    np.testing.assert_array_equal(losses.bce(jnp.array([1e4, -1e4]), jnp.ones(2)), [0, 1e4])


def test_huber_far_out():
    """At r = 1e15 the gradient is the threshold, and inside it the loss is half the squared error."""
    assert jax.grad(losses.huber)(jnp.float32(1e15), jnp.float32(0)) == 1
    inside = jnp.linspace(-0.9, 0.9, 5)
    np.testing.assert_allclose(2 * losses.huber(inside, 0 * inside), losses.squared(inside, 0 * inside), rtol=1e-6)


def test_best_constants():
    """The mean minimises squared; with a small threshold the median minimises huber."""
    targets = jnp.array([0.0, 1.0, 2.0, 3.0, 14.0])
    grid = jnp.arange(0, 14.01, 0.25)
    of_mean = jax.vmap(lambda c: losses.squared(jnp.full(5, c), targets).sum())(grid)
    of_median = jax.vmap(lambda c: losses.huber(jnp.full(5, c), targets, delta=1e-3).sum())(grid)
    assert grid[of_mean.argmin()] == 4
    assert grid[of_median.argmin()] == 2


def test_positive_weight_is_a_row_weight_of_the_positives():
    outputs, labels = jnp.array([0.3, -1.2, 2.0, 0.1]), jnp.array([1, 0, 0, 1])
    weighted = losses.bce(outputs, labels, positive_weight=2.0)
    np.testing.assert_allclose(weighted, jnp.where(labels == 1, 2, 1) * losses.bce(outputs, labels), rtol=1e-6)


def test_softmax_identities():
    rng = np.random.default_rng(1)
    a, y = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.asarray(rng.integers(0, 4, 6))
    np.testing.assert_allclose(losses.softmax(a + 1000, y), losses.softmax(a, y), atol=2e-4)
    gradient = jax.grad(lambda a: losses.softmax(a, y, smoothing=0.1).sum())(a)
    np.testing.assert_allclose(gradient.sum(axis=1), np.zeros(6), atol=1e-6)
    np.testing.assert_allclose(losses.softmax(a[:, :2], y % 2), losses.bce(a[:, 1] - a[:, 0], y % 2), rtol=1e-5)
    exact = jnp.array([[2.0, 0.0, -1.0]])
    np.testing.assert_allclose(losses.softmax(exact + 1000, jnp.array([0])), [0.16984602], rtol=1e-6)


def test_sampled_partition_function_is_unbiased():
    """Summed over the nine pairs of draws with their probabilities, Σe^ã is Σe^a, for a label that may be drawn too."""
    a = (1.0, 0.0, -1.0)
    expected = 0.0
    for first in range(3):
        for second in range(3):
            loss = sampled([first, second])(jnp.array([a]), jnp.array([0]))[0]
            expected += SKEWED[first] * SKEWED[second] * math.exp(float(loss) + a[0])
    assert expected == pytest.approx(4.08616127, rel=1e-6)
    assert expected == pytest.approx(sum(map(math.exp, a)), rel=1e-6)


@pytest.mark.parametrize(
    ("probabilities", "draws"), [((1 / 3, 1 / 3, 1 / 3), (0, 1, 2)), ((0.5, 0.25, 0.25), (2, 0, 1, 0))]
)
def test_draws_in_exact_proportion_give_the_full_softmax(probabilities, draws):
    a, y = jnp.array([[1.0, 0.0, -1.0], [0.2, 3.0, 0.1]]), jnp.array([0, 2])
    some = losses.sampled_softmax_from(a, y, jnp.array(draws), jnp.array(probabilities))
    np.testing.assert_allclose(some, losses.softmax(a, y), rtol=1e-6)


def test_drawn_classes_follow_the_proposal():
    """Many draws approach the full softmax, and a class of probability 0 is never drawn, however large its logit."""
    a, y = jnp.array([[1.0, 0.0, -1.0, 1e3]]), jnp.array([1])
    many = losses.sampled_softmax(
        a, y, key=jax.random.key(0), num_sampled=20_000, probabilities=jnp.array([*SKEWED, 0.0])
    )
    np.testing.assert_allclose(many, losses.softmax(a[:, :3], y), rtol=2e-2)


TASKS = {
    "bce": Task("t", "binary", positive_weight=2.0),
    "softmax": Task("t", "multiclass", classes=("a", "b", "c"), smoothing=0.1),
    "sampled_softmax": Task(
        "t", "multiclass", classes=("a", "b", "c"), frequencies=SKEWED, loss="sampled_softmax", num_sampled=2
    ),
    "squared": Task("t", "regression"),
    "huber": Task("t", "regression", loss="huber", delta=0.5),
}


def direct(task, outputs, labels, key):
    """What the task declares, spelled out."""
    calls = {
        "bce": lambda: losses.bce(outputs, labels, positive_weight=2.0),
        "softmax": lambda: losses.softmax(outputs, labels, smoothing=0.1),
        "sampled_softmax": lambda: losses.sampled_softmax(
            outputs, labels, key=key, num_sampled=2, probabilities=jnp.array(SKEWED)
        ),
        "squared": lambda: losses.squared(outputs, labels),
        "huber": lambda: losses.huber(outputs, labels, delta=0.5),
    }
    return calls[task.loss]()


@pytest.mark.parametrize("name", TASKS)
def test_what_stands_under_the_mask_changes_nothing(name):
    """NaN (or -1 for class ids) under the mask: value and gradient are 0, and the other rows are the plain loss."""
    task, key = TASKS[name], jax.random.key(3)
    multiclass = task.kind == "multiclass"
    outputs = jnp.array([[0.3, -2.0, 1.0], [1.1, 0.4, -0.2], [-0.7, 0.0, 0.5]])
    outputs = outputs if multiclass else outputs[:, :1]
    plain = jnp.array([1, 0, 1])
    hidden = jnp.array([1, -1, 1]) if multiclass else jnp.array([1.0, jnp.nan, 1.0])
    mask = jnp.array([True, False, True])

    value, pull = jax.vjp(lambda a: losses.element_losses(task, a, hidden, mask, key=key), outputs)
    expected, plain_pull = jax.vjp(lambda a: direct(task, a if multiclass else a[:, 0], plain, key) * mask, outputs)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(pull(jnp.ones(3))[0], plain_pull(jnp.ones(3))[0])
    assert value[1] == 0 and value.dtype == jnp.float32 and (value[jnp.array([0, 2])] > 0).all()


def test_a_hidden_class_of_frequency_zero_leaves_the_gradient_finite():
    task = Task("t", "multiclass", classes=("a", "b"), frequencies=(0.0, 1.0), loss="sampled_softmax", num_sampled=2)
    gradient = jax.grad(
        lambda a: losses.element_losses(
            task, a, jnp.array([-1, 1]), jnp.array([False, True]), key=jax.random.key(0)
        ).sum()
    )(jnp.zeros((2, 2)))
    assert np.isfinite(gradient).all()
    corrected = losses.sampled_softmax_from(
        jnp.zeros((1, 2)), jnp.array([0]), jnp.array([1, 1]), jnp.array([0.0, 1.0]), correct_positive=True
    )
    assert np.isfinite(corrected).all()


def test_sampled_softmax_is_scored_over_all_classes_without_a_key():
    outputs, labels = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0])
    scored = losses.element_losses(TASKS["sampled_softmax"], outputs, labels, jnp.array([True]))
    np.testing.assert_allclose(scored, [0.16984602], rtol=1e-6)


def test_sampled_softmax_needs_frequencies():
    unfitted = Task("t", "multiclass", classes=("a", "b"), loss="sampled_softmax", num_sampled=1)
    with pytest.raises(ConfigError, match="'t' has no class frequencies"):
        losses.element_losses(unfitted, jnp.zeros((1, 2)), jnp.array([0]), jnp.array([True]), key=jax.random.key(0))


@pytest.mark.parametrize("name", ["bce", "softmax", "huber"])
def test_low_precision_outputs_give_float32_losses(name):
    """bfloat16 outputs are widened before the loss, so it equals the float32 loss of the rounded outputs."""
    loss, _ = REFERENCES[name]
    outputs = jnp.array([[0.3, -2.0], [1.1, 0.4]] if name == "softmax" else [0.3, -2.0], jnp.bfloat16)
    labels = jnp.array([1, 0])
    values = loss(outputs, labels)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, loss(outputs.astype(jnp.float32), labels))


def test_jit_and_vmap_agree_with_eager():
    task, mask = TASKS["softmax"], jnp.array([[True, False], [True, True]])
    outputs = jnp.arange(12.0).reshape(2, 2, 3) / 7
    labels = jnp.array([[0, -1], [2, 1]])
    mapped = jax.jit(jax.vmap(lambda a, y, m: losses.element_losses(task, a, y, m)))(outputs, labels, mask)
    eager = [losses.element_losses(task, *row) for row in zip(outputs, labels, mask, strict=True)]
    np.testing.assert_allclose(mapped, eager, rtol=1e-6)
