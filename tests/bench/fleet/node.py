"""One node of the simulated fleet: an engine, a disk and a stager, in simulated time.

The engine runs CONCURRENT requests at once and queues the rest. It keeps `slots` adapters in memory, the least recently used goes first, and those of running
requests stay, as vLLM's `max_cpu_loras`. A request whose adapter is not in memory has it read from the disk when it starts. The stager knows of that memory
what the real one knows (`Resident`, asked every NAMES_S), and tells the engine's load by the real one's rule (`is_step`).
"""

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from itertools import count
from typing import Any

from extproc.core.endpoint import Endpoint
from extproc.core.load import Engine
from extproc.stager.engine.api import Work
from extproc.stager.engine.meter import BUSY_S, MAX_S, NAMES_S, Reading, is_step
from extproc.stager.engine.resident import Resident

CONCURRENT = 32  # requests that an engine computes at once; the rest queue
LOAD_S = 0.5  # into the engine's memory
FETCH_S = 2.0  # onto the disk from an origin: 100 MB at the 50 to 100 MB/s that are published for buckets and hubs
PEER_S = 0.5  # the same from another node: 200 MB at what tests.bench.stage measures
CALL_S = 0.003  # to the stager and back
WORD_S = 0.005  # from the stager to the routers
LEASE_S = 300.0  # stager.lease_s


class Clock:
    """Simulated time: what is due is done in the order of its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = count()

    def after(self, seconds: float, then: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._due, (self.now + seconds, next(self._count), then, arguments))

    def run(self, until: float) -> None:
        due = self._due
        while due and due[0][0] <= until:
            self.now, _, then, arguments = heapq.heappop(due)
            then(*arguments)
        self.now = until


class Request:
    """One request, and what it waited for."""

    __slots__ = ("adapter", "came_at", "held_s", "is_counted", "loading_s", "queued_s", "sent_at", "service_s", "waits", "was_there")

    def __init__(self, adapter: str, service_s: float, came_at: float, *, is_counted: bool) -> None:
        self.adapter = adapter
        self.service_s = service_s
        self.came_at = came_at
        self.is_counted = is_counted
        self.sent_at = came_at
        self.was_there = False  # whether some engine had the adapter in memory when the request came
        self.waits = 0  # for places that had the adapter in the end
        self.held_s = 0.0  # by the router
        self.queued_s = 0.0  # in the engine's queue
        self.loading_s = 0.0  # for its adapter, when it had left the queue


class Node:
    """`told(node, engine, reading)` is the engine's load on its way to the routers, `moved(node, adapter, is_warm)` an adapter that came into memory or left it,
    `started(request)` a request that waits no more."""

    def __init__(
        self,
        endpoint: Endpoint,
        slots: int,
        clock: Clock,
        *,
        told: Callable[["Node", Engine, Reading], None],
        moved: Callable[["Node", str, bool], None],
        started: Callable[[Request], None],
        is_exact: bool,
        routers: int,
        has_peer: Callable[[str], bool],
    ) -> None:
        self.endpoint = endpoint
        self.slots = slots
        self.is_alive = True
        self.running = 0
        self.queue: deque[Request] = deque()
        self.loads = 0  # into memory
        self.fetches = 0
        self.memory: OrderedDict[str, float] = OrderedDict()  # adapter -> when it is ready, least recently used first
        self.disk: set[str] = set()
        self._active: Counter[str] = Counter()  # adapters of running requests
        self._clock = clock
        self._told, self._moved, self._started = told, moved, started
        self._is_exact = is_exact  # its load is known at once and always
        self._routers = routers
        self._has_peer = has_peer
        self._told_last = Reading(None, 0.0)
        self.waits: Counter[str] = Counter()  # calls of requests that wait here for an adapter, by router
        self._known: set[str] = set()  # names that the engine was told
        self._resident = Resident()
        self._names_due = 0.0
        self._flights: dict[str, list[Callable[[bool], None]]] = {}
        self._leased: OrderedDict[str, float] = OrderedDict()  # adapter -> until when, the first to end first

    # -- the engine

    @property
    def in_flight(self) -> int:
        return self.running + len(self.queue)

    def take(self, request: Request) -> None:
        """A request arrives."""
        request.sent_at = self._clock.now
        if self.running < CONCURRENT:
            self._begin(request)
        else:
            self.queue.append(request)
        self._say_exactly()

    def _begin(self, request: Request) -> None:
        self.running += 1
        self._active[request.adapter] += 1
        request.queued_s = self._clock.now - request.sent_at
        request.loading_s = self._bring(request.adapter)
        self._started(request)
        self._clock.after(request.loading_s + request.service_s, self._end, request)

    def _end(self, request: Request) -> None:
        if not self.is_alive:
            return
        self.running -= 1
        self._active[request.adapter] -= 1
        if not self._active[request.adapter]:
            del self._active[request.adapter]
        if self.queue:
            self._begin(self.queue.popleft())
        self._say_exactly()

    def _bring(self, adapter: str) -> float:
        """Have it in memory; in how many seconds it is."""
        ready_at = self.memory.get(adapter)
        if ready_at is not None:
            self.memory.move_to_end(adapter)
            return max(0.0, ready_at - self._clock.now)
        self.loads += 1
        self.memory[adapter] = self._clock.now + LOAD_S
        while len(self.memory) > self.slots:
            victim = next((name for name, ready_at in self.memory.items() if ready_at <= self._clock.now and name not in self._active), None)
            if victim is None:
                break
            del self.memory[victim]
        return LOAD_S

    def die(self) -> list[Callable[[bool], None]]:
        """With all that it has. Who waited for something of it."""
        self.is_alive = False
        waiting = [then for waiters in self._flights.values() for then in waiters]
        self._flights.clear()
        return waiting

    # -- the stager

    def ensure(self, adapter: str, then: Callable[[bool], None]) -> None:
        """`then(True)` when it is on the disk and the engine knows it; `then(False)` if the node dies before."""
        if not self.is_alive:
            self._clock.after(CALL_S, then, False)
        elif adapter in self._known:
            self._use(adapter)
            self._lease(adapter)
            self._clock.after(CALL_S, then, True)
        elif adapter in self._flights:
            self._flights[adapter].append(then)
        else:
            self._flights[adapter] = [then]
            if adapter in self.disk:
                self._load(adapter)
            else:
                self.fetches += 1
                self._clock.after(PEER_S if self._has_peer(adapter) else FETCH_S, self._load, adapter)

    def renew(self, adapter: str) -> None:
        """A lease in use goes on."""
        self._use(adapter)
        self._lease(adapter)

    def _load(self, adapter: str) -> None:
        if self.is_alive:
            self.disk.add(adapter)
            self._moved(self, adapter, False)
            self._clock.after(self._bring(adapter) + CALL_S, self._loaded, adapter)

    def _loaded(self, adapter: str) -> None:
        if self.is_alive:
            self._known.add(adapter)
            self._use(adapter)
            self._lease(adapter)
            for then in self._flights.pop(adapter):
                then(True)

    def _use(self, adapter: str) -> None:
        for name in self._resident.used(adapter, self.slots):
            self._moved(self, name, name in self._resident)

    def _lease(self, adapter: str) -> None:
        self._leased[adapter] = self._clock.now + LEASE_S
        self._leased.move_to_end(adapter)

    def demand(self) -> int:
        """How many adapters are leased."""
        while self._leased and next(iter(self._leased.values())) <= self._clock.now:
            self._leased.popitem(last=False)
        return len(self._leased)

    def poll(self) -> None:
        """Read the engine's metrics, again and again."""
        if not self.is_alive:
            return
        now = self._clock.now
        reading = Reading(Work(self.running, len(self.queue), 0.0), now, waits=+self.waits)
        if now >= self._names_due:
            self._names_due = now + NAMES_S
            for name in sorted({*self._active, *(request.adapter for request in self.queue)}):  # of no order that means anything, and the same in each run
                if name in self._known:
                    self._use(name)
        if not self._is_exact and (is_step(self._told_last, reading, self._routers) or now - self._told_last.at >= MAX_S - BUSY_S):
            self._told_last = reading
            self._clock.after(WORD_S, self._told, self, Engine(self.running, len(self.queue), self.slots, BUSY_S, self._routers), reading)
        self._clock.after(BUSY_S, self.poll)

    def _say_exactly(self) -> None:
        if self._is_exact:
            self._told(self, Engine(self.running, len(self.queue), self.slots), Reading(None, self._clock.now))
