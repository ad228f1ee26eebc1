"""The state of the world protocol as a table: what a client says, and what it is sent then."""

from collections.abc import Sequence

import pytest

from extproc.core.subscription import Heard, Resource, State, Subscription, World


def world(version: str, **contents: str) -> World:
    return World(version, {name: Resource(name, content.encode()) for name, content in contents.items()})


ONE, TWO = world("1", a="1", b="1"), world("2", a="2", b="1")


def told(subscription: Subscription, world: World, nonce: str) -> list[str] | None:
    """What the client is sent of `world`, with `nonce`."""
    due = subscription.due(world)
    if due is None:
        return None
    subscription.sent(nonce, due)
    return [f"{resource.name}={resource.entry.decode()}" for resource in due]


def settled(names: Sequence[str] = ("a",), *, is_complete: bool = False) -> Subscription:
    """One that has acknowledged ONE, by the nonce n1."""
    subscription = Subscription(is_complete=is_complete)
    subscription.request("", names)
    assert told(subscription, ONE, "n1") is not None
    assert subscription.request("n1", names) is Heard.ACK
    return subscription


def test_nothing_is_sent_unasked() -> None:
    """Before the first request."""
    assert Subscription(is_complete=True).due(ONE) is None


def test_a_client_is_sent_what_it_asks_for() -> None:
    """And nothing more, once it has that."""
    subscription = settled()
    assert subscription.due(ONE) is None
    assert told(subscription, TWO, "n2") == ["a=2"]


def test_what_changed_for_others_is_not_sent() -> None:
    """The version is that of the type; its client knows the resource."""
    assert settled(["b"]).due(TWO) is None


@pytest.mark.parametrize("nonce", ["", "old"])
def test_the_first_request_counts_whatever_its_nonce(nonce: str) -> None:
    """A client that follows another replica now may show the nonce it got there."""
    subscription = Subscription(is_complete=False)
    assert subscription.request(nonce, ["a"]) is Heard.ASKS
    assert told(subscription, ONE, "n1") == ["a=1"]


def test_a_client_that_has_not_answered_is_sent_nothing() -> None:
    """Whatever changes meanwhile; then it is sent the newest."""
    subscription = Subscription(is_complete=False)
    subscription.request("", ["a"])
    assert told(subscription, ONE, "n1") == ["a=1"]
    assert subscription.due(TWO) is None
    subscription.request("n1", ["a"])
    assert told(subscription, world("3", a="3"), "n2") == ["a=3"]


def test_a_stale_nonce_is_ignored() -> None:
    """With the names it brings: the client's answer to the newest response will have them, too."""
    subscription = settled()
    assert told(subscription, TWO, "n2") == ["a=2"]
    assert subscription.request("n1", ["a", "b"]) is Heard.STALE
    assert subscription.state is State.WAITING
    assert subscription.request("n2", ["a", "b"]) is Heard.ACK
    assert told(subscription, TWO, "n3") == ["a=2", "b=1"]


def test_a_rejected_version_is_not_sent_again() -> None:
    """The client keeps what it had; the next version is offered again."""
    subscription = settled()
    assert told(subscription, TWO, "n2") == ["a=2"]
    assert subscription.request("n2", ["a"], is_rejected=True) is Heard.NACK
    assert subscription.accepted["a"] == ONE.resources["a"]
    assert subscription.due(TWO) is None
    assert told(subscription, world("3", a="3"), "n3") == ["a=3"]
    assert subscription.request("n3", ["a"]) is Heard.ACK
    assert subscription.accepted["a"].entry == b"3"


def test_newly_named_resources_are_sent_though_nothing_changed() -> None:
    """ "the server must resend any newly requested resources, even if it previously sent those"."""
    subscription = settled()
    assert subscription.request("n1", ["a", "b"]) is Heard.ASKS
    assert told(subscription, ONE, "n2") == ["a=1", "b=1"]
    subscription.request("n2", ["b"])
    assert subscription.due(ONE) is None
    subscription.request("n2", ["a", "b"])
    assert told(subscription, ONE, "n3") == ["a=1", "b=1"]


def test_a_resource_that_does_not_exist_is_sent_once_it_does() -> None:
    """ "Management servers must remember the set of resources being requested"."""
    subscription = Subscription(is_complete=False)
    subscription.request("", ["c"])
    assert subscription.due(ONE) is None
    assert told(subscription, world("2", c="1"), "n1") == ["c=1"]


def test_that_endpoints_are_gone_is_not_said() -> None:
    """Their cluster goes, which says it."""
    assert settled().due(world("2", b="1")) is None


def test_a_complete_type_is_sent_whole() -> None:
    """What is missing is deleted, so everything is there each time; even nothing at all is said."""
    subscription = settled([], is_complete=True)
    assert told(subscription, TWO, "n2") == ["a=2", "b=1"]
    subscription.request("n2", [])
    assert told(subscription, world("3", a="2"), "n3") == ["a=2"]
    subscription.request("n3", [])
    assert told(subscription, world("4"), "n4") == []


def test_no_names_mean_everything_until_one_was_named() -> None:
    """The four requests of the protocol's own example."""
    subscription = settled([], is_complete=True)
    subscription.request("n1", ["*", "a"])
    assert subscription.asks_for("b")
    subscription.request("n1", ["a"])
    assert (subscription.asks_for("a"), subscription.asks_for("b")) == (True, False)
    subscription.request("n1", [])
    assert not subscription.asks_for("a")
    assert subscription.due(TWO) is None


def test_no_names_mean_nothing_of_an_incomplete_type() -> None:
    """ "the client is no longer interested in any resources of the specified type"; there is no wildcard of endpoints."""
    subscription = settled()
    subscription.request("n1", [])
    assert subscription.due(TWO) is None
    subscription.request("n1", ["*"])
    assert subscription.due(TWO) is None


def test_a_request_after_new_clusters_is_answered_though_nothing_changed() -> None:
    """A changed cluster waits for its endpoints, which are asked for by a request like the one before."""
    subscription = settled()
    subscription.answer_next_request()
    assert subscription.due(ONE) is None
    assert subscription.request("n1", ["a"]) is Heard.ASKS
    assert told(subscription, ONE, "n2") == ["a=1"]
    subscription.request("n2", ["a"])
    assert subscription.due(ONE) is None
