"""Where a forwarded request goes: the copy that `core/choice.py` chooses of those that are known, or the endpoint that it would have one made at, once
that has it. Every wait ends with the deadline."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice

from ..client import Staged
from ..core.choice import At, Choice, Copy, Rule, Rules, choose, is_below, least_of, of_leased
from ..core.decision import Forward, PassThrough
from ..core.endpoint import Endpoint
from ..core.load import HELD_S, Loads
from ..core.maglev import FIRST
from ..core.placement import Snapshot
from ..core.popularity import Popularity
from ..core.prefix import Prefixes
from ..core.standing import Standing
from ..errors import LoraExtprocError, ModelNotFound, NoEndpoint, NoSpace, StageDeadline
from ..metrics import RouterMetrics
from .admission import Admission
from .prefetching import Prefetching
from .residency import Lease, Residency

log = logging.getLogger(__name__)

MAX_CANDIDATES = 3  # a fault of three nodes in a row is not theirs
NO_SPACE_PAUSE_S, MAX_NO_SPACE_PAUSE_S = 0.25, 2.0
CHOSEN_AGAIN = 6  # times, and then it goes: copies may double each time, and 64 are enough for the hottest of a thousand nodes
WARM_S = 0.5  # a stager that has the adapter in its engine's memory answers within milliseconds, or hangs
USUAL_GAPS = 3  # silence of a stager counts as none of its usual ones above this many of them

# As in `choice`, since a look at all copies asks for them of each.
_LEASED, _LEAVING, _PARTING, _WARM, _COMING, _LOADING, _COLD = At
_READY, _DRAINING = Standing.READY, Standing.DRAINING


@dataclass(slots=True)
class Placed:
    """Where the adapter is. `endpoints`: the chosen one, then others known to have it, for Envoy's retries."""

    endpoints: tuple[Endpoint, ...]
    outcome: str  # "hit", "staged", or "failover": not on the first candidate
    origin: str
    waited_s: float
    model: str = ""  # what the request's `model` must be there; "": as it is
    lease: Lease | None = None  # of the chosen one, for a request that did not wait
    sent: tuple[Endpoint, ...] = ()  # where it counts already: of those who waited for one copy, each sees who went before it
    prefiller: Endpoint | None = None  # that computes the prompt, and knows the adapter by the same name; None: the chosen one does


class Staging:
    """Waits for stagers. Every wait is bounded by the deadline and can be cancelled; the fetch it waits for goes on."""

    def __init__(
        self,
        residency: Residency,
        admission: Admission,
        metrics: RouterMetrics,
        *,
        snapshot: Callable[[], Snapshot],
        loads: Mapping[str, Loads],
        popularity: Popularity,
        prefixes: Prefixes,
        rules: Rules,
        no_space_wait_s: float,
        hedge_s: float,
        max_endpoints: int,
        prefetching: Prefetching | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residency = residency
        self._snapshot = snapshot
        self._loads = loads
        self._hot = popularity
        self._prefixes = prefixes
        self._known_blocks, self._new_blocks = (metrics.prompt_blocks.labels(seen) for seen in ("known", "new"))
        self._rules = rules
        self._max_others = max_endpoints - 1
        self._no_space_wait_s = no_space_wait_s
        self._hedge_s = hedge_s
        self._admission = admission
        self._metrics = metrics
        self._prefetching = prefetching
        self._clock = clock
        self._looks = 0

    def now(self, forward: Forward) -> Placed | None:
        """The answer, if no wait is needed on either side."""
        placed = self._now(forward)
        if placed is None or forward.prefill is None:
            return placed
        prefiller = self._now(forward.prefill)
        return None if prefiller is None and self.can_stage(forward.prefill) else _with_prefiller(placed, prefiller)

    def _now(self, forward: Forward) -> Placed | None:
        forward = self._up_to_date(forward)
        return self._by_leases(forward) or self._by_all(forward)

    def _up_to_date(self, forward: Forward) -> Forward:
        """The same by the fleet that there is now: of one that is held, endpoints may have gone, and others come. It may have no candidates any more."""
        snapshot = self._snapshot()
        if snapshot is forward.snapshot:
            return forward
        pool = snapshot.pool(forward.pool.name) or forward.pool
        return replace(forward, snapshot=snapshot, pool=pool, candidates=snapshot.candidates(pool, forward.key, forward.subset))

    def _by_leases(self, forward: Forward) -> Placed | None:
        """The usual case: the leased copies are all that is looked at."""
        snapshot, adapter = forward.snapshot, forward.adapter
        leases = self._residency.leased(self._residency.copies.warm(adapter), adapter, plain=forward.plain)
        if not leases:
            return None
        leased = snapshot.stageable([endpoint for stager in leases for endpoint in forward.pool.at(stager)])
        if forward.subset is not None:
            leased = snapshot.usable(leased, forward.subset)
        self._looks += 1
        loads, rule = self._loads[forward.pool.name], self._rules.of(adapter)
        usable, wants_look = of_leased(leased, snapshot.stageable(forward.candidates), loads, rule, self._looks, is_hot=adapter in self._hot.hottest)
        if not usable:
            return None
        if wants_look:
            asyncio.get_running_loop().call_soon(self._look, forward)
        chosen = usable[0] if len(usable) == 1 else self._prefixes.preferred(usable, forward.blocks, forward.session) or usable[0]
        lease = self._lease(forward, chosen)  # which renews it
        if lease is None:
            return None
        endpoints: tuple[Endpoint, ...] = (chosen,)
        if len(leased) > 1:
            others = (e for e in leased if e is not chosen and leases[e.stager].model == lease.model)
            endpoints = (chosen, *islice(others, self._max_others))
        return Placed(endpoints, "hit", "", 0.0, lease.model, lease)

    def _look(self, forward: Forward) -> None:
        """Have prepared what `choose` says, or would wait for."""
        choice = self._choose(self._up_to_date(forward))
        for endpoint in (choice.prepare, *choice.wait_for[:1]):
            self._prepare(endpoint, forward)

    def _prepare(self, endpoint: Endpoint | None, forward: Forward) -> None:
        if endpoint is not None:
            self._residency.prepare(endpoint, forward.adapter, plain=forward.plain)

    def _by_all(self, forward: Forward) -> Placed | None:
        """What `choose` says of all copies; what is to be prepared in the background is."""
        choice = self._choose(forward)
        chosen = choice.serve
        if chosen is None and choice.wait_for and self._lease(forward, choice.wait_for[0]) is not None:
            chosen = choice.wait_for[0]  # its engine has to load it, which a wait would not spare
        lease = self._lease(forward, chosen) if chosen is not None else None
        if choice.prepare is not None:
            asyncio.get_running_loop().call_soon(self._prepare, choice.prepare, forward)  # when the request has gone
        if chosen is None or lease is None:
            return None
        return Placed(self._having(forward, chosen, lease.model), "hit", "", 0.0, lease.model, lease)

    def can_stage(self, forward: Forward) -> bool:
        """Whether some endpoint may be given the adapter now."""
        return bool(self._order(forward, self._rules.of(forward.adapter), 0))

    def count(self, forward: Forward, placed: Placed) -> None:
        """The request has gone where it was sent."""
        self._hot.count(forward.adapter, forward.key)
        if self._prefetching is not None:
            if not placed.waited_s:
                self._prefetching.asked(forward.adapter, forward.key, plain=forward.plain)
            self._prefetching.served(forward.adapter, forward.key, placed.endpoints[0].stager)
        self.sent(forward.blocks, placed.endpoints[0], placed.prefiller)

    def sent(self, blocks: Sequence[int], endpoint: Endpoint, prefiller: Endpoint | None) -> None:
        """Remember who was sent this prompt. It is counted where it is computed."""
        if not blocks:
            return
        known = self._prefixes.record(endpoint, blocks)
        if prefiller is not None:
            known = self._prefixes.record(prefiller, blocks)
        for counter, times in ((self._known_blocks, known), (self._new_blocks, len(blocks) - known)):
            if times:  # mostly one of the two is 0, and an increment takes a lock
                counter.inc(times)

    def spread(self, through: PassThrough, turn: int) -> Sequence[Endpoint]:
        """Where a base model's request goes that has no key, best first: every endpoint has the model, so it is chosen among as among copies."""
        loads = self._loads[through.pool.name]
        least = least_of(through.candidates, loads, turn)
        preferred = self._preferred(through.places, through, loads, self._rules.common)
        return least if preferred is None else [preferred, *(endpoint for endpoint in least if endpoint != preferred)]

    def _preferred(self, endpoints: Sequence[Endpoint], request: Forward | PassThrough, loads: Loads, rule: Rule) -> Endpoint | None:
        """The one of these below the bound that holds most of the prompt, or that the session belongs to."""
        if len(endpoints) < 2 or rule.balance != "bounded" or not (request.blocks or request.session):
            return None
        bound = loads.bound(rule.factor)
        below = loads.below(endpoints, bound)
        return self._prefixes.preferred(below, request.blocks, request.session) if below else None

    def _choose(self, forward: Forward) -> Choice:
        rule = self._rules.of(forward.adapter)
        loads = self._loads[forward.pool.name]
        copies = self._copies(forward)
        preferred = self._preferred([copy.endpoint for copy in copies if copy.at is _LEASED], forward, loads, rule) if len(copies) > 1 else None
        return choose(
            copies,
            self._order(forward, rule, len(copies)),
            loads,
            rule,
            preferred,
            is_hot=forward.adapter in self._hot.hottest,
            copying=self._residency.copying,
        )

    def _copies(self, forward: Forward) -> list[Copy]:
        """Where the adapter is, of the endpoints that may be sent this request."""
        snapshot, found = forward.snapshot, []
        nodes = self._residency.copies.of(forward.adapter)
        leases = self._residency.leased([stager for stager, _ in nodes], forward.adapter, plain=forward.plain)
        compared = self._residency.compared(forward.adapter)
        for stager, in_memory in nodes:
            is_leased, warm = stager in leases, in_memory and stager not in compared
            endpoints: Sequence[Endpoint] = forward.pool.at(stager)
            if forward.subset is not None:
                endpoints = snapshot.usable(endpoints, forward.subset)
            for endpoint in endpoints:
                standing = snapshot.standing(endpoint) if snapshot.standings else _READY
                if standing is _READY:
                    found.append(Copy(endpoint, _COLD if not warm else _LEASED if is_leased else _WARM))
                elif standing is _DRAINING and (is_leased or warm):
                    found.append(Copy(endpoint, _LEAVING if is_leased else _PARTING))
        asked = self._residency.asked(snapshot.stageable(forward.candidates), forward.adapter, plain=forward.plain)
        has_lease = bool(asked) and any(copy.at is _LEASED for copy in found)
        for endpoint in asked:
            copy = next((copy for copy in found if copy.endpoint == endpoint), None)
            if copy is None:
                found.append(Copy(endpoint, _COMING))
            elif copy.at is _COLD and not has_lease:
                copy.at = _LOADING
        return found

    def _order(self, forward: Forward, rule: Rule, copies: int) -> Sequence[Endpoint]:
        """The endpoints in the key's order that may be given something new: as many as the rule looks at."""
        snapshot, pool = forward.snapshot, forward.pool
        if rule.looks_at_all:
            order = snapshot.usable(pool.table.endpoints, forward.subset)
        elif copies > 1 and forward.subset is None:  # as many more as there are copies, in powers of two, since orders are remembered by length
            order = snapshot.usable(pool.candidates(forward.key, FIRST << copies.bit_length() - 1)) or forward.candidates
        else:
            order = forward.candidates
        return pool.staged(snapshot.stageable(order))

    def again(self, forward: Forward, before: Placed) -> Placed | None:
        """The place that was waited for while the body arrived, if it is still one, by the name that its engine knows the adapter by now."""
        endpoint, forward = before.endpoints[0], self._up_to_date(forward)
        lease = self._lease(forward, endpoint) if _is_usable(endpoint, forward) else None
        if lease is None:
            return None
        placed = Placed(self._having(forward, endpoint, lease.model), before.outcome, before.origin, before.waited_s, lease.model, sent=before.sent)
        return placed if forward.prefill is None else _with_prefiller(placed, self._now(forward.prefill))

    async def wait(self, forward: Forward) -> Placed:
        """Walk the candidates. A failure that another node would share ends the walk; one that it may not share goes on to the next.

        Where all are full, the walk is repeated for `no_space_wait_s`: leases end, engines finish. Both sides of a decoding pool are waited for; where the
        one that computes prompts fails, the other does without.

        Raises the first kind at once, the last of the second kind, StageDeadline, or Overloaded if too many wait already.
        """
        began = self._clock()
        if self._prefetching is not None:
            self._prefetching.asked(forward.adapter, forward.key, plain=forward.plain)
        with self._admission.waiting(forward.adapter):
            try:
                if forward.prefill is not None:
                    return await self._both_sides(forward, forward.prefill, began)
                async with asyncio.timeout(forward.wait_s):
                    return await self._one_side(forward, began)
            except ModelNotFound:
                if self._prefetching is not None:
                    self._prefetching.is_none(forward.adapter)
                raise
            except TimeoutError:
                failure = StageDeadline(f"{forward.adapter} is still being fetched after {forward.wait_s:g} s")
            finally:
                self._metrics.wait.observe(self._clock() - began)
        raise failure

    async def _both_sides(self, forward: Forward, prefill: Forward, began: float) -> Placed:
        """The side that was ready first may not be any more when the other one is. At the deadline, or where the other one fails, the one that decodes goes
        alone. Raises TimeoutError if it is not ready by then."""
        prefilling = self._prefill(prefill, began)
        placed: Placed | None = None
        prefiller: Placed | None = None
        try:
            async with asyncio.timeout(forward.wait_s):
                for _ in range(CHOSEN_AGAIN):
                    placed = None
                    placed = self._now(forward) or await self._one_side(forward, began)
                    prefiller = await prefilling
                    if prefiller is not None and not self._is_ready(prefill, prefiller):
                        prefiller, prefilling = None, self._prefill(prefill, began)
                        prefiller = await prefilling
                    if self._is_ready(forward, placed):
                        break
        except TimeoutError:
            if placed is None:
                raise
            log.warning("%s: the engines of pool %s that would compute its prompts have it not yet", forward.adapter, prefill.pool.name)
        finally:
            prefilling.cancel()
            await asyncio.gather(prefilling, return_exceptions=True)
        assert placed is not None
        return _with_prefiller(placed, prefiller)

    def _prefill(self, prefill: Forward, began: float) -> asyncio.Task[Placed | None]:
        """Have it made ready there. None if that fails, and at once where there is no room: the other side does without."""

        async def place() -> Placed | None:
            try:
                return self._now(prefill) or await self._walk(prefill, began)
            except LoraExtprocError as error:
                log.warning("%s: no engine of pool %s can compute its prompts: %s", prefill.adapter, prefill.pool.name, error.message)
                return None

        return asyncio.create_task(place(), name=f"prefill {prefill.adapter}")

    def _is_ready(self, forward: Forward, placed: Placed) -> bool:
        """Whether the adapter is still where it was found."""
        endpoint = placed.endpoints[0]
        return _is_usable(endpoint, self._up_to_date(forward)) and self._residency.known(endpoint, forward.adapter, plain=forward.plain) is not None

    async def _one_side(self, forward: Forward, began: float) -> Placed:
        try:
            return await self._walk(forward, began)
        except NoSpace as error:
            return await self._walk_again(forward, began, error.bare())

    async def _walk_again(self, forward: Forward, began: float, failure: NoSpace) -> Placed:
        """Nobody had room: try until `no_space_wait_s` have passed since the wait began, then raise what was said last."""
        pause_s = NO_SPACE_PAUSE_S
        try:
            async with asyncio.timeout(max(0.0, self._no_space_wait_s - (self._clock() - began))):
                while True:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, MAX_NO_SPACE_PAUSE_S)  # each walk asks origins anew
                    try:
                        return await self._walk(forward, began)
                    except NoSpace as error:
                        failure = error.bare()
        except TimeoutError:
            raise failure from None

    async def _walk(self, forward: Forward, began: float) -> Placed:
        """Wait for the place that is chosen, and choose again where it has gone or has too much by then: all who come while the first copy of an adapter is
        fetched wait for that one."""
        loads, rule = self._loads[forward.pool.name], self._rules.of(forward.adapter)
        forward = self._up_to_date(forward)
        for chosen in count(1):
            choice = self._choose(forward)
            placed = await self._ask(forward, choice, began)
            forward = self._up_to_date(forward)
            if not _is_usable(placed.endpoints[0], forward):
                continue
            has_waited_enough = choice.within_s < math.inf and placed.endpoints[0] not in choice.wait_for[:1]
            if has_waited_enough or chosen > CHOSEN_AGAIN or is_below(placed.endpoints[0], loads, rule):
                break
            at_once = self._by_all(forward)
            if at_once is not None:
                placed = Placed(at_once.endpoints, placed.outcome, placed.origin, placed.waited_s, at_once.model)
                break
        loads.send(placed.endpoints[0].address, self._clock())
        placed.sent = placed.endpoints[:1]
        return placed

    async def _ask(self, forward: Forward, choice: Choice, began: float) -> Placed:
        """Ask the candidates in turn, and beside one that makes no progress the next. The first that has the adapter is the place.

        A leased one is the place without being asked, since its stager may hang: such a one is met where loads have changed since the request had to wait, and
        after a copy that was not to be waited for any longer.
        """
        loads = self._loads[forward.pool.name]
        candidates = choice.wait_for[:MAX_CANDIDATES] if choice.serve is None else (choice.serve,)
        failure: LoraExtprocError = NoEndpoint(f"{forward.adapter}: no candidate can be given it now")
        asked: dict[asyncio.Task[Staged], Endpoint] = {}
        entered, asked_at, loop = 0, self._clock(), asyncio.get_running_loop()
        held: dict[str, asyncio.TimerHandle] = {}  # by address, until it is released there

        def release(address: str) -> None:
            if held.pop(address, None) is not None:
                loads.release(address)

        try:
            while asked or entered < len(candidates):
                next_in_s = self._next_in_s(forward, asked, asked_at + choice.within_s if entered == 1 else math.inf)
                if entered < len(candidates) and next_in_s <= 0:
                    endpoint = candidates[entered]
                    lease = self._lease(forward, endpoint)
                    if asked and self._until_stuck_s(forward, asked) <= 0:
                        self._tell_of_hedge(forward, asked, f"{endpoint.stager} {'is asked too' if lease is None else 'has it'}")
                    if lease is not None:
                        outcome = "failover" if entered else "hit"
                        return Placed(self._having(forward, endpoint, lease.model), outcome, "", self._clock() - began, lease.model)
                    entered += 1
                    loads.hold(endpoint.address)
                    held[endpoint.address] = loop.call_later(HELD_S, release, endpoint.address)
                    asked.setdefault(self._residency.ask(endpoint, forward.adapter, plain=forward.plain), endpoint)  # endpoints of one stager share a call
                    continue
                done, _ = await asyncio.wait(asked, timeout=next_in_s if entered < len(candidates) else None, return_when=asyncio.FIRST_COMPLETED)
                for call in sorted(done, key=lambda call: call.exception() is not None):  # of two in one moment, the good answer counts
                    endpoint = asked.pop(call)
                    error = call.exception()
                    if error is None:
                        return self._placed(forward, endpoint, call.result(), began, is_first=endpoint is candidates[0])
                    if not isinstance(error, LoraExtprocError) or error.shared:
                        raise error
                    self._metrics.failovers.inc()
                    failure = error.bare()
        finally:
            for address, later in tuple(held.items()):
                later.cancel()
                release(address)
            for endpoint in candidates[:entered]:
                self._residency.leave(endpoint, forward.adapter, plain=forward.plain)
        raise failure

    def _tell_of_hedge(self, forward: Forward, asked: dict[asyncio.Task[Staged], Endpoint], instead: str) -> None:
        for first in asked.values():
            self._metrics.hedges.inc()
            log.warning(
                "%s on %s: no progress for %.1f s; %s",
                forward.adapter,
                first.stager,
                self._residency.stuck_s(first, forward.adapter, plain=forward.plain),
                instead,
            )

    def _next_in_s(self, forward: Forward, asked: dict[asyncio.Task[Staged], Endpoint], until: float) -> float:
        """In how many seconds the next candidate is asked: when those that were make no progress, or at the time `until`."""
        return min(self._until_stuck_s(forward, asked), until - self._clock()) if asked else 0.0

    def _until_stuck_s(self, forward: Forward, asked: dict[asyncio.Task[Staged], Endpoint]) -> float:
        """Seconds until all that were asked will have told nothing new for longer than they may."""
        warm = {stager for stager, is_warm in self._residency.copies.of(forward.adapter) if is_warm}
        return max(
            (WARM_S if e.stager in warm else max(self._hedge_s, USUAL_GAPS * self._residency.usual_gap_s(e)))
            - self._residency.stuck_s(e, forward.adapter, plain=forward.plain)
            for e in asked.values()
        )

    def _placed(self, forward: Forward, endpoint: Endpoint, staged: Staged, began: float, *, is_first: bool) -> Placed:
        outcome = "failover" if not is_first else "staged" if staged.staged else "hit"
        model = "" if staged.model == forward.adapter else staged.model
        return Placed(self._having(forward, endpoint, model), outcome, staged.origin if staged.staged else "", self._clock() - began, model)

    def _having(self, forward: Forward, chosen: Endpoint, model: str) -> tuple[Endpoint, ...]:
        """`chosen`, then others whose engines know the adapter by the same name: a retry sends the same body.

        One that lacks it would answer with 404, which no client repeats.
        """
        nodes = self._residency.copies.of(forward.adapter)
        if len(nodes) < 2:
            return (chosen,)
        forward = self._up_to_date(forward)
        snapshot = forward.snapshot
        others = (e for stager, _ in nodes for e in forward.pool.at(stager) if e != chosen)
        leases = ((e, self._residency.known(e, forward.adapter, plain=forward.plain)) for e in others)
        serving = (e for e, lease in leases if lease is not None and lease.model == model and snapshot.serves(e))
        knowing = (e for e in serving if forward.subset is None or snapshot.usable((e,), forward.subset))
        return (chosen, *islice(knowing, self._max_others))

    def _lease(self, forward: Forward, endpoint: Endpoint) -> Lease | None:
        return self._residency.lease(endpoint, forward.adapter, plain=forward.plain)


def _is_usable(endpoint: Endpoint, forward: Forward) -> bool:
    """Whether it is one of the pool that may be sent this request."""
    return endpoint in forward.pool.at(endpoint.stager) and bool(forward.snapshot.usable((endpoint,), forward.subset))


def _with_prefiller(placed: Placed, prefiller: Placed | None) -> Placed:
    """The sidecar sends both engines the same body, so a prefiller that knows another version of the adapter is none."""
    if prefiller is not None and prefiller.model == placed.model:
        placed.prefiller = prefiller.endpoints[0]
        placed.sent += prefiller.sent
    return placed
