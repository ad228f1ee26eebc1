"""One ext_proc stream: events to the exchange, its question to `decide`, the wait to Staging, its replies back. Knows no transport."""

import asyncio
import logging
from dataclasses import dataclass
from typing import Protocol

from ..core.decision import Facts, Forward, PassThrough, Policy, Reject, decide
from ..core.endpoint import Endpoint
from ..core.exchange import Action, Decide, Exchange, ImmediateReply, Mutation, State
from ..core.steering import Steering
from ..errors import LoraExtprocError
from ..metrics import RouterMetrics
from . import wire
from .membership import Membership
from .staging import Placed, Staging

log = logging.getLogger(__name__)


class Stream(Protocol):
    """What carries the messages of one exchange: grpc.aio today, anything that moves bytes in order tomorrow."""

    async def read(self) -> bytes | None:
        """The next ProcessingRequest; None when the gateway has closed its side."""

    async def write(self, message: bytes) -> None:
        """Send a ProcessingResponse; waits while the gateway does not take more."""


@dataclass(frozen=True, slots=True)
class Processor:
    """Serves streams. Everything here is shared by all of them; what belongs to one lives in `_Run`."""

    membership: Membership
    staging: Staging
    steering: Steering
    policy: Policy
    metrics: RouterMetrics
    max_body_bytes: int

    async def run(self, stream: Stream) -> None:
        """Serve one stream to its end. Cancelled when the client goes away: its wait ends, the fetch it waits for does not."""
        with self.metrics.streams.track_inprogress():
            await _Run(self, stream).run()


class _Run:
    """The walk of one request: receive, decide, wait, answer."""

    def __init__(self, processor: Processor, stream: Stream) -> None:
        self._p = processor
        self._stream = stream
        policy = processor.policy
        self._exchange = Exchange(max_body_bytes=processor.max_body_bytes, model_header=policy.model_header, forbidden_paths=policy.forbidden_paths)
        self._forward: Forward | None = None
        self._wait: asyncio.Task[Placed] | None = None  # staging, while the body still arrives or after it
        self._endpoint: Endpoint | None = None
        self._outcome = "abandoned"  # what the request is counted as when the stream ends
        self._reason = ""

    async def run(self) -> None:
        try:
            while True:
                if self._wait is not None and (self._exchange.awaits_decision() or self._wait.done()):
                    actions = await self._settle()
                else:
                    message = await self._stream.read()
                    if message is None:
                        return
                    actions = self._exchange.receive(wire.decode(message))
                await self._carry_out(actions)
        finally:
            if self._wait is not None:
                self._wait.cancel()
            if self._endpoint is not None:
                self._p.membership.end(self._endpoint)
            if self._exchange.state is not State.START:
                self._p.metrics.requests.labels(self._outcome, self._reason).inc()

    async def _carry_out(self, actions: list[Action]) -> None:
        while actions:
            action = actions.pop(0)
            if isinstance(action, Decide):
                actions += self._decide(action.facts)
                continue
            if isinstance(action, ImmediateReply):
                self._outcome, self._reason = "rejected", action.error.reason
                log.debug("rejected: %s: %s", action.error.reason, action.error.message)
            await self._stream.write(wire.encode(action))

    def _decide(self, facts: Facts) -> list[Action]:
        match decide(facts, self._p.membership.snapshot, self._p.policy):
            case Reject(error):
                return self._exchange.failed(error)
            case PassThrough(pool, key, candidates):
                order = candidates if key else self._p.membership.least_loaded(candidates)
                return self._exchange.decided(self._mutation(pool.name, order, "pass", model=facts.model or "", key=key or ""))
            case Forward() as forward:
                self._forward = forward
                placed = self._p.staging.now(forward)
                if placed is not None:
                    return self._exchange.decided(self._place(forward, placed))
                self._wait = asyncio.create_task(self._p.staging.wait(forward), name=f"wait {forward.adapter}")
                return []

    async def _settle(self) -> list[Action]:
        """The end of the wait, as the exchange's next step."""
        assert self._wait is not None
        assert self._forward is not None
        wait, self._wait = self._wait, None
        try:
            placed = await wait
        except LoraExtprocError as error:
            return self._exchange.failed(error)
        finally:
            wait.cancel()  # does nothing unless this stream was cancelled first
        return self._exchange.decided(self._place(self._forward, placed))

    def _place(self, forward: Forward, placed: Placed) -> Mutation:
        waited_ms = round(placed.waited_s * 1000, 1)
        log.debug("%s to %s: %s %s, waited %.1f ms", forward.adapter, placed.endpoints[0].address, placed.outcome, placed.origin, waited_ms)
        return self._mutation(
            forward.pool.name, placed.endpoints, placed.outcome, model=forward.adapter, key=forward.key, origin=placed.origin, waited_ms=waited_ms
        )

    def _mutation(self, pool: str, endpoints: tuple[Endpoint, ...], outcome: str, **notes: str | float) -> Mutation:
        self._outcome = outcome
        self._endpoint = endpoints[0]
        self._p.membership.begin(self._endpoint)
        return self._p.steering.mutation(pool, endpoints, {"owner": self._endpoint.node, "outcome": outcome, **notes})
