"""Whether the engine can serve: its health, its end, its return, and what it has to be told again then."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from ...errors import EngineUnreachable
from ..books.changes import Changes
from ..books.readiness import Readiness
from .api import Engine
from .names import Loads

log = logging.getLogger(__name__)

HEALTH_S = 1.0  # between two questions after its health; they run apart from everything else, since an engine may hang in any other call
RECONNECT_S = 0.1  # to an engine that hung up, and is well
COMPARE_S = 5.0  # between two looks at what the engine knows; one that was restarted was away for longer, which is seen at once
FIRST_S = 2.0  # that a start waits for the engine's first answers
CAUSE = "engine"  # of not being ready
NOT_ASKED = "the engine was not asked yet"


class EngineKeeper:
    """Keeps the node's readiness true to the engine's. From `open` on it asks by itself, and notices the engine's end at once.

    | the engine's health | what it knows | the node |
    | --- | --- | --- |
    | not well | - | not ready, for the reason that the question brought |
    | well again | is being compared | not ready, for the reason before |
    | well | was compared | ready |
    | well | is compared again, every COMPARE_S | ready, unless the comparison fails |
    """

    def __init__(self, engine: Engine, loads: Loads, readiness: Readiness, changes: Changes, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._loads = loads
        self._readiness = readiness
        self._changes = changes
        self._clock = clock
        self._next_comparison = 0.0
        self._told = asyncio.Event()  # the readiness says what the engine does
        self._why: str | None = NOT_ASKED  # what its health said last
        self._well_at: float | None = None  # when its health was last good; None: not since the start
        self._ill_since: float | None = None  # None: it is well
        self._comparing: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        """Nothing may be sent here before the engine was asked. Waits for what it says, at most FIRST_S: to a router that hears "not asked yet" of a
        stager that was started again, the node is down, though its engine has answered all the time.
        """
        if self._engine.exists:
            self._readiness.set(CAUSE, NOT_ASKED)
            self._tasks = [asyncio.create_task(self._ask_again(), name="engine health"), asyncio.create_task(self._notice_its_end(), name="engine")]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_S):
                    await self._told.wait()

    async def close(self) -> None:
        tasks = [*self._tasks, *([self._comparing] if self._comparing is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def is_well(self) -> bool:
        """Whether it was, when it was last asked."""
        return CAUSE not in self._readiness

    async def _ask_again(self) -> None:
        """Every second, also while an answer or a comparison is slow."""
        while True:
            began = time.monotonic()
            try:
                self._heard(await self._engine.why_not_ready())
            except Exception:  # whatever one question stumbles over, the next must come
                log.exception("engine health")
            await asyncio.sleep(max(0.0, HEALTH_S - (time.monotonic() - began)))

    def _heard(self, why: str | None) -> None:
        """What its health says now. Well again, it has to be compared before anybody is sent there."""
        self._why = why
        if why is not None:
            if self._ill_since is None:
                self._ill_since = self._clock() if self._well_at is None else self._well_at
                since = "not since the start" if self._well_at is None else f"{self._clock() - self._well_at:.1f} s ago"
                log.warning("%s; it was last well %s", why, since)
            self._readiness.set(CAUSE, why)
            self._told.set()
            return
        self._well_at = self._clock()
        is_due = not self.is_well or self._clock() >= self._next_comparison
        if is_due and (self._comparing is None or self._comparing.done()):
            self._comparing = asyncio.create_task(self._compare(), name="engine names")

    async def _compare(self) -> None:
        """Compare, and let the node be ready if the engine still is well then."""
        try:
            await self.compare()
        except EngineUnreachable as error:
            self._readiness.set(CAUSE, error.message)
            return
        except Exception:  # the next comparison must come
            log.exception("what the engine knows")
            return
        self._next_comparison = self._clock() + COMPARE_S
        if self._why is None:
            if self._ill_since is not None:
                log.info("the engine is well again after %.1f s", self._clock() - self._ill_since)
                self._ill_since = None
            self._readiness.set(CAUSE, None)
            self._told.set()

    async def compare(self) -> None:
        """An engine that was restarted knows nothing: what is in demand is loaded again before anybody is sent there, the rest when it is asked for."""
        lost = await self._loads.compare()
        if lost:
            log.warning("the engine has lost %d adapters", len(lost))
            self._readiness.set(CAUSE, "the engine was restarted, and loads what is in demand")
            for name in await self._loads.load_again(lost):
                self._changes.tell("evicted", name)  # no router may count on it
        await self._engine.learn_limits()
        self._loads.trim()

    async def _notice_its_end(self) -> None:
        """Until routers know, every request that they send here fails."""
        while True:
            if self.is_well:
                await self._engine.until_it_hangs_up()
                self._next_comparison = 0.0
                if (why := await self._engine.why_not_ready()) is not None:
                    self._heard(why)
            await asyncio.sleep(RECONNECT_S)
