"""How many requests are in flight at each endpoint of a pool: what its engine said last, and what this router has sent there since.

An engine's word is up to 2 s old, and counts everybody's requests; what was sent after it was taken is added one by one, and dropped with the next word.
Of an endpoint whose engine says nothing, what was sent in the last FORGOTTEN_S counts: it is all that is known, and a request ends some time.
The sum over what is `ready` is kept up to date, since every decision asks for the mean.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

FORGOTTEN_S = 4.0  # of a request of which no engine has spoken: the mean time of a chat completion
STALE_S = 6.0  # an engine's word counts so long: three of those that come every 2 s are missing by then
MAX_SENT = 1024  # requests remembered per endpoint between two words; more than an engine takes in 2 s
FEW = 2.0  # requests in flight are never too many: below that, integers alone make an endpoint look busy


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine said: requests that it computes and that it queues, and how many adapters it keeps in memory (0: not known)."""

    running: float = 0.0
    waiting: float = 0.0
    slots: int = 0


SILENT = Engine()


class Load:
    """One endpoint's."""

    __slots__ = ("adapters", "counts", "engine", "said_at", "sent")

    def __init__(self) -> None:
        self.engine = SILENT
        self.said_at = float("-inf")  # when its metrics were read
        self.sent: deque[float] = deque(maxlen=MAX_SENT)  # times, since then
        self.adapters = 0  # that are in demand there
        self.counts = True  # towards the mean

    @property
    def in_flight(self) -> float:
        return self.engine.running + self.engine.waiting + len(self.sent)

    @property
    def is_queueing(self) -> bool:
        """Whether a request that comes now waits for others to end: a queue of a quarter of what runs does not empty before the next word."""
        return self.engine.waiting > self.engine.running / 4

    @property
    def is_full(self) -> bool:
        """Whether as many adapters are in demand as the engine keeps in memory: each more costs another its place."""
        return 0 < self.engine.slots <= self.adapters


class Loads:
    """Of one pool, by address. Times are the caller's clock, in seconds."""

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        self._of: dict[str, Load] = {address: Load() for address in addresses}
        self._total = 0.0
        self._ready = len(self._of)

    def __getitem__(self, address: str) -> Load:
        return self._of[address]

    def __contains__(self, address: str) -> bool:
        return address in self._of

    def follow(self, addresses: Iterable[str]) -> None:
        """These are the pool's endpoints now. Of those that stay, nothing is forgotten."""
        self._of = {address: self._of.get(address) or Load() for address in addresses}
        self._add_up()

    def stand(self, ready: Iterable[str]) -> None:
        """These are ready, and make the mean."""
        counted = frozenset(ready)
        for address, load in self._of.items():
            load.counts = address in counted
        self._add_up()

    def send(self, address: str, now: float) -> None:
        """A request goes there."""
        load = self._of.get(address)
        if load is None:
            return
        before = len(load.sent)
        _expire(load, now)
        load.sent.append(now)
        if load.counts:
            self._total += len(load.sent) - before

    def say(self, address: str, engine: Engine, taken_at: float) -> None:
        """The engine's word, of the time `taken_at`."""
        load = self._of.get(address)
        if load is None or taken_at < load.said_at:
            return
        before = load.in_flight
        load.engine, load.said_at = engine, taken_at
        while load.sent and load.sent[0] <= taken_at:
            load.sent.popleft()
        if load.counts:
            self._total += load.in_flight - before

    def demand(self, address: str, adapters: int, slots: int) -> None:
        """How many adapters are in demand there; `slots` 0: as the engine said."""
        load = self._of.get(address)
        if load is not None:
            load.adapters = adapters
            if slots:
                load.engine = Engine(load.engine.running, load.engine.waiting, slots)

    def sweep(self, now: float) -> None:
        """Drop what is too old to count, which `send` does only for endpoints that are sent something. To be called every second or so."""
        for load in self._of.values():
            _expire(load, now)
        self._add_up()

    def mean(self) -> float:
        """Requests in flight per ready endpoint."""
        return self._total / self._ready if self._ready else 0.0

    def bound(self, factor: float) -> float:
        """From so many requests in flight on, an endpoint carries too much: `factor` times the mean."""
        return max(factor * self.mean(), FEW)

    def _add_up(self) -> None:
        counted = [load for load in self._of.values() if load.counts]
        self._total, self._ready = sum(load.in_flight for load in counted), len(counted)


def _expire(load: Load, now: float) -> None:
    if now - load.said_at <= STALE_S:
        return
    if load.engine.running or load.engine.waiting:
        load.engine = Engine(slots=load.engine.slots)
    while load.sent and load.sent[0] <= now - FORGOTTEN_S:
        load.sent.popleft()
