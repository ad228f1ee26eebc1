"""A port that serves gRPC calls over `http2.Connection`: how it listens, changes its certificate, and drains."""

import asyncio
import ssl
from collections.abc import Callable

from ..process.sockets import LISTEN_BACKLOG, listen
from .http2.calls import Methods
from .http2.connection import MAX_MESSAGE_BYTES, READ_BYTES, Connection
from .http2.patience import TICK_S

CLOSE_S = 1.0  # for what was answered last to be sent, before connections are cut
CALLS_PER_TURN = 50  # that are told to answer now, before the loop gets its turn


class Listener:
    """Bound when made; serves from `start` to `stop`. `max_message_bytes` is of one gRPC message; a longer one ends its call with RESOURCE_EXHAUSTED."""

    def __init__(
        self, address: str, methods: Methods, max_streams: int, tls: ssl.SSLContext | None = None, *, max_message_bytes: int = MAX_MESSAGE_BYTES
    ) -> None:
        self._socket = listen(address)
        self._methods = methods
        self._max_streams = max_streams
        self._max_message_bytes = max_message_bytes
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._changed = asyncio.Event()  # a connection has gone, or has no call any more
        self._reads = bytearray(READ_BYTES)  # of all connections: each read is dealt with before the next
        self._clock: asyncio.TimerHandle | None = None
        self._stopping = False

    @property
    def address(self) -> str:
        """host:port as it was bound: with port 0, the one that was given."""
        host, port, *_ = self._socket.getsockname()
        return f"{host}:{port}"

    async def start(self) -> None:
        """Accept connections."""
        self._server = await self._serve()
        self._tick()

    async def use(self, tls: ssl.SSLContext) -> None:
        """Greet new connections with another context from now on. Those that are open, or in their handshake, go on as they are.

        Both contexts accept from one queue for a moment, so no connection falls between them.
        """
        self._tls = tls
        if self._server is not None and not self._stopping:
            before, self._server = self._server, await self._serve()
            before.close()

    async def stop(self, drain_s: float) -> None:
        """Take no new connections and streams, let those that run finish for `drain_s` seconds, have the rest answer, then close."""
        self._stopping = True
        if self._server is None:
            self._socket.close()
            return
        self._server.close()
        self._socket.close()
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
        if self._clock is not None:
            self._clock.cancel()

    async def _serve(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        return await loop.create_server(self._connection, sock=self._socket.dup(), ssl=self._tls, backlog=LISTEN_BACKLOG)

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
        self._connections.discard(connection)
        self._changed.set()
