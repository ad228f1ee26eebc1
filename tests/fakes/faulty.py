"""A web server, and a server that speaks S3, that go wrong on cue and count what they send."""

import asyncio
import base64
import contextlib
import hashlib
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar
from urllib.parse import quote
from xml.sax.saxutils import escape

from aiohttp import web

from .wait import turns

PIECE_BYTES = 64 * 1024


@dataclass
class Fault:
    """What happens to the next `times` requests that are `method` and whose path ends with `path`, after `skip` of them were answered well."""

    path: str = ""
    times: int = 1
    skip: int = 0
    method: str = "GET"
    status: int = 0  # answered instead
    headers: Mapping[str, str] = field(default_factory=dict)  # stated as well, or instead
    body: bytes | None = None  # sent instead of the content, as if it were that
    whole: bool = False  # the range is ignored
    states: int | None = None  # the Content-Length; more than there is: the connection is closed after what there is
    at: int | None = None  # bytes of the body after which it ends...
    end: Literal["close", "reset", "stall"] = "close"  # ...like this
    then: Callable[[], None] | None = None  # called before the answer ends or, with `at`, breaks
    taken: int = 0


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    range: str
    authorization: str
    headers: Mapping[str, str]
    begin: int = 0  # first byte of the answer's body


class FaultyServer:
    """`files` by path, as `/acme/a/adapter_config.json`. `faults` are looked through in order; the first that matches is the one that happens."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.sent_bytes = 0  # of bodies
        self.url = ""
        self.knows_ranges = True
        self.states_version = True
        self.states_length = True
        self.is_silent = False  # takes requests and never answers
        self.redirects: dict[str, str] = {}  # path -> location
        self._go_on = asyncio.Event()
        self._runner: web.AppRunner | None = None

    def add(self, name: str, files: Mapping[str, bytes]) -> None:
        self.files |= {f"/{name}/{path}": data for path, data in files.items()}

    def fault(self, path: str = "", **what: object) -> Fault:
        """Misbehave; `what` are the fields of Fault."""
        self.faults.append(Fault(path, **what))  # type: ignore[arg-type]  # as the caller says
        return self.faults[-1]

    def gets(self, path: str = "") -> list[Asked]:
        """The requests for bodies of what ends with `path`."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.path.endswith(path)]

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, 0).start()
        self.url = f"http://{self.host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self._go_on.set()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def _take(self, request: web.Request) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == request.method and request.path.endswith(fault.path):
                fault.taken += 1
                if fault.taken <= fault.skip:
                    continue
                fault.times -= 1
                return fault
        return None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        begin = re.match(r"bytes=(\d+)-", request.headers.get("range", ""))
        sent = request.headers
        authorization = sent.get("authorization", "")
        self.asked.append(Asked(request.method, request.path, sent.get("range", ""), authorization, dict(sent), int(begin[1]) if begin else 0))
        if self.is_silent:
            await self._go_on.wait()
        fault = self._take(request)
        if fault is not None and fault.status:
            if fault.then is not None:
                fault.then()
            return self._refusal(fault.status, request, fault.headers)
        if request.path in self.redirects:
            return web.Response(status=302, headers={"location": self.redirects[request.path]})
        return await self._answer(request, fault)

    async def _answer(self, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        data = self.files.get(request.path)
        if data is None:
            return self._refusal(404, request, {})
        return await self._send(request, data, fault, {"etag": _etag(data)} if self.states_version else {})

    def _refusal(self, status: int, _request: web.Request, headers: Mapping[str, str]) -> web.Response:
        return web.Response(status=status, headers=headers)

    async def _send(self, request: web.Request, data: bytes, fault: Fault | None, headers: Mapping[str, str]) -> web.StreamResponse:
        """The whole or the range that is asked for, or what the fault makes of it."""
        fault = fault or Fault()
        data = data if fault.body is None else fault.body
        part, response = _part(request, data, known=self.knows_ranges and not fault.whole)
        if response.status == 416:
            return self._refusal(416, request, {**response.headers})
        response.headers.update({**headers, **fault.headers})
        if self.states_length or request.method == "HEAD":
            if self.states_length:
                response.content_length = len(part) if fault.states is None else fault.states
        else:
            response.enable_chunked_encoding()
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        breaks = fault.at is not None or (response.content_length or 0) > len(part)
        end = len(part) if fault.at is None else min(len(part), fault.at)
        if response.content_length is not None:
            end = min(end, response.content_length)
        for at in range(0, end, PIECE_BYTES):
            piece = part[at : min(at + PIECE_BYTES, end)]
            await response.write(piece)
            self.sent_bytes += len(piece)
        if breaks:
            await turns(50)  # let the client read what it was sent: of a broken connection it reads no more
        if fault.then is not None:
            fault.then()
        if breaks:
            await self._break(request, fault)
        return response

    async def _break(self, request: web.Request, fault: Fault) -> None:
        if fault.end == "stall":
            await self._go_on.wait()
        if (transport := request.transport) is None:
            return
        if fault.end == "reset":
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.close()


class FaultyS3(FaultyServer):
    """One bucket, called `models`, asked by path. What it states of an object besides, by path: `sha256` and `crc32` in base64, `sizes`."""

    def __init__(self) -> None:
        super().__init__()
        self.sha256: dict[str, str] = {}
        self.crc32: dict[str, str] = {}
        self.sizes: dict[str, int] = {}  # where the list lies
        self.keys: list[str] = []  # listed besides, and not there

    def add(self, name: str, files: Mapping[str, bytes]) -> None:
        super().add(f"models/{name}", files)

    def state_sha256(self, name: str, data: bytes) -> None:
        """State the checksum of `data` for the key."""
        self.sha256[f"/models/{name}"] = base64.b64encode(hashlib.sha256(data).digest()).decode()

    def state_crc32(self, name: str, crc32: int) -> None:
        self.crc32[f"/models/{name}"] = base64.b64encode(struct.pack(">I", crc32)).decode()

    async def _answer(self, request: web.Request, fault: Fault | None) -> web.StreamResponse:
        if request.path in ("/models", "/models/"):
            return self._list(request)
        data = self.files.get(request.path)
        if data is None:
            return self._refusal(404, request, {})
        if request.headers.get("if-match") not in (None, _etag(data)):
            return self._refusal(412, request, {})
        headers = {"etag": _etag(data), "last-modified": "Fri, 20 Nov 2026 10:00:00 GMT"}
        if request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" and "range" not in request.headers:  # it is of the whole
            headers |= {"x-amz-checksum-type": "FULL_OBJECT"}
            headers |= {"x-amz-checksum-sha256": self.sha256[request.path]} if request.path in self.sha256 else {}
            headers |= {"x-amz-checksum-crc32": self.crc32[request.path]} if request.path in self.crc32 else {}
        return await self._send(request, data, fault, headers)

    def _list(self, request: web.Request) -> web.Response:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        there = {path.removeprefix("/models/"): data for path, data in self.files.items()} | dict.fromkeys(self.keys, b"x")
        items = []
        for key, data in sorted(there.items()):
            if key.startswith(prefix) and (not delimiter or delimiter not in key[len(prefix) :]):
                algorithm = "<ChecksumAlgorithm>SHA256</ChecksumAlgorithm>" if f"/models/{key}" in self.sha256 else ""
                size = self.sizes.get(f"/models/{key}", len(data))
                shown = quote(key) if request.query.get("encoding-type") == "url" else escape(key)
                items.append(f"<Contents><Key>{shown}</Key><ETag>{escape(_etag(data))}</ETag>{algorithm}<Size>{size}</Size></Contents>")
        encoding = "<EncodingType>url</EncodingType>" if request.query.get("encoding-type") == "url" else ""
        text = f"<ListBucketResult><Name>models</Name><Prefix>{quote(prefix)}</Prefix>{encoding}<IsTruncated>false</IsTruncated>{''.join(items)}</ListBucketResult>"
        return web.Response(text=text, content_type="application/xml")

    def _refusal(self, status: int, request: web.Request, headers: Mapping[str, str]) -> web.Response:
        code = {
            404: "NoSuchKey",
            401: "AccessDenied",
            412: "PreconditionFailed",
            416: "InvalidRange",
            503: "SlowDown",
            403: "AccessDenied",
            500: "InternalError",
        }[status]
        text = "" if request.method == "HEAD" else f"<Error><Code>{code}</Code><Message>as told</Message></Error>"
        return web.Response(status=status, headers=headers, text=text, content_type="application/xml")


Server = TypeVar("Server", bound=FaultyServer)


@contextlib.asynccontextmanager
async def running(server: Server) -> AsyncIterator[Server]:
    """The server on a free port."""
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _part(request: web.Request, data: bytes, *, known: bool) -> tuple[bytes, web.StreamResponse]:
    """What a range asks for, and the answer that states it, not sent yet (RFC 9110, 14.2)."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if request.method != "GET" or not known or asked is None:
        return data, web.StreamResponse()
    begin, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
    if begin >= len(data):
        return b"", web.StreamResponse(status=416, headers={"content-range": f"bytes */{len(data)}"})
    return data[begin:end], web.StreamResponse(status=206, headers={"content-range": f"bytes {begin}-{end - 1}/{len(data)}"})
