"""`DIR/.pins.json`: which adapters operators hold without an end, and with which weights. It outlives restarts, so a damaged one is never overwritten."""

import asyncio
import logging
import time

from ...core.artifact import AdapterName, adapter_name
from ...errors import InvalidRequest, LoraExtprocError, StartError
from ..books.holdings import Holdings
from ..threads import Threads
from .store import Store

log = logging.getLogger(__name__)

PINS_FILE = ".pins.json"


class Pins:
    """Pins in the file and in the holdings, the one as the other."""

    def __init__(self, store: Store, holdings: Holdings, disk: Threads) -> None:
        self._store = store
        self._holdings = holdings
        self._disk = disk
        self._writing = asyncio.Lock()  # else of two lists at once the older may be written last

    def open(self) -> None:
        """Take over what an earlier process has pinned. Blocks. Raises StartError where the file is there and cannot be read: all pins would be forgotten."""
        path = self._store.directory / PINS_FILE
        pins: dict[AdapterName, str] = {}
        try:
            read = self._store.read_json(PINS_FILE)
            if read is None:
                return
            if not isinstance(read, dict) or not all(isinstance(sha256, str) for sha256 in read.values()):
                raise ValueError("it is no list of names with digests")
            pins = {adapter_name(name): sha256 for name, sha256 in read.items()}
        except (ValueError, RecursionError, InvalidRequest) as error:
            aside = path.with_name(f"{PINS_FILE}.damaged-{time.time_ns()}")
            path.rename(aside)
            log.error("%s is damaged (%s): nothing is pinned; it is kept as %s", path, error, aside.name)
        except OSError as error:
            raise StartError(f"{path} cannot be read: {error.strerror}") from error
        for name, sha256 in pins.items():
            self._holdings.pin(name, sha256)

    async def pin(self, name: AdapterName, sha256: str) -> None:
        """Hold it. Raises NoSpace or DiskFailed, and then all is as before: a pin that would not survive is none."""
        before = self._holdings.pins.get(name)
        self._holdings.pin(name, sha256)
        try:
            await self._write()
        except LoraExtprocError:
            self._put(name, before)
            raise

    async def unpin(self, name: AdapterName) -> None:
        """Hold it no longer. Raises NoSpace or DiskFailed, and then it is held as before."""
        before = self._holdings.pins.get(name)
        if before is None:
            return
        self._holdings.unpin(name)
        try:
            await self._write()
        except LoraExtprocError:
            self._put(name, before)
            raise

    def _put(self, name: AdapterName, sha256: str | None) -> None:
        if sha256 is None:
            self._holdings.unpin(name)
        else:
            self._holdings.pin(name, sha256)

    async def _write(self) -> None:
        async with self._writing:
            await self._disk.run(self._store.write_json, PINS_FILE, dict(self._holdings.pins))
