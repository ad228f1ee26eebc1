"""Where a forwarded request goes: the first candidate that has the adapter or can get it, within the deadline."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..client import Staged
from ..core.decision import Forward
from ..core.endpoint import Endpoint
from ..errors import LoraExtprocError, NoEndpoint, NoSpace, StageDeadline
from ..metrics import RouterMetrics
from .admission import Admission
from .residency import Lease, Residency

log = logging.getLogger(__name__)

MAX_CANDIDATES = 3  # a fault of three nodes in a row is not theirs
NO_SPACE_PAUSE_S, MAX_NO_SPACE_PAUSE_S = 0.25, 2.0
USUAL_GAPS = 3  # silence of a stager counts as none of its usual ones above this many of them


@dataclass(slots=True)
class Placed:
    """Where the adapter is. `endpoints`: the chosen one, then others known to have it, for Envoy's retries."""

    endpoints: tuple[Endpoint, ...]
    outcome: str  # "hit", "staged", or "failover": not on the first candidate
    origin: str
    waited_s: float
    model: str = ""  # what the request's `model` must be there; "": as it is
    lease: Lease | None = None  # of the chosen one, for a request that did not wait


class Staging:
    """Waits for stagers. Every wait is bounded by the deadline and can be cancelled; the fetch it waits for goes on."""

    def __init__(
        self,
        residency: Residency,
        admission: Admission,
        metrics: RouterMetrics,
        *,
        no_space_wait_s: float,
        hedge_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residency = residency
        self._no_space_wait_s = no_space_wait_s
        self._hedge_s = hedge_s
        self._admission = admission
        self._metrics = metrics
        self._clock = clock

    def now(self, forward: Forward) -> Placed | None:
        """The answer, if no wait is needed: the first candidate that has the adapter.

        If that is not the owner, the owner came back without it, or is full. One that came back is prepared in the background, and has its key again
        with the next request after that.
        """
        for endpoint in forward.candidates[:MAX_CANDIDATES]:
            lease = self._lease(forward, endpoint)
            if lease is None:
                continue
            owner = forward.candidates[0]
            if endpoint is not owner and owner.stager and owner in forward.stageable and not self._residency.is_full(owner):
                self._residency.prepare(owner, forward.adapter, plain=forward.plain)
            return Placed(self._having(forward, endpoint, lease.model), "hit", "", 0.0, lease.model, lease)
        return None

    def again(self, forward: Forward, before: Placed) -> Placed | None:
        """The place that was waited for while the body arrived, if it is still one, by the name that its engine knows the adapter by now."""
        endpoint = before.endpoints[0]
        lease = self._lease(forward, endpoint) if endpoint in forward.candidates else None
        if lease is None:
            return None
        return Placed(self._having(forward, endpoint, lease.model), before.outcome, before.origin, before.waited_s, lease.model)

    async def wait(self, forward: Forward) -> Placed:
        """Walk the candidates. A failure that another node would share ends the walk; one that it may not share goes on to the next.

        Where all are full, the walk is repeated for `no_space_wait_s`: leases end, engines finish.

        Raises the first kind at once, the last of the second kind, StageDeadline, or Overloaded if too many wait already.
        """
        began = self._clock()
        with self._admission.waiting(forward.adapter):
            try:
                async with asyncio.timeout(forward.wait_s):
                    try:
                        return await self._walk(forward, began)
                    except NoSpace as error:
                        return await self._walk_again(forward, began, error.bare())
            except TimeoutError:
                failure = StageDeadline(f"{forward.adapter} is still being fetched after {forward.wait_s:g} s")
            finally:
                self._metrics.wait.observe(self._clock() - began)
        raise failure

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
        """Ask the candidates in turn, and beside one that makes no progress the next. The first that has the adapter is the place."""
        candidates = self._with_room_first([e for e in forward.stageable if e.stager][:MAX_CANDIDATES])
        failure: LoraExtprocError = NoEndpoint(f"{forward.adapter}: no candidate can be given it now")
        asked: dict[asyncio.Task[Staged], Endpoint] = {}
        entered = 0
        try:
            while asked or entered < len(candidates):
                if not asked or (entered < len(candidates) and self._is_stuck(forward, asked)):
                    endpoint = candidates[entered]
                    self._tell_of_hedge(forward, asked, endpoint)
                    entered += 1
                    asked.setdefault(self._residency.ask(endpoint, forward.adapter, plain=forward.plain), endpoint)  # endpoints of one stager share a call
                hedge_in_s = self._until_stuck_s(forward, asked) if entered < len(candidates) else None
                done, _ = await asyncio.wait(asked, timeout=hedge_in_s, return_when=asyncio.FIRST_COMPLETED)
                for call in sorted(done, key=lambda call: call.exception() is not None):  # of two in one moment, the good answer counts
                    endpoint = asked.pop(call)
                    error = call.exception()
                    if error is None:
                        return self._placed(forward, endpoint, call.result(), began)
                    if not isinstance(error, LoraExtprocError) or error.shared:
                        raise error
                    self._metrics.failovers.inc()
                    failure = error.bare()
        finally:
            for endpoint in candidates[:entered]:
                self._residency.leave(endpoint, forward.adapter, plain=forward.plain)
        raise failure

    def _tell_of_hedge(self, forward: Forward, asked: dict[asyncio.Task[Staged], Endpoint], second: Endpoint) -> None:
        for first in asked.values():
            self._metrics.hedges.inc()
            log.warning(
                "%s on %s: no progress for %.1f s; %s is asked too",
                forward.adapter,
                first.stager,
                self._residency.stuck_s(first, forward.adapter, plain=forward.plain),
                second.stager,
            )

    def _is_stuck(self, forward: Forward, asked: dict[asyncio.Task[Staged], Endpoint]) -> bool:
        return self._until_stuck_s(forward, asked) <= 0

    def _until_stuck_s(self, forward: Forward, asked: dict[asyncio.Task[Staged], Endpoint]) -> float:
        """Seconds until all that were asked will have told nothing new for longer than they may."""
        return max(
            max(self._hedge_s, USUAL_GAPS * self._residency.usual_gap_s(e)) - self._residency.stuck_s(e, forward.adapter, plain=forward.plain)
            for e in asked.values()
        )

    def _placed(self, forward: Forward, endpoint: Endpoint, staged: Staged, began: float) -> Placed:
        outcome = "failover" if endpoint is not forward.candidates[0] else "staged" if staged.staged else "hit"
        model = "" if staged.model == forward.adapter else staged.model
        return Placed(self._having(forward, endpoint, model), outcome, staged.origin if staged.staged else "", self._clock() - began, model)

    def _with_room_first(self, candidates: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """In their order, but those whose engine already has as many adapters in demand as it keeps in memory last: each more would cost a load per turn."""
        return sorted(candidates, key=self._residency.is_full)

    def _having(self, forward: Forward, chosen: Endpoint, model: str) -> tuple[Endpoint, ...]:
        """`chosen`, then the other candidates whose engines know the adapter by the same name: a retry sends the same body.

        One that lacks it would answer with 404, which no client repeats.
        """
        leases = ((e, self._lease(forward, e)) for e in forward.candidates if e is not chosen)
        return (chosen, *(e for e, lease in leases if lease is not None and lease.model == model))

    def _lease(self, forward: Forward, endpoint: Endpoint) -> Lease | None:
        return self._residency.lease(endpoint, forward.adapter, plain=forward.plain)
