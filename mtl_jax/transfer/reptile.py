"""Reptile: towards where training on one domain ends."""

import dataclasses
from typing import ClassVar

import jax
import optax

from mtl_jax.arguments import check_count, check_number
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.train.parallel import mean
from mtl_jax.transfer.episodes import OverDomains

INNER = {"adam": lambda: optax.scale_by_adam(b1=0.0), "sgd": optax.identity}


@register
@dataclasses.dataclass(frozen=True)
class Reptile(OverDomains):
    r"""Each domain of a step is trained on for K steps from :math:`\theta`, which then goes towards their mean end.

    .. math:: \theta \leftarrow \theta + \epsilon \, \frac{1}{D} \sum_d (\theta_d^K - \theta)

    The distance :math:`\theta - \overline{\theta^K}` takes the place of a gradient: the optimizer says what is made of it.
    ``optimizer=sgd optimizer.learning_rate=1`` with a linear schedule to 0 is the paper's rule. Each step and domain begins
    with a fresh inner optimizer, and each inner step has rows of its own. Penalties of a sharing strategy have no part.

    Attributes:
      num_domains: D, domains of a step; None: all.
      step_size: Inner rate, >= 0.
      num_steps: K.
      inner: ``adam`` (with :math:`\beta_1 = 0`) or ``sgd``.

    References:
      Nichol, Achiam, Schulman, *On First-Order Meta-Learning Algorithms*, 2018.
    """

    interpolates: ClassVar[bool] = True

    step_size: float = 1e-3
    num_steps: int = dataclasses.field(default=8, metadata={"static": True})
    inner: str = dataclasses.field(default="adam", metadata={"static": True})

    def __post_init__(self):
        super().__post_init__()
        check_number(self.step_size, "transfer.step_size", least=0)
        check_count(self.num_steps, "transfer.num_steps")
        if self.inner not in INNER:
            raise ConfigError(f"transfer.inner is '{self.inner}'; expected one of {list(INNER)}. Change it")

    @property
    def blocks(self):
        return self.num_steps

    def adapt_to_domains(self, params, kept, loss, rows):
        optimizer = INNER[self.inner]()

        def step(carry, rows):
            params, state = carry
            gradient = mean(jax.grad(loss)(params, rows), loss.axis)
            direction, state = optimizer.update(gradient, state, params)
            return (jax.tree.map(lambda p, d: p - self.step_size * d, params, direction), state), None

        def trained(rows):
            return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]

        return jax.vmap(trained)(rows)
