"""What this router knows to be on which node's disk, and known to its engine: leases, so that a warm request makes no RPC."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..client import Demand, Loading, Staged, StagerClient
from ..core.endpoint import Endpoint
from ..errors import LoraExtprocError, StagerUnavailable
from ..flight import SingleFlight
from ..metrics import RouterMetrics

log = logging.getLogger(__name__)

SAFETY_S = 1.0  # a lease is not used in its last second: the engine still has to open the files
RENEW_AT = 0.5  # a lease in use is renewed in the background after this part of its time
RELEASE_S = 1.0  # at the end of the process, for every stager at once
IN_TRANSIT_S = 5.0  # what was sent to a version that has been replaced has reached its engine by then
SWEEP_ABOVE = 1024  # leases that ended are dropped when the table has doubled since the last sweep, and not below this


@dataclass(slots=True)
class Lease:
    """The stager's promise, as monotonic times of this process."""

    digest: str
    until: float
    renew_after: float
    model: str = ""  # what a request's `model` must be there; "": the adapter's name


Key = tuple[str, str, bool]  # stager, adapter, and whether its engine must know it by the adapter's own name


class Residency:
    """Leases by Key. All callers that wait for one adapter on one node share one Ensure call."""

    def __init__(self, clients: Mapping[str, StagerClient], metrics: RouterMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = clients
        self._metrics = metrics
        self._clock = clock
        self._leases: dict[Key, Lease] = {}
        self._asked: dict[Key, bool] = {}  # calls under way -> whether what they will answer can still be believed
        self._flights: SingleFlight[Key, Staged] = SingleFlight()
        self._demand: dict[str, Demand] = {}  # by stager
        self._releases: set[asyncio.Task[None]] = set()
        self._sweep_at = SWEEP_ABOVE

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
            lease.renew_after = lease.until  # one attempt; if it fails, the next request after the end asks anew
            self._flights.start(key, lambda: self._ask(key))
        return lease

    async def ensure(self, endpoint: Endpoint, adapter: str, *, plain: bool = False) -> Staged:
        """Ask the endpoint's stager and wait. Cancelling ends this wait only."""
        key = (endpoint.stager, adapter, plain)
        return await self._flights.join(key, lambda: self._ask(key))

    def waiting(self, endpoint: Endpoint, adapter: str) -> int:
        """How many callers wait for `adapter` at that endpoint."""
        return sum(self._flights.waiters((endpoint.stager, adapter, plain)) for plain in (False, True))

    def is_full(self, endpoint: Endpoint) -> bool:
        """Whether as many adapters are in demand on the node as its engine keeps in memory."""
        demand = self._demand.get(endpoint.stager)
        return demand is not None and 0 < demand.cpu_slots <= demand.adapters

    def learn_demand(self, stager: str, demand: Demand) -> None:
        """What the stager says."""
        self._demand[stager] = demand

    def forget(self, stager: str, adapter: str) -> None:
        """The stager says that it is gone.

        An answer that is on its way may be older than that: the stager grants a lease; it removes the adapter because somebody asked; the
        watch tells so; the answer with the lease arrives. It serves who waits for it, and makes no lease.
        """
        self._forget([(stager, adapter, plain) for plain in (False, True)])

    def refreshed(self, stager: str, adapter: str) -> None:
        """A new version is there. The next request asks for it; the lease on the old one is given back when what was sent there has arrived."""
        digests = {lease.digest for plain in (False, True) if (lease := self._leases.get((stager, adapter, plain))) is not None}
        self.forget(stager, adapter)
        for digest in digests:
            task = asyncio.create_task(self._release_later(stager, adapter, digest), name=f"release {adapter}")
            self._releases.add(task)
            task.add_done_callback(self._releases.discard)

    def forget_stager(self, stager: str) -> None:
        """Nothing is known of that node any more."""
        self._forget([key for key in (*self._leases, *self._asked) if key[0] == stager])
        self._demand.pop(stager, None)

    def _forget(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._leases.pop(key, None)
            if key in self._asked:
                self._asked[key] = False
        self._metrics.leases.set(len(self._leases))

    async def close(self) -> None:
        for task in self._releases:
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)
        await self._flights.close()

    async def release_all(self) -> None:
        """Give every lease back, so that the nodes may use the room. Who does not answer at once keeps them until they end by themselves."""

        async def release(client: StagerClient) -> None:
            with contextlib.suppress(LoraExtprocError, TimeoutError):
                async with asyncio.timeout(RELEASE_S):
                    await client.release()

        held = {stager for stager, _, _ in self._leases}
        await asyncio.gather(*(release(self._clients[stager]) for stager in held))
        self._leases.clear()

    async def _release_later(self, stager: str, adapter: str, digest: str) -> None:
        await asyncio.sleep(IN_TRANSIT_S)
        if any(lease.digest == digest for key, lease in self._leases.items() if key[0] == stager):
            return  # another adapter with the same content: the stager counts one hold for both
        with contextlib.suppress(LoraExtprocError):  # then it ends by itself
            await self._clients[stager].release(adapter, digest)

    async def _ask(self, key: Key) -> Staged:
        stager, adapter, plain = key
        client = self._clients.get(stager)
        if client is None:
            raise StagerUnavailable("the endpoint has no stager")
        asked = self._clock()
        self._asked[key] = True
        try:
            staged = await client.ensure(adapter, loading=Loading.PLAIN if plain else Loading.VERSIONED)
        except LoraExtprocError as error:
            log.info("%s on %s: %s: %s", adapter, stager, error.reason, error.message)
            raise
        finally:
            is_believed = self._asked.pop(key)
        answered = self._clock()
        if staged.staged:
            log.info("%s on %s: staged from %s in %.3f s, %d bytes", adapter, stager, staged.origin, answered - asked, staged.bytes)
        if not is_believed:
            return staged
        granted = min(answered, asked + staged.waited_s)  # the answer may have been late: the lease runs since the stager gave it
        model = "" if staged.model == adapter else staged.model
        self._leases[key] = Lease(staged.digest, granted + staged.lease_s - SAFETY_S, granted + staged.lease_s * RENEW_AT, model)
        if len(self._leases) >= self._sweep_at:
            self._sweep(answered)
        self._metrics.leases.set(len(self._leases))
        return staged

    def _sweep(self, now: float) -> None:
        for key in [key for key, lease in self._leases.items() if lease.until <= now]:
            del self._leases[key]
        self._sweep_at = max(SWEEP_ABOVE, 2 * len(self._leases))
