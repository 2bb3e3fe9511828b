"""GradVac: pull each pair of gradients to the angle that it usually has."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from mtl_jax.balancing.base import Balancer, only_active, only_active_rows, register
from mtl_jax.balancing.options import checked
from mtl_jax.balancing.pcgrad import draw_orders
from mtl_jax.balancing.rows import combine_rows, gramian
from mtl_jax.errors import ConfigError

GROUPS = ("whole", "layer", "tensor")
MAX_COSINE = 1 - 1e-6
# Below this part of its task's length a projection is rounding error of the Gramian, and has no direction.
VANISHED = 1e-3


def gradvac(*, beta: float = 0.01, groups: str = "whole") -> Balancer:
    r"""Gradient vaccine: PCGrad with a moving target. Each task visits the others in a random order of its own; where
    the cosine :math:`\phi` of its gradient p, as edited so far, with another task's original gradient is below the
    usual one of the pair, p is moved to have the usual one:

    .. math::
        p \leftarrow p + \lVert p \rVert \frac{\bar\phi_{ij} \sqrt{1 - \phi^2} - \phi \sqrt{1 - \bar\phi_{ij}^2}}
        {\lVert g_j \rVert \sqrt{1 - \bar\phi_{ij}^2}}\, g_j
        \qquad \bar\phi_{ij} \leftarrow (1 - \beta)\, \bar\phi_{ij} + \beta\, \phi
        \qquad d = \sum_i p_i

    with :math:`\phi` from before the edit, and :math:`\bar\phi = 0` at first.

    Args:
      beta: :math:`\beta` in [0, 1], how fast the usual cosines follow; 0 is PCGrad.
      groups: What gradients are compared over: the ``whole`` scope, each ``layer`` (arrays with one parent, like the kernel
        and bias of a layer), or each ``tensor``.

    Returns:
      A balancer that draws one permutation per task and step; its state is :math:`\bar\phi`, row i for the visits of task
      i. It needs the Gramian, and for layers or tensors the Jacobian, with cosines for each of them.

    Raises:
      ConfigError: An option is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtl_jax.balancing import aggregate, gradvac
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> balancer = gradvac(beta=0.5)
      >>> state = balancer.init(2)
      >>> for seed in range(2):  # the second step asks for half of the conflict only
      ...     direction, state = aggregate(balancer, jacobian, state, key=jax.random.key(seed))
      ...     print(direction.round(4))
      [0.5848 3.8012 3.8012]
      [1.0065 3.2644 3.2644]

    Edge cases:
      ======================================= =============================================================
      one task                                its own gradient
      a zero gradient                         never visited, contributes zero
      an inactive task                        its cosines stay
      p shorter than a thousandth of g_i      tells no cosine: those of its further visits stay
      a usual cosine of 1 or -1               counts as one 1e-6 away from it
      ======================================= =============================================================

    References:
      Wang, Tsvetkov, Firat, Cao, *Gradient Vaccine: Investigating and Improving Multi-Task Optimization in Massively
      Multilingual Models*, ICLR 2021, `arXiv:2010.05874 <https://arxiv.org/abs/2010.05874>`_, which studies the three kinds
      of groups. :math:`\beta` = 0.01 is the paper's; some public code has 0.5.
    """
    beta = checked(beta, "gradvac(beta)", at_least=0.0, at_most=1.0)
    if groups not in GROUPS:
        raise ConfigError(f"gradvac(groups) is {groups!r}; expected one of {list(GROUPS)}. Set one of them")
    return GradVac(beta) if groups == "whole" else GroupedGradVac(beta, groups)


class GradVacState(NamedTuple):
    """The usual cosine of each pair, of each group where there are several; 0 on the diagonal."""

    phi: Float[Array, "*group task task"]


@register
@dataclasses.dataclass(frozen=True)
class GradVac(Balancer):
    beta: Any

    needs: ClassVar = "gramian"
    stochastic: ClassVar = True
    scaling: ClassVar = "sum"

    def init(self, num_tasks: int, params: PyTree | None = None) -> GradVacState:
        return GradVacState(jnp.zeros((num_tasks, num_tasks)))

    def weigh(
        self,
        gramian: Float[Array, "task task"],
        losses: Float[Array, " task"],
        state: GradVacState,
        key: PRNGKeyArray,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[Float[Array, " task"], GradVacState]:
        orders = draw_orders(key, losses.shape[0])
        weights, phi = vaccine_weights(only_active(gramian, active), state.phi, self.beta, orders)
        return weights if active is None else jnp.where(active, weights, 0), GradVacState(phi)


@register
@dataclasses.dataclass(frozen=True)
class GroupedGradVac(Balancer):
    beta: Any
    groups: str = dataclasses.field(metadata={"static": True})

    needs: ClassVar = "jacobian"
    stochastic: ClassVar = True
    scaling: ClassVar = "sum"
    has_parameter_state: ClassVar = True

    def init(self, num_tasks: int, params: PyTree | None = None) -> GradVacState:
        return GradVacState(jnp.zeros((1 + max(self._numbers(params), default=0), num_tasks, num_tasks)))

    def combine(
        self,
        jacobian: PyTree[Float[Array, "task ..."]],
        losses: Float[Array, " task"],
        state: GradVacState,
        key: PRNGKeyArray,
        *,
        active: Bool[Array, " task"] | None = None,
    ) -> tuple[PyTree[Float[Array, "..."]], GradVacState]:
        leaves, structure = jax.tree.flatten(only_active_rows(jacobian, active))
        numbers, orders = self._numbers(jacobian), draw_orders(key, losses.shape[0])
        members = [[] for _ in range(1 + max(numbers))]
        for number, leaf in zip(numbers, leaves, strict=True):
            members[number].append(leaf)
        products = jnp.stack([gramian(leaves) for leaves in members])
        weights, phi = jax.vmap(vaccine_weights, in_axes=(0, 0, None, None))(products, state.phi, self.beta, orders)
        combined = [combine_rows(weights[number], leaf) for number, leaf in zip(numbers, leaves, strict=True)]
        return jax.tree.unflatten(structure, combined), GradVacState(phi)

    def _numbers(self, tree: PyTree) -> list[int]:
        """The number of the group of each leaf."""
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]
        names = [path.rpartition("/")[0] if self.groups == "layer" else path for path in paths]
        order = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return [order[name] for name in names]


# Jitted, because a scan outside of jit is compiled anew at every call.
@jax.jit
def vaccine_weights(
    gramian: Float[Array, "task task"],
    phi: Float[Array, "task task"],
    beta: float | Float[Array, ""],
    orders: Int[Array, "task task"],
) -> tuple[Float[Array, " task"], Float[Array, "task task"]]:
    """Weights of the summed edits, and the usual cosines; ``orders[i]`` is the order in which task i visits."""
    num_tasks = gramian.shape[0]
    norms = jnp.sqrt(jnp.diagonal(gramian))
    safe_norms = jnp.where(norms > 0, norms, 1)

    def edit(task, usual_cosines, order):
        def visit(carry, other):
            weights, usual_cosines = carry
            dots = jnp.matmul(gramian, weights, precision=jax.lax.Precision.HIGHEST)
            length = jnp.sqrt(jnp.maximum(jnp.dot(weights, dots, precision=jax.lax.Precision.HIGHEST), 0))
            along = dots[other] / safe_norms[other]  # the edit is written in lengths: p may be 0
            across = jnp.sqrt(jnp.maximum(length**2 - along**2, 0))
            usual = jnp.clip(usual_cosines[other], -MAX_COSINE, MAX_COSINE)
            there = (other != task) & (norms[other] > 0) & (norms[task] > 0)

            added = (usual / jnp.sqrt(1 - usual**2) * across - along) / safe_norms[other]
            added = jnp.where(there & (along < usual * length), added, 0)
            told = there & (length > VANISHED * norms[task])
            cosine = jnp.clip(along / jnp.where(told, length, 1), -1, 1)
            followed = jnp.where(told, (1 - beta) * usual + beta * cosine, usual_cosines[other])
            followed = followed.astype(usual_cosines.dtype)
            return (weights.at[other].add(added), usual_cosines.at[other].set(followed)), None

        start = jax.nn.one_hot(task, num_tasks, dtype=gramian.dtype), usual_cosines
        return jax.lax.scan(visit, start, order)[0]

    weights, phi = jax.vmap(edit)(jnp.arange(num_tasks), phi, orders)
    return weights.sum(axis=0), phi
