"""Adapters: small networks between frozen layers."""

import dataclasses

import jax
from flax import nnx

from mtl_jax import nn
from mtl_jax.arguments import check_count, shown
from mtl_jax.balancing.base import register
from mtl_jax.errors import ConfigError
from mtl_jax.model import ADAPTER, MultiTaskModel, label, of_encoder, path_name
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.transfer.kernels import check_targets, is_target, of_norm, of_tasks


@register
@dataclasses.dataclass(frozen=True)
class Adapter(Adaptation):
    r"""Frozen layers with small networks after them, which are trained beside normalisations and the tasks' own parameters.

    .. math:: h \leftarrow h + \operatorname{gelu}(h W_d + b_d) W_u + b_u

    follows the layers of the strategy that are entries of an :class:`mtl_jax.nn.MLP` or :class:`mtl_jax.nn.Experts`, after
    their norm, activation and dropout, which is where the authors' code has it. Each expert has matrices of its own.
    :math:`W_u = b_u = 0` at first, so that training begins at the source's model exactly; the authors' code starts near
    it, from normal values of deviation 0.001, and with k = 64. The deployed model keeps its adapters: loaded into a model
    without, their arrays have no place.

    Attributes:
      width: k, at least 1.
      targets: Pattern of the paths of the layers, among shared ones of the strategy, like ``sharing/bottom/layers/0``.

    Raises:
      ConfigError: By ``prepared``, where no such layer has such a path.

    References:
      Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly, *Parameter-Efficient Transfer
      Learning for NLP*, ICML 2019.
    """

    width: int = dataclasses.field(default=16, metadata={"static": True})
    targets: str = dataclasses.field(default=".*", metadata={"static": True})

    def __post_init__(self):
        check_count(self.width, "transfer.width")
        check_targets(self.targets)

    def prepared(self, model: MultiTaskModel, key: jax.Array) -> MultiTaskModel:
        model = nnx.clone(model)
        networks = [(path, one) for path, one in nnx.iter_modules(model) if isinstance(one, nn.MLP | nn.Experts)]
        layers = {
            path_name((*path, "layers", number), model): (network.aux, number, layer)
            for path, network in networks
            for number, layer in enumerate(network.layers)
        }
        chosen = [name for name in layers if is_target(name, self.targets) and not of_encoder(name)]
        for name in chosen:
            aux, number, layer = layers[name]
            aux.put(number, nn.Adapter(layer, self.width, rngs=nnx.Rngs(params=nn.stream(key, name))))
        if not chosen:
            raise ConfigError(
                f"transfer.targets is {shown(self.targets)}, which no shared layer of "
                f"'{type(model.sharing).__name__}' that an adapter can follow has as its path; expected entries of an MLP "
                "or of Experts, like 'sharing/bottom/layers/0'. Change it, or choose another transfer or sharing"
            )
        return model

    def phases(self):
        return (lambda path: label(path) == ADAPTER or of_norm(path) or of_tasks(path),)
