"""An HTTP origin that counts, stalls and fails on cue."""

import asyncio
from collections import Counter
from pathlib import Path
from types import TracebackType

from aiohttp import web


class OriginServer:
    """Serves the files below `root`; `gets` counts body requests by path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gets: Counter[str] = Counter()
        self.status = 0  # other than 0: every request is answered with it
        self.gate = asyncio.Event()  # weights are sent to their half, then wait for it
        self.gate.set()
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> "OriginServer":
        app = web.Application()
        app.router.add_get("/{path:.*}", self._serve)  # and HEAD
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._runner is not None
        self.gate.set()
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self.status:
            return web.Response(status=self.status)
        file = self.root / request.match_info["path"]
        if not file.is_file():
            return web.Response(status=404)
        data = await asyncio.to_thread(file.read_bytes)
        response = web.StreamResponse(headers={"content-length": str(len(data)), "etag": f'"{len(data)}"'})
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        self.gets[request.match_info["path"]] += 1
        if file.suffix == ".safetensors" and not self.gate.is_set():
            await response.write(data[: len(data) // 2])
            await self.gate.wait()
            data = data[len(data) // 2 :]
        await response.write(data)
        await response.write_eof()
        return response
