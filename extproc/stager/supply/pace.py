"""How many transfers run at once, and how fast they may be together."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from .job import Job

MIN_PORTION_BYTES = 2**16
LEAST_SHARED = 4  # places from which on one is kept for others: of fewer it would be too large a part


class Pace:
    """A limit in bytes per second, shared by all who spend from it. 0: none. At most one second's worth is saved up."""

    def __init__(self, bytes_per_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._free_at = clock()

    def portion(self, most: int) -> int:
        """How many bytes to take at once, where they need not be taken: a quarter of a second's worth, so that they flow and can be watched."""
        return min(most, max(MIN_PORTION_BYTES, self._rate // 4)) if self._rate else most

    async def spend(self, count: int) -> None:
        """Wait until `count` bytes more are within the limit."""
        if not self._rate:
            return
        now = self._clock()
        self._free_at = max(self._free_at, now - 1.0) + count / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class Slots:
    """At most `count` at once, and at most all but one for one owner, so that whoever fetches much keeps nobody else from fetching.

    Who waits goes by priority as it is when a place is free, then by how few places its owner has, then by time of arrival.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._most = count - 1 if count >= LEAST_SHARED else count
        self._held: Counter[str] = Counter()  # by owner; only who holds some
        self._waiting: list[tuple[Job, str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def take(self, job: Job, owner: str = "") -> AsyncIterator[None]:
        if self._free and self._held[owner] < self._most:  # then nobody waits but who was handed a place already, or has its share
            self._hold(owner)
        else:
            await self._queue(job, owner)
        try:
            yield
        finally:
            self._give_back(owner)

    async def _queue(self, job: Job, owner: str) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, owner, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # the place was handed over at the moment of the cancellation
                self._give_back(owner)
            raise
        finally:
            self._waiting = [waiting for waiting in self._waiting if waiting[2] is not place]

    def _hold(self, owner: str) -> None:
        self._free -= 1
        self._held[owner] += 1

    def _give_back(self, owner: str) -> None:
        self._free += 1
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        while self._free:
            open_ = [
                (job.priority, self._held[owner], number)
                for number, (job, owner, place) in enumerate(self._waiting)
                if not place.done() and self._held[owner] < self._most
            ]
            if not open_:
                return
            _, owner, place = self._waiting[min(open_)[2]]
            self._hold(owner)
            place.set_result(None)
