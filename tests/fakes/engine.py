"""The simulated engine on a port of its own, with a place to step in before it answers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from extproc.sim.adapters import Adapters
from extproc.sim.app import SimEngine
from extproc.up.demo import BASE_MODEL

Step = Callable[[str], Awaitable[web.Response | None]]
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


# A connection that was accepted a moment ago is known to asyncio and not yet to the server, which would not close it.
ACCEPTED_S = 0.02


@dataclass
class RunningEngine:
    """`calls` are the paths asked for, but for health, which says no while `is_sick`. `step` may answer anything else instead of the engine."""

    adapters: Adapters
    url: str = ""
    calls: list[str] = field(default_factory=list)
    deaths: int = 0
    is_sick: bool = False
    healths: int = 0  # how often it was asked
    hold: asyncio.Event | None = None  # whatever comes, health too, waits for it
    step: Step | None = None
    runner: web.AppRunner | None = None

    async def ask(self, name: str) -> str:
        """What a request for the adapter does, without HTTP: the SHA-256 of the weights that answer."""
        if name not in self.adapters.registry:
            await self.adapters.resolve(name)
        async with self.adapters.use(name) as loaded:
            return loaded.sha256

    async def stop(self) -> None:
        """Refuse connections from now on."""
        if self.runner is not None:
            await asyncio.sleep(ACCEPTED_S)
            await self.runner.cleanup()
            await asyncio.sleep(ACCEPTED_S)
            self.runner = None


@contextlib.asynccontextmanager
async def running_engine(
    cache_dir: Path, *, max_loras: int = 2, max_cpu_loras: int = 4, max_num_seqs: int = 256, token_s: float = 0.0, dev_mode: bool = False
) -> AsyncIterator[RunningEngine]:
    """An engine that serves `base` and reads adapters from `cache_dir`."""
    adapters = Adapters(
        base_model="base",
        root=BASE_MODEL,
        cache_dir=str(cache_dir),
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        max_lora_rank=8,
        max_num_seqs=max_num_seqs,
    )
    running = RunningEngine(adapters)

    def die() -> None:
        running.deaths += 1

    @web.middleware
    async def note(request: web.Request, handler: _Handler) -> web.StreamResponse:
        path = request.path.rstrip("/")  # `/metrics/` gives some of what `/metrics` gives
        running.healths += path == "/health"
        if running.hold is not None:
            await running.hold.wait()
        if path == "/health" and running.is_sick:
            return web.Response(status=503)
        if path != "/health":
            running.calls.append(path)
            if running.step is not None and (answer := await running.step(path)) is not None:
                return answer
        return await handler(request)

    app = SimEngine(adapters, token_s=token_s, dev_mode=dev_mode, die=die).app()
    app.middlewares.insert(0, note)
    running.runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await running.runner.setup()
    await web.TCPSite(running.runner, "127.0.0.1", 0).start()
    running.url = f"http://127.0.0.1:{running.runner.addresses[0][1]}"
    try:
        yield running
    finally:
        await asyncio.shield(running.stop())
