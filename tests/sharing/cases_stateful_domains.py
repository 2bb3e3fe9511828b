"""The multi-domain strategies with state as their tests see them; what :mod:`cases` is for the others."""

import functools

import cases
import numpy as np
import references_domains as references

from mtl_jax.sharing.adapt_dhm import AdaptDHM
from mtl_jax.sharing.adasparse import AdaSparse
from mtl_jax.sharing.hamur import HAMUR
from mtl_jax.sharing.sar_net import SARNet
from mtl_jax.sharing.star import STAR

Case, array, layer, mlp, small = (getattr(cases, name) for name in ("Case", "array", "layer", "mlp", "small"))


# From modules to the parameters of references, which a function of x, context and tasks then reads


def norm(module):
    names = {"gain": "scale", "bias": "bias", "domain_gain": "domain_scale", "domain_bias": "domain_bias"}
    return {name: array(getattr(module, attribute)) for name, attribute in names.items()}


def moments(module):
    return {"mean": array(module.mean), "variance": array(module.variance)}


def star_layers(network):
    names = {"kernel": "kernel", "bias": "bias", "domain_kernel": "own_kernel", "domain_bias": "own_bias"}
    return [{name: array(getattr(one, attribute)) for name, attribute in names.items()} for one in network.layers]


def domain_of(context):
    return np.asarray(context.domain)


def star(strategy):
    params = {"norm": norm(strategy.norm), "layers": star_layers(strategy.network)}
    params |= {"domain_embedding": array(strategy.embedding), "auxiliary": mlp(strategy.auxiliary)}

    def reference(x, context, tasks):
        return references.star(params, moments(strategy.norm), x, domain_of(context), tasks)

    return (reference,)


def sar_net(strategy):
    normed = {"gain": array(strategy.norm.scale), "bias": array(strategy.norm.bias)} | moments(strategy.norm)

    def experts(module, start, stop):
        if module is None:
            return []
        kernel, bias = layer(module)
        return [{"norm": normed, "kernel": kernel[e], "bias": bias[e]} for e in range(start, stop)]

    number = strategy.num_specific
    domains = range(len(array(strategy.scale)))
    params = {
        "scale": array(strategy.scale),
        "shift": array(strategy.shift),
        "shared": experts(strategy.shared, 0, strategy.num_shared),
        "specific": [experts(strategy.specific, m * number, (m + 1) * number) for m in domains],
        "gates": array(strategy.gate.kernel),
        "mlp": mlp(strategy.network),
    }
    return (lambda x, context, tasks: references.sar_net(params, x, domain_of(context), tasks),)


def hamur(strategy):
    domains = range(strategy.layers[0].kernel.shape[0])
    params = {"trunk": [[(array(one.kernel)[m], array(one.bias)[m]) for one in strategy.layers] for m in domains]}
    params["hyper"] = {"hidden": mlp(strategy.hyper), "output": layer(strategy.instance)}
    names = {"u1": "into", "v1": "narrow", "b1": "narrow_bias", "u2": "back", "v2": "wide", "b2": "wide_bias"}
    adapters = dict(zip(strategy.adapter_layers, strategy.adapters, strict=True))
    params["adapters"] = {
        index: {name: array(getattr(one, attribute)) for name, attribute in names.items()} | {"norm": norm(one.norm)}
        for index, one in adapters.items()
    }
    stored = {index: moments(one.norm) for index, one in adapters.items()}
    return (lambda x, context, tasks: references.hamur(params, stored, x, domain_of(context), tasks),)


def adapt_dhm(strategy):
    params = {"layers": star_layers(strategy.network)}
    return (lambda x, context, tasks: references.adapt_dhm(params, array(strategy.centres), x, tasks),)


def adasparse(strategy):
    params = {"domain_embedding": array(strategy.embedding), "layers": mlp(strategy.network)}
    params["pruners"] = [array(one.kernel) for one in strategy.pruners]
    alpha = 1.0 if strategy.alpha is None else array(strategy.alpha)
    options = (alpha, strategy.mode, strategy.beta, strategy.threshold)
    return (lambda x, context, tasks: references.adasparse(params, x, domain_of(context), tasks, *options),)


of_domains = functools.partial(small, num_domains=cases.DOMAINS)
adasparse_of = functools.partial(of_domains, AdaSparse, units=(7, 4), embedding_features=3)
CASES = {
    "star": Case(of_domains(STAR, units=(7, 2), auxiliary_units=(2,), embedding_features=3), star),
    "sar_net": Case(of_domains(SARNet, num_shared=3, num_specific=2, expert_width=5, units=(7, 4)), sar_net),
    "sar_net, no shared experts": Case(of_domains(SARNet, num_shared=0, expert_width=4, units=()), sar_net),
    "hamur": Case(of_domains(HAMUR, units=(7, 4), adapter_width=3, rank=2, hyper_units=(5,)), hamur),
    "hamur, one adapter": Case(
        of_domains(HAMUR, units=(7, 4), adapter_layers=(0,), adapter_width=5, rank=3, hyper_units=()), hamur
    ),
    "adapt_dhm": Case(small(AdaptDHM, units=(7, 4), num_clusters=3), adapt_dhm),
    "adasparse": Case(adasparse_of(), adasparse),
    "adasparse, high threshold": Case(adasparse_of(threshold=0.9), adasparse),
    "adasparse, scaling": Case(adasparse_of(mode="scaling", beta=1.5), adasparse),
    "adasparse, binarisation": Case(adasparse_of(mode="binarisation", threshold=0.4), adasparse),
}
