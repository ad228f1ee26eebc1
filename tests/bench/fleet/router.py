"""One simulated router: what `Staging`, `Residency`, `Membership` and `Moves` do with the core, without their sockets and tasks."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

from extproc.core.choice import At, Choice, Copy
from extproc.core.copies import Copies
from extproc.core.endpoint import Endpoint
from extproc.core.load import Loads
from extproc.core.placement import Pool, Snapshot
from extproc.core.popularity import Popularity
from extproc.core.standing import Observed, Standing
from extproc.router.membership import TICK_S, WINDOW_TICKS
from extproc.router.moving import AT_ONCE, MOST
from extproc.router.residency import MAX_PREPARATIONS
from extproc.router.staging import CHOSEN_AGAIN

from .node import LEASE_S, Clock, Node, Request

AGAIN_S = 0.25  # a request that can go nowhere is decided again


class Way(ABC):
    """A rule under comparison."""

    @abstractmethod
    def choose(self, adapter: str, copies: list[Copy], router: "Router") -> Choice:
        """What to do with a request for `adapter`."""

    def is_below(self, place: Endpoint, router: "Router") -> bool:
        """Whether a request that has waited for `place` goes there, and does not choose again."""
        return True


class Router:
    """Its loads, leases, standings and popularity are its own; where copies are, all routers hear alike."""

    def __init__(self, name: str, nodes: Mapping[str, Node], copies: Copies, pool: Pool, way: Way, clock: Clock) -> None:
        self.name = name
        self.snapshot = Snapshot((pool,))
        self.loads = Loads(e.address for e in pool.table.endpoints)
        self.popularity = Popularity()
        self.prepared = 0
        self.looks = 0
        self._copies = copies
        self._nodes = nodes  # by stager
        self._way = way
        self._clock = clock
        self._leases: dict[tuple[str, str], float] = {}  # (stager, adapter) -> until
        self._preparing: dict[str, set[str]] = {}  # by stager
        self._asked: Counter[tuple[str, str]] = Counter()  # (stager, adapter): those who wait for its answer
        self._observed: dict[str, Observed] = {}
        self._ticks = 0
        self._tick()

    @property
    def pool(self) -> Pool:
        return self.snapshot.pools[0]

    @property
    def now(self) -> float:
        return self._clock.now

    # -- one request

    def take(self, request: Request) -> None:
        """Decide, as `Staging.now` and `Staging.wait`."""
        adapter = request.adapter
        self.looks += 1
        choice = self._way.choose(adapter, self.copies(adapter), self)
        chosen = choice.serve
        if chosen is None and choice.wait_for and self._has_lease(choice.wait_for[0], adapter):
            chosen = choice.wait_for[0]
        if choice.prepare is not None:
            self._prepare(choice.prepare, adapter)
        if chosen is not None:
            self._send(chosen, request)
        elif choice.wait_for:
            self._wait_for(choice.wait_for[0], request)
        else:
            self._clock.after(AGAIN_S, self.take, request)

    def _wait_for(self, place: Endpoint, request: Request) -> None:
        def over(is_there: bool) -> None:
            self.loads.release(place.address)
            request.waits += is_there
            if is_there and (request.waits > CHOSEN_AGAIN or self._way.is_below(place, self)):
                self._send(place, request)
            else:
                self.take(request)

        self.loads.hold(place.address)
        self._ensure(place, request.adapter, over)

    def copies(self, adapter: str) -> list[Copy]:
        """As `Staging._copies`."""
        found = []
        for stager, warm in self._copies.of(adapter):
            for endpoint in self.pool.at(stager):
                standing = self.snapshot.standing(endpoint)
                leased = self._has_lease(endpoint, adapter)
                if standing is Standing.READY:
                    found.append(Copy(endpoint, At.LEASED if warm and leased else At.WARM if warm else At.COLD))
                elif standing is Standing.DRAINING and (leased or warm):
                    found.append(Copy(endpoint, At.LEAVING if leased else At.PARTING))
        has_lease = any(copy.at is At.LEASED for copy in found)
        of = {copy.endpoint: copy for copy in found}
        for endpoint in self.snapshot.stageable(self.snapshot.candidates(self.pool, adapter)):
            if (endpoint.stager, adapter) in self._asked:
                copy = of.get(endpoint)
                if copy is None:
                    found.append(Copy(endpoint, At.COMING))
                elif copy.at is At.COLD and not has_lease:
                    copy.at = At.LOADING
        return found

    def _has_lease(self, endpoint: Endpoint, adapter: str) -> bool:
        return self._leases.get((endpoint.stager, adapter), 0.0) > self._clock.now

    def _send(self, endpoint: Endpoint, request: Request) -> None:
        node, now = self._nodes[endpoint.stager], self._clock.now
        if not node.is_alive:
            self.take(request)
            return
        if self._leases.get((endpoint.stager, request.adapter), 0.0) < now + LEASE_S / 2:
            self._leases[endpoint.stager, request.adapter] = now + LEASE_S
            node.renew(request.adapter)
        request.held_s = now - request.came_at
        self.loads.send(endpoint.address, now)
        self.popularity.count(request.adapter, request.adapter)
        node.take(request)

    def _ensure(self, endpoint: Endpoint, adapter: str, then: Callable[[bool], None]) -> None:
        call, node = (endpoint.stager, adapter), self._nodes[endpoint.stager]

        def answered(is_there: bool) -> None:
            self._asked[call] -= 1
            if not self._asked[call]:
                del self._asked[call]
                node.waits[self.name] -= 1
            if is_there:
                self._leases[call] = self._clock.now + LEASE_S
            then(is_there)

        node.waits[self.name] += not self._asked[call]  # all who wait for the same share one call
        self._asked[call] += 1
        node.ensure(adapter, answered)

    def _prepare(self, endpoint: Endpoint, adapter: str) -> None:
        preparing = self._preparing.setdefault(endpoint.stager, set())
        if adapter not in preparing and len(preparing) < MAX_PREPARATIONS:
            preparing.add(adapter)
            self.prepared += 1
            self._ensure(endpoint, adapter, lambda _: preparing.discard(adapter))

    def _tick(self) -> None:
        self._ticks += 1
        self.loads.sweep(self._clock.now)
        if self._ticks % WINDOW_TICKS == 0:
            self.popularity.roll()
        self._clock.after(TICK_S, self._tick)

    # -- how the fleet moves

    def follow(self, pool: Pool, came: Endpoint) -> None:
        """The fleet has one more, which is given what it will own before it is ready."""
        self.snapshot = Snapshot((pool,), self.snapshot.standings)
        self.loads.follow(e.address for e in pool.table.endpoints)
        self.observe(came, is_prepared=False)
        owned = (adapter for adapter, _ in self.popularity.ranked() if pool.candidates(adapter, 1) == (came,))
        self._give(came, [adapter for adapter, _ in zip(owned, range(MOST), strict=False)])

    def _give(self, came: Endpoint, owned: list[str]) -> None:
        batch, rest = owned[:AT_ONCE], owned[AT_ONCE:]
        if batch:
            self._all(batch, lambda adapter, then: self._ensure(came, adapter, then), lambda: self._give(came, rest))
        else:
            self.observe(came, is_prepared=True)

    def leave(self, endpoint: Endpoint) -> None:
        """It drains: what is leased there is made warm elsewhere, the hottest first."""
        if self.snapshot.standing(endpoint) is not Standing.DRAINING:
            return
        now = self._clock.now
        leased = [adapter for (stager, adapter), until in self._leases.items() if stager == endpoint.stager and until > now]
        rank = {adapter: place for place, (adapter, _) in enumerate(self.popularity.ranked())}
        leased.sort(key=lambda adapter: rank.get(adapter, len(rank)))
        if leased:
            self._all(leased[:AT_ONCE], lambda adapter, then: self._succeed(endpoint, adapter, then), lambda: self.leave(endpoint))

    def _succeed(self, endpoint: Endpoint, adapter: str, then: Callable[[bool], None]) -> None:
        def over(is_there: bool) -> None:
            self._leases.pop((endpoint.stager, adapter), None)
            then(is_there)

        others = [copy for copy in self.copies(adapter) if copy.endpoint != endpoint and copy.at in (At.LEASED, At.WARM)]
        if any(copy.at is At.LEASED for copy in others):
            self._clock.after(0.0, over, True)
            return
        places = [copy.endpoint for copy in others] or self.snapshot.stageable(self.snapshot.candidates(self.pool, adapter))
        self._ensure(places[0], adapter, over)

    def _all(self, adapters: list[str], do: Callable[[str, Callable[[bool], None]], None], then: Callable[[], None]) -> None:
        missing = set(adapters)

        def done(adapter: str) -> None:
            missing.discard(adapter)
            if not missing:
                then()

        for adapter in adapters:
            do(adapter, lambda _, adapter=adapter: done(adapter))  # type: ignore[misc]

    def observe(self, endpoint: Endpoint, **seen: object) -> None:
        """As `Membership.observe`."""
        observed = self._observed[endpoint.address] = replace(self._observed.get(endpoint.address, Observed()), **seen)  # type: ignore[arg-type]
        standing, why = observed.standing()
        standings = {address: known for address, known in self.snapshot.standings.items() if address != endpoint.address}
        if standing is not Standing.READY:
            standings[endpoint.address] = (standing, why)
        self.snapshot = Snapshot(self.snapshot.pools, standings)
        self.loads.stand(e.address for e in self.pool.table.endpoints if self.snapshot.standing(e) is Standing.READY)
        if standing is Standing.DOWN:
            for key in [key for key in self._leases if key[0] == endpoint.stager]:
                del self._leases[key]
