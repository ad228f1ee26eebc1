"""The load of a case and its record: an open loop that sends when it is time, whatever came of the requests before."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import aiohttp

from extproc.up.demo import BASE_MODEL

from .origin import Origin

RETRY_AFTER_S = 0.5  # what fails is asked once more after this
CLIENT_TIMEOUT_S = 90.0  # longer than anything promised; a request that meets it has failed
WARM_UP_S = 60.0
REASON_HEADER = "x-lora-extproc-reason"
LATE_S = 0.05  # the bystander counts a stop from here on
_LOOK_EVERY_S = 0.01


class Kind(StrEnum):
    """`own`: sent by a case's script, which judges the answer itself; only that its weights are right is asked of it, too."""

    WARM, COLD, BASE, OWN = "warm", "cold", "base", "own"


SERVED = (Kind.WARM, Kind.COLD, Kind.BASE)


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests per second of each kind."""

    warm: float = 40.0
    cold: float = 1.0
    base: float = 4.0
    warm_names: int = 8


@dataclass(slots=True)
class Request:
    """One request as its client saw it. Times are the loop's, in seconds."""

    kind: Kind
    model: str
    began: float
    ended: float = 0.0
    status: int = 0  # 0: no answer
    reason: str = ""  # of an error: the header, else the body's code, else what went wrong with the connection
    version: int | None = None  # which content of its name answered
    wrong: bool = False  # a 200 whose weights never lay under that name
    again: "Request | None" = None  # the same a little later, if this one failed

    @property
    def failed(self) -> bool:
        return self.status != 200 or self.wrong

    @property
    def failed_twice(self) -> bool:
        return self.failed and (self.again is None or self.again.failed)


class Client:
    """Sends chat requests and looks at whose weights answered."""

    def __init__(self, address: str, origin: Origin) -> None:
        self._url = f"http://{address}/v1/chat/completions"
        self._origin = origin
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=CLIENT_TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0))

    async def close(self) -> None:
        await self._session.close()

    async def ask(self, kind: Kind, model: str, headers: Mapping[str, str] | None = None) -> Request:
        """One request. Whatever goes wrong is in the record, never raised."""
        request = Request(kind, model, time.monotonic())
        body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}]}).encode()
        try:
            async with self._session.post(self._url, data=body, headers={"content-type": "application/json", **(headers or {})}) as response:
                judge(request, response.status, response.headers, await response.read(), self._origin)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            request.reason = type(error).__name__
        request.ended = time.monotonic()
        return request


def judge(request: Request, status: int, headers: Mapping[str, str], body: bytes, origin: Origin) -> None:
    """Enter an answer into the record."""
    request.status = status
    try:
        shown = json.loads(body)
    except ValueError:
        shown = None
    shown = shown if isinstance(shown, dict) else {}
    if status == 200:
        request.version = origin.version(request.model, str(shown.get("system_fingerprint")))
        request.wrong = request.version is None
    else:
        error = shown.get("error")
        request.reason = headers.get(REASON_HEADER) or (str(error.get("code")) if isinstance(error, dict) else "no reason")


class Load:
    """Warm, cold and base-model requests while the block runs; what was sent is waited for at its end."""

    def __init__(self, client: Client, origin: Origin, rates: Rates) -> None:
        self._client = client
        self._origin = origin
        self._rates = rates
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: list[Exception] = []
        self._cold = 0
        self.warm = tuple(f"warm/{number}" for number in range(rates.warm_names))
        self.requests: list[Request] = []

    async def warm_up(self, answered: Callable[[], Awaitable[Sequence[float]]]) -> None:
        """Put the warm adapters where they belong, and have each router lease them; `answered`: how many requests each has. Raises RuntimeError if that does
        not come about.

        Envoy asks the routers in turn, and the load asks for the names in turn: where both are in step, one router alone is asked for a name, for seconds. The
        other one would be the first to need a lease when no stager is there to give it one.
        """
        for name in self.warm:
            await self._origin.put(name)
        await asyncio.gather(*(self._until_served(model) for model in (*self.warm, BASE_MODEL)))
        for name in self.warm:
            await until_each_answered(partial(self._until_served, name), answered)

    async def _until_served(self, model: str) -> None:
        deadline = time.monotonic() + WARM_UP_S
        while (request := await self._client.ask(Kind.OWN, model)).failed:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{model} is not served after {WARM_UP_S:g} s: {request.status} {request.reason}")
            await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        senders = [
            asyncio.create_task(self._send(self._rates.warm, lambda number: self._ask(Kind.WARM, self.warm[number % len(self.warm)]))),
            asyncio.create_task(self._send(self._rates.base, lambda _number: self._ask(Kind.BASE, BASE_MODEL))),
            asyncio.create_task(self._send(self._rates.cold, lambda _number: self._ask_cold())),
        ]
        try:
            yield
        finally:
            for sender in senders:
                sender.cancel()
            self._errors += [result for result in await asyncio.gather(*senders, return_exceptions=True) if isinstance(result, Exception)]
            try:
                await asyncio.gather(*self._tasks)
            finally:
                for task in self._tasks:
                    task.cancel()
        if self._errors:  # ours: what goes wrong with a request is in its record
            raise self._errors[0]

    async def _send(self, rate: float, ask: Callable[[int], Coroutine[Any, Any, None]]) -> None:
        began = time.monotonic()
        for number in range(int(rate * 3600)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            task = asyncio.create_task(ask(number))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._errors.append(error)

    async def _ask_cold(self) -> None:
        self._cold += 1
        name = f"cold/{self._cold}"
        await self._origin.put(name)
        await self._ask(Kind.COLD, name)

    async def _ask(self, kind: Kind, model: str) -> None:
        request = await self._client.ask(kind, model)
        self.requests.append(request)
        if request.failed:
            await asyncio.sleep(RETRY_AFTER_S)
            request.again = await self._client.ask(kind, model)

    async def ask(self, model: str, headers: Mapping[str, str] | None = None) -> Request:
        """One of the script's own."""
        request = await self._client.ask(Kind.OWN, model, headers)
        self.requests.append(request)
        return request


async def until_each_answered(ask: Callable[[], Awaitable[None]], answered: Callable[[], Awaitable[Sequence[float]]]) -> None:
    """Ask until each router has answered once; by which one a request was is told by their counts alone, which may come after the answer."""
    before = now = await answered()
    asked = 0
    while any(count <= was for count, was in zip(now, before, strict=True)):
        await ask()
        asked += 1
        while sum(now := await answered()) < sum(before) + asked:
            await asyncio.sleep(_LOOK_EVERY_S)


@dataclass
class Bystander:
    """A thread that does nothing but look at the clock: when it comes late, this process or the whole machine stood still, and not the product."""

    stops: list[tuple[float, float]] = field(default_factory=list)

    @contextlib.contextmanager
    def looking(self) -> Any:
        over = threading.Event()
        thread = threading.Thread(target=self._look, args=(over,), name="bystander", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _look(self, over: threading.Event) -> None:
        while not over.is_set():
            began = time.monotonic()
            time.sleep(_LOOK_EVERY_S)
            ended = time.monotonic()
            if ended - began - _LOOK_EVERY_S > LATE_S:
                self.stops.append((began, ended))

    def stopped_s(self, began: float, ended: float) -> float:
        """How much of that time was lost to stops."""
        return sum(max(0.0, min(ended, end) - max(began, begin)) for begin, end in self.stops)
