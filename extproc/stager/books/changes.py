"""What watchers are told, numbered, so that one whose stream broke can be told what it missed."""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KEPT = 10_000  # the last changes; who missed more must start anew


@dataclass(frozen=True, slots=True)
class Change:
    """`kind` is "node", "published", "refreshed", "evicted", "refused", "space" or "demand"."""

    sequence: int
    kind: str
    adapter: str = ""


class Changes:
    """The last changes of this process, and who waits for the next."""

    def __init__(self) -> None:
        self.last = 0
        self._kept: deque[Change] = deque(maxlen=KEPT)
        self._watchers: set[asyncio.Queue[Change | None]] = set()

    def tell(self, kind: str, adapter: str = "") -> None:
        self.last += 1
        change = Change(self.last, kind, adapter)
        self._kept.append(change)
        for queue in list(self._watchers):
            try:
                queue.put_nowait(change)
            except asyncio.QueueFull:  # it does not read: let it come again, and start anew
                self._watchers.discard(queue)
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)

    @contextmanager
    def since(self, sequence: int) -> Iterator["tuple[asyncio.Queue[Change | None], bool]"]:
        """A queue of all changes after `sequence`, and whether it has all of them; if not, of those from now on. None in it: the watcher was too slow."""
        oldest = self._kept[0].sequence if self._kept else self.last + 1
        complete = oldest - 1 <= sequence <= self.last
        queue: asyncio.Queue[Change | None] = asyncio.Queue(2 * KEPT)
        for change in self._kept:
            if complete and change.sequence > sequence:
                queue.put_nowait(change)
        self._watchers.add(queue)
        try:
            yield queue, complete
        finally:
            self._watchers.discard(queue)
