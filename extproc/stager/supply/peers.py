"""Other nodes as an origin: who has this revision already, and its files, held to the digests that it states and to those of the real origin.

A peer may hang, and whoever asks it then loses time. So a question waits for those who are late only as long as those who answer make it likely that
they will; who does not answer in time is asked again in the background, and waited for no more until it has answered.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ...client import PeerArtifact, StagerClient
from ...config import PeerSettings
from ...core.artifact import AdapterName
from ...core.breaker import Breaker
from ...core.maglev import key_hash
from ...errors import LoraExtprocError, ModelNotFound, OriginFailed, OriginRefused, Overloaded
from ..adapter.files import wanted
from .download import Download
from .listing import Listing, RemoteFile
from .source import Supplier, is_worth_repeating

log = logging.getLogger(__name__)

LABEL = "peer"
SILENT_S = 1.0  # a read that brings nothing for so long is given up; with `stager.peers.ask_timeout_s` a peer that hangs costs a fetch two seconds
LATE_S = 0.25  # who has not answered somebody for so long is not asked by others beside
PATIENCE = 4  # when half of those who were asked have answered, the others have so many times as long
LEAST_PATIENCE_S = 0.1
FIRST_REST_S, LONGEST_REST_S = 5.0, 60.0  # of one whose copy was of no use: another try costs whoever makes it
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 5.0  # between two questions to one that did not answer; they cost nobody anything


class PeerOrigin:
    """One peer, for one download after the other. What it has is asked of all at once, by Peers.find."""

    label = LABEL

    def __init__(self, client: StagerClient) -> None:
        self.client = client

    async def open(self) -> None:
        pass

    async def fetch(self, _listing: Listing, file: RemoteFile, download: Download) -> None:
        await download.write(self._chunks(file, download.received))

    async def _chunks(self, file: RemoteFile, offset: int) -> AsyncIterator[memoryview]:
        try:
            async with contextlib.aclosing(self.client.read(file.key, file.path, offset)) as reading:
                while True:
                    async with asyncio.timeout(SILENT_S):
                        chunk = await anext(reading, None)
                    if chunk is None:
                        return
                    yield chunk
        except TimeoutError as error:
            raise OriginFailed(f"peer {self.client.address}: it sent nothing for {SILENT_S:g} s") from error
        except LoraExtprocError as error:
            if isinstance(error, OriginFailed):
                raise
            kind = OriginRefused if isinstance(error, Overloaded | ModelNotFound) else OriginFailed  # another peer is asked rather than this one again
            raise kind(f"peer {self.client.address}: {error.message}") from error

    async def close(self) -> None:
        await self.client.close()


@dataclass(frozen=True, slots=True)
class PeerCopy:
    """What one peer has, and through what it is read."""

    address: str
    source: Supplier[PeerOrigin]
    listing: Listing
    origin: str  # where the peer's content came from at first
    digest: str  # of that content


class Peers:
    """The other stagers. What goes wrong with one of them is nobody's error: the next or the origin is taken."""

    def __init__(self, settings: PeerSettings, clients: Mapping[str, StagerClient], instance: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._instance = instance
        self._sources = {address: _source(client) for address, client in clients.items()} if settings.mode != "off" else {}
        self._clients = dict(clients)
        self._clock = clock
        # One that is gone would cost every cold request the whole wait: after one failure it is not asked for a while.
        self._answering = {address: Breaker(threshold=1, first_s=FIRST_PAUSE_S, longest_s=LONGEST_PAUSE_S) for address in self._sources}
        self._useful = {address: Breaker(threshold=1, first_s=FIRST_REST_S, longest_s=LONGEST_REST_S) for address in self._sources}
        self._asked_at: dict[str, float] = {}  # peers that owe an answer -> since when
        self._late: set[asyncio.Task[PeerCopy | None]] = set()  # questions that nobody waits for any more; one per peer and LATE_S

    @property
    def are_preferred(self) -> bool:
        """Whether they are asked before any origin."""
        return self._settings.mode == "preferred" and bool(self._sources)

    async def find(
        self, name: AdapterName, revision: str = "", besides: Collection[str] = (), suits: Callable[[PeerCopy], bool] = lambda _: True
    ) -> PeerCopy | None:
        """The first answer of a peer that has `name` in that revision ("": in any), and a copy that `suits`, but for those `besides`; None if none has."""
        loop = asyncio.get_running_loop()
        began, now = loop.time(), self._clock()
        rested = [address for address, breaker in self._useful.items() if address not in besides and not breaker.wait_s(now)]
        up = [address for address in rested if began - self._asked_at.get(address, began) < LATE_S]
        asked = sorted(up, key=lambda address: key_hash(f"{address} {name}"))[: self._settings.max_asked]
        waited_for: set[asyncio.Task[PeerCopy | None]] = set()
        for address in asked:
            is_up = self._answering[address].state == "closed"
            if self._answering[address].allow(now):
                task = asyncio.create_task(self._ask(address, name, revision))
                (waited_for if is_up else self._late).add(task)
                task.add_done_callback(self._late.discard)
        pending, count = set(waited_for), len(waited_for)
        try:
            while pending:
                limit_s = max(LEAST_PATIENCE_S, PATIENCE * (loop.time() - began)) if 2 * len(pending) <= count else None
                done, pending = await asyncio.wait(pending, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (found := task.result()) is not None and suits(found) and self._useful[found.address].allow(self._clock()):
                        return found
                if not done:
                    self._late |= pending  # what they answer says whether they are asked the next time
                    return None
        finally:
            for task in pending - self._late:
                task.cancel()
            await asyncio.gather(*(pending - self._late), return_exceptions=True)
        return None

    def was_of_use(self, copy: PeerCopy) -> None:
        """What it offered is here, and right."""
        self._useful[copy.address].succeeded(self._clock())

    def was_of_no_use(self, copy: PeerCopy, error: LoraExtprocError) -> None:
        """What it offered could not be had, or was something else: others are asked for a while. One that is only busy is asked again."""
        if not isinstance(error, OriginRefused):
            self._useful[copy.address].not_reached(self._clock())

    async def close(self) -> None:
        for task in list(self._late):
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    async def _ask(self, address: str, name: AdapterName, revision: str) -> PeerCopy | None:
        source = self._sources[address]
        self._asked_at.setdefault(address, asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(self._settings.ask_timeout_s):
                held = await self._clients[address].find(name, revision)
        except (LoraExtprocError, TimeoutError) as error:
            log.debug("peer %s: %s", address, error)
            self._answering[address].not_reached(self._clock())
            return None
        finally:
            self._asked_at.pop(address, None)
        self._answering[address].succeeded(self._clock())
        if held is None or held.instance == self._instance:
            return None
        paths = [file.path for file in held.files]
        if len(paths) != 2 or sorted(paths) != wanted(paths):  # they become names in our directory
            log.warning("peer %s offers what is no adapter under %s", address, name)
            return None
        return PeerCopy(address, source, _listing(name, held), held.origin, held.digest)


def _source(client: StagerClient) -> Supplier[PeerOrigin]:
    """Its own breaker stays closed: whether a peer is asked is decided before, and nobody waits for one. One that falls silent is not asked again."""
    source = Supplier(PeerOrigin(client), repeats=lambda error: not isinstance(error.__cause__, TimeoutError) and is_worth_repeating(error))
    source.breaker.threshold, source.breaker.names = sys.maxsize, 0
    return source


def _listing(name: AdapterName, held: PeerArtifact) -> Listing:
    files = tuple(RemoteFile(file.path, file.size, file.sha256, key=held.digest) for file in held.files)
    return Listing(name, held.revision, files)


def addresses(settings: PeerSettings, pools: Sequence[str], own: str) -> list[str]:
    """Whom to ask: those of the settings, else all stagers of the pools; without ourselves, as far as the address tells."""
    return sorted({address for address in settings.addresses or pools if address and address != own})
