"""A listener without a port: connections that somebody else has accepted, and those whose clients are asked to go elsewhere."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import pytest

from extproc.config.credentials import TlsSettings
from extproc.router.http2 import frames
from extproc.router.tls import Certificate
from extproc.router.transport import BUSY_CALLS, Listener

from .test_http2 import ECHO, HOLD, METHODS, Wire, until


class Elsewhere:
    """Accepts, and has `listener` take each connection."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self._port = socket.create_server(("127.0.0.1", 0))

    async def connect(self, tls: ssl.SSLContext | None = None) -> tuple[Wire, asyncio.StreamWriter]:
        """A client that has said its preface."""
        ours = socket.create_connection(self._port.getsockname())
        self.listener.take(self._port.accept()[0])
        reader, writer = await asyncio.open_connection(sock=ours, ssl=tls, server_hostname="" if tls else None)
        writer.write(frames.PREFACE)
        return Wire(reader, writer).frame(frames.SETTINGS, 0, 0), writer

    def close(self) -> None:
        self._port.close()


@contextlib.asynccontextmanager
async def elsewhere(tls: ssl.SSLContext | None = None) -> AsyncIterator[Elsewhere]:
    listener = Listener(None, METHODS, 1000, tls)
    await listener.start()
    with contextlib.closing(Elsewhere(listener)) as accepting:
        try:
            yield accepting
        finally:
            await listener.stop(0)


@pytest.mark.parametrize("encrypted", [False, True])
async def test_a_connection_that_was_accepted_elsewhere_is_served(encrypted: bool) -> None:
    """In plain text, and with the handshake here."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    async with elsewhere(Certificate(TlsSettings(mode="self-signed")).context if encrypted else None) as accepting:
        wire, writer = await accepting.connect(context if encrypted else None)
        await wire.ping()
        assert accepting.listener.count() == (1, 0)
        writer.close()
        await until(lambda: accepting.listener.count() == (0, 0))


async def test_a_client_that_breaks_off_its_handshake_leaves_nothing() -> None:
    """Nor is it an error that anybody hears of."""
    async with elsewhere(Certificate(TlsSettings(mode="self-signed")).context) as accepting:
        _, writer = await accepting.connect()  # speaks plain text
        await writer.drain()
        await until(lambda: not accepting.listener._greeting)
        assert accepting.listener.count() == (0, 0)
        writer.close()


async def test_a_busy_client_is_asked_to_go_elsewhere_and_its_calls_go_on() -> None:
    """Only one that opens calls; it is counted no more, and its connection ends with its last call."""
    async with elsewhere() as accepting:
        listener = accepting.listener
        idle, idle_writer = await accepting.connect()
        busy, writer = await accepting.connect()
        for number in range(BUSY_CALLS + 1):
            busy.open(1 + 2 * number, ECHO)
        busy.open(1 + 2 * (BUSY_CALLS + 1), HOLD)
        await idle.ping()
        await busy.ping()
        assert listener.count() == (2, 1)
        listener.give_one_away()
        assert int.from_bytes((await busy.until(frames.GOAWAY, 0))[:4], "big") == 2**31 - 1  # nothing on its way is refused
        assert listener.count() == (1, 0)
        writer.close()
        await until(lambda: len(listener._connections) == 1)
        listener.give_one_away()
        await idle.ping()  # with no other answer: nobody asked it to go
        idle_writer.close()
