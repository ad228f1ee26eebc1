"""Make room and remove, without taking a file from anybody who may read it: unload, see it gone and at rest, unlink, look again, delete.

The engine reads a registered adapter from its directory again whenever its slot was taken in between, also in the middle of an answer; if the files
are gone by then, vLLM dies. "At rest" is the moment at which no request that came before the unload can be left: none runs with one of the names, and
none waits at all, since a waiting request's adapter is in no label.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from ...core.artifact import AdapterName, ArtifactId, split_version
from ...core.lru import Entry
from ...errors import AdapterInUse, DiskFailed, LoraExtprocError, NoSpace
from ...flight import SingleFlight
from ..engine.names import leads_to
from ..node import Node

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at an engine that is not at rest
SETTLE_S = 0.2  # a request that came before an unload is in the engine's figures by then


class Remover:
    """The only one that deletes what was published."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._quiet_looks = int(node.settings.engine.quiet_s / LOOK_S)
        self._was_at_rest = False  # since this process began: what an earlier one unloaded is not known
        self._retired: set[ArtifactId] = set()  # content that no name leads to any more, and somebody may still be sent to
        self._removals: SingleFlight[ArtifactId, AdapterInUse | DiskFailed | None] = SingleFlight()

    async def close(self) -> None:
        await self._removals.close()

    async def reserve(self, token: str, size: int) -> None:
        """Set room aside; whoever must go for it is gone when this returns. A victim the engine will not let go is passed over.

        While the engine is busy with all that could go, it is asked again for `stager.engine.quiet_s`: who waits for the flight is held meanwhile.
        Raises AdapterTooLarge if it never fits, NoSpace if it does not now, DiskFailed if nothing can be deleted.
        """
        index = self._node.holdings.index
        refused: set[str] = set()
        looks = self._quiet_looks
        before = index.reserved_by(token)
        while True:
            victims = index.reserve(token, size, self._node.clock())
            why_kept = dict(zip(victims, await asyncio.gather(*(self.remove(victim, "room") for victim in victims)), strict=True))
            # A victim of which an operator removed only one of several names is still there, whatever its removal says.
            if not any(why_kept.values()) and index.used_bytes + index.reserved_bytes <= index.max_bytes:
                break
            index.give_back(token, before)
            for why in why_kept.values():
                if isinstance(why, DiskFailed):
                    raise why
            kept = {victim for victim, why in why_kept.items() if why is not None}
            if kept and kept <= refused and looks > 0:
                looks -= 1
                refused.clear()
                await asyncio.sleep(LOOK_S)
                continue
            if kept and kept <= refused:
                raise NoSpace(f"{token} needs {size} bytes; what could go for it may still be read by the engine")
            refused |= kept
        free = await self._node.disk.run(self._node.store.free_bytes)
        if free < size:  # others fill the same file system
            index.give_back(token, before)
            raise NoSpace(f"{token} needs {size} bytes; the node's disk has {free} left, though its limit is not reached")

    async def trim(self, limit: int) -> bool:
        """Remove what may go, least recently used first, until at most `limit` bytes are used or reserved. False if some of it had to stay."""
        victims = self._node.holdings.index.surplus(limit, self._node.clock())
        return not any(await asyncio.gather(*(self.remove(victim, "watermark") for victim in victims)))

    async def take_away(self, name: AdapterName, cause: str, *, force: bool) -> int:
        """Remove one name because somebody asked; the bytes freed. With `force`, leases and pins do not count, but whose files they are does.

        Raises AdapterInUse or DiskFailed.
        """
        holdings, now = self._node.holdings, self._node.clock()
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

    async def remove(self, id_: ArtifactId, cause: str, names: Sequence[AdapterName] | None = None) -> AdapterInUse | DiskFailed | None:
        """Remove what the index has chosen; why, if it had to stay. The removal goes on when its caller is cancelled.

        With `names`, only these go; the content stays while another name leads to it.
        """

        async def remove() -> AdapterInUse | DiskFailed | None:
            if not self._node.holdings.index.is_leaving(id_):  # it ended between the choice and this
                return AdapterInUse("it stays") if id_ in self._node.holdings.index else None
            why = await self._remove_now(id_, cause, self._node.holdings.names_of(id_), names)
            self._node.metrics.evictions.labels(cause, "removed" if why is None else "kept").inc()
            return why

        return await self._removals.join(id_, remove)

    async def drop_unnamed(self, id_: ArtifactId) -> None:
        """Remove content that no name leads to any more: beside an engine when the last lease has ended, since requests may still be sent to it."""
        if self._node.holdings.names_of(id_):
            return
        index = self._node.holdings.index
        if id_ in index and (self._node.engine.exists or index.is_guarded(id_, self._node.clock())):
            self.retire(id_)
            with contextlib.suppress(NoSpace, DiskFailed):  # then a restart may bring it back, until it is compared with its origin
                await self._node.disk.run(self._node.store.retire, id_)
            await self.remove_retired(id_)
        elif index.leave(id_, self._node.clock(), force=True):
            await self.remove(id_, "refreshed")

    def retire(self, id_: ArtifactId) -> None:
        """No name leads there any more: it goes when nobody holds it."""
        self._retired.add(id_)

    async def remove_retired(self, only: ArtifactId | None = None) -> None:
        """Remove what was retired and is not held, as far as the engine lets it go."""
        index = self._node.holdings.index
        for id_ in [only] if only else list(self._retired):
            if index.is_leaving(id_):
                continue
            if self._node.holdings.names_of(id_) or id_ not in index or (index.leave(id_, self._node.clock()) and await self.remove(id_, "refreshed") is None):
                self._retired.discard(id_)

    async def settle(self, id_: ArtifactId) -> None:
        """Let a removal of `id_` that is under way end."""
        if self._node.holdings.index.is_leaving(id_):
            await self.remove(id_, "room")

    async def _remove_now(
        self, id_: ArtifactId, cause: str, all_names: Sequence[AdapterName], only: Sequence[AdapterName] | None
    ) -> AdapterInUse | DiskFailed | None:
        index = self._node.holdings.index
        names = all_names if only is None else only
        content_goes = set(all_names) <= set(names)
        in_use = AdapterInUse(f"{', '.join(names) or id_} may still be read by the engine")
        try:
            if not await self._engine_lets_go(names, id_, only):
                index.kept(id_, self._node.clock())
                return in_use
            if content_goes:
                await self._node.disk.run(self._node.store.remove, id_)
        except Exception as error:  # whatever it was: an entry that stayed "leaving" could neither be leased nor evicted any more
            log.warning("%s stays: %s", ", ".join(names) or id_, error, exc_info=not isinstance(error, LoraExtprocError | OSError))
            if isinstance(error, DiskFailed):
                self._node.readiness.set("disk", error.message)
                await self._show_again(names, id_)
            index.kept(id_, self._node.clock())
            return error if isinstance(error, DiskFailed) else in_use
        for name in names:
            self._node.holdings.drop(name)
            self._node.changes.tell("evicted", name)
        if content_goes:
            index.removed(id_)
        else:
            index.kept(id_, self._node.clock())
        log.info("evicted %s (%s)", ", ".join(names) or id_, cause)
        return None

    async def _show_again(self, names: Sequence[AdapterName], id_: ArtifactId) -> None:
        """The content could not go. A name that cannot be linked is none."""
        for name in names:
            if await self._node.disk.run(self._node.store.shows, name, id_):
                continue
            try:
                await self._node.disk.run(self._node.store.link, name, id_)
            except LoraExtprocError as error:
                log.warning("%s is gone from this node, though its files are not: %s", name, error.message)
                self._node.holdings.drop(name)
                self._node.changes.tell("evicted", name)

    async def _engine_lets_go(self, names: Sequence[AdapterName], id_: ArtifactId, only: Sequence[AdapterName] | None) -> bool:
        """Make certain that no engine can read the files any more. True: the names are unloaded and their links are gone.

        The order matters. While a link is there, a request that slips in between registers the name again, which the last look sees.
        Taking the link first would kill the engine: a registered adapter that fell out of its slots is read again from the link.
        """
        links: list[str] = [*names, *self._node.loads.links(id_, only)]
        if self._node.engine.exists:
            if self._node.loads.is_loading(id_):
                return False
            readers, others = await self._node.loads.readers(id_, only)
            if others or readers & (await self._node.engine.requests()).running:
                return False
            if readers and self._node.holdings.index.is_leased(id_, self._node.clock()):
                for name in names:
                    self._node.changes.tell("evicted", name)  # before the engine forgets it: nobody else may be sent there
            for reader in sorted(readers):
                await self._node.loads.unload(reader, id_)
            if readers and not self._node.engine.unload_waits:
                await asyncio.sleep(SETTLE_S)
            if not await self._is_at_rest(links, id_, only):
                return False
        for link in links:
            await self._node.disk.run(self._node.store.unlink, link, id_)
        gone = False
        try:
            gone = not self._node.engine.exists or await self._is_at_rest(links, id_, only)
        finally:
            if not gone:
                for name in names:
                    await self._node.disk.run(self._node.store.link, name, id_)
                for link in links[len(names) :]:
                    await self._node.disk.run(self._node.store.link_version, link, id_)
        if gone:
            self._node.loads.forget(links[len(names) :])
            self._node.loads.settled(id_)
        return gone

    async def _is_at_rest(self, links: Sequence[str], id_: ArtifactId, only: Sequence[AdapterName] | None) -> bool:
        """Whether no request can be left that uses the artifact, and no name that a new one could use.

        Of content that no name leads to any more (a replaced version), an adapter's own name may have been the one: no request by such a name may run.
        """
        if any(await self._node.loads.readers(id_, only)):
            return False
        requests = await self._node.engine.requests()
        unsettled, is_nameless = self._node.loads.unsettled(id_), not links
        if requests.running & {*links, *unsettled} or any(leads_to(name, id_) for name in requests.running):
            return False
        if is_nameless and any(split_version(name) is None for name in requests.running):
            return False
        if requests.waiting and (unsettled or is_nameless or not self._was_at_rest):
            return False
        self._was_at_rest = self._was_at_rest or not requests.waiting
        return True


def _held(entry: Entry[ArtifactId], now: float) -> str:
    """Why it may not go."""
    if entry.flights:
        return "being staged or refreshed"
    if entry.pinned:
        return "pinned"
    if entry.leased_until <= now:
        return "kept until routers have said what they rely on: this stager has just been started"
    left_s = max(0.0, entry.leased_until - now)
    return "being sent to another node" if left_s == float("inf") else f"leased for {left_s:.0f} s more"
