"""A port that serves gRPC calls over `http2.Connection`: how it listens, changes its certificate, and drains.

A worker of a router has no port of its own: its parent accepts, and the worker takes each connection from it.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

from ..process.sockets import LISTEN_BACKLOG, listen
from .http2.calls import Methods
from .http2.connection import MAX_MESSAGE_BYTES, READ_BYTES, Connection
from .http2.patience import TICK_S

CLOSE_S = 1.0  # for what was answered last to be sent, before connections are cut
CALLS_PER_TURN = 50  # that are told to answer now, before the loop gets its turn
BUSY_CALLS = 10  # that a connection opened since the last look, a second ago: more than health checks ask, and a thousandth of a core


class Listener:
    """Bound when made; serves from `start` to `stop`. `max_message_bytes` is of one gRPC message; a longer one ends its call with RESOURCE_EXHAUSTED.

    Without an address it accepts nothing by itself, and serves what `take` is given.
    """

    def __init__(
        self, address: str | None, methods: Methods, max_streams: int, tls: ssl.SSLContext | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        self._socket = None if address is None else listen(address)
        self._methods = methods
        self._max_streams = max_streams
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._greeting: set[asyncio.Task[None]] = set()  # those in their TLS handshake, which asyncio ends after a minute
        self._connections: set[Connection] = set()
        self._busy: set[Connection] = set()  # of those, as they were counted last
        self._leaving: set[Connection] = set()  # of those, that were given away
        self._changed = asyncio.Event()  # a connection has gone, or has no call any more
        self._reads = bytearray(READ_BYTES)  # of all connections: each read is dealt with before the next
        self._clock: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def address(self) -> str:
        """host:port as it was bound: with port 0, the one that was given."""
        assert self._socket is not None, "only what is bound has an address"
        host, port, *_ = self._socket.getsockname()
        return f"{host}:{port}"

    async def start(self) -> None:
        """Accept connections."""
        if self._socket is not None:
            self._server = await self._serve(self._socket)
        self._tick()

    def take(self, accepted: socket.socket) -> None:
        """Serve a connection that somebody else has accepted."""
        greeting = asyncio.create_task(self._greet(accepted), name="greeting")
        self._greeting.add(greeting)
        greeting.add_done_callback(self._greeting.discard)

    def count(self) -> tuple[int, int]:
        """Connections, and how many of them carry requests: those that have opened over BUSY_CALLS calls since this was asked last."""
        staying = self._connections - self._leaving
        self._busy = {connection for connection in staying if connection.count_opened() > BUSY_CALLS}
        return len(staying), len(self._busy)

    def give_one_away(self) -> None:
        """Have a client open its next calls on a new connection, which may come to somebody who has less to do. No call ends because of it."""
        if self._busy:
            connection = self._busy.pop()
            self._leaving.add(connection)
            connection.go_away()

    async def use(self, tls: ssl.SSLContext) -> None:
        """Greet new connections with another context from now on. Those that are open, or in their handshake, go on as they are.

        Both contexts accept from one queue for a moment, so no connection falls between them.
        """
        self._tls = tls
        if self._socket is not None and self._server is not None and not self._stopping:
            before, self._server = self._server, await self._serve(self._socket)
            before.close()

    async def stop(self, drain_s: float) -> None:
        """Take no new connections and streams, let those that run finish for `drain_s` seconds, have the rest answer, then close."""
        self._stopping = True
        if self._socket is not None:
            self._socket.close()
        if self._clock is None:
            return
        if self._server is not None:
            self._server.close()
        for connection in tuple(self._connections):
            connection.go_away()
        await self._until(lambda: all(connection.is_drained for connection in self._connections), drain_s)
        await self._answer_all()
        await self._until(lambda: all(connection.is_idle for connection in self._connections), CLOSE_S)
        for connection in tuple(self._connections):
            connection.close()
        await self._until(lambda: not self._connections, CLOSE_S)
        for connection in tuple(self._connections):
            connection.abort()
        for greeting in tuple(self._greeting):
            greeting.cancel()
        self._clock.cancel()

    async def _serve(self, listening: socket.socket) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(self._connection, sock=listening.dup(), ssl=self._tls, backlog=LISTEN_BACKLOG)

    async def _greet(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has gone, or shows no certificate that is trusted: ssl.SSLError is one
            await asyncio.get_running_loop().connect_accepted_socket(self._connection, accepted, ssl=self._tls)

    async def _answer_all(self) -> None:
        """Tell each call that is still open to answer now. There may be ten thousand."""
        for connection in tuple(self._connections):
            for number, stream in enumerate(connection.open_calls(), 1):
                connection.answer_now(stream)
                if number % CALLS_PER_TURN == 0:
                    await asyncio.sleep(0)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for what connections tell about, but no longer than so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass

    def _tick(self) -> None:
        for connection in tuple(self._connections):
            connection.tick()
        for connection in [connection for connection in self._leaving if connection.is_drained]:
            self._leaving.discard(connection)
            connection.close()
        self._clock = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _connection(self) -> Connection:
        return Connection(
            self._methods,
            self._max_streams,
            max_message_bytes=self._max_message_bytes,
            on_made=self._made,
            on_idle=self._changed.set,
            on_lost=self._lost,
            reads=self._reads,
        )

    def _made(self, connection: Connection) -> None:
        self._connections.add(connection)
        if self._stopping:
            connection.go_away()

    def _lost(self, connection: Connection) -> None:
        for connections in (self._connections, self._busy, self._leaving):
            connections.discard(connection)
        self._changed.set()
