"""Which artifacts are leased, counted as leases come and end: the question how many are costs what has ended since, and not what is on the disk.

Every leased artifact stands in a heap with a time at which its last lease cannot have ended before. When that time is over it is looked at: it has been
leased anew meanwhile, and stands in the heap with its new end, or it is leased no longer. So a warm request, which leases again, changes nothing here.
"""

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

SLACK = 64  # outdated places in the heap beyond one per leased artifact, before it is made anew

Id = TypeVar("Id", bound=str)


class Demand(Generic[Id]):
    """The leased ones of an index. At most what is on disk, and as many outdated places as there are others."""

    def __init__(self) -> None:
        self._ends: dict[Id, float] = {}  # -> when it is looked at next
        self._by_end: list[tuple[float, Id]] = []  # the same as a heap; what differs from `_ends` is outdated

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, id_: Id) -> bool:
        return id_ in self._ends

    def __iter__(self) -> Iterator[Id]:
        return iter(self._ends)

    def add(self, id_: Id, until: float) -> None:
        """Its last lease ends at `until`, or later if it is leased again."""
        self._ends[id_] = until
        heappush(self._by_end, (until, id_))
        if len(self._by_end) > 2 * len(self._ends) + SLACK:
            self._by_end = [(end, other) for other, end in self._ends.items()]
            heapify(self._by_end)

    def shorten(self, id_: Id, until: float) -> None:
        """A lease was given back, and the last of the others ends at `until`."""
        if until < self._ends.get(id_, until):
            self.add(id_, until)

    def drop(self, id_: Id) -> None:
        """It is leased no longer."""
        self._ends.pop(id_, None)

    def end(self, now: float, leased_until: Callable[[Id], float]) -> Iterator[Id]:
        """Those that are leased no longer at `now`, and were at the last call."""
        while self._by_end and self._by_end[0][0] <= now:
            end, id_ = heappop(self._by_end)
            if self._ends.get(id_) != end:
                continue
            if (until := leased_until(id_)) > now:
                self.add(id_, until)
            else:
                del self._ends[id_]
                yield id_
