"""Whether anybody can still read an artifact's files through the engine, as one look at the engine shows for any number of artifacts.

A look is the list of names and then the requests. A request that comes after the list was made needs a name that the list has; one that came before is
in the figures. The figures name the adapters of requests that run. Of requests that wait they give only the number, so a waiting request may be
anybody's who could have sent one. A queue comes and goes: later figures tell the same of the requests that came before the list, so they may be asked
for again without the list, which has megabytes.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from ...core.artifact import VERSION_DIGITS, AdapterName, ArtifactId, digest_of, split_version
from ..books.holdings import Holdings
from ..disk.store import Store
from .api import Engine, Requests
from .listed import Known
from .names import Loads, leads_to

AGAIN_S = 0.1  # between two questions for the figures while requests wait


class Standing(Enum):
    """What stands between an artifact and its removal."""

    FREE = "free"  # nothing: no name in the engine leads to it, and no request of an earlier name can be left
    IDLE = "idle"  # its names in the engine, which nobody uses: once they are unloaded, it is free
    QUEUED = "queued"  # requests wait in the engine, and any of them may be of it
    READ = "read"  # a request of it runs, or somebody else has put a name into the engine that leads to it


@dataclass(frozen=True, slots=True)
class Look:
    """What the engine showed."""

    known: Known
    requests: Requests


@dataclass(frozen=True, slots=True)
class Verdict:
    """Where an artifact stands, and its names in the engine that are ours to unload."""

    standing: Standing
    names: frozenset[str] = frozenset()


class Rest:
    """Looks at the engine, and judges by a look."""

    def __init__(self, engine: Engine, loads: Loads, holdings: Holdings, store: Store) -> None:
        self._engine = engine
        self._loads = loads
        self._holdings = holdings
        self._store = store
        self._had_empty_queue = False  # since this process began: what an earlier one unloaded is not known

    async def look(self, patience_s: float = 0.0) -> Look:
        """While requests wait, their figures are asked for again for `patience_s`. Raises EngineUnreachable."""
        known, requests = await self._engine.known(), await self._engine.requests()
        patience_ends = asyncio.get_running_loop().time() + patience_s
        while requests.waiting and asyncio.get_running_loop().time() < patience_ends:
            await asyncio.sleep(AGAIN_S)
            requests = await self._engine.requests()
        self._had_empty_queue = self._had_empty_queue or not requests.waiting
        return Look(known, requests)

    async def notice_empty_queue(self) -> None:
        """Once since the start: from then on what was never loaded can go while requests wait. Raises EngineUnreachable."""
        if not self._had_empty_queue:
            self._had_empty_queue = not (await self._engine.requests()).waiting

    def judge(self, look: Look, id_: ArtifactId, only: Sequence[AdapterName] | None = None) -> Verdict:
        """Where `id_` stands; with `only`, as far as these of the adapters go whose names lead to it.

        Of content that no name leads to any more (a replaced version), an adapter's own name may have been the one: no request by such a name may run.
        """
        ours, others = self._readers(look.known, id_, only)
        if self._engine.loads:
            ours |= frozenset(self._loads.names_of(id_, only))  # one that was loaded after the look
        links = {*(self._holdings.names_of(id_) if only is None else only), *self._loads.links(id_, only)}
        unsettled, requests = self._loads.unsettled(id_), look.requests
        if others or requests.running & {*links, *unsettled, *ours} or digest_of(id_)[:VERSION_DIGITS] in requests.versions:
            return Verdict(Standing.READ, ours)
        if not links and requests.has_plain:
            return Verdict(Standing.READ, ours)
        may_wait = bool(ours or unsettled or not links or not self._had_empty_queue)
        if look.requests.waiting and may_wait:
            return Verdict(Standing.QUEUED, ours)
        return Verdict(Standing.IDLE if ours else Standing.FREE, ours)

    def _readers(self, known: Known, id_: ArtifactId, only: Sequence[AdapterName] | None) -> tuple[frozenset[str], bool]:
        """Names in the engine that lead to the artifact and are ours to unload; and whether there are any that somebody else has put there."""
        path = str(self._store.path(id_))
        own = self._holdings.names_of(id_) if only is None else only
        ends = {end.rpartition("/")[2] for end in (path, *own)}
        ours: set[str] = set()
        has_others = False
        for name in known.candidates(digest_of(id_)[:VERSION_DIGITS], ends, own):
            root, version = known.adapters[name], split_version(name)
            if version is not None:
                if (leads_to(name, id_) or root == path) and (only is None or version[0] in only):
                    ours.add(name)
            elif name in own or (self._loads.knows(name) and root == path):
                if only is None or name in only:
                    ours.add(name)
            elif root == path or any(root.endswith(f"/{other}") for other in own):
                has_others = True
        return frozenset(ours), has_others
