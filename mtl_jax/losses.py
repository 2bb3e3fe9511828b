"""Element-wise losses, and the one that a task declares.

Every function keeps the shape of its labels and reduces nothing. Outputs may have any float dtype; the loss is computed
in float32 (in float64 for float64 outputs). No probability is formed and then logged, and none is clipped.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

LEAST_DISTANCE = 1e-4
"""Between two cutpoints."""
LEAST_SCALE = 1e-2
LINEAR_FROM = 20.0
"""Log mean from which :func:`exp_plus` goes on along its tangent."""


def element_losses(
    task: Task,
    outputs: Float[Array, " batch *width"],
    labels: Shaped[Array, " batch *label"],
    mask: Bool[Array, " batch *label"],
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, " batch *label"]:
    """The task's own loss with its options, 0 where the label is unobserved.

    A label under the mask is replaced by a legal value before the loss and its loss by 0 after it, so whatever stands
    there (NaN, -1) changes neither the value nor the gradient.

    Args:
      task: Fitted task; names the loss and carries its options.
      outputs: Head outputs, [B] and the axes of ``Task.output_shape`` ([B, 1] for [B], and the reverse, are accepted).
      labels: [B], or [B, C] of a multilabel task; class ids for multiclass and ordinal tasks, standardised targets for
        regression, numbers >= 0 for count and zero_inflated.
      mask: True where the label is observed, like ``labels``, or [B] for all labels of a row.
      key: Draws the classes of ``sampled_softmax``; without it that task is scored over all classes, as in evaluation.

    Returns:
      f32 of the shape of ``labels`` (float64 for float64 outputs).

    Raises:
      ConfigError: ``sampled_softmax`` with a key and a task without fitted class frequencies.
    """
    if not task.output_shape and outputs.ndim == labels.ndim + 1:
        outputs = outputs.squeeze(-1)
    if task.kind == "multilabel":
        outputs = outputs.reshape(labels.shape)  # a tower of width 1 drops the axis
        mask = jnp.broadcast_to(mask if mask.ndim == labels.ndim else mask[..., None], labels.shape)
    labels = jnp.where(mask, labels, 0)
    match task.loss:
        case "bce":
            losses = bce(outputs, labels, positive_weight=task.positive_weight)
        case "softmax":
            losses = softmax(outputs, labels, smoothing=task.smoothing)
        case "sampled_softmax" if key is None:
            losses = softmax(outputs, labels)
        case "sampled_softmax":
            losses = sampled_softmax(
                outputs, labels, key=key, num_sampled=task.num_sampled, probabilities=_frequencies(task)
            )
        case "squared":
            losses = squared(outputs, labels)
        case "huber":
            losses = huber(outputs, labels, delta=task.delta)
        case "cumulative":
            losses = cumulative(outputs, labels)
        case "coral":
            losses = coral(outputs, labels)
        case "poisson":
            losses = poisson(outputs, labels)
        case "negative_binomial":
            losses = negative_binomial(outputs, labels)
        case "ziln":
            losses = ziln(outputs, labels)
    return jnp.where(mask, losses, 0)


def bce(
    outputs: Float[Array, "*shape"], labels: Shaped[Array, "*shape"], *, positive_weight: float = 1.0
) -> Float[Array, "*shape"]:
    r"""Binary cross-entropy from logits.

    .. math:: \ell = p\, y\, \mathrm{softplus}(-a) + (1 - y)\, \mathrm{softplus}(a),
        \qquad \partial\ell/\partial a = \sigma(a) - y \text{ for } p = 1

    Args:
      outputs: Logits a.
      labels: 0 or 1, or soft labels in [0, 1].
      positive_weight: p > 0. Other values than 1 shift the calibration of the predictions.

    Edge cases:
      ================ ========================================================
      a = ±1e4         0 or 1e4, with finite first and second derivatives
      a = 0            log 2; the second derivative is ¼
      soft label y = ½ least at a = 0, where it is log 2
      ================ ========================================================
    """
    a, y = _floats(outputs, labels)
    # jax.nn.softplus rather than max(a, 0) + log1p(exp(-|a|)): the latter has second derivative 0 at a = 0.
    return positive_weight * y * jax.nn.softplus(-a) + (1 - y) * jax.nn.softplus(a)


def softmax(
    outputs: Float[Array, "*shape classes"], labels: Int[Array, "*shape"], *, smoothing: float = 0.0
) -> Float[Array, "*shape"]:
    r"""Cross-entropy over all classes, with label smoothing.

    .. math:: \ell = \mathrm{LSE}(a) - \sum_c q_c a_c, \qquad q = (1 - \epsilon)\,\mathrm{onehot}(y) + \epsilon / C

    Args:
      outputs: Logits a, classes last.
      labels: Class ids in [0, C).
      smoothing: ε in [0, 1).

    References:
      Label smoothing: Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, *Rethinking the Inception Architecture*, CVPR 2016.
    """
    log_probabilities = jax.nn.log_softmax(_float(outputs), axis=-1)
    of_label = _pick(log_probabilities, labels)
    return -(1 - smoothing) * of_label - smoothing * log_probabilities.mean(axis=-1)


def sampled_softmax(
    outputs: Float[Array, "*shape classes"],
    labels: Int[Array, "*shape"],
    *,
    key: PRNGKeyArray,
    num_sampled: int,
    probabilities: Float[Array, " classes"],
    correct_positive: bool = False,
) -> Float[Array, "*shape"]:
    """Cross-entropy over the label and a few drawn classes: :func:`sampled_softmax_from` with its draws.

    Args:
      outputs: Logits, classes last.
      labels: Class ids in [0, C).
      key: Draws ``num_sampled`` classes with replacement, once for the whole batch.
      num_sampled: n >= 1.
      probabilities: Q, the proposal, summing to 1.
      correct_positive: See :func:`sampled_softmax_from`.
    """
    probabilities = jnp.asarray(probabilities)
    draws = jax.random.choice(key, probabilities.shape[0], (num_sampled,), p=probabilities)
    return sampled_softmax_from(outputs, labels, draws, probabilities, correct_positive=correct_positive)


def sampled_softmax_from(
    outputs: Float[Array, "*shape classes"],
    labels: Int[Array, "*shape"],
    draws: Int[Array, " sampled"],
    probabilities: Float[Array, " classes"],
    *,
    correct_positive: bool = False,
) -> Float[Array, "*shape"]:
    r"""Sampled softmax with the log-Q correction, given the draws S.

    .. math::
        \tilde a_y = a_y, \quad \tilde a_c = a_c - \log(n\,Q(c)) \;\; (c \in S,\, c \ne y), \qquad
        \ell = \mathrm{LSE}(\{\tilde a_y\} \cup \{\tilde a_c\}) - \tilde a_y

    Draws equal to the label are dropped. Then :math:`E_S \sum e^{\tilde a} = \sum_c e^{a_c}` exactly, and the loss
    tends to the full softmax as n grows; at finite n it is biased low.

    Args:
      outputs: Logits a, classes last.
      labels: Class ids y in [0, C).
      draws: The n drawn classes, shared by the batch.
      probabilities: Q, from which they were drawn.
      correct_positive: Also subtracts log(n Q(y)) from the label's logit, as TensorFlow's ``sampled_softmax_loss`` and
        in-batch retrieval training do. With draws with replacement that form does not tend to the full softmax.

    References:
      Bengio, Senécal, *Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language Model*,
      IEEE TNN 2008; Yi et al., *Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations*,
      RecSys 2019 (the form of ``correct_positive``).
    """
    a = _float(outputs)
    probabilities = jnp.asarray(probabilities, a.dtype)
    # A class of probability 0 is never drawn but may be a label; the floor keeps its correction finite.
    log_expected = jnp.log(draws.shape[0] * jnp.maximum(probabilities, jnp.finfo(a.dtype).tiny))
    positive = _pick(a, labels)
    if correct_positive:
        positive = positive - log_expected[labels]
    negatives = jnp.where(draws == labels[..., None], -jnp.inf, a[..., draws] - log_expected[draws])
    logits = jnp.concatenate([positive[..., None], negatives], axis=-1)
    return -jax.nn.log_softmax(logits, axis=-1)[..., 0]


def squared(outputs: Float[Array, "*shape"], labels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Squared error ``(a - y)²``, without the factor ½. The best constant is the mean."""
    a, y = _floats(outputs, labels)
    return jnp.square(a - y)


def huber(
    outputs: Float[Array, "*shape"], labels: Shaped[Array, "*shape"], *, delta: float = 1.0
) -> Float[Array, "*shape"]:
    r"""Huber's loss: quadratic near zero, linear beyond ``delta``.

    .. math:: \ell = d\,(r - \tfrac12 d), \qquad r = a - y, \quad d = \mathrm{clip}(r, -\delta, \delta)

    that is ½r² inside and δ(\|r\| − ½δ) outside; the gradient is d everywhere.

    Args:
      outputs: Predictions a.
      labels: Targets y.
      delta: δ > 0, in units of the (standardised) target. As δ → 0 the best constant tends to the median.

    References:
      Huber, *Robust Estimation of a Location Parameter*, Annals of Mathematical Statistics 1964.
    """
    a, y = _floats(outputs, labels)
    residual = a - y
    clipped = jnp.clip(residual, -delta, delta)
    return clipped * (residual - clipped / 2)


def cumulative(outputs: Float[Array, "*shape cuts"], labels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Negative log-likelihood of the proportional odds model, from its cumulative logits.

    .. math:: P(y \ge j) = \sigma(a - b_j), \qquad
        \ell = -\log[\sigma(u) - \sigma(v)] = \mathrm{softplus}(-u) + \mathrm{softplus}(v) - \log(1 - e^{-(u - v)})

    with :math:`u = a - b_y` and :math:`v = a - b_{y+1}`; at the lowest class only the term of v is left, at the highest
    only that of u.

    Args:
      outputs: The C - 1 numbers a - b_j, falling along the last axis (see :class:`mtl_jax.nn.Cutpoints`).
      labels: Class ids in [0, C).

    Edge cases:
      =========== ==========================================================================
      C = 2       ``bce`` on a - b_1
      \|a\| large linear in a; u - v, which rounding may have made 0, is taken as 1e-4, the
                  least distance of two cutpoints
      =========== ==========================================================================

    References:
      McCullagh, *Regression Models for Ordinal Data*, Journal of the Royal Statistical Society B 1980.
    """
    a, y = _float(outputs), labels.astype(jnp.int32)
    cuts = a.shape[-1]
    u, v = _pick(a, jnp.maximum(y - 1, 0)), _pick(a, jnp.minimum(y, cuts - 1))
    losses = jnp.where(y > 0, jax.nn.softplus(-u), 0) + jnp.where(y < cuts, jax.nn.softplus(v), 0)
    distance = jnp.maximum(u - v, LEAST_DISTANCE)
    near = jnp.log(-jnp.expm1(-jnp.minimum(distance, 1.0)))
    log_share = jnp.where(distance < math.log(2), near, jnp.log1p(-jnp.exp(-distance)))
    return losses - jnp.where((y > 0) & (y < cuts), log_share, 0)


def coral(outputs: Float[Array, "*shape cuts"], labels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Sum of the binary cross-entropies of "at least class j", whose probabilities cannot cross.

    .. math:: \ell = \sum_{j=1}^{C-1} \mathrm{softplus}(a - b_j) - 1[y \ge j]\,(a - b_j)

    Args:
      outputs: The C - 1 numbers a - b_j, falling along the last axis.
      labels: Class ids in [0, C). With C = 2 this is ``bce``.

    References:
      Cao, Mirjalili, Raschka, *Rank Consistent Ordinal Regression for Neural Networks with Application to Age
      Estimation*, Pattern Recognition Letters 2020. There the biases are free; ours are ordered by construction.
    """
    a = _float(outputs)
    at_least = labels[..., None] > jnp.arange(a.shape[-1])
    return bce(a, at_least).sum(axis=-1)


def poisson(outputs: Float[Array, "*shape"], labels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Poisson negative log-likelihood without the constant log y!, so it may be negative.

    .. math:: \ell = \exp_+(a) - y\,a

    Args:
      outputs: Log means a; the mean is :func:`exp_plus` of it.
      labels: y >= 0, whole or not.
    """
    a, y = _floats(outputs, labels)
    return exp_plus(a) - y * a


def negative_binomial(outputs: Float[Array, "*shape 2"], labels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Negative log-likelihood of counts with mean μ = e^a and variance μ + μ²/r.

    .. math:: \ell = \log\Gamma(r) - \log\Gamma(y + r) + \log\Gamma(y + 1)
        + r\,\mathrm{softplus}(a - \log r) + y\,\mathrm{softplus}(\log r - a)

    Args:
      outputs: Log mean a and log size log r = -log α (see :class:`mtl_jax.nn.Dispersion`).
      labels: y >= 0.

    Edge cases:
      =========== =======================================================================
      r → ∞       the Poisson likelihood; differences of log Γ cost digits (1e-3 in f32)
      a large     linear in a
      =========== =======================================================================
    """
    a, y = _floats(outputs[..., 0], labels)
    log_size = outputs[..., 1].astype(a.dtype)
    size = jnp.exp(log_size)
    constant = jax.lax.lgamma(size) - jax.lax.lgamma(y + size) + jax.lax.lgamma(y + 1)
    return constant + size * jax.nn.softplus(a - log_size) + y * jax.nn.softplus(log_size - a)


def ziln(outputs: Float[Array, "*shape 3"], labels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""Negative log-likelihood of an amount that is 0 or log-normal.

    .. math:: \ell = \mathrm{softplus}(a_0) - 1[y > 0]\,a_0 + 1[y > 0] \Big( \log y + \log\varsigma
        + \tfrac12 \log 2\pi + \frac{(\log y - a_1)^2}{2\varsigma^2} \Big), \qquad
        \varsigma = 10^{-2} + \mathrm{softplus}(a_2)

    Args:
      outputs: Logit of y > 0, and mean and raw scale of log y; the expected amount is
        :math:`\sigma(a_0) \exp_+(a_1 + \varsigma^2/2)`.
      labels: Amounts y >= 0 in their unit, not logarithms. At y = 0 the gradient by a_1 and a_2 is 0.

    References:
      Wang, Liu, Miao, *A Deep Probabilistic Model for Customer Lifetime Value Prediction*, 2019, arXiv:1912.07753.
    """
    a, y = _floats(outputs, labels)
    positive = y > 0
    log_amount = jnp.log(jnp.where(positive, y, 1))
    scale = LEAST_SCALE + jax.nn.softplus(a[..., 2])
    square = jnp.square((log_amount - a[..., 1]) / scale) / 2
    amount = log_amount + jnp.log(scale) + math.log(2 * math.pi) / 2 + square
    return bce(a[..., 0], positive) + jnp.where(positive, amount, 0)


def exp_plus(a: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """e^a up to a = 20, its tangent beyond: convex, with a continuous derivative, and finite where exp overflows."""
    return jnp.exp(jnp.minimum(a, LINEAR_FROM)) * (1 + jnp.maximum(a - LINEAR_FROM, 0))


def _frequencies(task: Task) -> Float[Array, " classes"]:
    if task.frequencies is None:
        raise ConfigError(
            f"task '{task.name}' has no class frequencies for 'sampled_softmax'; expected a task of a fitted schema. "
            "Fit the schema on the training rows or set Task.frequencies"
        )
    return jnp.asarray(task.frequencies)


def _pick(values: Float[Array, "*shape classes"], labels: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.take_along_axis(values, labels.astype(jnp.int32)[..., None], axis=-1)[..., 0]


def _float(outputs):
    return outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))


def _floats(outputs, labels):
    a = _float(outputs)
    return a, labels.astype(a.dtype)
