"""Make room and remove, without taking a file from anybody who may read it: look, unload, see it at rest, unlink, look again, delete.

The engine reads a registered adapter from its directory again whenever its slot was taken in between, also in the middle of an answer; if the files
are gone by then, vLLM dies. "At rest" is the moment at which no request that came before the unload can be left: none runs with one of the names, and
none waits at all, since a waiting request's adapter is in no label (engine/rest.py).

Removals are done in batches, each with one wait and the same few looks for all of it, since a look costs an engine with twenty thousand names
megabytes. Nothing is unloaded that a look has shown to have to stay. What stays keeps its place in the order of use.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

from ...core.artifact import AdapterName, ArtifactId
from ...core.life import State
from ...core.lru import Entry
from ...errors import AdapterInUse, DiskFailed, EngineUnreachable, LoraExtprocError, NoSpace, PrefetchGivenUp
from ..engine.rest import Look, Rest, Standing
from ..node import Node
from .removal import Removal, Stays

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between two attempts of who needs room while the engine is busy with all that could go
SETTLE_S = 0.2  # a request that came before an unload is in the engine's figures by then
QUEUE_S = 1.0  # that a batch whose names are unloaded waits for an empty queue: to give up and begin again costs more looks
BATCH = 96  # removals that share two looks of two calls each: a twenty-fourth of a call for each; twice that beside a queue that comes and goes
UNLOADS = 8  # at once; vLLM answers them one after the other
DELETIONS = 4  # at once: in threads, which share the interpreter with the event loop
MAX_VICTIMS = 1024  # of one reservation: an adapter that needs more of the others' room than that would empty the node for itself
MAX_ROUNDS = 8  # choices of other victims for one reservation, before it is said that there is no room

_STAYS = {Standing.READ: Stays.READ, Standing.QUEUED: Stays.QUEUED, Standing.IDLE: Stays.LISTED}  # after the unload


class Remover:
    """The only one that deletes what was published. Flights and operators have a queue that is worked off in batches; background work goes beside it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._rest = Rest(node.engine, node.loads, node.holdings, node.store)
        self._deleting = asyncio.Semaphore(DELETIONS)
        self._retired: set[ArtifactId] = set()  # content that no name leads to any more, and somebody may still be sent to
        self._removals: dict[ArtifactId, Removal] = {}  # in progress; as many as leave
        self._queue: deque[Removal] = deque()  # of these, those that wait for a batch
        self._worker: asyncio.Task[None] | None = None

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def reserve(self, token: str, size: int) -> None:
        """Set room aside; whoever must go for it is gone when this returns. A victim the engine will not let go is passed over.

        While the engine is busy with all that could go, it is asked again for `stager.engine.quiet_s`: who waits for the flight is held meanwhile.
        Raises AdapterTooLarge if it never fits, NoSpace if it does not now, DiskFailed if nothing can be deleted.
        """
        index = self._node.holdings.index
        before = index.reserved_by(token)
        passed_over: set[ArtifactId] = set()
        rounds, unread_only = 0, False
        loop = asyncio.get_running_loop()
        patience_ends = loop.time() + self._node.settings.engine.quiet_s
        await self.measure()
        while True:
            try:
                victims = index.reserve(token, size, self._node.clock(), passed_over, most=MAX_VICTIMS, unread_only=unread_only)
            except NoSpace:
                if not passed_over:
                    raise
            else:
                removals = await self._remove_all(victims, "room")
                stayed = [removal for removal in removals if removal.stays is not None]
                if victims:
                    await self.measure()
                # A victim of which an operator removed only one of several names is still there, whatever its removal says.
                if not stayed and index.fits:
                    return
                index.give_back(token, before)
                for removal in stayed:
                    if isinstance(removal.error, DiskFailed):
                        raise removal.error
                passed_over.update(removal.id for removal in stayed if removal.stays is not Stays.PREPARED)
                unread_only = unread_only or any(removal.stays is Stays.QUEUED for removal in stayed)
                rounds += 1
                if rounds % MAX_ROUNDS:
                    continue
            if loop.time() >= patience_ends:
                raise NoSpace(f"{token} needs {size} bytes; what could go for it may still be read by the engine")
            passed_over.clear()
            unread_only = False
            await asyncio.sleep(LOOK_S)

    async def take_free(self, token: str, size: int) -> None:
        """Set room aside for what nobody has asked for: what is free below the mark from which on the disk is emptied, or taken by what was expected and did
        not come. Raises PrefetchGivenUp, DiskFailed.
        """
        index, settings = self._node.holdings.index, self._node.settings
        before = index.reserved_by(token)
        await self.measure()
        try:
            victims = index.reserve_free(token, size, self._node.clock(), int(settings.high_watermark * index.limit))
        except NoSpace as error:
            raise PrefetchGivenUp(error.message) from None
        stayed = [removal for removal in await self._remove_all(victims, "room") if removal.stays is not None]
        if stayed:
            index.give_back(token, before)
            if isinstance(stayed[0].error, DiskFailed):
                raise stayed[0].error
            raise PrefetchGivenUp(f"{token} needs {size} bytes; what could go for it may still be read by the engine")

    async def measure(self) -> None:
        """Let the index know what the file system has room for: others write there too, and it may be smaller than the budget."""
        index = self._node.holdings.index
        used = index.used_bytes
        with contextlib.suppress(NoSpace, DiskFailed):  # what cannot be written says so itself
            room = await self._node.disk.run(self._node.store.room, self._node.settings.free_share)
            index.disk_bytes = used + room

    async def notice_empty_queue(self) -> None:
        """See Rest."""
        if self._node.engine.exists:
            with contextlib.suppress(EngineUnreachable):
                await self._rest.notice_empty_queue()

    async def trim(self, limit: int) -> Stays | None:
        """Remove what may go, least recently used first, until at most `limit` bytes are used or reserved. Why some of it had to stay, if any had."""
        index = self._node.holdings.index
        passed_over: set[ArtifactId] = set()
        look: Look | None = None
        for _ in range(MAX_ROUNDS):
            while victims := index.surplus(limit, self._node.clock(), BATCH, passed_over):
                removals = [self._begin(id_, "watermark") for id_ in victims]
                look = await self._carry_out(removals, look)
                stayed = [removal for removal in removals if removal.stays is not None]
                passed_over.update(removal.id for removal in stayed)
                if worst := next((removal.stays for removal in stayed if removal.stays is not Stays.READ), None):
                    return worst
                if stayed:
                    break
            else:
                break
        return Stays.READ if passed_over else None

    async def prepare(self, count: int) -> Stays | None:
        """Unload the next `count` that would go (at most a batch), so that they can be deleted at once when room is needed. Why some had to stay as they
        are, if any had.
        """
        index = self._node.holdings.index
        next_to_go = index.next_to_go(min(count, BATCH), self._node.clock())
        known = [entry.id for entry in next_to_go if entry.state in (State.LOADED, State.UNLOADED) and index.leave(entry.id, self._node.clock())]
        removals = [self._begin(id_, "room", deletes=False) for id_ in known]
        await self._carry_out(removals)
        return next((removal.stays for removal in removals if removal.stays is not Stays.PREPARED), None)

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
        removal = self._enqueue(id_, cause, names)
        if removal is None:  # it ended between the choice and this
            return AdapterInUse("it stays") if id_ in self._node.holdings.index else None
        await removal.done.wait()
        return removal.error

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
        chosen = []
        for id_ in [only] if only else list(self._retired):
            if index.is_leaving(id_):
                continue
            if self._node.holdings.names_of(id_) or id_ not in index:
                self._retired.discard(id_)
            elif index.leave(id_, self._node.clock()):
                chosen.append(id_)
        for removal in await self._remove_all(chosen, "refreshed"):
            if removal.stays is None:
                self._retired.discard(removal.id)

    async def settle(self, id_: ArtifactId) -> None:
        """Let a removal of `id_` that is in progress end."""
        if self._node.holdings.index.is_leaving(id_):
            await self.remove(id_, "room")

    # -- the queue

    async def _remove_all(self, ids: Sequence[ArtifactId], cause: str) -> list[Removal]:
        """Remove what the index has chosen, and wait for all of it."""
        removals = [removal for id_ in ids if (removal := self._enqueue(id_, cause)) is not None]
        for removal in removals:
            await removal.done.wait()
        return removals

    def _enqueue(self, id_: ArtifactId, cause: str, names: Sequence[AdapterName] | None = None) -> Removal | None:
        """The removal of `id_` that is in progress, or a new one; None if it does not leave."""
        if (removal := self._removals.get(id_)) is not None:
            return removal
        if not self._node.holdings.index.is_leaving(id_):
            return None
        removal = self._begin(id_, cause, names)
        self._queue.append(removal)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="removals")
        return removal

    async def _work(self) -> None:
        while self._queue:
            await asyncio.sleep(0)  # those that are asked for in the same moment come along
            await self._carry_out([self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))])

    def _begin(self, id_: ArtifactId, cause: str, names: Sequence[AdapterName] | None = None, *, deletes: bool = True) -> Removal:
        all_names = self._node.holdings.names_of(id_)
        only = tuple(names) if names is not None else None
        removal = Removal(id_, cause, only if only is not None else all_names, only, deletes)
        removal.links = (*removal.names, *self._node.loads.links(id_, only))
        self._removals[id_] = removal
        return removal

    # -- one batch

    async def _carry_out(self, removals: Sequence[Removal], look: Look | None = None) -> Look | None:
        """Remove them as far as they can go; the last look at the engine. `look` is that of a batch before, from a moment ago."""
        try:
            look = await self._clear(removals, look)
            await asyncio.gather(*(self._delete(removal) for removal in removals if removal.stays is None))
            for removal in removals:
                if removal.stays is Stays.DISK:
                    await self._show_again(removal)
        except Exception as error:  # whatever it was: an entry that stayed "leaving" could neither be leased nor evicted any more
            unforeseen = not isinstance(error, LoraExtprocError | OSError)
            log.warning("%s and what was to go with it: %s", removals[0].title, error, exc_info=unforeseen)
            look = None
        finally:
            for removal in removals:
                self._end(removal)
        return look

    async def _clear(self, removals: Sequence[Removal], look: Look | None) -> Look | None:
        """Make certain that no engine can read the files any more: names are unloaded, links are gone. What has to stay says why.

        The order matters. While a link is there, a request that slips in between registers the name again, which the last look sees.
        Taking the link first would kill an engine that reads by it: a registered adapter that fell out of its slots is read again from the link.
        """
        if not self._node.engine.exists:
            await self._unlink(removals)
            return None
        index, loads = self._node.holdings.index, self._node.loads
        look = look or await self._rest.look()
        going: list[Removal] = []
        unloads: list[Coroutine[Any, Any, None]] = []
        at_once = asyncio.Semaphore(UNLOADS)
        for removal in removals:
            verdict = self._rest.judge(look, removal.id, removal.only)
            if loads.is_loading(removal.id) or verdict.standing is Standing.READ:
                removal.keep(Stays.READ)
                continue
            if verdict.standing is Standing.QUEUED:
                removal.keep(Stays.QUEUED)
                continue
            going.append(removal)
            if verdict.names and index.is_leased(removal.id, self._node.clock()):
                for name in removal.names:
                    self._node.changes.tell("evicted", name)  # before the engine forgets it: nobody else may be sent there
            unloads += [self._unload(removal, name, at_once) for name in sorted(verdict.names)]
        if unloads:
            await asyncio.gather(*unloads)
            if not self._node.engine.unload_waits:
                await asyncio.sleep(SETTLE_S)
            look = await self._rest.look(QUEUE_S)
            going = self._at_rest(going, look)
        for removal in [removal for removal in going if not removal.deletes]:
            loads.settled(removal.id)
            removal.is_settled = True
            removal.keep(Stays.PREPARED)
        going = [removal for removal in going if removal.deletes]
        return await self._unlink_and_look(going) if going else look

    async def _unload(self, removal: Removal, name: str, at_once: asyncio.Semaphore) -> None:
        async with at_once:
            if removal.stays is None:
                try:
                    await self._node.loads.unload(name, removal.id)
                except EngineUnreachable as error:
                    log.warning("%s stays: %s", removal.title, error)
                    removal.keep(Stays.UNKNOWN)

    async def _unlink_and_look(self, removals: Sequence[Removal]) -> Look:
        gone: list[Removal] = []
        try:
            await self._unlink(removals)
            look = await self._rest.look(QUEUE_S)
            gone = self._at_rest(removals, look)
        finally:
            for removal in removals:
                if removal not in gone:
                    await self._link_again(removal)
        for removal in gone:
            self._node.loads.forget(removal.links[len(removal.names) :])
            self._node.loads.settled(removal.id)
            removal.is_settled = True
        return look

    def _at_rest(self, removals: Sequence[Removal], look: Look) -> list[Removal]:
        """Those that nobody can read any more; the others stay."""
        free = []
        for removal in [removal for removal in removals if removal.stays is None]:
            standing = self._rest.judge(look, removal.id, removal.only).standing
            if standing is Standing.FREE:
                free.append(removal)
            else:
                removal.keep(_STAYS[standing])
        return free

    # -- on the disk

    async def _unlink(self, removals: Sequence[Removal]) -> None:
        async def unlink(removal: Removal) -> None:
            async with self._deleting:
                with self._kept_by_the_disk(removal):
                    for link in removal.links:
                        await self._node.disk.run(self._node.store.unlink, link, removal.id)

        await asyncio.gather(*(unlink(removal) for removal in removals))

    async def _link_again(self, removal: Removal) -> None:
        with self._kept_by_the_disk(removal):
            for name in removal.names:
                await self._node.disk.run(self._node.store.link, name, removal.id)
            for link in removal.links[len(removal.names) :]:
                await self._node.disk.run(self._node.store.link_version, link, removal.id)

    async def _delete(self, removal: Removal) -> None:
        """Nobody can read it: its files go, unless another name leads to them."""
        holdings = self._node.holdings
        content_goes = set(holdings.names_of(removal.id)) <= set(removal.names)
        if content_goes:
            async with self._deleting:
                with self._kept_by_the_disk(removal):
                    await self._node.disk.run(self._node.store.remove, removal.id)
            if removal.stays is not None:
                return
        for name in removal.names:
            holdings.drop(name)
            self._node.changes.tell("evicted", name)
        if content_goes:
            holdings.index.removed(removal.id)
        removal.is_gone = True
        log.info("evicted %s (%s)", removal.title, removal.cause)

    @contextlib.contextmanager
    def _kept_by_the_disk(self, removal: Removal) -> Iterator[None]:
        """What the disk will not let go stays; one that fails makes the node unready."""
        try:
            yield
        except (NoSpace, DiskFailed) as error:
            log.warning("%s stays: %s", removal.title, error.message)
            if isinstance(error, DiskFailed):
                self._node.readiness.set("disk", error.message)
            removal.keep(Stays.DISK, error if isinstance(error, DiskFailed) else None)

    async def _show_again(self, removal: Removal) -> None:
        """The content could not go. A name that cannot be linked is none."""
        for name in removal.names:
            if await self._node.disk.run(self._node.store.shows, name, removal.id):
                continue
            try:
                await self._node.disk.run(self._node.store.link, name, removal.id)
            except LoraExtprocError as error:
                log.warning("%s is gone from this node, though its files are not: %s", name, error.message)
                self._node.holdings.drop(name)
                self._node.changes.tell("evicted", name)

    def _end(self, removal: Removal) -> None:
        """Gone, or back in the state that it has reached."""
        index, loads, id_ = self._node.holdings.index, self._node.loads, removal.id
        if removal.stays is None and not removal.is_gone:  # something unforeseen came between
            removal.keep(Stays.UNKNOWN)
        state = State.LOADED if loads.names_of(id_) else State.UNLOADED if loads.unsettled(id_) else State.SETTLED if removal.is_settled else None
        index.kept(id_, state)
        index.named(id_, has_names=bool(self._node.holdings.names_of(id_)))
        if removal.deletes:
            self._node.metrics.evictions.labels(removal.cause, "removed" if removal.stays is None else "kept").inc()
        if self._removals.get(id_) is removal:
            del self._removals[id_]
        removal.done.set()


def _held(entry: Entry[ArtifactId], now: float) -> str:
    """Why it may not go."""
    if entry.flights:
        return "being staged or refreshed"
    if entry.pinned:
        return "pinned"
    if entry.reads:
        return "being sent to another node, or compared with its origin"
    if entry.leased_until <= now:
        return "kept until routers have said what they rely on: this stager has just been started"
    return f"leased for {entry.leased_until - now:.0f} s more"
