"""Which artifacts a node's disk holds, and what must go to make room: a byte-bounded LRU that decides and never deletes.

Bytes are counted from the moment room is reserved until the caller says they are gone, so parallel fetches cannot overshoot. Not safe for
concurrent use; every method is short and synchronous. `now` is any clock that does not go back, in seconds.
"""

from collections import OrderedDict
from dataclasses import dataclass

from ..errors import AdapterTooLarge, NoSpace

BLOCK_BYTES = 4096  # what a file system allots at least


def on_disk(size: int) -> int:
    """`size` bytes as the disk counts them."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(slots=True)
class Entry:
    """One artifact on disk. `size` in bytes as the disk counts them."""

    id: str
    size: int
    last_used: float
    leased_until: float = float("-inf")
    pinned: bool = False
    leaving: bool = False  # chosen as a victim: its bytes still count, nobody may lease it


class Index:
    """Artifacts by id, least recently used first, and the room reserved for those on their way."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._reserved: dict[str, int] = {}
        self.used_bytes = 0

    def __repr__(self) -> str:
        return f"<Index {len(self._entries)} artifacts, {self.used_bytes} used + {self.reserved_bytes} reserved of {self.max_bytes} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id_: str) -> bool:
        return self.get(id_) is not None

    @property
    def reserved_bytes(self) -> int:
        return sum(self._reserved.values())

    def get(self, id_: str) -> Entry | None:
        """The entry, unless it is not there or leaving."""
        entry = self._entries.get(id_)
        return None if entry is None or entry.leaving else entry

    def entries(self) -> list[Entry]:
        """All that is on disk, least recently used first."""
        return list(self._entries.values())

    def reserve(self, token: str, size: int, now: float) -> list[str]:
        """Set `size` bytes aside under `token`, once only; returns the ids that must be removed for it, those that leave already first.

        A caller that counts on room which somebody else is making is told of that victim too: it may yet have to stay.
        The caller unloads and deletes them, then says `removed` (or `kept` where it could not). Raises AdapterTooLarge if it can never fit,
        NoSpace if what may be evicted now is not enough; then nothing has changed.
        """
        need = on_disk(size)
        if need > self.max_bytes:
            raise AdapterTooLarge(f"{token} needs {need} bytes; the limit of this node is {self.max_bytes}")
        victims: list[Entry] = []
        missing = self.used_bytes + self.reserved_bytes + need - self.max_bytes
        for entry in sorted(self._entries.values(), key=lambda e: not e.leaving):
            if missing <= 0:
                break
            if entry.leaving or self.is_evictable(entry, now):
                victims.append(entry)
                missing -= entry.size
        if missing > 0:
            raise NoSpace(f"{token} needs {need} bytes; {max(need - missing, 0)} of {self.max_bytes} can be freed now")
        self._reserved[token] = self._reserved.get(token, 0) + need
        for entry in victims:
            entry.leaving = True
        return [entry.id for entry in victims]

    def is_evictable(self, entry: Entry, now: float) -> bool:
        """Neither leased nor pinned. Whether the engine still reads it, only the engine can say: the caller asks before it deletes."""
        return not entry.pinned and entry.leased_until <= now

    def commit(self, token: str, id_: str, size: int, now: float) -> None:
        """What was reserved under `token` lies on disk as `id_`. Content that was there already is counted once."""
        self._reserved.pop(token, None)
        self.add(id_, size, now)

    def abort(self, token: str) -> None:
        """The fetch failed and its partial files are gone."""
        self._reserved.pop(token, None)

    def add(self, id_: str, size: int, now: float) -> None:
        """`id_` is on disk (found at start, or published)."""
        entry = self._entries.get(id_)
        if entry is None:
            self._entries[id_] = Entry(id_, on_disk(size), now)
            self.used_bytes += on_disk(size)
        else:
            entry.leaving = False
            self.touch(id_, now)

    def touch(self, id_: str, now: float) -> None:
        self._entries[id_].last_used = now
        self._entries.move_to_end(id_)

    def lease(self, id_: str, until: float, now: float) -> bool:
        """Hold `id_` until `until` at least, and count it as used. False if it is not there."""
        entry = self.get(id_)
        if entry is None:
            return False
        entry.leased_until = max(entry.leased_until, until)
        self.touch(id_, now)
        return True

    def leave(self, id_: str, now: float) -> bool:
        """Choose `id_` as a victim by request. False if it is not there or may not go."""
        entry = self.get(id_)
        if entry is None or not self.is_evictable(entry, now):
            return False
        entry.leaving = True
        return True

    def removed(self, id_: str) -> None:
        """The victim's bytes are gone."""
        entry = self._entries.pop(id_, None)
        if entry is not None:
            self.used_bytes -= entry.size

    def kept(self, id_: str, now: float) -> None:
        """The victim could not be removed: it stays, as most recently used, so that the next search tries another first."""
        entry = self._entries.get(id_)
        if entry is not None:
            entry.leaving = False
            self.touch(id_, now)
