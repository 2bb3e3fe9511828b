"""iMAML: initial values near which the minimum on a domain serves that domain."""

import dataclasses

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.transfer.episodes import FromSupport, in_scope, of_model
from mtl_jax.transfer.gradient import implicit_update


@register
@dataclasses.dataclass(frozen=True)
class IMAML(FromSupport):
    r"""Meta-learning through the minimum of the inner problem, whatever steps led there.

    .. math::
        \phi_d = \arg\min_\phi \ell_d^{\text{support}}(\phi) + \frac{\lambda}{2} \|\phi - \theta\|^2, \qquad
        \nabla_\theta L_d(\phi_d) = (I + H_d / \lambda)^{-1} \nabla L_d^{\text{query}}(\phi_d)

    The system is solved by conjugate gradients (see :func:`mtl_jax.transfer.gradient.implicit_update`), which stop where
    :math:`H + \lambda I` is not positive.

    Attributes:
      num_domains: D, domains of a step; None: all.
      step_size: Of the inner descent.
      num_steps: Of the inner descent.
      proximal: :math:`\lambda > 0`.
      num_cg_steps: Most iterations of the conjugate gradients.
      scope: Labels that the inner problem moves.

    References:
      Rajeswaran, Finn, Kakade, Levine, *Meta-Learning with Implicit Gradients*, NeurIPS 2019.
    """

    num_steps: int = dataclasses.field(default=16, metadata={"static": True})
    proximal: float = 1.0
    num_cg_steps: int = dataclasses.field(default=5, metadata={"static": True})

    def __post_init__(self):
        super().__post_init__()
        check_number(self.proximal, "transfer.proximal", above=0)
        check_count(self.num_cg_steps, "transfer.num_cg_steps")

    def adapted(self, params, loss):
        fit = implicit_update(
            loss,
            step_size=self.step_size,
            num_steps=self.num_steps,
            proximal=self.proximal,
            num_cg_steps=self.num_cg_steps,
            mask=in_scope(of_model(params), self.scope),
            axis=loss.axis,
        )
        return fit(of_model(params))
