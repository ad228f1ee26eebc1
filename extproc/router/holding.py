"""How much may be held: requests that wait, in all and per adapter, and bytes of bodies."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import Overloaded
from ..metrics import RouterMetrics


class Holding:
    """Counts and limits. Not for concurrent use; nothing here waits."""

    def __init__(self, metrics: RouterMetrics, *, max_waiting: int, max_waiting_per_adapter: int, max_bytes: int) -> None:
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._max_waiting_per_adapter = max_waiting_per_adapter
        self._max_bytes = max_bytes
        self._waiting: Counter[str] = Counter()
        self._total = 0
        self._bytes = 0
        metrics.held.set_function(lambda: self._total)
        metrics.held_bytes.set_function(lambda: self._bytes)

    @contextmanager
    def waiting(self, adapter: str) -> Iterator[None]:
        """Take a place among those that wait for `adapter`. Raises Overloaded if there is none."""
        if self._total >= self._max_waiting:
            raise Overloaded(f"{self._total} requests wait for adapters; the limit is {self._max_waiting}")
        before = self._waiting[adapter]
        if before >= self._max_waiting_per_adapter:
            raise Overloaded(f"{before} requests wait for {adapter}; the limit is {self._max_waiting_per_adapter}")
        self._metrics.queue_position.observe(before)
        self._waiting[adapter] += 1
        self._total += 1
        try:
            yield
        finally:
            self._total -= 1
            self._waiting[adapter] -= 1
            if not self._waiting[adapter]:
                del self._waiting[adapter]

    def change_bytes(self, by: int) -> bool:
        """Count bytes that bodies hold; False if that is over the limit now."""
        self._bytes += by
        return self._bytes <= self._max_bytes or by <= 0

    def too_many_bytes(self) -> Overloaded:
        """The error to answer with when `change_bytes` says so."""
        return Overloaded(f"request bodies take over {self._max_bytes} bytes together")
