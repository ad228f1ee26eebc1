"""Asks an engine whether it lives, where its stager cannot be asked."""

import asyncio
import contextlib

import aiohttp

CONNECT_S = 0.35  # a node that drops packets is known to be gone before a client's first repetition, half a second after its first failure
ANSWER_S = 2.0  # an engine that works at a long prompt may answer late; one that hangs has its connections accepted by the kernel
AT_ONCE = 256  # the others wait for their turn: of nodes that drop packets 700 a second are known to be gone, of engines that hang a hundred


class Probe:
    """`GET /health` of model servers, each within CONNECT_S + ANSWER_S from its turn on: an engine is not taken for dead because others are."""

    def __init__(self, connect_s: float = CONNECT_S, answer_s: float = ANSWER_S) -> None:
        self._timeout = aiohttp.ClientTimeout(total=connect_s + answer_s, sock_connect=connect_s)
        self._session: aiohttp.ClientSession | None = None
        self._turns = asyncio.Semaphore(AT_ONCE)  # not the connector's limit: what waits for that is timed, and shuffled whenever a connection ends

    async def answers(self, address: str) -> bool:
        """Whether the model server at `address` says that it is well, or knows no such path."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a connection of an earlier probe proves nothing
            self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector)
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, ValueError):
            async with self._turns, self._session.get(f"http://{address}/health", allow_redirects=False) as response:
                return response.status < 500
        return False

    async def until_it_hangs_up(self, address: str) -> None:
        """Hold a connection and say nothing, until the other side closes it or cannot be reached."""
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(self._timeout.sock_connect):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                while await reader.read(4096):
                    pass
            finally:
                writer.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
