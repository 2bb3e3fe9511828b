"""MAML: initial values from which a few gradient steps on a domain serve that domain."""

import dataclasses

from mtl_jax.balancing.base import register
from mtl_jax.transfer.episodes import FromSupport, in_scope, of_model
from mtl_jax.transfer.gradient import gradient_update


@register
@dataclasses.dataclass(frozen=True)
class MAML(FromSupport):
    r"""Model-agnostic meta-learning over domains.

    .. math::
        \theta'_d = \theta - \alpha \nabla \ell_d^{\text{support}}(\theta) \ (K \text{ times}), \qquad
        \min_\theta \frac{1}{D} \sum_d L_d^{\text{query}}(\theta'_d)

    Each domain of a step has two disjoint blocks of rows, support and query; :math:`\ell` is the sum of the tasks' losses.
    Balancers see the tasks' gradients at the adapted parameters of all domains; the balanced one is pulled back through
    the K steps once. What is learned and deployed is :math:`\theta`: adapt it by ``transfer=few_steps`` or any other.

    Attributes:
      num_domains: D, domains of a step; None: all.
      step_size: :math:`\alpha \ge 0`.
      num_steps: K; all on the same support rows.
      scope: Labels that the inner steps move, of ``embedding``, ``shared`` and ``task``. ``(task,)`` is ANIL: the encoder's
        gradient still goes through the inner steps of the towers.
      first_order: Whether no gradient flows through inner gradients (FOMAML).

    Raises:
      ConfigError: A value is out of its range; in training: fewer than two domains, layers that keep statistics of
        batches, or a balancer or options that take a batch apart.

    References:
      Finn, Abbeel, Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, ICML 2017; Raghu, Raghu,
      Bengio, Vinyals, *Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML*, ICLR 2020.
    """

    first_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def adapted(self, params, loss):
        update = gradient_update(
            loss,
            step_size=self.step_size,
            num_steps=self.num_steps,
            mask=in_scope(of_model(params), self.scope),
            first_order=self.first_order,
            axis=loss.axis,
        )
        return update(of_model(params))
