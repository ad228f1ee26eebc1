"""A stager that answers on cue and a stream that is a list: what the router's parts are tested with."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from extproc.client import Loading, Models, NodeState, Staged, StagerClient, WatchEvent
from extproc.core.decision import Policy
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.steering import Steering
from extproc.errors import LoraExtprocError
from extproc.metrics import RouterMetrics
from extproc.pb import ext_proc_pb2 as pb
from extproc.router.catalog import Catalog
from extproc.router.holding import Holding
from extproc.router.http2 import Message, joined
from extproc.router.membership import Membership
from extproc.router.processor import Conversation, Processor
from extproc.router.residency import Residency
from extproc.router.staging import Staging
from extproc.router.tracing import Tracing


class ScriptedStager(StagerClient):
    """Answers every Ensure and Release with `error`, or with a lease once `gate` is open. Each watch begins with `first_state`, if there is one."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.asked: list[str] = []
        self.watched = 0
        self.first_state: NodeState | None = NodeState(True, "", "first")
        self.released: list[str] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: LoraExtprocError | None = None
        self.lease_s = 100.0
        self.loadings: list[Loading] = []
        self.digest = "d" * 64
        self.renames = False  # the engine knows adapters by their versions
        self.listed = Models()
        self.listings = 0
        self.known: set[str] = set()
        self.events: asyncio.Queue[WatchEvent | LoraExtprocError] = asyncio.Queue()

    async def ensure(self, adapter: str, sha256: str = "", *, prefetch: bool = False, loading: Loading = Loading.NONE) -> Staged:
        self.asked.append(adapter)
        self.loadings.append(loading)
        await self._answer()
        staged = adapter not in self.known
        self.known.add(adapter)
        model = f"{adapter}@sha256:{self.digest[:12]}" if self.renames and loading is Loading.VERSIONED else adapter
        return Staged(self.digest, staged, "file", self.lease_s, 0.1, 1000, model)

    async def release(self, adapter: str = "", digest: str = "") -> int:
        self.released.append(adapter)
        await self._answer()
        return 1

    async def models(self) -> Models:
        self.listings += 1
        await self._answer()
        return self.listed

    async def _answer(self) -> None:
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error

    async def watch(self) -> AsyncIterator[WatchEvent]:
        self.watched += 1
        if self.first_state is not None:
            yield self.first_state
        while True:
            event = await self.events.get()
            if isinstance(event, LoraExtprocError):
                raise event
            yield event

    async def close(self) -> None:
        pass


class Router:
    """The router's parts around scripted stagers: one pool, one endpoint per stager."""

    def __init__(
        self,
        count: int = 3,
        *,
        deadline_s: float = 60.0,
        max_body_bytes: int = 2**20,
        no_space_wait_s: float = 0.0,
        steering: Steering | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.now = 0.0
        self.stagers = {f"10.0.0.{i}:9102": ScriptedStager(f"10.0.0.{i}:9102") for i in range(1, count + 1)}
        endpoints = [Endpoint(f"10.0.0.{i}:8000", f"node-{i}", f"10.0.0.{i}:9102") for i in range(1, count + 1)]
        self.pool = Pool("models", frozenset({"base"}), ("*",), LookupTable(endpoints, 251))
        self.metrics = RouterMetrics()
        self.residency = Residency(self.stagers, self.metrics, clock=lambda: self.now)
        self.catalog = Catalog([self.pool], self.stagers)
        self.membership = Membership([self.pool], self.residency, self.catalog, self.metrics)
        self.holding = Holding(self.metrics, max_waiting=10, max_waiting_per_adapter=3, max_bytes=4 * max_body_bytes)
        self.staging = Staging(self.residency, self.holding, self.metrics, no_space_wait_s, clock=lambda: self.now)
        policy = Policy(stage_deadline_s=deadline_s)
        self.processor = Processor(
            self.membership, self.staging, self.catalog, steering or Steering(), policy, self.metrics, self.holding, max_body_bytes, tracing
        )

    def owner(self, adapter: str) -> Endpoint:
        return self.pool.candidates(adapter)[0]

    def stager_of(self, endpoint: Endpoint) -> ScriptedStager:
        return self.stagers[endpoint.stager]

    def count(self, outcome: str, reason: str = "") -> float:
        return self.metrics.registry.get_sample_value("lora_extproc_requests_total", {"outcome": outcome, "reason": reason}) or 0.0


class Gateway:
    """One stream: what is sent goes to the conversation at once, what it answers is kept."""

    def __init__(self, router: Router, messages: Sequence[pb.ProcessingRequest] = ()) -> None:
        self.conversation = Conversation(router.processor, self)
        self.written: list[pb.ProcessingResponse] = []
        self.finished = asyncio.Event()
        for message in messages:
            self.show(message)

    def show(self, message: pb.ProcessingRequest) -> None:
        self.conversation.receive(message.SerializeToString())

    def send(self, message: Message) -> None:
        assert not self.finished.is_set()
        self.written.append(pb.ProcessingResponse.FromString(joined(message)))

    def finish(self, status: int = 0, text: str = "") -> None:
        assert (status, text) == (0, "")
        self.finished.set()

    async def end(self) -> None:
        """Close the sending side and wait for the rest."""
        self.conversation.half_close()
        await self.finished.wait()

    def immediate(self) -> pb.ImmediateResponse:
        assert len(self.written) == 1
        assert self.written[0].WhichOneof("response") == "immediate_response"
        return self.written[0].immediate_response

    def destination(self) -> str:
        """The destination header of the first reply, checked against the metadata."""
        first = self.written[0]
        headers = {o.header.key: o.header.raw_value.decode() for o in first.request_headers.response.header_mutation.set_headers}
        destination = headers["x-gateway-destination-endpoint"]
        assert first.dynamic_metadata.fields["envoy.lb"].struct_value.fields["x-gateway-destination-endpoint"].string_value == destination
        return destination


def headers(values: Mapping[str, str] | None = None, *, end: bool = False, mode: pb.BodySendMode = pb.FULL_DUPLEX_STREAMED) -> pb.ProcessingRequest:
    pairs = {":method": "POST", ":path": "/v1/chat/completions", "content-type": "application/json"}
    pairs |= values or {}
    message = pb.HttpHeaders(headers=pb.HeaderMap(headers=[pb.HeaderValue(key=k, raw_value=v.encode()) for k, v in pairs.items()]), end_of_stream=end)
    return pb.ProcessingRequest(request_headers=message, protocol_config=pb.ProtocolConfiguration(request_body_mode=mode))


def body(data: bytes, *, end: bool = True) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=end))


def chat(model: str) -> list[pb.ProcessingRequest]:
    return [headers(), body(b'{"messages":[],"model":"%s"}' % model.encode())]
