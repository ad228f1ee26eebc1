"""How long the event loop stands still, and for whom: everybody's requests wait while one callback runs."""

import asyncio
import logging
import time
from collections import deque

from ..metrics import RouterMetrics

log = logging.getLogger(__name__)

TICK_S = 0.02  # fifty wake-ups per second take a third of a percent of a core
TOLD_S = 0.1  # a stall of this length is logged
REMEMBERED = 16  # requests that were handled last


class Watchdog:
    """Measures each turn of the loop that a tick had to wait for."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._stalls = metrics.loop_stall
        self._handled: deque[str] = deque(maxlen=REMEMBERED)
        self.handles = self._handled.append  # to be called with the request's id for each of its messages
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._worst_s = 0.0
        metrics.loop_longest_stall.set_function(self._take_worst)

    def start(self) -> None:
        """Tick until `stop`."""
        self._wait()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self) -> None:
        self._due = time.monotonic() + TICK_S
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        late_s = max(0.0, time.monotonic() - self._due)
        self._stalls.observe(late_s)
        self._worst_s = max(self._worst_s, late_s)
        if late_s >= TOLD_S:
            ids = ", ".join(dict.fromkeys(id_[:64] for id_ in self._handled if id_)) or "none"
            log.warning("the event loop stood still for %.0f ms; requests handled meanwhile: %s", late_s * 1000, ids)
        self._handled.clear()
        self._wait()

    def _take_worst(self) -> float:
        worst, self._worst_s = self._worst_s, 0.0
        return worst
