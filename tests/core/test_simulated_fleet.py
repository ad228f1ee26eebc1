"""The rules around a small simulated fleet, as `python -m tests.bench.fleet` runs them around a large one."""

from dataclasses import replace

import pytest

from tests.bench.fleet.__main__ import OURS, OWNER, WAYS, simulate, typical
from tests.bench.fleet.world import Case, Figures

SMALL = Case(nodes=8, adapters=200, warm_up_s=20.0, seconds=40.0)


@pytest.mark.parametrize("routers", [1, 4])
def test_hot_adapters_spread_and_nobody_queues(routers: int) -> None:
    """By the owner alone the engine that has the hottest carries several times the mean, and queues."""
    ours, owner = simulate(replace(SMALL, routers=routers), OURS), simulate(SMALL, OWNER)
    assert ours.queued == 0 < owner.queued
    assert ours.imbalance < 2 < owner.imbalance


def test_nothing_that_an_engine_has_is_waited_for_because_a_node_goes() -> None:
    """A drain moves it first; what a dead node alone had is fetched anew."""
    figures = simulate(replace(SMALL, moves=True, slots=32, routers=2), OURS)
    assert (figures.drain_waits, figures.death_waits) == (0, 0)


@pytest.mark.parametrize("way", WAYS)
def test_all_rules_are_given_the_same_requests(way: str) -> None:
    """So that their figures can be compared."""
    case = replace(SMALL, seconds=5.0)
    assert simulate(case, way).requests == simulate(case, OWNER).requests


def test_of_several_seeds_the_medians_count_and_the_most_of_what_must_not_happen() -> None:
    """One run in which a drain let a request wait is not hidden by others."""
    runs = [Figures(loads=0.2, drain_waits=0), Figures(loads=0.4, drain_waits=2), Figures(loads=0.3, drain_waits=0)]
    assert typical(runs) == Figures(loads=0.3, drain_waits=2)


def test_who_comes_while_a_copy_is_on_its_way_waits_for_that_one() -> None:
    """As the router does: the first requests of a fleet that has nothing cause one fetch of each adapter, or few more."""
    figures = simulate(replace(SMALL, adapters=2, warm_up_s=0.0, seconds=2.0), OURS)
    assert figures.requests > 50
    assert figures.fetches * figures.requests < 3
