r"""Clicks and conversions in countries that are as related as asked, with the best possible prediction known.

.. math::
    P(\text{click}) = \sigma(b_d + \kappa\, \theta_{d,\text{click}}^\top \varphi) \qquad
    P(\text{conversion} \mid \text{click}) = \sigma(b_d' + \kappa\, \theta_{d,\text{conv}}^\top \varphi)

A user and an item have eight normal factors each, of which only the octiles are seen. With u and i the octiles' centres,
:math:`\varphi = [u, i, u \odot i]` in R^24 has uncorrelated entries of mean 0 and variance 1. Country 0 is the one to which
the others are related: :math:`\cos(\theta_{d,t}, \theta_{0,t}) = \rho_d` for both tasks, and
:math:`\cos(\theta_{d,\text{click}}, \theta_{d,\text{conv}}) = \tau` in every country.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from mtl_jax.arguments import check_count, check_number
from mtl_jax.data.dataset import Dataset
from mtl_jax.data.folds import Folds, fold_options
from mtl_jax.data.reduction import Reduction, reduction_options
from mtl_jax.data.schema import Categorical, Schema, Vocabulary
from mtl_jax.errors import ConfigError
from mtl_jax.tasks import Task

FACTORS = 8
BUCKETS = 8
WIDTH = 3 * FACTORS
"""Length of phi."""
MOST_COUNTRIES = WIDTH // 2
"""Each takes two of the orthonormal directions."""
FIELDS = tuple(f"{side}{k}" for side in "ui" for k in range(FACTORS))
TASKS = (
    Task("ctr", "binary", "click"),
    Task("cvr_click", "binary", "conversion", space="ctr"),
    Task("ctcvr", "binary", "conversion", implies="ctr"),
)
TRUTH = ("p_click", "p_conv", "conv_if_click")
SPLITS = ("rows", "cold_user")
TEACHERS = ("linear", "mlp")
MLP_UNITS = 64
MLP_SAMPLE = 2**15
MAX_ROWS = 10**7
MAX_SHIFT = 2.0
RHO, ROWS = (1.0, 0.9, 0.5, 0.0), (60_000, 30_000, 30_000, 30_000)
CTR, CVR = (0.05, 0.05, 0.04, 0.03), (0.10, 0.08, 0.10, 0.06)


@dataclasses.dataclass(frozen=True)
class CountriesData:
    """N impressions in D countries, country by country, with the truth behind them.

    Attributes:
      country: int64[N], from 0 to D - 1.
      user: int64[N]; numbers below ``share_users`` of a country's users are users of every country.
      item: int64[N], the same.
      fields: int64[N, 16] octiles, from 0 to 7, of the user's factors and of the item's.
      phi: f64[N, 24] what logits are linear in: [u, i, u * i] of the teacher ``linear``.
      click: bool[N].
      conv_if_click: bool[N], drawn for every row: whether a click would convert. Conversions are both.
      p_click: f64[N], the best possible prediction of ``click``.
      p_conv: f64[N], the same of ``conv_if_click``.
      theta: f64[D, 2, 24] unit vectors of click and conversion.
      bias: f64[D, 2].
    """

    country: np.ndarray
    user: np.ndarray
    item: np.ndarray
    fields: np.ndarray
    phi: np.ndarray
    click: np.ndarray
    conv_if_click: np.ndarray
    p_click: np.ndarray
    p_conv: np.ndarray
    theta: np.ndarray
    bias: np.ndarray


def countries(
    rho: Sequence[float] = RHO,
    *,
    tau: float = 0.6,
    rows: Sequence[int] = ROWS,
    ctr: Sequence[float] = CTR,
    cvr: Sequence[float] = CVR,
    kappa: float = 1.0,
    users: int = 6_000,
    items: int = 2_000,
    share_users: float = 0.0,
    share_items: float = 0.0,
    shift: Sequence[float] | None = None,
    teacher: str = "linear",
    seed: int,
) -> CountriesData:
    r"""Impressions, clicks and conversions of D countries.

    With orthonormal :math:`q_1, \dots, q_{2D}`, t a task, and :math:`\xi_{d,\text{click}} = q_{2d+1}`,
    :math:`\xi_{d,\text{conv}} = \tau q_{2d+1} + \sqrt{1 - \tau^2}\, q_{2d+2}`,

    .. math:: \theta_{0,t} = \xi_{0,t} \qquad \theta_{d,t} = \rho_d\, \theta_{0,t} + \sqrt{1 - \rho_d^2}\; \xi_{d,t}

    The two biases of a country are such that over its rows the mean of P(click) is ``ctr``, and the mean of P(conversion |
    click), weighted by P(click), is ``cvr``.

    Args:
      rho: Relatedness of each of the D <= 12 countries to the first, whose own is 1; in [-1, 1].
      tau: Cosine of the two tasks, in [-1, 1].
      rows: Impressions of each country.
      ctr: Click rate of each country, in (0, 1).
      cvr: Conversion rate of the clicks of each country, in (0, 1).
      kappa: Standard deviation of the logits, >= 0.
      users: Users of each country.
      items: Items of each country.
      share_users: Share of a country's users that are users of every country.
      share_items: The same of items.
      shift: s of each country, from -2 to 2; none by default. An impression then takes users with a weight of
        exp(s m), m their factors' sum by :math:`\sqrt 8`, and items likewise, so that the mean of both sums is s instead
        of 0 but the labels of a pair stay as likely as they were.
      teacher: ``linear``; or ``mlp``, in which the 24 entries are those of a random two-layer network of
        [u, i, u * i], whitened, the same for all countries and tasks: cosines stay as above.
      seed: Of everything that is drawn.

    Returns:
      Rows and truth.

    Raises:
      ConfigError: A value is out of its range, or lists differ in length.
    """
    shift = [0.0] * len(rho) if shift is None else shift
    _check(rho, tau, {"rows": rows, "ctr": ctr, "cvr": cvr, "shift": shift}, kappa)
    check_count(users, "users", most=MAX_ROWS)
    check_count(items, "items", most=MAX_ROWS)
    check_number(share_users, "share_users", least=0.0, most=1.0)
    check_number(share_items, "share_items", least=0.0, most=1.0)
    check_count(seed, "seed", least=0, most=2**64 - 1)
    if teacher not in TEACHERS:
        raise ConfigError(f"teacher is '{teacher}'; expected one of {list(TEACHERS)}. Change it")
    rng = np.random.Generator(np.random.PCG64(seed))
    theta = _directions(rng, rho, tau)
    network = _network(rng) if teacher == "mlp" else lambda phi: phi
    pools = [_Pool.of(rng, *facts, len(rho)) for facts in ((users, share_users), (items, share_items))]
    found = []
    for d, count in enumerate(rows):
        (user, seen_user), (item, seen_item) = (pool.draw(rng, d, count, shift[d]) for pool in pools)
        phi = network(_phi(seen_user, seen_item))
        logits = kappa * phi @ theta[d].T
        bias_click = _bias(logits[:, 0], ctr[d], np.ones(count))
        p_click = _sigmoid(bias_click + logits[:, 0])
        bias_conv = _bias(logits[:, 1], cvr[d], p_click)
        p_conv = _sigmoid(bias_conv + logits[:, 1])
        click, conv_if_click = rng.random(count) < p_click, rng.random(count) < p_conv
        fields = np.concatenate([seen_user, seen_item], axis=1)
        columns = (np.full(count, d), user, item, fields, phi, click, conv_if_click, p_click, p_conv)
        found.append((columns, (bias_click, bias_conv)))
    columns = [np.concatenate(column) for column in zip(*(columns for columns, _ in found), strict=True)]
    return CountriesData(*columns, theta, np.array([bias for _, bias in found]))


def expected_auc(scores: np.ndarray, p: np.ndarray, weights: np.ndarray | None = None) -> float:
    r"""AUC of scores over the draws of labels that are 1 with probability p: the share of pairs in the right order.

    .. math::
        \frac{\sum_{ij} w_i p_i\, w_j (1 - p_j) \left([s_i > s_j] + \tfrac12 [s_i = s_j]\right)}
        {\sum_i w_i p_i \sum_j w_j (1 - p_j)}

    It is highest where the scores rank as p does: the Bayes AUC.

    Args:
      scores: [N].
      p: [N] probabilities.
      weights: [N], like the probability that the label of a row exists; ones by default.
    """
    weights = np.ones(len(p)) if weights is None else weights
    codes = np.unique(scores, return_inverse=True)[1].ravel()
    positives, negatives = np.bincount(codes, weights * p), np.bincount(codes, weights * (1 - p))
    below = np.cumsum(negatives) - negatives
    return float(positives @ (below + negatives / 2) / (positives.sum() * negatives.sum()))


def bayes(p: np.ndarray, weights: np.ndarray | None = None) -> dict[str, float]:
    """What the best possible prediction p of a binary label reaches: ``auc`` and ``logloss``, its mean entropy in nats.

    Args:
      p: [N] probabilities.
      weights: [N]; ones by default.
    """
    inside = np.clip(p, 1e-300, 1 - 1e-16)
    entropy = -(p * np.log(inside) + (1 - p) * np.log1p(-inside))
    return {"auc": expected_auc(p, p, weights), "logloss": float(np.average(entropy, weights=weights))}


def load(
    *,
    rho: Sequence[float] = RHO,
    tau: float = 0.6,
    rows: Sequence[int] = ROWS,
    ctr: Sequence[float] = CTR,
    cvr: Sequence[float] = CVR,
    kappa: float = 1.0,
    users: int = 6_000,
    items: int = 2_000,
    share_users: float = 0.0,
    share_items: float = 0.0,
    shift: Sequence[float] | None = None,
    teacher: str = "linear",
    with_ids: bool = False,
    seed: int = 0,
    recipe: str = "octiles",
    split: str = "rows",
    split_seed: int = 0,
    split_folds: Folds | None = None,
    reduction: Reduction | None = None,
    tasks: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    download: bool = False,
) -> Dataset:
    """The rows of :func:`countries` as a data set with the domains ``country_0``, ``country_1``, ...

    Tasks are ``ctr``, ``cvr_click``, in the space of clicks, and ``ctcvr``, over all impressions; features the country and
    the fields ``u0`` to ``u7`` and ``i0`` to ``i7``. The truth is in the columns ``p_click``, ``p_conv`` and
    ``conv_if_click``, which can be no features.

    Args:
      rho, tau, rows, ctr, cvr, kappa, users, items, share_users, share_items, shift, teacher, seed: See :func:`countries`.
      with_ids: Whether user and item are features as well. They tell nothing that the fields do not.
      recipe: ``octiles``, the only one.
      split: ``rows`` or ``cold_user``.
      split_seed: Of the hash order of rows or users.
      split_folds: Cross-validation inside train and valid.
      reduction: What is kept of train and valid.
      tasks: Those to keep; all when None.
      cache_dir: Without effect, like ``download``: there is nothing to fetch.
      download: See ``cache_dir``.

    Returns:
      The data set. ``info`` has ``parameters`` and ``bayes``: domain, or ``all``, -> task -> ``auc`` and ``logloss`` that
      the best possible prediction can be expected to reach on test; ``cvr_all`` is that of ``conv_if_click``.

    Raises:
      ConfigError: A value is out of its range, or lists differ in length.
    """
    del cache_dir, download
    for what, value, known in (("recipe", recipe, ("octiles",)), ("split", split, SPLITS)):
        if value not in known:
            raise ConfigError(
                f"unknown {what} '{value}' of 'countries'; expected one of {list(known)}. Set data.{what}"
            )
    if with_ids and split == "cold_user":
        raise ConfigError(
            "with_ids is True with split 'cold_user', which has no user in two parts; expected False. Change one"
        )
    facts = {
        "rho": rho,
        "tau": tau,
        "rows": rows,
        "ctr": ctr,
        "cvr": cvr,
        "kappa": kappa,
        "users": users,
        "items": items,
    }
    facts |= {"share_users": share_users, "share_items": share_items, "shift": shift, "teacher": teacher, "seed": seed}
    data = countries(**facts)
    names = tuple(f"country_{d}" for d in range(len(rho)))
    features = ["country", *FIELDS, *(["user", "item"] if with_ids else [])]
    lists = {key: list(value) for key, value in facts.items() if isinstance(value, list | tuple)}
    parameters = facts | lists | {"with_ids": with_ids}
    dataset = Dataset.from_frame(
        _frame(data, names),
        Schema(
            features=tuple(Categorical(name, name) for name in features),
            vocabularies=tuple(Vocabulary(name) for name in features),
            tasks=TASKS,
            domain="country",
            domains=names,
            user="user",
            item="item",
            excluded=dict.fromkeys(TRUTH, "the truth behind the labels"),
        ),
        split,
        name="countries",
        recipe=recipe,
        seed=split_seed,
        split_options=fold_options(split_folds) | reduction_options(reduction),
        licence="made on the spot",
        identity=parameters,
        info={"parameters": parameters},
    )
    dataset = dataclasses.replace(dataset, info=dict(dataset.info) | {"bayes": _bayes_by_domain(dataset)})
    return dataset if tasks is None else dataset.with_tasks(tasks)


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The users, or the items, of all countries: octiles and sum of factors by number, and the numbers of a country."""

    fields: np.ndarray
    tilt: np.ndarray
    count: int
    shared: int

    @classmethod
    def of(cls, rng: np.random.Generator, count: int, share: float, num_countries: int) -> "_Pool":
        shared = round(share * count)
        factors = rng.normal(size=(shared + num_countries * (count - shared), FACTORS))
        octiles = [statistics.NormalDist().inv_cdf(j / BUCKETS) for j in range(1, BUCKETS)]
        return cls(np.digitize(factors, octiles), factors.sum(1) / FACTORS**0.5, count, shared)

    def draw(self, rng: np.random.Generator, d: int, size: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and octiles of those in ``size`` impressions of country d."""
        own = self.count - self.shared
        numbers = np.concatenate([np.arange(self.shared), self.shared + d * own + np.arange(own)])
        weights = np.exp(shift * self.tilt[numbers])
        drawn = numbers[rng.choice(len(numbers), size, p=weights / weights.sum())]
        return drawn, self.fields[drawn]


def _phi(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """f64[N, 24] of the octiles of both sides."""
    centres = np.array([statistics.NormalDist().inv_cdf((j + 0.5) / BUCKETS) for j in range(BUCKETS)])
    centres /= np.sqrt(np.square(centres).mean())
    u, i = centres[user], centres[item]
    return np.concatenate([u, i, u * i], axis=1)


def _directions(rng: np.random.Generator, rho: Sequence[float], tau: float) -> np.ndarray:
    """f64[D, 2, 24]."""
    q = np.linalg.qr(rng.normal(size=(WIDTH, 2 * len(rho))))[0].T.reshape(len(rho), 2, WIDTH)
    own = np.stack([q[:, 0], tau * q[:, 0] + np.sqrt(1 - tau**2) * q[:, 1]], axis=1)
    related = np.asarray(rho, float)[:, None, None]
    return related * own[0] + np.sqrt(1 - related**2) * own


def _network(rng: np.random.Generator):
    """phi -> 24 uncorrelated functions of it, of mean 0 and variance 1 where octiles are independent and uniform."""
    first = 1.5 * rng.normal(size=(WIDTH, MLP_UNITS)) / WIDTH**0.5
    second = rng.normal(size=(MLP_UNITS, WIDTH)) / MLP_UNITS**0.5
    offset = rng.normal(size=MLP_UNITS)

    def outputs(phi):
        return np.tanh(phi @ first + offset) @ second

    sample = outputs(_phi(*rng.integers(0, BUCKETS, (2, MLP_SAMPLE, FACTORS))))
    mean = sample.mean(0)
    values, vectors = np.linalg.eigh(np.cov(sample.T))
    whiten = vectors / np.sqrt(values) @ vectors.T
    return lambda phi: (outputs(phi) - mean) @ whiten


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(x / 2)


def _bias(logits: np.ndarray, rate: float, weights: np.ndarray) -> float:
    """b at which the weighted mean of sigmoid(b + logits) is the rate, by bisection."""
    middle = np.log(rate / (1 - rate))
    low, high = middle - np.abs(logits).max(), middle + np.abs(logits).max()
    for _ in range(60):
        b = (low + high) / 2
        low, high = (b, high) if np.average(_sigmoid(b + logits), weights=weights) < rate else (low, b)
    return float((low + high) / 2)


def _frame(data: CountriesData, names: Sequence[str]) -> pl.DataFrame:
    columns = {
        "country": pl.Series(np.array(names)[data.country].tolist(), dtype=pl.Enum(names)),
        "user": data.user,
        "item": data.item,
    }
    columns |= dict(zip(FIELDS, data.fields.T, strict=True))
    columns |= {"click": data.click, "conversion": data.click & data.conv_if_click}
    return pl.DataFrame(columns | {name: getattr(data, name) for name in TRUTH})


def _bayes_by_domain(dataset: Dataset) -> dict[str, dict[str, dict[str, float]]]:
    test = dataset.part("test")
    found = {}
    for domain in (*dataset.schema.domains, "all"):
        rows = test if domain == "all" else test.filter(pl.col("country") == domain)
        if not rows.height:
            continue
        click, conv = (rows[name].to_numpy() for name in ("p_click", "p_conv"))
        found[domain] = {"ctr": bayes(click), "cvr_click": bayes(conv, click), "ctcvr": bayes(click * conv)}
        found[domain] |= {"cvr_all": bayes(conv)}
    return found


def _check(rho: Any, tau: Any, lists: dict[str, Any], kappa: Any) -> None:
    check_count(len(rho), "the number of countries (length of rho)", most=MOST_COUNTRIES)
    for d, value in enumerate(rho):
        check_number(value, f"rho[{d}]", least=-1.0, most=1.0)
    if rho[0] != 1:
        raise ConfigError(f"rho[0] is {rho[0]}; expected 1, since the others are related to the first. Set data.rho")
    check_number(tau, "tau", least=-1.0, most=1.0)
    check_number(kappa, "kappa", least=0.0, most=100.0)
    for name, values in lists.items():
        if len(values) != len(rho):
            raise ConfigError(
                f"{name} has {len(values)} values and rho {len(rho)}; expected one for each country. Set data.{name}"
            )
        for d, value in enumerate(values):
            if name == "rows":
                check_count(value, f"rows[{d}]", most=MAX_ROWS)
            elif name == "shift":
                check_number(value, f"shift[{d}]", least=-MAX_SHIFT, most=MAX_SHIFT)
            else:
                check_number(value, f"{name}[{d}]", above=0.0, below=1.0)
