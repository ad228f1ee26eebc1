"""The model server on this node, as far as the stager needs it: is it well, what does it know by name, load this, forget that.

What is concluded from its answers is in this file (vLLM) and in `sglang.py`; everybody else sees `Engine`.
"""

import asyncio
import contextlib
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import aiohttp
import msgspec

from ...config.stager import EngineSettings
from ...core.artifact import MAX_NAME_BYTES, VERSION_DIGITS, VERSION_MARK, split_version
from ...errors import EngineUnreachable, InvalidAdapter, shortened
from .listed import BaseCard, Known, read_list

log = logging.getLogger(__name__)

T = TypeVar("T")

RUNNING, WAITING, ADAPTERS = "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:lora_requests_info"
KV_USAGE, OLD_KV_USAGE = "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"  # as vLLM called it up to 0.10
_INFO = re.compile(rf"^{ADAPTERS}\{{(?P<labels>.*)\}} (?P<time>\S+)$", re.MULTILINE)
_RUNNING = re.compile(r'(?:running|waiting)_lora_adapters="((?:[^"\\]|\\.)*)"')
_MAX_LORAS = re.compile(r'max_lora="(\d+)"')
MAX_COMMAS = 2  # in a name that is looked for each time the engine's work is read; a removal looks for names with any number of them
LARGE_METRICS = 128 * 2**10  # characters, searched in about a millisecond
MAX_VERSION_CHARACTERS = 50  # real ones have some twenty
LONGEST_NAME = MAX_NAME_BYTES + len(VERSION_MARK) + VERSION_DIGITS  # characters of what we let an engine know
JSON = "application/json"
_NO_SUCH_NAME = "/"  # no adapter can be called so
# In what an engine says of a load that failed: the machine it runs on has failed it, as torch and its drivers, Python and Rust word that
_MACHINE_FAILED = re.compile(r"out of memory|cannot allocate memory|\b(?:CUDA|HIP|NCCL) error|\[Errno \d+\]|\(os error \d+\)|permission denied", re.IGNORECASE)
RUNTIME_UPDATING_IS_OFF = "the engine takes no adapters at run time: it needs VLLM_ALLOW_RUNTIME_LORA_UPDATING=true"


@dataclass(frozen=True, slots=True)
class Requests:
    """What the engine works on at one moment."""

    running: frozenset[str]  # names of adapters with requests at work, and more where a name may hold a comma
    waiting: float  # requests in its queue, of whatever adapter: those that wait for a slot are in no label
    versions: frozenset[str] = field(init=False)  # of the names that are versions, the digits: each of many artifacts is looked for among them
    has_plain: bool = field(init=False)  # whether any other name is among them

    def __post_init__(self) -> None:
        versions = [version for name in self.running if (version := split_version(name)) is not None]
        object.__setattr__(self, "versions", frozenset(digits for _, digits in versions))
        object.__setattr__(self, "has_plain", len(versions) < len(self.running))


@dataclass(frozen=True, slots=True)
class Work:
    """What the engine works on at one moment, all its ranks together."""

    running: float  # requests that it computes
    waiting: float  # requests in its queue
    kv_usage: float  # part of its KV cache that is in use, 0 to 1: the mean of its ranks
    adapters: frozenset[str] = frozenset()  # names with requests at work, where they were asked for, and parts of names that hold a comma

    @property
    def requests(self) -> float:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class Limits:
    """How many adapters it runs at once, keeps in memory, and of what rank. 0: not known."""

    max_loras: int = 0
    max_cpu_loras: int = 0
    max_lora_rank: int = 0


class Engine:
    """vLLM's HTTP API. Every method raises EngineUnreachable when the answer is not certain."""

    unload_waits = False  # whether `unload` returns only when no request uses the adapter any more
    unload_frees = False  # whether it frees the adapter's place in memory; a vLLM forgets the name only

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._url = settings.url.rstrip("/")
        self._timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._loading = asyncio.Semaphore(settings.max_loads)
        self.limits = Limits(settings.max_loras, settings.max_cpu_loras or settings.max_loras, settings.max_lora_rank)
        self.bases: tuple[BaseCard, ...] = ()  # as it listed them last
        self.version = ""  # as it says itself; "": not known
        self._says_version = True  # until it was asked
        self.keeps_prefixes = False  # it was asked to clear its prefix cache and knows no way to
        self._chooses_metrics = True  # until it says that it knows no path that gives some of its metrics
        self._can_sleep = True  # until it says that it knows no such path
        self._takes_adapters: bool | None = None  # None: not asked since it came back

    @property
    def exists(self) -> bool:
        """Whether any engine reads this directory."""
        return bool(self._url)

    @property
    def loads(self) -> bool:
        """Whether adapters are loaded by us, before a request comes, and not by the engine's own resolver when it has come."""
        return self.exists and self._settings.mode == "api"

    def request_model(self, name: str) -> str:
        """What a request's `model` must be to be answered by the adapter that is loaded as `name`."""
        return name

    async def why_not_ready(self) -> str | None:
        """Why it can serve nothing now: it refused the connection, did not answer, answered that it is not well, sleeps; None if it can."""
        try:
            status, _ = await self._call("GET", "/health", timeout_s=self._settings.health_timeout_s)
            if status != 200:
                raise EngineUnreachable(f"the engine answers {status} to /health")
            if self._can_sleep and await self._is_sleeping():
                return "the engine sleeps"
            if self.loads and not await self._may_load():
                return RUNTIME_UPDATING_IS_OFF
        except EngineUnreachable as error:
            self.keeps_prefixes, self._can_sleep, self._takes_adapters = False, True, None  # it may come back with other settings
            self._says_version = self._chooses_metrics = True  # or as another version
            return error.message
        return None

    async def until_it_hangs_up(self) -> None:
        """Hold a connection and say nothing. A process that dies closes it at once; the next look at its health may be a second away."""
        address = urlsplit(self._url)
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(address.hostname, address.port or (443 if address.scheme == "https" else 80))
            try:
                while await reader.read(4096):
                    pass
            finally:
                writer.close()

    async def known(self) -> Known:
        """What it resolves without looking at the disk first, with the directory of each adapter; it may read their files at any time."""
        status, _, body = await self._ask("GET", "/v1/models")
        if status != 200:
            raise EngineUnreachable(f"the engine answers {status} to /v1/models")
        try:
            known = await read_list(body)
        except msgspec.DecodeError as error:
            raise EngineUnreachable("the engine's list of models is none") from error
        self.bases = known.bases
        return known

    async def requests(self) -> Requests:
        """Of the series of vllm:lora_requests_info the newest, since old ones are never removed; and the length of the queue."""
        return await self._read(_requests, ADAPTERS, WAITING)

    async def work(self, *, adapters: bool = False) -> Work:
        """What it works on; with `adapters` also by which names. To be asked often: only the series that tell are asked for, where the server can choose."""
        return await self._read(_work, RUNNING, WAITING, KV_USAGE, OLD_KV_USAGE, *([ADAPTERS] if adapters else []))

    async def learn_limits(self) -> None:
        """Fill in what the settings do not say and the engine does: its metrics name max_loras once an adapter has run, and nothing else."""
        if not self.limits.max_loras and (found := _MAX_LORAS.search(await self._metrics(ADAPTERS, WAITING))):
            slots = int(found[1])
            self.limits = Limits(slots, self.limits.max_cpu_loras, self.limits.max_lora_rank)
        if self._says_version:
            status, body = await self._call("GET", "/version")
            told = body.get("version") if status == 200 and isinstance(body, dict) else ""
            self.version, self._says_version = str(told)[:MAX_VERSION_CHARACTERS], False

    async def load(self, name: str, directory: Path, options: Mapping[str, bool] | None = None) -> None:
        """Let it know the adapter in `directory` as `name`. Knows it already is fine. Raises InvalidAdapter with what it has against the adapter.

        `options` go into the call as they are: what the adapter's layout asks for (`features.load_options`).
        """
        async with self._loading:
            status, body = await self._call(
                "POST", "/v1/load_lora_adapter", {**(options or {}), "lora_name": name, "lora_path": str(directory)}, self._settings.load_timeout_s
            )
            said = _said(body)
            if status == 200:
                return
            if status == 400 and "already been loaded" in said:
                await self._check_loaded(name, directory)
                return
            await self._refused(status, said, directory)

    async def _check_loaded(self, name: str, directory: Path) -> None:
        """It knows the name already: from there, as after a load whose answer was lost, or from elsewhere, which is somebody else's."""
        if (await self.known()).adapters.get(name) != str(directory):
            raise EngineUnreachable(f"the engine knows something else as {name}")

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

    async def _refused(self, status: int, said: str, directory: Path) -> None:
        """A load that failed: is it the adapter's fault? A dying engine, or one without memory, answers 500 too, and one that does not see the directory 404."""
        if status in (400, 500) and await self.why_not_ready() is None:
            reason = " ".join(said.replace(str(directory), "<path>").split())
            if _MACHINE_FAILED.search(reason):
                raise EngineUnreachable(shortened(f"the engine cannot load the adapter now: {reason}"))
            raise InvalidAdapter(f"the engine refuses the adapter: {reason or f'it answers {status}'}", "engine")
        if status == 404 and "No adapter found" in said:
            raise EngineUnreachable("the engine does not find the adapter's directory: it must see this node's directory under the same path")
        raise EngineUnreachable(f"the engine answers {status} to a load")

    async def _is_sleeping(self) -> bool:
        """Only a vLLM in its development mode can be put to sleep, and tells it."""
        status, body = await self._call("GET", "/is_sleeping", timeout_s=self._settings.health_timeout_s)
        self._can_sleep = status != 404
        return status == 200 and isinstance(body, dict) and body.get("is_sleeping") is True

    async def _may_load(self) -> bool:
        """Of a path that it has not got it says `detail`, of a name that it does not know `error`."""
        if not self._takes_adapters:
            status, body = await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": _NO_SUCH_NAME}, self._settings.health_timeout_s)
            self._takes_adapters = not (status == 404 and isinstance(body, dict) and "detail" in body)
        return self._takes_adapters

    async def _read(self, read: Callable[[str], T], *names: str) -> T:
        """What `read` finds in the metrics of these names."""
        metrics = await self._metrics(*names)
        try:  # a thread gives way between two series, of which an engine that is up for weeks has thousands
            return await asyncio.to_thread(read, metrics) if len(metrics) > LARGE_METRICS else read(metrics)
        except ValueError as error:
            raise EngineUnreachable("the engine's metrics are none") from error

    async def _metrics(self, *names: str) -> str:
        """The metrics of these names, of which every engine has some at any time; all others with them where the server cannot choose.

        vLLM's `/metrics` always gives all. Its `/metrics/` leads to the client library's own server, which gives those that `name[]` names.
        """
        status, content_type, body = 0, "", b""
        if self._chooses_metrics:
            query = urlencode([("name[]", name) for name in names])
            status, content_type, body = await self._ask("GET", f"/metrics/?{query}")
            self._chooses_metrics = status not in (404, 405) and (status != 200 or any(f"\n{name}".encode() in b"\n" + body for name in names))
        if not self._chooses_metrics:
            status, content_type, body = await self._ask("GET", "/metrics")
        if status != 200 or content_type == JSON:
            raise EngineUnreachable(f"the engine answers {status} to /metrics")
        return body.decode(errors="replace")

    def _api_key(self) -> str:
        """The file is read anew each time, so that the key may be rotated."""
        if self._settings.api_key_file:
            try:
                return Path(self._settings.api_key_file).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise EngineUnreachable(f"stager.engine.api_key_file cannot be read: {type(error).__name__}") from error
        return os.environ.get(self._settings.api_key_env, "") if self._settings.api_key_env else ""

    async def _call(self, method: str, path: str, body: object = None, timeout_s: float = 0.0) -> tuple[int, Any]:
        """Status and body of a short answer: the value that JSON stands for, else text."""
        status, content_type, answer = await self._ask(method, path, body, timeout_s)
        if content_type != JSON:
            return status, answer.decode(errors="replace")
        try:
            return status, msgspec.json.decode(answer)
        except msgspec.DecodeError as error:
            raise EngineUnreachable(f"the engine broke off its answer to {path}: {type(error).__name__}") from error

    async def _ask(self, method: str, path: str, body: object = None, timeout_s: float = 0.0) -> tuple[int, str, bytes]:
        """Status, content type and body of an answer."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        key = self._api_key()
        headers = {"authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=timeout_s) if timeout_s else self._timeout
        try:
            async with self._session.request(method, self._url + path, json=body, headers=headers, timeout=timeout) as response:
                return response.status, response.content_type, await response.read()
        except TimeoutError as error:
            raise EngineUnreachable(f"the engine did not answer {path} within {timeout.total:g} s") from error
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            why = EngineUnreachable("the engine refused the connection" if refused else f"the engine cannot be reached: {error.os_error.strerror}")
            why.is_gone = refused
            raise why from error
        except (aiohttp.ClientError, ValueError) as error:
            raise EngineUnreachable(f"the engine broke off its answer to {path}: {type(error).__name__}") from error


def values(metrics: str, name: str) -> list[float]:
    """Of all series of that name, in Prometheus' text format, the values. Raises ValueError."""
    return [float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)]


def total(found: Collection[float]) -> float:
    """Of numbers of requests. Raises ValueError if one is none: routers compare engines by them, and one that is not a number would spoil the mean of all."""
    if not all(0 <= value < math.inf for value in found):
        raise ValueError("a number of requests is none")
    return sum(found)


def mean(found: Collection[float]) -> float:
    """Of shares, which are only shown. What is no number is left out."""
    usable = [value for value in found if 0 <= value < math.inf]
    return sum(usable) / max(1, len(usable))


def _requests(metrics: str) -> Requests:
    """What the engine's metrics say of its requests. Raises ValueError."""
    return Requests(_at_work(metrics), total(values(metrics, WAITING)))


def _work(metrics: str) -> Work:
    """The same with its load, and no name that holds more than MAX_COMMAS: so many names would be looked for as requests run, squared."""
    usage = values(metrics, KV_USAGE) or values(metrics, OLD_KV_USAGE)
    running = values(metrics, RUNNING)
    if not running:
        raise ValueError("no series says how many requests run")
    return Work(total(running), total(values(metrics, WAITING)), mean(usage), _at_work(metrics, 1 + MAX_COMMAS))


def _at_work(metrics: str, longest: int | None = None) -> frozenset[str]:
    """Names of adapters with requests at work. A name may hold commas, as the list of them does: every run of its parts may be one, `longest` at most."""
    newest = max(_INFO.finditer(metrics), key=lambda m: float(m["time"]), default=None)
    names: set[str] = set()
    for label in _RUNNING.findall(newest["labels"]) if newest is not None else ():
        names.update(_names(re.sub(r"\\(.)", r"\1", label).split(","), longest))
    return frozenset(names - {""})


def _names(parts: Sequence[str], longest: int | None) -> Iterator[str]:
    """What may be a name in a list of names that was split at its commas: a name may hold commas, so every run of parts, up to the longest that a name
    of ours can be. Without that end the names of 400 adapters at work would become half a gigabyte.
    """
    for first, part in enumerate(parts):
        yield part
        length = len(part)
        for last in range(first + 1, min(len(parts), first + longest if longest else len(parts))):
            length += 1 + len(parts[last])
            if length > LONGEST_NAME:
                break
            yield ",".join(parts[first : last + 1])


def _said(body: Any) -> str:
    """An error's text, however it is wrapped."""
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message", "")) if isinstance(error, dict) else body if isinstance(body, str) else ""
