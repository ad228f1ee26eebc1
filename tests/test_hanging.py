"""What listens at a stager's address and never answers: the client notices, by its Watch, whatever the other side does instead."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from extproc.client import StagerClient
from extproc.errors import StagerUnavailable
from extproc.heartbeat import Silent

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
ACKNOWLEDGED = b"\x00\x00\x00\x04\x01\x00\x00\x00\x00"


async def mute(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    """Takes everything, says nothing."""
    while await reader.read(65536):
        pass


async def polite(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Speaks HTTP/2 and answers pings, as a proxy does, or the C core of a process whose event loop hangs; never a request."""
    await reader.readexactly(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
    writer.write(SETTINGS)
    while True:
        head = await reader.readexactly(9)
        payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
        kind, flags = head[3], head[4]
        if kind == 4 and not flags & 1:
            writer.write(ACKNOWLEDGED)
        elif kind == 6 and not flags & 1:
            writer.write(b"\x00\x00\x08\x06\x01\x00\x00\x00\x00" + payload)


async def garbage(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Is no HTTP/2 at all."""
    writer.write(b"220 mail.example ESMTP\r\n" * 10)
    await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(task := asyncio.current_task())  # type: ignore[arg-type]
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            await handler(reader, writer)
        writer.close()
        tasks.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()


async def watched(client: StagerClient, into: list[object]) -> None:
    async for event in client.watch(0.2):
        into.append(event)  # noqa: PERF401  # what came before the error counts


@pytest.mark.parametrize("handler", [mute, polite, garbage])
async def test_a_watch_of_what_never_answers_ends(handler: Handler) -> None:
    """Silence is told, where it lasts; the end is an unavailable stager in any case."""
    async with serving(handler) as address, StagerClient(address) as client:
        seen: list[object] = []
        with pytest.raises(StagerUnavailable):
            await watched(client, seen)
        assert [type(event) for event in seen] in ([Silent], []) if handler is not polite else [Silent]


async def test_a_call_that_is_never_answered_can_be_given_up() -> None:
    """By whoever makes it: the call has no bound of its own, since a fetch may take as long as it takes."""
    async with serving(polite) as address, StagerClient(address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.ensure("acme/a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.ensure("acme/a", on_progress=print)


async def test_a_call_to_a_process_that_answers_no_ping_ends() -> None:
    """By the keepalive: TCP alone would wait for ever, since the kernel acknowledges what a stopped process never reads."""

    async def stops(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(24)
        writer.write(SETTINGS + ACKNOWLEDGED)
        await asyncio.Event().wait()

    async with serving(stops) as address, StagerClient(address) as client:
        with pytest.raises(StagerUnavailable):
            await client.ensure("acme/a")
