"""One node: who asks for which adapter, who waits for whom, what is leased, pinned, refreshed and removed. How that is done is its parts' business.

ensure ── there ──────────────────────────────────────────────► lease
   │                                                              ▲
   └─ not there ── flight (one per name) ── Fetcher.bring ── link ┘
"""

import asyncio
import contextlib
import ctypes
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..client import Claimed, Loading
from ..config import StagerSettings
from ..core.artifact import AdapterName, Manifest, adapter_name
from ..core.breaker import STATES, Breaker
from ..errors import (
    DiskFailed,
    EngineUnreachable,
    InvalidAdapter,
    LoraExtprocError,
    ModelNotFound,
    NoSpace,
    OriginRefused,
)
from ..flight import SingleFlight, to_the_end
from ..metrics import StagerMetrics
from .adopter import Adopter
from .audit import Auditor, Verified
from .changes import Changes
from .claims import Claims
from .engine import Engine
from .fetcher import Fetcher
from .flights import Flights
from .freshness import Freshness
from .holdings import Holdings, Named
from .keeper import EngineKeeper
from .loads import Loads
from .peers import Peers
from .readiness import Readiness
from .remover import Remover
from .sources import Source
from .store import Store
from .transfer import Job
from .verify import CONFIG_FILE

log = logging.getLogger(__name__)

HOUSEKEEPING_S = 1.0
TRIM_PAUSE_S = 60.0  # after the engine kept something that was to go in advance
FIRST_SCAN_S = 10.0  # the start waits that long for what others put here; what takes longer to hash is served when it is hashed
MAX_REMEMBERED_MISSES = 10_000
PINS_FILE = ".pins.json"


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
        self.instance = instance or secrets.token_hex(8)
        self.metrics = metrics
        self.changes = Changes()
        self.holdings = Holdings(settings.max_bytes)
        self.store = Store(Path(settings.dir))
        self.is_draining = False
        self._readiness = Readiness(self.changes)
        self._flights = Flights(settings.fetch_timeout_s, metrics, clock, self._learn_from)
        self._settings = settings
        self._sources = sources
        self._engine = engine
        self._clock = clock
        self._loads = Loads(engine, self.store, self.holdings, metrics, settings.negative_ttl_s, clock)
        self._keeper = EngineKeeper(engine, self._loads, self._readiness, self.changes, clock)
        quiet_s = settings.engine.quiet_s
        self._remover = Remover(self.store, self.holdings, engine, self._loads, self.changes, self._readiness, metrics, quiet_s, clock)
        peers = peers or Peers(settings.peers, {}, self.instance)
        self._fetcher = Fetcher(settings, sources, peers, self.store, self.holdings, self._remover, engine, metrics, clock)
        self._adopter = Adopter(settings, self.store, self.holdings, self.changes, clock)
        self._auditor = Auditor(self.store, self.holdings, self._remover, self._adopter, metrics, clock)
        self._freshness = Freshness(
            settings.revalidate_s,
            self.store,
            self.holdings,
            engine,
            self._loads,
            self._fetcher,
            self._remover,
            self._adopter,
            self._flights,
            self.changes,
            clock,
        )
        self._claims = Claims(self.holdings, self._loads, settings.claim_wait_s, settings.lease_s, clock)
        self._pins_file = asyncio.Lock()
        self._in_flight: SingleFlight[AdapterName, Ensured] = SingleFlight()
        self._missing: dict[AdapterName, tuple[float, LoraExtprocError]] = {}  # what no origin gives -> until when that is remembered, and why
        self._is_full = False  # what was fetched last found no room
        self._space_told: tuple[int, int] = (-1, -1)
        self._demand_told: tuple[int, int] = (0, 0)
        self._next_scan = 0.0
        self._next_trim = 0.0
        self._scan: asyncio.Task[None] | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self._retiring: asyncio.Task[None] | None = None
        self._expose()

    @property
    def not_ready(self) -> str | None:
        """Why the node should be sent nothing now; None if it should."""
        return self._readiness.not_ready

    async def open(self) -> None:
        """Take the directory and adopt what is in it. Raises StartError."""
        scan = await asyncio.to_thread(self.store.open, keep_unnamed=self._engine.exists)
        now, by_age = self._clock(), [*scan.unnamed, *scan.by_age()]
        for digest, disk_bytes in scan.unnamed.items():
            self.holdings.index.add(digest, disk_bytes, now)
            self._remover.retire(digest)
        self._loads.take(scan.versions)
        for name, found in scan.take():
            own = found.name == name  # another name's revision is not in the manifest
            self.holdings.index.add(found.digest, found.disk_bytes, now)
            self.holdings.put(name, Named(found.digest, found.origin, found.revision if own else "", final=found.final and own))
        self.holdings.index.order(by_age)
        del by_age
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps a tenth of what a hundred thousand took on the way
            trim(0)
        await asyncio.to_thread(self._read_pins)
        await asyncio.to_thread(self._adopter.open)
        await self._fetcher.open()
        index = self.holdings.index
        log.info("%s: adopted %d adapters (%d bytes), removed %d leftovers", self._settings.dir, len(self.holdings), index.used_bytes, len(scan.removed))
        for left in scan.removed[:20]:
            log.info("%s: removed %s: it was not whole, or a newer version is there", self._settings.dir, left)
        if self._settings.adopt:
            await asyncio.wait({self._start_scan()}, timeout=FIRST_SCAN_S)
        self.holdings.sort()
        self._claims.open()
        await self._keeper.open()
        self._readiness.set("start", None)
        self._housekeeping = asyncio.create_task(self._keep_house(), name="housekeeping")

    def drain(self) -> None:
        """Tell routers that this node will be gone soon."""
        self.is_draining = True
        self._readiness.set("draining", "the stager is stopping")

    async def close(self) -> None:
        """Give up flights, leave nothing half done, and let the directory go."""
        for task in (self._housekeeping, self._retiring, self._scan):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self._keeper.close()
        await self._freshness.close()
        await self._in_flight.close()
        await self._loads.close()
        await self._remover.close()
        await self._fetcher.close()
        await self._engine.close()
        self.store.close()

    # -- what routers ask

    async def ensure(self, raw_name: str, *, priority: int = Job.REQUEST, holder: str = "", sha256: str = "", loading: Loading = Loading.NONE) -> Ensured:
        """Wait until the adapter is on disk and, with `loading`, known to the engine, and lease it for `holder`. Cancelling ends the wait, not the work.

        With `sha256` its weights must have that digest: other content that is here is compared with its origin first.
        Raises a StageError, InvalidRequest or EngineUnreachable.
        """
        name = adapter_name(raw_name)
        try:
            held = await self._ensure(name, priority, holder, sha256, loading)
            if sha256 and await self._weights_sha256(name) != sha256:
                if not held.staged and await self.refresh(name):
                    held = await self._ensure(name, priority, holder, sha256, loading)
                if (found := await self._weights_sha256(name)) != sha256:
                    raise InvalidAdapter(f"the weights of {name} have SHA-256 {found}; {sha256} is asked for", "digest")
        except LoraExtprocError as error:
            self.metrics.ensures.labels(error.reason).inc()
            raise
        self.metrics.ensures.labels("staged" if held.staged else "hit").inc()
        return held

    async def _ensure(self, name: AdapterName, priority: int, holder: str, sha256: str, loading: Loading) -> Ensured:
        began = self._clock()
        held = self._lease(name, began, holder, staged=False, waited_s=0.0)
        if held is None:
            self._refuse_missing(name, began)
            self._flights.hurry(name, priority)
            try:
                landed = await self._in_flight.join(name, lambda: self._fly(name, priority, holder, sha256, loading))
            except InvalidAdapter as error:
                if error.stated in ("", sha256):
                    raise
                return await self._ensure(name, priority, holder, sha256, loading)  # refused for what the first caller stated, which says nothing to this one
            now = self._clock()
            held = self._lease(name, now, holder, staged=landed.staged, waited_s=now - began) or landed
        elif not self.is_draining:
            self._freshness.revalidate(name)
        return held if loading is Loading.NONE else await self._load(name, held, holder, began, loading)

    async def _load(self, name: AdapterName, held: Ensured, holder: str, began: float, loading: Loading) -> Ensured:
        """Let the engine know what is leased. A version that took its place meanwhile is taken instead; what the engine refuses is leased no longer."""
        while True:
            named, index = self.holdings.get(name), self.holdings.index
            if named is None or not index.hold(named.id):
                raise EngineUnreachable(f"{name} was removed while the engine was to load it")
            try:
                model = await self._loads.ensure(name, named.id, plain=loading is Loading.PLAIN)
            except LoraExtprocError:
                index.release(holder, named.id)
                raise
            finally:
                index.let_go(named.id)
            now = self._clock()
            again = self._lease(name, now, holder, staged=held.staged, waited_s=now - began)
            if again is not None and self.holdings.get(name) is named:
                return replace(again, model=model, origin=held.origin)

    def job(self, raw_name: str) -> Job | None:
        """The flight of an adapter that is on its way."""
        return self._flights.get(AdapterName(raw_name))

    async def claim(self, holder: str, leases: Sequence[Claimed]) -> list[float]:
        """Lease to `holder` what an earlier instance leased to it and is still here; seconds for each, 0 where it is not."""
        return await self._claims.honour(holder, leases)

    def is_loading(self, raw_name: str) -> bool:
        """Whether the engine is about to know the adapter."""
        named = self.holdings.get(AdapterName(raw_name))
        return named is not None and self._loads.is_loading(named.id)

    def release(self, holder: str, raw_name: str = "", digest: str = "") -> int:
        """Give back what `holder` leased: one adapter (of a version that is not the latest any more, by its digest), or all; how many there were."""
        if digest:
            return self.holdings.index.release(holder, digest)
        named = self.holdings.get(adapter_name(raw_name)) if raw_name else None
        if raw_name and named is None:
            return 0
        return self.holdings.index.release(holder, named.id if named is not None else None)

    # -- what operators ask

    async def pin(self, raw_name: str, sha256: str = "") -> str:
        """Put the adapter on disk and hold it without an end; its digest. Survives restarts. Raises a StageError."""
        held = await self.ensure(raw_name, sha256=sha256)
        name = adapter_name(raw_name)
        before = self.holdings.pins.get(name)
        self.holdings.pin(name, sha256)
        try:
            await self._write_pins()
        except LoraExtprocError:  # a pin that would not survive is none
            if before is None:
                self.holdings.unpin(name)
            else:
                self.holdings.pin(name, before)
            raise
        return held.digest

    async def unpin(self, raw_name: str) -> None:
        """Let it be evicted again when its time comes."""
        self.holdings.unpin(adapter_name(raw_name))
        await self._write_pins()

    async def evict(self, raw_name: str) -> int:
        """Remove one adapter unless somebody holds it; the bytes freed. Raises ModelNotFound or AdapterInUse."""
        name = adapter_name(raw_name)
        if self.holdings.get(name) is None:
            raise ModelNotFound(f"{name} is not on this node")
        return await self._remover.take_away(name, "asked", force=False)

    async def purge(self, raw_name: str) -> int:
        """Remove one adapter whoever leased or pinned it, and forget that it was not found; the bytes freed. Raises AdapterInUse for the engine's sake."""
        name = adapter_name(raw_name)
        self._missing.pop(name, None)
        freed = await self._remover.take_away(name, "purge", force=True)
        if name in self.holdings.pins:  # after it: a full disk may have no room for the list before
            await self.unpin(name)
        return freed

    async def refresh(self, raw_name: str) -> bool:
        """Compare the adapter with its origin; True if a new version took its place. What is here is served meanwhile, and stays if it fails.

        Raises ModelNotFound where it is not on this node, else what went wrong.
        """
        name = adapter_name(raw_name)
        if self.holdings.get(name) is None:
            raise ModelNotFound(f"{name} is not on this node")
        return await self._freshness.refresh(name)

    def verify(self, raw_name: str = "") -> AsyncIterator[Verified]:
        """Read artifacts back from the disk: `raw_name`, or all. Raises ModelNotFound for what is not here."""
        return self._auditor.verify(raw_name)

    # -- what peers and lists need

    async def manifest(self, raw_name: str) -> Manifest | None:
        """What is on disk under a name, file by file; None if nothing is."""
        named = self.holdings.get(adapter_name(raw_name))
        if named is None or self.holdings.index.get(named.id) is None:
            return None
        if "@" in named.id:
            return await self._adopter.look(adapter_name(raw_name))
        return await asyncio.to_thread(self.store.manifest, named.digest)

    @contextlib.contextmanager
    def reading(self, digest: str, path: str) -> Iterator[Path]:
        """The path of one file of a published artifact, which stays as long as it is read. Raises ModelNotFound."""
        holder = f"read {secrets.token_hex(4)}"
        index = self.holdings.index
        entry = index.get(digest)
        if entry is None or "/" in path or path.startswith(".") or not path:
            raise ModelNotFound(f"{digest[:64]!r} has no file {path[:80]!r} on this node")
        index.lease(digest, float("inf"), entry.last_used, holder)
        try:
            yield self.store.path(digest) / path
        finally:
            index.release(holder, digest)

    def leased_s(self, id_: str) -> float:
        """Seconds until the last lease ends; 0 without one. Who reads it for another node counts as one that was just granted."""
        entry = self.holdings.index.get(id_)
        return min(max(0.0, entry.leased_until - self._clock()), self._settings.lease_s) if entry is not None else 0.0

    def is_loaded(self, name: AdapterName, id_: str) -> bool:
        """Whether the engine knows this version."""
        return self._loads.has(name, id_)

    @property
    def engine(self) -> Engine:
        """The model server beside."""
        return self._engine

    def idle_s(self, id_: str) -> float:
        """Seconds since it was last asked for (or found at start)."""
        entry = self.holdings.index.get(id_)
        return self._clock() - entry.last_used if entry is not None else 0.0

    def checked_s(self, named: Named) -> float:
        """Seconds since it was compared with its origin; -1: not since the start."""
        return self._clock() - named.checked if named.checked is not None else -1.0

    # -- staging

    def _lease(self, name: AdapterName, now: float, holder: str, *, staged: bool, waited_s: float) -> Ensured | None:
        named = self.holdings.get(name)
        index = self.holdings.index
        if named is None or not index.lease(named.id, now + self._settings.lease_s, now, holder):
            return None
        entry = index.get(named.id)
        assert entry is not None
        return Ensured(named.digest, entry.size, staged, named.origin, self._settings.lease_s, waited_s)

    def _refuse_missing(self, name: AdapterName, now: float) -> None:
        until, error = self._missing.get(name, (0.0, None))
        if error is None:
            return
        if now < until:
            self.metrics.negative_hits.inc()
            raise type(error)(error.message)
        del self._missing[name]

    def _remember_missing(self, name: AdapterName, error: LoraExtprocError) -> None:
        if self._settings.negative_ttl_s:
            if len(self._missing) >= MAX_REMEMBERED_MISSES:
                del self._missing[next(iter(self._missing))]
            self._missing[name] = (self._clock() + self._settings.negative_ttl_s, error)

    async def _fly(self, name: AdapterName, priority: int, holder: str, sha256: str, loading: Loading) -> Ensured:
        """One flight, with its one log line and its metrics."""
        async with self._flights.book(name, priority, "staged") as job:
            kept = await self._already(name, holder)
            if kept is None:
                try:
                    named = await self._fetcher.bring(name, job, expected=sha256)
                except InvalidAdapter as error:
                    error.stated = sha256 if error.what == "digest" else ""
                    raise
                assert named is not None
                if loading is Loading.VERSIONED:
                    self._loads.begin(name, named.id)  # the engine reads the artifact where it is: its own link can come meanwhile
                try:
                    return await to_the_end(self._show_under(name, named, holder))
                finally:
                    await self._fetcher.let_go(named)
            job.outcome = "kept"
            return kept

    async def _show_under(self, name: AdapterName, named: Named, holder: str) -> Ensured:
        await asyncio.to_thread(self.store.link, name, named.id)
        self._missing.pop(name, None)
        if self._is_full:
            self._is_full = False
            log.info("the node has room again")
        self.holdings.put(name, named)
        self.changes.tell("published", name)
        ensured = self._lease(name, self._clock(), holder, staged=True, waited_s=0.0)
        assert ensured is not None
        return ensured

    async def _already(self, name: AdapterName, holder: str) -> Ensured | None:
        """What needs no fetch after all: a removal that ended in keeping it, or something that others put here."""
        if (leaving := self.holdings.get(name)) is not None:
            await self._remover.settle(leaving.id)
            kept = self._lease(name, self._clock(), holder, staged=False, waited_s=0.0)
            if kept is not None:
                return kept
        if self._settings.adopt and self._adopter.is_there(name):  # two looks: less than a thread takes to wake up
            await self._adopter.adopt(name)
            return self._lease(name, self._clock(), holder, staged=False, waited_s=0.0)
        return None

    def _learn_from(self, name: AdapterName, error: LoraExtprocError) -> None:
        """What a failed flight says of the next."""
        if isinstance(error, ModelNotFound | OriginRefused):
            self._remember_missing(name, error)
        elif isinstance(error, InvalidAdapter):
            self.metrics.verify_failures.labels(error.what).inc()
        elif isinstance(error, DiskFailed):
            self._readiness.set("disk", error.message)
        elif isinstance(error, NoSpace) and not self._is_full:
            self._is_full = True
            log.warning("the node has no room: %s", error.message)

    # -- reading back

    async def _weights_sha256(self, name: AdapterName) -> str:
        manifest = await self.manifest(name)
        return next((file.sha256 for file in manifest.files if file.path != CONFIG_FILE), "") if manifest is not None else ""

    def _read_pins(self) -> None:
        pins = self.store.read_json(PINS_FILE)
        for name, sha256 in pins.items() if isinstance(pins, dict) else ():
            with contextlib.suppress(LoraExtprocError):
                self.holdings.pin(adapter_name(str(name)), str(sha256))

    async def _write_pins(self) -> None:
        async with self._pins_file:  # else of two at once the older list may be written last
            try:
                await asyncio.to_thread(self.store.write_json, PINS_FILE, dict(self.holdings.pins))
            except DiskFailed as error:
                self._readiness.set("disk", error.message)
                raise

    # -- the node's state

    async def _keep_house(self) -> None:
        """Every second: the disk's health, room in advance, what others put here. The engine's is asked apart: here nothing may wait for it."""
        while True:
            try:
                await self._check_disk()
                await self._trim()
                if self._retiring is None or self._retiring.done():  # an engine may take its time to let something go
                    self._retiring = asyncio.create_task(self._remover.remove_retired(), name="retired")
                if self._settings.adopt and self._clock() >= self._next_scan and self._scan is not None and self._scan.done():
                    self._start_scan()
                self._tell_space()
                self._tell_demand()
            except Exception:  # whatever one round stumbles over, the next must come
                log.exception("housekeeping")
            await asyncio.sleep(HOUSEKEEPING_S)

    def _start_scan(self) -> asyncio.Task[None]:
        """In a task of its own: what others put here may be terabytes, which are hashed once."""
        self._next_scan = self._clock() + self._settings.scan_s
        self._scan = asyncio.create_task(self._adopter.scan(), name="scan")
        return self._scan

    async def _check_disk(self) -> None:
        """After a failure: whether the disk can be written again."""
        if self.store.has_leftovers:
            await asyncio.to_thread(self.store.clear_leftovers)
        if "disk" in self._readiness:
            try:
                await asyncio.to_thread(self.store.probe)
            except NoSpace:
                pass  # it can be written, when there is room
            except DiskFailed:
                return
            self._readiness.set("disk", None)

    async def _trim(self) -> None:
        """Room in advance, unless it would be in vain: what has to stay counts as used just now, and the order in which they go would be lost."""
        index, settings = self.holdings.index, self._settings
        if not self._keeper.is_well or "disk" in self._readiness or self._clock() < self._next_trim:
            return
        is_above = index.used_bytes + index.reserved_bytes > settings.high_watermark * settings.max_bytes
        if is_above and settings.high_watermark < 1 and not await self._remover.trim(int(settings.low_watermark * settings.max_bytes)):
            self._next_trim = self._clock() + TRIM_PAUSE_S

    def _tell_space(self) -> None:
        index = self.holdings.index
        if (index.used_bytes, index.reserved_bytes) != self._space_told:
            self._space_told = (index.used_bytes, index.reserved_bytes)
            self.changes.tell("space")

    def _tell_demand(self) -> None:
        if self.demand != self._demand_told:
            self._demand_told = self.demand
            self.changes.tell("demand")

    @property
    def demand(self) -> tuple[int, int]:
        """How many adapters are leased, and how many the engine keeps in memory (0: not known)."""
        return self.holdings.index.in_demand(self._clock(), self._settings.lease_s), self._engine.limits.max_cpu_loras

    def _expose(self) -> None:
        """Gauges read when they are asked, so that a scrape shows the moment and not the last round of the house."""
        index, metrics = self.holdings.index, self.metrics
        metrics.disk.labels("used").set_function(lambda: index.used_bytes)
        metrics.disk.labels("reserved").set_function(lambda: index.reserved_bytes)
        metrics.disk.labels("limit").set_function(lambda: index.max_bytes)
        metrics.adapters.set_function(lambda: len(self.holdings))
        metrics.pinned.set_function(lambda: len(self.holdings.pins))
        metrics.waiters.set_function(lambda: sum(self._in_flight.waiters(name) for name in self._flights.names()))
        metrics.engine_names.set_function(lambda: len(self._loads))
        metrics.engine_slots.labels("gpu").set_function(lambda: self._engine.limits.max_loras)
        metrics.engine_slots.labels("cpu").set_function(lambda: self._engine.limits.max_cpu_loras)
        metrics.engine_demand.set_function(lambda: self.demand[0])
        for source in self._sources:
            metrics.breaker.labels(source.label).set_function(partial(_number, source.breaker))


def _number(breaker: Breaker) -> float:
    return STATES.index(breaker.state)
