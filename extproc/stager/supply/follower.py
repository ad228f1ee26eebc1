"""Weights are searched for infinities and NaNs while they arrive, beside the transfer, so that little is left to search when it is over.

This is a head start and no verdict. What the search finds or cannot read, the check of the whole file (adapter/check) finds again and refuses, after the
digest was compared: bytes that came damaged are the transfer's fault, not the adapter's.
"""

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Self

from ...errors import InvalidAdapter
from ..adapter.finite import BLOCK_BYTES, BLOCKS_PER_STEP, Scan
from ..threads import Steps, Threads

LEAST_BYTES = BLOCK_BYTES * BLOCKS_PER_STEP  # a step of the search, so that handing it to a thread costs little beside it


class Follower:
    """Follows one transfer. Nothing happens before `begin`. One search at a time; leaving the context ends it."""

    def __init__(self, path: Path, threads: Threads) -> None:
        self._path = path
        self._threads = threads
        self._scan: Scan | None = None
        self._searching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._stop()

    def begin(self, scan: Scan | None) -> None:
        """Search as `scan` says, from now on; None: not at all."""
        self._scan = scan

    def arrived(self, end: int) -> None:
        """The file is on disk up to byte `end`, without a gap."""
        is_busy = self._searching is not None and not self._searching.done()
        if self._scan is not None and not is_busy and end - self._scan.reached >= LEAST_BYTES:
            self._searching = asyncio.create_task(self._search(self._scan, end))

    async def restart(self) -> None:
        """What has arrived does not count any more: the file will be written again."""
        await self._stop()
        self._scan = self._scan and self._scan.anew()

    async def end(self) -> Scan | None:
        """Wait for the search that is going on; how far all is well. None: nothing is known, or something was found."""
        if self._searching is not None:
            await self._searching
        return self._scan

    async def _search(self, scan: Scan, end: int) -> None:
        def steps() -> Steps[int]:
            with self._path.open("rb") as file:
                return (yield from scan.advance(file, end))

        try:
            is_well = await self._threads.walk(steps()) < 0
        except (InvalidAdapter, OSError):
            is_well = False
        if not is_well:
            self._scan = None

    async def _stop(self) -> None:
        if self._searching is not None:
            self._searching.cancel()
            await asyncio.gather(self._searching, return_exceptions=True)
