"""Who is there, and what may be sent to whom: the snapshot that decisions are made on, kept current by each stager's Watch stream.

A stager that hangs keeps its connections, so it proves with a heartbeat that it lives. When it falls silent, or its stream ends, this router asks the
engine itself: an engine that answers goes on serving what is there, one that does not is a node that is gone. `core/standing.py` has the table.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..client import Demand, Evicted, NodeState, Published, Refreshed, Refused, StagerClient
from ..core.endpoint import Endpoint
from ..core.placement import Pool, Snapshot
from ..core.standing import Observed, Stager, Standing
from ..errors import LoraExtprocError
from ..heartbeat import Heard, Silent
from ..metrics import RouterMetrics
from .models import Models
from .probe import Probe
from .residency import Residency

log = logging.getLogger(__name__)

RECONNECT_S = 0.5  # a restarted stager is back in the walk this soon; the channel itself backs off between attempts
PROBE_EVERY_S = 1.0  # while a stager is lost, its engine is asked again after so long
HUNG_UP_S = 0.05  # after an engine has hung up: its port refuses connections by then, if it has gone
WATCHES_PER_S = 400.0  # heartbeats of all stagers together that this router listens to: a few percent of a core


class Membership:
    """Endpoints count as ready until their stager is heard of; then they stand as it says and as their engines answer."""

    def __init__(self, pools: Sequence[Pool], residency: Residency, models: Models, metrics: RouterMetrics, probe: Probe, heartbeat_s: float) -> None:
        self.snapshot = Snapshot(tuple(pools))
        self._residency = residency
        self._models = models
        self._metrics = metrics
        self._probe = probe
        self._heartbeat_s = heartbeat_s
        self._observed: dict[str, Observed] = {}  # by endpoint address
        self._since: dict[str, float] = {}  # by endpoint address, when it began to stand as it does
        self._turn = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()  # replaced at each change
        self._count()

    def in_turn(self, candidates: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
        """The candidates, beginning with another one each time."""
        self._turn += 1
        first = self._turn % len(candidates)
        return (*candidates[first:], *candidates[:first])

    async def changed(self, timeout_s: float) -> None:
        """Wait for the next snapshot, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    # -- how endpoints stand

    def observe(self, endpoint: Endpoint, **seen: object) -> None:
        """Something new was seen of `endpoint`: fields of `Observed`. Replaces the snapshot and logs if the endpoint stands otherwise because of it."""
        known = self._observed.get(endpoint.address, Observed())
        observed = self._observed[endpoint.address] = replace(known, **seen)  # type: ignore[arg-type]  # as the callers below name them
        standing, why = observed.standing()
        before, before_why = self.snapshot.standings.get(endpoint.address, (Standing.READY, ""))
        if (standing, why) == (before, before_why):
            return
        standings = {address: known for address, known in self.snapshot.standings.items() if address != endpoint.address}
        if standing is not Standing.READY:
            standings[endpoint.address] = (standing, why)
        self.snapshot = Snapshot(self.snapshot.pools, standings, self.snapshot.version + 1)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._count()
        if standing is not before:
            self._tell(endpoint, standing, why)

    def _tell(self, endpoint: Endpoint, standing: Standing, why: str) -> None:
        now = time.monotonic()
        since = self._since.get(endpoint.address, now)
        self._since[endpoint.address] = now
        who = f"endpoint {endpoint.address} ({endpoint.node})"
        if standing is Standing.READY:
            log.info("%s is ready again after %.1f s", who, now - since)
        elif standing is Standing.DRAINING:
            log.warning("%s is draining: %s; what is leased there and base models go on being sent there", who, why)
        else:
            log.warning("%s is down: %s; its keys go to the next candidates", who, why)

    def _count(self) -> None:
        everyone = sum(len(pool.table.endpoints) for pool in self.snapshot.pools)
        counts = dict.fromkeys(Standing, 0)
        for standing, _ in self.snapshot.standings.values():
            counts[standing] += 1
        counts[Standing.READY] = everyone - sum(counts.values())
        for standing, count in counts.items():
            self._metrics.endpoints.labels(standing.name.lower()).set(count)

    # -- watching

    def start(self, clients: Mapping[str, StagerClient]) -> None:
        """Watch every stager until `stop`."""
        self._heartbeat_s = max(self._heartbeat_s, len(clients) / WATCHES_PER_S)
        for address, client in clients.items():
            served = [e for pool in self.snapshot.pools for e in pool.table.endpoints if e.stager == address]
            self._tasks.append(asyncio.create_task(self._watch(client, served), name=f"watch {address}"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._probe.close()

    async def _watch(self, client: StagerClient, endpoints: Sequence[Endpoint]) -> None:
        watch = _Watch(self, client, endpoints)
        try:
            while True:
                try:
                    await watch.follow()
                    why = "its stream ended"
                except LoraExtprocError as error:
                    why = error.message.removeprefix(f"stager {client.address}: ")
                except Exception as error:
                    log.exception("the watch of stager %s met an error of the router's own", client.address)
                    why = type(error).__name__
                watch.lost(why)
                await asyncio.sleep(RECONNECT_S)
        finally:
            await watch.ask_engines_no_more()


class _Watch:
    """One stager's stream, and what follows from each event. Its parent's endpoints stand as it observes them."""

    def __init__(self, membership: Membership, client: StagerClient, endpoints: Sequence[Endpoint]) -> None:
        self._m = membership
        self._client = client
        self._endpoints = endpoints
        self._instance = ""
        self._said = ""  # why it was lost, since it was heard last
        self._asking: asyncio.Task[None] | None = None  # the engines, while the stager says nothing

    async def follow(self) -> None:
        """Take events until the stream ends. Raises what the client raises."""
        stager, m = self._client.address, self._m
        async for event in self._client.watch(m._heartbeat_s):  # noqa: SLF001  # one thing in two classes
            match event:
                case NodeState():
                    await self._node(event)
                case Silent(seconds):
                    log.warning("stager %s has been silent for %.1f s; its engine is asked directly", stager, seconds)
                    self._observe(is_silent=True)
                    self._ask_engines()
                case Heard():
                    await self.ask_engines_no_more()
                    self._observe(is_silent=False, engine_answers=None)
                case Evicted(adapter):
                    m._residency.forget(stager, adapter)  # noqa: SLF001
                    m._models.changed(stager)  # noqa: SLF001
                case Refreshed(adapter):
                    m._residency.refreshed(stager, adapter)  # noqa: SLF001
                    m._models.changed(stager)  # noqa: SLF001
                case Refused():
                    m._models.changed(stager)  # noqa: SLF001
                case Published():  # nothing is believed that was not asked for
                    m._models.changed(stager)  # noqa: SLF001
                case Demand() as demand:
                    m._residency.learn_demand(stager, demand)  # noqa: SLF001
                case _:
                    pass

    def lost(self, why: str) -> None:
        """The stream has ended: what is leased counts on, if the engines live. They are asked until the stager says something again.

        A stager that is gone refuses each new stream at once: a question to an engine that hangs outlives many of those. A reason that repeats is logged
        once.
        """
        if why != self._said:
            log.warning("stager %s is lost: %s", self._client.address, why)
        self._said = why
        self._observe(stager=Stager.LOST, why=f"stager {self._client.address} is lost: {why}", is_silent=False)
        self._ask_engines()

    async def _node(self, state: NodeState) -> None:
        await self.ask_engines_no_more()
        if self._instance not in ("", state.instance) or not state.resumed:
            await self._m._residency.claim(self._client.address)  # noqa: SLF001
        self._instance, self._said = state.instance, ""
        self._m._models.came(self._client.address)  # noqa: SLF001  # its engine may be another, too
        stager = Stager.READY if state.ready else Stager.STOPPING if state.draining else Stager.NOT_READY
        self._observe(stager=stager, why=state.why, is_silent=False, engine_answers=None)
        if stager is Stager.STOPPING:  # and says nothing more of its engine
            self._ask_engines()

    def _observe(self, **seen: object) -> None:
        for endpoint in self._endpoints:
            self._m.observe(endpoint, **seen)

    def _ask_engines(self) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._keep_asking(), name=f"engines of {self._client.address}")

    async def ask_engines_no_more(self) -> None:
        """The stager tells how they are."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _keep_asking(self) -> None:
        await asyncio.gather(*(self._follow_engine(endpoint) for endpoint in self._endpoints))

    async def _follow_engine(self, endpoint: Endpoint) -> None:
        """Ask the engine again and again, and notice when it goes: one that was started anew in between answers well, and knows no adapter.

        It closes its connections when it ends; one that closes them for being idle goes on answering, and is only asked every PROBE_EVERY_S.
        """
        m = self._m
        until_it_goes: asyncio.Task[None] | None = None
        try:
            while True:
                answers = await m._probe.answers(endpoint.address)  # noqa: SLF001
                if not answers:
                    m._residency.forget_stager(self._client.address)  # noqa: SLF001
                m.observe(endpoint, engine_answers=answers)
                if until_it_goes is None and answers:
                    until_it_goes = asyncio.create_task(m._probe.until_it_hangs_up(endpoint.address), name=f"engine {endpoint.address}")  # noqa: SLF001
                    await asyncio.wait({until_it_goes}, timeout=PROBE_EVERY_S)
                    await asyncio.sleep(HUNG_UP_S if until_it_goes.done() else 0)
                elif until_it_goes is not None and not until_it_goes.done():
                    await asyncio.wait({until_it_goes}, timeout=PROBE_EVERY_S)
                else:
                    until_it_goes = None
                    await asyncio.sleep(PROBE_EVERY_S)
        finally:
            if until_it_goes is not None:
                until_it_goes.cancel()
