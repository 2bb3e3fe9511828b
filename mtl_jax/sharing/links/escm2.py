"""ESCM2: the loss of conversions corrected for which impressions were clicked."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax.arguments import check_number
from mtl_jax.errors import ConfigError
from mtl_jax.sharing.links.base import Link, Linked
from mtl_jax.sharing.links.chain import chain
from mtl_jax.sharing.order import check_order

ESTIMATORS = ("ips", "dr")
IMPUTATION = "imputation"


class ESCM2(Link):
    r"""Entire space counterfactual multi-task model.

    Three losses: of clicks on the tower a, of click and conversion on :math:`\operatorname{chain}(a, b)`, and of
    conversions on b, corrected over all impressions D. With click o, the error :math:`\delta = \operatorname{BCE}(y, b)` of
    clicked rows, and the propensity :math:`\hat p = \max(\operatorname{sg}(\sigma(a)), \epsilon)`,

    .. math::
        R_\text{ips} = \frac{1}{|D|} \sum_D \frac{o}{\hat p} \delta, \qquad
        R_\text{dr} = \frac{1}{|D|} \sum_D \hat\delta + \frac{o}{\hat p} (\delta - \hat\delta)
        + \frac{o}{\hat p} (\operatorname{sg}(\delta) - \hat\delta)^2

    where :math:`\hat\delta = \operatorname{softplus}` of an imputation tower. sg stops gradients. The paper's factors of
    the losses are ``Task.weight``: 0.1 for conversions and 1 for click and conversion.

    Args:
      tasks: Task names.
      order: The click and the click with conversion, ``("ctr", "ctcvr")``: labels on all impressions.
      given: The conversion given a click, ``"cvr_click"``: a label on clicked rows (its ``space`` is the click).
      estimator: ``ips`` or ``dr``.
      floor: ε, the least propensity, in (0, 1].

    Raises:
      ConfigError: Tasks are missing or not binary, or there is a conversion without a click.

    Labels: both towers and their networks are shared, the imputation tower is that of ``given``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.sharing import ESCM2
      >>> link = ESCM2(("ctr", "cvr_click", "ctcvr"), estimator="ips")
      >>> one, zero = jnp.ones(1), jnp.zeros(1)
      >>> labels = {"ctr": one, "cvr_click": one, "ctcvr": one}
      >>> found = link({"ctr": zero, "cvr_click": zero}, labels, labels)
      >>> print(f"{found.losses['cvr_click'][0]:.4f}")  # log 2 over a propensity of one half
      1.3863

    Public code divides by the number of clicks where the paper does by impressions, caps 1/p̂, and takes the imputed error
    as a chance, where an error has no upper bound.

    References:
      Wang, Chang, Liu, Huang, Chen, Yu, Li, Chu, *ESCM²: Entire Space Counterfactual Multi-Task Model for Post-Click
      Conversion Rate Estimation*, SIGIR 2022, arXiv 2204.05125.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        order: Sequence[str] = ("ctr", "ctcvr"),
        given: str = "cvr_click",
        estimator: str = "dr",
        floor: float = 0.01,
    ):
        self.tasks = tuple(tasks)
        if estimator not in ESTIMATORS:
            raise ConfigError(f"link.estimator is '{estimator}'; expected one of {list(ESTIMATORS)}. Change it")
        check_number(floor, "link.floor", least=1e-12, most=1.0)
        click, both, *_ = check_order(order, self.tasks, least=2, place="link.order")
        check_order([given], self.tasks, least=1, place="link.given")
        self.estimator, self.floor = estimator, floor
        extra = {IMPUTATION: given} if estimator == "dr" else {}
        self.tie(
            towers=[task for task in self.tasks if task != both],
            extra=extra,
            reads={both: (click, given), given: (click, given, *extra)},
            shared=(click, given),
            observed_by={given: click},
            order=(click, both),
            given={given: click},
            tied=(click, given, both),
        )

    def __call__(self, logits, labels=None, weight=None) -> Linked:
        (click, both), (given,) = self.order, self.given
        found, losses = {task: logit for task, logit in logits.items() if task in self.tasks}, {}
        if click in logits and given in logits:
            found[both] = chain(logits[click], logits[given])
            if labels is not None and (self.estimator == "ips" or IMPUTATION in logits):
                clicked = (labels[click] > 0) & (weight[click] > 0) & (weight[given] > 0)
                losses[given] = self._corrected(logits, clicked, labels[given])
        return Linked(found, losses, {})

    def _corrected(self, logits, clicked, labels) -> Float[Array, " batch"]:
        (click, _), (given,) = self.order, self.given
        propensity = jnp.maximum(jax.lax.stop_gradient(jax.nn.sigmoid(logits[click])), self.floor)
        inverse = clicked / propensity
        b = logits[given]
        y = jnp.where(clicked, labels, 0).astype(b.dtype)
        error = y * jax.nn.softplus(-b) + (1 - y) * jax.nn.softplus(b)
        if self.estimator == "ips":
            return inverse * error
        imputed = jax.nn.softplus(logits[IMPUTATION])
        square = jnp.square(jax.lax.stop_gradient(error) - imputed)
        return imputed + inverse * (error - imputed) + inverse * square
