"""What watchers are told, numbered, so that one whose stream broke can be told what it missed."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KEPT = 10_000  # the last changes; who missed more must start anew


@dataclass(frozen=True, slots=True)
class Change:
    """`kind` is "node", "published", "refreshed", "evicted", "refused", "loaded", "unloaded", "space" or "demand"; of what passes, "load" or "woken", and `sequence` is 0."""

    sequence: int
    kind: str
    adapter: str = ""


class Changes:
    """The last changes of this process, and who waits for the next."""

    def __init__(self) -> None:
        self.last = 0
        self._kept: deque[Change] = deque(maxlen=KEPT)
        self._watchers: set[asyncio.Queue[Change | None]] = set()
        self._follow_wakes: set[asyncio.Queue[Change | None]] = set()  # of the watchers, who want them
        self._heard: Callable[[str, str], None] | None = None

    def follow(self, heard: Callable[[str, str], None]) -> None:
        """Call `heard(kind, adapter)` within each `tell`. There is one follower at most, the book of copies."""
        self._heard = heard

    def tell(self, kind: str, adapter: str = "") -> None:
        self.last += 1
        change = Change(self.last, kind, adapter)
        self._kept.append(change)
        self._give(change)
        if self._heard is not None:
            self._heard(kind, adapter)

    def mention(self, kind: str) -> None:
        """Wake the watchers for a value of which only the latest counts. It is no change: who is awake already looks at the value by itself."""
        for queue in self._watchers:
            if queue.empty():
                queue.put_nowait(Change(0, kind))

    def woken(self, adapter: str) -> None:
        """Tell who wants to know that a request asks for what nobody leased. It is no change: whoever misses it has missed nothing that stays."""
        for queue in self._follow_wakes:
            if queue.qsize() < KEPT:  # the rest of its room is for changes
                queue.put_nowait(Change(0, "woken", adapter))

    def _give(self, change: Change) -> None:
        for queue in list(self._watchers):
            try:
                queue.put_nowait(change)
            except asyncio.QueueFull:  # it does not read: let it come again, and start anew
                self._watchers.discard(queue)
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(None)

    @contextmanager
    def since(self, sequence: int, *, wakes: bool = False) -> Iterator["tuple[asyncio.Queue[Change | None], bool]"]:
        """A queue of all changes after `sequence`, and whether it has all of them; if not, of those from now on. None in it: the watcher was too slow.
        With `wakes` it is told of those, too."""
        oldest = self._kept[0].sequence if self._kept else self.last + 1
        complete = oldest - 1 <= sequence <= self.last
        queue: asyncio.Queue[Change | None] = asyncio.Queue(2 * KEPT)
        for change in self._kept:
            if complete and change.sequence > sequence:
                queue.put_nowait(change)
        self._watchers.add(queue)
        if wakes:
            self._follow_wakes.add(queue)
        try:
            yield queue, complete
        finally:
            self._watchers.discard(queue)
            self._follow_wakes.discard(queue)
