"""Talk to one stager. gRPC's errors become ours here and nowhere else."""

from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from . import chunks, credentials
from .config import RpcSettings
from .core.artifact import File
from .errors import BY_NAME, LoraExtprocError, ModelNotFound, NotPermitted, StagerUnavailable
from .pb import stager_pb2 as pb

T = TypeVar("T")

SERVICE = "lora_extproc.stager.v1.Stager"
RETRY_AFTER_METADATA = "lora-extproc-retry-after"  # seconds
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
    ("grpc.max_receive_message_length", 256 * 2**20),  # a list of a hundred thousand adapters; gRPC's default ends at twenty thousand
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
    model: str = ""  # what a request's `model` must be for this node's engine; "": the adapter's name


class Loading(IntEnum):
    """What the node's engine must know before the answer: nothing; this version, by a name of its own; the adapter's own name."""

    NONE = pb.NO_LOADING
    VERSIONED = pb.VERSIONED
    PLAIN = pb.PLAIN


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a flight is. `total_bytes` 0: not known yet."""

    phase: str
    origin: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class NodeState:
    """Whether the node may be sent requests. Not `resumed`: what was known of its disk is worth nothing."""

    ready: bool
    why: str
    instance: str
    resumed: bool = False
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    adapter: str


@dataclass(frozen=True, slots=True)
class Refreshed:
    adapter: str


@dataclass(frozen=True, slots=True)
class Evicted:
    adapter: str


@dataclass(frozen=True, slots=True)
class Space:
    """The node's disk budget, in bytes."""

    used_bytes: int
    reserved_bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Demand:
    """How many adapters compete for the slots of the node's engine: those that are leased. `cpu_slots` 0: no limit is known."""

    adapters: int
    cpu_slots: int


WatchEvent = NodeState | Published | Refreshed | Evicted | Space | Demand


@dataclass(frozen=True, slots=True)
class Model:
    """One model as vLLM would list it. `max_model_len` 0: not told."""

    id: str
    root: str
    max_model_len: int = 0


@dataclass(frozen=True, slots=True)
class Models:
    """What a node can answer for."""

    bases: tuple[Model, ...] = ()
    adapters: tuple[Model, ...] = ()


@dataclass(frozen=True, slots=True)
class Holding:
    """What another node has under a name, file by file."""

    instance: str
    digest: str
    revision: str
    origin: str
    files: tuple[File, ...]


@dataclass(frozen=True, slots=True)
class OnDisk:
    """One adapter of a node. `leased_seconds` 0: not leased. `checked_seconds` since it was compared with its origin, -1: not since the start."""

    name: str
    digest: str
    bytes: int
    origin: str
    revision: str
    idle_seconds: float
    leased_seconds: float
    pinned: bool
    checked_seconds: float
    refresh_error: str
    adopted: bool
    loaded: bool


@dataclass(frozen=True, slots=True)
class Disk:
    """What a node has, least recently used first, and its budget in bytes."""

    adapters: tuple[OnDisk, ...]
    used_bytes: int
    reserved_bytes: int
    max_bytes: int


@dataclass(frozen=True, slots=True)
class Verified:
    """What reading one artifact back from the disk gave."""

    adapter: str
    digest: str
    bytes: int
    ok: bool
    why: str
    removed: bool


class StagerClient:
    """One stager at `host:port`. Every method raises StagerUnavailable if it does not answer, else the error the stager names.

    `holder` is whose leases `ensure` takes.
    """

    def __init__(self, address: str, rpc: RpcSettings | None = None, holder: str = "") -> None:
        rpc = rpc or RpcSettings()
        self.address = address
        self.holder = holder
        self._metadata = credentials.call_metadata(rpc)
        self._channel = credentials.channel(address, rpc, _CHANNEL_OPTIONS)
        self._position = ("", 0)  # of the watch: the instance, and the last change seen of it

    async def ensure(self, adapter: str, sha256: str = "", *, prefetch: bool = False, loading: Loading = Loading.NONE) -> Staged:
        """Wait until `adapter` is on the node's disk and, with `loading`, known to its engine. Cancelling ends the wait, not the work.

        `sha256` is what its weights must have.
        """
        reply = await self._unary("Ensure", self._ensure_request(adapter, sha256, prefetch=prefetch, loading=loading), pb.EnsureReply)
        return _staged(reply)

    async def stage(self, adapter: str, sha256: str = "") -> AsyncIterator[Progress | Staged]:
        """The same; how far it is comes meanwhile, Staged last."""
        async for message in self._stream("Stage", self._ensure_request(adapter, sha256), pb.StageProgress.FromString):
            if message.HasField("reply"):
                yield _staged(message.reply)
            else:
                yield Progress(message.phase, message.origin, message.done_bytes, message.total_bytes)

    async def release(self, adapter: str = "", digest: str = "") -> int:
        """Give back the holder's lease on `adapter` (of an older version, by its digest), or all it has; how many there were."""
        request = pb.ReleaseRequest(holder=self.holder, adapter=adapter, digest=digest)
        return int((await self._unary("Release", request, pb.ReleaseReply)).released)

    async def models(self) -> Models:
        """What the node can answer for: base models and adapters."""
        reply = await self._unary("Models", pb.ModelsRequest(), pb.ModelsReply)
        bases, adapters = (tuple(Model(m.id, m.root, m.max_model_len) for m in some) for some in (reply.bases, reply.adapters))
        return Models(bases, adapters)

    async def list(self) -> Disk:
        """What is on the node's disk."""
        reply = await self._unary("List", pb.ListRequest(), pb.ListReply)
        adapters = tuple(OnDisk(**{name: getattr(adapter, name) for name in OnDisk.__slots__}) for adapter in reply.adapters)
        return Disk(adapters, reply.used_bytes, reply.reserved_bytes, reply.max_bytes)

    async def pin(self, adapter: str, *, pinned: bool = True, sha256: str = "") -> str:
        """Hold `adapter` on disk without an end, or no longer; its digest if pinned."""
        return str((await self._unary("Pin", pb.PinRequest(adapter=adapter, pinned=pinned, sha256=sha256), pb.PinReply)).digest)

    async def evict(self, adapter: str) -> int:
        """Remove `adapter`; the bytes it took. Raises AdapterInUse or ModelNotFound."""
        return int((await self._unary("Evict", pb.EvictRequest(adapter=adapter), pb.EvictReply)).bytes)

    async def purge(self, adapter: str) -> int:
        """Remove `adapter` whoever holds it, but for the engine; the bytes it took. Raises AdapterInUse."""
        return int((await self._unary("Purge", pb.EvictRequest(adapter=adapter), pb.EvictReply)).bytes)

    async def refresh(self, adapter: str) -> tuple[bool, str, str]:
        """Compare with the origin now: whether a new version took its place, its digest and revision."""
        reply = await self._unary("Refresh", pb.RefreshRequest(adapter=adapter), pb.RefreshReply)
        return reply.changed, reply.digest, reply.revision

    async def verify(self, adapter: str = "") -> AsyncIterator[Verified]:
        """Read `adapter`, or everything, back from the node's disk."""
        async for message in self._stream("Verify", pb.VerifyRequest(adapter=adapter), pb.VerifyResult.FromString):
            yield Verified(**{name: getattr(message, name) for name in Verified.__slots__})

    async def find(self, adapter: str, revision: str = "") -> Holding | None:
        """Whether the node has `adapter` in that revision of its origin ("": in any)."""
        try:
            reply = await self._unary("Find", pb.FindRequest(adapter=adapter, revision=revision), pb.FindReply)
        except ModelNotFound:
            return None
        files = tuple(File(file.path, file.size, file.sha256) for file in reply.files)
        return Holding(reply.instance, reply.digest, reply.revision, reply.origin, files)

    async def read(self, digest: str, path: str, offset: int = 0) -> AsyncIterator[memoryview]:
        """The bytes of one file of an artifact, from `offset` on."""
        async for chunk in self._stream("Read", pb.ReadRequest(digest=digest, path=path, offset=offset), chunks.decode):
            yield chunk

    async def watch(self) -> AsyncIterator[WatchEvent]:
        """What was missed since the last watch, the node's state, then every change, until the stager goes away."""
        instance, after = self._position
        async for message in self._stream("Watch", pb.WatchRequest(instance=instance, after=after), pb.WatchEvent.FromString):
            event = _event(message)
            if isinstance(event, NodeState):
                self._position = (event.instance, message.sequence)
            else:
                self._position = (self._position[0], message.sequence)
            if event is not None:
                yield event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close(None)

    def _ensure_request(self, adapter: str, sha256: str, *, prefetch: bool = False, loading: Loading = Loading.NONE) -> pb.EnsureRequest:
        priority = pb.Priority.PREFETCH if prefetch else pb.Priority.REQUEST
        return pb.EnsureRequest(adapter=adapter, holder=self.holder, sha256=sha256, priority=priority, loading=pb.Loading.Name(loading.value))

    async def _unary(self, method: str, request: Any, reply: Any) -> Any:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, reply.FromString)
        try:
            return await call(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error

    async def _stream(self, method: str, request: Any, decode: Callable[[bytes], T]) -> AsyncIterator[T]:
        call = self._channel.unary_stream(f"/{SERVICE}/{method}", type(request).SerializeToString, decode)
        try:
            async for message in call(request, metadata=self._metadata):
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error

    def _ours(self, error: grpc.aio.AioRpcError) -> LoraExtprocError:
        metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]  # the stubs know it as opaque
        said = {key: str(value) for key, value in metadata}
        name = said.get(ERROR_METADATA, "")
        if name in BY_NAME:
            ours = BY_NAME[name](error.details() or "")
            if said.get(RETRY_AFTER_METADATA, "").isdigit():
                ours.retry_after_s = int(said[RETRY_AFTER_METADATA])  # as the origin asked, where it did
            return ours
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return NotPermitted(f"stager {self.address}: {error.details()}")
        return StagerUnavailable(f"stager {self.address}: {error.code().name.lower()}")


def _staged(reply: pb.EnsureReply) -> Staged:
    return Staged(reply.digest, reply.staged, reply.origin, reply.lease_seconds, reply.waited_seconds, reply.bytes, reply.model)


def _event(message: pb.WatchEvent) -> WatchEvent | None:
    match message.WhichOneof("event"):
        case "node":
            node = message.node
            return NodeState(node.ready, node.why, node.instance, node.resumed, node.draining)
        case "published":
            return Published(message.published)
        case "refreshed":
            return Refreshed(message.refreshed)
        case "evicted":
            return Evicted(message.evicted)
        case "demand":
            return Demand(message.demand.adapters, message.demand.cpu_slots)
        case "space":
            return Space(message.space.used_bytes, message.space.reserved_bytes, message.space.max_bytes)
        case _:
            return None  # of a newer stager
