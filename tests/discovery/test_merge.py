"""Merging: one fleet of all sources, the same on every router."""

from extproc.discovery.entries import row
from extproc.discovery.merge import is_same, merge

from .scripted import found


def test_the_sources_of_a_pool_are_added_up_by_address() -> None:
    """In the order of the addresses, whatever the order in which the sources list them."""
    a, b, c = found("10.0.0.1:8000", "a"), found("10.0.0.2:8000", "b"), found("10.0.0.3:8000", "c")
    merged = merge({"p": [("static", [c, a]), ("file", [b, a])]})
    assert [one.endpoint.node for one in merged.fleet["p"]] == ["a", "b", "c"]
    assert merged.complaints == ()


def test_what_a_later_source_says_counts_and_what_it_does_not_say_stays() -> None:
    """DNS finds the endpoint, the settings name its stager, a third one tells instances apart."""
    sources = [
        ("static", [found("10.0.0.1:8000", "one", "10.0.0.1:9102", "1")]),
        ("dns", [found("10.0.0.1:8000", "two")]),
        ("etcd", [found("10.0.0.1:8000", instance="2")]),
    ]
    assert [row(one) for one in merge({"p": sources}).fleet["p"]] == [("10.0.0.1:8000", "two", "10.0.0.1:9102", "2", "", False)]
    sources.reverse()
    assert [row(one) for one in merge({"p": sources}).fleet["p"]] == [("10.0.0.1:8000", "one", "10.0.0.1:9102", "1", "", False)]


def test_an_endpoint_is_leaving_if_one_source_says_so() -> None:
    """Those that do not know of leaving say nothing of it."""
    leaving, staying = found("10.0.0.1:8000", leaving=True), found("10.0.0.1:8000")
    for order in ([leaving, staying], [staying, leaving]):
        assert merge({"p": [(str(n), [one]) for n, one in enumerate(order)]}).fleet["p"][0].is_leaving


def test_an_endpoint_whose_node_nobody_names_is_its_own_node() -> None:
    """As one of the settings is."""
    assert merge({"p": [("dns", [found("10.0.0.1:8000")])]}).fleet["p"][0].endpoint.node == "10.0.0.1:8000"


def test_an_address_belongs_to_the_first_pool_that_shows_it() -> None:
    """Envoy could not tell two apart. The complaint names the source, the pool and the entry."""
    merged = merge({"a": [("file x", [found("10.0.0.1:8000")])], "b": [("static", [found("10.0.0.2:8000")]), ("dns y", [found("10.0.0.1:8000")])]})
    assert {pool: [one.endpoint.address for one in several] for pool, several in merged.fleet.items()} == {"a": ["10.0.0.1:8000"], "b": ["10.0.0.2:8000"]}
    assert merged.complaints == ("pool b: dns y: 10.0.0.1:8000 is left out: it is in pool a, and an endpoint serves one pool",)


def test_pools_without_endpoints_are_in_the_fleet() -> None:
    """They exist, and have none."""
    assert merge({"a": [("static", [])], "b": []}).fleet == {"a": (), "b": ()}


def test_fleets_differ_by_all_that_is_said_of_an_endpoint() -> None:
    """An endpoint with another stager is equal to itself as it was, and is news."""
    one = {"p": [found("10.0.0.1:8000", stager="a:1")]}
    assert is_same(one, {"p": [found("10.0.0.1:8000", stager="a:1")]})
    for other in (found("10.0.0.1:8000", stager="b:1"), found("10.0.0.1:8000", "n", "a:1"), found("10.0.0.1:8000", stager="a:1", leaving=True)):
        assert not is_same(one, {"p": [other]})
    assert not is_same(one, {"p": []})
    assert not is_same(one, {"q": one["p"]})
