"""Who is there and who is down: the snapshot that decisions are made on, kept current by each stager's Watch stream."""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from ..client import Demand, Evicted, NodeState, Published, Refreshed, StagerClient
from ..core.endpoint import Endpoint
from ..core.placement import Pool, Snapshot
from ..errors import LoraExtprocError, StagerUnavailable
from ..metrics import RouterMetrics
from .catalog import Catalog
from .residency import Residency

log = logging.getLogger(__name__)

RECONNECT_S = 0.5  # a restarted stager is back in the walk this soon; the channel itself backs off between attempts


class Membership:
    """Endpoints count as ready until their stager says otherwise or its stream breaks; then their keys go to the next candidate."""

    def __init__(self, pools: Sequence[Pool], residency: Residency, catalog: Catalog, metrics: RouterMetrics) -> None:
        self.snapshot = Snapshot(tuple(pools))
        self._residency = residency
        self._catalog = catalog
        self._metrics = metrics
        self._in_flight: Counter[str] = Counter()
        self._turn = 0
        self._watches: list[asyncio.Task[None]] = []
        self._count()

    # -- requests in flight, as this router counts them

    def begin(self, endpoint: Endpoint) -> None:
        self._in_flight[endpoint.address] += 1

    def end(self, endpoint: Endpoint) -> None:
        self._in_flight[endpoint.address] -= 1

    def least_loaded(self, candidates: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
        """Fewest requests in flight first; equals take turns."""
        self._turn += 1
        first = self._turn % len(candidates)
        return tuple(sorted((*candidates[first:], *candidates[:first]), key=lambda e: self._in_flight[e.address]))

    # -- who is down

    def set_down(self, endpoint: Endpoint, why: str) -> None:
        """Take `endpoint` out of every walk. Replaces the snapshot; logs only a change."""
        if endpoint.address not in self.snapshot.down:
            log.warning("endpoint %s (%s) is down: %s", endpoint.address, endpoint.node, why)
        self._replace({**self.snapshot.down, endpoint.address: why})

    def set_ready(self, endpoint: Endpoint) -> None:
        """Give `endpoint` its keys back."""
        if endpoint.address in self.snapshot.down:
            log.info("endpoint %s (%s) is ready", endpoint.address, endpoint.node)
            self._replace({address: why for address, why in self.snapshot.down.items() if address != endpoint.address})

    def _replace(self, down: Mapping[str, str]) -> None:
        old = self.snapshot
        self.snapshot = Snapshot(old.pools, down, old.version + 1)
        self._count()

    def _count(self) -> None:
        everyone = sum(len(pool.table.endpoints) for pool in self.snapshot.pools)
        self._metrics.endpoints.labels("ready").set(everyone - len(self.snapshot.down))
        self._metrics.endpoints.labels("down").set(len(self.snapshot.down))

    # -- watching

    def start(self, clients: Mapping[str, StagerClient]) -> None:
        """Watch every stager until `stop`."""
        for address, client in clients.items():
            served = [e for pool in self.snapshot.pools for e in pool.table.endpoints if e.stager == address]
            self._watches.append(asyncio.create_task(self._watch(client, served), name=f"watch {address}"))

    async def stop(self) -> None:
        for task in self._watches:
            task.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    async def _watch(self, client: StagerClient, endpoints: Sequence[Endpoint]) -> None:
        instance = said = ""
        while True:
            why = f"stager {client.address}: stream ended"
            try:
                async for event in client.watch():
                    match event:
                        case NodeState(ready, node_why, now_instance, resumed):
                            if instance != now_instance or not resumed:  # a restarted stager remembers no lease of ours
                                self._residency.forget_stager(client.address)
                            self._catalog.changed(client.address)  # its engine may be another, too
                            instance = now_instance
                            for endpoint in endpoints:
                                if ready:
                                    self.set_ready(endpoint)
                                else:
                                    self.set_down(endpoint, node_why)
                        case Evicted(adapter):
                            self._residency.forget(client.address, adapter)
                            self._catalog.changed(client.address)
                        case Refreshed(adapter):
                            self._residency.refreshed(client.address, adapter)
                            self._catalog.changed(client.address)
                        case Published():  # nothing is believed that was not asked for
                            self._catalog.changed(client.address)
                        case Demand() as demand:
                            self._residency.learn_demand(client.address, demand)
                        case _:
                            pass
            except StagerUnavailable as error:
                why = error.message
            except LoraExtprocError as error:
                why = f"stager {client.address}: {error.message.removeprefix(f'stager {client.address}: ')}"
                if why != said:
                    log.warning("watch: %s", why)
                said = why
            for endpoint in endpoints:  # leases are not used meanwhile; what went since then is told when the stream is back
                self.set_down(endpoint, why)
            await asyncio.sleep(RECONNECT_S)
