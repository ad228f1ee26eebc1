"""A port that serves gRPC calls over `http2.Connection`, and how it drains."""

import asyncio
import ssl

from ..process import listen
from .http2 import READ_BYTES, Connection, Methods


class Listener:
    """Bound when made; serves from `start` to `stop`."""

    def __init__(self, address: str, methods: Methods, max_streams: int, tls: ssl.SSLContext | None = None) -> None:
        self._socket = listen(address)
        self._methods = methods
        self._max_streams = max_streams
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._idle = asyncio.Event()
        self._reads = bytearray(READ_BYTES)  # of all connections: each read is dealt with before the next

    @property
    def address(self) -> str:
        """host:port as it was bound: with port 0, the one that was given."""
        host, port, *_ = self._socket.getsockname()
        return f"{host}:{port}"

    async def start(self) -> None:
        """Accept connections."""
        self._server = await asyncio.get_running_loop().create_server(self._connection, sock=self._socket, ssl=self._tls)

    async def stop(self, drain_s: float) -> None:
        """Take no new connections and streams, let those that run finish for `drain_s` seconds, then close."""
        if self._server is None:
            self._socket.close()
            return
        self._server.close()
        for connection in tuple(self._connections):
            connection.go_away()
        try:
            async with asyncio.timeout(drain_s):
                while any(not connection.is_idle for connection in self._connections):
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            pass
        for connection in tuple(self._connections):
            connection.close()

    def _connection(self) -> Connection:
        connection = Connection(self._methods, self._max_streams, self._closed, self._idle.set, self._reads)
        self._connections.add(connection)
        return connection

    def _closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._idle.set()
