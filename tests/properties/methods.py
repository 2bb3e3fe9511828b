"""All methods under test, each with the NumPy loop that it is held against, and how a training of one runs.

A new method is one row of ``METHODS`` and one function of ``formulas.py``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import formulas
import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import balancing
from mtl_jax.balancing import Balancer
from mtl_jax.balancing.base import combine, weigh
from mtl_jax.balancing.graddrop import draw_uniform
from mtl_jax.balancing.pcgrad import draw_orders
from mtl_jax.balancing.rows import combine_rows

NUM_TASKS, NUM_PARAMS, NUM_STEPS = 8, 50, 3
FIXED = np.array([0.5, 1.0, 0.0, 2.0, 0.25, 4.0, 1.5, 3.0])
INITIAL = np.linspace(-1.0, 1.0, NUM_TASKS)
SHARES = np.linspace(0.05, 0.2, NUM_TASKS)


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """One balancer under test.

    Attributes:
      run_axis: Balancers that differ in numeric hyperparameters only; the first is the one that the suite tests.
      reference: Makes the step of ``formulas.py`` with the same options.
      draw: (key) -> what a stochastic method draws.
      linear: Whether the direction is linear in positive factors of the rows.
      ordered: Why the order of the tasks matters, where it does.
      agrees: Cases whose direction conflicts with no task (``chosen`` of test_balancers.py).
      gain: Length of the direction for equal gradients, relative to what ``Balancer.scaling`` says.
      instant: Whether the direction depends on the last step alone, which spares the reference the others.
      unsettled: Where rounding decides the direction (``settled`` there): with gradients ``near stationary``, where a
        mixture of them vanishes, ``nearly dependent`` or ``dependent``, ``ill-conditioned`` by angles and
        lengths, or with distances that are ``tied``.
      tolerance: Of the direction in float64.
    """

    run_axis: tuple[Balancer, ...]
    reference: Callable
    draw: Callable | None = None
    linear: bool = False
    ordered: str = ""
    agrees: str = ""
    gain: float = 1.0
    instant: bool = False
    unsettled: str = ""
    tolerance: float = 1e-8


def method(factory, formula=None, /, *, second=None, **options):
    formula = formula or getattr(formulas, factory.__name__)
    known = inspect.signature(formula).parameters
    facts = {field.name: options.pop(field.name) for field in dataclasses.fields(Method)[2:] if field.name in options}
    return Method(
        (factory(**options), factory(**options | (second or {}))),
        functools.partial(formula, **{name: value for name, value in options.items() if name in known}),
        **facts,
    )


def orders(key):
    return draw_orders(key, NUM_TASKS)


METHODS = {
    "equal": method(balancing.equal, linear=True),
    "equal_mean": method(balancing.equal, reduction="mean", linear=True),
    "fixed": method(balancing.fixed, weights=FIXED, second={"weights": 2 * FIXED + 1}, linear=True),
    "uncertainty": method(
        balancing.uncertainty,
        likelihood="regression",
        initial=INITIAL,
        weight_lr=0.3,
        second={"weight_lr": 0.01},
        linear=True,
    ),
    "imtl_l": method(balancing.imtl_l, weight_lr=0.3, second={"weight_lr": 0.01}, linear=True),
    "dwa": method(balancing.dwa, temperature=2.0, period=1, second={"temperature": 0.5}, linear=True),
    "geometric": method(balancing.geometric, linear=True),
    "scale_invariant": method(balancing.scale_invariant, linear=True),
    "random": method(balancing.random, draw=lambda key: jax.random.normal(key, (NUM_TASKS,), float), linear=True),
    "stch": method(balancing.stch, mu=0.5, preference=SHARES, reference=-0.1, second={"mu": 0.1}, linear=True),
    "stch_log_nadir": method(
        balancing.stch,
        formulas.stch_log_nadir,
        transform="log_nadir",
        mu=0.5,
        warmup=2,
        period=1,
        second={"mu": 0.1},
        linear=True,
    ),
    "cosmos": method(balancing.cosmos, lambda_=1.0, second={"lambda_": 0.1}, linear=True),
    "pbi": method(balancing.pbi, theta=5.0, second={"theta": 1.0}, linear=True),
    "famo": method(
        balancing.famo, weight_lr=0.3, weight_decay=0.01, bound=-0.1, second={"weight_lr": 0.1}, linear=True
    ),
    "go4align": method(balancing.go4align, num_groups=3, eta=0.1, second={"eta": 0.3}, linear=True),
    "ldc_mtl": method(
        balancing.ldc_mtl, lambda_=0.3, weight_lr=0.3, second={"lambda_": 0.1}, linear=True, ordered="neighbours"
    ),
    "ple_schedule": method(
        balancing.ple_schedule,
        initial=FIXED,
        decay=5 * SHARES,
        period=1,
        second={"initial": 2 * FIXED + 1},
        linear=True,
    ),
    "gradnorm": method(balancing.gradnorm, alpha=1.5, weight_lr=0.3, second={"alpha": 0.5}),
    "mgda": method(balancing.mgda, agrees="all", instant=True),
    "mgda_loss+": method(balancing.mgda, normalize="loss+", instant=True, unsettled="near stationary"),
    "pcgrad": method(balancing.pcgrad, draw=orders, linear=True, agrees="two"),
    # The sine of an angle close to 0, from its cosine, has half of the digits.
    "gradvac": method(balancing.gradvac, beta=0.3, second={"beta": 0.5}, draw=orders, tolerance=1e-7),
    "cagrad": method(balancing.cagrad, c=0.5, second={"c": 0.1}, gain=1.5, instant=True, unsettled="near stationary"),
    "cagrad_1": method(
        balancing.cagrad, c=1.0, second={"c": 0.1}, gain=2.0, agrees="away", instant=True, unsettled="near stationary"
    ),
    "imtl_g": method(balancing.imtl_g, agrees="independent", unsettled="nearly dependent"),
    "imtl": method(balancing.imtl, weight_lr=0.3, second={"weight_lr": 0.1}, unsettled="nearly dependent"),
    "graddrop": method(
        balancing.graddrop,
        leak=INITIAL**2,
        second={"leak": 1 - INITIAL**2},
        draw=lambda key: draw_uniform(key, jnp.zeros((NUM_TASKS, NUM_PARAMS), float)),
    ),
    "nash_mtl": method(
        balancing.nash_mtl, max_norm=1.0, reg_eps=1e-6, second={"max_norm": 0.5}, agrees="away", instant=True
    ),
    "fairgrad": method(balancing.fairgrad, alpha=2.0, reg_eps=1e-6, second={"alpha": 1.0}, agrees="away", instant=True),
    "aligned_mtl": method(balancing.aligned_mtl, second={"preference": 2.0}, unsettled="nearly dependent"),
    "moco": method(
        balancing.moco,
        beta=0.5,
        beta_sigma=0.5,
        gamma=1e-3,
        gamma_sigma=0.5,
        rho=0.1,
        second={"gamma": 1e-2},
        gain=1 - 0.5 * (1 - 0.5**1.5) * (1 - 0.5 * 3**-0.5),
    ),
    "modo": method(balancing.modo, gamma=1e-3, rho=0.1, second={"gamma": 1e-2}),
    "sdmgrad": method(
        balancing.sdmgrad, lambda_=0.3, inner_lr=0.5, momentum=0.5, num_iterations=5, second={"inner_lr": 0.1}
    ),
    "db_mtl": method(balancing.db_mtl, beta=0.9, sigma=0.5, second={"beta": 0.5}, gain=1 - 0.9**3 * 2**-0.5 * 3**-0.5),
    "excess_mtl": method(balancing.excess_mtl, eta=0.5, num_warmup=1, second={"eta": 0.1}),
    "upgrad": method(balancing.upgrad, second={"reg_eps": 0.1}, linear=True, agrees="all", instant=True),
    "dual_proj": method(balancing.dual_proj, second={"reg_eps": 0.1}, agrees="all", instant=True),
    "config": method(
        balancing.config,
        preference=FIXED + 0.5,
        second={"preference": INITIAL + 2},
        linear=True,
        agrees="independent",
        unsettled="nearly dependent",
    ),
    "m_config": method(
        balancing.m_config,
        beta_1=0.9,
        beta_2=0.99,
        tasks_per_call=4,
        second={"beta_1": 0.5},
        ordered="turns",
        unsettled="dependent",
    ),
    "metabalance": method(balancing.metabalance, relax=0.7, beta=0.9, second={"relax": 0.1}, ordered="main task first"),
    "krum": method(balancing.krum, num_byzantine=1, num_selected=2, unsettled="tied"),
    "trimmed_mean": method(balancing.trimmed_mean, trim=1),
    "cr_mogm": method(
        balancing.cr_mogm,
        functools.partial(formulas.cr_mogm, formulas.shortest_mixture),
        base=balancing.mgda(),
        alpha=0.6,
        second={"alpha": 0.1},
        unsettled="near stationary",
    ),
    "pe_ltr": method(
        balancing.pe_ltr,
        min_weight=SHARES / 2,
        second={"min_weight": SHARES / 4},
        instant=True,
        unsettled="ill-conditioned",
    ),
    "ntkmtl": method(balancing.ntkmtl, exponent=0.5, second={"exponent": 0.3}),
}


def train(balancer, jacobians, losses, active, key):
    """Weights (0 of a method without), direction and state of the last step."""

    def step(state, batch):
        jacobian, loss, after = batch
        draw = key if balancer.stochastic else None
        if balancer.needs == "jacobian":
            weights = jnp.zeros_like(loss)
            direction, state, _ = combine(balancer, jacobian, loss, state, draw, active)
        else:
            products = balancer.products(jacobian) if balancer.needs == "gramian" else None
            weights, state, _ = weigh(balancer, products, loss, state, draw, active)
            direction = combine_rows(weights, jacobian if balancer.num_batches == 1 else jacobian[-1])
        if balancer.observes:
            state = balancer.observe(after, state, active=active)
        return state, (weights, direction)

    state = balancer.init(jacobians.shape[1], jnp.zeros(jacobians.shape[2]))
    batches = batches_of(balancer, jacobians), losses, jnp.roll(losses, -1, axis=0)
    state, results = jax.lax.scan(step, state, batches)
    return *(values[-1] for values in results), state


def batches_of(balancer, jacobians):
    """What the steps get: the Jacobian of each, or for several batches a step all of them in turn."""
    if balancer.num_batches == 1:
        return jacobians
    return jnp.stack([jnp.roll(jacobians, -number, axis=0) for number in range(NUM_STEPS)])
