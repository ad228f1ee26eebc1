"""Whose requests wait here for an adapter: what is fetched or loaded for them is sent to this node's engine when it is there.

A holder waits once for each adapter, however many of its requests do. A wait counts while it may soon be over: whoever waits for an origin that hangs
makes no node look busy to the routers. They count their own as long (core/load.py).
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import count

from ...core.load import HELD_S


class Waits:
    """Counts, by holder."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waits: dict[int, tuple[str, float]] = {}  # whose, and since when, in the order of that; as many as there are calls
        self._numbers = count()

    @contextlib.contextmanager
    def one(self, holder: str) -> Iterator[None]:
        """A call of `holder` waits until the end of the block."""
        number = next(self._numbers)
        self._waits[number] = holder, self._clock()
        try:
            yield
        finally:
            del self._waits[number]

    def now(self) -> Mapping[str, int]:
        """How many calls wait that count, by holder."""
        found, since = Counter[str](), self._clock() - HELD_S
        for holder, began in reversed(self._waits.values()):
            if began < since:
                break
            found[holder] += 1
        return found
