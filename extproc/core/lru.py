"""Which artifacts a node's disk holds, and what must go to make room: a byte-bounded LRU that decides and never deletes.

Bytes are counted from the moment room is reserved until the caller says they are gone, so parallel fetches cannot overshoot. Not safe for
concurrent use; every method is short and synchronous. `now` is any clock that does not go back, in seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Generic, TypeVar

from ..errors import AdapterTooLarge, NoSpace

BLOCK_BYTES = 4096  # what a file system allots at least
MAX_HOLDERS = 64  # routers that may hold one artifact before those whose hold has ended are swept


def on_disk(size: int) -> int:
    """`size` bytes as the disk counts them."""
    return _bytes(-(-size // BLOCK_BYTES))


@lru_cache(4096)
def _bytes(blocks: int) -> int:
    """Adapters of one rank have one size: one number in memory for all of them."""
    return blocks * BLOCK_BYTES


Id = TypeVar("Id", bound=str)


@dataclass(slots=True)
class Entry(Generic[Id]):
    """One artifact on disk. `size` in bytes as the disk counts them."""

    id: Id
    size: int
    last_used: float
    leases: dict[str, float] | None = None  # holder -> when its hold ends; None: nobody ever held it, as with most of a hundred thousand
    pinned: bool = False
    keep: bool = False  # put there by others: not ours to remove
    flights: int = 0  # that are about to give it a name, or to take its name away: not even force removes it meanwhile
    leaving: bool = False  # chosen as a victim: its bytes still count, nobody may lease it

    @property
    def leased_until(self) -> float:
        """When the last hold ends; minus infinity without one."""
        return max(self.leases.values(), default=float("-inf")) if self.leases else float("-inf")


class Index(Generic[Id]):
    """Artifacts by id, least recently used first, and the room reserved for those on their way."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: dict[Id, Entry[Id]] = {}  # least recently used first; an OrderedDict would take a third more memory
        self._leaving: dict[Id, Entry[Id]] = {}
        self._reserved: dict[str, int] = {}
        self._guarded: frozenset[Id] = frozenset()
        self._guarded_until = float("-inf")
        self.reserved_bytes = 0
        self.used_bytes = 0

    def __repr__(self) -> str:
        return f"<Index {len(self._entries)} artifacts, {self.used_bytes} used + {self.reserved_bytes} reserved of {self.max_bytes} bytes>"

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id_: Id) -> bool:
        return self.get(id_) is not None

    def get(self, id_: Id) -> Entry[Id] | None:
        """The entry, unless it is not there or leaving."""
        entry = self._entries.get(id_)
        return None if entry is None or entry.leaving else entry

    def entries(self) -> list[Entry[Id]]:
        """All that is on disk, least recently used first."""
        return list(self._entries.values())

    def reserve(self, token: str, size: int, now: float) -> list[Id]:
        """Set `size` more bytes aside under `token`; returns the ids that must be removed for it, those that leave already first.

        A caller that counts on room which somebody else is making is told of that victim too: it may yet have to stay.
        The caller unloads and deletes them, then says `removed` (or `kept` where it could not). Raises AdapterTooLarge if it can never fit,
        NoSpace if what may be evicted now is not enough; then nothing has changed.
        """
        need = on_disk(size)
        if need > self.max_bytes:
            raise AdapterTooLarge(f"{token} needs {need} bytes; the limit of this node is {self.max_bytes}")
        victims: list[Entry[Id]] = []
        missing = self.used_bytes + self.reserved_bytes + need - self.max_bytes
        if missing > 0:
            for entry in chain(self._leaving.values(), (entry for entry in self._entries.values() if not entry.leaving and self.is_evictable(entry, now))):
                victims.append(entry)
                missing -= entry.size
                if missing <= 0:
                    break
        if missing > 0:
            raise NoSpace(f"{token} needs {need} bytes; {max(need - missing, 0)} of {self.max_bytes} can be freed now")
        self._reserved[token] = self._reserved.get(token, 0) + need
        self.reserved_bytes += need
        return self._choose(victims)

    def in_demand(self, now: float, lease_s: float) -> int:
        """How many are leased. Leases are `lease_s` long at most, and who takes one uses it: the search ends at what was used before that."""
        count = 0
        for entry in reversed(self._entries.values()):
            if entry.last_used < now - lease_s:
                break
            count += entry.leased_until > now
        return count

    def is_evictable(self, entry: Entry[Id], now: float) -> bool:
        """Ours, and neither leased nor pinned. Whether the engine still reads it, only the engine can say: the caller asks before it deletes."""
        if entry.pinned or entry.keep or entry.flights or entry.leased_until > now:
            return False
        return not self._guarded or not self.is_guarded(entry.id, now)

    def guard(self, until: float) -> None:
        """All that is here now may be held by somebody who could not say so yet: none of it is evictable before `until`."""
        self._guarded, self._guarded_until = frozenset(self._entries), until

    def is_guarded(self, id_: Id, now: float) -> bool:
        """Whether it waits for those who may hold it."""
        if now >= self._guarded_until:
            self._guarded = frozenset()
        return id_ in self._guarded

    def surplus(self, limit: int, now: float) -> list[Id]:
        """Choose what goes so that at most `limit` bytes are used or reserved, least recently used first; less if that is all that may go."""
        victims: list[Entry[Id]] = []
        over = self.used_bytes + self.reserved_bytes - limit - sum(entry.size for entry in self._leaving.values())
        for entry in self._entries.values():
            if over <= 0:
                break
            if not entry.leaving and self.is_evictable(entry, now):
                victims.append(entry)
                over -= entry.size
        return self._choose(victims)

    def _choose(self, victims: list[Entry[Id]]) -> list[Id]:
        for entry in victims:
            entry.leaving = True
            self._leaving[entry.id] = entry
        return [entry.id for entry in victims]

    def commit(self, token: str, id_: Id, size: int, now: float) -> None:
        """What was reserved under `token` lies on disk as `id_`. Content that was there already is counted once."""
        self.abort(token)
        self.add(id_, size, now)

    def reserved_by(self, token: str) -> int:
        """What is set aside under `token`."""
        return self._reserved.get(token, 0)

    def give_back(self, token: str, down_to: int) -> None:
        """Of what is set aside under `token`, keep only `down_to` bytes."""
        self.reserved_bytes -= self._reserved.get(token, 0) - down_to
        self._reserved[token] = down_to

    def abort(self, token: str) -> None:
        """The fetch failed and its partial files are gone."""
        self.reserved_bytes -= self._reserved.pop(token, 0)

    def add(self, id_: Id, size: int, now: float, *, keep: bool = False) -> None:
        """`id_` is on disk (found at start, or published). With `keep` it was put there by others, who alone may remove it."""
        entry = self._entries.get(id_)
        if entry is None:
            self._entries[id_] = Entry(id_, on_disk(size), now, keep=keep)
            self.used_bytes += on_disk(size)
        else:
            self.kept(id_, now)

    def resize(self, id_: Id, size: int) -> None:
        """The content of `id_` changed under us: others write there."""
        entry = self._entries[id_]
        self.used_bytes += on_disk(size) - entry.size
        entry.size = on_disk(size)

    def touch(self, id_: Id, now: float) -> None:
        entry = self._entries.pop(id_)
        entry.last_used = now
        self._entries[entry.id] = entry

    def order(self, ids: Sequence[Id]) -> None:
        """These, which are all, were used in this order."""
        self._entries = {id_: self._entries[id_] for id_ in ids}

    def lease(self, id_: Id, until: float, now: float, holder: str = "") -> bool:
        """Hold `id_` for `holder` until `until` at least, and count it as used. False if it is not there."""
        entry = self.get(id_)
        if entry is None:
            return False
        if entry.leases is None:
            entry.leases = {}
        elif len(entry.leases) > MAX_HOLDERS:
            entry.leases = {other: ends for other, ends in entry.leases.items() if ends > now}
        entry.leases[holder] = max(entry.leases.get(holder, until), until)
        self.touch(id_, now)
        return True

    def inherit(self, heir: Id, from_id: Id) -> None:
        """Who leased `from_id` until some time holds `heir` as long: the promise was made for the name that leads there now."""
        old, new = self._entries.get(from_id), self._entries.get(heir)
        if old is None or new is None or old is new or not old.leases:
            return
        if new.leases is None:
            new.leases = {}
        for holder, until in old.leases.items():
            if until != float("inf"):
                new.leases[holder] = max(new.leases.get(holder, until), until)

    def release(self, holder: str, id_: Id | None = None) -> int:
        """`holder` gives back its hold of `id_`, or all it has; how many there were."""
        entries = self._entries.values() if id_ is None else filter(None, (self._entries.get(id_),))
        return sum(entry.leases is not None and entry.leases.pop(holder, None) is not None for entry in entries)

    def hold(self, id_: Id) -> bool:
        """A flight is at it until `let_go`. False if it is not there."""
        entry = self.get(id_)
        if entry is not None:
            entry.flights += 1
        return entry is not None

    def let_go(self, id_: Id) -> None:
        entry = self._entries.get(id_)
        if entry is not None:
            entry.flights -= 1

    def pin(self, id_: Id, *, pinned: bool) -> None:
        """Hold `id_` without an end, or no longer."""
        entry = self._entries.get(id_)
        if entry is not None:
            entry.pinned = pinned

    def leave(self, id_: Id, now: float, *, force: bool = False) -> bool:
        """Choose `id_` as a victim by request; with `force` also when leased or pinned. False if it is not there or may not go."""
        entry = self.get(id_)
        if entry is None or entry.flights or not (force or self.is_evictable(entry, now)):
            return False
        self._choose([entry])
        return True

    def is_leased(self, id_: Id, now: float) -> bool:
        """Whether somebody counts on it, also while it leaves."""
        entry = self._entries.get(id_)
        return entry is not None and entry.leased_until > now

    def is_leaving(self, id_: Id) -> bool:
        """Whether it is chosen, and not gone yet."""
        entry = self._entries.get(id_)
        return entry is not None and entry.leaving

    def removed(self, id_: Id) -> None:
        """The victim's bytes are gone."""
        entry = self._entries.pop(id_, None)
        self._leaving.pop(id_, None)
        if entry is not None:
            self.used_bytes -= entry.size

    def kept(self, id_: Id, now: float) -> None:
        """The victim could not be removed: it stays, as most recently used, so that the next search tries another first."""
        entry = self._entries.get(id_)
        if entry is not None:
            entry.leaving = False
            self._leaving.pop(id_, None)
            self.touch(id_, now)
