"""Make adapters present: resolve, reserve, fetch, verify, publish; and make room without taking a file from anybody who may read it."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import stamina

from ..config import StagerSettings
from ..core.artifact import AdapterName, File, Manifest, adapter_name
from ..core.lru import Index
from ..errors import AdapterInUse, AdapterTooLarge, InvalidAdapter, LoraExtprocError, ModelNotFound, NoSpace, OriginFailed
from ..flight import SingleFlight
from ..metrics import StagerMetrics
from .engine import Engine
from .origins import Listing, Origin, RemoteFile
from .store import Store, hash_file
from .verify import CONFIG_FILE, MAX_CONFIG_BYTES, AdapterConfig, check_config, check_files

log = logging.getLogger(__name__)

ATTEMPTS = 3  # per origin and step; with the back-off below a blip of a second is survived, an outage is answered within seconds
UNKNOWN_SIZE_BYTES = 512 * 2**20  # reserved for a file whose origin does not say its size, and the most that it may then have
HEALTH_INTERVAL_S = 1.0
MAX_REMEMBERED_MISSES = 10_000


@dataclass(frozen=True, slots=True)
class Ensured:
    """An adapter that is on disk and will stay for `lease_s` seconds."""

    manifest: Manifest
    digest: str
    staged: bool
    lease_s: float
    waited_s: float


@dataclass(frozen=True, slots=True)
class Change:
    """Something a watcher is told: `kind` is "node", "published" or "evicted"."""

    kind: str
    adapter: str = ""


class Stager:
    """One node. `open` before anything else, `close` at the end."""

    def __init__(
        self, settings: StagerSettings, origins: Sequence[Origin], engine: Engine, metrics: StagerMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.instance = secrets.token_hex(8)
        self.not_ready: str | None = "starting"
        self.metrics = metrics
        self._settings = settings
        self._origins = origins
        self._engine = engine
        self._clock = clock
        self._store = Store(Path(settings.dir))
        self.index = Index(settings.max_bytes)
        self.names: dict[AdapterName, str] = {}  # adapter name -> digest
        self.manifests: dict[str, Manifest] = {}
        self._flights: SingleFlight[AdapterName, Ensured] = SingleFlight()
        self._removals: SingleFlight[str, bool] = SingleFlight()
        self._missing: dict[AdapterName, float] = {}  # what no origin has -> until when that is remembered
        self._watchers: set[asyncio.Queue[Change]] = set()
        self._health: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Take the directory and adopt what is in it. Raises StartError."""
        scan = await asyncio.to_thread(self._store.open)
        now = self._clock()
        for digest, (manifest, _modified) in sorted(scan.artifacts.items(), key=lambda item: item[1][1]):
            self.index.add(digest, manifest.size, now)
            self.manifests[digest] = manifest
        self.names.update(scan.names)
        log.info("%s: adopted %d adapters (%d bytes), removed %d leftovers", self._settings.dir, len(self.names), self.index.used_bytes, len(scan.removed))
        self._show()
        self.not_ready = None if not self._engine.exists else "the engine was not asked yet"
        if self._engine.exists:
            self._health = asyncio.create_task(self._watch_engine(), name="engine health")

    async def close(self) -> None:
        """Give up flights, leave nothing half done, and let the directory go."""
        if self._health is not None:
            self._health.cancel()
        await self._flights.close()
        await self._removals.close()
        for origin in self._origins:
            await origin.close()
        await self._engine.close()
        self._store.close()

    # -- what routers ask

    async def ensure(self, raw_name: str) -> Ensured:
        """Wait until the adapter is on disk, and lease it. Cancelling ends the wait, not the fetch. Raises a StageError or InvalidRequest."""
        name = adapter_name(raw_name)
        began = self._clock()
        try:
            held = self._lease(name, began, staged=False, waited_s=0.0)
            if held is None:
                self._refuse_missing(name, began)
                landed = await self._flights.join(name, lambda: self._fly(name))
                now = self._clock()
                held = self._lease(name, now, staged=landed.staged, waited_s=now - began) or landed
        except LoraExtprocError as error:
            self.metrics.ensures.labels(error.reason).inc()
            raise
        self.metrics.ensures.labels("staged" if held.staged else "hit").inc()
        return held

    async def evict(self, raw_name: str) -> int:
        """Remove one adapter because an operator asked; the bytes freed. Raises ModelNotFound or AdapterInUse."""
        name = adapter_name(raw_name)
        digest = self.names.get(name)
        entry = self.index.get(digest) if digest is not None else None
        if digest is None or entry is None:
            raise ModelNotFound(f"{name} is not on this node")
        if not self.index.leave(digest, self._clock()):
            raise AdapterInUse(f"{name} is leased for {max(0.0, entry.leased_until - self._clock()):.0f} s more")
        if not await self._remove(digest, "asked", (name,)):
            raise AdapterInUse(f"{name} may still be read by the engine")
        return entry.size if digest not in self.index else 0

    def leased_s(self, digest: str) -> float:
        """Seconds until the last lease on `digest` ends; 0 without one."""
        entry = self.index.get(digest)
        return max(0.0, entry.leased_until - self._clock()) if entry is not None else 0.0

    def idle_s(self, digest: str) -> float:
        """Seconds since `digest` was last asked for (or found at start)."""
        entry = self.index.get(digest)
        return self._clock() - entry.last_used if entry is not None else 0.0

    @contextmanager
    def changes(self) -> Iterator["asyncio.Queue[Change]"]:
        """A queue of all changes from now on."""
        queue: asyncio.Queue[Change] = asyncio.Queue()
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)

    # -- staging

    def _lease(self, name: AdapterName, now: float, *, staged: bool, waited_s: float) -> Ensured | None:
        digest = self.names.get(name)
        if digest is None or not self.index.lease(digest, now + self._settings.lease_s, now):
            return None
        return Ensured(self.manifests[digest], digest, staged, self._settings.lease_s, waited_s)

    def _refuse_missing(self, name: AdapterName, now: float) -> None:
        until = self._missing.get(name)
        if until is None:
            return
        if now < until:
            self.metrics.negative_hits.inc()
            raise ModelNotFound(f"no origin has {name}")
        del self._missing[name]

    async def _fly(self, name: AdapterName) -> Ensured:
        """One flight, with its one log line and its metrics."""
        phases: dict[str, float] = {}
        began = self._clock()
        origin, result = "none", "cancelled"
        self.metrics.flights.inc()
        try:
            async with asyncio.timeout(self._settings.fetch_timeout_s):
                origin, ensured = await self._stage(name, phases)
                result = "staged"
                return ensured
        except TimeoutError:
            result = OriginFailed.reason
            raise OriginFailed(f"{name} did not arrive within {self._settings.fetch_timeout_s:g} s") from None
        except LoraExtprocError as error:
            result = error.reason
            log.info("%s: %s: %s", name, error.reason, error.message)
            raise
        finally:
            self.metrics.flights.dec()
            self.metrics.stages.labels(origin, result).inc()
            for phase, seconds in phases.items():
                self.metrics.stage_seconds.labels(phase).observe(seconds)
            self._show()
            if result == "staged":
                text = ", ".join(f"{phase} {seconds * 1000:.0f}" for phase, seconds in phases.items())
                log.info("%s: staged from %s in %.0f ms (%s)", name, origin, (self._clock() - began) * 1000, text)

    async def _stage(self, name: AdapterName, phases: dict[str, float]) -> tuple[str, Ensured]:
        if (leaving := self.names.get(name)) is not None:  # it is being removed: let that end, or find it kept
            await self._removals_of(leaving)
            kept = self._lease(name, self._clock(), staged=False, waited_s=0.0)
            if kept is not None:
                return kept.manifest.origin, kept
        with self._phase(phases, "resolve"):
            origin, listing = await self._resolve(name)
        size = sum(UNKNOWN_SIZE_BYTES if file.size is None else file.size for file in listing.files)
        if size > self._settings.max_adapter_bytes:
            raise AdapterTooLarge(f"{name} has {size} bytes; stager.max_adapter_bytes is {self._settings.max_adapter_bytes}")
        await asyncio.to_thread(self._store.check_name, name)
        with self._store.staging() as directory:
            with self._phase(phases, "check"):
                config_file, config = await self._fetch_config(origin, listing, directory)
            token = f"{name} ({directory.name})"
            try:
                with self._phase(phases, "reserve"):
                    await self._reserve(token, size)
                with self._phase(phases, "fetch"):
                    rest = [await self._fetch(origin, listing, file, directory) for file in listing.files if file.path != CONFIG_FILE]
                with self._phase(phases, "verify"):
                    await asyncio.to_thread(check_files, directory, config, allow_pickle=self._settings.allow_pickle)
                with self._phase(phases, "publish"):
                    manifest = Manifest(tuple(sorted((config_file, *rest))), name, origin.label, listing.revision)
                    await self._removals_of(manifest.digest)
                    self.index.lease(manifest.digest, self._clock() + self._settings.lease_s, self._clock())  # content that is here stays here
                    digest = await asyncio.to_thread(self._store.publish, directory, manifest)
                    self.index.commit(token, digest, manifest.size, self._clock())
                    self.manifests[digest] = manifest
                    await asyncio.to_thread(self._store.link, name, digest)
                self.names[name] = digest
            finally:
                self.index.abort(token)
        ensured = self._lease(name, self._clock(), staged=True, waited_s=0.0)
        assert ensured is not None
        self._tell(Change("published", name))
        return origin.label, ensured

    async def _resolve(self, name: AdapterName) -> tuple[Origin, Listing]:
        """The first origin, in order, that has `name`. One that fails is passed over; if none of the others has it, the failure is the answer."""
        failure: OriginFailed | None = None
        for origin in self._origins:
            try:
                async for attempt in _attempts():
                    with attempt:
                        listing = await origin.resolve(name)
            except OriginFailed as error:
                log.warning("%s: %s", name, error.message)
                failure = failure or error
                continue
            if listing is not None:
                return origin, listing
        if failure is not None:
            raise failure
        self._remember_missing(name)
        raise ModelNotFound(f"no origin has {name}")

    def _remember_missing(self, name: AdapterName) -> None:
        if self._settings.negative_ttl_s:
            if len(self._missing) >= MAX_REMEMBERED_MISSES:
                del self._missing[next(iter(self._missing))]
            self._missing[name] = self._clock() + self._settings.negative_ttl_s

    async def _fetch_config(self, origin: Origin, listing: Listing, directory: Path) -> tuple[File, AdapterConfig]:
        """The configuration first: what it rules out need not be downloaded."""
        paths = [file.path for file in listing.files]
        if len(paths) < 2:
            raise InvalidAdapter(f"{listing.name} has no weights file")
        if any(path.endswith(".bin") for path in paths) and not self._settings.allow_pickle:
            raise InvalidAdapter(f"{listing.name} has only pickled weights (.bin), which can run code; safetensors are needed")
        config_file = next(file for file in listing.files if file.path == CONFIG_FILE)
        if config_file.size is not None and config_file.size > MAX_CONFIG_BYTES:
            raise InvalidAdapter(f"{CONFIG_FILE} has {config_file.size} bytes; the limit is {MAX_CONFIG_BYTES}")
        fetched = await self._fetch(origin, listing, config_file, directory)
        text = await asyncio.to_thread((directory / CONFIG_FILE).read_bytes)
        engine = self._settings.engine
        return fetched, check_config(text, base_model=engine.base_model, max_rank=engine.max_lora_rank)

    async def _fetch(self, origin: Origin, listing: Listing, file: RemoteFile, directory: Path) -> File:
        """One file, hashed, and compared with what the origin states of it."""
        target = directory / file.path
        if file.size is None:
            file = replace(file, limit=UNKNOWN_SIZE_BYTES)
        async for attempt in _attempts():
            with attempt:
                sha256 = await origin.fetch(listing, file, target)
        size = target.stat().st_size
        got = await asyncio.to_thread(hash_file, target, file.path) if sha256 is None else File(file.path, size, sha256)
        self.metrics.fetched_bytes.labels(origin.label).inc(got.size)
        if file.size is not None and got.size != file.size:
            raise InvalidAdapter(f"{file.path} has {got.size} bytes; the {origin.label} origin states {file.size}")
        if file.size is None and got.size > UNKNOWN_SIZE_BYTES:
            raise AdapterTooLarge(f"{file.path} has {got.size} bytes, and its origin did not say so; the limit then is {UNKNOWN_SIZE_BYTES}")
        if file.sha256 is not None and got.sha256 != file.sha256:
            raise InvalidAdapter(f"{file.path} has SHA-256 {got.sha256}; the {origin.label} origin states {file.sha256}")
        return got

    # -- making room

    async def _reserve(self, token: str, size: int) -> None:
        """Set room aside; whoever must go for it is gone when this returns. A victim the engine will not let go is passed over."""
        refused: set[str] = set()
        while True:
            victims = self.index.reserve(token, size, self._clock())
            removed = await asyncio.gather(*(self._remove(victim, "room") for victim in victims))
            # A victim of which an operator removed only one of several names is still there, whatever its removal says.
            if all(removed) and self.index.used_bytes + self.index.reserved_bytes <= self.index.max_bytes:
                return
            self.index.abort(token)
            kept = {victim for victim, gone in zip(victims, removed, strict=True) if not gone}
            if kept and kept <= refused:
                raise NoSpace(f"{token} needs {size} bytes; what could go for it may still be read by the engine")
            refused |= kept

    async def _remove(self, digest: str, cause: str, names: Sequence[AdapterName] | None = None) -> bool:
        """Unload, see it gone and not running, delete. False if it had to stay. The removal goes on when its caller is cancelled.

        With `names`, only these go; the content stays while another name leads to it.
        """

        async def remove() -> bool:
            removed = await self._remove_now(digest, [name for name, named in self.names.items() if named == digest], names)
            self.metrics.evictions.labels(cause, "removed" if removed else "kept").inc()
            self._show()
            return removed

        return await self._removals.join(digest, remove)

    async def _removals_of(self, digest: str) -> None:
        if digest in self._removals:
            await self._remove(digest, "room")

    async def _remove_now(self, digest: str, all_names: Sequence[AdapterName], only: Sequence[AdapterName] | None) -> bool:
        names = all_names if only is None else only
        content_goes = set(all_names) <= set(names)
        try:
            if not await self._engine_lets_go(names):
                self.index.kept(digest, self._clock())
                return False
            if content_goes:
                await asyncio.to_thread(self._store.remove, digest)
        except Exception as error:  # whatever it was: an entry that stayed "leaving" could neither be leased nor evicted any more
            log.warning("%s stays: %s", ", ".join(names) or digest, error, exc_info=not isinstance(error, LoraExtprocError | OSError))
            self.index.kept(digest, self._clock())
            return False
        for name in names:
            self.names.pop(name, None)
            self._tell(Change("evicted", name))
        if content_goes:
            self.manifests.pop(digest, None)
            self.index.removed(digest)
        else:
            self.index.kept(digest, self._clock())
        log.info("evicted %s", ", ".join(names) or digest)
        return True

    async def _engine_lets_go(self, names: Sequence[AdapterName]) -> bool:
        """Make certain that no engine can read the files any more. True: the names are unloaded and their links are gone.

        The order matters. While the link is there, a request that slips in between registers the name again, which the second look sees.
        Taking the link first would kill the engine: a registered adapter that fell out of its slots is read again from the link.
        """
        if self._engine.exists:
            requests = await self._engine.requests()
            if requests.running & set(names):
                return False
            if requests.waiting and set(names) & set(await self._engine.registered()):
                return False  # who waits for a slot is in no label, and reads the files when it gets one
            for name in names:
                await self._engine.unload(name)
            if await self._engine_reads(names):
                return False
        for name in names:
            await asyncio.to_thread(self._store.unlink, name)
        gone = False
        try:
            gone = not self._engine.exists or not await self._engine_reads(names)
        finally:
            if not gone:
                for name in names:
                    await asyncio.to_thread(self._store.link, name, self.names[name])
        return gone

    async def _engine_reads(self, names: Sequence[AdapterName]) -> bool:
        registered = await self._engine.registered()
        known = registered.keys() | (await self._engine.requests()).running
        return bool(set(names) & known) or any(root.endswith(f"/{name}") for root in registered.values() for name in names)

    # -- the node's state

    async def _watch_engine(self) -> None:
        while True:
            why = None if await self._engine.is_healthy() else "the engine is not healthy"
            if why != self.not_ready:
                log.log(logging.INFO if why is None else logging.WARNING, "node is %s", "ready" if why is None else f"not ready: {why}")
                self.not_ready = why
                self._tell(Change("node"))
            await asyncio.sleep(HEALTH_INTERVAL_S)

    def _tell(self, change: Change) -> None:
        for queue in self._watchers:
            queue.put_nowait(change)

    def _show(self) -> None:
        self.metrics.disk.labels("used").set(self.index.used_bytes)
        self.metrics.disk.labels("reserved").set(self.index.reserved_bytes)
        self.metrics.disk.labels("limit").set(self.index.max_bytes)
        self.metrics.adapters.set(len(self.names))

    @contextmanager
    def _phase(self, phases: dict[str, float], phase: str) -> Iterator[None]:
        began = self._clock()
        try:
            yield
        finally:
            phases[phase] = self._clock() - began


def _attempts() -> AsyncIterator[stamina.Attempt]:
    """Repeat what an origin failed at, unless it refused: a second try with the same credentials is refused again."""
    return stamina.retry_context(on=_is_worth_repeating, attempts=ATTEMPTS, timeout=None, wait_initial=0.2, wait_max=2.0, wait_jitter=0.2).__aiter__()


def _is_worth_repeating(error: Exception) -> bool:
    return isinstance(error, OriginFailed) and error.retryable
