"""The heap of leases' ends: outdated places do not add up. What it counts is tested with the index that uses it."""

from extproc.core.demand import SLACK, Demand


def test_what_is_leased_and_given_back_again_and_again_leaves_no_trace() -> None:
    """Order of events: a router leases and releases for hours, and no lease comes to its end."""
    demand = Demand[str]()
    demand.add("always", 1_000_000)
    for number in range(100 * SLACK):
        demand.add("often", 1_000 + number)
        demand.drop("often")
    assert list(demand) == ["always"]
    assert len(demand._by_end) <= 2 + SLACK + 1
    assert list(demand.end(999_999, lambda _: 0)) == []
    assert list(demand.end(1_000_000, lambda _: 0)) == ["always"]
    assert not demand
