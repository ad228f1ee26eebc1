"""What every long-running process of ours does alike: logs, an event loop, a stop on SIGTERM or SIGINT, and a small HTTP server beside it."""

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import grpc
import grpc.aio
import uvicorn
import uvloop
from fastapi import FastAPI, Response

from .errors import StartError
from .metrics import Metrics


class JsonFormatter(logging.Formatter):
    """One JSON object per line; a record's `notes` become fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        fields |= getattr(record, "notes", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def set_up_logging(level: str, form: str = "text") -> None:
    """One line per event on standard error, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter("%(asctime)s %(levelname).1s %(name)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "botocore", "aiobotocore", "huggingface_hub", "filelock", "asyncio"):
        logging.getLogger(chatty).setLevel("WARNING")


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    """Run `main(stop)` until it returns; SIGTERM and SIGINT set `stop`."""

    _keep_freed_memory()

    async def guarded() -> None:
        gc.collect()
        gc.freeze()  # what is imported lives as long as the process: the collector need not look at it again
        gc.set_threshold(GC_THRESHOLD, 20, 50)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    uvloop.run(guarded())


def _keep_freed_memory() -> None:
    """Have glibc keep up to KEPT_BYTES of what is freed at the end of its heap, instead of giving each large buffer back to the kernel and faulting it
    in again: a fifth of the router's time at bodies of 220 KB went into that. Another C library is left alone.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)


def listen(address: str) -> socket.socket:
    """A listening TCP socket. Raises StartError, naming the address, if it cannot be had."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        return socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror}") from None


KEPT_BYTES = 4 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
GC_THRESHOLD = 20_000  # objects; requests leave no cycles, so looking for them after every 700 costs time and finds nothing
MAX_MESSAGE_BYTES = 64 * 2**20  # gRPC's default of 4 MiB would cut bodies off; router.max_body_bytes is the limit that answers


def grpc_server(interceptors: Sequence[Any] = ()) -> grpc.aio.Server:
    """A grpc.aio server with our transport limits, not bound yet."""
    return grpc.aio.server(
        interceptors=interceptors,
        options=(
            ("grpc.so_reuseport", 0),  # a second process on a busy port must fail, not share it
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ),
    )


def listen_grpc(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> None:
    """Bind `server`, with TLS if there are credentials. Raises StartError, naming the address, if it cannot be had."""
    try:
        port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise StartError(f"cannot listen on {address}: it is in use or not an address of this machine")


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


def control_app(title: str, metrics: Metrics, why_not_ready: Callable[[], str | None]) -> FastAPI:
    """The endpoints every process has. `why_not_ready` returns None when ready."""
    app = FastAPI(title=title, docs_url="/docs", redoc_url=None)

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
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
