"""The rules around a small simulated fleet, as `python -m tests.bench.fleet` runs them around a large one."""

from dataclasses import replace

import pytest

from tests.bench.fleet.__main__ import OURS, OWNER, WAYS, simulate
from tests.bench.fleet.world import Case

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
