"""Complaints that are told once, though the set that has them is shown again and again."""

import logging
import time
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

AGAIN_S = 3600.0  # a complaint that still stands is told every hour, when a set is shown that has it
MAX_TOLD = 50  # in that time: entries that come, each wrong in its own way, fill no log; the metric counts all


class Told:
    """The complaints of one source that were told within AGAIN_S."""

    def __init__(self, who: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._who = who
        self._clock = clock
        self._told: dict[str, float] = {}  # complaint -> when; at most MAX_TOLD

    def tell(self, complaints: Iterable[str]) -> None:
        """Log those that were not told yet."""
        now = self._clock()
        self._told = {complaint: at for complaint, at in self._told.items() if now - at < AGAIN_S}
        for complaint in complaints:
            if complaint in self._told or len(self._told) >= MAX_TOLD:
                continue
            self._told[complaint] = now
            log.warning("%s: %s", self._who, complaint)
            if len(self._told) == MAX_TOLD:
                log.warning("%s: %d complaints in an hour; more are counted by lora_extproc_discovery_left_out alone", self._who, MAX_TOLD)
