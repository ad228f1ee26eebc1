"""SGLang's words, as its source has them: scripted, since no SGLang runs without a GPU."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from extproc.config.stager import EngineSettings
from extproc.errors import EngineUnreachable, InvalidAdapter
from extproc.stager.engine import build_engine
from extproc.stager.engine.api import Limits, Work
from extproc.stager.engine.sglang import SglangEngine


class ScriptedSglang:
    """Knows one base model; loads everything but what stands in `refuses`."""

    def __init__(self) -> None:
        self.loaded: dict[str, str] = {}
        self.refuses = ""
        self.metrics = ""  # as without --enable-metrics
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/metrics{slash:/?}", self._metrics)
        app.router.add_post("/load_lora_adapter", self._load)
        app.router.add_post("/unload_lora_adapter", self._unload)
        return app

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        cards: list[dict[str, Any]] = [{"id": "qwen", "root": "qwen", "parent": None, "max_model_len": 4096}]
        return web.json_response({"data": cards + [{"id": n, "root": p, "parent": "qwen", "max_model_len": None} for n, p in self.loaded.items()]})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"max_loras_per_batch": 8, "max_loaded_loras": 32, "max_lora_rank": None})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self.metrics) if self.metrics else web.Response(status=404)

    async def _load(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = body["lora_name"]
        if self.refuses:
            return self._said(False, self.refuses, 400)
        if name in self.loaded:
            return self._said(False, f"Failed to load LoRA adapter {name} because it is already loaded", 400)
        self.loaded[name] = body["lora_path"]
        return self._said(True, "", 200)

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if self.loaded.pop(name, None) is None:
            return self._said(False, f"LoRA with name {name} does not exist. Loaded LoRAs: odict_keys([])", 400)
        return self._said(True, "", 200)

    def _said(self, success: bool, message: str, status: int) -> web.Response:
        body = {"rid": None, "http_worker_ipc": None, "success": success, "error_message": message, "loaded_adapters": self.loaded}
        return web.json_response(body, status=status)


@pytest.fixture
async def sglang() -> AsyncIterator[ScriptedSglang]:
    scripted = ScriptedSglang()
    runner = web.AppRunner(scripted.app(), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    scripted.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield scripted
    await runner.cleanup()


@pytest.fixture
async def engine(sglang: ScriptedSglang) -> AsyncIterator[SglangEngine]:
    engine = build_engine(EngineSettings(url=sglang.url, kind="sglang"))
    assert isinstance(engine, SglangEngine)
    yield engine
    await engine.close()


async def test_loading_and_unloading(sglang: ScriptedSglang, engine: SglangEngine) -> None:
    """What is loaded already, and what was not, is fine; a request names the base model, too."""
    assert await engine.why_not_ready() is None
    for _ in range(2):
        await engine.load("acme/a@sha256:00", Path("/node/a"))
    assert (await engine.known()).adapters == {"acme/a@sha256:00": "/node/a"}
    assert engine.request_model("acme/a@sha256:00") == "qwen:acme/a@sha256:00"
    for _ in range(2):
        await engine.unload("acme/a@sha256:00")
    assert sglang.loaded == {}
    assert engine.unload_waits


async def test_what_it_refuses_is_the_adapters_fault(sglang: ScriptedSglang, engine: SglangEngine) -> None:
    """With its own words, without our path."""
    sglang.refuses = "LoRA adapter x in /node/a has rank 512 which is greater than max_lora_rank"
    with pytest.raises(InvalidAdapter, match="in <path> has rank 512"):
        await engine.load("x", Path("/node/a"))


async def test_it_tells_its_limits_where_the_settings_do_not(sglang: ScriptedSglang) -> None:
    """What it was started with."""
    for settings, limits in (
        (EngineSettings(url=sglang.url, kind="sglang"), Limits(8, 32, 0)),
        (EngineSettings(url=sglang.url, kind="sglang", max_loras=2, max_cpu_loras=4, max_lora_rank=16), Limits(2, 4, 16)),
    ):
        engine = build_engine(settings)
        await engine.learn_limits()
        assert engine.limits == limits
        await engine.close()


async def test_one_that_answers_something_else_concludes_nothing(sglang: ScriptedSglang) -> None:
    """A vLLM behind the setting `sglang`, say."""
    engine = build_engine(EngineSettings(url=sglang.url + "/nothing", kind="sglang"))
    for call in (engine.load("a", Path("/a")), engine.unload("a"), engine.learn_limits()):
        with pytest.raises(EngineUnreachable):
            await call
    await engine.close()


async def test_its_load_is_that_of_its_data_parallel_ranks(sglang: ScriptedSglang, engine: SglangEngine) -> None:
    """Added up; of ranks that compute one batch together, one counts."""
    sglang.metrics = "\n".join(
        f'sglang:{name}{{dp_rank="{dp}",model_name="qwen",tp_rank="{tp}"}} {value}'
        for dp, running, queued, usage in ((0, 3.0, 0.0, 0.25), (1, 4.0, 2.0, 0.75))
        for tp in (0, 1)
        for name, value in (("num_running_reqs", running), ("num_queue_reqs", queued), ("token_usage", usage))
    )
    assert await engine.work(adapters=True) == Work(7.0, 2.0, 0.5)


async def test_without_metrics_its_load_is_not_known(engine: SglangEngine) -> None:
    """It serves them with --enable-metrics only."""
    with pytest.raises(EngineUnreachable, match="404 to /metrics"):
        await engine.work()
