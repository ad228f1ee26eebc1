"""What this router knows to be on which node's disk, and known to its engine: leases, so that a warm request makes no RPC; and copies, of which the
stagers tell, and which are worth asking for."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ..client import Claimed, Loading, Staged, StagerClient
from ..core.copies import Copies
from ..core.durations import Copying, smoothed
from ..core.endpoint import Endpoint
from ..core.events import Mutation
from ..errors import LoraExtprocError, NodeDraining, StagerUnavailable
from ..flight import SingleFlight
from ..metrics import RouterMetrics
from .comparisons import Comparisons

log = logging.getLogger(__name__)

SAFETY_S = 1.0  # a lease is not used in its last second: the engine still has to open the files
RENEW_AT = 0.5  # a lease in use is renewed in the background after this part of its time
RENEW_AGAIN_S = 5.0  # after a renewal that failed: its stager may be back by then
PREPARE_AGAIN_S = 10.0  # after a preparation that failed; somebody is served elsewhere meanwhile
MAX_PREPARATIONS = 4  # at once per stager: each is a load, which stalls what the engine generates
CLAIM_S = 3.0  # less than a new instance waits before it removes anything
RELEASE_S = 1.0  # at the end of the process, for every stager at once
RELEASE_AGAIN_S = 5.0  # after one that failed, as while its stager hangs: a node that drains would be taken for needed until the lease ends
IN_TRANSIT_S = 5.0  # what was sent to a version that has been replaced has reached its engine by then
SWEEP_ABOVE = 1024  # leases that ended are dropped when the table has doubled since the last sweep, and not below this


@dataclass(slots=True)
class Lease:
    """The stager's promise, as monotonic times of this process."""

    digest: str
    until: float
    renew_after: float
    model: str = ""  # what a request's `model` must be there; "": the adapter's name
    reply: "Reply | None" = None  # the last one that relied on it


@dataclass(slots=True)
class Reply:
    """The mutation for a warm request, and what it was made of: as long as that is the same, so is the mutation, which keeps its encoded form."""

    endpoints: tuple[Endpoint, ...]
    prefiller: Endpoint | None
    key: str
    mutation: Mutation


Key = tuple[str, str, bool]  # stager, adapter, and whether its engine must know it by the adapter's own name


@dataclass(slots=True)
class _Call:
    """One Ensure in flight."""

    moved_at: float  # when it last told that it got further
    longest_gap_s: float = 0.0
    is_believed: bool = True  # whether what it will answer can still be true


class Residency:
    """Leases by Key. All callers that wait for one adapter on one node share one Ensure call."""

    def __init__(self, clients: Mapping[str, StagerClient], metrics: RouterMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = clients
        self.copies = Copies()
        self._comparisons = Comparisons(clients, self.copies, self.refreshed, clock)
        self._metrics = metrics
        self._clock = clock
        self._leases: dict[Key, Lease] = {}
        self._calls: dict[Key, _Call] = {}
        self._flights: SingleFlight[Key, Staged] = SingleFlight(self._flies)
        self._flying: dict[str, int] = {}  # how many of them, by adapter: each request that looks at all copies asks, and mostly there are none
        self._preparing: dict[str, set[Key]] = {}  # by stager
        self._not_before: dict[Key, float] = {}  # when a preparation that failed may be tried again
        self.copying = Copying()  # how long it takes to make another copy of what some node has
        self._usual_gap_s: dict[str, float] = {}  # by stager: for how long a flight tells nothing, usually
        self._releases: set[asyncio.Task[None]] = set()
        self._sweep_at = SWEEP_ABOVE

    # -- what is there

    def lease(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> Lease | None:
        """The lease, if `adapter` is certainly on the endpoint's disk now and known to its engine. Renews one that is past its half, without waiting."""
        key = (endpoint.stager, adapter, plain)
        lease = self._leases.get(key)
        if lease is None:
            return None
        now = self._clock()
        if now >= lease.until:
            return None
        if now >= lease.renew_after and key not in self._flights:
            lease.renew_after = now + RENEW_AGAIN_S
            self._flights.start(key, lambda: self._ask(key))
        return lease

    def known(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> Lease | None:
        """As `lease`, for who only looks: renews nothing."""
        lease = self._leases.get((endpoint.stager, adapter, plain))
        return lease if lease is not None and self._clock() < lease.until else None

    def leased(self, stagers: Sequence[str], adapter: str, *, plain: bool = False) -> dict[str, Lease]:
        """The leases on it with these stagers, by stager, but for copies that are being compared. As `known`, this renews nothing."""
        now, compared, found = self._clock(), self._comparisons.of(adapter), {}
        for stager in stagers:
            lease = self._leases.get((stager, adapter, plain))
            if lease is not None and now < lease.until and stager not in compared:
                found[stager] = lease
        return found

    def compared(self, adapter: str) -> Collection[str]:
        """The stagers whose copy is probably of an old version: another node has a new one, and theirs is being compared."""
        return self._comparisons.of(adapter)

    # -- asking

    async def ensure(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> Staged:
        """Ask the endpoint's stager and wait. Cancelling ends this wait only."""
        key = (endpoint.stager, adapter, plain)
        return await self._flights.join(key, lambda: self._ask(key))

    def ask(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> asyncio.Task[Staged]:
        """As `ensure`, for who waits for several at once: the call, which belongs to all that wait for it. `leave` must follow."""
        key = (endpoint.stager, adapter, plain)
        return self._flights.enter(key, lambda: self._ask(key))

    def leave(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> None:
        """The wait for what was asked is over, whatever came of it."""
        self._flights.leave((endpoint.stager, adapter, plain))

    def prepare(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> None:
        """Ask the endpoint's stager in the background, while the adapter is served elsewhere. Nothing if that many are asked for already."""
        key = (endpoint.stager, adapter, plain)
        preparing = self._preparing.get(endpoint.stager, ())
        if key in self._flights or len(preparing) >= MAX_PREPARATIONS or self._clock() < self._not_before.get(key, 0.0):
            return
        self._preparing.setdefault(endpoint.stager, set()).add(key)
        self._flights.start(key, lambda: self._prepare(key))

    def asked(self, endpoints: Sequence[Endpoint], adapter: str, *, plain: bool = False) -> list[Endpoint]:
        """Those whose stagers have been asked, and have not answered."""
        if adapter not in self._flying:
            return []
        flights = self._flights
        return [endpoint for endpoint in endpoints if (endpoint.stager, adapter, plain) in flights]

    def stuck_s(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> float:
        """For how many seconds the call in flight has told nothing new; 0 without one."""
        call = self._calls.get((endpoint.stager, adapter, plain))
        return 0.0 if call is None else self._clock() - call.moved_at

    def usual_gap_s(self, endpoint: Endpoint) -> float:
        """For how many seconds a call to that stager tells nothing new, usually; 0 if none has ended."""
        return self._usual_gap_s.get(endpoint.stager, 0.0)

    def waiting(self, endpoint: Endpoint, adapter: str) -> int:
        """How many callers wait for `adapter` at that endpoint."""
        return sum(self._flights.waiters((endpoint.stager, adapter, plain)) for plain in (False, True))

    # -- what stagers say

    def forget(self, stager: str, adapter: str) -> None:
        """The stager says that it is gone.

        An answer that is on its way may be older than that: the stager grants a lease; it removes the adapter because somebody asked; the
        watch tells so; the answer with the lease arrives. It serves who waits for it, and makes no lease.
        """
        self.copies.drop(stager, adapter)
        self._forget([(stager, adapter, plain) for plain in (False, True)])

    def published(self, stager: str, adapter: str) -> None:
        """It is on that node's disk now, if it was not known to be there: the answer to a request may have come before."""
        if all(node != stager for node, _ in self.copies.of(adapter)):
            self.copies.put(stager, adapter, warm=False)

    def refreshed(self, stager: str, adapter: str) -> None:
        """A new version is there. The next request asks for it; the lease on the old one is given back when what was sent there has arrived, and other copies
        are compared."""
        leases = [lease for plain in (False, True) if (lease := self._leases.get((stager, adapter, plain))) is not None]
        self.forget(stager, adapter)
        self.copies.put(stager, adapter, warm=False)
        for digest, until in {lease.digest: lease.until for lease in leases}.items():
            self._release_soon(stager, adapter, digest, until)
        self._comparisons.changed(stager, adapter)

    async def claim(self, stager: str) -> None:
        """A new instance of the stager is there, and knows of no lease: tell it what is relied on, and forget what it does not honour.

        Until it has answered the leases count, since a new instance removes nothing before it has heard what routers rely on. An answer to what the
        instance before it was asked is not believed.
        """
        for key, call in self._calls.items():
            if key[0] == stager:
                call.is_believed = False
        now = self._clock()
        relied = {key: lease for key, lease in self._leases.items() if key[0] == stager and lease.until > now}
        claims = [
            Claimed(adapter, lease.digest, _loading(plain=plain), lease.model or adapter, lease.until - now) for (_, adapter, plain), lease in relied.items()
        ]
        try:
            async with asyncio.timeout(CLAIM_S):
                granted = await self._clients[stager].claim(claims) if claims else ()
        except (LoraExtprocError, TimeoutError) as error:
            log.warning("stager %s: %d leases are given up, since its new instance cannot be told of them: %s", stager, len(claims), error)
            granted = tuple(0.0 for _ in claims)
        for (key, lease), lease_s in zip(relied.items(), granted, strict=True):
            if self._leases.get(key) is not lease:
                continue  # another has taken its place meanwhile
            if lease_s <= SAFETY_S:
                self._forget([key])
            else:
                lease.until, lease.renew_after = now + lease_s - SAFETY_S, now + lease_s * RENEW_AT
        if claims:
            honoured = sum(lease_s > SAFETY_S for lease_s in granted)
            log.info("stager %s: its new instance honours %d of %d leases", stager, honoured, len(claims))

    def leased_at(self, stager: str) -> list[tuple[str, bool]]:
        """What is leased there: names of adapters, and whether the engine must know them by those."""
        now = self._clock()
        return [(adapter, plain) for (node, adapter, plain), lease in self._leases.items() if node == stager and lease.until > now]

    def give_back(self, stager: str, adapter: str, *, plain: bool) -> None:
        """Nothing more is sent to this copy. The lease is released when what was sent has arrived."""
        lease = self._leases.pop((stager, adapter, plain), None)
        if lease is not None:
            self._release_soon(stager, adapter, lease.digest, lease.until)

    def forget_stager(self, stager: str) -> None:
        """It is no longer one of the fleet."""
        self.copies.forget(stager)
        self._usual_gap_s.pop(stager, None)
        self.forget_leases(stager)

    def forget_leases(self, stager: str) -> None:
        """Its engine has gone, and will know no adapter when it comes back. What the node has, its stager tells, and tells only what changes: an engine that
        was merely cut off for a moment has it still."""
        self._forget([key for key in (*self._leases, *self._calls) if key[0] == stager])

    def _forget(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._leases.pop(key, None)
            if key in self._calls:
                self._calls[key].is_believed = False
        self._metrics.leases.set(len(self._leases))

    # -- the end

    async def close(self) -> None:
        for task in self._releases:
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)
        await self._comparisons.close()
        await self._flights.close()

    async def release_all(self) -> None:
        """Give every lease back, so that the nodes may use the room. Who does not answer at once keeps them until they end by themselves."""

        async def release(client: StagerClient) -> None:
            with contextlib.suppress(LoraExtprocError, TimeoutError):
                async with asyncio.timeout(RELEASE_S):
                    await client.release()

        held = {stager for stager, _, _ in self._leases}
        await asyncio.gather(*(release(self._clients[stager]) for stager in held if stager in self._clients))
        self._leases.clear()

    def _release_soon(self, stager: str, adapter: str, digest: str, until: float) -> None:
        task = asyncio.create_task(self._release_later(stager, adapter, digest, until), name=f"release {adapter}")
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release_later(self, stager: str, adapter: str, digest: str, until: float) -> None:
        """Again and again while the stager cannot be told, until the lease ends by itself."""
        pause_s = IN_TRANSIT_S
        while True:
            await asyncio.sleep(pause_s)
            if any(lease.digest == digest for key, lease in self._leases.items() if key[0] == stager):
                return  # another adapter with the same content: the stager counts one hold for both
            client = self._clients.get(stager)
            if client is None or self._clock() >= until:
                return
            with contextlib.suppress(LoraExtprocError):
                await client.release(adapter, digest)
                return
            pause_s = RELEASE_AGAIN_S

    # -- one call

    def _flies(self, key: Key, change: int) -> None:
        adapter = key[1]
        flying = self._flying.get(adapter, 0) + change
        if flying:
            self._flying[adapter] = flying
        else:
            del self._flying[adapter]

    async def _prepare(self, key: Key) -> Staged:
        try:
            return await self._ask(key)
        except LoraExtprocError:
            if len(self._not_before) >= SWEEP_ABOVE:
                now = self._clock()
                self._not_before = {key: at for key, at in self._not_before.items() if at > now}
            self._not_before[key] = self._clock() + PREPARE_AGAIN_S
            raise
        finally:
            preparing = self._preparing[key[0]]
            preparing.discard(key)
            if not preparing:
                del self._preparing[key[0]]

    async def _ask(self, key: Key) -> Staged:
        stager, adapter, plain = key
        client = self._clients.get(stager)
        if client is None:
            raise StagerUnavailable("the endpoint has no stager")
        asked, before = self._clock(), dict(self.copies.of(adapter))
        call = self._calls[key] = _Call(asked)
        try:
            staged = await client.ensure(adapter, loading=_loading(plain=plain), on_progress=lambda _: self._moved(call))
        except LoraExtprocError as error:
            log.info("%s on %s: %s: %s", adapter, stager, error.reason, error.message)
            if isinstance(error, NodeDraining) and stager in before:
                self.copies.put(stager, adapter, warm=False)  # it would serve what it has in memory
            raise
        finally:
            del self._calls[key]
        answered = self._clock()
        if staged.staged:
            log.info("%s on %s: staged from %s in %.3f s, %d bytes", adapter, stager, staged.origin, answered - asked, staged.bytes)
            self._moved(call)
            self._usual_gap_s[stager] = smoothed(self._usual_gap_s.get(stager, call.longest_gap_s), call.longest_gap_s)
        if before and not before.get(stager):
            self.copying.took(answered - asked, is_fetch=staged.staged)
        granted = min(answered, asked + staged.waited_s)  # the answer may have been late: the lease runs since the stager gave it
        if not call.is_believed:  # nor is the lease kept: the stager would count it to its end, and a drain would last as long
            self._release_soon(stager, adapter, staged.digest, granted + staged.lease_s)
            return staged
        model = "" if staged.model == adapter else staged.model
        if staged.staged and any(lease.digest != staged.digest for lease in self.leased(self.copies.warm(adapter), adapter, plain=plain).values()):
            self._comparisons.changed(stager, adapter)  # the origin has a new version, and this node is the first to have it
        self.copies.put(stager, adapter, warm=True)
        self._leases[key] = Lease(staged.digest, granted + staged.lease_s - SAFETY_S, granted + staged.lease_s * RENEW_AT, model)
        if len(self._leases) >= self._sweep_at:
            self._sweep(answered)
        self._metrics.leases.set(len(self._leases))
        return staged

    def _moved(self, call: _Call) -> None:
        """The call has told that it got further."""
        now = self._clock()
        call.longest_gap_s = max(call.longest_gap_s, now - call.moved_at)
        call.moved_at = now

    def _sweep(self, now: float) -> None:
        for key in [key for key, lease in self._leases.items() if lease.until <= now]:
            del self._leases[key]
        self._sweep_at = max(SWEEP_ABOVE, 2 * len(self._leases))


def _loading(*, plain: bool) -> Loading:
    return Loading.PLAIN if plain else Loading.VERSIONED
