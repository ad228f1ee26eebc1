"""What the tests of discovery share: endpoints in few words, a source that says what a test tells it to, and who listens to one."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from extproc.core.endpoint import Endpoint
from extproc.core.fleet import Fleet, Found
from extproc.discovery.entries import row
from extproc.discovery.source import Failed, Seen, Shown
from tests.fakes.wait import PATIENCE_S

Row = tuple[str, str, str, str, str, bool]


def found(address: str, node: str = "", stager: str = "", instance: str = "", zone: str = "", *, leaving: bool = False) -> Found:
    return Found(Endpoint(address, node, stager, instance, zone), leaving)


def rows(seen: Seen) -> list[Row]:
    assert isinstance(seen, Shown), seen
    return [row(one) for one in seen.endpoints]


def addresses(seen: Seen) -> list[str]:
    return [address for address, *_ in rows(seen)]


class ScriptedSource:
    """Says what it is told, in that order."""

    def __init__(self, name: str = "scripted", *, is_final: bool = False) -> None:
        self.name = name
        self.is_final = is_final
        self._said: asyncio.Queue[Seen | Exception] = asyncio.Queue()

    def show(self, *endpoints: Found | str, left_out: tuple[str, ...] = (), note: str = "") -> None:
        shown = tuple(found(e) if isinstance(e, str) else e for e in endpoints)
        self._said.put_nowait(Shown(shown, left_out, len(left_out), note))

    def fail(self, why: str = "it is away") -> None:
        self._said.put_nowait(Failed(why))

    def meet(self, error: Exception) -> None:
        self._said.put_nowait(error)

    async def sets(self) -> AsyncGenerator[Seen, None]:
        while True:
            said = await self._said.get()
            if isinstance(said, Exception):
                raise said
            yield said


class Taken:
    """What takes the fleets: keeps them, and lets a test wait for one."""

    def __init__(self) -> None:
        self.fleets: list[Fleet] = []
        self.apply: Callable[[Fleet], Awaitable[None]] = self._apply
        self._came = asyncio.Event()

    async def _apply(self, fleet: Fleet) -> None:
        self.fleets.append(fleet)
        self._came.set()

    async def until(self, *expected: str, pool: str = "p") -> Fleet:
        """The first fleet in which the pool has these addresses."""
        async with asyncio.timeout(10):
            while True:
                for fleet in self.fleets:
                    if sorted(expected) == [one.endpoint.address for one in fleet[pool]]:
                        return fleet
                self._came.clear()
                await self._came.wait()


class Listener:
    """Keeps what a source says, and waits for what is expected of it."""

    def __init__(self) -> None:
        self.said: list[Seen] = []
        self._news = asyncio.Event()

    async def listen(self, sets: AsyncGenerator[Seen, None]) -> None:
        async with aclosing(sets):
            async for seen in sets:
                self.said.append(seen)
                self._news.set()

    async def until(self, *expected: str) -> None:
        await self._until(lambda seen: isinstance(seen, Shown) and sorted(addresses(seen)) == sorted(expected))

    async def until_failed(self, *words: str) -> None:
        await self._until(lambda seen: isinstance(seen, Failed) and all(word in seen.why for word in words))

    async def _until(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not (self.said and condition(self.said[-1])):
                self._news.clear()
                await self._news.wait()
