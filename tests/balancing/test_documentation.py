"""docs/balancing.md says of every method what the method says of itself."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import mtl_jax.balancing as methods
from mtl_jax import train

PAGE = (Path(__file__).parents[2] / "docs" / "balancing.md").read_text(encoding="utf-8")
NO_METHOD = ("aggregate", "as_optax")
FACTORIES = sorted(name for name in methods.__all__ if name.islower() and name not in NO_METHOD)
OWN_STEP = ("auto_lambda", "forum", "moml", "ntkmtl_sr", "samo")
GIVEN = {
    "fixed": lambda: methods.fixed(weights=[1.0, 2.0]),
    "cr_mogm": lambda: methods.cr_mogm(methods.mgda()),
    "samo": lambda: train.samo(methods.mgda()),
}
SECTIONS = {
    "From losses": "losses",
    "From the Gramian": "gramian",
    "From two batches": "gramian",
    "Entry by entry": "jacobian",
}


def made(name):
    return GIVEN.get(name, getattr(train if name in OWN_STEP else methods, name))()


def listed():
    """Method -> (title of its table, cells of its row)."""
    found = {}
    for title, text in re.findall(r"^### ([^:\n]+):[^\n]*\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL):
        for row in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
            name, *cells = (cell.strip() for cell in row.strip("|").split("|"))
            found[name.strip("` ")] = title, cells
    return found


def test_every_method_has_a_row():
    assert set(FACTORIES) | set(OWN_STEP) <= set(listed())


@pytest.mark.parametrize("name", OWN_STEP)
def test_the_row_of_a_method_that_owns_the_step_is_true(name):
    balancer, (title, cells) = made(name), listed()[name]
    assert title == "With gradients of its own" and balancer.owns_step
    assert cells[3] == ("as the other" if name == "samo" else balancer.scaling)


@pytest.mark.parametrize("name", FACTORIES)
def test_the_row_is_true(name):
    balancer, (title, cells) = made(name), listed()[name]
    assert balancer.needs == SECTIONS[title]
    assert (balancer.num_batches > 1) == (title == "From two batches")
    length = cells[3]
    assert length == ("as the other" if name == "cr_mogm" else balancer.scaling)


def test_heads_of_methods_from_losses_are_weighted_but_for_the_three_named():
    weighted = {name for name in FACTORIES if made(name).weighted_heads}
    from_losses = {name for name in FACTORIES if made(name).needs == "losses"}
    assert from_losses - weighted == {"cosmos", "pbi", "ldc_mtl"} and weighted <= from_losses


def test_the_refusals_name_the_methods_that_they_concern():
    assert {name for name in FACTORIES if made(name).has_parameter_state} <= {
        "moco", "db_mtl", "excess_mtl", "m_config", "metabalance"
    }  # fmt: skip
    assert {name for name in FACTORIES if made(name).min_tasks > 1} == {"krum", "trimmed_mean"}
    assert {name for name in FACTORIES if made(name).by_epoch} == {"dwa", "ple_schedule"}
    assert methods.stch(transform="log_nadir").by_epoch


def test_the_diagnostics_name_the_methods_that_have_them():
    def reporting(key):
        states = {name: made(name).init(max(2, made(name).min_tasks), jnp.zeros(3)) for name in FACTORIES}
        return {name for name, state in states.items() if key in made(name).diagnostics(state)}

    solved = re.search(r"`solver_misses` \| of (.*?); misses", PAGE)[1]
    assert reporting("solver_residual") - {"cr_mogm"} == set(re.findall(r"`(\w+)`", solved))
    assert reporting("imtl_guard") == {"imtl_g", "imtl"}
