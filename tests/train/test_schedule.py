"""The slanted triangular learning rate against numbers worked out by hand, and in training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtl_jax.config import build
from mtl_jax.errors import ConfigError
from mtl_jax.train import Optimizer, SlantedTriangular, fit
from mtl_jax.train.state import Functional


def written_out(peak, steps, share, ratio):
    """The rates of the steps before and a while after the end, one by one."""
    cut, rates = max(1, int(steps * share)), []
    for t in range(2 * steps + 20):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / share - 1))
        rates.append(peak * (1 + max(p, 0) * (ratio - 1)) / ratio)
    return np.array(rates)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.0003125), (5, 0.00515625), (10, 0.01), (55, 0.00515625), (100, 0.0003125), (101, 0.0003125), (10**6, 0.0003125)],
)  # fmt: skip
def test_rates_of_a_hundred_steps(step, rate):
    """Rising for 10 of them from a 32nd of the peak, falling for 90, and then as small as at first."""
    assert float(SlantedTriangular(0.01, 100)(step)) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(
    "numbers", [(0.01, 100, 0.1, 32.0), (2.0, 37, 0.3, 5.0), (1.0, 5, 0.1, 32.0), (0.5, 9, 0.99, 1.0)]
)
def test_rates_are_those_of_the_formula(numbers):
    """Also where the share of the steps is no whole number, or none at all; ``ratio`` 1 is a constant rate."""
    expected = written_out(*numbers)
    schedule = SlantedTriangular(*numbers)
    np.testing.assert_allclose([schedule(t) for t in range(len(expected))], expected, rtol=2e-5)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(len(expected))), expected, rtol=2e-5)
    assert expected.max() == pytest.approx(numbers[0]), "the peak is reached"
    assert float(schedule(len(expected))) == pytest.approx(numbers[0] / numbers[-1])


def test_equal_schedules_are_one_program():
    one, other = (Optimizer(learning_rate=SlantedTriangular(0.01, 100)).program() for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != Optimizer(learning_rate=SlantedTriangular(0.01, 101)).program()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cut_frac": 0.0}, r"cut_frac is 0.0; expected a number in \(0, 1\)"),
        ({"cut_frac": 1}, r"cut_frac is 1; expected a number in \(0, 1\)"),
        ({"ratio": 0.5}, r"ratio is 0.5; expected a number in \[1"),
        ({"ratio": "32"}, r"ratio is '32'; expected"),
        ({"peak_value": -0.1}, r"peak_value is -0.1; expected a number in \(0"),
        ({"decay_steps": 0}, r"decay_steps is 0; expected a whole number from 1"),
        ({"decay_steps": 2.5}, r"decay_steps is 2.5; expected a whole number"),
    ],
    ids=str,
)
def test_wrong_values_are_refused(option, message):
    with pytest.raises(ConfigError, match=rf"optimizer.learning_rate.{message}"):
        build({"_target_": "mtl_jax.train.SlantedTriangular", "peak_value": 0.1, "decay_steps": 10} | option,
              place="optimizer.learning_rate")  # fmt: skip


@pytest.mark.parametrize("tables", ["dense", "sparse"])
def test_training_goes_by_its_rates(tables, three_task_schema, make_data, make_model):
    """The same parameters as from a list of rates; the way down ends in the third of four epochs."""
    numbers, data = (0.05, 10, 0.3, 8.0), make_data(three_task_schema)
    rates = jnp.asarray(written_out(*numbers), jnp.float32)
    found = {}
    for name, rate in (("ours", SlantedTriangular(*numbers)), ("listed", lambda step: rates[step]), ("still", 0.05)):
        optimizer = dataclasses.replace(Optimizer(optax.identity()), learning_rate=rate)
        result = fit(
            make_model(data.schema), data, optimizer=optimizer, epochs=4, batch_size=13, patience=0,
            table_updates={"item": tables},
        )  # fmt: skip
        assert result.monitor["step"] == 16
        found[name] = Functional.of(result.model)[1]
    for path, array in found["listed"].items():
        np.testing.assert_allclose(found["ours"][path], array, rtol=1e-4, atol=1e-6, err_msg=path)
    assert any(np.max(np.abs(array - found["still"][path])) > 1e-2 for path, array in found["ours"].items())
