"""Other nodes as an origin: who has this revision already, and its files, held to the digests that it states and to those of the real origin.

A peer may hang, and whoever asks it then loses time. So a question waits for those who are late only as long as those who answer make it likely that
they will; who does not answer in time is asked again in the background, and waited for no more until it has answered.

Peers come and go (roster.py). One that goes is asked no more, and what it sends goes on: a transfer ends, or breaks off and is taken up by the origin.
"""

import asyncio
import contextlib
import heapq
import logging
import sys
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from ...client import PeerArtifact, StagerClient
from ...config.stager import PeerSettings
from ...core.artifact import AdapterName
from ...core.breaker import Breaker
from ...core.maglev import key_hash
from ...errors import LoraExtprocError, ModelNotFound, OriginFailed, OriginRefused, Overloaded
from ..adapter.files import wanted
from .connections import Connections
from .download import Download
from .listing import Listing, RemoteFile
from .places import Places
from .source import Supplier, is_worth_repeating

log = logging.getLogger(__name__)

LABEL = "peer"
MAX_PEERS = 4096  # to learn of so many at once stops the event loop for 8 ms, and to choose among them those that are asked for 1.5 ms
SILENT_S = 1.0  # a read that brings nothing for so long is given up; with `stager.peers.ask_timeout_s` a peer that hangs costs a fetch two seconds
LATE_S = 0.25  # who has not answered somebody for so long is not asked by others beside
PATIENCE = 4  # when half of those who were asked have answered, the others have so many times as long
LEAST_PATIENCE_S = 0.1
FIRST_REST_S, LONGEST_REST_S = 5.0, 60.0  # of one whose copy was of no use: another try costs whoever makes it
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 5.0  # between two questions to one that did not answer; they cost nobody anything


class PeerOrigin:
    """One peer, for one download after the other. What it has is asked of all at once, by Peers.find."""

    label = LABEL

    def __init__(self, address: str, connections: Connections) -> None:
        self._address = address
        self._connections = connections

    async def open(self) -> None:
        pass

    async def fetch(self, _listing: Listing, file: RemoteFile, download: Download) -> None:
        async with contextlib.aclosing(self._chunks(file, download.received)) as chunks:
            await download.write(chunks)

    async def _chunks(self, file: RemoteFile, offset: int) -> AsyncGenerator[memoryview, None]:
        try:
            async with self._connections.to(self._address) as client, contextlib.aclosing(client.read(file.key, file.path, offset)) as reading:
                while True:
                    async with asyncio.timeout(SILENT_S):
                        chunk = await anext(reading, None)
                    if chunk is None:
                        return
                    yield chunk
        except TimeoutError as error:
            raise OriginFailed(f"peer {self._address}: it sent nothing for {SILENT_S:g} s") from error
        except LoraExtprocError as error:
            if isinstance(error, OriginFailed):
                raise
            kind = OriginRefused if isinstance(error, Overloaded | ModelNotFound) else OriginFailed  # another peer is asked rather than this one again
            raise kind(f"peer {self._address}: {error.message}") from error

    async def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class PeerCopy:
    """What one peer has, and through what it is read."""

    address: str
    source: Supplier[PeerOrigin]
    listing: Listing
    origin: str  # where the peer's content came from at first
    digest: str  # of that content


class _Peer:
    """What this stager has learnt of another one."""

    def __init__(self, address: str, connections: Connections) -> None:
        self.address = address
        # One that is gone would cost every cold request the whole wait: after one failure it is not asked for a while.
        self.answering = Breaker(threshold=1, first_s=FIRST_PAUSE_S, longest_s=LONGEST_PAUSE_S)
        self.useful = Breaker(threshold=1, first_s=FIRST_REST_S, longest_s=LONGEST_REST_S)
        self.asked_at: float | None = None  # since when it owes an answer
        self._connections = connections

    @cached_property
    def source(self) -> Supplier[PeerOrigin]:
        """Its own breaker stays closed: whether a peer is asked is decided before, and nobody waits for one. One that falls silent is not asked again."""
        origin = PeerOrigin(self.address, self._connections)
        source = Supplier(origin, repeats=lambda error: not isinstance(error.__cause__, TimeoutError) and is_worth_repeating(error))
        source.breaker.threshold, source.breaker.names = sys.maxsize, 0
        return source


class Peers:
    """The other stagers. What goes wrong with one of them is nobody's error: the next or the origin is taken."""

    def __init__(self, settings: PeerSettings, connect: Callable[[str], StagerClient], instance: str, clock: Callable[[], float] = time.monotonic) -> None:
        """`connect` makes the client of one; `instance` is this stager's own. Nobody is known before `follow`."""
        self._settings = settings
        self._instance = instance
        self._connections = Connections(connect)
        self._clock = clock
        self._peers: dict[str, _Peer] = {}  # by address; at most MAX_PEERS
        self._places: Places | None = None  # None: all are asked, or nothing says who has what
        self._late: set[asyncio.Task[PeerCopy | None]] = set()  # questions that nobody waits for any more; one per peer and LATE_S
        self.selves: set[str] = set()  # addresses that turned out to lead back here, of those that were followed last
        self.on_self: Callable[[], None] | None = None  # told of another one of those

    @property
    def count(self) -> int:
        """How many are known."""
        return len(self._peers)

    @property
    def are_preferred(self) -> bool:
        """Whether they are asked before any origin."""
        return self._settings.mode == "preferred" and bool(self._peers)

    def follow(self, addresses: Iterable[str], places: Places | None = None) -> None:
        """These are the other stagers now, and where adapters belong among them. Of those that stay, what was learnt of them is kept; of too many, those
        whose addresses come first count.
        """
        self._places = places
        shown = set(addresses) if self._settings.mode != "off" else set()
        self.selves &= shown
        if len(others := sorted(shown - self.selves)) > MAX_PEERS > len(self._peers):
            log.warning("there are %d other stagers, and the first %d by address are asked: the copies of the rest are not used", len(others), MAX_PEERS)
        self._peers = {address: self._peers.get(address) or _Peer(address, self._connections) for address in others[:MAX_PEERS]}
        self._connections.keep(self._peers.keys())

    async def find(
        self, name: AdapterName, revision: str = "", besides: Collection[str] = (), suits: Callable[[PeerCopy], bool] = lambda _: True
    ) -> PeerCopy | None:
        """The first answer of a peer that has `name` in that revision ("": in any), and a copy that `suits`, but for those `besides`; None if none has."""
        loop = asyncio.get_running_loop()
        began, now = loop.time(), self._clock()
        rested = (peer for peer in self._peers.values() if peer.address not in besides and not peer.useful.wait_s(now))
        up = {peer.address: peer for peer in rested if peer.asked_at is None or began - peer.asked_at < LATE_S}
        waited_for: dict[asyncio.Task[PeerCopy | None], _Peer] = {}
        for peer in self._chosen(name, up):
            is_up = peer.answering.state == "closed"
            if peer.answering.allow(now):
                task = asyncio.create_task(self._ask(peer, name, revision))
                if is_up:
                    waited_for[task] = peer
                else:
                    self._late.add(task)
                task.add_done_callback(self._late.discard)
        pending = set(waited_for)
        try:
            while pending:
                limit_s = max(LEAST_PATIENCE_S, PATIENCE * (loop.time() - began)) if 2 * len(pending) <= len(waited_for) else None
                done, pending = await asyncio.wait(pending, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (found := task.result()) is not None and suits(found) and waited_for[task].useful.allow(self._clock()):
                        return found
                if not done:
                    self._late |= pending  # what they answer says whether they are asked the next time
                    return None
        finally:
            for task in pending - self._late:
                task.cancel()
            await asyncio.gather(*(pending - self._late), return_exceptions=True)
        return None

    def _chosen(self, name: AdapterName, up: dict[str, _Peer]) -> list[_Peer]:
        """At most `max_asked`: those where the adapter belongs, then others in an order of the adapter's own, so that no peer is asked for all of them."""
        placed = self._places.of(name) if self._places is not None else ()
        first = [up.pop(address) for address in placed if address in up][: self._settings.max_asked]
        return first + heapq.nsmallest(self._settings.max_asked - len(first), up.values(), key=lambda peer: key_hash(f"{peer.address} {name}"))

    def was_of_use(self, copy: PeerCopy) -> None:
        """What it offered is here, and right."""
        if (peer := self._peers.get(copy.address)) is not None:  # else it has gone meanwhile
            peer.useful.succeeded(self._clock())

    def was_of_no_use(self, copy: PeerCopy, error: LoraExtprocError) -> None:
        """What it offered could not be had, or was something else: others are asked for a while. One that is only busy is asked again."""
        if not isinstance(error, OriginRefused) and (peer := self._peers.get(copy.address)) is not None:
            peer.useful.not_reached(self._clock())

    async def close(self) -> None:
        for task in list(self._late):
            task.cancel()
        await asyncio.gather(*self._late, return_exceptions=True)
        await self._connections.close()

    async def _ask(self, peer: _Peer, name: AdapterName, revision: str) -> PeerCopy | None:
        if peer.asked_at is None:
            peer.asked_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._settings.ask_timeout_s), self._connections.to(peer.address) as client:
                held = await client.find(name, revision, self._instance)
        except (LoraExtprocError, TimeoutError) as error:
            log.debug("peer %s: %s", peer.address, error)
            peer.answering.not_reached(self._clock())
            return None
        finally:
            peer.asked_at = None
        peer.answering.succeeded(self._clock())
        if held is None:
            return None
        if held.instance == self._instance:
            self._is_self(peer.address)
            return None
        paths = [file.path for file in held.files]
        if len(paths) != 2 or sorted(paths) != wanted(paths):  # they become names in our directory
            log.warning("peer %s offers what is no adapter under %s", peer.address, name)
            return None
        return PeerCopy(peer.address, peer.source, _listing(name, held), held.origin, held.digest)

    def _is_self(self, address: str) -> None:
        """The address leads back here: it is asked no more, and says which pool is this stager's own."""
        if self._peers.pop(address, None) is not None:
            self.selves.add(address)
            self._connections.keep(self._peers.keys())
            if self.on_self is not None:
                self.on_self()


def _listing(name: AdapterName, held: PeerArtifact) -> Listing:
    files = tuple(RemoteFile(file.path, file.size, file.sha256, key=held.digest) for file in held.files)
    return Listing(name, held.revision, files)
