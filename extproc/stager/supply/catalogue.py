"""What this node's origins could give: the names that they have, as far as they can be listed, for the routers' lists of models.

An origin is listed when a router asks and the last listing is older than `stager.list_s`: one listing of it at a time, beside its breaker and its
places, so that no fetch waits for a listing and no listing decides whether the origin is up. One that cannot be listed now keeps what it had.
"""

import asyncio
import hashlib
import logging
import random
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import groupby, islice

from ...config.stager import StagerSettings
from ...core.artifact import AdapterName
from ...errors import OriginFailed
from ..threads import Threads
from .origins.base import Listable
from .origins.names import MAX_NAMES, MAX_PATHS, RUN, Names
from .source import Source

WAIT_S = 1.5  # for a listing that is due; a router answers its client after two seconds with what it knows
RETRY_S = 10.0  # after a listing that failed, where `list_s` is longer
LONGEST_S = 600.0  # of one listing: two thousand pages of S3 take some minutes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listed:
    """The names of all origins at one moment, by code points. `version` tells them from others; "" before anything could be listed."""

    version: str = ""
    names: Sequence[AdapterName] = ()

    def after(self, name: str, limit: int) -> Sequence[AdapterName]:
        """At most `limit` names from the first after `name` on."""
        first = bisect_right(self.names, name) if name else 0
        return self.names[first : first + limit]


class Catalogue:
    """The names of all listable origins. At most MAX_NAMES of them."""

    def __init__(self, sources: Sequence[Source], settings: StagerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._shelves = [
            _Shelf(source, source.origin, allow_pickle=settings.allow_pickle) for source in sources if source.is_listed and isinstance(source.origin, Listable)
        ]
        self._every_s = settings.list_s
        self._clock = clock
        self._threads = Threads(1, "catalogue")
        self._due = 0.0
        self._listing: asyncio.Task[None] | None = None
        self.listed = Listed() if self._shelves and self._every_s else _merged([])

    async def current(self) -> Listed:
        """What was listed last; of a listing that is due or in progress, what it gives within WAIT_S."""
        if self._listing is None and self._shelves and self._every_s and self._clock() >= self._due:
            self._listing = asyncio.create_task(self._list(), name="catalogue")
            self._listing.add_done_callback(self._ended)
        if self._listing is not None:
            await asyncio.wait({self._listing}, timeout=WAIT_S)
        return self.listed

    async def close(self) -> None:
        """Give up a listing in progress. A thread that hangs in a file system is not waited for."""
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.gather(self._listing, return_exceptions=True)
        await asyncio.gather(*(shelf.close() for shelf in self._shelves))
        self._threads.close()

    async def _list(self) -> None:
        """All origins at once. The names of one that is quick do not wait for another."""
        are_well = False
        try:
            async with asyncio.TaskGroup() as group:
                listings = [group.create_task(self._take(shelf)) for shelf in self._shelves]
            are_well = all(listing.result() for listing in listings)
        finally:
            pause_s = self._every_s if are_well else min(self._every_s, RETRY_S)
            self._due = self._clock() + pause_s * random.uniform(0.8, 1.2)  # noqa: S311  # nodes that started together must not list together

    async def _take(self, shelf: "_Shelf") -> bool:
        is_well = await shelf.list()
        if lists := [shelf.names for shelf in self._shelves if shelf.names is not None]:
            self.listed = await self._threads.run(_merged, lists)
        return is_well

    def _ended(self, listing: asyncio.Task[None]) -> None:
        self._listing = None
        if not listing.cancelled() and (error := listing.exception()) is not None:
            log.error("the catalogue could not be listed", exc_info=error)


class _Shelf:
    """One origin: its last good names, and the listing of it that runs."""

    def __init__(self, source: Source, origin: Listable, *, allow_pickle: bool) -> None:
        self.names: list[AdapterName] | None = None
        self._source = source
        self._origin = origin
        self._allow_pickle = allow_pickle
        self._threads = Threads(1, f"list {source.label}")
        self._running: asyncio.Task[None] | None = None
        self._failed = False  # the last listing; both are told once
        self._was_cut = False

    async def list(self) -> bool:
        """Replace the names by what the origin has now. False if that fails; the names stay."""
        if self._running is not None and not self._running.done():
            return self._fails("its last listing still hangs")
        if self._source.breaker.state == "open":
            return self._fails("it is down")
        found = Names(archives=self._source.has_archives, pickle=self._allow_pickle)
        self._running = asyncio.create_task(self._origin.list_all(found, self._threads), name=f"list {self._source.label}")
        try:
            done, _ = await asyncio.wait({self._running}, timeout=LONGEST_S)
            if not done:
                return self._fails(f"that takes longer than {LONGEST_S:g} s")
            self._running.result()
            is_cut = found.is_full()
            self.names = await self._threads.run(found.sorted)
        except OriginFailed as error:
            return self._fails(error.message)
        except Exception as error:  # whatever it stumbles over, the next listing must come
            log.exception("listing of the %s origin", self._source.label)
            return self._fails(type(error).__name__)
        finally:
            found.stop()
        if self._failed:
            log.info("the %s origin can be listed again", self._source.label)
        if is_cut and not self._was_cut:
            log.warning("the %s origin has over %d adapters or %d files; the rest is served, but not listed", self._source.label, MAX_NAMES, MAX_PATHS)
        self._failed, self._was_cut = False, is_cut
        return True

    def _fails(self, why: str) -> bool:
        if not self._failed:
            had = "nothing of it is listed" if self.names is None else "its last names stay listed"
            log.warning("the %s origin cannot be listed, %s: %s", self._source.label, had, why)
        self._failed = True
        return False

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._threads.close()


def _merged(lists: Sequence[Sequence[AdapterName]]) -> Listed:
    """One list of all, each name once. Blocks for a tenth of a second where there are a hundred thousand, in steps of a millisecond."""
    names = list(islice((name for name, _ in groupby(merge(*lists))), MAX_NAMES))
    digest = hashlib.blake2b(digest_size=16)
    for first in range(0, len(names), RUN):
        digest.update("".join(f"{name}\n" for name in names[first : first + RUN]).encode())
    return Listed(digest.hexdigest(), names)
