"""The cases of strategies that read the domain of a row, or a prior."""

import cases
import numpy as np
import references_domains as references

from mtl_jax.sharing import MMoE
from mtl_jax.sharing.epnet import EPNet
from mtl_jax.sharing.m2m import M2M
from mtl_jax.sharing.m3oe import M3oE
from mtl_jax.sharing.ppnet import PPNet

Case, array, bank, by_task, gate, layer, mlp, small = (
    getattr(cases, name) for name in ("Case", "array", "bank", "by_task", "gate", "layer", "mlp", "small")
)
DOMAINS, PRIOR = cases.DOMAINS, cases.PRIOR


def prior_of(context):
    return np.asarray(context.prior, np.float64)


def stack(variable):
    return list(array(variable))


# From modules to the parameters of references, which a function of x, context and tasks then reads


def meta_unit(*units):
    """Of one unit, or of several that each read a part of the input and add up."""
    kernel = np.concatenate([array(unit.kernel) for unit in units], axis=1)
    kernel_bias = np.concatenate([array(unit.kernel_bias) for unit in units])
    bias, bias_bias = layer(units[0].bias)
    flat = {"kernel": kernel.reshape(len(kernel), -1), "kernel_bias": kernel_bias.reshape(-1)}
    return flat | {"bias": bias, "bias_bias": bias_bias}


def m2m(strategy):
    meta = strategy.meta
    params = {
        "domain_embedding": stack(strategy.embedding),
        "scenario_mlp": mlp(strategy.scenario),
        "task_embedding": by_task(strategy, lambda own: array(own["embedding"])),
        "task_mlp": mlp(meta.view),
        "experts": bank(strategy.experts),
        "attention": meta_unit(strategy.of_experts, meta.of_task),
        "tower": meta_unit(meta.tower),
        "nu": array(meta.nu.kernel)[:, 0],
    }
    return (lambda x, context, tasks: references.m2m(params, x, context.domain, tasks, slope=strategy.slope),)


def gate_nu(module):
    return {"hidden": layer(module.hidden), "output": layer(module.output)}


def epnet_params(strategy):
    return {"domain_embedding": stack(strategy.embedding), "gate": gate_nu(strategy.gate)}


def epnet_mmoe(strategy):
    params, gamma = epnet_params(strategy), strategy.gate.gamma
    experts, gates = bank(strategy.inner.experts), by_task(strategy.inner, gate)

    def expected(x, context, tasks):
        return cases.references.mmoe(references.epnet(params, x, context.domain, gamma), tasks, experts, gates)

    return (expected,)


def ppnet_params(strategy):
    def network(own):
        return {"layers": mlp(own), "gates": [gate_nu(one) for one in own.gates]}

    return by_task(strategy, network)


def ppnet(strategy):
    params, gamma = ppnet_params(strategy), strategy.task[strategy.tasks[0]].gates[0].gamma
    return (lambda x, context, tasks: references.ppnet(params, x, prior_of(context), tasks, gamma),)


def pepnet(strategy):
    params = {"epnet": epnet_params(strategy), "ppnet": ppnet_params(strategy.inner)}
    return (lambda x, context, tasks: references.pepnet(params, x, context.domain, prior_of(context), tasks),)


def m3oe(strategy):
    def psi(module):
        kernel, bias = layer(module.layers[0])
        return {"kernel": kernel, "bias": bias} | dict(
            zip(("gain", "norm_bias"), cases.norm(module.norms[0]), strict=True)
        )

    star = strategy.star
    params = {
        "star": {
            "kernel": array(star.kernel),
            "bias": array(star.bias),
            "domain_kernel": stack(star.own_kernel),
            "domain_bias": stack(star.own_bias),
        },
        "psi": psi(strategy.psi),
        "psi_x": psi(strategy.detour),
        "shared": bank(strategy.shared),
        "domain_experts": bank(strategy.of_domains),
        "task_experts": dict(zip(strategy.tasks, bank(strategy.of_tasks), strict=True)),
        "gates": by_task(strategy, lambda own: stack(own.kernel)),
    } | {name: array(getattr(strategy, name)) for name in ("a_d", "a_t", "b_d", "b_t")}
    return (lambda x, context, tasks: references.m3oe(params, x, context.domain, tasks, strategy.psi.norms[0].epsilon),)


def in_domains(kind, **options):
    return small(kind, num_domains=DOMAINS, **options)


INNER = {"mmoe": small(MMoE, num_experts=3, expert_units=(7, 4)), "ppnet": small(PPNet, units=(7, 4))}
CASES = {
    "m2m": Case(
        in_domains(
            M2M,
            num_experts=3,
            expert_units=(4,),
            embedding_features=3,
            domain_units=(5,),
            task_features=3,
            task_units=(6,),
        ),
        m2m,
    ),
    "epnet": Case(in_domains(EPNet, inner=INNER["mmoe"], embedding_features=3), epnet_mmoe),
    "epnet, wider gate": Case(in_domains(EPNet, inner=INNER["mmoe"], embedding_features=3, gamma=3.0), epnet_mmoe),
    "ppnet": Case(small(PPNet, prior_features=PRIOR, units=(7, 4)), ppnet),
    "ppnet, narrower gates": Case(small(PPNet, prior_features=PRIOR, units=(7, 5, 4), gamma=1.0), ppnet),
    "pepnet": Case(in_domains(EPNet, inner=INNER["ppnet"], prior_features=PRIOR, embedding_features=3), pepnet),
    "m3oe": Case(in_domains(M3oE, num_experts=3, star_units=5, hidden_units=5, expert_units=(4,)), m3oe),
}
