"""The two-task toy: published values of the problem, and where methods are known to end on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax.balancing as methods
from mtl_jax.analysis.toy import REACHED, distance_to_set, losses, pareto_set, trajectories, values_at
from mtl_jax.errors import ConfigError

# Starts of CAGrad, Nash-MTL and FAMO, and the losses there.
AT_STARTS = {
    (-8.5, 7.5): (6.552363, 7.900798),
    (-8.5, -5.0): (4.059918, -19.421502),
    (0.0, 0.0): (0.0, 0.0),
    (9.0, 9.0): (7.943949, 6.691495),
    (-7.5, -0.5): (0.388808, -4.754484),
    (9.0, -1.0): (-8.831059, 2.814293),
}
UPPER = ((-8.5, 7.5), (9.0, 9.0))


jacobian = jax.jit(jax.jacobian(losses))


def jacobian_at(point, kappa=1.0):
    with jax.enable_x64(True):
        return np.asarray(jacobian(jnp.array(point, float), kappa))


@functools.cache
def ends(name, **options):
    """(kappa, start) -> outcome, of 50,000 steps from the five starts."""
    found = trajectories(getattr(methods, name)(**options))
    return {(o["kappa"], tuple(o["start"])): o for o in found.outcomes()}


def test_published_losses_at_the_starts():
    np.testing.assert_allclose(values_at(np.array(list(AT_STARTS))), list(AT_STARTS.values()), atol=1e-6)


def test_kappa_is_the_unit_of_the_first_loss():
    points = np.array(list(AT_STARTS))
    np.testing.assert_allclose(values_at(points, 0.1), values_at(points) * [0.1, 1.0])


def test_published_jacobian():
    published = [[-0.285399, 0.007249], [-0.073992, 0.008739]]
    np.testing.assert_allclose(jacobian_at((-8.5, 7.5)), published, atol=1e-6)


def test_at_the_tie_of_the_maximum_both_losses_fall():
    """Half of that, or nothing, with the derivatives that other maxima have there."""
    np.testing.assert_allclose(jacobian_at((0.0, 0.0)), [[0, 10.856381]] * 2, atol=1e-6)


def test_the_logarithm_is_cut_at_the_bottom_of_a_valley():
    x2 = 1.0
    bottom = (-7 + 2 * np.tanh(x2), x2)  # where the first distance is 0
    first = values_at(np.array(bottom))[0]
    assert first == pytest.approx((np.log(5e-6) + 6) * np.tanh(x2 / 2))
    assert np.isfinite(jacobian_at(bottom)).all()


def test_published_minima_of_weighted_means():
    front = pareto_set(2001)
    for weight, point, at in (
        (0.5, (0.0, -8.3551), (-15.091638, -15.091638)),
        (0.2, (-4.2, -8.3849), (-7.451116, -19.205748)),
    ):
        nearest = front[np.argmin(np.abs(front[:, 0] - 7 * (2 * weight - 1)))]
        np.testing.assert_allclose(nearest, point, atol=5e-5)
        np.testing.assert_allclose(values_at(nearest), at, atol=1e-6)


@pytest.mark.parametrize("kappa", [1.0, 0.1])
def test_on_the_pareto_set_a_convex_combination_of_the_gradients_vanishes(kappa):
    for point in pareto_set(9)[1:-1]:
        first, second = jacobian_at(point, kappa)
        weight = second[0] / (second[0] - first[0])
        assert 0 < weight < 1
        np.testing.assert_allclose(weight * first + (1 - weight) * second, 0, atol=1e-12)


def test_no_point_of_a_grid_is_better_in_both_losses():
    axis = np.linspace(-10, 10, 101)
    grid = values_at(np.stack(np.meshgrid(axis, axis), axis=-1)).reshape(-1, 2)
    for value in values_at(pareto_set(9)):
        assert not (grid < value - 1e-9).all(axis=1).any()


def test_distances_to_the_set():
    front = pareto_set(7)
    np.testing.assert_allclose(distance_to_set(front), 0, atol=1e-5)
    np.testing.assert_allclose(distance_to_set(front + [0, 0.3]), 0.3, atol=1e-5)
    np.testing.assert_allclose(distance_to_set(np.array([[10.0, front[-1, 1]]])), 3.0, atol=1e-5)


def test_equal_is_adam_on_the_sum_of_the_losses():
    """Against a loop in NumPy, for both kappas and two starts."""
    starts, kappas, steps = [(-8.5, 7.5), (9.0, -1.0)], [1.0, 0.1], 60
    found = trajectories(methods.equal(), starts=starts, kappas=kappas, steps=steps, learning_rate=0.01, every=25)
    assert found.steps.tolist() == [0, 25, 50, 60]
    for k, kappa in enumerate(kappas):
        for s, start in enumerate(starts):
            x, mean, square, ways = np.array(start), 0.0, 0.0, [np.array(start)]
            for count in range(1, steps + 1):
                gradient = jacobian_at(x, kappa).sum(axis=0)
                mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
                x = x - 0.01 * (mean / (1 - 0.9**count)) / (np.sqrt(square / (1 - 0.999**count)) + 1e-8)
                ways.append(x)
            np.testing.assert_allclose(found.points[k, s], np.array(ways)[found.steps], rtol=1e-10)
            np.testing.assert_allclose(found.losses[k, s], values_at(found.points[k, s], kappa), rtol=1e-12)


def test_the_same_points_however_often_they_are_kept():
    often, seldom = (trajectories(methods.equal(), steps=600, every=every) for every in (50, 400))
    assert seldom.steps.tolist() == [0, 400, 600]
    np.testing.assert_array_equal(seldom.points, often.points[:, :, [0, 8, 12]])


def test_a_seed_is_a_draw():
    """PCGrad has one order with two tasks, so the draws that show are those of weights."""
    same, again, other = (trajectories(methods.random(), steps=200, seed=seed).points for seed in (0, 0, 1))
    np.testing.assert_array_equal(same, again)
    assert np.abs(same - other)[:, :, -1].max() > 1e-3


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_methods_of_several_batches_get_the_same_one_for_each(name):
    found = trajectories(getattr(methods, name)(), starts=[(9.0, -1.0)], steps=500)
    assert (found.losses[:, 0, -1].sum(axis=-1) < found.losses[:, 0, 0].sum(axis=-1)).all()


@pytest.mark.parametrize("kappa", [1.0, 0.1])
def test_mgda_reaches_the_pareto_set_from_everywhere(kappa):
    reached = {start: o for (k, start), o in ends("mgda").items() if k == kappa}
    assert len(reached) == 5
    assert all(o["distance"] <= REACHED and o["nonfinite"] is None for o in reached.values())


def test_equal_weights_stay_in_the_valleys_of_the_upper_half():
    for start in UPPER:
        assert ends("equal")[1.0, start]["end"][1] > 0
        assert ends("equal")[1.0, start]["arrived"] is None
    for start in ((0.0, 0.0), (-7.5, -0.5), (9.0, -1.0)):
        np.testing.assert_allclose(ends("equal")[1.0, start]["end"], (0.0, -8.355), atol=0.01)


def test_equal_weights_follow_the_units_of_the_losses():
    """With the first loss in tenths, weights 1/11 and 10/11 of the original ones: x1 = 7 (2/11 - 1)."""
    arrived = [o for (kappa, _), o in ends("equal").items() if kappa == 0.1 and o["arrived"] is not None]
    assert len(arrived) == 4
    for outcome in arrived:
        assert outcome["end"][0] == pytest.approx(7 * (2 / 11 - 1), abs=0.01)


def test_famo_reaches_the_middle_of_the_set_from_everywhere():
    """With the bounds that the problem has, and no weight decay, as its authors run it."""
    outcomes = ends("famo", weight_decay=0.0)
    assert len(outcomes) == 10
    for outcome in outcomes.values():
        assert outcome["distance"] <= REACHED and abs(outcome["end"][0]) < 2


def test_famo_is_given_bounds_in_the_units_of_the_losses_and_keeps_its_own():
    bounded = trajectories(methods.famo(), kappas=[0.1], steps=300)
    own = trajectories(methods.famo(bound={"L1": -2.1, "L2": -21.0}), kappas=[0.1], steps=300)
    np.testing.assert_allclose(bounded.points, own.points, rtol=1e-12)
    without = trajectories(methods.famo(), kappas=[0.1], steps=300, bounds=None)
    assert (without.stopped[0] < 300).tolist() == [False, True, False, True, True]  # a loss <= 0 at or after the start


@pytest.mark.parametrize("name", ["geometric", "scale_invariant", "db_mtl", "gradnorm"])
def test_logarithms_and_ratios_of_losses_end_in_a_step_that_is_not_finite(name):
    """The losses change their sign on the way to the set; from two starts one of them has from the first step on."""
    found = trajectories(getattr(methods, name)(), steps=4000)
    assert (found.stopped < 4000).all()
    assert (found.stopped[:, 3:] == 0).all()
    assert np.isfinite(found.points).all() and np.isfinite(found.losses).all()
    for way, stopped in zip(found.points.reshape(-1, 41, 2), found.stopped.ravel(), strict=True):
        np.testing.assert_array_equal(
            way[found.steps >= stopped], way[-1][None].repeat((found.steps >= stopped).sum(), 0)
        )
    assert all(o["arrived"] is None and o["nonfinite"] is not None for o in found.outcomes())


def test_nash_mtl_goes_the_same_way_in_any_unit_of_the_losses():
    found = trajectories(methods.nash_mtl(), steps=300)
    np.testing.assert_allclose(found.points[0, [0, 2, 3, 4]], found.points[1, [0, 2, 3, 4]], atol=1e-6)


@pytest.mark.slow
def test_nash_mtl_reaches_the_set_from_everywhere_at_the_same_place_in_any_unit():
    """It arrives at one place; once there, steps of length 1 jitter along the set, and rounding tells the units apart."""
    found = trajectories(methods.nash_mtl())
    outcomes = found.outcomes()
    assert all(o["distance"] <= REACHED and o["nonfinite"] is None for o in outcomes)
    distances = distance_to_set(found.points)
    first = np.argmax((distances <= REACHED).all(axis=0), axis=-1)
    for start, kept in enumerate(first):
        np.testing.assert_allclose(found.points[0, start, kept], found.points[1, start, kept], atol=0.01)
        np.testing.assert_allclose(found.points[0, start, -1], found.points[1, start, -1], atol=0.05)


@pytest.mark.parametrize(
    ("balancer", "options", "words"),
    [
        (methods.dwa(), {}, "waits for the end of an epoch.*period"),
        (methods.krum(), {}, "got 2 tasks; expected at least 4"),
        (methods.fixed(weights={"a": 1.0, "b": 1.0}), {}, r"\['L1', 'L2'\]"),
        (methods.nash_mtl, {}, "Call the method first"),
        (methods.equal(), {"starts": [(1.0, 2.0, 3.0)]}, "toy.starts.*pairs of numbers"),
        (methods.equal(), {"starts": []}, "toy.starts.*pairs of numbers"),
        (methods.equal(), {"starts": ["ab"]}, "toy.starts"),
        (methods.equal(), {"kappas": []}, "toy.kappas is empty"),
        (methods.equal(), {"kappas": [0.0]}, "toy.kappas is 0.0"),
        (methods.equal(), {"bounds": [-21.0]}, "toy.bounds.*pairs of numbers"),
        (methods.equal(), {"steps": 0}, "toy.steps is 0"),
        (methods.equal(), {"every": 0}, "toy.every is 0"),
        (methods.equal(), {"learning_rate": 0.0}, "toy.learning_rate is 0.0"),
    ],
)
def test_mistakes_are_named_before_anything_runs(balancer, options, words):
    with pytest.raises(ConfigError, match=words):
        trajectories(balancer, **options)


@pytest.mark.parametrize("balancer", [methods.dwa(period=50), methods.m_config()], ids=["dwa", "m_config"])
def test_methods_that_count_their_steps_go_through(balancer):
    found = trajectories(balancer, starts=[(9.0, -1.0)], kappas=[1.0], steps=200)
    assert found.stopped.tolist() == [[200]] and found.losses[0, 0, -1].sum() < found.losses[0, 0, 0].sum()
