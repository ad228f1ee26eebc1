"""Connections to other stagers: opened when one is used, and closed when nobody uses it any more and its address is not kept.

A connection takes an open file and 25 KB here, and as much there, so of a thousand peers those are connected that were asked last. Nothing is closed
under a transfer: an address that is kept no longer, or one too many, is closed when its last user is done.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass

from ...client import StagerClient
from ...errors import StagerUnavailable, StartError

MAX_OPEN = 256  # but for those in use; eight adapters that ask 32 peers each, and a quarter of the files that a process may have open by default


@dataclass(slots=True)
class _Connection:
    client: StagerClient
    uses: int = 0


class Connections:
    """By address. `connect` makes the client of one."""

    def __init__(self, connect: Callable[[str], StagerClient]) -> None:
        self._connect = connect
        self._kept: Collection[str] = ()
        self._open: dict[str, _Connection] = {}  # those whose last use began first are first; MAX_OPEN, and those in use
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def to(self, address: str) -> AsyncIterator[StagerClient]:
        """The client of that address, which stays open meanwhile. Raises StagerUnavailable while the credentials cannot be read."""
        connection = self._open.pop(address, None) or _Connection(self._new(address))
        self._open[address] = connection
        connection.uses += 1
        try:
            yield connection.client
        finally:
            connection.uses -= 1
            self._close_unused(address)

    def keep(self, addresses: Collection[str]) -> None:
        """From now on these may stay open while nobody uses them, and no others."""
        self._kept = addresses
        for address in list(self._open):
            self._close_unused(address)

    async def close(self) -> None:
        """Nobody uses any."""
        for address in list(self._open):
            self._close(address)
        await asyncio.gather(*self._closing)

    def _new(self, address: str) -> StagerClient:
        try:
            return self._connect(address)
        except StartError as error:  # files that are being replaced just now
            raise StagerUnavailable(f"stager {address}: {error.message}") from error

    def _close_unused(self, address: str) -> None:
        """This one, if it is not kept; and the one that was not used for the longest time, if there is one too many."""
        if address not in self._kept and (one := self._open.get(address)) is not None and not one.uses:
            self._close(address)
        if len(self._open) > MAX_OPEN and (idle := next((other for other, one in self._open.items() if not one.uses), None)) is not None:
            self._close(idle)

    def _close(self, address: str) -> None:
        task = asyncio.create_task(self._open.pop(address).client.close(), name=f"close {address}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
