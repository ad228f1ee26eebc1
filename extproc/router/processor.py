"""One ext_proc stream: events to the exchange, its questions to whoever can answer them, replies back. Knows no transport."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, TypeVar

from ..core import cors
from ..core.decision import Decision, Facts, Forward, ListModels, NobodyReady, PassThrough, Policy, Reject, decide
from ..core.endpoint import Endpoint
from ..core.events import (
    Action,
    BodyReply,
    Decide,
    HeadersReply,
    ImmediateReply,
    Judge,
    Mutation,
    OwnReply,
    Reply,
    RequestHeaders,
    ResponseHeaders,
    TrailersReply,
)
from ..core.exchange import Exchange, State
from ..core.maglev import MAX_KEY_CHARS
from ..core.paths import Paths
from ..core.placement import Pool
from ..core.steering import Steering
from ..errors import LoraExtprocError, NoEndpoint, StageDeadline
from ..metrics import RouterMetrics
from . import wire
from .account import Account
from .admission import Admission
from .http2.calls import Message, Sender
from .judging import Judges
from .membership import Membership
from .models import Models
from .residency import Reply as WarmReply
from .staging import Placed, Staging
from .tracing import Tracing
from .watchdog import Watchdog

log = logging.getLogger(__name__)

SENT_PER_TURN_BYTES = 2**20  # of one body; then the event loop is others'
LEAST_MEASURED_BYTES = 16 * 1024  # reading a smaller body takes microseconds, which say nothing
ASKED_AGAIN_S = 0.5  # stagers of which nothing new was heard, for a request that none of them answered
MAX_NOTED_KEY_CHARS = 256  # of a key in the access log: a header that is hashed may have 60 KB
BASE_MUTATIONS = 1024  # of base models: pools, times the endpoints that can be first

_START, _BODY, _JUDGING = State.START, State.BODY, State.JUDGING  # as in the exchange, since each message looks for them

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    """What all streams share."""

    membership: Membership
    staging: Staging
    models: Models
    judges: Judges
    admission: Admission
    watchdog: Watchdog
    steering: Steering
    policy: Policy
    paths: Paths
    metrics: RouterMetrics
    max_body_bytes: int
    no_endpoint_wait_s: float
    with_blocks: bool = False  # whether the verdict hashes a prompt's blocks
    cors_allow_origins: Sequence[str] = ()
    tracing: Tracing | None = None
    clock: Callable[[], float] = time.perf_counter  # seconds; what waits and spans are measured by


class Processor:
    """One stream, as the transport drives it: a message in, at once or later messages out. A warm request is served without a task.

    When the gateway goes away, the wait of its request ends; the fetch that it waits for does not.
    """

    __slots__ = ("_account", "_exchange", "_half_closed", "_named", "_outbox", "_placed", "_s", "_sender", "_sends_later", "_tasks")

    def __init__(self, services: Services, sender: Sender) -> None:
        self._s = services
        self._sender = sender
        self._account = Account(services.admission, services.metrics, services.tracing, self._refuse)
        self._exchange = Exchange(
            max_body_bytes=services.max_body_bytes,
            model_header=services.policy.model_header,
            allowed=services.paths,
            with_blocks=services.with_blocks,
            tells_served=services.policy.for_conformance,
        )
        self._tasks: list[asyncio.Task[Any]] = []  # what the request waits for: a verdict, an endpoint, a stager, the list of models
        self._placed: Placed | None = None  # what an earlier wait gave, which may have been over before the body was
        self._named: Sequence[Endpoint] = ()  # that were told, best first
        self._outbox: list[Reply] = []  # the rest of a large body, and what comes after it; an empty deque would take 760 bytes of every held request
        self._sends_later = False
        self._half_closed = False

    # -- the transport's side

    def receive(self, message: Message) -> None:
        """The next ProcessingRequest."""
        account, exchange = self._account, self._exchange
        try:
            event = wire.decode(message)
            if isinstance(event, RequestHeaders) and not account.headers:
                account.begin(event.headers)
            self._s.watchdog.handles(account.request_id)
            began, was = self._s.clock(), exchange.state
            actions = exchange.receive(event)
            if was is _BODY and exchange.state not in (_BODY, _JUDGING):
                self._judged_within(self._s.clock() - began, exchange.held_bytes)
            if isinstance(event, ResponseHeaders) and event.served and self._named:
                self._note_served(event)
            if actions:
                self._carry_out(actions)
            self._settle_account()
        except Exception:
            log.exception("a request failed in the router itself")
            self._failed_inside()

    def _note_served(self, response: ResponseHeaders) -> None:
        self._s.metrics.served.labels(str(self._named[0].address == response.served).lower()).inc()
        # A gateway that could reach nobody answers 503 itself, and tells the address that it tried last: no proof that an endpoint can be reached.
        if response.status != HTTPStatus.SERVICE_UNAVAILABLE or response.served not in [endpoint.address for endpoint in self._named]:
            self._s.membership.served(self._named, response.served)

    def holds(self, size: int) -> None:
        """`size` bytes of the next message have arrived."""
        if self._account.is_closed:
            return
        self._account.transport_holds(size, self._exchange.held_bytes)
        if self._exchange.is_arriving and size:
            self._account.arrives()

    def half_close(self) -> None:
        """The gateway sends no more. What it waits for is still answered."""
        self._half_closed = True
        if not self._tasks and not self._outbox:
            self._finish()

    def abandon(self) -> None:
        """The gateway has gone."""
        self._end()

    def drain(self) -> None:
        """The router stops: a request that still waits is answered, so that its client can ask again, and another router."""
        if self._exchange.state not in (State.ANSWERED, State.ENDED):
            self._carry_out(self._exchange.failed(StageDeadline("the router that held this request is stopping; ask again")))
        while self._outbox:
            self._send()
        self._finish()

    # -- the walk of one request: receive, judge, decide, wait, answer

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case HeadersReply() | BodyReply() | TrailersReply():  # nearly all of them, so these are looked for first
                    self._outbox.append(action)
                case Decide(facts):
                    self._carry_out(self._decide(facts))
                case Judge() as question:
                    self._wait(self._s.judges.judge(question.content, question.pieces), "judge", self._verdict)
                case ImmediateReply(error):
                    self._account.outcome, self._account.reason = "rejected", error.reason
                    self._cancel_waits()
                    action.notes, action.headers = self._account.rejection_notes(self._s.clock()), self._cors_headers()
                    self._outbox.append(action)
                case OwnReply():
                    self._account.outcome, action.notes, action.headers = "listed", {"outcome": "listed"}, self._cors_headers()
                    self._outbox.append(action)
        if self._outbox:
            self._send()

    def _send(self) -> None:
        """Send what there is, of a large body a part per turn of the event loop, however often this is called in one."""
        if self._sends_later:
            return
        left = SENT_PER_TURN_BYTES
        while self._outbox:
            if left <= 0:
                self._sends_later = True
                asyncio.get_running_loop().call_soon(self._send_more)
                return
            reply = self._outbox.pop(0)
            if isinstance(reply, BodyReply) and reply.chunk is not None:
                left -= len(reply.chunk) if not isinstance(reply.chunk, tuple) else sum(map(len, reply.chunk))
            self._sender.send(wire.encode(reply))

    def _send_more(self) -> None:
        self._sends_later = False
        if not self._account.is_closed:
            self._send()
            self._close_if_done()

    def _verdict(self, judging: "asyncio.Task[Any]", took_s: float) -> Sequence[Action]:
        self._judged_within(took_s, LEAST_MEASURED_BYTES)
        return self._exchange.judged(judging.result())

    def _decide(self, facts: Facts) -> Sequence[Action]:
        self._account.model = facts.model or ""
        began = self._s.clock()
        decision = decide(facts, self._s.membership.snapshot, self._s.policy)
        if self._s.tracing is not None:
            self._account.trace("decide", self._s.clock() - began, {"model": facts.model or ""})
        return self._follow(facts, decision)

    def _follow(self, facts: Facts, decision: Decision) -> Sequence[Action]:
        match decision:
            case Forward() as forward:
                self._account.adapter = forward.adapter
                placed = self._placed and self._s.staging.again(forward, self._placed)
                placed = placed or self._s.staging.now(forward)
                if placed is not None:
                    return self._answer_placed(forward, placed)
                if not self._s.staging.can_stage(forward):
                    error = NoEndpoint(f"{forward.adapter} is nowhere yet, and no endpoint of pool {forward.pool.name} can be given it now")
                    return self._wait_for_an_endpoint(facts, error, forward.wait_s)
                self._waits()
                self._wait(self._s.staging.wait(forward), f"wait {forward.adapter}", lambda task, took_s: self._staged(facts, forward, task, took_s))
                return []
            case Reject(error):
                return self._exchange.failed(error)
            case NobodyReady(error):
                return self._wait_for_an_endpoint(facts, error, decision.wait_s)
            case ListModels(model):
                listing = self._s.models.card(model) if model else self._s.models.list()
                self._wait(listing, "models", lambda task, _: self._exchange.answered(task.result()))
                return []
            case PassThrough(pool, key) as through:
                order = self._order(through)
                prefiller = None if through.prefill is None else self._order(through.prefill)[0]
                self._named = named = tuple(order[: self._s.steering.max_endpoints])
                self._account.outcome, self._account.destination = "pass", named[0].address
                to_tell = _told_prefiller(pool, prefiller)
                mutation = _base_mutation(self._s.steering, pool.name, named, to_tell, facts.model or "", (key or "")[:MAX_NOTED_KEY_CHARS])
                actions = self._answer(pool.name, mutation)
                if actions:
                    self._s.staging.sent(through.blocks, order[0], prefiller)
                    if prefiller is not None:
                        self._s.membership.send(pool.prefill, prefiller)
                return actions

    def _order(self, through: PassThrough) -> Sequence[Endpoint]:
        return through.candidates if through.key else self._s.staging.spread(through, self._s.membership.turn())

    def _staged(self, facts: Facts, forward: Forward, wait: "asyncio.Task[Placed]", took_s: float) -> Sequence[Action]:
        error = wait.exception()
        self._account.trace("stage", took_s, {"adapter": forward.adapter}, "" if error is None else getattr(error, "reason", "internal"))
        if isinstance(error, NoEndpoint):  # every stager is gone, which the router may not have noticed yet
            return self._wait_for_an_endpoint(facts, error.bare(), forward.wait_s)
        self._placed = wait.result()
        self._placed.waited_s = self._account.waited_s(self._s.clock())  # for an endpoint, too
        return self._answer_placed(forward, self._placed)

    def _wait_for_an_endpoint(self, facts: Facts, error: NoEndpoint, wait_s: float) -> Sequence[Action]:
        """Hold the request until somebody can serve it, as at a start, or answer with `error` when it was held for long enough."""
        self._waits()
        left_s = min(wait_s, self._s.no_endpoint_wait_s) - self._account.waited_s(self._s.clock())
        if left_s <= 0:
            return self._exchange.failed(error)
        self._wait(self._until_somebody_can(facts, error, left_s), "endpoint", lambda task, _: self._follow(facts, task.result()))
        return []

    async def _until_somebody_can(self, facts: Facts, error: NoEndpoint, wait_s: float) -> Decision:
        with self._s.admission.waiting(""):
            try:
                async with asyncio.timeout(wait_s):
                    while True:
                        await self._s.membership.changed(ASKED_AGAIN_S)
                        decision = decide(facts, self._s.membership.snapshot, self._s.policy)
                        if self._can_go_on(decision):
                            return decision
            except TimeoutError:
                return Reject(error)

    def _can_go_on(self, decision: Decision) -> bool:
        if isinstance(decision, Forward):
            return self._s.staging.can_stage(decision) or self._s.staging.now(decision) is not None
        return not isinstance(decision, NobodyReady)

    def _waits(self) -> None:
        self._account.waits_since = self._account.waits_since or self._s.clock()

    # -- waiting

    def _wait(self, work: Coroutine[Any, Any, T], name: str, then: "Callable[[asyncio.Task[T], float], Sequence[Action]]") -> None:
        """Do `work` in a task; `then` makes of it what is to be sent. Its errors are answers, too."""
        task = asyncio.create_task(work, name=name)
        began = self._s.clock()
        self._tasks.append(task)
        task.add_done_callback(lambda done: self._waited(done, self._s.clock() - began, then))

    def _waited(self, task: "asyncio.Task[T]", took_s: float, then: "Callable[[asyncio.Task[T], float], Sequence[Action]]") -> None:
        if task in self._tasks:
            self._tasks.remove(task)
        if task.cancelled() or self._account.is_closed:
            return
        try:
            self._carry_out(then(task, took_s))
        except LoraExtprocError as error:
            self._carry_out(self._exchange.failed(error))
        except Exception:
            log.exception("a wait failed in the router itself")
            self._failed_inside()
        self._settle_account()
        self._close_if_done()

    def _cancel_waits(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    # -- answering

    def _answer_placed(self, forward: Forward, placed: Placed) -> Sequence[Action]:
        actions = self._answer(forward.pool.name, self._place(forward, placed), is_sent=placed.endpoints[0] in placed.sent)
        if actions:
            self._s.staging.count(forward, placed)
            if placed.prefiller is not None and placed.prefiller not in placed.sent:
                self._s.membership.send(forward.pool.prefill, placed.prefiller)
        return actions

    def _answer(self, pool: str, mutation: Mutation, *, is_sent: bool = False) -> Sequence[Action]:
        """Let the request go, unless its body is arriving yet: then it is decided again."""
        actions = self._exchange.decided(mutation)
        if actions and self._named and not is_sent:
            self._s.membership.send(pool, self._named[0])
        return actions

    def _place(self, forward: Forward, placed: Placed) -> Mutation:
        self._named = placed.endpoints[: self._s.steering.max_endpoints]
        self._account.outcome, self._account.destination = placed.outcome, placed.endpoints[0].address
        lease = placed.lease
        if lease is None or self._account.waits_since or len(forward.key) > MAX_KEY_CHARS:  # what others are answered, too, says that they did not wait
            return self._mutation(forward, placed)
        reply = lease.reply
        if reply is None or reply.key != forward.key or reply.endpoints != placed.endpoints or reply.prefiller is not placed.prefiller:
            reply = lease.reply = WarmReply(placed.endpoints, placed.prefiller, forward.key, self._mutation(forward, placed))
        return reply.mutation

    def _mutation(self, forward: Forward, placed: Placed) -> Mutation:
        notes: dict[str, str | float] = {
            "owner": placed.endpoints[0].node,
            "outcome": placed.outcome,
            "model": forward.adapter,
            "key": forward.key[:MAX_NOTED_KEY_CHARS],
        }
        notes |= {"origin": placed.origin, "waited_ms": round((placed.waited_s or self._account.waited_s(self._s.clock())) * 1000, 1)}
        if placed.model:
            notes["engine_model"] = placed.model
        prefiller = _told_prefiller(forward.pool, placed.prefiller)
        if prefiller:
            notes["prefiller"] = prefiller
        return self._s.steering.mutation(forward.pool.name, placed.endpoints, notes, placed.model, prefiller=prefiller)

    def _cors_headers(self) -> dict[str, str]:
        return dict(cors.answer_headers(self._account.headers.get("origin"), self._s.cors_allow_origins))

    def _refuse(self, error: LoraExtprocError) -> None:
        self._carry_out(self._exchange.failed(error))
        if self._account.transport_bytes:  # the rest of that message need not come
            self._finish()
            return
        self._settle_account()
        self._close_if_done()

    def _failed_inside(self) -> None:
        self._refuse(LoraExtprocError("the router failed; its log says why"))

    # -- the account

    def _judged_within(self, took_s: float, size: int) -> None:
        if size >= LEAST_MEASURED_BYTES:
            self._s.metrics.scan.observe(took_s)
        self._account.trace("scan", took_s, {})

    def _settle_account(self) -> None:
        self._account.settle(self._exchange.held_bytes, is_arriving=self._exchange.is_arriving)

    def _close_if_done(self) -> None:
        if self._half_closed:
            self.half_close()

    def _finish(self) -> None:
        self._sender.finish()
        self._end()

    def _end(self) -> None:
        if self._tasks:
            self._cancel_waits()
        self._outbox.clear()
        self._account.close(has_begun=self._exchange.state is not _START)


def _told_prefiller(pool: Pool, prefiller: Endpoint | None) -> str | None:
    """What a decoding pool's sidecar is told; None for a pool that has none."""
    if not pool.prefill:
        return None
    return "" if prefiller is None else prefiller.address


@lru_cache(maxsize=BASE_MUTATIONS)
def _base_mutation(steering: Steering, pool: str, endpoints: tuple[Endpoint, ...], prefiller: str | None, model: str, key: str) -> Mutation:
    """What sends a base model's request to `endpoints`: the same for all of them, so it is encoded once."""
    notes: dict[str, str | float] = {"owner": endpoints[0].node, "outcome": "pass", "model": model, "key": key}
    return steering.mutation(pool, endpoints, notes, prefiller=prefiller, is_base=True)
