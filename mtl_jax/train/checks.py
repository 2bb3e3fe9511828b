"""Checks: options of a step that do not go together, refused before anything is compiled."""

from mtl_jax.balancing import Balancer
from mtl_jax.balancing.equal import Equal
from mtl_jax.errors import ConfigError
from mtl_jax.train.adaptation import Adaptation
from mtl_jax.train.gradients import BalancingOptions, acts_on_units
from mtl_jax.train.state import Functional

PRECISIONS = ("float32", "bfloat16")


def check_adaptation(adaptation: Adaptation, functional: Functional, average: float | None = None) -> None:
    """Raises a ConfigError for a model or an average that an adaptation cannot work with."""
    if adaptation.afresh and average:
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' goes back at the end of an epoch, and trainer.average={average} would "
            "keep what it comes from; expected null. Change it"
        )
    if (adaptation.source_batches or adaptation.episodes) and functional.state_paths:
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' takes gradient steps inside of a step, and this sharing keeps "
            "statistics of whole batches, which would mix rows that it keeps apart; expected layers without them. Choose "
            "another sharing"
        )


def check_episodes(
    adaptation: Adaptation, balancer: Balancer, options: BalancingOptions, micro_batches: int = 1
) -> None:
    """Raises a ConfigError for options that take a batch apart, where its rows come by domain."""
    name = type(balancer).__name__
    found = {
        f"trainer.micro_batches={micro_batches}": micro_batches > 1,
        f"balancing.row_stride={options.row_stride}": options.row_stride > 1,
        f"balancing '{name}', which compares parts of a batch": balancer.num_batches * balancer.num_parts > 1,
        f"balancing '{name}' at scope 'representation'": acts_on_units(balancer, options),
        f"balancing '{name}', which takes steps of its own": balancer.owns_step,
    }
    if wrong := [what for what, is_so in found.items() if is_so]:
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' takes the rows of a step by domain, and there is {wrong[0]}; expected "
            "a method that weighs the gradients of a whole batch. Change it"
        )
    if adaptation.interpolates and not isinstance(balancer, Equal):
        raise ConfigError(
            f"transfer '{type(adaptation).__name__}' goes to where training on one domain ends, and balancing is '{name}'; "
            "expected balancing=equal. Change it"
        )


def check_numerics(precision: str, average: float | None) -> None:
    """Raises a ConfigError for an unknown precision, or a decay outside of (0, 1)."""
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision is '{precision}'; expected one of {list(PRECISIONS)}. Change it")
    if average is not None and not 0 < average < 1:
        raise ConfigError(f"trainer.average is {average}; expected a decay in (0, 1), or null. Change it")
