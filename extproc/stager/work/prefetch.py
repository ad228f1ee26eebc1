"""What is brought before anybody asks for it. It is no demand: it takes no lease, changes no order of use, and yields to everything that is.

| a prefetch needs | it gets |
| --- | --- |
| a turn | `stager.prefetch.at_once` of them, no sooner than `max_bytes_per_s` allows after what was brought before; none while a request's flight is in progress |
| a place at an origin | when no request and no refresh waits for one |
| room on the disk | what is free below the high watermark, or taken by what was prefetched, not asked for, and is expected no longer (`Index.reserve_free`) |
| the engine's memory | the slot of an adapter that nobody leases, of a SHARE of all slots; none while a load or a request's flight is in progress |

A request's flight that begins cancels those of prefetches, since both need an origin's places, bandwidth and room; they begin anew when it has landed, at
most ATTEMPTS times. A request for the very adapter that is being prefetched waits for it instead, and from then on the flight is a request's. If
it comes to nothing all the same, the request's own flight begins.

Several routers expect the same adapter at the same time: all of them wait for one prefetch, and who asks later finds it there.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass

from ...client import Loading
from ...core.artifact import AdapterName, ArtifactId
from ...errors import LoraExtprocError, Overloaded, PrefetchGivenUp
from ...flight import SingleFlight, to_the_end
from ..books.holdings import Named
from ..node import Node
from ..supply.job import Job
from .flights import Flights

log = logging.getLogger(__name__)

ATTEMPTS = 3  # a node on which a request's flight has begun that often meanwhile has other things to do
MAX_WAITING = 64  # prefetches; a router asks a node for one at a time
SHARE = 4  # one in so many of the engine's slots: an engine gives up the one used longest ago first, whoever needs it


@dataclass(slots=True, eq=False)
class _Flight:
    """One on its way."""

    task: asyncio.Task[Named] | None = None  # None: it waits for its turn
    waited_for: int = 0  # requests

    def give_way(self) -> None:
        """End, unless a request waits for it: its turn comes again."""
        if self.task is not None and not self.waited_for:
            self.task.cancel()


class Prefetches:
    """`bring` fetches and publishes an adapter, `show` lets its name lead there, `let_go` ends what `bring` holds."""

    def __init__(
        self,
        node: Node,
        flights: Flights,
        bring: Callable[[AdapterName, Job, str], Awaitable[Named]],
        show: Callable[[AdapterName, Named], Coroutine[None, None, None]],
        let_go: Callable[[Named], Awaitable[None]],
    ) -> None:
        settings = node.settings.prefetch
        self._node = node
        self._flights = flights
        self._bring = bring
        self._show = show
        self._let_go = let_go
        self._turns = asyncio.Semaphore(settings.at_once)
        self._max_bytes_per_s = settings.max_bytes_per_s
        self._next_at = 0.0  # when the next may begin, as the loop's time
        self._runs: SingleFlight[AdapterName, Named] = SingleFlight()  # at most MAX_WAITING
        self._on_their_way: dict[AdapterName, _Flight] = {}
        self._requests = 0  # their flights in progress
        self._no_requests = asyncio.Event()
        self._no_requests.set()
        self._loaded: dict[ArtifactId, float] = {}  # into the engine, not asked for yet -> until when they are expected; at most a SHARE of its slots

    async def close(self) -> None:
        await self._runs.close()

    # -- what requests do to them

    @contextlib.contextmanager
    def yielding(self) -> Iterator[None]:
        """A request's flight is in progress: prefetches wait."""
        self._requests += 1
        self._no_requests.clear()
        for flight in self._on_their_way.values():
            flight.give_way()
        try:
            yield
        finally:
            self._requests -= 1
            if not self._requests:
                self._no_requests.set()

    async def join(self, name: AdapterName) -> bool:
        """Let a request wait for the flight of `name`, if it is being prefetched; whether it was. What came of it is to be seen."""
        flight = self._on_their_way.get(name)
        if flight is None or flight.task is None or flight.task.done():
            return False
        flight.waited_for += 1
        self._flights.hurry(name, Job.REQUEST)
        try:
            with self.yielding():
                await asyncio.wait({flight.task})
        finally:
            flight.waited_for -= 1
        return True

    # -- to the disk

    async def fetch(self, name: AdapterName, sha256: str, keep_s: float) -> Named:
        """Bring it to this node's disk, when nobody else needs anything. Raises PrefetchGivenUp, Overloaded, or what any flight raises."""
        if name not in self._runs and len(self._runs) >= MAX_WAITING:
            raise Overloaded(f"{name}: {MAX_WAITING} prefetches wait for their turn on this node already")
        return await self._runs.join(name, lambda: self._run(name, sha256, keep_s))

    async def _run(self, name: AdapterName, sha256: str, keep_s: float) -> Named:
        until = self._node.clock() + keep_s
        flight = self._on_their_way[name] = _Flight()
        try:
            for _ in range(ATTEMPTS):
                async with self._turns:
                    await self._turn(name, until if keep_s else math.inf)
                    flight.task = asyncio.create_task(self._fly(name, sha256, until), name=f"prefetch {name}")
                    try:
                        await asyncio.wait({flight.task})
                    finally:
                        flight.task.cancel()  # where this task was
                    if not flight.task.cancelled():
                        return flight.task.result()
            raise PrefetchGivenUp(f"{name}: requests have needed this node's origins {ATTEMPTS} times meanwhile")
        finally:
            del self._on_their_way[name]
            if flight.task is not None:
                await asyncio.gather(flight.task, return_exceptions=True)

    async def _turn(self, name: AdapterName, until: float) -> None:
        """Wait until what was brought before is paid for, and no request's flight is in progress. Raises PrefetchGivenUp if nothing is left to be done then."""
        loop = asyncio.get_running_loop()
        while self._requests or loop.time() < self._next_at:
            await self._no_requests.wait()
            await asyncio.sleep(max(0.0, self._next_at - loop.time()))
        self._check_worth(name, until)

    def _check_worth(self, name: AdapterName, until: float) -> None:
        """Raises PrefetchGivenUp for what has come meanwhile, or is expected no longer."""
        if self._node.holdings.get(name) is not None:
            raise PrefetchGivenUp(f"{name} has come to this node while its prefetch waited for its turn")
        if self._node.clock() >= until:
            raise PrefetchGivenUp(f"{name} is expected no longer: its prefetch has waited for its turn for too long")

    async def _fly(self, name: AdapterName, sha256: str, until: float) -> Named:
        async with self._flights.book(name, Job.PREFETCH, "prefetched") as job:
            try:
                named = await self._bring(name, job, sha256)
                try:
                    if not self._node.holdings.names_of(named.id):  # content that another name leads to has its own place in the order of use
                        self._node.holdings.index.expect(named.id, until)
                    with contextlib.suppress(asyncio.CancelledError):  # the name is shown all the same, and a request has it
                        await to_the_end(self._show(name, named))
                finally:
                    await self._let_go(named)
                return named
            finally:
                if self._max_bytes_per_s:
                    self._next_at = max(self._next_at, asyncio.get_running_loop().time()) + job.done_bytes / self._max_bytes_per_s

    # -- into the engine

    async def load(self, name: AdapterName, named: Named, loading: Loading, keep_s: float) -> str:
        """Let the engine know what is on disk, where a slot is free for it; what a request's `model` must be then, "" where none is."""
        index, loads, now = self._node.holdings.index, self._node.loads, self._node.clock()
        if loading is Loading.NONE or loads.has(name, named.id) or not self._has_free_slot(now) or not index.hold(named.id):
            return ""
        self._loaded[named.id] = now + keep_s
        try:
            return await loads.ensure(name, named.id, plain=loading is Loading.PLAIN)
        except LoraExtprocError:
            self._loaded.pop(named.id, None)
            raise
        finally:
            index.let_go(named.id)

    def _has_free_slot(self, now: float) -> bool:
        """Whether one more adapter in the engine's memory displaces nothing that is leased, and nothing that was prefetched and is expected.

        An engine whose slots are not known, or whose resolver loads adapters by itself, has none. A name that the engine knows and has not in memory
        cannot be brought back there: its first request does that.
        """
        engine, index, loads = self._node.engine, self._node.holdings.index, self._node.loads
        if not (engine.exists and engine.loads and loads.slots) or loads.is_at_work or self._requests:
            return False
        self._loaded = {
            id_: until for id_, until in self._loaded.items() if until > now and loads.names_of(id_) and index.is_known(id_) and not index.is_leased(id_, now)
        }
        taken = index.in_demand(now) + len(self._loaded)
        displaced = loads.next_out()
        is_missed = displaced is not None and (index.is_leased(displaced, now) or displaced in self._loaded)
        return len(self._loaded) < max(1, loads.slots // SHARE) and taken < loads.slots and not is_missed
