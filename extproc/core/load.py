"""How many requests are in flight at each endpoint of a pool: what its engine said last, what routers have sent there since, and what they hold for it.

An engine's word counts everybody's requests. A stager tells at once when the number has changed by a step, so its silence is a word, too: what was sent before
its last look is in the number, or as many have ended. If the stager says how often it looks, the times of its looks follow from that of its word, and only what
was sent since the last one counts. If it does not say, everything since the word counts.

A request is held while its adapter is fetched or loaded, and is sent to that endpoint afterwards. A router knows what it holds itself; what others hold, the
stager tells with its engine's load, since they wait for its answer. Where most requests are for what no engine has, a quarter of what an engine computes is
held for it.

Of each endpoint there are two numbers, since what other routers have sent since the word is not heard of.

| number | what this router has sent since the word counts | what it is for |
| --- | --- | --- |
| `in_flight` | as many times as there are routers, as if the others had sent as much | comparing endpoints: routers that have the same words stay away from an engine that each has just sent something |
| `known` | once | comparing an endpoint with the bound: of four routers one request would count as four there, and each endpoint that is wrongly taken for too busy costs a copy |

The bound leaves room for what the others have sent an endpoint meanwhile: UNHEARD times as much as on average.

Of an endpoint whose engine says nothing, what was sent in the last FORGOTTEN_S counts: it is all that is known, and a request ends some time.

The mean is that of the engines' words, since as many requests end between two looks as are sent; what is sent beyond that, as to an idle fleet, is added. What is
held is not: it will be spread over more time than it waits together, and a bound that it raised would let the engines that hold least run more.
Its sums over what is `ready` are kept up to date, since every decision asks for the mean.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from .durations import USUAL_S, Service
from .endpoint import Endpoint

FORGOTTEN_S = USUAL_S  # of a request of which no engine has spoken
HELD_S = 10.0  # for which a request counts that is held, by its router and its stager: a fetch of some gigabytes. An origin that hangs makes nobody look busy
STALE_S = 6.0  # an engine's word counts so long: three of those that come every 2 s are missing by then
LATE_S = 0.01  # that a stager's look and its word take
ENDING = 1 / 8  # of what engines work on ends between two looks: at most so much is taken to be replaced by what was sent. Of 4 s each, 1/16 does
MAX_SENT = 1024  # requests remembered per endpoint between two words; more than an engine takes in 2 s
UNHEARD = 1.75  # what others have sent grows from nothing to twice its mean between two looks. Simulated with four routers: 1.5 is uneven, 2 loads more
KEPT = 1 / 8  # of an engine's slots. Routers hear once a second how many are taken, and fill them meanwhile
SHORT = 4.0  # a queue that ends sooner than another engine has an adapter, also where few run at once
FEW = 2.0  # requests in flight are never too many: below that, integers alone make an endpoint look busy


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine said, and its stager of it: requests that it computes and that it queues, how many adapters it keeps in memory (0: not known),
    how often the stager looks (0: it does not say), how many routers listen to it, this one included, and how many calls of the others wait there for an
    adapter."""

    running: float = 0.0
    waiting: float = 0.0
    slots: int = 0
    every_s: float = 0.0
    routers: int = 1
    others_held: int = 0


SILENT = Engine()


class Load:
    """One endpoint's. `said`, `guessed`, `gone`, `known` and `in_flight` are kept by `Loads`."""

    __slots__ = ("adapters", "counts", "engine", "gone", "guessed", "held", "in_flight", "known", "said", "said_at", "sent")

    def __init__(self) -> None:
        self.engine = SILENT
        self.said_at = float("-inf")  # when its metrics were read
        self.sent: deque[float] = deque(maxlen=MAX_SENT)  # times, since then
        self.held = 0  # requests that wait here until the adapter is there
        self.adapters = 0  # that are in demand there
        self.counts = True  # towards the mean
        self.said = 0.0  # by the engine's word: what it computes and what it queues
        self.guessed = 0.0  # what other routers have sent since, if they send as much as this one
        self.gone = 0.0  # said, and sent since by this one: what has gone to the engine, as far as is known
        self.known = 0.0  # with what routers hold: this is compared with the bound
        self.in_flight = 0.0  # and with what is guessed: by this endpoints are compared with each other

    @property
    def is_queueing(self) -> bool:
        """Whether a request that comes now waits for others to end: a queue of a quarter of what runs does not empty before the next word."""
        return self.engine.waiting > max(self.engine.running / 4, SHORT)

    def queue_s(self, service_s: float) -> float:
        """For how long the queue of the engine's word lasts, if it computes each request for so many seconds."""
        return self.engine.waiting / max(1.0, self.engine.running) * service_s

    @property
    def awaited(self) -> float:
        """Known, where others hold as much as this one: of what is asked for everywhere each holds its part, and calls once for all that want the same."""
        return self.gone + self.held + max(self.engine.others_held, (self.engine.routers - 1) * self.held)

    @property
    def is_full(self) -> bool:
        """Whether as many adapters are in demand as the engine keeps in memory: each more costs another its place."""
        return 0 < self.engine.slots <= self.adapters

    @property
    def has_room(self) -> bool:
        """Whether it has room for an adapter that some other engine has: the last of its slots are for what is asked for first."""
        return self.adapters < (1 - KEPT) * self.engine.slots or not self.engine.slots


class Loads(dict[str, Load]):
    """Of one pool: each endpoint's load by its address. Times are the caller's clock, in seconds."""

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        super().__init__((address, Load()) for address in addresses)
        self._said = self._gone = self._guessed = 0.0  # over those that count
        self._ready = len(self)
        self.has_room = True  # whether some ready engine has room for a copy, as of the last `sweep`
        self.service = Service()
        self._sent = 0  # by all routers since the last `sweep`, if the others send as much as this one

    def follow(self, addresses: Iterable[str]) -> None:
        """These are the pool's endpoints now. Of those that stay, nothing is forgotten."""
        loads = {address: self.get(address) or Load() for address in addresses}
        self.clear()
        self.update(loads)
        self._add_up()

    def stand(self, ready: Iterable[str]) -> None:
        """These are ready, and make the mean."""
        counted = frozenset(ready)
        for address, load in self.items():
            load.counts = address in counted
        self._add_up()

    def stand_one(self, address: str, *, ready: bool) -> None:
        """The same of one of them."""
        load = self.get(address)
        if load is not None and load.counts is not ready:
            sign = 1 if ready else -1
            load.counts = ready
            self._said += sign * load.said
            self._gone += sign * load.gone
            self._guessed += sign * load.guessed
            self._ready += sign

    def send(self, address: str, now: float) -> None:
        """A request goes there."""
        load = self.get(address)
        if load is not None:
            _expire(load, now)
            load.sent.append(now)
            self._sent += load.engine.routers
            self._update(load)

    def hold(self, address: str) -> None:
        """A request waits here for what that endpoint will have. `release` must follow, after HELD_S at the latest."""
        self._hold(address, 1)

    def release(self, address: str) -> None:
        """It waits no more, or for so long that it does not count."""
        self._hold(address, -1)

    def _hold(self, address: str, requests: int) -> None:
        load = self.get(address)
        if load is not None:
            load.held = max(0, load.held + requests)  # another endpoint may have come under the address meanwhile
            _count(load)

    def say(self, address: str, engine: Engine, taken_at: float) -> None:
        """The engine's word, of the time `taken_at`."""
        load = self.get(address)
        if load is None or taken_at < load.said_at:
            return
        load.engine, load.said_at = engine, taken_at
        while load.sent and load.sent[0] <= taken_at:
            load.sent.popleft()
        self._update(load)

    def demand(self, address: str, adapters: int, slots: int) -> None:
        """How many adapters are in demand there; `slots` 0: as the engine said."""
        load = self.get(address)
        if load is not None:
            load.adapters = adapters
            if slots != load.engine.slots and slots:
                load.engine = replace(load.engine, slots=slots)

    def sweep(self, now: float) -> None:
        """Drop what is too old to count, which `send` does only for endpoints that are sent something, and see how long requests take. To be called a few
        times a second."""
        for load in self.values():
            if load.sent or now - load.said_at > STALE_S:
                _expire(load, now)
                _count(load)
        self._add_up()
        self.has_room = any(load.counts and load.has_room for load in self.values())
        self.service.look(now, sum(load.engine.running for load in self.values() if load.counts), self._said, self._sent)
        self._sent = 0

    def mean(self) -> float:
        """Requests in flight per ready endpoint."""
        return max(self._said, self._gone + self._guessed - ENDING * self._said) / self._ready if self._ready else 0.0

    def bound(self, factor: float) -> float:
        """From so many known requests in flight on, an endpoint carries too much: `factor` times the mean, less UNHEARD times what the other routers have
        sent an endpoint since its word, if they send as much as this one."""
        unheard = self._guessed / self._ready if self._ready else 0.0
        return max(factor * self.mean() - UNHEARD * unheard, FEW)

    def below(self, endpoints: Sequence[Endpoint], bound: float) -> list[Endpoint]:
        """Those that are not known to have as much in flight."""
        return [endpoint for endpoint in endpoints if self[endpoint.address].known < bound]

    def least(self, endpoints: Sequence[Endpoint], turn: int) -> int:
        """The place of the one with the least in flight; of equals the next one from place `turn` on, counted around."""
        counts = [self[endpoint.address].in_flight for endpoint in endpoints]
        least, first = min(counts), turn % len(counts)
        try:
            return counts.index(least, first)
        except ValueError:
            return counts.index(least)

    def _update(self, load: Load) -> None:
        said, gone, guessed = load.said, load.gone, load.guessed
        _count(load)
        if load.counts:
            self._said += load.said - said
            self._gone += load.gone - gone
            self._guessed += load.guessed - guessed

    def _add_up(self) -> None:
        counted = [load for load in self.values() if load.counts]
        self._ready, self._said = len(counted), sum(load.said for load in counted)
        self._gone, self._guessed = sum(load.gone for load in counted), sum(load.guessed for load in counted)


def _count(load: Load) -> None:
    engine, sent = load.engine, len(load.sent)
    load.said = engine.running + engine.waiting
    load.guessed = (engine.routers - 1) * sent
    load.gone = load.said + sent
    load.known = load.gone + load.held + engine.others_held
    load.in_flight = load.known + load.guessed


def _expire(load: Load, now: float) -> None:
    """Forget what was sent and counts no longer, and a word that is too old."""
    engine = load.engine
    if now - load.said_at > STALE_S:
        load.engine = _silent(engine.slots)
        counts_s = FORGOTTEN_S
    elif engine.every_s:
        counts_s = (now - load.said_at - LATE_S) % engine.every_s + LATE_S
    else:
        return
    while load.sent and load.sent[0] <= now - counts_s:
        load.sent.popleft()


@lru_cache(256)  # how many adapters engines keep in memory is a setting, of which a fleet has a few; making one takes as long as the rest of `Loads.send`
def _silent(slots: int) -> Engine:
    """What is known of an engine that says nothing."""
    return Engine(slots=slots)
