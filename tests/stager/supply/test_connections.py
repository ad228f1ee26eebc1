"""Connections to other stagers: how many are open, and that none is closed under who uses it."""

from typing import Any

import pytest

from extproc.errors import StagerUnavailable, StartError
from extproc.stager.supply import connections as connections_module
from extproc.stager.supply.connections import Connections
from tests.fakes.wait import turns


class FakeClient:
    """Knows whether it is open."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False


class Opened:
    """Makes clients, and remembers them in the order in which they were made."""

    def __init__(self) -> None:
        self.clients: list[FakeClient] = []

    def __call__(self, address: str) -> Any:
        self.clients.append(FakeClient(address))
        return self.clients[-1]

    async def open(self) -> list[str]:
        """The addresses of those that are open once what is to be closed is closed."""
        await turns()
        return [client.address for client in self.clients if client.is_open]


async def test_a_connection_is_opened_by_its_first_use() -> None:
    """And used again by the next, while it is kept."""
    opened = Opened()
    connections = Connections(opened)
    connections.keep({"a:1", "b:1"})
    assert opened.clients == []
    async with connections.to("a:1") as first, connections.to("a:1") as second:
        assert first is second
    async with connections.to("a:1") as third:
        assert third is first
    assert await opened.open() == ["a:1"]
    await connections.close()
    assert await opened.open() == []


async def test_what_is_kept_no_longer_is_closed_when_its_last_user_is_done() -> None:
    """Not under the other; and at once where nobody uses it."""
    opened = Opened()
    connections = Connections(opened)
    connections.keep({"a:1", "b:1"})
    async with connections.to("b:1"):
        pass
    async with connections.to("a:1"):
        async with connections.to("a:1"):
            connections.keep(())
            assert await opened.open() == ["a:1"]
        assert await opened.open() == ["a:1"]
    assert await opened.open() == []


async def test_an_address_that_is_not_kept_can_be_used() -> None:
    """A copy that was found at a peer is brought, though the peer has gone meanwhile; then the connection is closed."""
    opened = Opened()
    connections = Connections(opened)
    async with connections.to("a:1"):
        assert await opened.open() == ["a:1"]
    assert await opened.open() == []


async def test_of_too_many_the_one_that_was_used_the_longest_ago_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among those that nobody uses."""
    monkeypatch.setattr(connections_module, "MAX_OPEN", 2)
    opened = Opened()
    connections = Connections(opened)
    connections.keep({"a:1", "b:1", "c:1", "d:1"})
    async with connections.to("a:1"):
        for address in ("b:1", "c:1", "b:1", "d:1"):
            async with connections.to(address):
                pass
        assert await opened.open() == ["a:1", "d:1"]
    await connections.close()


async def test_credentials_that_cannot_be_read_now_make_a_peer_unavailable() -> None:
    """Half a pair of files is being replaced: the next use tries again."""

    def refuse(address: str) -> Any:
        raise StartError("rpc: key.pem cannot be read")

    connections = Connections(refuse)
    with pytest.raises(StagerUnavailable, match=r"stager a:1: rpc: key\.pem cannot be read"):
        async with connections.to("a:1"):
            pass
