"""An origin as the stager uses it: repeated when that is worth it, left alone when it is down, at most so much at once."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Generic, TypeVar

import stamina
import stamina.instrumentation

from ...config.origins import OriginSettings
from ...core.artifact import AdapterName, File
from ...core.breaker import Breaker
from ...errors import OriginChanged, OriginDown, OriginFailed, OriginRefused, OriginSlow
from ..threads import Threads
from .download import Download
from .job import Job
from .listing import Absent, Listing, RemoteFile
from .origins.base import Fetches, Origin, Probed
from .pace import Pace, Slots

ATTEMPTS = 3  # per step and stretch without progress; with the back-off below a blip of a second is survived, an outage is answered within seconds
LONGEST_WAIT_S = 10.0  # an origin that asks to be left alone for longer is answered for at once, with its own Retry-After
PROBE_S = 2.0  # an origin that has not answered a probe by then is still down
DEFAULT_FETCHES = 8
SUSPECT_AFTER = 3  # owners whose names the origin fails at in a row, before it is asked whether it is up at all

T = TypeVar("T")
O_co = TypeVar("O_co", bound=Fetches, covariant=True)

log = logging.getLogger(__name__)

_repeated_for: ContextVar[str] = ContextVar("repeated_for", default="")  # the adapter whose step is repeated, for the log


class Supplier(Generic[O_co]):
    """Whoever gives files, with its breaker, its places and its pace.

    While the breaker is open the origin is probed in the background, if it has a cheap call for that; else one caller at a time tries.
    What such an origin says of names never opens the breaker, only a probe does: a tenant whose objects are broken closes the way to nobody else's.
    `repeats` says of a failure whether it is worth another attempt, or after how many seconds.
    """

    def __init__(
        self,
        origin: O_co,
        settings: OriginSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        repeats: Callable[[Exception], bool | float] | None = None,
    ) -> None:
        self.origin = origin
        giver: Fetches = origin
        self._probed = giver if isinstance(giver, Probed) else None
        self.label = origin.label
        self.is_listed = settings is None or settings.listed
        self.has_archives = settings is None or settings.archives
        self.breaker = Breaker(jitter=lambda: random.uniform(0.5, 1.0))  # noqa: S311  # nodes that failed together must not come back together
        self.mirror_of = settings.mirror_of if settings else ""
        self._least_bytes_per_s = settings.min_bytes_per_s if settings else 0
        self._suspected: set[str] = set()  # owners whose names failed since the last success; SUSPECT_AFTER at most
        self._repeats = repeats or is_worth_repeating
        self._clock = clock
        self._slots = Slots(settings.max_fetches if settings else DEFAULT_FETCHES)
        self._pace = Pace(settings.max_bytes_per_s if settings else 0, clock)
        self._down_since: float | None = None
        self._probing: asyncio.Task[None] | None = None

    async def fetch(self, listing: Listing, file: RemoteFile, target: Path, job: Job, disk: Threads) -> File:
        """Bring one file to `target`; `disk`: the threads in which the node's directory is written."""
        async with self.download(file, target, job, disk) as download:
            await self.go_on(listing, download, job)
            return await download.finish()

    @asynccontextmanager
    async def download(self, file: RemoteFile, target: Path, job: Job, disk: Threads) -> AsyncIterator[Download]:
        """A transfer that `go_on` carries on."""
        download = Download(file, target, pace=self._pace, job=job, disk=disk, least_bytes_per_s=self._least_bytes_per_s)
        try:
            yield download
        finally:
            download.close()

    async def go_on(self, listing: Listing, download: Download, job: Job) -> None:
        """Bring what `download` lacks. A transfer that breaks off goes on where it was, as long as each attempt brings it further; one that is too slow
        is attempted ATTEMPTS times.
        """
        _repeated_for.set(listing.name)
        async with self._slots.take(job, owner_of(listing.name)):
            while True:
                before = download.on_disk
                try:
                    async for attempt in _attempts(self._repeats):
                        with attempt:
                            await self._ask(listing.name, lambda: self.origin.fetch(listing, download.file, download), lambda: download.on_disk)
                    return
                except OriginFailed as error:
                    if download.on_disk <= before or isinstance(error, OriginSlow) or self._repeats(error) is False:  # 0 seconds are worth it
                        raise

    async def open(self) -> None:
        """Make ready to be asked. An origin that cannot be made ready now says so when it is."""
        try:
            await self.origin.open()
        except OriginFailed as error:
            log.warning("%s", error.message)

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        await self.origin.close()

    async def _ask(self, name: str, call: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0) -> T:
        """One call, unless the breaker is open; the breaker learns from what comes of it.

        A transfer that breaks off after some bytes says neither that the origin is up nor that it is down.
        """
        if not self.breaker.allow(self._clock()):
            wait_s = self.breaker.wait_s(self._clock())
            raise OriginDown(f"the {self.label} origin is down; it is asked again in {wait_s:.0f} s", max(wait_s, 0.1))
        before = progress()
        try:
            answer = await call()
        except OriginFailed as error:
            if progress() <= before or (error.asked_to_wait_s or 0.0) > LONGEST_WAIT_S:
                self._learn(name, error)
            raise
        self._learn(name, None)
        return answer

    def _learn(self, name: str, error: OriginFailed | None) -> None:
        """What came of a call for `name`; "": of a probe, which failed for the whole origin. A change is logged, with its reason and how long it was down."""
        now, breaker = self._clock(), self.breaker
        if error is None or isinstance(error, OriginRefused | OriginChanged):
            breaker.succeeded(now)
            self._suspected.clear()
        elif (error.asked_to_wait_s or 0.0) > LONGEST_WAIT_S:
            breaker.open_for(now, error.asked_to_wait_s or 0.0)
        elif not name:
            breaker.found_down(now)
        elif not error.reached:
            breaker.not_reached(now)
        elif self._probed is not None:
            self._suspect(owner_of(name), self._probed)
        else:
            breaker.failed(now, owner_of(name))
        if breaker.state == "closed" and self._down_since is not None:
            log.info("the %s origin is up again after %.1f s", self.label, now - self._down_since)
            self._down_since = None
        elif breaker.state == "open" and self._down_since is None:
            self._down_since = now
            log.warning("the %s origin is left alone: %s", self.label, error.message if error is not None else "")
        if breaker.state != "closed" and self._probed is not None:
            self._start_probing(self._probed)

    def _suspect(self, owner: str, origin: Probed) -> None:
        """It failed at a name of `owner`. Where it fails at the names of several, it may be down: a probe tells, and meanwhile everybody may ask."""
        self._suspected.add(owner)
        if self.breaker.state == "half-open":  # the one who tries has failed
            self.breaker.found_down(self._clock())
        elif len(self._suspected) >= SUSPECT_AFTER:
            self._suspected.clear()
            self._start_probing(origin, at_once=True)

    def _start_probing(self, origin: Probed, *, at_once: bool = False) -> None:
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(self._probe(origin, at_once=at_once), name=f"probe {self.label}")

    async def _probe(self, origin: Probed, *, at_once: bool = False) -> None:
        """Until the breaker is closed, whoever closes it: ask the origin whether it is up, as often as the breaker allows. With `at_once` first while it is closed."""
        if at_once:
            self._learn("", await self._ask_probe(origin))
        while self.breaker.state != "closed":
            await asyncio.sleep(max(self.breaker.wait_s(self._clock()), 0.01))
            if self.breaker.state != "closed" and self.breaker.allow(self._clock()):
                self._learn("", await self._ask_probe(origin))

    async def _ask_probe(self, origin: Probed) -> OriginFailed | None:
        """What is wrong with the whole origin; None if it is up."""
        try:
            async with asyncio.timeout(PROBE_S):
                await origin.probe()
        except OriginFailed as error:
            return error
        except TimeoutError:
            return OriginFailed(f"{self.label} origin: it did not answer within {PROBE_S:g} s", reached=False)
        except Exception as error:  # whatever it stumbles over, the next probe must come
            log.exception("probe of the %s origin", self.label)
            return OriginFailed(f"{self.label} origin: {type(error).__name__}")
        return None


class Source(Supplier[Origin]):
    """An origin, which also says what it has."""

    async def resolve(self, name: AdapterName) -> Listing | Absent | None:
        """What the origin has under `name`; Absent or None if that is no adapter. Raises OriginFailed, at once while it is left alone."""
        _repeated_for.set(name)
        async for attempt in _attempts(lambda error: self.breaker.state == "closed" and self._repeats(error)):
            with attempt:
                return await self._ask(name, lambda: self.origin.resolve(name))
        raise AssertionError("the last attempt raises")


def owner_of(name: str) -> str:
    """Whose an adapter is, as far as its name tells: the organisation of `organisation/name`."""
    return name.partition("/")[0]


def _attempts(on: Callable[[Exception], bool | float]) -> AsyncIterator[stamina.Attempt]:
    """Repeat what an origin failed at, unless it refused: a second try with the same credentials is refused again."""
    return stamina.retry_context(on=on, attempts=ATTEMPTS, timeout=None, wait_initial=0.2, wait_max=2.0, wait_jitter=0.2).__aiter__()


def is_worth_repeating(error: Exception) -> bool | float:
    """For stamina: whether, and if the origin said when, after how many seconds."""
    if not isinstance(error, OriginFailed) or not error.retryable or isinstance(error, OriginChanged):
        return False
    if error.asked_to_wait_s is None:
        return True
    return error.asked_to_wait_s if error.asked_to_wait_s <= LONGEST_WAIT_S else False


def log_repetitions() -> None:
    """Let this process log what is repeated in our words: stamina's own line has the adapter, the error and the wait only in fields that no formatter shows."""

    def note(details: stamina.instrumentation.RetryDetails) -> None:
        error = details.caused_by
        what = error.message if isinstance(error, OriginFailed) else type(error).__name__
        log.info("%s: %s; attempt %d follows in %.1f s", _repeated_for.get() or "an origin", what, details.retry_num + 1, details.wait_for)

    stamina.instrumentation.set_on_retry_hooks([note])
