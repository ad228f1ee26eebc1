"""The rules under comparison: those of `core/choice.py`, run by it, and those that others use, written down here."""

import math
from collections import Counter

from extproc.core.choice import At, Choice, Copy, Rule, choose, is_below, of_leased
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import FIRST

from .router import Router, Way

FACTOR = 1.25  # of the mean: router.balance_factor, and CHWBL's c
DYNAMO_TICK_S, DYNAMO_TICKS, DYNAMO_COOLDOWN = 3.0, 30, 3  # Dynamo's defaults: a tick, the window of 90 s, ticks that a smaller set waits for


class Core(Way):
    """`choice.choose`, given what `Staging` gives it."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def choose(self, adapter: str, copies: list[Copy], router: Router) -> Choice:
        snapshot, pool = router.snapshot, router.pool
        is_hot = adapter in router.popularity.hottest
        leased = [copy.endpoint for copy in copies if copy.at is At.LEASED]
        usable, wants_look = of_leased(leased, snapshot.stageable(snapshot.candidates(pool, adapter)), router.loads, self._rule, router.looks, is_hot=is_hot)
        if usable and not wants_look:
            return Choice(usable[0])
        if self._rule.looks_at_all:
            order = snapshot.usable(pool.table.endpoints)
        elif len(copies) > 1:
            order = snapshot.usable(pool.candidates(adapter, FIRST << len(copies).bit_length() - 1)) or snapshot.candidates(pool, adapter)
        else:
            order = snapshot.candidates(pool, adapter)
        choice = choose(copies, snapshot.stageable(order), router.loads, self._rule, is_hot=is_hot)
        return Choice(usable[0], prepare=choice.prepare or next(iter(choice.wait_for), None)) if usable else choice

    def is_below(self, place: Endpoint, router: Router) -> bool:
        return is_below(place, router.loads, self._rule)


class LeastLoaded(Way):
    """The endpoint with the least in flight, whatever it has."""

    def choose(self, adapter: str, copies: list[Copy], router: Router) -> Choice:
        return _at(router.snapshot.stageable(router.pool.table.endpoints), copies, router)


class Chwbl(Way):
    """Consistent hashing with bounded loads (Mirrokni et al. 2017): the first in the key's order that stays within c times the mean, this request included."""

    def choose(self, adapter: str, copies: list[Copy], router: Router) -> Choice:
        ready = len(router.pool.table.endpoints) - len(router.snapshot.standings)
        most = math.ceil(FACTOR * (router.loads.mean() * ready + 1) / ready)
        count = FIRST
        while True:
            order = router.snapshot.stageable(router.pool.candidates(adapter, count))
            for endpoint in order:
                if router.loads[endpoint.address].in_flight + 1 <= most:
                    return _at((endpoint,), copies, router)
            if count >= len(router.pool.table.endpoints):
                return _at(order, copies, router)
            count *= 2


class Dynamo(Way):
    """As many of the key's first endpoints as the adapter's share of the requests is worth in slots, and of those the least loaded. A set grows at once, and
    shrinks when it should have been smaller for some ticks."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._now: Counter[str] = Counter()
        self._window: list[Counter[str]] = []
        self._sum: Counter[str] = Counter()
        self._wanted: dict[str, int] = {}
        self._smaller: Counter[str] = Counter()  # ticks in a row
        self._next_tick = DYNAMO_TICK_S

    def choose(self, adapter: str, copies: list[Copy], router: Router) -> Choice:
        self._now[adapter] += 1
        if router.now >= self._next_tick:
            self._next_tick += DYNAMO_TICK_S
            self._tick(len(router.pool.table.endpoints))
        return _at(router.snapshot.stageable(router.pool.candidates(adapter, self._wanted.get(adapter, 1))), copies, router)

    def _tick(self, nodes: int) -> None:
        self._window.append(self._now)
        self._sum.update(self._now)
        self._now = Counter()
        if len(self._window) > DYNAMO_TICKS:
            self._sum.subtract(self._window.pop(0))
        total = sum(self._sum.values()) or 1
        for adapter, times in self._sum.items():
            wanted = min(nodes, max(1, math.ceil(times / total * nodes * self._slots)))
            self._smaller[adapter] = self._smaller[adapter] + 1 if wanted < self._wanted.get(adapter, 1) else 0
            if wanted > self._wanted.get(adapter, 1) or self._smaller[adapter] >= DYNAMO_COOLDOWN:
                self._wanted[adapter] = wanted


def _at(endpoints: tuple[Endpoint, ...], copies: list[Copy], router: Router) -> Choice:
    """The least loaded of these, where it has the adapter at once, else when it has."""
    loads = router.loads
    place = endpoints[0] if len(endpoints) == 1 else min(endpoints, key=lambda endpoint: loads[endpoint.address].in_flight)
    if any(copy.endpoint == place and copy.at in (At.LEASED, At.LEAVING) for copy in copies):
        return Choice(place)
    return Choice(None, (place,))
