"""An origin as the stager uses it: repeated when that is worth it, left alone when it is down, at most so much at once."""

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import stamina

from ..config import OriginSettings
from ..core.artifact import AdapterName, File
from ..core.breaker import Breaker
from ..errors import OriginChanged, OriginFailed, OriginRefused
from .listing import Listing, RemoteFile
from .origins.base import Origin
from .transfer import Download, Job, Pace, Slots

ATTEMPTS = 3  # per step and stretch without progress; with the back-off below a blip of a second is survived, an outage is answered within seconds
LONGEST_WAIT_S = 10.0  # an origin that asks to be left alone for longer is answered for at once, with its own Retry-After
DEFAULT_FETCHES = 8

T = TypeVar("T")

log = logging.getLogger(__name__)


class Source:
    """One origin with its breaker, its places and its pace."""

    def __init__(self, origin: Origin, settings: OriginSettings | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.origin = origin
        self.label = origin.label
        self.breaker = Breaker()
        self._clock = clock
        self._slots = Slots(settings.max_fetches if settings else DEFAULT_FETCHES)
        self._pace = Pace(settings.max_bytes_per_s if settings else 0, clock)

    async def resolve(self, name: AdapterName) -> Listing | None:
        """What the origin has under `name`; None if it has not got it. Raises OriginFailed, at once while it is left alone: the next origin is asked."""
        async for attempt in _attempts(lambda error: self.breaker.state == "closed" and _is_worth_repeating(error)):
            with attempt:
                return await self._ask(lambda: self.origin.resolve(name))
        raise AssertionError("the last attempt raises")

    async def fetch(self, listing: Listing, file: RemoteFile, target: Path, job: Job) -> File:
        """Bring one file to `target`. A transfer that breaks off goes on where it was, as long as each attempt brings it further."""
        download = Download(file, target, pace=self._pace, job=job)
        try:
            async with self._slots.take(job):
                while True:
                    before = download.on_disk
                    try:
                        async for attempt in _attempts(_is_worth_repeating):
                            with attempt:
                                await self._ask(lambda: self.origin.fetch(listing, file, download), lambda: download.on_disk)
                        return await download.finish()
                    except OriginFailed as error:
                        if download.on_disk <= before or _is_worth_repeating(error) is False:  # 0 seconds are worth it
                            raise
        finally:
            download.close()

    async def open(self) -> None:
        """Make ready to be asked. An origin that cannot be made ready now says so when it is."""
        try:
            await self.origin.open()
        except OriginFailed as error:
            log.warning("%s", error.message)

    async def close(self) -> None:
        await self.origin.close()

    async def _ask(self, call: Callable[[], Awaitable[T]], progress: Callable[[], int] = lambda: 0) -> T:
        """One call, unless the breaker is open; it learns from what comes of it. Who brought something before it failed is not down."""
        if not self.breaker.allow(self._clock()):
            wait_s = self.breaker.wait_s(self._clock())
            raise OriginFailed(f"the {self.label} origin is down; it is asked again in {wait_s:.0f} s", max(wait_s, 0.1))
        before = progress()
        try:
            answer = await call()
        except (OriginRefused, OriginChanged):
            self.breaker.succeeded()
            raise
        except OriginFailed as error:
            if (error.asked_to_wait_s or 0.0) > LONGEST_WAIT_S:
                self.breaker.open_for(self._clock(), error.asked_to_wait_s or 0.0)
            elif progress() > before:
                self.breaker.succeeded()
            else:
                self.breaker.failed(self._clock())
            raise
        self.breaker.succeeded()
        return answer


def _attempts(on: Callable[[Exception], bool | float]) -> AsyncIterator[stamina.Attempt]:
    """Repeat what an origin failed at, unless it refused: a second try with the same credentials is refused again."""
    return stamina.retry_context(on=on, attempts=ATTEMPTS, timeout=None, wait_initial=0.2, wait_max=2.0, wait_jitter=0.2).__aiter__()


def _is_worth_repeating(error: Exception) -> bool | float:
    """For stamina: whether, and if the origin said when, after how many seconds."""
    if not isinstance(error, OriginFailed) or not error.retryable or isinstance(error, OriginChanged):
        return False
    if error.asked_to_wait_s is None:
        return True
    return error.asked_to_wait_s if error.asked_to_wait_s <= LONGEST_WAIT_S else False
