"""Steps of several domains: which rows they have, and how these lie in a batch."""

import itertools

import numpy as np
import pytest

from mtl_jax.data.batching import episode_order
from mtl_jax.errors import ConfigError
from mtl_jax.train import Member
from mtl_jax.train.setup import Setup
from mtl_jax.transfer import MAML, MLDG, DomainNegotiation, DomainRegularisation, Reptile

DOMAIN = np.repeat([7, 3, 5], [12, 20, 5])
"""Names that are neither sorted nor consecutive; of 12, 20 and 5 rows."""
ALL = {"num_domains": 3, "blocks": 2, "block_size": 4, "seed": 1}


def domains_of(order):
    """Step -> place -> the one domain of its rows."""
    names = np.where(order >= 0, DOMAIN[order], -1).reshape(*order.shape[:2], -1)
    assert all(len(set(place) - {-1}) == 1 for step in names for place in step)
    return names.max(axis=-1)


def rows_of(order, name):
    """The rows of a domain, step by step."""
    return [order[step, list(places).index(name)] for step, places in enumerate(domains_of(order)) if name in places]


def test_a_place_has_rows_of_one_domain_in_disjoint_blocks_and_all_domains_are_there():
    order = episode_order(DOMAIN, steps=12, **ALL)
    assert order.shape == (12, 3, 2, 4) and order.dtype == np.int32
    for step, places in zip(order, domains_of(order), strict=True):
        assert sorted(places) == [3, 5, 7]
        rows = step[step >= 0]
        assert len(rows) == len(set(rows))
    assert len({tuple(places) for places in domains_of(order)}) > 1, "in random order"


@pytest.mark.parametrize(("name", "steps"), [(7, 2), (3, 3), (5, 1)])
def test_a_domain_passes_through_all_of_its_rows_before_one_comes_again(name, steps):
    """Of 8 rows in a step each: so many steps are a pass, and the next one has another order."""
    order = episode_order(DOMAIN, steps=12, **ALL)
    passes = np.reshape(rows_of(order, name), (12 // steps, -1))
    for rows in passes:
        assert sorted(rows[rows >= 0]) == np.flatnonzero(DOMAIN == name).tolist()
    assert len({rows.tobytes() for rows in passes}) > 2


def test_the_blocks_of_a_domain_share_what_there_is():
    """The 5 rows of the smallest are 3 and 2, and a pass that ends with 4 gives each block 2; the rest is padding."""
    order = episode_order(DOMAIN, steps=6, **ALL)
    assert [(rows >= 0).sum(axis=-1).tolist() for rows in rows_of(order, 5)] == [[3, 2]] * 6
    assert [(rows >= 0).sum(axis=-1).tolist() for rows in rows_of(order, 3)] == [[4, 4], [4, 4], [2, 2]] * 2


def test_of_some_domains_each_is_drawn_as_often_as_another():
    order = episode_order(DOMAIN, steps=600, **ALL | {"num_domains": 2})
    chosen = domains_of(order)
    assert all(one != other for one, other in chosen)
    counts = [np.sum(chosen == name) for name in (3, 5, 7)]
    assert sum(counts) == 1200 and np.all(np.abs(np.array(counts) - 400) < 5 * np.sqrt(600 * 2 / 9))
    for name in (3, 5, 7):
        drawn = np.concatenate([rows[rows >= 0] for rows in rows_of(order, name)])
        assert set(drawn) == set(np.flatnonzero(DOMAIN == name))


def test_a_step_is_a_function_of_the_seed_and_its_number():
    whole = episode_order(DOMAIN, steps=9, **ALL | {"num_domains": 2})
    for first in (1, 4, 8):
        part = episode_order(DOMAIN, steps=9 - first, first=first, **ALL | {"num_domains": 2})
        np.testing.assert_array_equal(part, whole[first:])
    assert np.any(episode_order(DOMAIN, steps=9, **ALL | {"num_domains": 2, "seed": 2}) != whole)


@pytest.fixture
def setup_of(make_data):
    """(adaptation, num_train, ...) -> setup for rows of three domains."""
    return lambda adaptation, rows=40, **options: Setup.of(
        make_data(rows, domains=3), adaptation=adaptation, **{"batch_size": 12} | options
    )


@pytest.mark.parametrize(
    ("strategy", "domains", "blocks"),
    [(MAML(), 3, 2), (MAML(num_domains=2), 2, 2), (MLDG(), 3, 1), (Reptile(num_steps=3), 3, 3)],
    ids=str,
)
def test_rows_of_domains_and_blocks_take_turns_in_a_batch(strategy, domains, blocks, setup_of, make_model):
    """Row i belongs to block i mod (domains * blocks); the rows of a step are no more than a batch."""
    setup = setup_of(strategy)
    member = Member(make_model, adaptation=strategy)
    each = 12 // (domains * blocks)
    size = each * domains * blocks
    domain = setup.data.train.domain
    for epoch in (0, 1):
        order = setup.order(member, epoch)
        assert order.shape == (-(-40 // size), size) and setup.padded_size(member) == size
        expected = episode_order(
            domain,
            steps=len(order),
            num_domains=domains,
            blocks=blocks,
            block_size=each,
            seed=0,
            first=epoch * len(order),
        ).reshape(len(order), domains * blocks, each)
        for place in range(domains * blocks):
            np.testing.assert_array_equal(order[:, place :: domains * blocks], expected[:, place])


def test_an_epoch_has_at_least_so_many_steps(setup_of, make_model):
    order = setup_of(MAML(), epoch_steps=9).order(Member(make_model), 0)
    assert order.shape == (9, 12)


def test_domain_negotiation_visits_all_rows_of_a_domain_and_then_those_of_another(setup_of, make_model):
    """Of 10, 10 and 20 rows, in batches of 12 and in a new order in every epoch."""
    setup, member = setup_of(DomainNegotiation()), Member(make_model, seed=3)
    domain, visited = setup.data.train.domain, set()
    for epoch in range(6):
        order = setup.order(member, epoch)
        assert order.shape == (4, 12)
        assert sorted(order[order >= 0]) == list(range(40))
        names = [set(domain[step[step >= 0]]) for step in order]
        assert all(len(of_step) == 1 for of_step in names)
        names = [name for (name,) in names]
        assert sorted(names) == [0, 1, 2, 2] and len([name for name, _ in itertools.groupby(names)]) == 3
        visited.add(tuple(names))
        np.testing.assert_array_equal(order, setup.order(member, epoch))
    assert len(visited) > 2


def test_domain_negotiation_passes_several_times_over_a_domain_where_an_epoch_has_more_steps(setup_of, make_model):
    setup = setup_of(DomainNegotiation(), epoch_steps=7)
    order = setup.order(Member(make_model), 0)
    assert len(order) == 8
    assert np.all(np.unique(order[order >= 0], return_counts=True)[1] == 2)
    names = [setup.data.train.domain[step[0]] for step in order]
    assert len(list(itertools.groupby(names))) == 3


def test_domain_regularisation_visits_a_domain_of_the_source_and_then_the_target(setup_of, make_rows, make_model):
    """Another one from epoch to epoch; rows of the source come after the 40 of the target."""
    source = make_rows(16, 30, domains=3)
    setup, member = setup_of(DomainRegularisation(), source=source), Member(make_model, seed=2)
    helpers = set()
    for epoch in range(8):
        rows = setup.order(member, epoch)
        rows = rows[rows >= 0]
        helper, target = rows[:-40], rows[-40:]
        assert sorted(target) == list(range(40))
        (name,) = set(source.domain[helper - 40])
        assert sorted(helper - 40) == np.flatnonzero(source.domain == name).tolist()
        helpers.add(name)
    assert helpers == {0, 1, 2}


@pytest.mark.parametrize("strategy", [MAML(), MLDG(), Reptile(), DomainNegotiation()], ids=str)
def test_one_domain_is_none_to_learn_over(strategy, make_data):
    name = type(strategy).__name__
    for domains in (0, 1):
        with pytest.raises(
            ConfigError, match=f"'{name}' learns from several domains and the training rows have {domains}"
        ):
            Setup.of(make_data(domains=domains), adaptation=strategy)


def test_a_step_has_no_more_domains_than_there_are(setup_of):
    with pytest.raises(ConfigError, match="transfer.num_domains is 4 and the training rows have 3 domains"):
        setup_of(MAML(num_domains=4))
    assert setup_of(MAML(num_domains=2)).adaptation.episodes == (2, 2)
    assert setup_of(Reptile(num_steps=5)).adaptation.episodes == (3, 5)
    with pytest.raises(ConfigError, match="transfer 'MAML' has no num_domains; expected their number"):
        assert MAML().episodes


def test_domain_regularisation_needs_the_domains_of_the_source():
    with pytest.raises(ConfigError, match="draws a domain of the source in each epoch, and its rows have none"):
        DomainRegularisation().visits(np.zeros(4, int), None, np.random.default_rng(0))
