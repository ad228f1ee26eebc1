"""Which endpoint serves a request, where a new copy is made, and which copy is prepared in the background: pure rules over what the router knows.

The rule `bounded`. The *bound* is `balance_factor` times the mean of requests in flight; an endpoint is *below* it while it is known to have fewer.

| where the adapter is | the request | in the background |
| --- | --- | --- |
| leased here, some copies below the bound | its session's, or the one with the longest known prefix, else the one with the least in flight | a copy at home, if none is there; the next one, in time |
| leased here, none below the bound | waits for the next one, if that pays; else goes to the one with the least in flight | the next one |
| leased here only where an endpoint drains | that one | the best place |
| not leased here, in the memory of an engine whose endpoint drains, and the place that would be waited for has no files, or only on its disk and room in its engine | waits for that one, which costs one call, and neither fetch nor load | the best place |
| not leased here, but in some engine's memory | waits for the one of those with the least in flight, which costs one call; above the bound as one that is leased | the best place, above the bound |
| on no disk, but on its way to one | waits for that one, however many do: one fetch from an origin is enough | |
| on a disk, and on its way into an engine, or to another disk, below the bound with all that wait there | waits for that one | |
| elsewhere or nowhere | waits for the best place | |

The *next one* is a copy in another engine's memory below the bound, else the best place below the bound, if there may be another copy; where the adapter has
one leased copy, only from CERTAIN times the bound on. As many may be on their way as are leased here, so that copies double. In a full engine, where it costs
another adapter its place, it is made only for engines that are SLOWED or queue.

Waiting for the next one, rather than going to the least loaded of the leased ones, pays in these cases; in the last two not while an endpoint drains that has the
adapter. Where the wait has an end, the request goes there then: an adapter may be larger than others.

| what the next one costs | the least loaded one | until |
| --- | --- | --- |
| a call | is above the bound | it makes no progress |
| anything | is crowded. For its sake the next one may be above the bound itself | it makes no progress |
| a load, or a fetch and a load | has a queue that lasts LONGER | LONGER than that usually takes |
| a load, BRIEF beside a request's own time | is SLOWED | likewise |
| a fetch and a load, as BRIEF | has MANIFEST requests; FAR above the bound for who is the first to want that fetch | likewise |

*In time* is, of more than MANY copies, when not half of them are below the bound. Where engines are SLOWED and the next one's has room for it, it is when, of
many, not half are below NEAR times the bound, and of fewer none is.

Who has waited chooses again, as one that comes then, if its place is not below the bound any more: all that come in the time of a fetch wait for one copy.
The *best place* is the less loaded of the key's first two endpoints (its *home*) that may be given something new, of those below the bound: one whose engine
has room for an adapter before one that is full, one that has the files before one that has not, unless it is NEAR the bound. Else it is the first of the key's
next ones that is below the bound; else the least loaded.

Most requests need no look at the whole table: `of_leased` serves them by the leased copies alone. Of what has at most MANY, one of them is at home and one
below the bound; of what has more, the least loaded serves even above the bound, unless its engine queues. What is to be prepared beside them is looked for with
one request in SOON, OFTEN or SELDOM, when that has gone: they are asked for so often that it comes soon enough.

How many copies an adapter has follows from this. tests/bench/README.md (`fleet`) has this rule beside the others, which are here for those who compare:
they make one copy and stay with it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Literal

from .durations import Copying
from .endpoint import Endpoint
from .load import Load, Loads

Balance = Literal["bounded", "maglev", "hrw", "random", "least_adapters", "least_latency", "bin_pack"]
SAMPLED = 8  # endpoints that a base model's request chooses among
_REMEMBERED = 65_536  # adapters whose pattern was looked for
MANY = 4  # copies, above which a look at all of them costs more than what it finds is worth
SOON, OFTEN, SELDOM = 4, 16, 128  # one request in so many looks at all: near the bound; where a copy may be wanted (of more, one in as many); where all is well
CERTAIN = 1.03  # times the bound: what an adapter's one copy has less beyond is chance, over before a load would be: of 24 requests of 4 s one ends in 0.17 s
FAR = 1.1  # times the bound, from which on a request waits for a fetch that it is the first to want
CROWDED = 1.5  # times the bound, and ONCE at least
ONCE = 32  # requests that an engine takes without crowding: an eighth of what a vLLM is set to compute at once by default
SLOWED = 8  # requests at once, from which on one more is noticed by the others: decoding reads the same weights for one as for a few
MANIFEST = 16  # requests at once, which one more slows by more than a little: what a fetch costs is more than a load, too
BRIEF = 1 / 3  # of a request's own time: to wait so long for an engine that has less to do costs nobody much
LONGER = 2.0  # times what a copy takes: the queue is a look old, and gets shorter meanwhile
NEAR = 0.92  # of the bound: from here on an endpoint is given no more because it has the files, and the next copy is prepared where engines have room
COPYING = Copying()  # while none was made
HOME = 2  # of the key's endpoints: the places where its copy belongs; the less loaded of two is nearly as good as that of all (Mitzenmacher 1996)


class At(Enum):
    """What a copy is worth to this router."""

    __hash__ = object.__hash__  # members are compared by identity

    LEASED = "leased and in the engine's memory: served at once"
    LEAVING = "leased, on an endpoint that drains"
    PARTING = "in the memory of an engine whose endpoint drains: a lease costs one call, and is not for long"
    WARM = "in the engine's memory, as its stager says: a lease costs one call"
    COMING = "its files are on their way, since this router has asked for it"
    LOADING = "on disk, and about to be loaded, since this router has asked for it"
    COLD = "on disk alone: a request costs a load into the engine, whether it is leased or not"


_LEASED, _LEAVING, _PARTING, _WARM, _COMING, _LOADING, _COLD = At  # a look at all copies asks dozens of times, and `At.COLD` takes ten times as long


@dataclass(slots=True)
class Copy:
    endpoint: Endpoint
    at: At


@dataclass(slots=True)
class Choice:
    """What to do. Without `serve` the request waits for the first of `wait_for`; the next ones are asked if that makes no progress, and the second after
    `within_s`, whatever the first makes."""

    serve: Endpoint | None = None
    wait_for: tuple[Endpoint, ...] = ()
    prepare: Endpoint | None = None
    within_s: float = field(default=math.inf, compare=False)


@dataclass(frozen=True, slots=True)
class Rule:
    """How to choose. `max_copies` 0: as many as the load makes. `min_copies` are kept whatever the load. `draw`: a number below the one it is given, for `random`."""

    draw: Callable[[int], int]
    balance: Balance = "bounded"
    factor: float = 1.25
    min_copies: int = 1
    max_copies: int = 0

    @property
    def looks_at_all(self) -> bool:
        """Whether it chooses among all endpoints, whatever the key."""
        return self.balance not in ("bounded", "maglev", "hrw")


class Rules:
    """The rule of each adapter: the common one, with the copies that the first shell pattern that matches its name wants."""

    def __init__(self, common: Rule, copies: Sequence[tuple[str, int, int]] = ()) -> None:
        self.common = common
        self._patterns = [(pattern, replace(common, min_copies=least, max_copies=most)) for pattern, least, most in copies]
        self._matched = lru_cache(_REMEMBERED)(self._match)

    def of(self, adapter: str) -> Rule:
        return self._matched(adapter) if self._patterns else self.common

    def _match(self, adapter: str) -> Rule:
        return next((rule for pattern, rule in self._patterns if fnmatchcase(adapter, pattern)), self.common)


def choose(
    copies: Sequence[Copy],
    order: Sequence[Endpoint],
    loads: Loads,
    rule: Rule,
    preferred: Endpoint | None = None,
    *,
    is_hot: bool = False,
    copying: Copying = COPYING,
) -> Choice:
    """`copies`: that may be used at all. `order`: the key's endpoints that may be given something new, in its order; all, for the rules that look at all.
    `preferred`: the copy that is known to hold most of this prompt. `copying`: how long another copy takes."""
    if rule.balance != "bounded":
        return _compared(copies, order, loads, rule)
    bound = loads.bound(rule.factor)
    leased = [copy.endpoint for copy in copies if copy.at is _LEASED]
    if not leased:
        return _without_lease(copies, order, loads, bound, rule, copying)
    least = leased[0] if len(leased) == 1 else _least(loads.below(leased, bound) or leased, loads, order)
    known = loads[least.address].known
    serve = preferred if preferred is not None and preferred in leased and loads[preferred.address].known < bound else least
    if known < bound:
        if (place := _in_time(leased, least, copies, order, loads, bound, rule)) is not None:
            return Choice(serve, prepare=place)
        return Choice(serve, prepare=_home(leased, copies, order, loads, bound, rule) or _spare(copies, order, loads, bound, rule, is_hot=is_hot))
    following = _following(least, copies, order, loads, bound, rule)
    at = _at(following, copies)
    if following is None or (len(leased) == 1 and known < CERTAIN * bound and at is not _WARM):
        return Choice(least)
    wait_s = _wait_s(at, least, copies, loads, bound, copying)
    return Choice(None, (following, least), within_s=wait_s) if wait_s else Choice(least, prepare=following)


def of_leased(
    leased: Sequence[Endpoint], order: Sequence[Endpoint], loads: Loads, rule: Rule, look: int, *, is_hot: bool = False
) -> tuple[Sequence[Endpoint], bool]:
    """The leased copies that a request may go to, first the best, and whether `choose` should say what to prepare beside it; none if all copies have to be
    looked at before the request goes. `look` counts requests."""
    if rule.balance != "bounded" or not leased:
        return (), False
    bound = loads.bound(rule.factor)
    below = loads.below(leased, bound)
    if len(leased) > MANY:
        among = below or leased
        place = loads.least(among, look)  # of equals any: routers that take different ones spread what they send
        if not below and loads[leased[place].address].is_queueing:
            return (), False
        wants_look = look % (max(OFTEN, len(leased)) if _runs_short(len(below), len(leased)) else SELDOM) == 0
        return (among[place], *below[:place], *below[place + 1 :]), wants_look
    if not below or len(leased) < rule.min_copies or not any(endpoint in order[:HOME] for endpoint in leased):
        return (), False
    least = below[0] if len(below) == 1 else _least(below, loads, order)
    is_near = look % SOON == 0 and loads[least.address].known >= NEAR * bound
    wants_look = loads.has_room and (is_near or (is_hot and len(leased) == 1 and look % OFTEN == 0))
    return below if len(below) == 1 else (least, *(endpoint for endpoint in below if endpoint is not least)), wants_look


def _runs_short(below: int, leased: int) -> bool:
    """Whether so few of the leased copies are `below` a bound that another should be there by the time that none is."""
    return 2 * below < leased if leased > MANY else not below


def is_below(endpoint: Endpoint, loads: Loads, rule: Rule) -> bool:
    """Whether who has waited for an adapter there goes there. If not, it chooses again, as one that comes now: many may have waited with it, and gone first."""
    return rule.balance != "bounded" or loads[endpoint.address].gone < loads.bound(rule.factor)


def _is_crowded(load: Load, bound: float) -> bool:
    """Whether one more would soon queue there."""
    return load.gone >= max(CROWDED * bound, ONCE)


def _at(place: Endpoint | None, copies: Sequence[Copy]) -> At | None:
    """What the copy at `place` is worth; None: it has none."""
    return next((copy.at for copy in copies if place is not None and copy.endpoint.address == place.address), None)


def _wait_s(at: At | None, instead: Endpoint, copies: Sequence[Copy], loads: Loads, bound: float, copying: Copying) -> float:
    """For how long a request should wait for a copy that is worth `at`, rather than go to one above the bound that has the adapter in memory; 0: not at all."""
    load = loads[instead.address]
    if at is _WARM or _is_crowded(load, bound):
        return math.inf
    is_fetch, service_s = at in (None, _COMING), loads.service.mean_s
    takes_s = copying.fetch_s if is_fetch else copying.load_s
    if load.queue_s(service_s) > LONGER * takes_s:
        return LONGER * takes_s
    if takes_s > BRIEF * service_s or any(copy.at in (_LEAVING, _PARTING) for copy in copies):
        return 0.0  # nor does anybody wait because an endpoint drains that served it
    pays = load.gone >= max(MANIFEST, FAR * bound if at is None else 0.0) if is_fetch else load.known >= SLOWED
    return LONGER * takes_s if pays else 0.0


def _without_lease(copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, rule: Rule, copying: Copying) -> Choice:
    warm = [copy.endpoint for copy in copies if copy.at is _WARM]
    leaving = [copy.endpoint for copy in copies if copy.at is _LEAVING]
    parting = [copy.endpoint for copy in copies if copy.at is _PARTING]
    place, beside, within_s = (
        _of_warm(warm, copies, order, loads, bound, rule, copying) if warm else (_of_none(copies, order, loads, bound, rule), None, math.inf)
    )
    if leaving:
        return Choice(_least(leaving, loads, order), prepare=place)
    if parting:
        has_files = _at(place, copies) in (_WARM, _LOADING, _COLD)
        if place is None or not has_files or not (warm or loads[place.address].is_full):
            return Choice(None, (*parting, *order), place)
    if place is None:
        return Choice()
    then = dict.fromkeys((*sorted(warm, key=lambda endpoint: loads[endpoint.address].in_flight), *order)) if warm else order
    return Choice(None, (place, *[endpoint for endpoint in then if endpoint is not place]), beside, within_s)


def _of_warm(
    warm: Sequence[Endpoint], copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, rule: Rule, copying: Copying
) -> tuple[Endpoint, Endpoint | None, float]:
    """Which of these to wait for, or for what place in their stead; what to prepare beside it; and for how long to wait, at the most."""
    least = _least(warm, loads, order)
    may_be_another = loads[least.address].known >= bound and not _are_enough(copies, rule)
    another = _best_place(copies, order, loads, bound, must_be_below=True) if may_be_another else None
    if another is None or not _is_worth(another, least, loads):
        return least, None, math.inf
    wait_s = _wait_s(_at(another, copies), least, copies, loads, bound, copying)
    return (another, None, wait_s) if wait_s else (least, another, math.inf)


def _of_none(copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, rule: Rule) -> Endpoint | None:
    """What to wait for where no engine has it: a copy on its way, unless too many others are sent there, else one to make."""
    coming = [copy.endpoint for copy in copies if copy.at in (_COMING, _LOADING)]
    if not coming:
        return _best_place(copies, order, loads, bound)
    has_files = any(copy.at in (_COLD, _LOADING) for copy in copies)
    joined = [endpoint for endpoint in coming if not has_files or loads[endpoint.address].awaited < bound]
    if joined or _are_enough(copies, rule):
        return (joined or coming)[0]
    return _best_place(copies, order, loads, bound, must_be_below=True) or _least(coming, loads, order)


def _following(least: Endpoint, copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, rule: Rule) -> Endpoint | None:
    """The next copy to use beside `least`: one that is there, else one to make, else none. Above the bound it is made only if that one is crowded."""
    warm = [copy.endpoint for copy in copies if copy.at is _WARM and loads[copy.endpoint.address].known < bound]
    if warm:
        return _least(warm, loads, order)
    if _are_enough(copies, rule):
        return None
    coming = [copy.endpoint for copy in copies if copy.at is _COMING]
    is_enough = len(coming) >= sum(copy.at is _LEASED for copy in copies)  # copies may double in the time that one takes
    place = coming[0] if is_enough else _best_place(copies, order, loads, bound, must_be_below=not _is_crowded(loads[least.address], bound))
    return place if place is not None and _is_worth(place, least, loads) else None


def _is_worth(place: Endpoint, instead: Endpoint, loads: Loads) -> bool:
    """Whether a copy at `place` is worth the place of another adapter that it costs a full engine. Where few run at once, an excess is mostly chance."""
    load = loads[instead.address]
    return load.known >= SLOWED or load.is_queueing or loads[place.address].has_room


def _in_time(
    leased: Sequence[Endpoint], least: Endpoint, copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, rule: Rule
) -> Endpoint | None:
    """The next copy, if it should be there by the time that none of the leased ones is below the bound, where `least` has the least."""
    is_short = _runs_short(len(loads.below(leased, bound)), len(leased))
    is_near = loads[least.address].known >= SLOWED and _runs_short(len(loads.below(leased, NEAR * bound)), len(leased))
    if not is_short and not is_near:
        return None
    place = _following(least, copies, order, loads, bound, rule)
    return place if place is not None and (is_short or loads[place.address].has_room) else None


def _spare(copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, rule: Rule, *, is_hot: bool) -> Endpoint | None:
    """A copy that the load does not need: as many as the adapter's own `min`, and a second of what is hot where an engine has room for it. Simulated at 16
    slots for 63 adapters per engine: where it displaces others, the hottest tenth's second copies raise loads per request from 0.26 to 0.41."""
    there = _in_memory(copies)
    if there < rule.min_copies:
        return _elsewhere(copies, order, loads, bound)
    if not is_hot or there > 1 or rule.max_copies == 1:
        return None
    place = _elsewhere(copies, order, loads, bound)
    return place if place is not None and loads[place.address].has_room else None


def _elsewhere(copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float) -> Endpoint | None:
    """The best place below the bound for a copy that shall outlive the others: in a zone that has none, if there is one."""
    zones = {copy.endpoint.zone for copy in copies if copy.at is not _COLD}
    apart = [endpoint for endpoint in order if endpoint.zone not in zones]
    return _best_place(copies, apart, loads, bound, must_be_below=True) or _best_place(copies, order, loads, bound, must_be_below=True)


def _are_enough(copies: Sequence[Copy], rule: Rule) -> bool:
    """Whether there are as many as there may be."""
    return 0 < rule.max_copies <= _in_memory(copies)


def _in_memory(copies: Sequence[Copy]) -> int:
    return sum(copy.at is not _COLD for copy in copies)


def _home(leased: Sequence[Endpoint], copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, rule: Rule) -> Endpoint | None:
    """Where a copy should be prepared because none is where the key belongs: its endpoints have come, or come back, since the copies were made."""
    home = [endpoint.address for endpoint in order[:HOME]]
    if not home or leased[0].address in home:
        return None
    at_home = [copy for copy in copies if copy.endpoint.address in home and copy.at is not _COLD]
    if not at_home:
        return None if _are_enough(copies, rule) else _best_place(copies, order[:HOME], loads, bound, must_be_below=True)
    return None if any(copy.at is _LEASED for copy in at_home) else at_home[0].endpoint


def _best_place(copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, bound: float, *, must_be_below: bool = False) -> Endpoint | None:
    """Where a new copy is made: not where one is in memory already."""
    taken = {copy.endpoint.address for copy in copies if copy.at is not _COLD}
    home = [endpoint for endpoint in order[:HOME] if endpoint.address not in taken and loads[endpoint.address].known < bound]
    if home:
        near = NEAR * bound
        has_files = [copy.endpoint.address for copy in copies if copy.at is _COLD and loads[copy.endpoint.address].known < near]
        return min(home, key=lambda endpoint: (loads[endpoint.address].is_full, endpoint.address not in has_files, loads[endpoint.address].in_flight))
    below = None
    for endpoint in order[HOME:]:
        load = loads[endpoint.address]
        if load.known < bound and endpoint.address not in taken:
            if not load.is_full:
                return endpoint
            below = below or endpoint
    if below is not None or must_be_below:
        return below
    free = [endpoint for endpoint in order if endpoint.address not in taken]
    return _least(free, loads, order) if free else None


def _least(endpoints: Sequence[Endpoint], loads: Loads, order: Sequence[Endpoint]) -> Endpoint:
    """The one with the least in flight; of equals the first in the key's order, which every router has."""
    least = min([loads[endpoint.address].in_flight for endpoint in endpoints])
    equals = [endpoint for endpoint in endpoints if loads[endpoint.address].in_flight == least]
    return equals[0] if len(equals) == 1 else next((endpoint for endpoint in order if endpoint in equals), equals[0])


# ---- the rules that others use


def _compared(copies: Sequence[Copy], order: Sequence[Endpoint], loads: Loads, rule: Rule) -> Choice:
    """`maglev` and `hrw` stay with the key's first endpoint; `random` draws anew for each request, as a load balancer does that knows no adapters; the
    others choose a place once, and stay with the copy."""
    usable = [copy.endpoint for copy in copies if copy.at is _LEASED] or [copy.endpoint for copy in copies if copy.at is _LEAVING]
    if not order:
        return Choice(_least(usable, loads, order) if usable else None)
    if rule.balance in ("maglev", "hrw"):
        place = order[0]
    elif rule.balance == "random":
        place = order[rule.draw(len(order))]
    elif usable:
        return Choice(_least(usable, loads, order))
    else:
        place = min(order, key=lambda endpoint: _PLACED_BY[rule.balance](loads, endpoint))
    if place in usable:
        return Choice(place)
    return Choice(None, (place, *(endpoint for endpoint in order if endpoint != place)))


_PLACED_BY: dict[str, Callable[[Loads, Endpoint], tuple[float, ...]]] = {
    # AIBrix's schedulers of the same names: where a new copy goes
    "least_adapters": lambda loads, endpoint: (loads[endpoint.address].adapters,),
    "least_latency": lambda loads, endpoint: (loads[endpoint.address].engine.waiting, loads[endpoint.address].in_flight),
    "bin_pack": lambda loads, endpoint: (loads[endpoint.address].is_full, -loads[endpoint.address].adapters),
}


def least_of(endpoints: Sequence[Endpoint], loads: Loads, turn: int) -> list[Endpoint]:
    """For a base model, which every endpoint has: the one with the least in flight of SAMPLED that follow each other, from another place each turn, then
    the rest of those. Of a thousand, eight are as good as all, and looked at within microseconds."""
    sampled = [endpoints[(turn + i) % len(endpoints)] for i in range(min(SAMPLED, len(endpoints)))]
    least = _least(sampled, loads, sampled)
    return [least, *(endpoint for endpoint in sampled if endpoint is not least)]
