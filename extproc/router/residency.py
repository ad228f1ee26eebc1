"""What this router knows to be on which node's disk: leases, so that a warm request makes no RPC."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..client import Staged, StagerClient
from ..core.endpoint import Endpoint
from ..errors import LoraExtprocError, StagerUnavailable
from ..flight import SingleFlight
from ..metrics import RouterMetrics

log = logging.getLogger(__name__)

SAFETY_S = 1.0  # a lease is not used in its last second: the engine still has to open the files
RENEW_AT = 0.5  # a lease in use is renewed in the background after this part of its time
RELEASE_S = 1.0  # at the end of the process, for every stager at once
SWEEP_ABOVE = 1024  # leases that ended are dropped when the table has doubled since the last sweep, and not below this


@dataclass(slots=True)
class Lease:
    """The stager's promise, as monotonic times of this process."""

    digest: str
    until: float
    renew_after: float


class Residency:
    """Leases by (stager, adapter). All callers that wait for one adapter on one node share one Ensure call."""

    def __init__(self, clients: Mapping[str, StagerClient], metrics: RouterMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._clients = clients
        self._metrics = metrics
        self._clock = clock
        self._leases: dict[tuple[str, str], Lease] = {}
        self._asked: dict[tuple[str, str], bool] = {}  # calls under way -> whether what they will answer can still be believed
        self._flights: SingleFlight[tuple[str, str], Staged] = SingleFlight()
        self._sweep_at = SWEEP_ABOVE

    def holds(self, endpoint: Endpoint, adapter: str) -> bool:
        """Whether `adapter` is certainly on the endpoint's disk now. Renews a lease that is past its half, without waiting."""
        key = (endpoint.stager, adapter)
        lease = self._leases.get(key)
        if lease is None:
            return False
        now = self._clock()
        if now >= lease.until:
            return False
        if now >= lease.renew_after and key not in self._flights:
            lease.renew_after = lease.until  # one attempt; if it fails, the next request after the end asks anew
            self._flights.start(key, lambda: self._ask(key))
        return True

    async def ensure(self, endpoint: Endpoint, adapter: str) -> Staged:
        """Ask the endpoint's stager and wait. Cancelling ends this wait only."""
        key = (endpoint.stager, adapter)
        return await self._flights.join(key, lambda: self._ask(key))

    def waiting(self, endpoint: Endpoint, adapter: str) -> int:
        """How many callers wait for `adapter` at that endpoint."""
        return self._flights.waiters((endpoint.stager, adapter))

    def forget(self, stager: str, adapter: str) -> None:
        """The stager says that it is gone.

        An answer that is on its way may be older than that: the stager grants a lease; it removes the adapter because somebody asked; the
        watch tells so; the answer with the lease arrives. It serves who waits for it, and makes no lease.
        """
        self._forget([(stager, adapter)])

    def forget_stager(self, stager: str) -> None:
        """Nothing is known of that node any more."""
        self._forget([key for key in (*self._leases, *self._asked) if key[0] == stager])

    def _forget(self, keys: Sequence[tuple[str, str]]) -> None:
        for key in keys:
            self._leases.pop(key, None)
            if key in self._asked:
                self._asked[key] = False
        self._metrics.leases.set(len(self._leases))

    async def close(self) -> None:
        await self._flights.close()

    async def release_all(self) -> None:
        """Give every lease back, so that the nodes may use the room. Who does not answer at once keeps them until they end by themselves."""

        async def release(client: StagerClient) -> None:
            with contextlib.suppress(LoraExtprocError, TimeoutError):
                async with asyncio.timeout(RELEASE_S):
                    await client.release()

        held = {stager for stager, _ in self._leases}
        await asyncio.gather(*(release(self._clients[stager]) for stager in held))
        self._leases.clear()

    async def _ask(self, key: tuple[str, str]) -> Staged:
        stager, adapter = key
        client = self._clients.get(stager)
        if client is None:
            raise StagerUnavailable("the endpoint has no stager")
        asked = self._clock()
        self._asked[key] = True
        try:
            staged = await client.ensure(adapter)
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
        self._leases[key] = Lease(staged.digest, granted + staged.lease_s - SAFETY_S, granted + staged.lease_s * RENEW_AT)
        if len(self._leases) >= self._sweep_at:
            self._sweep(answered)
        self._metrics.leases.set(len(self._leases))
        return staged

    def _sweep(self, now: float) -> None:
        for key in [key for key, lease in self._leases.items() if lease.until <= now]:
            del self._leases[key]
        self._sweep_at = max(SWEEP_ABOVE, 2 * len(self._leases))
