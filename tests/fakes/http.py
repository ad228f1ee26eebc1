"""A plain HTTP server of files that fails, stalls and counts on cue."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

from aiohttp import web


class FileServer:
    """`files` by path, as `/acme/a/adapter_config.json`. Everything else says how it misbehaves."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.url = ""
        self.requests: list[tuple[str, str]] = []  # method, path as it was sent
        self.authorizations: set[str | None] = set()
        self.ranges: list[str] = []  # the Range of every GET that has one
        self.token: str | None = None
        self.status: int | None = None
        self.cut_at: int | None = None  # bytes of an answer after which the connection of a GET breaks
        self.knows_ranges = True
        self.redirects: dict[str, str] = {}  # path -> location
        self.sizeless: set[str] = set()  # HEAD and GET state no length
        self.stall: set[str] = set()  # a GET of these stops half way
        self.stalled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.sent_bytes = 0
        self._runner: web.AppRunner | None = None

    def add(self, name: str, files: dict[str, bytes]) -> None:
        self.files |= {f"/{name}/{path}": data for path, data in files.items()}

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self.go_on.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.raw_path))
        self.authorizations.add(request.headers.get("authorization"))
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        if self.status is not None:
            return web.Response(status=self.status)
        if request.path in self.redirects:
            return web.Response(status=302, headers={"location": self.redirects[request.path]})
        data = self.files.get(request.path)
        if data is None:
            return web.Response(status=404)
        response, data = self._part(request, data)
        if response.status == 416:
            return response
        if request.path in self.sizeless:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(data)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        end = len(data) if self.cut_at is None else min(len(data), self.cut_at)
        if request.path in self.stall:
            await self._send(response, data[: end // 2])
            self.stalled.set()
            await self.go_on.wait()
            await self._send(response, data[end // 2 : end])
        else:
            await self._send(response, data[:end])
        if end < len(data) and request.transport is not None:
            request.transport.close()
        return response

    def _part(self, request: web.Request, data: bytes) -> tuple[web.StreamResponse, bytes]:
        """The answer to one request, not sent yet, and its body: what the range asks for, where there is one (RFC 9110, 14.2)."""
        headers = {"etag": f'"{hash(data):x}"'}
        if request.method != "GET" or "range" not in request.headers:
            return web.StreamResponse(headers=headers), data
        self.ranges.append(request.headers["range"])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["range"])
        if not self.knows_ranges or asked is None:
            return web.StreamResponse(headers=headers), data
        begin, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if begin >= len(data):
            return web.Response(status=416, headers={"content-range": f"bytes */{len(data)}"}), b""
        return web.StreamResponse(status=206, headers={**headers, "content-range": f"bytes {begin}-{end - 1}/{len(data)}"}), data[begin:end]

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        for at in range(0, len(data), 64 * 1024):
            piece = data[at : at + 64 * 1024]
            await response.write(piece)
            self.sent_bytes += len(piece)


@contextlib.asynccontextmanager
async def file_server() -> AsyncIterator[FileServer]:
    """A server on a free port."""
    server = FileServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
