"""Talk to one stager. gRPC's errors become ours here and nowhere else."""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Self

import grpc
import grpc.aio

from .errors import BY_NAME, LoraExtprocError, StagerUnavailable
from .pb import stager_pb2 as pb

SERVICE = "lora_extproc.stager.v1.Stager"
ERROR_METADATA = "lora-extproc-error"  # trailing metadata: the name of the error's class

# A stager that is gone must be noticed within seconds, not within TCP's minutes, also where packets are dropped instead of refused.
_CHANNEL_OPTIONS = (
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Staged:
    """The answer to Ensure: it is on disk and stays for `lease_s` seconds from the moment the answer arrived."""

    digest: str
    staged: bool  # False: it was there already
    origin: str
    lease_s: float
    waited_s: float
    bytes: int


@dataclass(frozen=True, slots=True)
class NodeState:
    """Whether the node may be sent requests."""

    ready: bool
    why: str
    instance: str


@dataclass(frozen=True, slots=True)
class Published:
    adapter: str


@dataclass(frozen=True, slots=True)
class Evicted:
    adapter: str


WatchEvent = NodeState | Published | Evicted


class StagerClient:
    """One stager at `host:port`. Every method raises StagerUnavailable if it does not answer, else the error the stager names."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        unary, stream = self._channel.unary_unary, self._channel.unary_stream
        self._ensure = unary(f"/{SERVICE}/Ensure", pb.EnsureRequest.SerializeToString, pb.EnsureReply.FromString)
        self._list = unary(f"/{SERVICE}/List", pb.ListRequest.SerializeToString, pb.ListReply.FromString)
        self._evict = unary(f"/{SERVICE}/Evict", pb.EvictRequest.SerializeToString, pb.EvictReply.FromString)
        self._watch = stream(f"/{SERVICE}/Watch", pb.WatchRequest.SerializeToString, pb.WatchEvent.FromString)

    async def ensure(self, adapter: str) -> Staged:
        """Wait until `adapter` is on the node's disk. Cancelling ends the wait, not the fetch."""
        try:
            reply = await self._ensure(pb.EnsureRequest(adapter=adapter))
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        return Staged(reply.digest, reply.staged, reply.origin, reply.lease_seconds, reply.waited_seconds, reply.bytes)

    async def list(self) -> pb.ListReply:
        """What is on the node's disk."""
        try:
            reply: pb.ListReply = await self._list(pb.ListRequest())
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        return reply

    async def evict(self, adapter: str) -> int:
        """Remove `adapter`; the bytes it took. Raises AdapterInUse or ModelNotFound."""
        try:
            reply: pb.EvictReply = await self._evict(pb.EvictRequest(adapter=adapter))
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        return reply.bytes

    async def watch(self) -> AsyncIterator[WatchEvent]:
        """The node's state now, then every change, until the stager goes away."""
        try:
            async for message in self._watch(pb.WatchRequest()):
                kind = message.WhichOneof("event")
                if kind == "node":
                    yield NodeState(message.node.ready, message.node.why, message.node.instance)
                elif kind == "published":
                    yield Published(message.published)
                elif kind == "evicted":
                    yield Evicted(message.evicted)
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    def _ours(self, error: grpc.aio.AioRpcError) -> LoraExtprocError:
        metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]  # the stubs know it as opaque
        name = next((str(value) for key, value in metadata if key == ERROR_METADATA), "")
        if name in BY_NAME:
            return BY_NAME[name](error.details() or "")
        return StagerUnavailable(f"stager {self.address}: {error.code().name.lower()}")
