"""Who waits for a node to be empty: what is said meanwhile, and when it ends."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from extproc import emptying
from extproc.client import Demand, Drained, EngineLoad, NodeState, Published, StagerClient, WatchEvent
from extproc.errors import NotPermitted, StagerUnavailable

DRAINING = NodeState(True, "the node is drained", "i", draining=True)
EMPTY = NodeState(True, "the node is drained", "i", draining=True, empty=True)
AT_FIRST = Drained(draining=True, empty=False, leased=2, requests=3.0)


class Scripted(StagerClient):
    """A stager that answers `first` to the drain, and tells these events; a stream that ends has broken, and the last one goes on."""

    def __init__(self, first: Drained | Exception, *streams: tuple[WatchEvent, ...]) -> None:
        self._first = first
        self._streams = list(streams)
        self.drains = 0

    async def drain(self, why: str) -> Drained:
        assert why == "why"
        self.drains += 1
        if isinstance(self._first, Exception):
            raise self._first
        return self._first

    async def watch(self, heartbeat_s: float = 0.0, *, copies: bool = False, load: bool = False, wakes: bool = False) -> AsyncIterator[WatchEvent]:
        assert heartbeat_s
        assert load
        assert not copies, "names are not shown"
        for event in self._streams.pop(0):
            yield event
        if self._streams:
            raise StagerUnavailable("gone")
        await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emptying, "WATCHED_S", 0.01)


async def test_each_change_is_said_until_the_node_is_empty() -> None:
    """What changes nothing of it is not."""
    said: list[Drained] = []
    events = (DRAINING, Demand(1, 4), Published("acme/a"), Demand(1, 4), EngineLoad(1, 0, 0.5, 4, 4, 0.1), Demand(0, 4), EngineLoad(0, 0, 0, 4, 4, 0.1), EMPTY)
    assert await emptying.drain(Scripted(AT_FIRST, events), "why", said.append, 60.0) == ""
    assert [(state.leased, state.requests, state.empty) for state in said] == [
        (2, 3, False),
        (1, 3, False),
        (1, 1, False),
        (0, 1, False),
        (0, 0, False),
        (0, 0, True),
    ]


async def test_nobody_waits_who_does_not_want_to() -> None:
    """Nor for a node that is empty."""
    said: list[Drained] = []
    assert await emptying.drain(Scripted(AT_FIRST), "why", said.append) == ""
    empty = Drained(draining=True, empty=True, leased=0, requests=0.0)
    assert await emptying.drain(Scripted(empty), "why", said.append, 60.0) == ""
    assert said == [AT_FIRST, empty]


async def test_a_stager_that_is_started_again_is_waited_for() -> None:
    """It drains on. It is not drained a second time: somebody may have undrained it meanwhile."""
    client = Scripted(AT_FIRST, (DRAINING,), (), (EMPTY,))
    assert await emptying.drain(client, "why", lambda _: None, 60.0) == ""
    assert client.drains == 1


async def test_a_node_that_is_undrained_is_not_waited_for() -> None:
    """It would never be empty."""
    undrained = NodeState(True, "", "i")
    assert await emptying.drain(Scripted(AT_FIRST, (DRAINING, undrained)), "why", lambda _: None, 60.0) == "somebody has undrained it"


async def test_a_wait_has_an_end() -> None:
    """The drain has none."""
    said = await emptying.drain(Scripted(AT_FIRST, (DRAINING,)), "why", lambda _: None, 0.01)
    assert said == "not empty after 0.01 s; it is still drained"


async def test_a_drain_that_is_refused_is_an_error() -> None:
    """Not a node that is waited for."""
    with pytest.raises(NotPermitted):
        await emptying.drain(Scripted(NotPermitted("no")), "why", lambda _: None, 60.0)
