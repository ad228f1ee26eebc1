"""What the engine works on, read from its metrics again and again while somebody wants to know: watchers that asked for its load, a drain. And who waits here
for an adapter, which the engine will work on next.

| what was read | how soon it is read again |
| --- | --- |
| requests run or wait, or will when their adapter is there | BUSY_S |
| none does | IDLE_S: the first to come is told that much later, and the router that sends it knows of it |
| the answer took `t` | not before `t / SHARE`: an engine that is slow to answer is asked less often |
| anything | MAX_S at the latest |

A reading is told when it differs by a step from what was told last, or when the next one may come more than MAX_S after that. To a single router every
change is told: it knows what it sends, so that what ends is all that it lacks. Of several, each lacks what the others send, which is more, and what they let
wait here: where most requests are for what no engine has, that is a quarter of what an engine computes.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from ...errors import EngineUnreachable
from .api import Engine, Work

log = logging.getLogger(__name__)

BUSY_S, IDLE_S, MAX_S = 0.25, 0.5, 2.0
SHARE = 0.02  # of the engine's time that its answers may take. A vLLM's client library needs 3 ms for the few series that tell the load
NAMES_S = 2.0  # between two questions after the names at work
NAMES_SHARE = 0.005  # of the engine's time: a vLLM that is up for weeks has thousands of series of names, and needs 30 ms for each thousand, in one piece
STEP, STEP_PART = 1.0, 0.05  # requests more or less, and as a part of those that were told, whichever is more: 1.5 words a second of 19 in flight, 2.9 without


@dataclass(frozen=True, slots=True)
class Reading:
    """`work` at the time `at`, the event loop's, when it was asked for; None: the engine could not be asked, or does not tell, or `is_gone`."""

    work: Work | None
    at: float
    is_gone: bool = False  # there is no engine that could have a request
    waits: Mapping[str, int] = field(default_factory=dict)  # calls that waited here for an adapter, by whose they were

    def held_by_others(self, holder: str) -> int:
        """How many of them are other holders' than that one. Who holds nothing sends nothing."""
        return sum(calls for whose, calls in self.waits.items() if whose not in ("", holder))


class Meter:
    """`tell()` is called when there is a reading to be told, `used(names)` with the names that were at work. `waits()` is who waits for an adapter."""

    def __init__(
        self, engine: Engine, tell: Callable[[], None], used: Callable[[Collection[str]], None], waits: Callable[[], Mapping[str, int]] = dict
    ) -> None:
        self._engine = engine
        self._tell = tell
        self._used = used
        self._waits = waits
        self.reading: Reading | None = None  # the latest; None: nobody wants to know, or nothing was read yet
        self.told: Reading | None = None  # the latest that was to be told
        self.every_s = 0.0  # until the next look, as of the last one
        self.wanting = 0  # those who want to know: routers, but for a drain
        self._names_due = float("-inf")
        self._task: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def wanted(self) -> Iterator[None]:
        """Keep `reading` current until the end of the block."""
        self.wanting += 1
        if self._task is None:
            self._task = asyncio.create_task(self._keep_reading(), name="engine load")
        try:
            yield
        finally:
            self.wanting -= 1
            if not self.wanting and self._task is not None:
                self._task.cancel()
                self._task = self.reading = self.told = None

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_reading(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            wants_names = began >= self._names_due
            try:
                self._take(await self._read(began, wants_names=wants_names) if self._engine.exists else Reading(None, began, is_gone=True))
            except Exception:  # whatever one answer stumbles over, the next must come
                log.exception("the engine's load")
            took_s = loop.time() - began
            if wants_names:
                self._names_due = began + max(NAMES_S, took_s / NAMES_SHARE)
            self.every_s = self._every_s(0.0 if wants_names else took_s)
            await asyncio.sleep(max(0.0, self.every_s - took_s))

    async def _read(self, now: float, *, wants_names: bool) -> Reading:
        try:
            work = await self._engine.work(adapters=wants_names)
        except EngineUnreachable as error:
            log.debug("the engine's load is not known: %s", error.message)
            return Reading(None, now, error.is_gone)
        self._used(work.adapters)
        return Reading(work, now, waits=self._waits())

    def _take(self, reading: Reading) -> None:
        self.reading, before = reading, self.told
        if before is None or is_step(before, reading, self.wanting) or (reading.work is not None and reading.at - before.at >= MAX_S - BUSY_S):
            self.told = reading
            self._tell()

    def _every_s(self, took_s: float) -> float:
        reading = self.reading
        is_busy = reading is not None and reading.work is not None and (reading.work.requests or reading.waits)
        usual_s = BUSY_S if is_busy else IDLE_S
        return min(MAX_S, max(usual_s, took_s / SHARE))


def is_step(before: Reading, now: Reading, routers: int) -> bool:
    """Whether what `routers` were told says too little of what is: the number of requests, that of calls which wait here, whether any request is queued,
    whether all this is known."""
    was, work = before.work, now.work
    if was is None or work is None:
        return was is not work
    changes = [abs(work.requests - was.requests)]
    if routers > 1:  # a single one knows what it lets wait
        changes.append(abs(sum(now.waits.values()) - sum(before.waits.values())))
    step = 0.0 if routers == 1 else max(STEP, STEP_PART * was.requests)
    return max(changes) > step or (work.waiting > 0) != (was.waiting > 0)
