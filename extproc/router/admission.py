"""How much may be held: requests that wait, in all and per adapter; bytes of bodies; and for how long a body may take to arrive.

Where the router has several workers, its limits are of all of them together: `row` is this worker's place among them.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from ..errors import BodyTimeout, LoraExtprocError, Overloaded
from ..metrics import RouterMetrics
from .board import Row

log = logging.getLogger(__name__)

LEAST_RATE = 16 * 1024  # bytes per second of a body that is long in coming: below a modem's, and a body of 50 MiB ends within an hour
SWEEP_S = 1.0  # how often bodies that arrive are looked through


class Holder(Protocol):
    """A request whose body is arriving."""

    held_bytes: int
    arrives_since: float
    arrived_last: float

    def refuse(self, error: LoraExtprocError) -> None:
        """Answer it with `error` and let its body go."""


class Admission:
    """Counts and limits. Not for concurrent use; nothing here waits."""

    def __init__(
        self,
        metrics: RouterMetrics,
        *,
        max_waiting: int,
        max_waiting_per_adapter: int,
        max_bytes: int,
        body_deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
        row: Row | None = None,
    ) -> None:
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._max_waiting_per_adapter = max_waiting_per_adapter
        self._max_bytes = max_bytes
        self._body_deadline_s = body_deadline_s
        self._clock = clock
        self._row = row
        self._waiting: Counter[str] = Counter()
        self._total = 0
        self._bytes = 0
        self._arriving: dict[Holder, None] = {}  # oldest first
        self._sweeper: asyncio.Task[None] | None = None
        metrics.held.set_function(lambda: self._total)
        metrics.held_bytes.set_function(lambda: self._bytes)

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Take a place among those that wait for the adapter `name` ("": for any endpoint). Raises Overloaded if there is none."""
        in_all = self._total if self._row is None else self._row.all_waiting()
        if in_all >= self._max_waiting:
            raise Overloaded(f"{in_all} requests wait; the limit is {self._max_waiting}")
        before = self._waiting[name] if self._row is None else self._row.all_waiting_for(name)
        if name and before >= self._max_waiting_per_adapter:
            raise Overloaded(f"{before} requests wait for {name}; the limit is {self._max_waiting_per_adapter}")
        self._metrics.queue_position.observe(before)
        self._change_waiting(name, 1)
        try:
            yield
        finally:
            self._change_waiting(name, -1)

    def _change_waiting(self, name: str, by: int) -> None:
        self._total += by
        self._waiting[name] += by
        if not self._waiting[name]:
            del self._waiting[name]
        if self._row is not None:
            self._row.wait(name, by)

    def change_bytes(self, holder: Holder, by: int) -> None:
        """Count bytes that `holder`'s body takes. Above the limit the oldest bodies that have not ended are refused, and the newcomer only if none is left."""
        holder.held_bytes += by
        self._bytes += by
        in_all = self._bytes_in_all()
        while by > 0 and in_all > self._max_bytes:
            oldest = next(iter(self._arriving), holder)
            self._arriving.pop(oldest, None)
            oldest.refuse(Overloaded(f"request bodies take over {self._max_bytes} bytes together"))
            if oldest is holder:
                return
            in_all = self._bytes_in_all()

    def _bytes_in_all(self) -> int:
        return self._bytes if self._row is None else self._row.hold(self._bytes)

    # -- bodies that arrive

    def arrives(self, holder: Holder) -> None:
        """More of the holder's body has come, and it has not ended."""
        now = holder.arrived_last = self._clock()
        if holder not in self._arriving:
            holder.arrives_since = now
            self._arriving[holder] = None

    def arrived(self, holder: Holder) -> None:
        """The holder's body has ended, or nobody waits for it any more."""
        self._arriving.pop(holder, None)

    def start(self) -> None:
        """Refuse bodies that stop arriving, until `stop`."""
        self._sweeper = asyncio.create_task(self._sweep(), name="bodies")

    async def stop(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    def refuse_late(self) -> None:
        """Refuse the bodies of which nothing has come for `body_deadline_s`, and those that come at less than LEAST_RATE after that time."""
        now = self._clock()
        limit = self._body_deadline_s
        for holder in [h for h in self._arriving if now - h.arrives_since >= limit]:
            if now - holder.arrived_last >= limit:
                late = f"nothing of the body has arrived for {limit:g} s"
            elif now - holder.arrives_since >= limit + holder.held_bytes / LEAST_RATE:
                late = f"the body arrives at less than {LEAST_RATE} bytes per second"
            else:
                continue
            self._arriving.pop(holder, None)
            holder.refuse(BodyTimeout(f"{late}; {holder.held_bytes} bytes are here"))

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_S, self._body_deadline_s / 4))
            try:
                self.refuse_late()
            except Exception:
                log.exception("bodies that arrive late could not be refused")
