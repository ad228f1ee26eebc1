"""The simulated engine's HTTP side: vLLM's paths, statuses and metric names. An answer tells which weights, by SHA-256, it was made with."""

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from .adapters import Adapters, EngineDeadError, SimError
from .checkpoint import BASE_SHA256

log = logging.getLogger(__name__)

DEFAULT_TOKENS = 16
LEAST_TOKENS = 5  # the words that an answer must have to tell its weights
PROMPT_TOKENS = 1  # of every prompt here
DEATH_S = 0.05  # a dying vLLM still answers what it has begun with 500, then exits
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Usage:
    """Which chunks of a stream count tokens: one more at the end, whose `choices` are empty, or each."""

    at_the_end: bool = False
    with_each: bool = False

    @classmethod
    def asked_for(cls, body: dict[str, Any]) -> "Usage":
        """By `stream_options`, where `continuous_usage_stats` counts only beside `include_usage`. Raises SimError."""
        options = body.get("stream_options")
        if options and not body.get("stream"):
            raise SimError(400, "BadRequestError", "Stream options can only be defined when `stream=True`.", "stream_options")
        if options is None:
            return cls()
        if not isinstance(options, dict):
            raise SimError(400, "BadRequestError", "stream_options: an object is needed", "stream_options")
        at_the_end = bool(options.get("include_usage"))
        return cls(at_the_end, at_the_end and bool(options.get("continuous_usage_stats")))


class SimEngine:
    """One engine. `token_s` is the time one token takes, in seconds; with `dev_mode` it has what vLLM has with VLLM_SERVER_DEV_MODE."""

    def __init__(self, adapters: Adapters, *, token_s: float = 0.0, dev_mode: bool = False, die: Callable[[], None] = lambda: os._exit(1)) -> None:
        self._adapters = adapters
        self._token_s = token_s
        self._dev_mode = dev_mode
        self._die = die
        self.dead = False
        self.sleeps = False
        self._started = int(time.time())
        self.served = 0

    def app(self) -> web.Application:
        """The application, to be served on the engine's address."""
        app = web.Application(middlewares=[self._errors], client_max_size=256 * 2**20)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completion),
                web.get("/v1/models", self._models),
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/metrics/", self._some_metrics),
                web.get("/version", self._version),
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
            ]
        )
        if self._dev_mode:
            dev = {"/reset_prefix_cache": self._reset_prefix_cache, "/sleep": self._sleep, "/wake_up": self._wake_up}
            app.add_routes([*(web.post(path, handler) for path, handler in dev.items()), web.get("/is_sleeping", self._is_sleeping)])
        return app

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except SimError as error:
            return _error(error.status, error.kind, str(error), error.param)
        except EngineDeadError as error:
            log.error("engine core died: %s", error)
            self.dead = True
            asyncio.get_running_loop().call_later(DEATH_S, self._die)
            return _error(500, "InternalServerError", "EngineCore encountered an issue. See stack trace (above) for the root cause.")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await _json(request)
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise SimError(400, "BadRequestError", "messages: a non-empty list is needed")
        return await self._generate(request, body, chat=True)

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, await _json(request), chat=False)

    async def _generate(self, request: web.Request, body: dict[str, Any], *, chat: bool) -> web.StreamResponse:
        model = body.get("model") or self._adapters.base_model
        usage = Usage.asked_for(body)
        if self.dead:
            raise EngineDeadError("dead already")
        count = max(int(body.get("max_completion_tokens") or body.get("max_tokens") or DEFAULT_TOKENS), LEAST_TOKENS)
        if model == self._adapters.base_model:
            async with self._adapters.scheduler.turn("", PROMPT_TOKENS + count):
                return await self._answer(request, body, model, BASE_SHA256, count, usage, chat=chat)
        if model not in self._adapters.registry:
            await self._adapters.resolve(model)
        async with self._adapters.use(model, PROMPT_TOKENS + count) as loaded:
            return await self._answer(request, body, model, loaded.sha256, count, usage, chat=chat)

    async def _answer(self, request: web.Request, body: dict[str, Any], model: str, sha256: str, count: int, usage: Usage, *, chat: bool) -> web.StreamResponse:
        words = [model, "answers", "with", "weights", sha256]
        tokens = [f"{words[i % len(words)]} " for i in range(count)]
        self.served += 1
        head = {"id": f"sim-{self.served}", "created": int(time.time()), "model": model, "system_fingerprint": sha256}
        if body.get("stream"):
            return await self._stream(request, head, tokens, usage, chat=chat)
        if self._token_s:
            await asyncio.sleep(self._token_s * len(tokens))
        text = "".join(tokens)
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        kind = "chat.completion" if chat else "text_completion"
        return web.json_response({**head, "object": kind, "choices": [{"index": 0, "finish_reason": "stop", **choice}], "usage": _usage(len(tokens))})

    async def _stream(self, request: web.Request, head: dict[str, Any], tokens: list[str], usage: Usage, *, chat: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        async for line in self._events(head, tokens, usage, chat=chat):
            await response.write(line)
        await response.write_eof()
        return response

    async def _events(self, head: dict[str, Any], tokens: list[str], usage: Usage, *, chat: bool) -> AsyncIterator[bytes]:
        kind = "chat.completion.chunk" if chat else "text_completion"
        for i, token in enumerate(tokens):
            if self._token_s:
                await asyncio.sleep(self._token_s)
            choice: dict[str, Any] = {"delta": {"content": token}} if chat else {"text": token}
            last = i == len(tokens) - 1
            data = {**head, "object": kind, "choices": [{"index": 0, "finish_reason": "stop" if last else None, **choice}]}
            yield _event({**data, "usage": _usage(i + 1)} if usage.with_each else data)
        if usage.at_the_end:
            yield _event({**head, "object": kind, "choices": [], "usage": _usage(len(tokens))})
        yield b"data: [DONE]\n\n"

    async def _models(self, _request: web.Request) -> web.Response:
        """Names that were asked for, never what lies on disk nor what is in memory."""
        a = self._adapters
        common = {"object": "model", "created": self._started, "owned_by": "vllm"}
        data = [{"id": a.base_model, "root": a.root or a.base_model, "parent": None, "max_model_len": 4096, **common}]
        data += [{"id": name, "root": path, "parent": a.base_model, "max_model_len": None, **common} for name, path in a.registry.items()]
        return web.json_response({"object": "list", "data": data})

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self.dead else 200)

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": "sim"})

    async def _metrics(self, _request: web.Request) -> web.Response:
        """All of them, whatever the query says."""
        return web.Response(text="".join(f"{line}\n" for line in self._series()))

    async def _some_metrics(self, request: web.Request) -> web.Response:
        """Those that `name[]` names, as the client library's own server gives them; it lies below the path with a slash at its end."""
        names = request.query.getall("name[]", [])
        return web.Response(text="".join(f"{line}\n" for line in self._series() if not names or line.partition("{")[0] in names))

    def _series(self) -> list[str]:
        base, scheduler = self._adapters.base_model, self._adapters.scheduler
        names = ",".join(scheduler.adapters).replace("\\", "\\\\").replace('"', '\\"')  # vLLM puts the same names into both labels
        labels = f'max_lora="{scheduler.max_loras}",running_lora_adapters="{names}",waiting_lora_adapters="{names}"'
        gauges = {
            "num_requests_running": scheduler.running.total(),
            "num_requests_waiting": scheduler.waiting,
            "kv_cache_usage_perc": scheduler.kv_usage,
            "request_success_total": self.served,
        }
        return [
            f"vllm:lora_requests_info{{{labels}}} {time.time()}",
            *(f'vllm:{name}{{engine="0",model_name="{base}"}} {float(value)}' for name, value in gauges.items()),
        ]

    async def _load(self, request: web.Request) -> web.Response:
        body = await _json(request)
        if not {"lora_name", "lora_path"} <= set(body):
            raise SimError(400, "Bad Request", "lora_name and lora_path: Field required")
        name = body.get("lora_name", "")
        options = {"in_place": bool(body.get("load_inplace")), "is_3d": bool(body.get("is_3d_lora_weight"))}
        await self._adapters.load(name, body.get("lora_path", ""), **options)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await _json(request)).get("lora_name", "")
        if not name:
            raise SimError(400, "InvalidUserInput", "'lora_name' needs to be provided to unload a LoRA adapter.")
        self._adapters.unload(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _reset_prefix_cache(self, _request: web.Request) -> web.Response:
        return web.Response()  # there is none

    async def _sleep(self, _request: web.Request) -> web.Response:
        self.sleeps = True
        return web.Response()

    async def _wake_up(self, _request: web.Request) -> web.Response:
        self.sleeps = False
        return web.Response()

    async def _is_sleeping(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": self.sleeps})


async def _json(request: web.Request) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise SimError(400, "Bad Request", "Unsupported Media Type: Only 'application/json' is allowed")
    try:
        body = json.loads(await request.read())
    except ValueError as error:
        raise SimError(400, "Bad Request", str(error)) from None
    if not isinstance(body, dict):
        raise SimError(400, "Bad Request", "the body is not an object")
    return body


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _usage(tokens: int) -> dict[str, int]:
    """Of an answer of so many tokens."""
    return {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens, "total_tokens": PROMPT_TOKENS + tokens}


def _error(status: int, kind: str, message: str, param: str | None = None) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "param": param, "code": status}}, status=status)


async def serve(engine: SimEngine, address: str, stop: asyncio.Event) -> None:
    """Run the engine until `stop` is set."""
    host, _, port = address.rpartition(":")
    runner = web.AppRunner(engine.app(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, host, int(port), backlog=1024).start()
    try:
        await stop.wait()
    finally:
        await runner.cleanup()
