"""Where a forwarded request goes: the first candidate that has the adapter or can get it, within the deadline."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.decision import Forward
from ..core.endpoint import Endpoint
from ..errors import LoraExtprocError, NoEndpoint, NoSpace, StageDeadline
from ..metrics import RouterMetrics
from .holding import Holding
from .residency import Lease, Residency

MAX_CANDIDATES = 3  # a fault of three nodes in a row is not theirs
NO_SPACE_PAUSE_S, MAX_NO_SPACE_PAUSE_S = 0.25, 2.0


@dataclass(slots=True)
class Placed:
    """Where the adapter is. `endpoints`: the chosen one, then others known to have it, for Envoy's retries."""

    endpoints: tuple[Endpoint, ...]
    outcome: str  # "hit", "staged", or "failover": not on the first candidate
    origin: str
    waited_s: float
    model: str = ""  # what the request's `model` must be there; "": as it is


class Staging:
    """Waits for stagers. Every wait is bounded by the deadline and can be cancelled; the fetch it waits for goes on."""

    def __init__(
        self, residency: Residency, holding: Holding, metrics: RouterMetrics, no_space_wait_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._residency = residency
        self._no_space_wait_s = no_space_wait_s
        self._holding = holding
        self._metrics = metrics
        self._clock = clock

    def now(self, forward: Forward) -> Placed | None:
        """The answer, if no wait is needed. While the owner's engine has no slot left, another that has the adapter is as good."""
        owner = forward.candidates[0]
        if (lease := self._lease(forward, owner)) is not None:
            return Placed(self._having(forward, owner, lease.model), "hit", "", 0.0, lease.model)
        if self._residency.is_full(owner):
            for endpoint in forward.candidates[1:MAX_CANDIDATES]:
                if (lease := self._lease(forward, endpoint)) is not None:
                    return Placed(self._having(forward, endpoint, lease.model), "hit", "", 0.0, lease.model)
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

        Where all are full, the walk is repeated for a while: leases end, engines finish.

        Raises the first kind at once, the last of the second kind, StageDeadline, or Overloaded if too many wait already.
        """
        began = self._clock()
        failure: LoraExtprocError = NoEndpoint(f"{forward.adapter}: no candidate has a stager")
        with self._holding.waiting(forward.adapter):
            try:
                async with asyncio.timeout(forward.wait_s):
                    pause_s = NO_SPACE_PAUSE_S
                    while True:
                        placed, failure = await self._walk(forward, began, failure)
                        if placed is not None:
                            return placed
                        if not isinstance(failure, NoSpace) or self._clock() - began >= self._no_space_wait_s:
                            break
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, MAX_NO_SPACE_PAUSE_S)  # each walk asks origins anew
            except TimeoutError:
                failure = StageDeadline(f"{forward.adapter} is still being fetched after {forward.wait_s:g} s")
            finally:
                self._metrics.wait.observe(self._clock() - began)
        raise failure

    async def _walk(self, forward: Forward, began: float, failure: LoraExtprocError) -> tuple[Placed | None, LoraExtprocError]:
        """Every candidate once: where it is, or the last one's failure. Raises what every node would answer."""
        for endpoint in self._with_room_first([e for e in forward.candidates if e.stager][:MAX_CANDIDATES]):
            try:
                staged = await self._residency.ensure(endpoint, forward.adapter, plain=forward.plain)
            except LoraExtprocError as error:
                if error.shared:
                    raise
                self._metrics.failovers.inc()
                failure = error
                continue
            waited = self._clock() - began
            outcome = "failover" if endpoint is not forward.candidates[0] else "staged" if staged.staged else "hit"
            model = _other(staged.model, forward.adapter)
            return Placed(self._having(forward, endpoint, model), outcome, staged.origin if staged.staged else "", waited, model), failure
        return None, failure

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


def _other(model: str, adapter: str) -> str:
    """`model` where it is another than the adapter's own name."""
    return "" if model == adapter else model
