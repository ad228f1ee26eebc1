"""Other nodes as an origin: who has this revision already, and its files, held to the digests that it states and to those of the real origin."""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ..client import Holding, StagerClient
from ..config import PeerSettings
from ..core.artifact import AdapterName
from ..core.breaker import Breaker
from ..core.maglev import key_hash
from ..errors import LoraExtprocError, ModelNotFound, OriginFailed, OriginRefused, Overloaded
from .listing import Listing, RemoteFile, wanted
from .sources import Source
from .transfer import Download

log = logging.getLogger(__name__)

LABEL = "peer"


@dataclass(frozen=True, slots=True)
class PeerCopy:
    """What one peer has, and through what it is read."""

    address: str
    source: Source
    listing: Listing
    origin: str  # where the peer's content came from at first


class PeerOrigin:
    """One peer, for one download after the other."""

    label = LABEL

    def __init__(self, client: StagerClient) -> None:
        self.client = client

    async def open(self) -> None:
        pass

    async def resolve(self, name: AdapterName) -> Listing | None:
        raise NotImplementedError("peers are asked all at once, by Peers.find")

    async def fetch(self, _listing: Listing, file: RemoteFile, download: Download) -> None:
        async def chunks() -> AsyncIterator[memoryview]:
            async for chunk in self.client.read(file.key, file.path, download.received):
                yield chunk

        try:
            await download.write(chunks())
        except LoraExtprocError as error:
            if isinstance(error, OriginFailed):
                raise
            kind = OriginRefused if isinstance(error, Overloaded | ModelNotFound) else OriginFailed  # another peer is asked rather than this one again
            raise kind(f"peer {self.client.address}: {error.message}") from error

    async def close(self) -> None:
        await self.client.close()


class Peers:
    """The other stagers. What goes wrong with one of them is nobody's error: the next or the origin is taken."""

    def __init__(self, settings: PeerSettings, clients: Mapping[str, StagerClient], instance: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._instance = instance
        self._sources = {address: _source(client) for address, client in clients.items()} if settings.mode != "off" else {}
        self._clients = dict(clients)
        self._clock = clock
        # One that is gone would cost every cold request the whole wait: after one failure it is not asked for a while.
        self._answering = {address: Breaker(threshold=1) for address in self._sources}

    @property
    def are_preferred(self) -> bool:
        """Whether they are asked before any origin."""
        return self._settings.mode == "preferred" and bool(self._sources)

    async def find(self, name: AdapterName, revision: str = "", besides: Collection[str] = ()) -> PeerCopy | None:
        """The first answer of a peer that has `name` in that revision ("": in any), but for those `besides`; None if none has."""
        now = self._clock()
        up = [address for address, breaker in self._answering.items() if address not in besides and breaker.allow(now)]
        asked = sorted(up, key=lambda address: key_hash(f"{address} {name}"))[: self._settings.max_asked]
        tasks = {asyncio.create_task(self._ask(address, name, revision)) for address in asked}
        try:
            for answer in asyncio.as_completed(tasks):
                found = await answer
                if found is not None:
                    return found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return None

    def was_of_no_use(self, copy: PeerCopy, error: LoraExtprocError) -> None:
        """What it offered could not be had, or was something else: others are asked for a while. One that is only busy is asked again."""
        if not isinstance(error, OriginRefused):
            self._answering[copy.address].failed(self._clock())

    async def close(self) -> None:
        for client in self._clients.values():
            await client.close()

    async def _ask(self, address: str, name: AdapterName, revision: str) -> PeerCopy | None:
        source = self._sources[address]
        try:
            async with asyncio.timeout(self._settings.ask_timeout_s):
                held = await self._clients[address].find(name, revision)
        except (LoraExtprocError, TimeoutError) as error:
            log.debug("peer %s: %s", address, error)
            self._answering[address].failed(self._clock())
            return None
        self._answering[address].succeeded()
        if held is None or held.instance == self._instance:
            return None
        paths = [file.path for file in held.files]
        if len(paths) != 2 or sorted(paths) != wanted(paths):  # they become names in our directory
            log.warning("peer %s offers what is no adapter under %s", address, name)
            return None
        return PeerCopy(address, source, _listing(name, held), held.origin)


def _source(client: StagerClient) -> Source:
    """Its own breaker stays closed: whether a peer is asked is decided before, and nobody waits for one."""
    source = Source(PeerOrigin(client))
    source.breaker.threshold = sys.maxsize
    return source


def _listing(name: AdapterName, held: Holding) -> Listing:
    files = tuple(RemoteFile(file.path, file.size, file.sha256, key=held.digest) for file in held.files)
    return Listing(name, held.revision, files)


def addresses(settings: PeerSettings, pools: Sequence[str], own: str) -> list[str]:
    """Whom to ask: those of the settings, else all stagers of the pools; without ourselves, as far as the address tells."""
    return sorted({address for address in settings.addresses or pools if address and address != own})
