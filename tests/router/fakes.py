"""A stager that answers on cue, an engine that is asked whether it lives, judges on cue, and a stream that is a list: what the router's parts are tested with."""

import asyncio
import gc
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from extproc.client import Catalogue, Claimed, Loading, Model, Models, NodeState, Progress, Staged, StagerClient, WatchEvent
from extproc.config.router import RouterSettings
from extproc.core.content import Content
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.paths import Paths
from extproc.core.pieces import Buffer
from extproc.core.placement import Pool
from extproc.core.popularity import Popularity
from extproc.core.prefix import Prefixes
from extproc.core.reading import Reading
from extproc.core.steering import Steering
from extproc.errors import LoraExtprocError, ModelNotFound
from extproc.metrics import RouterMetrics
from extproc.pb import ext_proc_pb2 as pb
from extproc.router.admission import Admission
from extproc.router.http2.calls import Message, joined
from extproc.router.judging import Judges
from extproc.router.membership import Membership
from extproc.router.models import Models as FleetModels
from extproc.router.moving import Moves, Senders
from extproc.router.prefetching import Prefetching
from extproc.router.probe import Probe
from extproc.router.processor import Processor, Services
from extproc.router.residency import Residency
from extproc.router.servable import Servable
from extproc.router.staging import Staging
from extproc.router.tracing import Tracing
from extproc.router.watchdog import Watchdog

SLOWLY = [step / 2 for step in range(1, 400)]  # the `progress` of a fetch that goes on for minutes
MAX_BODY_BYTES = 2**22  # of a router, unless a test says otherwise: more than what is judged in its own process


class ScriptedStager(StagerClient):
    """Answers every call with `error`, or well once `gate` is open. Each watch begins with `first_state`, if there is one.

    Of a load `progress` says how far it is, at the times (in seconds of the loop) after the call that it names.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.asked: list[str] = []
        self.prefetched: list[str] = []
        self.kept_s: list[float] = []
        self.has_slots = False  # for what is prefetched
        self.watched = 0
        self.wakes = False  # whether the last watch wanted them
        self.heartbeats: list[float] = []
        self.first_state: NodeState | None = NodeState(True, "", "first")
        self.released: list[str] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.claim_gate = asyncio.Event()  # of claims alone, beside the other
        self.claim_gate.set()
        self.error: LoraExtprocError | None = None
        self.progress: Sequence[float] = ()
        self.lease_s = 100.0
        self.loadings: list[Loading] = []
        self.digest = "d" * 64
        self.renames = False  # the engine knows adapters by their versions
        self.listed = Models()
        self.listings = 0
        self.origins: list[str] = []  # what they have, in order
        self.has_listed = True  # its origins, since its start
        self.unlisted: set[str] = set()  # what they have beside it
        self.catalogues: list[tuple[str, str]] = []  # with which version, after which name
        self.resolved: list[str] = []
        self.known: set[str] = set()
        self.compared: list[str] = []  # with their origin, as asked
        self.comparison = asyncio.Event()  # of which none ends before it is set
        self.has_newer = False  # its origin, so that a comparison changes `digest`
        self.claims: list[Sequence[Claimed]] = []
        self.honours: Callable[[Claimed], float] = lambda _: 50.0  # seconds for which a claim is granted
        self.events: asyncio.Queue[WatchEvent | Exception | None] = asyncio.Queue()  # None ends the stream

    async def ensure(
        self,
        adapter: str,
        sha256: str = "",
        *,
        prefetch: bool = False,
        keep_s: float = 0.0,
        loading: Loading = Loading.NONE,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Staged:
        (self.prefetched if prefetch else self.asked).append(adapter)
        self.loadings.append(loading)
        self.kept_s.append(keep_s)
        told = asyncio.create_task(self._tell(on_progress))
        try:
            await self._answer()
        finally:
            told.cancel()
        staged = adapter not in self.known
        self.known.add(adapter)
        model = f"{adapter}@sha256:{self.digest[:12]}" if self.renames and loading is Loading.VERSIONED else adapter
        if prefetch:
            return Staged(self.digest, staged, "file", 0.0, 0.1, 1000, "", self.has_slots and loading is not Loading.NONE)
        return Staged(self.digest, staged, "file", self.lease_s, 0.1, 1000, model)

    async def _tell(self, on_progress: Callable[[Progress], None] | None) -> None:
        before = 0.0
        for at in self.progress:
            await asyncio.sleep(at - before)
            before = at
            assert on_progress is not None
            on_progress(Progress("fetch", "file", int(at), 0))

    async def claim(self, leases: Sequence[Claimed]) -> tuple[float, ...]:
        self.claims.append(leases)
        await self.claim_gate.wait()
        await self._answer()
        return tuple(self.honours(lease) for lease in leases)

    async def release(self, adapter: str = "", digest: str = "") -> int:
        self.released.append(adapter)
        await self._answer()
        return 1

    async def refresh(self, adapter: str) -> tuple[bool, str, str]:
        self.compared.append(adapter)
        await self.comparison.wait()
        await self._answer()
        has_changed, self.has_newer = self.has_newer, False
        if has_changed:
            self.digest = "e" * 64
        return has_changed, self.digest, ""

    async def models(self, after: str = "", limit: int = 0) -> Models:
        self.listings += 1
        await self._answer()
        left = [model for model in self.listed.adapters if model.id > after]
        page = left[:limit] if limit else left
        return Models(self.listed.bases, tuple(page), len(page) < len(left), self.listed.refused if not after else ())

    async def catalogue(self, version: str = "", after: str = "", limit: int = 0) -> Catalogue:
        self.catalogues.append((version, after))
        await self._answer()
        if not self.has_listed:
            return Catalogue()
        current = str(hash(tuple(self.origins)))
        if version == current and not after:
            return Catalogue(current)
        left = self.origins[bisect_right(self.origins, after) if after else 0 :]
        page = left[:limit] if limit else left
        return Catalogue(current, tuple(page), len(page) < len(left))

    async def resolve(self, adapter: str) -> str:
        self.resolved.append(adapter)
        await self._answer()
        if adapter in self.unlisted or adapter in self.origins:
            return "file"
        raise ModelNotFound(f"The model `{adapter}` does not exist: no origin has it")

    async def _answer(self) -> None:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise type(self.error)(self.error.message)

    async def watch(self, heartbeat_s: float = 0.0, *, copies: bool = False, load: bool = False, wakes: bool = False) -> AsyncIterator[WatchEvent]:
        self.watched += 1
        self.heartbeats.append(heartbeat_s)
        self.wakes = wakes
        if self.first_state is not None:
            yield self.first_state
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    async def close(self) -> None:
        pass


class ScriptedProbe(Probe):
    """Engines that live, but for those in `dead`; they are said to be so after `takes_s` seconds of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: set[str] = set()
        self.takes_s = 0.0
        self.asked: list[str] = []
        self.given_up = 0
        self.hang_up = asyncio.Event()  # set: the engines close their connections

    async def until_it_hangs_up(self, address: str) -> None:
        await self.hang_up.wait()

    async def answers(self, address: str) -> bool:
        self.asked.append(address)
        try:
            await asyncio.sleep(self.takes_s)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        return address not in self.dead


class InlineJudges(Judges):
    """Judges in the turn of the event loop in which the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.judged = 0

    async def judge(self, content: Content, pieces: Sequence[Buffer]) -> Reading:
        await self.gate.wait()
        self.judged += 1
        return content.read(b"".join(pieces), 2**24)


class Router:
    """The router's parts around scripted stagers: one pool, one endpoint per stager. `settings` are those of `router`."""

    def __init__(
        self,
        count: int = 3,
        *,
        deadline_s: float = 60.0,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_held_bytes: int = 0,
        no_space_wait_s: float = 0.0,
        no_endpoint_wait_s: float = 0.0,
        steering: Steering | None = None,
        tracing: Tracing | None = None,
        clock: Callable[[], float] | None = None,
        pools: Sequence[Pool] = (),
        senders: Senders | None = None,
        max_waiting_per_adapter: int = 3,
        **settings: Any,
    ) -> None:
        self.now = 0.0
        waits_by = clock or time.perf_counter
        clock = clock or (lambda: self.now)
        self.settings = RouterSettings(stage_deadline_s=deadline_s, **settings)
        self.stagers = {f"10.0.0.{i}:9102": ScriptedStager(f"10.0.0.{i}:9102") for i in range(1, count + 1)}
        endpoints = [Endpoint(f"10.0.0.{i}:8000", f"node-{i}", f"10.0.0.{i}:9102") for i in range(1, count + 1)]
        self.pool = Pool("models", frozenset({"base"}), ("*",), LookupTable(endpoints, 251))
        self.pools = tuple(pools) or (self.pool,)
        self.metrics = RouterMetrics()
        self.probe = ScriptedProbe()
        self.judges = InlineJudges()
        self.residency = Residency(self.stagers, self.metrics, clock=clock)
        servable = Servable(self.pools, self.stagers, clock) if self.settings.models == "servable" else None
        self.models = FleetModels(self.pools, self.stagers, servable, shows_paths=self.settings.shows_paths)
        self.popularity = Popularity()
        self.prefixes = Prefixes(self.settings.prefix_blocks)
        self.moves = Moves(self.residency, self.popularity, join_s=self.settings.join_s, leave_s=self.settings.leave_s, senders=senders)
        self.membership = Membership(
            self.pools,
            self.residency,
            self.models,
            self.metrics,
            self.probe,
            self.moves,
            self.popularity,
            self.prefixes,
            clients=cast("dict[str, StagerClient]", self.stagers),
            connect=ScriptedStager,
            heartbeat_s=self.settings.heartbeat_s,
            hold_down_s=self.settings.hold_down_s,
            clock=clock,
        )
        self.admission = Admission(
            self.metrics,
            max_waiting=max(10, max_waiting_per_adapter),
            max_waiting_per_adapter=max_waiting_per_adapter,
            max_bytes=max_held_bytes or 4 * max_body_bytes,
            body_deadline_s=self.settings.body_deadline_s,
            clock=clock,
        )
        rules = self.settings.rules(lambda _: 0)
        self.prefetching = Prefetching(
            self.membership,
            self.residency,
            cast("dict[str, StagerClient]", self.stagers),
            rules,
            self.metrics,
            into_engine=self.settings.prefetch == "engine",
            per_s=self.settings.prefetch_per_s,
            clock=clock,
        )
        if self.settings.prefetch != "off":
            self.membership.on_woken.append(self.prefetching.woken)
        self.staging = Staging(
            self.residency,
            self.admission,
            self.metrics,
            snapshot=lambda: self.membership.snapshot,
            loads=self.membership.loads,
            popularity=self.popularity,
            prefixes=self.prefixes,
            rules=rules,
            no_space_wait_s=no_space_wait_s,
            hedge_s=self.settings.hedge_s,
            max_endpoints=self.settings.max_retry_endpoints,
            prefetching=self.prefetching if self.settings.prefetch != "off" else None,
            clock=clock,
        )
        self.services = Services(
            membership=self.membership,
            staging=self.staging,
            models=self.models,
            judges=self.judges,
            admission=self.admission,
            watchdog=Watchdog(self.metrics),
            steering=steering or Steering(),
            policy=self.settings.policy(),
            paths=Paths(self.settings.paths),
            metrics=self.metrics,
            max_body_bytes=max_body_bytes,
            no_endpoint_wait_s=no_endpoint_wait_s,
            with_blocks=self.settings.prefix_blocks > 0,
            cors_allow_origins=self.settings.cors_allow_origins,
            tracing=tracing,
            clock=waits_by,
        )

    def owner(self, adapter: str) -> Endpoint:
        return self.pool.candidates(adapter)[0]

    def stager_of(self, endpoint: Endpoint) -> ScriptedStager:
        return self.stagers[endpoint.stager]

    def count(self, outcome: str, reason: str = "") -> float:
        return self.value("lora_extproc_requests_total", outcome=outcome, reason=reason)

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def stop(self) -> None:
        """End what the parts do by themselves."""
        await self.prefetching.close()
        await self.membership.stop()
        await self.models.close()
        await self.residency.close()


class Gateway:
    """One stream: what is sent goes to the processor at once, what it answers is kept."""

    def __init__(self, router: Router, messages: Sequence[pb.ProcessingRequest] = ()) -> None:
        self.processor = Processor(router.services, self)
        self.written: list[pb.ProcessingResponse] = []
        self.raw: list[Message] = []
        self.answered = asyncio.Event()
        self.finished = asyncio.Event()
        for message in messages:
            self.show(message)

    def show(self, message: pb.ProcessingRequest) -> None:
        self.processor.receive(message.SerializeToString())

    def send(self, message: Message) -> None:
        assert not self.finished.is_set()
        self.raw.append(message)
        self.written.append(pb.ProcessingResponse.FromString(joined(message)))
        self.answered.set()

    def finish(self, status: int = 0, text: str = "") -> None:
        assert (status, text) == (0, "")
        self.finished.set()

    async def end(self) -> None:
        """Close the sending side and wait for the rest."""
        self.processor.half_close()
        await self.finished.wait()

    def immediate(self) -> pb.ImmediateResponse:
        assert len(self.written) == 1
        assert self.written[0].WhichOneof("response") == "immediate_response"
        return self.written[0].immediate_response

    def answer_headers(self) -> dict[str, str]:
        return {option.header.key: option.header.raw_value.decode() for option in self.immediate().headers.set_headers}

    def destination(self) -> str:
        """The destination header of the first reply, checked against the metadata."""
        first = self.written[0]
        headers = {o.header.key: o.header.raw_value.decode() for o in first.request_headers.response.header_mutation.set_headers}
        destination = headers["x-gateway-destination-endpoint"]
        assert first.dynamic_metadata.fields["envoy.lb"].struct_value.fields["x-gateway-destination-endpoint"].string_value == destination
        return destination

    def first_destination(self) -> str:
        return self.destination().split(",")[0]

    def body(self) -> bytes:
        """What goes on instead of what came, in full duplex."""
        return b"".join(response.request_body.response.body_mutation.streamed_response.body for response in self.written)


def headers(values: Mapping[str, str] | None = None, *, end: bool = False, mode: pb.BodySendMode = pb.FULL_DUPLEX_STREAMED) -> pb.ProcessingRequest:
    pairs = {":method": "POST", ":path": "/v1/chat/completions", "content-type": "application/json"}
    pairs |= values or {}
    message = pb.HttpHeaders(headers=pb.HeaderMap(headers=[pb.HeaderValue(key=k, raw_value=v.encode()) for k, v in pairs.items()]), end_of_stream=end)
    return pb.ProcessingRequest(request_headers=message, protocol_config=pb.ProtocolConfiguration(request_body_mode=mode))


def get(path: str, values: Mapping[str, str] | None = None) -> pb.ProcessingRequest:
    return headers({":method": "GET", ":path": path, **(values or {})}, end=True)


def body(data: bytes, *, end: bool = True) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=end))


def chat(model: str, values: Mapping[str, str] | None = None) -> list[pb.ProcessingRequest]:
    return [headers(values), body(b'{"messages":[],"model":"%s"}' % model.encode())]


def names(count: int) -> tuple[Model, ...]:
    """So many adapters, in the order of their names."""
    return tuple(Model(f"acme/{number:06}", f"/node/{number}") for number in range(count))


async def serve(router: Router, messages: Sequence[pb.ProcessingRequest]) -> Gateway:
    """A whole stream, to its end."""
    stream = Gateway(router, messages)
    await stream.end()
    return stream


@contextmanager
def no_cycles(*kinds: type) -> Iterator[None]:
    """Whatever is dropped meanwhile goes by itself: the collector finds none of `kinds` in a reference cycle."""
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield
        gc.collect()
        left = [thing for thing in gc.garbage if isinstance(thing, kinds)]
    finally:
        gc.set_debug(0)
        gc.unfreeze()
        gc.garbage.clear()
    assert left == []
