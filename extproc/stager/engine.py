"""The model server on this node, as far as the stager needs it: is it well, which adapters may it still read, forget this one."""

import logging
import os
import re
from dataclasses import dataclass

import aiohttp

from ..config import EngineSettings
from ..errors import EngineUnreachable

log = logging.getLogger(__name__)

_WAITING = re.compile(r"^vllm:num_requests_waiting(?:\{.*\})? (\S+)$", re.MULTILINE)
_INFO = re.compile(r"^vllm:lora_requests_info\{(?P<labels>.*)\} (?P<time>\S+)$", re.MULTILINE)
_RUNNING = re.compile(r'(?:running|waiting)_lora_adapters="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Requests:
    """What the engine works on at one moment."""

    running: frozenset[str]  # names of adapters with requests at work, and more where a name may hold a comma
    waiting: float  # requests in its queue, of whatever adapter: those that wait for a slot are in no label


class Engine:
    """vLLM's HTTP API. Every method raises EngineUnreachable when the answer is not certain."""

    def __init__(self, settings: EngineSettings) -> None:
        self._url = settings.url.rstrip("/")
        key = os.environ.get(settings.api_key_env, "") if settings.api_key_env else ""
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self.keeps_prefixes = False  # it was asked to clear its prefix cache and knows no way to

    @property
    def exists(self) -> bool:
        """Whether any engine reads this directory."""
        return bool(self._url)

    async def is_healthy(self) -> bool:
        try:
            healthy = (await self._call("GET", "/health"))[0] == 200
        except EngineUnreachable:
            healthy = False
        if not healthy:
            self.keeps_prefixes = False  # it may come back with other settings
        return healthy

    async def registered(self) -> dict[str, str]:
        """Names that the engine resolves without looking at the disk first, with the directory of each; it may read their files at any time."""
        status, body = await self._call("GET", "/v1/models")
        if status != 200 or not isinstance(body, dict) or not isinstance(body.get("data"), list):
            raise EngineUnreachable(f"the engine answers {status} to /v1/models")
        if not all(isinstance(model, dict) for model in body["data"]):
            raise EngineUnreachable("the engine's list of models is none")
        return {str(model.get("id")): str(model.get("root")) if model.get("parent") else "" for model in body["data"]}

    async def requests(self) -> Requests:
        """Of the series of vllm:lora_requests_info the newest, since old ones are never removed; and the length of the queue."""
        status, body = await self._call("GET", "/metrics")
        if status != 200 or not isinstance(body, str):
            raise EngineUnreachable(f"the engine answers {status} to /metrics")
        try:
            newest = max(_INFO.finditer(body), key=lambda m: float(m["time"]), default=None)
            waiting = sum(float(value) for value in _WAITING.findall(body))
        except ValueError as error:
            raise EngineUnreachable("the engine's metrics are none") from error
        running: set[str] = set()
        for label in _RUNNING.findall(newest["labels"]) if newest is not None else ():
            parts = re.sub(r"\\(.)", r"\1", label).split(",")  # a name may hold commas: every run of parts may be one
            running |= {",".join(parts[a:b]) for a in range(len(parts)) for b in range(a + 1, len(parts) + 1)}
        return Requests(frozenset(running - {""}), waiting)

    async def unload(self, name: str) -> None:
        """Make the engine forget a name; one that it does not know is fine."""
        status, _ = await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise EngineUnreachable(f"the engine answers {status} to unload")

    async def reset_prefix_cache(self) -> None:
        """Make the engine forget what it computed. Only a vLLM in its development mode can."""
        status, _ = await self._call("POST", "/reset_prefix_cache")
        self.keeps_prefixes = status in (404, 405)
        if status != 200:
            raise EngineUnreachable(f"the engine answers {status} to reset_prefix_cache")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _call(self, method: str, path: str, body: object = None) -> tuple[int, object]:
        if self._session is None:
            self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout)
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                if response.content_type == "application/json":
                    return response.status, await response.json()
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EngineUnreachable(f"the engine cannot be asked: {type(error).__name__}") from error
