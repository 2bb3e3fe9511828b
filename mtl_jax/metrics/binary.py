"""Metrics of binary tasks: ranking quality, likelihood and calibration, in float64 over whole arrays.

Labels are 0/1, ``weights`` are row weights >= 0 (None: ones), and None is returned where a metric is not defined.
Ranking metrics take any score and read its order only; give them logits, because float32 probabilities saturate into
false ties.
"""

import dataclasses

import numpy as np

from mtl_jax.metrics.weighted import row_weights, weighted_mean

GAUC_WEIGHTINGS = ("impr", "pos", "pair", "user")


def auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    r"""Area under the ROC curve, exact with ties, in O(n log n).

    .. math:: \mathrm{AUC} = \frac{1}{W_+ W_-} \sum_{i \in +,\, j \in -} w_i w_j
        \left( 1[s_i > s_j] + \tfrac12\, 1[s_i = s_j] \right)

    Args:
      labels: [N] of 0/1.
      scores: [N], higher = more likely positive. ±inf is an ordinary value.
      weights: [N] row weights.

    Returns:
      A value in [0, 1], or None where one class has no weight.

    Raises:
      ValueError: NaN scores, or shapes that differ.

    Example:
      >>> from mtl_jax.metrics import auc
      >>> round(auc([1, 0, 1, 0, 1, 0], [0.9, 0.5, 0.5, 0.5, 0.2, 0.1]), 6)
      0.666667

    References:
      Hanley, McNeil, *The Meaning and Use of the Area under a ROC Curve*, Radiology 1982.
    """
    return grouped_pairs(labels, scores, None, weights).mean_auc("user")


def gauc(
    labels: np.ndarray,
    scores: np.ndarray,
    user: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    weighting: str = "impr",
) -> float | None:
    r"""AUC within each user, averaged over the users that have both labels.

    .. math:: \mathrm{GAUC} = \sum_u w_u \mathrm{AUC}_u \Big/ \sum_u w_u

    Args:
      labels: [N] of 0/1.
      scores: [N], compared within a user only.
      user: int[N] user codes; rows of negative codes belong to no user and are left out.
      weights: [N] row weights.
      weighting: w_u: ``impr`` (impressions), ``pos`` (positives), ``pair`` (n₊n₋) or ``user`` (1); with row weights the
        sums of weights stand for the counts.

    Returns:
      A value in [0, 1], or None where no user has both labels.

    References:
      Zhou et al., *Deep Interest Network for Click-Through Rate Prediction*, KDD 2018 (``impr``).
    """
    return grouped_pairs(labels, scores, user, weights).mean_auc(weighting)


@dataclasses.dataclass(frozen=True)
class GroupedPairs:
    """Won positive-negative pairs and label weights of each group.

    Attributes:
      wins: f64[G], Σ w_i w_j (1[s_i > s_j] + ½ 1[s_i = s_j]) over the pairs of the group.
      positives: f64[G], weight of the positives.
      negatives: f64[G], weight of the negatives.
      rows: int64[G], rows of the group.
      positive_rows: int64[G], positive rows of the group.
    """

    wins: np.ndarray
    positives: np.ndarray
    negatives: np.ndarray
    rows: np.ndarray
    positive_rows: np.ndarray

    @property
    def usable(self) -> np.ndarray:
        """bool[G], whether the group has both labels."""
        return (self.positives > 0) & (self.negatives > 0)

    def mean_auc(self, weighting: str) -> float | None:
        """AUC averaged over the usable groups; None without one."""
        if weighting not in GAUC_WEIGHTINGS:
            raise ValueError(
                f"unknown weighting '{weighting}'; expected one of {list(GAUC_WEIGHTINGS)}. Pass one of these"
            )
        if not self.usable.any():
            return None
        positives, negatives = self.positives[self.usable], self.negatives[self.usable]
        group_auc = self.wins[self.usable] / (positives * negatives)
        group_weight = {
            "impr": positives + negatives,
            "pos": positives,
            "pair": positives * negatives,
            "user": np.ones_like(positives),
        }[weighting]
        return float(group_weight @ group_auc / group_weight.sum())


def grouped_pairs(
    labels: np.ndarray, scores: np.ndarray, group: np.ndarray | None, weights: np.ndarray | None = None
) -> GroupedPairs:
    """One sort by (group, score), then cumulative sums: no loop over groups. ``group`` None is one group."""
    positive, scores, weights = _columns(labels, scores, weights)
    group = np.zeros(scores.shape[0], np.int64) if group is None else np.asarray(group)
    keep = (weights > 0) & (group >= 0)
    positive, scores, weights, group = positive[keep], scores[keep], weights[keep], group[keep]
    if not scores.size:
        empty = np.zeros(0)
        return GroupedPairs(empty, empty, empty, empty.astype(np.int64), empty.astype(np.int64))
    order = np.lexsort((scores, group)) if (group[0] != group).any() else np.argsort(scores)
    positive, scores, weights, group = positive[order], scores[order], weights[order], group[order]

    new_group = np.concatenate([[True], group[1:] != group[:-1]])
    new_tie = new_group | np.concatenate([[True], scores[1:] != scores[:-1]])
    tie_starts, group_starts = np.flatnonzero(new_tie), np.flatnonzero(new_group)
    positives = np.add.reduceat(weights * positive, tie_starts)
    negatives = np.add.reduceat(weights * ~positive, tie_starts)

    first_tie = np.flatnonzero(new_group[tie_starts])
    group_of_tie = np.cumsum(new_group[tie_starts]) - 1
    below = np.cumsum(negatives) - negatives
    below -= below[first_tie][group_of_tie]
    return GroupedPairs(
        wins=np.add.reduceat(positives * (below + negatives / 2), first_tie),
        positives=np.add.reduceat(positives, first_tie),
        negatives=np.add.reduceat(negatives, first_tie),
        rows=np.diff(group_starts, append=scores.size),
        positive_rows=np.add.reduceat(positive.astype(np.int64), group_starts),
    )


def auc_binned(
    labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None, *, num_bins: int = 2**14
) -> tuple[float | None, float | None]:
    """AUC of logits rounded into equal bins over [-16, 16], with a bound on its error.

    For streams that cannot keep their scores; records carry :func:`auc`.

    Returns:
      The value and its bound: |auc_binned - auc| is at most half the share of positive-negative pairs in one bin.
    """
    positive, logits, weights = _columns(labels, logits, weights)
    bins = np.clip((logits + 16) * (num_bins / 32), 0, num_bins - 1).astype(np.int64)
    positives = np.bincount(bins, weights * positive, num_bins)
    negatives = np.bincount(bins, weights * ~positive, num_bins)
    pairs = positives.sum() * negatives.sum()
    if pairs == 0:
        return None, None
    below = np.cumsum(negatives) - negatives
    return float(positives @ (below + negatives / 2) / pairs), float(positives @ negatives / pairs / 2)


def pr_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    r"""Average precision :math:`\sum_n (R_n - R_{n-1}) P_n` over the distinct scores, ties entering together.

    Returns:
      A value in (0, 1], or None without a positive. A constant score gives the base rate.
    """
    positive, scores, weights = _columns(labels, scores, weights)
    if not weights @ positive > 0:
        return None
    order = np.argsort(-scores)
    positive, scores, weights = positive[order], scores[order], weights[order]
    last_of_tie = np.flatnonzero(np.concatenate([scores[1:] != scores[:-1], [True]]))
    found = np.cumsum(weights * positive)[last_of_tie]
    taken = np.cumsum(weights)[last_of_tie]
    # Leading rows of weight 0 take nothing and find nothing.
    precision = found / np.where(taken > 0, taken, 1.0)
    return float(np.diff(found, prepend=0.0) @ precision / found[-1])


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """σ(z) in float64, accurate in both tails."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def logloss(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Mean of y softplus(-z) + (1 - y) softplus(z), from logits, without clipping; None without rows."""
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    return weighted_mean(labels * np.logaddexp(0, -logits) + (1 - labels) * np.logaddexp(0, logits), weights)


def logloss_of_probabilities(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float | None, int]:
    """Log loss where only probabilities exist, clipped to [1e-7, 1 - 1e-7]; and the number of clipped rows."""
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    clipped = np.clip(probabilities, 1e-7, 1 - 1e-7)
    losses = -labels * np.log(clipped) - (1 - labels) * np.log1p(-clipped)
    return weighted_mean(losses, weights), int((clipped != probabilities).sum())


def ne(labels: np.ndarray, logits: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Normalised entropy: log loss over the entropy of the base rate of these rows; None with one class only.

    Below 1 is better than predicting the rate of these very rows.

    References:
      He et al., *Practical Lessons from Predicting Clicks on Ads at Facebook*, ADKDD 2014.
    """
    rate = weighted_mean(labels, weights)
    if rate is None or not 0 < rate < 1:
        return None
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    return float(logloss(labels, logits, weights) / entropy)


def pcoc(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Predicted over observed clicks, Σp/Σy: 1 is calibrated, above 1 is too high. None without a positive."""
    weights = row_weights(weights, len(labels))
    observed = weights @ np.asarray(labels, np.float64)
    return float(weights @ np.asarray(probabilities, np.float64) / observed) if observed > 0 else None


def ece_width_10(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """Expected calibration error Σ_b (n_b/n) |mean p - mean y| over 10 bins of equal width; None without rows."""
    return _calibration_error(reliability_table(labels, probabilities, weights, bins="width", num_bins=10))


def ece_mass_20(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """The same over 20 bins of equal count. The form for rare labels, which leave all width bins but one empty."""
    return _calibration_error(reliability_table(labels, probabilities, weights, bins="mass", num_bins=20))


def reliability_table(
    labels: np.ndarray,
    probabilities: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    bins: str = "width",
    num_bins: int = 10,
) -> dict[str, np.ndarray]:
    """Mean prediction and mean label of each bin that holds weight.

    Args:
      labels: [N] of 0/1.
      probabilities: [N] in [0, 1].
      weights: [N] row weights.
      bins: ``width``: bins [k/n, (k+1)/n), the last one closed; ``mass``: equal counts by score, where tied scores
        share the bin of the first of them.
      num_bins: Bins before empty ones are dropped.

    Returns:
      Columns ``bin`` (number), ``count`` (rows), ``weight``, ``prediction`` and ``label`` (weighted means).
    """
    labels, probabilities = np.asarray(labels, np.float64), np.asarray(probabilities, np.float64)
    weights = row_weights(weights, labels.shape[0])
    keep = weights > 0
    labels, probabilities, weights = labels[keep], probabilities[keep], weights[keep]
    if bins == "width":
        bin_of_row = np.searchsorted(np.arange(1, num_bins) / num_bins, probabilities, side="right")
    elif bins == "mass":
        first_rank = np.searchsorted(np.sort(probabilities), probabilities, side="left")
        bin_of_row = first_rank * num_bins // max(len(labels), 1)
    else:
        raise ValueError(f"unknown bins '{bins}'; expected 'width' or 'mass'. Pass one of these")
    count = np.bincount(bin_of_row, minlength=num_bins)
    filled = np.flatnonzero(count)
    weight = np.bincount(bin_of_row, weights, num_bins)[filled]
    return {
        "bin": filled,
        "count": count[filled],
        "weight": weight,
        "prediction": np.bincount(bin_of_row, weights * probabilities, num_bins)[filled] / weight,
        "label": np.bincount(bin_of_row, weights * labels, num_bins)[filled] / weight,
    }


def _calibration_error(table: dict[str, np.ndarray]) -> float | None:
    if not table["weight"].size:
        return None
    return weighted_mean(np.abs(table["prediction"] - table["label"]), table["weight"])


def _columns(labels, scores, weights) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    positive, scores = np.asarray(labels) > 0.5, np.asarray(scores, np.float64)
    if positive.shape != scores.shape or scores.ndim != 1:
        raise ValueError(
            f"labels {positive.shape} and scores {scores.shape}; expected two arrays [N]. Pass one score a row"
        )
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).sum()} of {scores.size} scores are NaN; expected numbers. Mask these rows")
    return positive, scores, row_weights(weights, scores.size)
