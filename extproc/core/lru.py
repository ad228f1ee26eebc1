"""Which artifacts a node's disk holds, and what must go to make room: a byte-bounded LRU that decides and never deletes.

Bytes are counted from the moment room is reserved until the caller says they are gone, so parallel fetches cannot overshoot. Every change of an
artifact's state is made here, and checked against the table in life.py. Not safe for concurrent use; every method is short and synchronous. `now`
is any clock that does not go back, in seconds.

What keeps an artifact from being chosen: a lease (a promise with an end, one per holder), a pin (one without an end), and a hold ("somebody is at
it now", inside this process, counted and not named).

What was brought before anybody asked for it is *expected* until somebody does. It is no demand: it goes before everything else, the one whose time is over
first, and what is brought that way makes room only by what is expected no longer.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain, islice
from typing import Generic, TypeVar

from ..errors import AdapterTooLarge, NoSpace
from .blocks import on_disk
from .demand import Demand
from .life import State, moved

MAX_HOLDERS = 64  # leases of one artifact that are told apart: more router processes than any fleet we know of sends one adapter through
MAX_EXPECTED = 4096  # a hundred times what a node brings in the time for which one is expected; of more, the first counts as used when it came
OTHERS = "\0"  # the holder that those above MAX_HOLDERS share: what they were promised holds, and none of them can give it back
NEVER = float("-inf")
LEAVING = State.LEAVING  # looked up on every warm request
UNREAD = frozenset({State.PUBLISHED, State.NAMED, State.SETTLED})  # states in which the engine knows no name, and nothing is left of an earlier one

Id = TypeVar("Id", bound=str)


class Hold(Enum):
    """Who is at an artifact."""

    FLIGHT = "flight"  # about to give it a name, or to take its name away: not even force removes it meanwhile
    READ = "read"  # sends its files to a peer, or compares it with its origin: force does not wait for that


@dataclass(slots=True)
class Entry(Generic[Id]):
    """One artifact on disk. `size` in bytes as the disk counts them."""

    id: Id
    size: int
    last_used: float
    leases: dict[str, float] | None = None  # holder -> when its lease ends; None: nobody ever had one, as with most of a hundred thousand
    pinned: bool = False
    keep: bool = False  # put there by others: not ours to remove
    flights: int = 0  # holds of the kind FLIGHT
    reads: int = 0  # holds of the kind READ
    state: State = State.PUBLISHED

    @property
    def leased_until(self) -> float:
        """When the last lease ends; minus infinity without one."""
        return max(self.leases.values(), default=NEVER) if self.leases else NEVER

    @property
    def leaving(self) -> bool:
        """Whether it was chosen to go."""
        return self.state is LEAVING


class Index(Generic[Id]):
    """Artifacts by id, least recently used first, and the room reserved for those on their way."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.disk_bytes: int | None = None  # what the file system has room for, with what is here; None: not looked at
        self._entries: dict[Id, Entry[Id]] = {}  # least recently used first; an OrderedDict would take a third more memory
        self._leaving: dict[Id, State] = {}  # what leaves -> its state before that
        self._leaving_bytes = 0
        self._reserved: dict[str, int] = {}
        self._demand = Demand[Id]()
        self._expected: dict[Id, float] = {}  # brought, and not asked for yet -> until when that is likely
        self._guarded: frozenset[Id] = frozenset()
        self._guarded_until = NEVER
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
        return None if entry is None or entry.state is LEAVING else entry

    def entries(self) -> list[Entry[Id]]:
        """All that is on disk, least recently used first."""
        return list(self._entries.values())

    @property
    def limit(self) -> int:
        """What may be used and reserved: the budget, or less where the file system has no room for that."""
        return self.max_bytes if self.disk_bytes is None else max(0, min(self.max_bytes, self.disk_bytes))

    @property
    def fits(self) -> bool:
        """Whether all that is used and reserved is within the limit."""
        return self.used_bytes + self.reserved_bytes <= self.limit

    def reserve(self, token: str, size: int, now: float, passed_over: Collection[Id] = (), *, most: int | None = None, unread_only: bool = False) -> list[Id]:
        """Set `size` more bytes aside under `token`; returns the ids that must be removed for it, those that leave already first.

        A caller that counts on room which somebody else is making is told of that victim too: it may yet have to stay.
        The caller unloads and deletes them, then says `removed` (or `kept` where it could not). At most `most` are chosen, none of `passed_over`, and
        with `unread_only` nothing of which the engine knows a name. Raises AdapterTooLarge if it can never fit, NoSpace if what may be evicted now is
        not enough; then nothing has changed.
        """
        need = on_disk(size)
        if need > self.max_bytes:
            raise AdapterTooLarge(f"{token} needs {need} bytes; the limit of this node is {self.max_bytes}")
        victims: list[Entry[Id]] = []
        missing = self.used_bytes + self.reserved_bytes + need - self.limit
        if missing > 0:
            leaving = (self._entries[id_] for id_ in self._leaving if id_ not in passed_over)
            evictable = (
                entry
                for entry in self._in_order()
                if entry.state is not LEAVING and (not unread_only or entry.state in UNREAD) and entry.id not in passed_over and self.is_evictable(entry, now)
            )
            for entry in islice(chain(leaving, evictable), most):
                victims.append(entry)
                missing -= entry.size
                if missing <= 0:
                    break
        if missing > 0:
            small = ", since the node's disk is full, though its limit is not reached" if self.limit < self.max_bytes else ""
            raise NoSpace(f"{token} needs {need} bytes; {max(need - missing, 0)} of {self.limit} can be freed now{small}")
        self._reserved[token] = self._reserved.get(token, 0) + need
        self.reserved_bytes += need
        return self._choose(victims)

    def reserve_free(self, token: str, size: int, now: float, limit: int) -> list[Id]:
        """As `reserve`, for what nobody has asked for: room that is free below `limit`, or taken by what is expected no longer. Raises NoSpace."""
        need = on_disk(size)
        victims: list[Entry[Id]] = []
        missing = self.used_bytes + self.reserved_bytes + need - min(limit, self.limit)
        for id_ in [id_ for id_, until in self._expected.items() if until <= now] if missing > 0 else ():
            entry = self._entries[id_]
            if entry.state is not LEAVING and self.is_evictable(entry, now):
                victims.append(entry)
                missing -= entry.size
                if missing <= 0:
                    break
        if missing > 0:
            raise NoSpace(f"{token} needs {need} bytes; {max(need - missing, 0)} of {min(limit, self.limit)} are free for what nobody asks for yet")
        self._reserved[token] = self._reserved.get(token, 0) + need
        self.reserved_bytes += need
        return self._choose(victims)

    def expect(self, id_: Id, until: float) -> None:
        """It was brought before anybody has asked for it, which will probably be the case before `until`."""
        if id_ in self._entries:
            if len(self._expected) >= MAX_EXPECTED:
                del self._expected[next(iter(self._expected))]
            self._expected[id_] = until

    def is_expected(self, id_: Id) -> bool:
        """Whether nobody has asked for it since it was brought."""
        return id_ in self._expected

    def _in_order(self) -> Iterable[Entry[Id]]:
        """All that is on disk, in the order in which it goes."""
        if not self._expected:
            return self._entries.values()
        first = (self._entries[id_] for id_ in sorted(self._expected, key=self._expected.__getitem__))
        return chain(first, (entry for entry in self._entries.values() if entry.id not in self._expected))

    def in_demand(self, now: float) -> int:
        """How many are leased."""
        for id_ in self._demand.end(now, lambda id_: self._entries[id_].leased_until):
            self._entries[id_].leases = None
        return len(self._demand)

    def is_evictable(self, entry: Entry[Id], now: float) -> bool:
        """Ours, and neither leased, pinned nor held. Whether the engine still reads it, only the engine can say: the caller asks before it deletes."""
        if entry.pinned or entry.keep or entry.flights or entry.reads or (entry.leases and entry.leased_until > now):
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

    def surplus(self, limit: int, now: float, most: int | None = None, passed_over: Collection[Id] = ()) -> list[Id]:
        """Choose what goes so that at most `limit` bytes are used or reserved, least recently used first, and at most `most` at once; less if that is all
        that may go. None of `passed_over` is chosen.
        """
        victims: list[Entry[Id]] = []
        over = self.used_bytes + self.reserved_bytes - limit - self._leaving_bytes
        for entry in self._in_order():
            if over <= 0 or len(victims) == most:
                break
            if entry.state is not LEAVING and entry.id not in passed_over and self.is_evictable(entry, now):
                victims.append(entry)
                over -= entry.size
        return self._choose(victims)

    def next_to_go(self, count: int, now: float) -> list[Entry[Id]]:
        """The first `count` that a search for room would choose."""
        return list(islice((entry for entry in self._in_order() if entry.state is not LEAVING and self.is_evictable(entry, now)), count))

    def _choose(self, victims: Sequence[Entry[Id]]) -> list[Id]:
        """Those that leave already stay as they are."""
        for entry in victims:
            if entry.state is not LEAVING:
                self._leaving[entry.id] = entry.state
                self._leaving_bytes += entry.size
                entry.state = moved(entry.state, LEAVING)
        return [entry.id for entry in victims]

    def _no_longer_leaving(self, entry: Entry[Id]) -> State:
        """Its state before it was chosen."""
        self._leaving_bytes -= entry.size
        return self._leaving.pop(entry.id)

    def stands(self, id_: Id, state: State) -> None:
        """Say that `id_` has come so far in its life. While it leaves, who ends that says it. Raises ImpossibleMoveError."""
        entry = self._entries.get(id_)
        if entry is not None and entry.state is not LEAVING:
            entry.state = moved(entry.state, state)

    def named(self, id_: Id, *, has_names: bool) -> None:
        """Whether an adapter's name leads to it. What the engine knows, or knew, counts for more than a name."""
        entry = self._entries.get(id_)
        if entry is not None and entry.state in (State.PUBLISHED, State.NAMED):
            entry.state = moved(entry.state, State.NAMED if has_names else State.PUBLISHED)

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
            self.kept(id_)
            self.touch(id_, now)

    def touch(self, id_: Id, now: float) -> None:
        entry = self._entries.pop(id_)
        entry.last_used = now
        self._entries[entry.id] = entry
        self._expected.pop(id_, None)

    def order(self, ids: Sequence[Id]) -> None:
        """These, which are all, were used in this order."""
        self._entries = {id_: self._entries[id_] for id_ in ids}

    def lease(self, id_: Id, until: float, now: float, holder: str = "") -> bool:
        """Promise `id_` to `holder` until `until` at least, and count it as used. False if it is not there."""
        entry = self.get(id_)
        if entry is None:
            return False
        leases = entry.leases
        if leases is not None and holder in leases:  # as with nearly every warm request
            leases[holder] = max(leases[holder], until)
        else:
            _promise(entry, holder, until, now)
        if id_ not in self._demand:
            self._demand.add(id_, until)
        entry.last_used = now
        del self._entries[id_]
        self._entries[id_] = entry
        if self._expected:
            self._expected.pop(id_, None)
        return True

    def inherit(self, heir: Id, from_id: Id) -> None:
        """Who leased `from_id` until some time is promised `heir` as long: the promise was made for the name that leads there now."""
        old, new = self._entries.get(from_id), self._entries.get(heir)
        if old is not None and new is not None and old is not new:
            for holder, until in (old.leases or {}).items():
                _promise(new, holder, until, NEVER)
            if new.leases and heir not in self._demand:
                self._demand.add(heir, new.leased_until)

    def release(self, holder: str, id_: Id | None = None) -> int:
        """`holder` gives back its lease of `id_`, or all it has; how many there were. What was leased without a holder, or by more holders than are told
        apart, may be anybody's: it stays until its end.
        """
        if holder in ("", OTHERS):
            return 0
        ids = list(self._demand) if id_ is None else [id_]
        return sum(self._give_back(holder, entry) for id_ in ids if (entry := self._entries.get(id_)) is not None)

    def _give_back(self, holder: str, entry: Entry[Id]) -> bool:
        if entry.leases is None or entry.leases.pop(holder, None) is None:
            return False
        if entry.leases:
            self._demand.shorten(entry.id, entry.leased_until)
        else:
            self._demand.drop(entry.id)
        return True

    def hold(self, id_: Id, kind: Hold = Hold.FLIGHT) -> bool:
        """Somebody is at it until `let_go`. It does not count as used. False if it is not there."""
        entry = self.get(id_)
        if entry is None:
            return False
        if kind is Hold.FLIGHT:
            entry.flights += 1
        else:
            entry.reads += 1
        return True

    def let_go(self, id_: Id, kind: Hold = Hold.FLIGHT) -> None:
        """What follows each `hold` that was given. Force may have removed what was read."""
        entry = self._entries.get(id_)
        if entry is None:
            return
        if kind is Hold.FLIGHT:
            entry.flights -= 1
        else:
            entry.reads = max(0, entry.reads - 1)

    def pin(self, id_: Id, *, pinned: bool) -> None:
        """Promise `id_` without an end, or no longer."""
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

    def is_known(self, id_: Id) -> bool:
        """Whether it is on disk, also while it leaves."""
        return id_ in self._entries

    def is_leaving(self, id_: Id) -> bool:
        """Whether it is chosen, and not gone yet."""
        return id_ in self._leaving

    def removed(self, id_: Id) -> None:
        """Its bytes are gone."""
        entry = self._entries.pop(id_, None)
        if entry is None:
            return
        if entry.state is LEAVING:
            self._no_longer_leaving(entry)
        self._demand.drop(id_)
        self._expected.pop(id_, None)
        entry.state = moved(entry.state, State.GONE)
        self.used_bytes -= entry.size

    def kept(self, id_: Id, state: State | None = None) -> None:
        """The victim stays, at the place that it had in the order of use. Its state is that before it was chosen, unless `state` says how far it came."""
        entry = self._entries.get(id_)
        if entry is not None and entry.state is LEAVING:
            before = self._no_longer_leaving(entry)
            entry.state = moved(LEAVING, state or before)


def _promise(entry: Entry[Id], holder: str, until: float, now: float) -> None:
    """A lease, of which an artifact has MAX_HOLDERS at most: whoever comes after that shares one."""
    if entry.leases is None:
        entry.leases = {}
    leases = entry.leases
    if holder not in leases and len(leases) >= MAX_HOLDERS:
        for ended in [other for other, ends in leases.items() if ends <= now]:
            del leases[ended]
        if len(leases) >= MAX_HOLDERS:
            holder = OTHERS
    leases[holder] = max(leases.get(holder, until), until)
