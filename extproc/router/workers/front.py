"""The HTTP side of a router with workers: health of the whole, the sum of the metrics, and everything else as its workers answer it.

A question (GET, HEAD) is passed to one worker: all see the same fleet. Whatever changes something is passed to all of them, since each has its own
state; the answer is the first that is no success, or else the first. A worker that is started later does not hear of it: what has to outlast a process
is told by stagers or by a file, as it has to be for several routers.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from yarl import URL

from ...metrics import WorkersMetrics
from ...process.http import control_app
from .sums import Sums, added_up, parsed, rendered

log = logging.getLogger(__name__)

READ_S = 1.0  # for one worker's metrics: one that hangs is shown as it was
READ_EVERY_S = 5.0  # while nobody scrapes; what a worker counted since is lost when it dies
MAX_BODY_BYTES = 2**20  # of a change that is passed on; bodies of a control API are short
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
_OF_THE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "upgrade", "host", "content-length"}  # RFC 9110, 7.6.1; the length is stated anew


class WorkerApi:
    """One worker's control API, at a Unix socket."""

    def __init__(self, path: str) -> None:
        self.path = path
        connector = aiohttp.UnixConnector(path=path, force_close=True)  # a connection that was kept may be one that the worker is closing
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))

    async def ask(self, method: str, target: str, headers: dict[str, str], body: bytes) -> aiohttp.ClientResponse:
        """Raises aiohttp.ClientError or OSError if it cannot be reached."""
        url = URL(f"http://worker{target}", encoded=True)  # as the client wrote it
        return await self._session.request(method, url, headers=headers, data=body or None, allow_redirects=False)

    async def metrics(self) -> bytes:
        """Raises aiohttp.ClientError, OSError or TimeoutError."""
        async with asyncio.timeout(READ_S), self._session.get("http://worker/metrics") as response:
            response.raise_for_status()
            return await response.read()

    async def close(self) -> None:
        await self._session.close()


class Front:
    """`app` is what `router.http_listen` serves. `answering` gives the APIs of those workers that may be asked, the best first."""

    def __init__(self, metrics: WorkersMetrics, why_not_ready: Callable[[], str | None], answering: Callable[[], list[WorkerApi]]) -> None:
        self.sums = Sums()
        self._metrics = metrics
        self._answering = answering
        self._reading = asyncio.Lock()  # an older answer must not replace a newer one
        self._keeping: asyncio.Task[None] | None = None
        self.app = self._build(why_not_ready)

    def start(self) -> None:
        self._keeping = asyncio.create_task(self._read_on(), name="workers' metrics")

    async def stop(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)

    # -- metrics

    async def render(self) -> bytes:
        """The Prometheus text format, of this process and all workers together."""
        async with self._reading:
            await self._read_all()
            whole = self.sums.whole()
            self.sums.scraped()
        own = self._metrics.render()
        return await asyncio.to_thread(lambda: rendered(added_up([parsed(own), *whole])))

    async def _read_all(self) -> None:
        await asyncio.gather(*(self._read(api) for api in self._answering()))

    async def _read(self, api: WorkerApi) -> None:
        try:
            text = await api.metrics()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.debug("no metrics came from %s: %s", api.path, type(error).__name__)
            return
        self.sums.read(api.path, await asyncio.to_thread(parsed, text))

    async def _read_on(self) -> None:
        while True:
            await asyncio.sleep(READ_EVERY_S)
            async with self._reading:
                await self._read_all()

    # -- the rest

    def _build(self, why_not_ready: Callable[[], str | None]) -> FastAPI:
        app = control_app("lora-extproc router", self, why_not_ready, openapi_url=None)  # the workers document what they answer

        @app.api_route("/{path:path}", methods=METHODS)
        async def others(request: Request) -> Response:
            target = b"?".join(part for part in (request.scope["raw_path"], request.scope["query_string"]) if part).decode("ascii")
            headers = {name: value for name, value in request.headers.items() if name not in _OF_THE_CONNECTION}
            if request.method in ("GET", "HEAD"):
                return await self._ask_one(request.method, target, headers)
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY_BYTES:
                    return _problem(413, "body_too_large", f"the body is over {MAX_BODY_BYTES} bytes")
            return await self._ask_all(request.method, target, headers, bytes(body))

        return app

    async def _ask_one(self, method: str, target: str, headers: dict[str, str]) -> Response:
        for api in self._answering():
            try:
                answer = await api.ask(method, target, headers, b"")
            except (aiohttp.ClientError, OSError) as error:
                log.info("%s %s could not be asked of one worker, the next is asked: %s", method, target[:64], type(error).__name__)
                continue
            return StreamingResponse(_passed_on(answer), answer.status, _headers(answer))
        return _nobody()

    async def _ask_all(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Response:
        async def ask(api: WorkerApi) -> Response:
            try:
                answer = await api.ask(method, target, headers, body)
                return Response(await answer.read(), answer.status, _headers(answer))
            except (aiohttp.ClientError, OSError) as error:
                return _problem(503, "no_worker", f"one of the workers did not answer ({type(error).__name__}), others may have done it; say it again")

        answers = await asyncio.gather(*(ask(api) for api in self._answering()))
        return next((answer for answer in answers if answer.status_code >= 300), answers[0] if answers else _nobody())


async def _passed_on(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    try:
        async for part in answer.content.iter_any():
            yield part
    finally:
        answer.close()


def _headers(answer: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.lower() not in _OF_THE_CONNECTION}


def _nobody() -> Response:
    return _problem(503, "no_worker", "no worker of this router serves now; one is being started")


def _problem(status: int, reason: str, message: str) -> Response:
    return JSONResponse({"error": reason, "message": message}, status)
