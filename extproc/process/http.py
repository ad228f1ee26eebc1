"""A small HTTP server beside a process's own work: health, metrics, and what else its control API has."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import uvicorn
from fastapi import FastAPI, Response

from .sockets import listen


class HttpServer:
    """A FastAPI application on uvicorn, inside a process that handles its own signals."""

    class _Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    def __init__(self, app: FastAPI, address: str) -> None:
        self._socket = listen(address)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2)
        self._server = self._Server(config)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http server")

    async def stop(self) -> None:
        if self._task is not None:
            self._server.should_exit = True
            await self._task
        self._socket.close()


class Metrics(Protocol):
    """What `/metrics` shows, in the Prometheus text format."""

    def render(self) -> bytes | Awaitable[bytes]: ...


def control_app(title: str, metrics: Metrics, why_not_ready: Callable[[], str | None], *, openapi_url: str | None = "/openapi.json") -> FastAPI:
    """The endpoints every process has. `why_not_ready` returns None when ready. Without an `openapi_url` there is no page that documents them either."""
    app = FastAPI(title=title, docs_url="/docs", redoc_url=None, openapi_url=openapi_url)

    @app.get("/healthz", summary="The process lives.")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="The process may be sent work; 503 and the reason if not.")
    async def readyz(response: Response) -> dict[str, str]:
        why = why_not_ready()
        if why is not None:
            response.status_code = 503
            return {"status": "not ready", "why": why}
        return {"status": "ready"}

    @app.get("/metrics", summary="Prometheus text format.")
    async def render() -> Response:
        rendered = metrics.render()
        text = rendered if isinstance(rendered, bytes) else await rendered
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
