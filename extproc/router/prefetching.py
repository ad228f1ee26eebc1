"""Adapters that will probably be asked for are brought to the node that would be chosen for them, before somebody waits.

Every router expects for itself, by its own requests and by what stagers tell of others': a stager says over Watch when a request asks for an adapter
that nobody leased on its node. So each router knows of every wake-up in the fleet, though it serves only a part of the requests; a history that knew only
that part would take every idle time for a multiple of what it is. What others ask for while an adapter is leased anyway is not told, and not missed:
idle times are counted from the same sightings as the wait for the next (core/prefetch.py). So to one of several routers, or workers, an adapter may look
asleep that others use all the time: that wake-up is counted as one that found it in memory.

So all routers expect the same at about the same time, and each asks; the stager brings it once, and who asked first counts it. What is asked for is bounded
per second, and per node to one at a time; what does not come to its turn is looked at again a minute later. A prefetch that a node gives up is not urgent
either. What was brought is used if a request goes there before it has left, which is what precision counts; a wake-up is a request for what was idle for
FLOOR_S, and recall counts where the adapter was then.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from ..client import Loading, StagerClient
from ..core.choice import At, Copy, Rules, choose
from ..core.endpoint import Endpoint
from ..core.load import Loads
from ..core.placement import Pool, Snapshot
from ..core.prefetch import FLOOR_S, By, Expected, Histories
from ..core.standing import Standing
from ..errors import LoraExtprocError
from ..metrics import RouterMetrics
from .residency import Residency

log = logging.getLogger(__name__)

TICK_S = 1.0
LOOK_S = 60.0  # in which each adapter is looked at once
LONG_S = 3600.0  # from so long on an idleness counts as long, as in the figures that are known of others' traces
MAX_UNUSED = 4096  # prefetches that are waited for to be used


class Fleet(Protocol):
    """Where adapters can be brought to."""

    snapshot: Snapshot
    loads: dict[str, Loads]


class Prefetching:
    """`start` begins it. Without `into_engine` adapters are brought to disks alone."""

    def __init__(
        self,
        fleet: Fleet,
        residency: Residency,
        clients: Mapping[str, StagerClient],
        rules: Rules,
        metrics: RouterMetrics,
        *,
        into_engine: bool,
        per_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._residency = residency
        self._clients = clients
        self._rules = rules
        self._metrics = metrics
        self._into_engine = into_engine
        self._per_s = per_s
        self._clock = clock
        self._histories = Histories()
        self._plain = False  # how engines have to know adapters, as with the last request
        self._left = 0.0  # of what may be asked for now
        self._asking: dict[str, asyncio.Task[None]] = {}  # by stager
        self._unused: dict[tuple[str, str], tuple[By, ...]] = {}  # adapter and stager -> what it was brought for: to the disk, and then to the engine
        self._begun: dict[str, tuple[float, frozenset[str]]] = {}  # of what some pool waits for yet: until when it is expected, and who has been asked
        self._ticking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Expect and ask until `close`."""
        self._ticking = asyncio.create_task(self._tick(), name="prefetching")

    async def close(self) -> None:
        tasks = [*self._asking.values(), *([self._ticking] if self._ticking is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what is asked for

    def asked(self, adapter: str, key: str, *, plain: bool) -> None:
        """A request of this router's has come for the adapter; nothing has been done for it yet. One that was not seen before may be none: it is seen when
        it is served."""
        self._plain = plain
        if adapter not in self._histories:
            return
        idle_s = self._histories.see(adapter, self._clock(), key)
        if idle_s is not None and idle_s >= FLOOR_S:
            self._metrics.wakeups.labels("long" if idle_s >= LONG_S else "short", self._found(adapter)).inc()

    def served(self, adapter: str, key: str, stager: str) -> None:
        """A request has been sent to that node."""
        if adapter not in self._histories:
            self._histories.see(adapter, self._clock(), key)
        self._end(adapter, stager, "used")

    def is_none(self, adapter: str) -> None:
        """There is no such adapter, or no longer."""
        self._histories.forget(adapter)

    def woken(self, stager: str, adapter: str) -> None:
        """A request, of whichever router, has asked that node for the adapter."""
        self._histories.see(adapter, self._clock())
        self._end(adapter, stager, "used")

    def _found(self, adapter: str) -> str:
        """Where the adapter is now."""
        copies = self._residency.copies.of(adapter)
        return "memory" if any(warm for _, warm in copies) else "disk" if copies else "nowhere"

    def _end(self, adapter: str, stager: str, result: str) -> None:
        for by in self._unused.pop((adapter, stager), ()):
            self._metrics.prefetches_ended.labels(by.value, result).inc()

    # -- what is expected

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self.look()
            except Exception:  # whatever one look stumbles over, the next must come
                log.exception("prefetching")

    def look(self) -> None:
        """Look at as many adapters as are due in TICK_S, and ask for what is expected of them."""
        self._left = min(self._left + self._per_s * TICK_S, max(1.0, self._per_s))
        for expected in self._histories.look(self._clock(), math.ceil(len(self._histories) * TICK_S / LOOK_S)):
            self._bring_to_all(expected)
        self._forget_what_has_left(math.ceil(len(self._unused) * TICK_S / LOOK_S))

    def _pools(self, adapter: str) -> Iterator[Pool]:
        """Where it has to be for a request to be served."""
        snapshot = self._fleet.snapshot
        pool = snapshot.adapter_pool(adapter)
        for needed in (pool, snapshot.pool(pool.prefill) if pool is not None and pool.prefill else None):
            if needed is not None:
                yield needed

    def _bring_to_all(self, expected: Expected) -> None:
        """To each pool once, also where one of them has to wait: a node that has refused it would be asked again and again."""
        now, adapter = self._clock(), expected.adapter
        until, begun = self._begun.pop(adapter, (now, frozenset()))
        if now >= until:
            until, begun = now + expected.for_s, frozenset()
        waiting = False
        for pool in self._pools(adapter):
            if pool.name in begun:
                continue
            if self._bring(expected, pool):
                begun |= {pool.name}
            else:
                waiting = True
        if not waiting:
            return
        self._histories.not_done(adapter)
        if begun:
            if len(self._begun) >= MAX_UNUSED:
                del self._begun[next(iter(self._begun))]
            self._begun[adapter] = (until, begun)

    def _bring(self, expected: Expected, pool: Pool) -> bool:
        """Ask for it where a request would have to wait for it; False if that has to wait itself."""
        into_engine = self._into_engine and expected.by is By.IDLE_TIMES
        endpoint = self._place(expected, pool, into_engine=into_engine)
        if endpoint is None:
            return True
        client = self._clients.get(endpoint.stager)
        if client is None or endpoint.stager in self._asking or self._left < 1:
            return False
        self._left -= 1
        task = asyncio.create_task(self._ask(client, expected, into_engine=into_engine), name=f"prefetch {expected.adapter}")
        self._asking[endpoint.stager] = task
        task.add_done_callback(lambda _: self._asking.pop(endpoint.stager, None))
        return True

    def _place(self, expected: Expected, pool: Pool, *, into_engine: bool) -> Endpoint | None:
        """The endpoint that a request would have to wait for; None if it would not, or only for a load that is not to be done ahead."""
        snapshot, adapter = self._fleet.snapshot, expected.adapter
        copies = [
            Copy(endpoint, At.WARM if warm else At.COLD)
            for stager, warm in self._residency.copies.of(adapter)
            for endpoint in pool.at(stager)
            if snapshot.standing(endpoint) is Standing.READY
        ]
        if any(copy.at is At.WARM for copy in copies) or (copies and not into_engine):
            return None
        order = [e for e in snapshot.stageable(snapshot.candidates(pool, expected.key)) if e.stager]
        choice = choose(copies, order, self._fleet.loads[pool.name], self._rules.of(adapter))
        return next(iter(choice.wait_for), None)

    async def _ask(self, client: StagerClient, expected: Expected, *, into_engine: bool) -> None:
        adapter, by = expected.adapter, expected.by
        loading = (Loading.PLAIN if self._plain else Loading.VERSIONED) if into_engine else Loading.NONE
        try:
            staged = await client.ensure(adapter, prefetch=True, keep_s=expected.for_s, loading=loading)
        except LoraExtprocError as error:
            self._metrics.prefetches.labels(by.value, error.reason).inc()
            log.debug("%s on %s: its prefetch failed: %s: %s", adapter, client.address, error.reason, error.message)
            return
        result = "staged" if staged.staged else "loaded" if staged.loaded else "hit"
        self._metrics.prefetches.labels(by.value, result).inc()
        if result == "hit":
            return
        log.debug("%s on %s: prefetched (%s): %s, %d bytes", adapter, client.address, by.value, result, staged.bytes)
        self._residency.published(client.address, adapter)  # which its Watch may tell later than this answer
        if len(self._unused) >= MAX_UNUSED:
            self._end(*next(iter(self._unused)), "unused")
        self._unused[adapter, client.address] = (*self._unused.get((adapter, client.address), ()), by)

    def _forget_what_has_left(self, count: int) -> None:
        """Look at the next `count` that were brought and not used, whether they are still on their nodes."""
        for _ in range(count):
            adapter, stager = key = next(iter(self._unused))
            if any(node == stager for node, _ in self._residency.copies.of(adapter)):
                self._unused[key] = self._unused.pop(key)  # as the last one to be looked at again
            else:
                self._end(adapter, stager, "unused")
