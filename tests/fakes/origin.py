# Files of a few kilobytes.
"""An origin in memory that fails, stalls and counts on cue."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from extproc.core.artifact import AdapterName
from extproc.errors import LoraExtprocError
from extproc.stager.supply.download import Download
from extproc.stager.supply.listing import Listing, RemoteFile
from extproc.stager.supply.origins.names import Names
from extproc.stager.threads import Threads

from .adapters import CONFIG, WEIGHTS, Files, small_files


class Stall:
    """A fetch that waits: `reached` is set when it does, `release` lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    def release(self) -> None:
        self.go_on.set()


class FakeOrigin:
    """`files` by adapter name. What is in `says` is stated of a file instead of the truth; the file comes as from a client that does not look."""

    def __init__(self, label: str = "fake") -> None:
        self.label = label
        self.files: dict[str, Files] = {}
        self.revisions: dict[str, str] = {}  # by adapter name; "1" where none is given
        self.final: set[str] = set()  # names whose revision can never change
        self.says: dict[tuple[str, str], RemoteFile] = {}
        self.resolve_failures: list[Exception] = []  # one per call, then it is well
        self.fetch_failures: list[Exception] = []
        self.down: LoraExtprocError | None = None  # every call fails
        self.stalls: dict[tuple[str, str], Stall] = {}
        self.resolved: Counter[str] = Counter()
        self.fetched: Counter[tuple[str, str]] = Counter()
        self.closed = False

    def add(self, name: str, files: Files) -> None:
        self.files[name] = files

    def state(self, name: str, path: str, *, size: int | None = None, sha256: str | None = None) -> None:
        """State this of a file."""
        self.says[name, path] = RemoteFile(path, size, sha256)

    def stall(self, name: str, path: str) -> Stall:
        """Let fetches of this file wait."""
        self.stalls[name, path] = Stall()
        return self.stalls[name, path]

    async def open(self) -> None:
        pass

    async def resolve(self, name: AdapterName) -> Listing | None:
        self.resolved[name] += 1
        if self.down is not None:
            raise self.down
        if self.resolve_failures:
            raise self.resolve_failures.pop(0)
        if name not in self.files:
            return None
        files = tuple(self.says.get((name, path)) or RemoteFile(path, len(data)) for path, data in self.files[name].items())
        return Listing(name, self.revisions.get(name, "1"), files, final=name in self.final)

    async def fetch(self, listing: Listing, file: RemoteFile, download: Download) -> None:
        self.fetched[listing.name, file.path] += 1
        if self.down is not None:
            raise self.down
        if self.fetch_failures:
            raise self.fetch_failures.pop(0)
        data = self.files[listing.name][file.path]
        if (listing.name, file.path) in self.says:
            theirs = download.target.with_name(".theirs")
            await asyncio.to_thread(theirs.write_bytes, data)
            await download.take(theirs)
            return
        if stall := self.stalls.get((listing.name, file.path)):
            half = len(data) // 2
            await download.write(_once(data[:half]), download.received, half)
            stall.reached.set()
            await stall.go_on.wait()
        await download.write(_once(data[download.received :]))

    async def close(self) -> None:
        self.closed = True


def origin_of(*names: str) -> FakeOrigin:
    """It has a small adapter of its own for each of the names."""
    origin = FakeOrigin()
    for seed, name in enumerate(names):
        origin.add(name, small_files(seed=seed))
    return origin


class ListableOrigin(FakeOrigin):
    """Tells `names`, or fails with `failure`, once `gate` is open."""

    def __init__(self, label: str = "fake", names: Sequence[str] = ()) -> None:
        super().__init__(label)
        self.names = list(names)
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.listings = 0

    async def list_all(self, found: Names, _threads: Threads) -> None:
        self.listings += 1
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        for name in self.names:
            for file in (CONFIG, WEIGHTS):
                found.add(f"{name}/{file}")


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
