"""Losses of ordinal, count, zero-inflated and multilabel tasks: worked values, densities, references, and the mask."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mtl_jax import losses
from mtl_jax.nn import Cutpoints
from mtl_jax.tasks import Task

LOG_2, LOG_6 = math.log(2), math.log(6)


def raw(scale):
    """a_2 of ziln for this scale, which is 1e-2 + softplus(a_2)."""
    return math.log(math.expm1(scale - 1e-2))


def cumulative(score, *cutpoints):
    return tuple(score - b for b in cutpoints)


WORKED = [
    pytest.param(losses.cumulative, cumulative(0.3, -1, 0.5), 0, -math.log(0.21416502), id="cumulative, lowest"),
    pytest.param(losses.cumulative, cumulative(0.3, -1, 0.5), 1, 1.09162978, id="cumulative, middle"),
    pytest.param(losses.cumulative, cumulative(0.3, -1, 0.5), 2, -math.log(0.45016600), id="cumulative, highest"),
    pytest.param(losses.coral, cumulative(0.3, -1, 0.5), 1, 0.83914732, id="coral"),
    pytest.param(losses.poisson, 0.5, 3, 0.14872127, id="poisson"),
    pytest.param(lambda a, y: losses.poisson(a, y) + LOG_6, 0.5, 3, 1.94048074, id="poisson with log y!"),
    pytest.param(losses.negative_binomial, (0.5, LOG_2), 3, 2.19929512, id="negative binomial"),
    pytest.param(losses.ziln, (0, 1, raw(1)), 0.0, LOG_2, id="ziln, nothing spent"),
    pytest.param(losses.ziln, (0, 1, raw(1)), math.e, 2.61208571, id="ziln, e spent"),
    pytest.param(losses.ziln, (0.5, 0, raw(0.8)), 2.0, 2.23837306, id="ziln, 2 spent"),
    pytest.param(losses.ziln, (0.5, 0, raw(0.8)), 0.0, 0.97407698, id="ziln, zero"),
]


@pytest.mark.parametrize(("loss", "output", "label", "expected"), WORKED)
def test_worked_values(loss, output, label, expected):
    """To 1e-6 in float32; in float64 as far as the values are printed."""
    compiled = jax.jit(loss)
    found = compiled(np.float32([output]), np.array([label]))
    np.testing.assert_allclose(found, [expected], rtol=1e-6, atol=1e-7)
    with jax.enable_x64(True):
        value = compiled(np.float64([output]), np.array([label]))
    assert value.dtype == jnp.float64
    np.testing.assert_allclose(value, [expected], rtol=1e-8, atol=1e-8)


def sigmoid(a):
    return 1 / (1 + math.exp(-a))


def reference_cumulative(a, y):
    at_least = [1.0, *map(sigmoid, a), 0.0]
    return -math.log(at_least[y] - at_least[y + 1])


def reference_coral(a, y):
    return -sum(math.log(sigmoid(u) if y > j else sigmoid(-u)) for j, u in enumerate(a))


def reference_negative_binomial(a, y):
    mean, size = math.exp(a[0]), math.exp(a[1])
    return -scipy.stats.nbinom.logpmf(y, size, size / (size + mean))


def reference_ziln(a, y):
    scale = 1e-2 + math.log1p(math.exp(a[2]))
    positive = sigmoid(a[0])
    if y == 0:
        return -math.log(1 - positive)
    return -math.log(positive) - scipy.stats.lognorm.logpdf(y, scale, scale=math.exp(a[1]))


REFERENCES = {
    "cumulative": (losses.cumulative, reference_cumulative, 3),
    "coral": (losses.coral, reference_coral, 3),
    "poisson": (losses.poisson, lambda a, y: math.exp(a) - y * a, None),
    "negative_binomial": (losses.negative_binomial, reference_negative_binomial, 2),
    "ziln": (losses.ziln, reference_ziln, 3),
}


def random_outputs(name, num_rows, seed=0):
    rng = np.random.default_rng(seed)
    width = REFERENCES[name][2]
    if name in ("cumulative", "coral"):  # one score and cutpoints in order
        return rng.normal(scale=2, size=(num_rows, 1)) - np.sort(rng.normal(scale=2, size=(num_rows, width)), axis=1)
    return rng.normal(size=(num_rows, width) if width else num_rows)


@pytest.mark.parametrize("name", REFERENCES)
def test_values_and_gradients_in_float64(name, assert_loss_matches):
    loss, reference, _ = REFERENCES[name]
    outputs, labels = random_outputs(name, 16), np.arange(16) % 4
    assert_loss_matches(loss, reference, outputs, labels)


def both(loss, outputs, labels):
    """Values, and the gradient of their sum."""
    values, pull = jax.vjp(lambda a: loss(a, labels), outputs)
    return values, pull(jnp.ones_like(values))[0]


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("label", [0, 1, 3])
def test_finite_in_float32_far_out(name, label):
    """Values and gradients at \\|a\\| of 0, 1e-30 and 1e4."""
    loss, _, width = REFERENCES[name]
    points = jnp.array([0.0, 1e-30, -1e-30, 1e4, -1e4, 100.0])
    outputs = points
    if name in ("cumulative", "coral"):
        outputs = points[:, None] - jnp.array([-1e-4, 0.0, 1.0])
    elif name == "negative_binomial":
        outputs = jnp.stack([points, 0 * points], axis=1)
    elif width:
        outputs = jnp.stack([jnp.roll(points, shift) for shift in range(width)], axis=1)
    values, gradient = jax.jit(lambda a: both(loss, a, jnp.full(6, label)))(outputs)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()
    assert float(values.max()) > 6e3


def test_two_ordered_classes_are_a_binary_task():
    outputs, labels = jnp.array([[0.4], [-1.3], [1e4]]), jnp.array([0, 1, 0])
    for loss in (losses.cumulative, losses.coral):
        np.testing.assert_allclose(loss(outputs, labels), losses.bce(outputs[:, 0], labels), rtol=1e-6)


def test_ordinal_probabilities_sum_to_one():
    for score in (-3.0, 0.3, 40.0):
        outputs = jnp.tile(jnp.array(cumulative(score, -1.0, 0.5, 0.6)), (4, 1))
        assert jnp.exp(-losses.cumulative(outputs, jnp.arange(4))).sum() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(("mean", "alpha"), [(0.4, 1.0), (3.0, 0.5), (3.0, 0.01)])
def test_negative_binomial_is_a_distribution_with_its_moments(mean, alpha):
    counts = jnp.arange(2000.0)
    outputs = jnp.tile(jnp.array([math.log(mean), -math.log(alpha)]), (2000, 1))
    with jax.enable_x64(True):
        p = np.exp(-np.asarray(losses.negative_binomial(outputs.astype(jnp.float64), counts)))
    y = np.arange(2000)
    assert p.sum() == pytest.approx(1, rel=1e-6)
    assert p @ y == pytest.approx(mean, rel=1e-6)
    assert p @ (y - mean) ** 2 == pytest.approx(mean + alpha * mean**2, rel=1e-6)


def test_negative_binomial_tends_to_poisson():
    """α = 1e-6 in float64; with α = 1e-3, the least of a model, float32 is within 1e-3 of float64."""
    counts = np.arange(12)
    with jax.enable_x64(True):
        log_factorial = np.array([math.lgamma(y + 1) for y in counts])
        wide = jnp.tile(jnp.array([0.7, math.log(1e6)]), (12, 1))
        poisson = losses.poisson(wide[:, 0], counts) + log_factorial
        np.testing.assert_allclose(losses.negative_binomial(wide, counts), poisson, rtol=1e-4)
        exact = losses.negative_binomial(wide.at[:, 1].set(math.log(1e3)), counts)
    single = losses.negative_binomial(jnp.tile(jnp.float32([0.7, math.log(1e3)]), (12, 1)), jnp.asarray(counts))
    np.testing.assert_allclose(single, exact, atol=1e-3)


def test_ziln_is_a_distribution_and_zeros_teach_no_amount():
    outputs = np.array([0.5, 0.3, raw(0.8)])
    with jax.enable_x64(True):
        log_amounts = np.linspace(-10, 10, 4001)
        density = np.exp(-losses.ziln(jnp.tile(jnp.asarray(outputs), (4001, 1)), np.exp(log_amounts)))
        at_zero = math.exp(-losses.ziln(jnp.asarray(outputs), jnp.float64(0)))
        assert np.trapezoid(density * np.exp(log_amounts), log_amounts) + at_zero == pytest.approx(1, rel=1e-8)
    gradient = jax.grad(losses.ziln)(jnp.asarray(outputs), jnp.float32(0))
    np.testing.assert_array_equal(gradient[1:], 0)
    assert gradient[0] > 0


def test_exp_plus_goes_on_along_its_tangent():
    a = jnp.array([-2.0, 19.9, 20.0, 25.0])
    np.testing.assert_allclose(losses.exp_plus(a)[:3], np.exp(np.float32(a[:3])), rtol=1e-6)
    assert losses.exp_plus(a)[3] == pytest.approx(math.exp(20) * 6, rel=1e-6)
    slopes = jax.vmap(jax.grad(losses.exp_plus))(jnp.array([20.0, 1e4]))
    np.testing.assert_allclose(slopes, math.exp(20), rtol=1e-6)


CLASSES = ("low", "middle", "high")
TASKS = {
    "cumulative": (Task("t", "ordinal", classes=CLASSES), [[1.0, -0.5], [0.2, -0.1], [3.0, 2.0]], -1),
    "coral": (Task("t", "ordinal", classes=CLASSES, loss="coral"), [[1.0, -0.5], [0.2, -0.1], [3.0, 2.0]], -1),
    "poisson": (Task("t", "count"), [0.3, 1.1, -0.7], math.nan),
    "negative_binomial": (
        Task("t", "count", loss="negative_binomial"),
        [[0.3, 0.0], [1.1, 0.5], [-0.7, 0.2]],
        math.nan,
    ),
    "ziln": (Task("t", "zero_inflated"), [[0.3, 1.0, 0.2], [0.1, 0.4, 0.3], [-0.7, 0.0, 0.5]], math.nan),
}


@pytest.mark.parametrize("name", TASKS)
def test_what_stands_under_the_mask_changes_nothing(name):
    """NaN (or -1 for class ids) under the mask: value and gradient are 0, and the other rows are the plain loss."""
    task, outputs, hidden = TASKS[name]
    outputs, mask = jnp.array(outputs), jnp.array([True, False, True])
    plain = getattr(losses, name)

    @jax.jit
    def masked_and_plain(outputs):
        masked = both(lambda a, y: losses.element_losses(task, a, y, mask), outputs, jnp.array([1, hidden, 2]))
        return masked, both(lambda a, y: plain(a, y) * mask, outputs, jnp.array([1, 1, 2]))

    (value, gradient), (expected, expected_gradient) = masked_and_plain(outputs)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert value.dtype == jnp.float32 and (np.abs(value[np.array([0, 2])]) > 0).all()


class TestMultilabel:
    task = Task("t", "multilabel", classes=CLASSES)
    outputs = jnp.array([[0.3, -2.0, 1.0], [1.1, 0.4, -0.2]])
    labels = jnp.array([[1, 0, 1], [0, 1, 1]])

    def test_fully_observed_it_is_the_binary_tasks_side_by_side(self):
        found = losses.element_losses(self.task, self.outputs, self.labels, jnp.ones((2, 3), bool))
        alone = [
            losses.element_losses(Task("b", "binary"), self.outputs[:, c], self.labels[:, c], jnp.ones(2, bool))
            for c in range(3)
        ]
        np.testing.assert_array_equal(found, jnp.stack(alone, axis=1))

    def test_hiding_a_label_deletes_its_cell(self):
        mask = jnp.array([[True, False, True], [True, True, True]])
        hidden = jnp.where(mask, self.labels, jnp.nan)
        loss = lambda a: losses.element_losses(self.task, a, hidden, mask)  # noqa: E731
        full = losses.element_losses(self.task, self.outputs, self.labels, jnp.ones((2, 3), bool))
        np.testing.assert_array_equal(loss(self.outputs), jnp.where(mask, full, 0))
        gradient = jax.grad(lambda a: loss(a).sum())(self.outputs)
        assert np.isfinite(gradient).all() and gradient[0, 1] == 0

    def test_a_row_mask_hides_all_labels_of_the_row(self):
        found = losses.element_losses(self.task, self.outputs, self.labels, jnp.array([True, False]))
        assert (found[0] > 0).all() and (found[1] == 0).all()

    def test_one_label_is_binary(self):
        one = Task("t", "multilabel", classes=("only",), positive_weight=2.0)
        found = losses.element_losses(one, self.outputs[:, 0], self.labels[:, :1], jnp.ones((2, 1), bool))
        np.testing.assert_array_equal(
            found[:, 0], losses.bce(self.outputs[:, 0], self.labels[:, 0], positive_weight=2.0)
        )


def test_low_precision_scores_give_float32_losses():
    scores = jnp.array([0.3, -2.0], jnp.bfloat16)
    outputs = Cutpoints((0.3, 0.4, 0.3))(scores)
    values = losses.element_losses(TASKS["cumulative"][0], outputs, jnp.array([1, 2]), jnp.ones(2, bool))
    assert values.dtype == jnp.float32


def test_jit_and_vmap_agree_with_eager():
    for task, outputs, _ in TASKS.values():
        outputs, labels = jnp.stack([jnp.array(outputs)] * 2), jnp.array([[0, 1, 2], [2, 0, 1]])
        mask = jnp.array([[True, False, True], [True, True, True]])
        mapped = jax.jit(jax.vmap(lambda a, y, m, t=task: losses.element_losses(t, a, y, m)))(outputs, labels, mask)
        eager = [losses.element_losses(task, *row) for row in zip(outputs, labels, mask, strict=True)]
        np.testing.assert_allclose(mapped, eager, rtol=1e-6)
