"""One ext_proc stream: events to the exchange, its question to `decide`, the wait to Staging, its replies back. Knows no transport."""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.decision import Facts, Forward, ListModels, PassThrough, Policy, Reject, decide
from ..core.endpoint import Endpoint
from ..core.events import Action, Decide, ImmediateReply, Mutation, OwnReply, RequestHeaders, ResponseHeaders
from ..core.exchange import Exchange, State
from ..core.steering import Steering
from ..errors import LoraExtprocError
from ..metrics import RouterMetrics
from . import wire
from .catalog import Catalog
from .holding import Holding
from .http2 import Message, Sender
from .membership import Membership
from .staging import Placed, Staging
from .tracing import Tracing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Processor:
    """What all streams share."""

    membership: Membership
    staging: Staging
    catalog: Catalog
    steering: Steering
    policy: Policy
    metrics: RouterMetrics
    holding: Holding
    max_body_bytes: int
    tracing: Tracing | None = None


class Conversation:
    """One stream, as the transport drives it: a message in, at once or later messages out. A warm request is served without a task.

    When the gateway goes away, the wait of its request ends; the fetch that it waits for does not.
    """

    __slots__ = (
        "_destination",
        "_exchange",
        "_forward",
        "_half_closed",
        "_headers",
        "_held_bytes",
        "_model",
        "_outcome",
        "_over",
        "_p",
        "_placed",
        "_reason",
        "_sender",
        "_wait",
        "_waits_since",
    )

    def __init__(self, processor: Processor, sender: Sender) -> None:
        self._p = processor
        self._sender = sender
        policy = processor.policy
        self._exchange = Exchange(max_body_bytes=processor.max_body_bytes, model_header=policy.model_header, forbidden_paths=policy.forbidden_paths)
        self._forward: Forward | None = None
        self._wait: asyncio.Task[Any] | None = None  # staging, while the body still arrives or after it; or for the list of models
        self._destination: tuple[Endpoint, ...] = ()  # best first
        self._placed: Placed | None = None  # what the wait gave, which may have been over before the body was
        self._headers: Mapping[str, str] = {}
        self._waits_since = 0.0
        self._model = ""
        self._held_bytes = 0
        self._outcome, self._reason = "abandoned", ""  # what the request is counted as when the stream ends
        self._half_closed = False
        self._over = False
        processor.metrics.open_streams += 1

    # -- the transport's side

    def receive(self, message: Message) -> None:
        """The next ProcessingRequest."""
        try:
            event = wire.decode(message)
            began = time.perf_counter()
            was = self._exchange.state
            actions = self._exchange.receive(event)
            if isinstance(event, RequestHeaders) and not self._headers:
                self._headers = event.headers
            if was is State.BODY and self._exchange.state is not State.BODY:
                took = time.perf_counter() - began
                self._p.metrics.scan.observe(took)
                self._trace("scan", took, {})
            if isinstance(event, ResponseHeaders) and event.served and self._destination:
                self._p.metrics.served.labels(str(self._destination[0].address == event.served).lower()).inc()
            self._carry_out(actions)
            self._count_bytes()
        except Exception:
            log.exception("a request failed in the router itself")
            self._carry_out(self._exchange.failed(LoraExtprocError("the router failed; its log says why")))

    def half_close(self) -> None:
        """The gateway sends no more. What it waits for is still answered."""
        self._half_closed = True
        if self._wait is None:
            self._sender.finish()
            self._end()

    def abandon(self) -> None:
        """The gateway has gone."""
        if self._wait is not None:
            self._wait.cancel()
        self._end()

    # -- the walk of one request: receive, decide, wait, answer

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Decide):
                self._carry_out(self._decide(action.facts))
                continue
            if isinstance(action, ImmediateReply):
                self._outcome, self._reason = "rejected", action.error.reason
                if self._wait is not None:
                    self._wait.cancel()
                action.notes = self._rejection_notes()
            elif isinstance(action, OwnReply):
                self._outcome, action.notes = "listed", {"outcome": "listed"}
            self._sender.send(wire.encode(action))

    def _decide(self, facts: Facts) -> list[Action]:
        self._model = facts.model or ""
        began = time.perf_counter()
        decision = decide(facts, self._p.membership.snapshot, self._p.policy)
        self._trace("decide", time.perf_counter() - began, {"model": facts.model or ""})
        match decision:
            case Reject(error):
                return self._exchange.failed(error)
            case ListModels():
                self._wait = asyncio.create_task(self._p.catalog.body(), name="models")
                self._wait.add_done_callback(self._listed)
                return []
            case PassThrough(pool, key, candidates):
                order = candidates if key else self._p.membership.least_loaded(candidates)
                return self._exchange.decided(self._mutation(pool.name, order, "pass", model=facts.model or "", key=key or ""))
            case Forward() as forward:
                self._forward = forward
                placed = self._placed and self._p.staging.again(forward, self._placed)
                placed = placed or self._p.staging.now(forward)
                if placed is not None:
                    return self._exchange.decided(self._place(forward, placed))
                self._waits_since = time.perf_counter()
                self._wait = asyncio.create_task(self._p.staging.wait(forward), name=f"wait {forward.adapter}")
                self._wait.add_done_callback(self._settled)
                return []

    def _listed(self, wait: asyncio.Task[bytes]) -> None:
        """The list of models is there."""
        self._wait = None
        if self._over:
            return
        if not wait.cancelled():
            error = wait.exception()
            if error is not None:
                log.error("the list of models failed in the router itself", exc_info=error)
            failed = LoraExtprocError("the router failed; its log says why")
            self._carry_out(self._exchange.answered(wait.result()) if error is None else self._exchange.failed(failed))
        if self._half_closed:
            self.half_close()

    def _settled(self, wait: asyncio.Task[Placed]) -> None:
        """The end of the wait, as the exchange's next step."""
        self._wait = None
        if self._over:
            return
        if not wait.cancelled():
            error = wait.exception()
            failed = "" if error is None else getattr(error, "reason", "internal")
            self._trace("stage", time.perf_counter() - self._waits_since, {"adapter": self._forward.adapter if self._forward else ""}, failed)
            if error is None:
                assert self._forward is not None
                self._placed = wait.result()
                self._carry_out(self._exchange.decided(self._place(self._forward, wait.result())))
            elif isinstance(error, LoraExtprocError):
                self._carry_out(self._exchange.failed(error))
            else:
                log.error("a wait failed in the router itself", exc_info=error)
                self._carry_out(self._exchange.failed(LoraExtprocError("the router failed; its log says why")))
        self._count_bytes()
        if self._half_closed:
            self.half_close()

    def _rejection_notes(self) -> Mapping[str, str | float]:
        if self._waits_since:
            return {"model": self._model, "waited_ms": round((time.perf_counter() - self._waits_since) * 1000, 1)}
        return {"model": self._model} if self._model else {}

    def _count_bytes(self) -> None:
        held = self._exchange.held_bytes
        if held != self._held_bytes:
            fits = self._p.holding.change_bytes(held - self._held_bytes)
            self._held_bytes = held
            if not fits:
                self._carry_out(self._exchange.failed(self._p.holding.too_many_bytes()))
                self._count_bytes()

    def _place(self, forward: Forward, placed: Placed) -> Mutation:
        waited_ms = round(placed.waited_s * 1000, 1)
        notes: dict[str, str | float] = {"model": forward.adapter, "key": forward.key, "origin": placed.origin, "waited_ms": waited_ms}
        if placed.model:
            notes["engine_model"] = placed.model
        return self._mutation(forward.pool.name, placed.endpoints, placed.outcome, placed.model, **notes)

    def _mutation(self, pool: str, endpoints: tuple[Endpoint, ...], outcome: str, engine_model: str = "", /, **notes: str | float) -> Mutation:
        self._outcome = outcome
        if self._destination:  # chosen while the body was arriving
            self._p.membership.end(self._destination[0])
        self._destination = endpoints
        self._p.membership.begin(endpoints[0])
        return self._p.steering.mutation(pool, endpoints, {"owner": endpoints[0].node, "outcome": outcome, **notes}, engine_model)

    def _trace(self, name: str, took_s: float, notes: Mapping[str, str | float], failed: str = "") -> None:
        if self._p.tracing is not None:
            self._p.tracing.record(f"lora_extproc.{name}", self._headers, took_s, notes, failed)

    def _log(self) -> None:
        """One line per exchange, with the words of the metrics' labels."""
        if log.isEnabledFor(logging.DEBUG):
            forward = self._forward
            owner = self._destination[0].address if self._destination else ""
            notes = {"request_id": self._headers.get("x-request-id", ""), "adapter": forward.adapter if forward else "", "owner": owner}
            notes |= {"outcome": self._outcome, "reason": self._reason}
            log.debug("exchange %s", " ".join(f"{name}={value}" for name, value in notes.items() if value), extra={"notes": notes})

    def _end(self) -> None:
        if self._over:
            return
        self._over = True
        self._p.metrics.open_streams -= 1
        if self._destination:
            self._p.membership.end(self._destination[0])
        self._p.holding.change_bytes(-self._held_bytes)
        self._held_bytes = 0
        if self._exchange.state is not State.START:
            self._p.metrics.requests.labels(self._outcome, self._reason).inc()
            self._log()
