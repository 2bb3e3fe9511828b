"""Published and recomputed values of all methods, and the rule by which a result counts as equal."""

import json
import pathlib

import numpy as np
import pytest

GOLDENS = json.loads((pathlib.Path(__file__).parent / "goldens.json").read_text())


def pytest_generate_tests(metafunc):
    """A test with an argument ``<method>_case`` runs once per golden case of that method."""
    for argument in metafunc.fixturenames:
        method = argument.removesuffix("_case")
        if argument != method and method in GOLDENS:
            cases = GOLDENS[method]
            names = [f"{number}: {case['note']}"[:60] for number, case in enumerate(cases)]
            metafunc.parametrize(argument, cases, ids=names)


@pytest.fixture
def matrices():
    """Jacobians that the goldens share: J2, J3, rank_deficient."""
    return {name: np.array(rows) for name, rows in GOLDENS["_meta"]["matrices"].items()}


@pytest.fixture
def assert_golden():
    """Largest difference at most tol times the largest expected value (or Jacobian entry, where that is 0)."""

    def check(actual, expected, case, dtype):
        tolerance = case["tol"] if dtype == np.float64 else max(case["tol"], 1e-4)
        scale = np.max(np.abs(expected)) or np.max(np.abs(case["jacobian"]))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)

    return check


@pytest.fixture(params=[np.float32, np.float64], ids=["f32", "f64"])
def dtype(request):
    """The type that a test runs in; float64 is switched on for its duration."""
    import jax

    with jax.enable_x64(request.param == np.float64):
        yield request.param
