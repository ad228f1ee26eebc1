"""A gRPC channel to one stager that follows its credentials: a token that is replaced, certificates that are renewed, an authority that is withdrawn.

files change ──► new channel ── connected ──► new calls use it ──► the old one is closed when its last call has ended
                                 │
               an authority was withdrawn: at once, whether it connects or not
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio

from .config.credentials import RpcSettings
from .credentials import Identity, Tokens


class Line:
    """One channel, and how many calls are on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.calls = 0


class Channel:
    """Where calls to one stager go. The files are looked at when a call is made, at most every second. Raises StartError if they cannot be used at first."""

    def __init__(self, address: str, rpc: RpcSettings, options: Sequence[tuple[str, Any]], clock: Callable[[], float] = time.monotonic) -> None:
        self.tokens = Tokens(rpc, clock)
        self._identity = Identity(rpc, clock)
        self._address = address
        self._options = options
        self._line = self._open()
        self._coming: asyncio.Task[None] | None = None  # connects the next one
        self._closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def line(self) -> AsyncIterator[Line]:
        """The channel for one call, which stays as long as the call does."""
        self._look()
        line = self._line
        line.calls += 1
        try:
            yield line
        finally:
            line.calls -= 1
            self._close_unused(line)

    def is_current(self, line: Line) -> bool:
        """Whether a new call would go there, too; a stream that lasts moves over if not."""
        self._look()
        return line is self._line

    async def close(self) -> None:
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
        await self._line.channel.close(None)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _open(self) -> Line:
        return Line(self._identity.channel(self._address, self._options))

    def _look(self) -> None:
        change = self._identity.look()
        if change is None:
            return
        if self._coming is not None:
            self._coming.cancel()
        if change.withdraws:  # what nobody should trust any more may be just who answers on the old one
            self._replace(self._open())
        else:
            self._coming = asyncio.create_task(self._move(self._open()), name=f"new channel to {self._address}")

    async def _move(self, line: Line) -> None:
        """The other side may get its files later: the old channel serves until the new one is connected."""
        try:
            await line.channel.channel_ready()
        except BaseException:
            await line.channel.close(None)
            raise
        self._replace(line)

    def _replace(self, line: Line) -> None:
        old, self._line = self._line, line
        self._close_unused(old)

    def _close_unused(self, line: Line) -> None:
        if line is not self._line and not line.calls:
            task = asyncio.create_task(line.channel.close(None))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
