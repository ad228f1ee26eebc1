"""What is prepared before keys move: an endpoint that joins is given what it will own, and what is served by one that drains is made warm elsewhere.

Both go through the adapters that this router was asked for, the hottest first, a few at a time: each is a load, which stalls what an engine generates.
Other routers do the same for theirs, and a stager makes one flight of what several ask for. Both end after a while whatever is missing: a joining
endpoint is worth more ready than perfect, and a draining one is left to the leases' own ends.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Protocol

from ..core.endpoint import Endpoint
from ..core.placement import Snapshot
from ..core.popularity import Popularity
from ..core.standing import Standing
from ..errors import LoraExtprocError
from .residency import Residency

log = logging.getLogger(__name__)

AT_ONCE = 4  # adapters that one endpoint is given at the same time
MOST = 1_000  # adapters that a joining endpoint is given: more than engines keep in memory
MOST_BYTES = 64 * 2**30  # and what they may take on its disk together
FEW = 1_000  # adapters that are ranked within a millisecond
LOOK_AGAIN_S = 0.25  # at what is leased at a draining endpoint
SUCCESSORS = 2  # are asked to take an adapter over, and then again after TRY_AGAIN_S
TRY_AGAIN_S = 5.0
OTHERS_STAY_S = 2.0  # for so long another endpoint is ready before what nobody asks for is given back: where all are told to end, they say so one after another


class Fleet(Protocol):
    """What moves are made by."""

    snapshot: Snapshot


class Senders(Protocol):
    """Who sends requests to endpoints, as a whole."""

    def is_known(self, address: str) -> bool:
        """Whether they know the endpoint."""

    async def until_known(self, addresses: Iterable[str]) -> None:
        """Wait until they do, within bounds."""


class Moves:
    """By endpoint, one move at a time. `join_s`: a joining endpoint is ready after so long at the latest; `leave_s` as much for one that drains.

    `senders`: those who send requests, and may not know an endpoint that has come; None: they do.
    """

    def __init__(
        self,
        residency: Residency,
        popularity: Popularity,
        *,
        join_s: float,
        leave_s: float,
        senders: Senders | None = None,
    ) -> None:
        self._residency = residency
        self._popularity = popularity
        self._join_s = join_s
        self._leave_s = leave_s
        self._senders = senders
        self._moves: dict[str, asyncio.Task[None]] = {}  # by endpoint address

    def is_known(self, endpoint: Endpoint) -> bool:
        """Whether a request for it would arrive."""
        return self._senders is None or self._senders.is_known(endpoint.address)

    def join(self, fleet: Fleet, pool: str, endpoint: Endpoint, then: Callable[[], None]) -> None:
        """Give it what it will own; `then` when that is done."""
        self._begin(endpoint, self._join(fleet, pool, endpoint, then))

    def leave(self, fleet: Fleet, pool: str, endpoint: Endpoint) -> None:
        """Make warm elsewhere what is leased there, and give those leases back."""
        self._begin(endpoint, self._leave(fleet, pool, endpoint))

    def stay(self, endpoint: Endpoint) -> None:
        """Neither, any more."""
        move = self._moves.pop(endpoint.address, None)
        if move is not None:
            move.cancel()

    async def close(self) -> None:
        """End all of them."""
        moves = tuple(self._moves.values())
        for move in moves:
            move.cancel()
        await asyncio.gather(*moves, return_exceptions=True)

    def _begin(self, endpoint: Endpoint, work: Coroutine[None, None, None]) -> None:
        self.stay(endpoint)
        move = self._moves[endpoint.address] = asyncio.create_task(work, name=f"move {endpoint.address}")
        move.add_done_callback(lambda done: self._moves.pop(endpoint.address) if self._moves.get(endpoint.address) is done else None)

    # -- joining

    async def _join(self, fleet: Fleet, name: str, endpoint: Endpoint, then: Callable[[], None]) -> None:
        began = time.monotonic()
        given = given_bytes = 0
        try:
            async with asyncio.timeout(self._join_s):
                pool = fleet.snapshot.pool(name)
                if endpoint.stager and pool is not None and pool.has_another_ready(endpoint, fleet.snapshot.standings):  # requests can go elsewhere meanwhile
                    owned = await self._owned(fleet, name, endpoint)
                    for first in range(0, len(owned), AT_ONCE):
                        sizes = await asyncio.gather(*(self._give(endpoint, adapter) for adapter in owned[first : first + AT_ONCE]))
                        given += sum(size is not None for size in sizes)
                        given_bytes += sum(size or 0 for size in sizes)
                        if given_bytes >= MOST_BYTES:
                            break
        except TimeoutError:
            log.warning("endpoint %s has joined for %g s and is ready with what it has", endpoint.address, self._join_s)
        log.info("endpoint %s was given %d adapters, %d bytes, in %.1f s", endpoint.address, given, given_bytes, time.monotonic() - began)
        if self._senders is not None:
            await self._senders.until_known([endpoint.address])
        then()

    async def _owned(self, fleet: Fleet, name: str, endpoint: Endpoint) -> list[str]:
        """What the endpoint will own, the most asked for first."""
        ranked = await self._ranked()
        owned: list[str] = []
        for index, (adapter, _) in enumerate(ranked):
            if index % 500 == 0:
                await asyncio.sleep(0)
            snapshot = fleet.snapshot
            pool = snapshot.adapter_pool(adapter)
            if pool is not None and pool.prefill == name:
                pool = snapshot.pool(name)
            if pool is not None and pool.name == name and pool.candidates(self._popularity.key(adapter), 1) == (endpoint,):
                owned.append(adapter)
                if len(owned) >= MOST:
                    break
        return owned

    async def _ranked(self) -> list[tuple[str, int]]:
        return await asyncio.to_thread(self._popularity.ranked) if len(self._popularity) > FEW else self._popularity.ranked()

    async def _give(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> int | None:
        """Its bytes; None if it cannot be had there."""
        try:
            return (await self._residency.ensure(endpoint, adapter, plain=plain)).bytes
        except LoraExtprocError:
            return None  # logged where it was asked for

    # -- draining

    async def _leave(self, fleet: Fleet, name: str, endpoint: Endpoint) -> None:
        now, moved = asyncio.get_running_loop().time, 0
        began = alone_until = now()
        refused_until: dict[tuple[str, bool], float] = {}  # by adapter and whether plain: so that those that nobody takes do not keep the others waiting
        while now() - began < self._leave_s:
            leased = self._residency.leased_at(endpoint.stager)
            if leased and not self._shares_stager(fleet.snapshot, endpoint):
                rank = {adapter: place for place, (adapter, _) in enumerate(await self._ranked())}
                pool = fleet.snapshot.pool(name)
                if pool is None or not pool.has_another_ready(endpoint, fleet.snapshot.standings):
                    alone_until = now()  # these leases are all that could serve what nobody asks for
                elif now() - alone_until >= OTHERS_STAY_S:
                    for adapter, plain in [lease for lease in leased if lease[0] not in rank]:
                        self._residency.give_back(endpoint.stager, adapter, plain=plain)  # nobody asks for it: it needs no other place
                due = (lease for lease in leased if lease[0] in rank and refused_until.get(lease, 0.0) <= now())
                tried = sorted(due, key=lambda lease: rank[lease[0]])[:AT_ONCE]
                done = await asyncio.gather(*(self._succeed(fleet, name, endpoint, adapter, plain=plain) for adapter, plain in tried))
                moved += sum(done)
                refused_until |= {lease: now() + TRY_AGAIN_S for lease, is_done in zip(tried, done, strict=True) if not is_done}
                if any(done):
                    continue
            await asyncio.sleep(LOOK_AGAIN_S)
        log.info("endpoint %s has drained for %g s: %d leases were given back", endpoint.address, self._leave_s, moved)

    async def _succeed(self, fleet: Fleet, name: str, endpoint: Endpoint, adapter: str, *, plain: bool) -> bool:
        """Have another endpoint take over this adapter; whether one has."""
        snapshot = fleet.snapshot
        pool = snapshot.pool(name)
        if pool is None:
            return False
        nodes = [stager for stager, warm in self._residency.copies.of(adapter) if warm]
        others = [e for node in nodes for e in pool.at(node) if e != endpoint and snapshot.standing(e) is Standing.READY]
        if not any(self._residency.known(e, adapter, plain=plain) for e in others):
            candidates = [e for e in snapshot.stageable(snapshot.candidates(pool, self._popularity.key(adapter))) if e.stager and e not in others]
            for successor in (*others, *candidates)[:SUCCESSORS]:
                if await self._give(successor, adapter, plain=plain) is not None:
                    break
            else:
                return False
        self._residency.give_back(endpoint.stager, adapter, plain=plain)
        return True

    @staticmethod
    def _shares_stager(snapshot: Snapshot, endpoint: Endpoint) -> bool:
        """Whether another endpoint, which stays, is served by the same leases."""
        others = (e for pool in snapshot.pools for e in pool.at(endpoint.stager) if e != endpoint)
        return any(snapshot.standing(e) in (Standing.READY, Standing.JOINING) for e in others)
