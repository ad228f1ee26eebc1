"""Whether the engine can serve: its health, its end, its return, and what it has to be told again then."""

import asyncio
import logging
import time
from collections.abc import Callable

from ..errors import EngineUnreachable
from .changes import Changes
from .engine import Engine
from .loads import Loads
from .readiness import Readiness

log = logging.getLogger(__name__)

RECONNECT_S = 0.1  # to an engine that hung up, and is well
COMPARE_S = 5.0  # between two looks at what the engine knows; one that was restarted was away for longer, which is seen at once
CAUSE = "engine"  # of not being ready


class EngineKeeper:
    """Keeps the node's readiness true to the engine's. From `open` on its end is noticed at once; `check` sees everything else."""

    def __init__(self, engine: Engine, loads: Loads, readiness: Readiness, changes: Changes, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._loads = loads
        self._readiness = readiness
        self._changes = changes
        self._clock = clock
        self._next_comparison = 0.0
        self._watch: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Nothing may be sent here before the engine was asked."""
        if self._engine.exists:
            self._readiness.set(CAUSE, "the engine was not asked yet")
            self._watch = asyncio.create_task(self._notice_its_end(), name="engine")

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    @property
    def is_well(self) -> bool:
        """Whether it was, when it was last asked."""
        return CAUSE not in self._readiness

    async def check(self) -> None:
        """Its health; what it knows, when it comes back and now and then; what it says of itself."""
        if not self._engine.exists:
            return
        why = await self._engine.why_not_ready()
        if why is None:
            try:
                if not self.is_well or self._clock() >= self._next_comparison:
                    await self.compare()
                    self._next_comparison = self._clock() + COMPARE_S
            except EngineUnreachable as error:
                why = error.message
        self._readiness.set(CAUSE, why)

    async def compare(self) -> None:
        """An engine that was restarted knows nothing: what is in demand is loaded again before anybody is sent there, the rest when it is asked for."""
        lost = await self._loads.compare()
        if lost:
            log.warning("the engine has lost %d adapters", len(lost))
            self._readiness.set(CAUSE, "the engine was restarted, and loads what is in demand")
            for name in await self._loads.load_again(lost):
                self._changes.tell("evicted", name)  # no router may count on it
        await self._engine.learn_limits()

    async def _notice_its_end(self) -> None:
        """Until routers know, every request that they send here fails."""
        while True:
            if self.is_well:
                await self._engine.until_it_hangs_up()
                self._next_comparison = 0.0
                if (why := await self._engine.why_not_ready()) is not None:
                    self._readiness.set(CAUSE, why)
            await asyncio.sleep(RECONNECT_S)
