"""Artifacts that are counted as present and are not what was published: somebody removed or changed them, a file system lost them, another was mounted.

How it is noticed: a load into the engine fails, a peer cannot read, a warm request makes a look due, a start finds it, or the directory itself is
another one. A look reads no file whose stamp is that of the manifest.

| found | what follows |
| --- | --- |
| lost | The names are forgotten and told to routers as evicted, so that the next request fetches them again, and the engine is made to forget them. It dies of files that are missing when it reads a registered adapter again, so the sooner the better; what was fetched again until then lies under the same path, and stays registered. |
| touched, and the same when it is read | its new stamps are written to the manifest |
| touched, and not the same | It is removed like anything else that is damaged: not while the engine may be reading it. Until then no load reads it. |
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence

from ...core.artifact import VERSION_DIGITS, AdapterName, ArtifactId, digest_of, is_adopted, split_version
from ...errors import InvalidAdapter, LoraExtprocError
from ..books.holdings import Named
from ..disk.adopt import Adopter
from ..disk.recover import Condition, Found, Scan
from ..node import Node
from .audit import Auditor
from .evict import Remover

log = logging.getLogger(__name__)

LOOK_S = 60.0  # between two looks at an artifact that is asked for; a look costs a thread some 35 us
LOOKS_AT_ONCE = 64
MAX_LOOKED = 1024  # per LOOK_S, on behalf of requests: the others are looked at after that, or when something fails
MAX_WAITING = 4096  # artifacts whose look is due: what comes beyond is looked at when it is asked for again
MAX_READ_BACK = 10_000  # artifacts that were read from end to end because the engine refused them
IN_TRANSIT_S = 0.5  # what routers sent to the engine before they heard of the eviction has arrived by then
FIRST_LOOK_S = 10.0  # the start waits that long for what is read again; the rest is read while the node serves
SLICE = 500  # names between two turns of the event loop: about a millisecond


class Repair:
    """`look_soon` on the way of a request, `look` where something failed, `reconcile` after the directory was taken again."""

    def __init__(self, node: Node, remover: Remover, adopter: Adopter, auditor: Auditor) -> None:
        self._node = node
        self._remover = remover
        self._adopter = adopter
        self._auditor = auditor
        self._looked: set[ArtifactId] = set()  # since `_forget_at` was set; at most MAX_LOOKED
        self._forget_at = 0.0
        self._waiting: dict[ArtifactId, None] = {}  # at most MAX_WAITING
        self._read_back: set[ArtifactId] = set()  # at most MAX_READ_BACK
        self._looking: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._remains: dict[ArtifactId, tuple[AdapterName, ...]] = {}  # of what was forgotten -> its names, until they are removed; at most what was on disk
        self._clearing: asyncio.Task[None] | None = None
        self._lost: dict[ArtifactId, None] = {}  # until the engine was told; at most what was on disk
        self._telling: asyncio.Task[None] | None = None

    async def close(self) -> None:
        for task in (self._looking, self._reading, self._clearing, self._telling):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # -- noticed

    def look_soon(self, id_: ArtifactId, *, is_due: bool = False) -> None:
        """Look in the background whether it is still there, if the last look is LOOK_S ago or `is_due`."""
        if (now := self._node.clock()) >= self._forget_at:
            self._looked.clear()
            self._forget_at = now + LOOK_S
        if not is_due:
            if id_ in self._looked or len(self._looked) >= MAX_LOOKED:
                return
            self._looked.add(id_)
        if len(self._waiting) >= MAX_WAITING:
            return
        self._waiting[id_] = None
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_at_waiting(), name="looks")

    async def look(self, name: AdapterName, error: LoraExtprocError) -> bool:
        """The engine could not load it because of `error`; True if its files were the reason, and it is forgotten."""
        named = self._node.holdings.get(name)
        if named is None:
            return True
        try:
            if await self._look_at(named.id):
                return True
            if isinstance(error, InvalidAdapter) and not is_adopted(named.id) and named.id not in self._read_back:
                if len(self._read_back) >= MAX_READ_BACK:
                    self._read_back.clear()
                self._read_back.add(named.id)
                if why := await self._auditor.differs(name, named):
                    return await self._remove_damaged(named.id, why)
        except LoraExtprocError as failure:
            log.warning("%s: whether its files are there cannot be said: %s", name, failure.message)
        return False

    async def look_at_touched(self, ids: Sequence[ArtifactId]) -> None:
        """Read what a look through the directory found touched, one after the other; at most FIRST_LOOK_S of that are waited for."""
        if not ids:
            return
        log.info("%d artifacts are read again: somebody has touched them since they were published", len(ids))
        before = self._reading

        async def read() -> None:
            if before is not None:
                await asyncio.wait({before})
            for id_ in ids:
                with contextlib.suppress(LoraExtprocError):  # the disk's own check tells
                    await self._look_at(id_)

        self._reading = asyncio.create_task(read(), name="touched artifacts")
        await asyncio.wait({self._reading}, timeout=FIRST_LOOK_S)

    async def _look_at_waiting(self) -> None:
        while self._waiting:
            some = list(self._waiting)[:LOOKS_AT_ONCE]
            with contextlib.suppress(LoraExtprocError):
                ours = [id_ for id_ in some if not is_adopted(id_) and id_ in self._node.holdings.index]
                suspects = await self._node.disk.run(self._not_whole, ours)
                for id_ in [*suspects, *filter(is_adopted, some)]:
                    await self._look_at(id_)
            for id_ in some:
                del self._waiting[id_]

    def _not_whole(self, ids: list[ArtifactId]) -> list[ArtifactId]:
        return [id_ for id_ in ids if self._node.store.condition(id_) is not Condition.WHOLE]

    async def _look_at(self, id_: ArtifactId) -> bool:
        """True if one of ours was not what was published, and is gone. Of what others put here the adopter keeps the books itself. Raises DiskFailed."""
        if is_adopted(id_):
            for name in self._node.holdings.names_of(id_):
                if (known := self._node.holdings.get(name)) is not None:
                    with contextlib.suppress(InvalidAdapter):
                        await self._adopter.look_again(name, known)
            return False
        if self._node.holdings.index.is_leaving(id_):  # somebody else has found it a moment ago
            return await self._remover.remove(id_, "damaged") is None
        if id_ not in self._node.holdings.index:
            return False
        store, disk = self._node.store, self._node.disk
        found = await disk.run(store.condition, id_)
        if found is Condition.LOST:
            return self.forget(id_, "its files are not there any more")
        why = await disk.run(store.differs, id_) if found is Condition.TOUCHED else ""
        return bool(why) and await self._remove_damaged(id_, why)

    async def _remove_damaged(self, id_: ArtifactId, why: str) -> bool:
        """Let the next request fetch it again; False if it has to stay, since the engine may be reading it or a flight is at it."""
        index, names = self._node.holdings.index, ", ".join(self._node.holdings.names_of(id_)) or id_
        self._node.metrics.verify_failures.labels("disk").inc()
        log.error("%s: %s; it goes when no engine reads it, and is fetched again when it is asked for", names, why)
        self._node.loads.pardon(id_)
        if not index.leave(id_, self._node.clock(), force=True) and not index.is_leaving(id_):
            return False
        return await self._remover.remove(id_, "damaged") is None

    # -- forgotten

    def forget(self, id_: ArtifactId, why: str) -> bool:
        """Let nobody be sent to it, and remove what is left of it; False if it is being removed or exchanged at this moment."""
        names = self._drop(id_)
        if names is None:
            return False
        self._node.metrics.verify_failures.labels("disk").inc()
        log.error("%s: %s; it is fetched again when it is asked for", ", ".join(names) or id_, why)
        self._remains[id_] = names
        if self._clearing is None or self._clearing.done():
            self._clearing = asyncio.create_task(self._clear(), name="remains")
        return True

    def tell_engine(self, id_: ArtifactId) -> None:
        """Nothing leads to these files any more: the engine must not read them again."""
        self._node.loads.pardon(id_)
        if self._node.engine.exists:
            self._lost[id_] = None
            if self._telling is None or self._telling.done():
                self._telling = asyncio.create_task(self._tell_engine(), name="lost artifacts")

    def _drop(self, id_: ArtifactId) -> tuple[AdapterName, ...] | None:
        """Take it out of the books; the names that led to it."""
        holdings = self._node.holdings
        names = holdings.names_of(id_)
        if not holdings.index.leave(id_, self._node.clock(), force=True):
            return None
        for name in names:
            holdings.drop(name)
            self._node.changes.tell("evicted", name)
        holdings.index.removed(id_)
        self.tell_engine(id_)
        return names

    async def _clear(self) -> None:
        while self._remains:
            id_, names = self._remains.popitem()
            with contextlib.suppress(LoraExtprocError, OSError):  # then the next start does it
                await self._node.disk.run(self._node.store.discard_lost, id_)
                for name in names:
                    await self._node.disk.run(self._node.store.unlink_dangling, name)

    async def _tell_engine(self) -> None:
        """Unload what leads to lost files, many with one look at the engine's list."""
        store, index = self._node.store, self._node.holdings.index
        while self._lost:
            await asyncio.sleep(IN_TRANSIT_S)
            lost, self._lost = self._lost, {}
            by_digits: dict[str, list[ArtifactId]] = {}
            for id_ in lost:
                by_digits.setdefault(digest_of(id_)[:VERSION_DIGITS], []).append(id_)
            by_path = {str(store.path(id_)): [id_] for id_ in lost if not is_adopted(id_)}
            try:
                for name, root in (await self._node.engine.known()).adapters.items():
                    version = split_version(name)
                    for id_ in by_digits.get(version[1], ()) if version else by_path.get(root, ()):
                        if id_ not in index and root in (str(store.path(id_)), f"{store.directory}/{name}"):
                            await self._node.loads.unload(name, id_)
                            self._node.loads.settled(id_)
            except LoraExtprocError as error:
                log.warning("the engine may still know adapters whose files are gone: %s", error.message)

    # -- another directory

    async def reconcile(self, scan: Scan) -> None:
        """Bring the books in line with what the directory holds after it was taken again."""
        node, now = self._node, self._node.clock()
        holdings, index = node.holdings, node.holdings.index
        found, linked = {*scan.artifacts, *scan.unnamed}, dict(scan.named())
        lost = [entry.id for entry in index.entries() if not is_adopted(entry.id) and entry.id not in found]
        for number, id_ in enumerate(lost):
            self._drop(id_)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        for number, (name, one) in enumerate(scan.take()):
            if one.digest not in index:
                index.add(one.digest, one.disk_bytes, now)
            if holdings.get(name) is None:
                holdings.put(name, named_as(name, one))
                node.changes.tell("published", name)
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
        for id_, disk_bytes in scan.unnamed.items():
            if id_ not in index:
                index.add(id_, disk_bytes, now)
                self._remover.retire(id_)
        unlinked = [name for name in holdings if (named := holdings.get(name)) is not None and not is_adopted(named.id) and linked.get(name) != named.id]
        for name in unlinked:
            if (named := holdings.get(name)) is not None:
                await node.disk.run(node.store.link, name, named.id)
        log.warning("%s: %d artifacts are gone, %d names were linked again", node.store.directory, len(lost), len(unlinked))
        await self.look_at_touched(scan.touched)


def named_as(name: AdapterName, found: Found) -> Named:
    """What a look through the directory says of one name."""
    own = found.name == name  # another name's revision is not in the manifest
    return Named(found.digest, found.origin, found.revision if own else "", final=found.final and own)
