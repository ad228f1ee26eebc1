"""One node: who asks for which adapter, who waits for whom, what is leased, pinned, refreshed and removed. How that is done is its parts' business.

ensure ── there ──────────────────────────────────────────────► lease
   │                                                              ▲
   └─ not there ── flight (one per name) ── Fetcher.bring ── link ┘
"""

import contextlib
import ctypes
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..client import Claimed, Loading, StagerClient
from ..config.stager import StagerSettings
from ..core.artifact import AdapterName, ArtifactId, Manifest, adapter_name, is_adopted
from ..core.breaker import STATES, Breaker
from ..core.lru import Hold
from ..errors import (
    DiskFailed,
    EngineUnreachable,
    InvalidAdapter,
    LoraExtprocError,
    ModelNotFound,
    NodeDraining,
    NoSpace,
    OriginRefused,
    PrefetchGivenUp,
)
from ..flight import SingleFlight, to_the_end
from ..metrics import StagerMetrics
from .adapter.files import weights_of
from .books.changes import Changes
from .books.holdings import Holdings, Named
from .books.readiness import Readiness
from .books.refusals import Refusals
from .books.waits import Waits
from .disk.adopt import ORIGIN as ADOPTED
from .disk.adopt import Adopter
from .disk.pins import Pins
from .disk.store import Store
from .engine.api import Engine
from .engine.keeper import EngineKeeper
from .engine.meter import Meter
from .engine.names import Loads
from .node import Node
from .supply.catalogue import Catalogue
from .supply.job import Job
from .supply.peers import Peers
from .supply.source import Source
from .threads import Threads
from .work.audit import Auditor, Verified
from .work.claims import Claims
from .work.copies import Copies
from .work.drain import Drain
from .work.evict import Remover
from .work.flights import Flights
from .work.housekeeping import Housekeeping
from .work.kept import Kept
from .work.prefetch import Prefetches
from .work.refresh import Freshness
from .work.repair import Repair, named_as
from .work.room import Room
from .work.stage import Fetcher

log = logging.getLogger(__name__)

HOUSEKEEPING_S = 1.0
IN_THE_DIRECTORY = ("incomplete", "taken")  # refusals for what others do there, who may be done with it in a moment
DISK_THREADS = 16  # a disk serves some at once; one that hangs holds them all, and nothing else


@dataclass(frozen=True, slots=True)
class Ensured:
    """An adapter that is on disk and will stay for `lease_s` seconds."""

    digest: str
    size: int
    staged: bool
    origin: str
    lease_s: float
    waited_s: float
    model: str = ""  # what a request's `model` must be for the engine; "": the adapter's name, or nobody asked
    loaded: bool = False  # of a prefetch: the engine has been told to know it


class Stager:
    """One node. `open` before anything else, `close` at the end."""

    def __init__(
        self,
        settings: StagerSettings,
        sources: Sequence[Source],
        engine: Engine,
        metrics: StagerMetrics,
        clock: Callable[[], float] = time.monotonic,
        peers: Peers | None = None,
        instance: str = "",
    ) -> None:
        store, holdings, changes, disk = Store(Path(settings.dir)), Holdings(settings.max_bytes), Changes(), Threads(DISK_THREADS, "disk")
        loads = Loads(engine, store, holdings, metrics, disk, settings.negative_ttl_s, clock, partial(changes.tell, "refused"), self._moved)
        refusals = Refusals(settings.negative_ttl_s, settings.refusal_ttl_s)
        self.node = Node(settings, store, holdings, engine, loads, changes, Readiness(changes), refusals, metrics, disk, clock)
        self.instance = instance or secrets.token_hex(8)
        self._sources = sources
        self.copies = Copies(self.node)
        self._waits = Waits(clock)
        self.meter = Meter(engine, partial(changes.mention, "load"), loads.used, self._waits.now)
        self.drain = Drain(self.node, self.meter)
        self._keeper = EngineKeeper(engine, loads, self.node.readiness, changes, clock)
        self._flights = Flights(self.node, self._learn_from)
        self._remover = Remover(self.node)
        self._room = Room(self.node, self._remover)
        self._fetcher = Fetcher(self.node, sources, peers or Peers(settings.peers, StagerClient, self.instance), self._remover)
        self._prefetches = Prefetches(self.node, self._flights, self._bring, self._show, self._fetcher.let_go)
        self._kept = Kept(self.node, self._remover)
        self._adopter = Adopter(settings, store, holdings, changes, disk, self._kept.check, self._kept.check_digest, self._replaced, clock)
        self._auditor = Auditor(self.node, self._remover, self._adopter)
        self._repair = Repair(self.node, self._remover, self._adopter, self._auditor)
        self._freshness = Freshness(self.node, self._fetcher, self._remover, self._adopter, self._flights)
        self._claims = Claims(self.node)
        self.catalogue = Catalogue(sources, settings, clock)
        self._pins = Pins(store, holdings, disk)
        self._house = Housekeeping(self.node, self._adopter, self._room, self._repair, self._kept)
        self._in_flight: SingleFlight[AdapterName, Ensured] = SingleFlight()
        self._resolving: SingleFlight[AdapterName, str] = SingleFlight()
        self._is_full = False  # what was fetched last found no room
        self._expose()

    @property
    def not_ready(self) -> str | None:
        """Why the node should be sent nothing now; None if it should."""
        return self.node.readiness.not_ready

    async def open(self) -> None:
        """Take the directory and adopt what is in it. Raises StartError."""
        scan = await self.node.disk.run(self.node.store.open, keep_unnamed=self.node.engine.exists)
        await self.node.disk.run(self._pins.open)
        refused = await self._kept.look_at(scan)
        now, by_age = self.node.clock(), [*scan.unnamed, *scan.by_age()]
        for digest, disk_bytes in scan.unnamed.items():
            self.node.holdings.index.add(digest, disk_bytes, now)
            self._remover.retire(digest)
        for name, found in scan.take():
            self.node.holdings.index.add(found.digest, found.disk_bytes, now)
            named = named_as(name, found)
            named.refused = refused.get(name, "")
            self.node.holdings.put(name, named)
        self.node.loads.take(scan.versions)
        self.node.holdings.index.order(by_age)
        del by_age
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps a tenth of what a hundred thousand took on the way
            trim(0)
        await self.node.disk.run(self._adopter.open)
        await self._fetcher.open()
        index = self.node.holdings.index
        log.info(
            "%s: adopted %d adapters (%d bytes), removed %d leftovers", self.node.settings.dir, len(self.node.holdings), index.used_bytes, len(scan.removed)
        )
        for left in scan.removed[:20]:
            log.info("%s: removed %s: it was not whole, or a newer version is there", self.node.settings.dir, left)
        await self._repair.look_at_touched(scan.touched)
        await self._house.scan_first()
        self.node.holdings.sort()
        self._claims.open()
        await self._keeper.open()
        await self.drain.open()
        self.node.readiness.set("start", None)
        self._house.open(HOUSEKEEPING_S)

    async def close(self) -> None:
        """Give up flights, leave nothing half done, and let the directory go."""
        await self._house.close()
        await self._repair.close()
        await self._keeper.close()
        await self.drain.close()
        await self.meter.close()
        await self._freshness.close()
        await self._prefetches.close()
        await self._in_flight.close()
        await self._resolving.close()
        await self.node.loads.close()
        await self._room.close()
        await self._remover.close()
        await self.catalogue.close()
        await self._fetcher.close()
        self.copies.close()
        await self.node.engine.close()
        self.node.store.close()
        self.node.disk.close()

    # -- what routers ask

    async def ensure(self, raw_name: str, *, priority: int = Job.REQUEST, holder: str = "", sha256: str = "", loading: Loading = Loading.NONE) -> Ensured:
        """Wait until the adapter is on disk and, with `loading`, known to the engine, and lease it for `holder`. Cancelling ends the wait, not the work.

        With `sha256` its weights must have that digest: other content that is here is compared with its origin first.
        Raises a StageError, InvalidRequest or EngineUnreachable.
        """
        name = adapter_name(raw_name)
        try:
            with self._waits.one(holder):
                held = await self._ensure_digest(name, priority, holder, sha256, loading)
        except LoraExtprocError as error:
            self.node.metrics.ensures.labels(error.reason).inc()
            raise
        self.node.metrics.ensures.labels("staged" if held.staged else "hit").inc()
        return held

    async def _ensure_digest(self, name: AdapterName, priority: int, holder: str, sha256: str, loading: Loading) -> Ensured:
        held = await self._ensure(name, priority, holder, sha256, loading)
        if sha256 and await self._weights_sha256(name) != sha256:
            if not held.staged and await self.refresh(name):
                held = await self._ensure(name, priority, holder, sha256, loading)
            if (found := await self._weights_sha256(name)) != sha256:
                raise InvalidAdapter(f"the weights of {name} have SHA-256 {found}; {sha256} is asked for", "digest")
        return held

    async def _ensure(self, name: AdapterName, priority: int, holder: str, sha256: str, loading: Loading) -> Ensured:
        began = self.node.clock()
        held = await self._hold(name, priority, holder, sha256, loading)
        if loading is Loading.NONE:
            return held
        try:
            return await self._load(name, held, holder, began, loading)
        except LoraExtprocError as error:
            if not await self._repair.look(name, error):
                raise
        held = await self._hold(name, priority, holder, sha256, loading)  # once: what is lost again at once is lost for a reason
        return await self._load(name, held, holder, began, loading)

    async def _hold(self, name: AdapterName, priority: int, holder: str, sha256: str, loading: Loading) -> Ensured:
        """Wait until it is on disk, and lease it."""
        began = self.node.clock()
        self.drain.check(name)
        held = self._lease(name, began, holder, staged=False, waited_s=0.0)
        if held is not None:
            if not self.drain.is_on:
                self._freshness.revalidate(name)
            return held
        if (refusal := self.node.refusals.answer(name, began)) is not None:
            self.node.metrics.negative_hits.inc()
            raise refusal
        if await self._prefetches.join(name):
            return await self._hold(name, priority, holder, sha256, loading)
        self._flights.hurry(name, priority)
        try:
            landed = await self._in_flight.join(name, lambda: self._fly(name, priority, holder, sha256, loading))
        except InvalidAdapter as error:
            if error.stated in ("", sha256):
                raise
            return await self._hold(name, priority, holder, sha256, loading)  # refused for what the first caller stated, which says nothing to this one
        finally:
            if name not in self._in_flight:
                self._flights.landed(name)
        now = self.node.clock()
        return self._lease(name, now, holder, staged=landed.staged, waited_s=now - began) or replace(landed, waited_s=now - began)

    async def _load(self, name: AdapterName, held: Ensured, holder: str, began: float, loading: Loading) -> Ensured:
        """Let the engine know what is leased. A version that took its place meanwhile is taken instead; what the engine refuses is leased no longer."""
        while True:
            named, index = self.node.holdings.get(name), self.node.holdings.index
            if named is None or not index.hold(named.id):
                raise EngineUnreachable(f"{name} was removed while the engine was to load it")
            try:
                model = await self.node.loads.ensure(name, named.id, plain=loading is Loading.PLAIN)
            except LoraExtprocError:
                index.release(holder, named.id)
                raise
            finally:
                index.let_go(named.id)
            now = self.node.clock()
            again = self._lease(name, now, holder, staged=held.staged, waited_s=now - began)
            if again is not None and self.node.holdings.get(name) is named:
                return replace(again, model=model, origin=held.origin)

    async def prefetch(self, raw_name: str, *, sha256: str = "", loading: Loading = Loading.NONE, keep_s: float = 0.0) -> Ensured:
        """Bring the adapter to the disk and, with `loading`, let the engine know it, as far as nobody else needs what that takes. Leases nothing.

        `keep_s`: for how long somebody will probably ask for it. Raises PrefetchGivenUp, Overloaded, NodeDraining, or what a flight raises.
        """
        name, began = adapter_name(raw_name), self.node.clock()
        try:
            brought = await self._prefetch(name, sha256, loading, keep_s)
        except LoraExtprocError as error:
            self.node.metrics.node_prefetches.labels(error.reason).inc()
            raise
        self.node.metrics.node_prefetches.labels("staged" if brought.staged else "loaded" if brought.loaded else "hit").inc()
        return replace(brought, waited_s=self.node.clock() - began)

    async def _prefetch(self, name: AdapterName, sha256: str, loading: Loading, keep_s: float) -> Ensured:
        if self.drain.is_on:
            raise NodeDraining(f"{name}: this node drains, and prefetches nothing")
        named, index = self.node.holdings.get(name), self.node.holdings.index
        staged = named is None
        if named is None:
            if (refusal := self.node.refusals.answer(name, self.node.clock())) is not None:
                raise refusal
            if name in self._in_flight or (self.node.settings.adopt and await self._adopter.is_there(name)):
                raise PrefetchGivenUp(f"{name} is about to be here without a prefetch")
            named = await self._prefetches.fetch(name, sha256, keep_s)
        entry = index.get(named.id)
        if entry is None or named.refused:
            raise PrefetchGivenUp(f"{name} is on its way out, or is refused by this node's settings")
        model = await self._prefetches.load(name, named, loading, keep_s)
        return Ensured(named.digest, entry.size, staged, named.origin, 0.0, 0.0, model, bool(model))

    def job(self, raw_name: str) -> Job | None:
        """The flight of an adapter that is on its way."""
        return self._flights.get(AdapterName(raw_name))

    async def claim(self, holder: str, leases: Sequence[Claimed]) -> list[float]:
        """Lease to `holder` what an earlier instance leased to it and is still here; seconds for each, 0 where it is not."""
        return await self._claims.honour(holder, leases)

    def is_loading(self, raw_name: str) -> bool:
        """Whether the engine is about to know the adapter."""
        named = self.node.holdings.get(AdapterName(raw_name))
        return named is not None and self.node.loads.is_loading(named.id)

    def release(self, holder: str, raw_name: str = "", digest: str = "") -> int:
        """Give back what `holder` leased: one adapter (of a version that is not the latest any more, by its digest), or all; how many there were."""
        if digest:
            return self.node.holdings.index.release(holder, ArtifactId(digest))
        named = self.node.holdings.get(adapter_name(raw_name)) if raw_name else None
        if raw_name and named is None:
            return 0
        return self.node.holdings.index.release(holder, named.id if named is not None else None)

    # -- what operators ask

    async def pin(self, raw_name: str, sha256: str = "") -> str:
        """Put the adapter on disk and hold it without an end; its digest. Survives restarts. Raises a StageError."""
        held = await self.ensure(raw_name, sha256=sha256)
        with self._disk_failures():
            await self._pins.pin(adapter_name(raw_name), sha256)
        return held.digest

    async def unpin(self, raw_name: str) -> None:
        """Let it be evicted again when its time comes. Raises NoSpace or DiskFailed, and then it is pinned as before."""
        self.node.refusals.forget(adapter_name(raw_name))  # what was refused may have been so for the digest of the pin
        with self._disk_failures():
            await self._pins.unpin(adapter_name(raw_name))

    @contextlib.contextmanager
    def _disk_failures(self) -> Iterator[None]:
        """Let the node be not ready when its disk fails."""
        try:
            yield
        except DiskFailed as error:
            self.node.readiness.set("disk", error.message)
            raise

    async def evict(self, raw_name: str) -> int:
        """Remove one adapter unless somebody holds it; the bytes freed. Raises ModelNotFound or AdapterInUse."""
        name = adapter_name(raw_name)
        if self.node.holdings.get(name) is None:
            raise ModelNotFound(f"{name} is not on this node")
        return await self._remover.take_away(name, "asked", force=False)

    async def purge(self, raw_name: str) -> int:
        """Remove one adapter whoever leased or pinned it, and forget what was refused of it; the bytes freed. Raises AdapterInUse for the engine's sake."""
        name = adapter_name(raw_name)
        self.node.refusals.forget(name)
        freed = await self._remover.take_away(name, "purge", force=True)
        if name in self.node.holdings.pins:  # after it: a full disk may have no room for the list before
            await self.unpin(name)
        return freed

    async def refresh(self, raw_name: str) -> bool:
        """Compare the adapter with its origin; True if a new version took its place. What is here is served meanwhile, and stays if it fails.

        Raises ModelNotFound where it is not on this node, else what went wrong.
        """
        name = adapter_name(raw_name)
        if self.node.holdings.get(name) is None:
            raise ModelNotFound(f"{name} is not on this node")
        return await self._freshness.refresh(name)

    def verify(self, raw_name: str = "") -> AsyncIterator[Verified]:
        """Read artifacts back from the disk: `raw_name`, or all. Raises ModelNotFound for what is not here."""
        return self._auditor.verify(raw_name)

    # -- what peers and lists need

    async def resolve(self, raw_name: str) -> str:
        """Which origin would give the adapter, or gave it; stages nothing. Raises ModelNotFound, also for what is refused unseen, or OriginFailed."""
        name = adapter_name(raw_name)
        named = self.node.holdings.get(name)
        if named is not None and not named.refused:  # what today's settings refuse is looked for anew, as a request does
            if self.node.loads.refuses(name, named.id):
                raise ModelNotFound(f"The model `{name}` cannot be served: this node's engine refuses it")
            return named.origin
        if named is None and self.node.settings.adopt and await self._adopter.is_there(name):
            return ADOPTED
        refusal = self.node.refusals.answer(name, self.node.clock())
        try:
            if refusal is not None:
                raise refusal
            return await self._resolving.join(name, lambda: self._fetcher.locate(name))
        except InvalidAdapter as error:
            raise ModelNotFound(f"The model `{name}` cannot be served: {error.message}") from error
        except (ModelNotFound, OriginRefused) as error:
            if refusal is None:
                self.node.refusals.learn(name, error, self.node.clock())
            raise

    async def manifest(self, raw_name: str) -> Manifest | None:
        """What is on disk under a name, file by file; None if nothing is."""
        named = self.node.holdings.get(adapter_name(raw_name))
        if named is None or self.node.holdings.index.get(named.id) is None:
            return None
        if is_adopted(named.id):
            return await self._adopter.look(adapter_name(raw_name))
        return await self.node.disk.run(self.node.store.manifest, named.digest)

    @contextlib.contextmanager
    def reading(self, digest: str, path: str) -> Iterator[Path]:
        """The path of one file of a published artifact, which stays as long as it is read. A peer's read is no demand: nobody is sent here for it.

        Raises ModelNotFound.
        """
        id_, index = ArtifactId(digest), self.node.holdings.index
        if "/" in path or path.startswith(".") or not path or not index.hold(id_, Hold.READ):
            raise ModelNotFound(f"{digest[:64]!r} has no file {path[:80]!r} on this node")
        try:
            yield self.node.store.path(id_) / path
        except DiskFailed:
            self._repair.look_soon(id_, is_due=True)
            raise
        finally:
            index.let_go(id_, Hold.READ)

    def leased_s(self, id_: ArtifactId) -> float:
        """Seconds until the last lease ends; 0 without one."""
        entry = self.node.holdings.index.get(id_)
        return max(0.0, entry.leased_until - self.node.clock()) if entry is not None else 0.0

    def is_loaded(self, name: AdapterName, id_: ArtifactId) -> bool:
        """Whether the engine knows this version."""
        return self.node.loads.has(name, id_)

    def idle_s(self, id_: ArtifactId) -> float:
        """Seconds since it was last asked for (or found at start)."""
        entry = self.node.holdings.index.get(id_)
        return self.node.clock() - entry.last_used if entry is not None else 0.0

    def checked_s(self, named: Named) -> float:
        """Seconds since it was compared with its origin; -1: not since the start."""
        return self.node.clock() - named.checked if named.checked is not None else -1.0

    # -- staging

    def _lease(self, name: AdapterName, now: float, holder: str, *, staged: bool, waited_s: float) -> Ensured | None:
        named = self.node.holdings.get(name)
        index, lease_s = self.node.holdings.index, self.drain.lease_s
        wakes = named is not None and not index.is_leased(named.id, now)
        if named is None or named.refused or not index.lease(named.id, now + lease_s, now, holder):
            return None
        if wakes:
            self.node.changes.woken(name)
        entry = index.get(named.id)
        assert entry is not None
        self._repair.look_soon(named.id)
        return Ensured(named.digest, entry.size, staged, named.origin, lease_s, waited_s)

    async def _fly(self, name: AdapterName, priority: int, holder: str, sha256: str, loading: Loading) -> Ensured:
        """One flight, with its one log line and its metrics."""
        with self._prefetches.yielding():
            async with self._flights.book(name, priority, "staged") as job:
                kept = await self._already(name, holder)
                if kept is None:
                    named = await self._bring(name, job, sha256)
                    if loading is Loading.VERSIONED:
                        self.node.loads.begin(name, named.id)  # the engine reads the artifact where it is: its own link can come meanwhile
                    try:
                        return await to_the_end(self._show_under(name, named, holder))
                    finally:
                        await self._fetcher.let_go(named)
                job.outcome = "kept"
                return kept

    async def _bring(self, name: AdapterName, job: Job, sha256: str) -> Named:
        """Fetched and published, linked not yet, and held until the fetcher's `let_go`."""
        try:
            named = await self._fetcher.bring(name, job, expected=sha256)
        except InvalidAdapter as error:
            error.stated = sha256 if error.what == "digest" else ""
            raise
        assert named is not None
        return named

    async def _show_under(self, name: AdapterName, named: Named, holder: str) -> Ensured:
        await self._show(name, named)
        ensured = self._lease(name, self.node.clock(), holder, staged=True, waited_s=0.0)
        assert ensured is not None
        return ensured

    async def _show(self, name: AdapterName, named: Named) -> None:
        """Let the name lead there, and tell so."""
        await self.node.disk.run(self.node.store.link, name, named.id)
        self.node.refusals.found(name)
        if self._is_full:
            self._is_full = False
            log.info("the node has room again")
        nameless = self.node.holdings.put(name, named)
        self.node.changes.tell("published", name)
        if nameless is not None:  # it was refused, and what came is not
            await self._remover.drop_unnamed(nameless)

    async def _already(self, name: AdapterName, holder: str) -> Ensured | None:
        """What needs no fetch after all: a removal that ended in keeping it, or something that others put here."""
        if (leaving := self.node.holdings.get(name)) is not None:
            await self._remover.settle(leaving.id)
            kept = self._lease(name, self.node.clock(), holder, staged=False, waited_s=0.0)
            if kept is not None:
                return kept
        if self.node.settings.adopt and await self._adopter.is_there(name):
            await self._adopter.adopt(name)
            return self._lease(name, self.node.clock(), holder, staged=False, waited_s=0.0)
        return None

    def _learn_from(self, name: AdapterName, error: LoraExtprocError) -> None:
        """What a failed flight says of the next."""
        if not (isinstance(error, InvalidAdapter) and error.what in IN_THE_DIRECTORY):
            self.node.refusals.learn(name, error, self.node.clock())
        if isinstance(error, InvalidAdapter):
            self.node.metrics.verify_failures.labels(error.what).inc()
            self.node.changes.tell("refused", name)
        elif isinstance(error, DiskFailed):
            self.node.readiness.set("disk", error.message)
        elif isinstance(error, NoSpace) and not self._is_full:
            self._is_full = True
            log.warning("the node has no room: %s", error.message)

    # -- reading back

    async def _weights_sha256(self, name: AdapterName) -> str:
        manifest = await self.manifest(name)
        return weights_of(manifest.files).sha256 if manifest is not None else ""

    # -- the node's state

    @property
    def demand(self) -> tuple[int, int]:
        """How many adapters are leased, and how many the engine keeps in memory (0: not known)."""
        return self._house.demand

    def _replaced(self, id_: ArtifactId) -> None:
        """Others exchanged or removed their own files: under the old name the engine would read something else, or nothing."""
        self._repair.tell_engine(id_)

    def _moved(self, name: AdapterName) -> None:
        """The engine may have the adapter in memory now, or may have it there no longer."""
        self.copies.moved(name)

    def _expose(self) -> None:
        """Gauges read when they are asked, so that a scrape shows the moment and not the last round of the house."""
        index, metrics = self.node.holdings.index, self.node.metrics
        metrics.disk.labels("used").set_function(lambda: index.used_bytes)
        metrics.disk.labels("reserved").set_function(lambda: index.reserved_bytes)
        metrics.disk.labels("limit").set_function(lambda: index.max_bytes)
        metrics.adapters.set_function(lambda: len(self.node.holdings))
        metrics.pinned.set_function(lambda: len(self.node.holdings.pins))
        metrics.waiters.set_function(lambda: sum(self._in_flight.waiters(name) for name in self._flights.names()))
        metrics.engine_names.set_function(lambda: len(self.node.loads))
        metrics.engine_slots.labels("gpu").set_function(lambda: self.node.engine.limits.max_loras)
        metrics.engine_slots.labels("cpu").set_function(lambda: self.node.engine.limits.max_cpu_loras)
        metrics.engine_demand.set_function(lambda: self.demand[0])
        for source in self._sources:
            metrics.breaker.labels(source.label).set_function(partial(_number, source.breaker))


def _number(breaker: Breaker) -> float:
    return STATES.index(breaker.state)
