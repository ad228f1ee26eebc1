"""A TCP port in front of another that breaks on cue, as a network between two machines does."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class Relay:
    """`cut` breaks every connection and lets no new one through until `mend`. `freeze` lets nothing pass and breaks nothing, until `thaw`: of all
    connections, or of those on which the bytes of `mark` have come. Where `piece_bytes` is set, so many pass at a time, a thousand times a second. `port` is
    where it leads, and may change; `listen` is its own, 0 any that is free, on `host`."""

    def __init__(self, port: int, mark: bytes = b"", listen: int = 0, host: str = "127.0.0.1") -> None:
        self.port = port
        self.piece_bytes = 0
        self._listen = listen
        self._host = host
        self._mark = mark
        self._flows = asyncio.Event()
        self._flows.set()
        self._flows_back = asyncio.Event()
        self._flows_back.set()
        self.address = ""
        self._is_cut = False
        self._open: set[asyncio.WriteTransport] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._relay, self._host, self._listen)
        self.address = f"{self._host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cut()
        self.thaw()
        assert self._server is not None
        self._server.close()
        await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        self._is_cut = True
        for transport in self._open:
            transport.abort()

    def mend(self) -> None:
        self._is_cut = False

    def freeze(self, *, back: bool = True) -> None:
        """`back`: what servers send, too."""
        self._flows.clear()
        if back:
            self._flows_back.clear()

    def thaw(self) -> None:
        self._flows.set()
        self._flows_back.set()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError):
                if not self._is_cut:
                    await self._join(reader, writer)
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection("127.0.0.1", self.port)
        both = {writer.transport, back.transport}
        self._open |= both
        marked = asyncio.Event()
        pumps = [asyncio.create_task(self._pump(reader, back, marked, self._flows)), asyncio.create_task(self._pump(onward, writer, marked, self._flows_back))]
        try:
            if self._is_cut:  # while it was being opened
                return
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open -= both
            for transport in both:
                transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, marked: asyncio.Event, flows: asyncio.Event) -> None:
        while data := await reader.read(self.piece_bytes or 2**16):
            if self.piece_bytes:
                await asyncio.sleep(0.001)
            if self._mark in data:
                marked.set()
            if marked.is_set():
                await flows.wait()
            writer.write(data)
            await writer.drain()
