"""Entries: one spelling of an address, a complaint for each that cannot be one, and sets that one bad entry does not spoil."""

from typing import Any

import pytest

from extproc.discovery.entries import MAX_COMPLAINTS, MAX_ENTRIES, BadEntry, canonical, collect, read_entry, row
from extproc.discovery.source import Failed, Shown

from .scripted import addresses, found, rows


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:8000", "10.0.0.1:8000"),
        ("10.0.0.1:08000", "10.0.0.1:8000"),
        ("[2001:DB8:0::1]:8000", "[2001:db8::1]:8000"),
        ("[::ffff:10.0.0.1]:8000", "10.0.0.1:8000"),
    ],
)
def test_an_address_has_one_spelling(address: str, expected: str) -> None:
    """Two spellings of one address would be two endpoints."""
    assert canonical(address) == expected


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("10.0.0.1", "'10.0.0.1' has no port from 1 to 65535"),
        ("10.0.0.1:0", "has no port"),
        ("10.0.0.1:65536", "has no port"),
        ("10.0.0.1:²", "has no port"),
        ("10.0.0.1:" + "9" * 5000, "has no port"),
        ("vllm-0:8000", "a source of type dns resolves names"),
        ("010.0.0.1:8000", "is not ip:port"),
        ("http://10.0.0.1:8000", "is not ip:port"),
        ("2001:db8::1:8000", "'2001:db8::1:8000' needs brackets around its IPv6 address: ['2001:db8::1']:8000"),
        ("[10.0.0.1]:8000", "has brackets around an IPv4 address"),
        ("[fe80::1%eth0]:8000", "names an interface of one machine"),
        ("0.0.0.0:8000", "is no machine's address"),
        ("[::]:8000", "is no machine's address"),
        ("224.0.0.1:8000", "is no machine's address"),
    ],
)
def test_what_is_no_address_is_named_with_what_is_wrong(address: str, complaint: str) -> None:
    """The complaint is short, whatever stands there."""
    with pytest.raises(BadEntry) as caught:
        canonical(address)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 200


def test_an_entry_is_an_address_or_a_mapping() -> None:
    """Each key of the mapping is a field of the endpoint."""
    assert row(read_entry("10.0.0.1:8000")) == ("10.0.0.1:8000", "", "", "", "", False)
    whole = {"address": "10.0.0.1:8000", "stager": "one.local:9102", "node": "one", "instance": "uid-1", "zone": "a", "leaving": True}
    assert row(read_entry(whole)) == ("10.0.0.1:8000", "one", "one.local:9102", "uid-1", "a", True)


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (None, "is neither ip:port nor a mapping"),
        (7, "is neither ip:port nor a mapping"),
        ({}, "has no address"),
        ({"address": ""}, "has no address"),
        ({"address": 8000}, "address is no text"),
        ({"address": "10.0.0.1:8000", "stagr": "x:1"}, "has 'stagr', which is none of address, instance, leaving, node, stager"),
        ({"address": "10.0.0.1:8000", 7: "x"}, "has '7', which is none of"),
        ({"address": "10.0.0.1:8000", "stager": "one"}, "stager 'one' is not host:port"),
        ({"address": "10.0.0.1:8000", "leaving": "no"}, "leaving is neither true nor false"),
        ({"address": "10.0.0.1:8000", "node": 7}, "node is no text"),
        ({"address": "10.0.0.1:8000", "node": "a\nb"}, "node holds control characters"),
        ({"address": "10.0.0.1:8000", "instance": "x" * 300}, "instance has 300 characters; 253 is the limit"),
    ],
)
def test_an_entry_that_cannot_be_an_endpoint_is_complained_of(raw: Any, complaint: str) -> None:
    """With the key that is wrong."""
    with pytest.raises(BadEntry) as caught:
        read_entry(raw)
    assert str(caught.value).startswith(complaint)


def test_a_bad_entry_leaves_the_others_in() -> None:
    """All good endpoints would be lost because of one bad line otherwise."""
    seen = collect([("entry 1", found("10.0.0.1:8000")), ("entry 2", BadEntry("has no address")), ("entry 3", found("10.0.0.3:8000"))])
    assert addresses(seen) == ["10.0.0.1:8000", "10.0.0.3:8000"]
    assert isinstance(seen, Shown)
    assert (seen.left_out, seen.left_out_count) == (("entry 2 has no address",), 1)


def test_a_set_without_one_good_entry_is_a_failure() -> None:
    """It is the form that changed, not the fleet: nothing is believed of it."""
    assert collect([("entry 1", BadEntry("has no address"))]) == Failed("none of its 1 entries can be read: entry 1 has no address")
    assert collect([]) == Shown(())


def test_of_two_entries_with_one_address_the_later_one_counts() -> None:
    """And it is told of, unless they say the same."""
    seen = collect([("a", found("10.0.0.1:8000", instance="1")), ("b", found("10.0.0.1:8000", instance="2")), ("c", found("10.0.0.1:8000", instance="2"))])
    assert rows(seen) == [("10.0.0.1:8000", "", "", "2", "", False)]
    assert isinstance(seen, Shown)
    assert seen.left_out == ("a has the address 10.0.0.1:8000 of b, which counts, as the later one",)


def test_complaints_are_counted_and_few_are_told() -> None:
    """A file of another form fills no log."""
    seen = collect([("good", found("10.0.0.1:8000")), *((f"entry {n}", BadEntry("x" * 1000)) for n in range(50))])
    assert isinstance(seen, Shown)
    assert (len(seen.left_out), seen.left_out_count) == (MAX_COMPLAINTS, 50)
    assert max(map(len, seen.left_out)) <= 300


def test_a_set_has_a_limit() -> None:
    """Something that was never meant to be a fleet is not taken for one."""
    assert collect(("e", found("10.0.0.1:8000")) for _ in range(MAX_ENTRIES + 1)) == Failed(f"has more than {MAX_ENTRIES} entries")
