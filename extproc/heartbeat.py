"""When silence on a stream means that the other side hangs: a process that is stopped, or whose event loop is, keeps its connections open.

    messages ──► heard ── 2 heartbeats + 50 ms of silence ──► silent ── 6 heartbeats of silence, 1.5 s at least ──► Silence is raised
                   ▲                                            │
                   └────────────── any message ─────────────────┘

Time is the event loop's, so that a test can run this on a loop of its own.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

SILENT_AFTER = 2  # heartbeats: one may be late
SILENT_SLACK_S = 0.05
GONE_AFTER = 6  # heartbeats
GONE_AT_LEAST_S = 1.5  # a busy machine stops a process for a second
RESOLUTION_S = 0.001  # of the event loop's timers, which may be early by that
OVERSLEPT_S = 0.25  # a wait that takes so much longer than asked says that this process itself was stopped


@dataclass(frozen=True, slots=True)
class Silent:
    """Nothing has come for `seconds`, though something should have."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Heard:
    """After Silent, something has come again."""


class Silence(Exception):
    """Nothing has come for `seconds`: whoever should have sent it is taken for hung."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"silent for {seconds:.1f} s")
        self.seconds = seconds


@dataclass(slots=True)
class Heartbeat:
    """How often the other side says something, in seconds. 0: it need not, and silence proves nothing."""

    every_s: float

    @property
    def silent_s(self) -> float:
        return SILENT_AFTER * self.every_s + SILENT_SLACK_S

    @property
    def gone_s(self) -> float:
        return max(GONE_AFTER * self.every_s, GONE_AT_LEAST_S, self.silent_s)


class Listener(Generic[T]):
    """Reads messages with `read` until it returns None. `beat.every_s` may be changed between two messages."""

    def __init__(self, read: Callable[[], Awaitable[T | None]], beat: Heartbeat) -> None:
        self._read = read
        self._beat = beat

    async def listen(self) -> AsyncGenerator[T | Silent | Heard, None]:
        """Every message; Silent once and Heard in between, where it is silent meanwhile. Raises Silence.

        A read is never cancelled because of the time, since gRPC ends the whole call with it.
        """
        while True:
            reading = asyncio.ensure_future(self._read())
            try:
                if silent_s := await self._silence(reading, self._beat.silent_s, 0.0):
                    yield Silent(silent_s)
                    if gone_s := await self._silence(reading, self._beat.gone_s, silent_s):
                        raise Silence(gone_s)
                message = await reading
            finally:
                if not reading.done():
                    reading.cancel()
                    await asyncio.wait({reading})  # only then may its stream be closed
            if message is None:
                return
            if silent_s:
                yield Heard()
            yield message

    async def _silence(self, reading: "asyncio.Future[T | None]", limit_s: float, waited_s: float) -> float:
        """Wait for the read, until `limit_s` of silence; how long it was, or 0 if the read has ended.

        What passes while this process itself is stopped does not count: the other side may have spoken meanwhile, and nobody listened.
        """
        loop = asyncio.get_running_loop()
        while limit_s - waited_s > RESOLUTION_S:
            began = loop.time()
            await asyncio.wait({reading}, timeout=limit_s - waited_s if self._beat.every_s else None)
            if reading.done():
                return 0.0
            took_s = loop.time() - began
            waited_s = waited_s + took_s if took_s < limit_s - waited_s + OVERSLEPT_S else 0.0
        return waited_s
