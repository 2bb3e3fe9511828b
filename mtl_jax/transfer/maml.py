"""MAML: initial values from which a few gradient steps on a domain serve that domain."""

import dataclasses
from typing import ClassVar

import jax

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.transfer.episodes import KINDS, OverDomains, block, check_scope, in_scope, of_model
from mtl_jax.transfer.gradient import gradient_update


@register
@dataclasses.dataclass(frozen=True)
class MAML(OverDomains):
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
        batches, a balancer or options that take a batch apart, or ``parallel=pmap``.

    References:
      Finn, Abbeel, Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, ICML 2017; Raghu, Raghu,
      Bengio, Vinyals, *Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML*, ICLR 2020.
    """

    blocks: ClassVar[int] = 2

    step_size: float = 0.01
    num_steps: int = dataclasses.field(default=1, metadata={"static": True})
    scope: tuple[str, ...] = dataclasses.field(default=KINDS, metadata={"static": True})
    first_order: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        super().__post_init__()
        check_number(self.step_size, "transfer.step_size", least=0)
        check_count(self.num_steps, "transfer.num_steps")
        object.__setattr__(self, "scope", tuple(self.scope))
        check_scope(self.scope)

    def adapt_to_domains(self, params, kept, loss, rows):
        def adapted(rows):
            support = block(rows, 0)
            update = gradient_update(
                lambda moved: loss(moved, support),
                step_size=self.step_size,
                num_steps=self.num_steps,
                mask=in_scope(of_model(params), self.scope),
                first_order=self.first_order,
            )
            return update(of_model(params))

        return jax.vmap(adapted)(rows)
