"""Make room and remove, without taking a file from anybody who may read it: unload, see it gone, unlink, look again, delete."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from ..core.artifact import AdapterName
from ..core.lru import Entry
from ..errors import AdapterInUse, DiskFailed, LoraExtprocError, NoSpace
from ..flight import SingleFlight
from ..metrics import StagerMetrics
from .changes import Changes
from .engine import Engine
from .holdings import Holdings
from .readiness import Readiness
from .store import Store

log = logging.getLogger(__name__)


class Remover:
    """The only one that deletes what was published."""

    def __init__(
        self,
        store: Store,
        holdings: Holdings,
        engine: Engine,
        changes: Changes,
        readiness: Readiness,
        metrics: StagerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._holdings = holdings
        self._engine = engine
        self._changes = changes
        self._readiness = readiness
        self._metrics = metrics
        self._clock = clock
        self._removals: SingleFlight[str, AdapterInUse | DiskFailed | None] = SingleFlight()

    async def close(self) -> None:
        await self._removals.close()

    async def reserve(self, token: str, size: int) -> None:
        """Set room aside; whoever must go for it is gone when this returns. A victim the engine will not let go is passed over.

        Raises AdapterTooLarge if it never fits, NoSpace if it does not now, DiskFailed if nothing can be deleted.
        """
        index = self._holdings.index
        refused: set[str] = set()
        before = index.reserved_by(token)
        while True:
            victims = index.reserve(token, size, self._clock())
            why_kept = dict(zip(victims, await asyncio.gather(*(self.remove(victim, "room") for victim in victims)), strict=True))
            # A victim of which an operator removed only one of several names is still there, whatever its removal says.
            if not any(why_kept.values()) and index.used_bytes + index.reserved_bytes <= index.max_bytes:
                break
            index.give_back(token, before)
            for why in why_kept.values():
                if isinstance(why, DiskFailed):
                    raise why
            kept = {victim for victim, why in why_kept.items() if why is not None}
            if kept and kept <= refused:
                raise NoSpace(f"{token} needs {size} bytes; what could go for it may still be read by the engine")
            refused |= kept
        free = await asyncio.to_thread(self._store.free_bytes)
        if free < size:  # others fill the same file system
            index.give_back(token, before)
            raise NoSpace(f"{token} needs {size} bytes; the node's disk has {free} left, though its limit is not reached")

    async def trim(self, limit: int) -> bool:
        """Remove what may go, least recently used first, until at most `limit` bytes are used or reserved. False if some of it had to stay."""
        victims = self._holdings.index.surplus(limit, self._clock())
        return not any(await asyncio.gather(*(self.remove(victim, "watermark") for victim in victims)))

    async def take_away(self, name: AdapterName, cause: str, *, force: bool) -> int:
        """Remove one name because somebody asked; the bytes freed. With `force`, leases and pins do not count, but whose files they are does.

        Raises AdapterInUse or DiskFailed.
        """
        holdings, now = self._holdings, self._clock()
        named = holdings.get(name)
        entry = holdings.index.get(named.id) if named is not None else None
        if named is None or entry is None:
            return 0
        if entry.keep:
            raise AdapterInUse(f"{name} was put here by others; stager.evict_adopted is off")
        if not holdings.index.leave(named.id, now, force=force):
            raise AdapterInUse(f"{name} is {_held(entry, now)}")
        if (why := await self.remove(named.id, cause, (name,))) is not None:
            raise why
        return entry.size if named.id not in holdings.index else 0

    async def remove(self, id_: str, cause: str, names: Sequence[AdapterName] | None = None) -> AdapterInUse | DiskFailed | None:
        """Remove what the index has chosen; why, if it had to stay. The removal goes on when its caller is cancelled.

        With `names`, only these go; the content stays while another name leads to it.
        """

        async def remove() -> AdapterInUse | DiskFailed | None:
            if not self._holdings.index.is_leaving(id_):  # it ended between the choice and this
                return AdapterInUse("it stays") if id_ in self._holdings.index else None
            why = await self._remove_now(id_, cause, self._holdings.names_of(id_), names)
            self._metrics.evictions.labels(cause, "removed" if why is None else "kept").inc()
            return why

        return await self._removals.join(id_, remove)

    async def drop_unnamed(self, id_: str) -> None:
        """Remove content that no name leads to any more, so that no engine can find it."""
        if not self._holdings.names_of(id_) and self._holdings.index.leave(id_, self._clock(), force=True):
            await self.remove(id_, "refreshed")

    async def settle(self, id_: str) -> None:
        """Let a removal of `id_` that is under way end."""
        if self._holdings.index.is_leaving(id_):
            await self.remove(id_, "room")

    async def _remove_now(self, id_: str, cause: str, all_names: Sequence[AdapterName], only: Sequence[AdapterName] | None) -> AdapterInUse | DiskFailed | None:
        index = self._holdings.index
        names = all_names if only is None else only
        content_goes = set(all_names) <= set(names)
        in_use = AdapterInUse(f"{', '.join(names) or id_} may still be read by the engine")
        try:
            if not await self._engine_lets_go(names, id_):
                index.kept(id_, self._clock())
                return in_use
            if content_goes:
                await asyncio.to_thread(self._store.remove, id_)
        except Exception as error:  # whatever it was: an entry that stayed "leaving" could neither be leased nor evicted any more
            log.warning("%s stays: %s", ", ".join(names) or id_, error, exc_info=not isinstance(error, LoraExtprocError | OSError))
            if isinstance(error, DiskFailed):
                self._readiness.set("disk", error.message)
                await self._show_again(names, id_)
            index.kept(id_, self._clock())
            return error if isinstance(error, DiskFailed) else in_use
        for name in names:
            self._holdings.drop(name)
            self._changes.tell("evicted", name)
        if content_goes:
            index.removed(id_)
        else:
            index.kept(id_, self._clock())
        log.info("evicted %s (%s)", ", ".join(names) or id_, cause)
        return None

    async def _show_again(self, names: Sequence[AdapterName], id_: str) -> None:
        """The content could not go. A name that cannot be linked is none."""
        for name in names:
            if await asyncio.to_thread(self._store.shows, name, id_):
                continue
            try:
                await asyncio.to_thread(self._store.link, name, id_)
            except LoraExtprocError as error:
                log.warning("%s is gone from this node, though its files are not: %s", name, error.message)
                self._holdings.drop(name)
                self._changes.tell("evicted", name)

    async def _engine_lets_go(self, names: Sequence[AdapterName], id_: str) -> bool:
        """Make certain that no engine can read the files any more. True: the names are unloaded and their links are gone.

        The order matters. While the link is there, a request that slips in between registers the name again, which the second look sees.
        Taking the link first would kill the engine: a registered adapter that fell out of its slots is read again from the link.
        """
        if self._engine.exists and names:
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
            await asyncio.to_thread(self._store.unlink, name, id_)
        gone = False
        try:
            gone = not self._engine.exists or not names or not await self._engine_reads(names)
        finally:
            if not gone:
                for name in names:
                    await asyncio.to_thread(self._store.link, name, id_)
        return gone

    async def _engine_reads(self, names: Sequence[AdapterName]) -> bool:
        registered = await self._engine.registered()
        known = registered.keys() | (await self._engine.requests()).running
        return bool(set(names) & known) or any(root.endswith(f"/{name}") for root in registered.values() for name in names)


def _held(entry: Entry, now: float) -> str:
    """Why it may not go."""
    if entry.flights:
        return "being staged or refreshed"
    if entry.pinned:
        return "pinned"
    left_s = max(0.0, entry.leased_until - now)
    return "being sent to another node" if left_s == float("inf") else f"leased for {left_s:.0f} s more"
