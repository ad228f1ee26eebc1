"""How many transfers run at once, and how fast they may be together."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from .job import Job

MIN_PORTION_BYTES = 2**16


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
    """At most `count` at once; who waits goes by priority as it is when a place is free, then by time of arrival."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[Job, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def take(self, job: Job) -> AsyncIterator[None]:
        if self._free:  # then nobody waits but who was handed a place already
            self._free -= 1
        else:
            await self._queue(job)
        try:
            yield
        finally:
            self._free += 1
            self._hand_over()

    async def _queue(self, job: Job) -> None:
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, place))
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():  # the place was handed over at the moment of the cancellation
                self._free += 1
                self._hand_over()
            raise
        finally:
            self._waiting = [(j, p) for j, p in self._waiting if p is not place]

    def _hand_over(self) -> None:
        while self._free:
            open_ = [(job.priority, number, place) for number, (job, place) in enumerate(self._waiting) if not place.done()]
            if not open_:
                return
            self._free -= 1
            min(open_)[2].set_result(None)
