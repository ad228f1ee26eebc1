"""One stager's Watch stream, and what follows from each event: how its endpoints stand, what it has, what its engine works on.

A stager that hangs keeps its connections, so it proves with a heartbeat that it lives. When it falls silent, or its stream ends, this router asks the
engines themselves: an engine that answers goes on serving what is there, one that does not is a node that is gone.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from ..client import Demand, EngineLoad, Evicted, Inventory, Loaded, NodeState, Published, Refreshed, Refused, StagerClient, Unloaded, Woken
from ..core.endpoint import Endpoint
from ..core.load import Engine
from ..core.standing import Stager
from ..errors import LoraExtprocError
from ..heartbeat import Heard, Silent
from .models import Models
from .probe import Probe
from .residency import Residency

log = logging.getLogger(__name__)

RECONNECT_S = 0.5  # a restarted stager is back in the walk this soon; the channel itself backs off between attempts
PROBE_EVERY_S = 1.0  # while a stager is lost, its engine is asked again after so long
HUNG_UP_S = 0.05  # after an engine has hung up: its port refuses connections by then, if it has gone


class Observer(Protocol):
    """Who is told."""

    def at(self, stager: str) -> Sequence[Endpoint]:
        """The endpoints whose directory that stager fills, now."""

    def observe(self, endpoint: Endpoint, **seen: object) -> None:
        """Fields of `Observed`."""

    def engine_says(self, stager: str, engine: Engine, age_s: float) -> None:
        """What the engine worked on so long ago."""

    def in_demand(self, stager: str, adapters: int, slots: int) -> None:
        """How many adapters compete for the engine's slots."""

    def engine_is_new(self, endpoint: Endpoint) -> None:
        """Its engine has gone, and will know nothing when it comes back."""

    def woken(self, stager: str, adapter: str) -> None:
        """A request has asked for what nobody leased there."""

    @property
    def follows_wakes(self) -> bool:
        """Whether that is of interest."""


class Watch:
    """Follows one stager until it is cancelled."""

    def __init__(self, client: StagerClient, observer: Observer, residency: Residency, models: Models, probe: Probe, heartbeat_s: Callable[[], float]) -> None:
        self._client = client
        self._observer = observer
        self._residency = residency
        self._models = models
        self._probe = probe
        self._heartbeat_s = heartbeat_s
        self._instance = ""
        self._said = ""  # why it was lost, since it was heard last
        self._begins_anew = False  # whether the next part of an inventory is the first
        self._asking: asyncio.Task[None] | None = None  # the engines, while the stager says nothing

    async def run(self) -> None:
        """Follow the stream, again and again."""
        try:
            while True:
                try:
                    await self._follow()
                    why = "its stream ended"
                except LoraExtprocError as error:
                    why = error.message.removeprefix(f"stager {self._client.address}: ")
                except Exception as error:
                    log.exception("the watch of stager %s met an error of the router's own", self._client.address)
                    why = type(error).__name__
                self._lost(why)
                await asyncio.sleep(RECONNECT_S)
        finally:
            await self._ask_engines_no_more()

    async def _follow(self) -> None:
        """Take events until the stream ends. Raises what the client raises."""
        stager, residency = self._client.address, self._residency
        async for event in self._client.watch(self._heartbeat_s(), copies=True, load=True, wakes=self._observer.follows_wakes):
            match event:
                case NodeState():
                    await self._node(event)
                case Silent(seconds):
                    log.warning("stager %s has been silent for %.1f s; its engine is asked directly", stager, seconds)
                    self._observe(is_silent=True)
                    self._ask_engines()
                case Heard():
                    await self._ask_engines_no_more()
                    self._observe(is_silent=False, engine_answers=None)
                case EngineLoad(running, waiting, _, slots, cpu_slots, age_s, every_s, routers, others_held):
                    self._observer.engine_says(stager, Engine(running, waiting, cpu_slots or slots, every_s, routers, others_held), age_s)
                case Demand(adapters, slots):
                    self._observer.in_demand(stager, adapters, slots)
                case Inventory(cold, warm, more):
                    self._take_stock(cold, warm, more=more)
                case Loaded(adapter):
                    residency.copies.put(stager, adapter, warm=True)
                case Unloaded(adapter):
                    residency.copies.put(stager, adapter, warm=False)
                case Published(adapter):
                    residency.published(stager, adapter)
                    self._models.changed(stager)
                case Evicted(adapter):
                    residency.forget(stager, adapter)
                    self._models.changed(stager)
                case Refreshed(adapter):
                    residency.refreshed(stager, adapter)
                    self._models.changed(stager)
                case Woken(adapter):
                    self._observer.woken(stager, adapter)
                case Refused(adapter):
                    residency.copies.drop(stager, adapter)
                    self._models.changed(stager)
                case _:
                    pass

    def _take_stock(self, cold: Sequence[str], warm: Sequence[str], *, more: bool) -> None:
        stager, copies = self._client.address, self._residency.copies
        if self._begins_anew:
            copies.forget(stager)
        self._begins_anew = not more
        for adapter in cold:
            copies.put(stager, adapter, warm=False)
        for adapter in warm:
            copies.put(stager, adapter, warm=True)

    def _lost(self, why: str) -> None:
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
        await self._ask_engines_no_more()
        if self._instance not in ("", state.instance) or not state.resumed:
            await self._residency.claim(self._client.address)
            self._begins_anew = True
        self._instance, self._said = state.instance, ""
        self._models.came(self._client.address)  # its engine may be another, too
        stager = Stager.READY if state.ready else Stager.NOT_READY
        if state.draining:
            stager = Stager.DRAINING if state.ready else Stager.STOPPING
        self._observe(stager=stager, why=state.why, is_silent=False, engine_answers=None)
        if stager is Stager.STOPPING:  # and says nothing more of its engine
            self._ask_engines()

    def _observe(self, **seen: object) -> None:
        for endpoint in self._observer.at(self._client.address):
            self._observer.observe(endpoint, **seen)

    # -- the engines, while the stager says nothing

    def _ask_engines(self) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._keep_asking(), name=f"engines of {self._client.address}")

    async def _ask_engines_no_more(self) -> None:
        """The stager tells how they are."""
        asking, self._asking = self._asking, None
        if asking is not None:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _keep_asking(self) -> None:
        """Those of the endpoints that are there now: some come meanwhile, others go."""
        following: dict[Endpoint, asyncio.Task[None]] = {}
        try:
            while True:
                there = self._observer.at(self._client.address)
                for endpoint in following.keys() - set(there):
                    following.pop(endpoint).cancel()
                for endpoint in there:
                    if endpoint not in following or following[endpoint].done():
                        following[endpoint] = asyncio.create_task(self._follow_engine(endpoint), name=f"engine {endpoint.address}")
                await asyncio.sleep(PROBE_EVERY_S)
        finally:
            for task in following.values():
                task.cancel()
            await asyncio.gather(*following.values(), return_exceptions=True)

    async def _follow_engine(self, endpoint: Endpoint) -> None:
        """Ask the engine again and again, and notice when it goes: one that was started anew in between answers well, and knows no adapter.

        It closes its connections when it ends; one that closes them for being idle goes on answering, and is only asked every PROBE_EVERY_S.
        """
        until_it_goes: asyncio.Task[None] | None = None
        try:
            while True:
                answers = await self._probe.answers(endpoint.address)
                if not answers:
                    self._residency.forget_leases(self._client.address)
                    self._observer.engine_is_new(endpoint)
                self._observer.observe(endpoint, engine_answers=answers)
                if until_it_goes is None and answers:
                    until_it_goes = asyncio.create_task(self._probe.until_it_hangs_up(endpoint.address), name=f"end of {endpoint.address}")
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
