"""An endpoint is an address and an instance."""

import dataclasses

import pytest

from extproc.core.endpoint import Endpoint


def test_identity_is_the_address_and_the_instance() -> None:
    """A node that comes back with another stager is the same endpoint."""
    assert Endpoint("10.0.0.1:8000", "a", "10.0.0.1:9102") == Endpoint("10.0.0.1:8000", "b", "10.0.0.9:9102")
    assert len({Endpoint("10.0.0.1:8000", "a"), Endpoint("10.0.0.1:8000", "b"), Endpoint("10.0.0.2:8000", "a")}) == 2
    assert Endpoint("10.0.0.1:8000", instance="pod-1") != Endpoint("10.0.0.1:8000", instance="pod-2")


def test_endpoints_are_ordered_by_address() -> None:
    """The order that every replica builds its table from does not look at nodes or stagers."""
    assert sorted([Endpoint("b:1", "x"), Endpoint("a:1", "z"), Endpoint("c:1", "a")]) == [Endpoint("a:1"), Endpoint("b:1"), Endpoint("c:1")]


def test_the_address_is_encoded_once() -> None:
    """`host` is what the hash functions read."""
    assert Endpoint("[2001:db8::1]:8000").host == b"[2001:db8::1]:8000"


def test_an_endpoint_cannot_be_changed() -> None:
    """Snapshots share endpoints."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Endpoint("a:1").node = "other"  # type: ignore[misc]
