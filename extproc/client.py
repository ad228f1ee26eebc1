"""Talk to one stager. gRPC's errors become ours here and nowhere else."""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from . import chunks
from .channel import Channel, Line
from .config.credentials import RpcSettings
from .core.artifact import File
from .errors import BY_NAME, CredentialsRefused, LoraExtprocError, ModelNotFound, StagerUnavailable
from .heartbeat import Heard, Heartbeat, Listener, Silence, Silent
from .pb import stager_pb2 as pb

T = TypeVar("T")

SERVICE = "lora_extproc.stager.v1.Stager"
RETRY_AFTER_METADATA = "lora-extproc-retry-after"  # seconds
ERROR_METADATA = "lora-extproc-error"  # trailing metadata: the name of the error's class

MAX_CLAIMED = 5_000  # leases in one Claim, a megabyte
# A stager that is gone must be noticed within seconds, not within TCP's minutes, also where packets are dropped instead of refused. Of the three
# keepalive times the ping's is the one that counts where TCP still acknowledges, as that of a stopped process does: a minute, unless it is set. gRPC
# sends a ping of its own behind the first data of a stream, too: one that had to be answered within a second ended the Watch of a process that a busy
# machine stops for as long. So a ping may take six heartbeats, at `router.heartbeat_s` of 0.5 s, as a Watch may.
_PING_ANSWER_MS = 3_000
_CHANNEL_OPTIONS = (
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 2_000),
    ("grpc.keepalive_timeout_ms", _PING_ANSWER_MS),
    ("grpc.http2.ping_timeout_ms", _PING_ANSWER_MS),
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
    loaded: bool = False  # of a prefetch: the engine has been told to know it


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
    """Whether the node may be sent requests. Not `resumed`: what was known of its disk is worth nothing.

    `heartbeat_s`: after so long without an event this stager says something. 0: it does not, and its silence proves nothing.
    """

    ready: bool
    why: str
    instance: str
    resumed: bool = False
    draining: bool = False
    heartbeat_s: float = 0.0
    empty: bool = False  # it drains, and nobody needs it any longer


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a router relies on at a node: the version that an earlier Ensure named, for as long as its lease still runs."""

    adapter: str
    digest: str
    loading: Loading
    model: str
    remaining_s: float


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
class Refused:
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


@dataclass(frozen=True, slots=True)
class Inventory:
    """A part of what the node has: adapters on disk only, and those in its engine's memory. The first part after a NodeState that is not `resumed`
    begins anew; `more` parts follow."""

    cold: tuple[str, ...]
    warm: tuple[str, ...]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engine has the adapter in memory."""

    adapter: str


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The engine has it in memory no longer."""

    adapter: str


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine works on, `age_s` seconds before this was sent. Slots of 0: not known. It is looked at `every_s`, and told `routers`, of which the others
    let `others_held` calls wait there."""

    running: float
    waiting: float
    kv_usage: float
    slots: int
    cpu_slots: int
    age_s: float
    every_s: float = 0.0
    routers: int = 1
    others_held: int = 0


@dataclass(frozen=True, slots=True)
class Woken:
    """A request asks for the adapter, and nobody leased it on that node before."""

    adapter: str


WatchEvent = NodeState | Published | Refreshed | Evicted | Refused | Space | Demand | Inventory | Loaded | Unloaded | EngineLoad | Woken | Silent | Heard


@dataclass(frozen=True, slots=True)
class Drained:
    """How far a drain is."""

    draining: bool
    empty: bool
    leased: int
    requests: float


@dataclass(frozen=True, slots=True)
class Model:
    """One model as vLLM would list it. `max_model_len` 0: not told."""

    id: str
    root: str
    max_model_len: int = 0


@dataclass(frozen=True, slots=True)
class Models:
    """What a node can answer for: adapters sorted by id. `more`: there are some after the last of these. `refused`: names that cannot be served there."""

    bases: tuple[Model, ...] = ()
    adapters: tuple[Model, ...] = ()
    more: bool = False
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a node's origins could give, sorted. `more`: there are names after the last of these. `version` "": nothing could be listed yet."""

    version: str = ""
    names: tuple[str, ...] = ()
    more: bool = False


@dataclass(frozen=True, slots=True)
class PeerArtifact:
    """What another node has under a name, file by file. Of the asker's own instance: it has been asked itself, and says nothing else."""

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
        self._channel = Channel(address, rpc, _CHANNEL_OPTIONS)
        self._position = ("", 0)  # of the watch: the instance, and the last change seen of it

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
        """Wait until `adapter` is on the node's disk and, with `loading`, known to its engine. Cancelling ends the wait, not the work.

        A `prefetch` leases nothing and yields to every request; for `keep_s` it is no room for another one.
        `sha256` is what its weights must have. `on_progress` is called at once, then at most every half second while the phase or the bytes change.
        """
        request = self._ensure_request(adapter, sha256, prefetch=prefetch, keep_s=keep_s, loading=loading)
        if on_progress is None:
            return _staged(await self._unary("Ensure", request, pb.EnsureReply))
        async with contextlib.aclosing(self._stream("Stage", request, pb.StageProgress.FromString)) as messages:
            async for message in messages:
                if message.HasField("reply"):
                    return _staged(message.reply)
                on_progress(_progress(message))
        raise StagerUnavailable(f"stager {self.address}: it ended the call without an answer")

    async def stage(self, adapter: str, sha256: str = "") -> AsyncIterator[Progress | Staged]:
        """The same; how far it is comes meanwhile, Staged last."""
        async for message in self._stream("Stage", self._ensure_request(adapter, sha256), pb.StageProgress.FromString):
            if message.HasField("reply"):
                yield _staged(message.reply)
            else:
                yield _progress(message)

    async def claim(self, leases: Sequence[Claimed]) -> tuple[float, ...]:
        """Tell a new instance of the stager what this holder relies on: seconds for which each of `leases` is honoured from now on, 0 where it is not."""
        granted: list[float] = []
        for first in range(0, len(leases), MAX_CLAIMED):
            part = leases[first : first + MAX_CLAIMED]
            request = pb.ClaimRequest(holder=self.holder, leases=[_claimed(lease) for lease in part])
            reply = await self._unary("Claim", request, pb.ClaimReply)
            if len(reply.lease_seconds) != len(part):
                raise StagerUnavailable(f"stager {self.address}: it answers {len(reply.lease_seconds)} of {len(part)} claims")
            granted += reply.lease_seconds
        return tuple(granted)

    async def release(self, adapter: str = "", digest: str = "") -> int:
        """Give back the holder's lease on `adapter` (of an older version, by its digest), or all it has; how many there were."""
        request = pb.ReleaseRequest(holder=self.holder, adapter=adapter, digest=digest)
        return int((await self._unary("Release", request, pb.ReleaseReply)).released)

    async def models(self, after: str = "", limit: int = 0) -> Models:
        """What the node can answer for: base models, and at most `limit` adapters (0: all) whose ids come after `after`."""
        reply = await self._unary("Models", pb.ModelsRequest(after=after, limit=limit), pb.ModelsReply)
        bases, adapters = (tuple(Model(m.id, m.root, m.max_model_len) for m in some) for some in (reply.bases, reply.adapters))
        return Models(bases, adapters, reply.more, tuple(reply.refused))

    async def catalogue(self, version: str = "", after: str = "", limit: int = 0) -> Catalogue:
        """What the node's origins could give: a page of the names after `after`, `limit` at most. No names if `version` is still the current one."""
        request = pb.CatalogueRequest(version=version, after=after, limit=limit)
        reply = await self._unary("Catalogue", request, pb.CatalogueReply)
        return Catalogue(reply.version, tuple(reply.names), reply.more)

    async def resolve(self, adapter: str) -> str:
        """Which origin the node would stage `adapter` from. Raises ModelNotFound, or what the origin fails with."""
        return str((await self._unary("Resolve", pb.ResolveRequest(adapter=adapter), pb.ResolveReply)).origin)

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

    async def drain(self, why: str) -> Drained:
        """Have the node take nothing new; how far that is. Asked again, it says how far it is by then."""
        return _drained(await self._unary("Drain", pb.DrainRequest(drain=True, why=why), pb.DrainReply))

    async def undrain(self) -> Drained:
        """Have it take what comes again."""
        return _drained(await self._unary("Drain", pb.DrainRequest(drain=False), pb.DrainReply))

    async def refresh(self, adapter: str) -> tuple[bool, str, str]:
        """Compare with the origin now: whether a new version took its place, its digest and revision."""
        reply = await self._unary("Refresh", pb.RefreshRequest(adapter=adapter), pb.RefreshReply)
        return reply.changed, reply.digest, reply.revision

    async def verify(self, adapter: str = "") -> AsyncIterator[Verified]:
        """Read `adapter`, or everything, back from the node's disk."""
        async for message in self._stream("Verify", pb.VerifyRequest(adapter=adapter), pb.VerifyResult.FromString):
            yield Verified(**{name: getattr(message, name) for name in Verified.__slots__})

    async def find(self, adapter: str, revision: str = "", instance: str = "") -> PeerArtifact | None:
        """Whether the node has `adapter` in that revision of its origin ("": in any). `instance`: of the stager that asks."""
        try:
            reply = await self._unary("Find", pb.FindRequest(adapter=adapter, revision=revision, instance=instance), pb.FindReply)
        except ModelNotFound:
            return None
        files = tuple(File(file.path, file.size, file.sha256) for file in reply.files)
        return PeerArtifact(reply.instance, reply.digest, reply.revision, reply.origin, files)

    async def read(self, digest: str, path: str, offset: int = 0) -> AsyncGenerator[memoryview, None]:
        """The bytes of one file of an artifact, from `offset` on."""
        async for chunk in self._stream("Read", pb.ReadRequest(digest=digest, path=path, offset=offset), chunks.decode):
            yield chunk

    async def watch(self, heartbeat_s: float = 0.0, *, copies: bool = False, load: bool = False, wakes: bool = False) -> AsyncIterator[WatchEvent]:
        """What was missed since the last watch, the node's state, then every change, until the stager goes away.

        With `heartbeat_s` the stager says something at least so often, as its NodeState confirms: Silent comes once when it does not, Heard when it
        does again, and StagerUnavailable is raised when it has been silent for six heartbeats. With `copies` it tells what the node has, whole and then by
        changes; with `load` what its engine works on; with `wakes` Woken.
        """
        asked = pb.WatchRequest(heartbeat_seconds=heartbeat_s, copies=copies, load=load, wakes=wakes, holder=self.holder)
        try:
            while True:
                async with self._channel.line() as line, contextlib.aclosing(self._watch(line, asked)) as events:
                    async for event in events:
                        if event is not None:
                            yield event
                        if not self._channel.is_current(line):  # its certificates were renewed: the next stream begins where this one ends
                            break
                    else:
                        return
        except Silence as silence:
            raise StagerUnavailable(f"stager {self.address}: {silence}") from None

    async def _watch(self, line: Line, asked: pb.WatchRequest) -> AsyncGenerator[WatchEvent | None, None]:
        """One stream, from where the last one ended; None for what is no event. Raises Silence."""
        request = pb.WatchRequest()
        request.CopyFrom(asked)
        request.instance, request.after = self._position
        instance = request.instance
        beat = Heartbeat(asked.heartbeat_seconds)  # until its first word, which any stager says at once
        messages = self._stream_on(line, "Watch", request, pb.WatchEvent.FromString)
        async with contextlib.aclosing(messages), contextlib.aclosing(Listener(lambda: anext(messages, None), beat).listen()) as heard:
            async for message in heard:
                if isinstance(message, Silent | Heard):
                    yield message
                    continue
                event = _event(message)
                if isinstance(event, NodeState):
                    beat.every_s = event.heartbeat_s if asked.heartbeat_seconds else 0.0
                    instance = event.instance
                    self._position = (instance, message.sequence) if message.sequence else ("", 0)  # 0: what the node has follows, and its end has one
                elif message.sequence:
                    self._position = (instance, message.sequence)
                yield event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    def _ensure_request(self, adapter: str, sha256: str, *, prefetch: bool = False, keep_s: float = 0.0, loading: Loading = Loading.NONE) -> pb.EnsureRequest:
        request = pb.EnsureRequest(adapter=adapter, holder=self.holder, sha256=sha256, loading=pb.Loading.Name(loading.value), keep_seconds=keep_s)
        request.priority = pb.Priority.PREFETCH if prefetch else pb.Priority.REQUEST
        return request

    async def _unary(self, method: str, request: Any, reply: Any) -> Any:
        async with self._channel.line() as line:
            ask = line.channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, reply.FromString)
            refused: LoraExtprocError | None = None
            for metadata in self._channel.tokens.to_try():
                try:
                    with self._translated():
                        answer = await ask(request, metadata=metadata)
                except CredentialsRefused as error:
                    refused = error
                    continue
                return self._readable(answer)
            assert refused is not None
            raise refused

    async def _stream(self, method: str, request: Any, decode: Callable[[bytes], T]) -> AsyncGenerator[T, None]:
        async with self._channel.line() as line, contextlib.aclosing(self._stream_on(line, method, request, decode)) as messages:
            async for message in messages:
                yield message

    async def _stream_on(self, line: Line, method: str, request: Any, decode: Callable[[bytes], T]) -> AsyncGenerator[T, None]:
        ask = line.channel.unary_stream(f"/{SERVICE}/{method}", type(request).SerializeToString, decode)
        refused: LoraExtprocError | None = None
        for metadata in self._channel.tokens.to_try():
            call = ask(request, metadata=metadata)
            has_begun = False
            try:
                with self._translated():
                    async for message in call:
                        has_begun = True
                        yield self._readable(message)
                return
            except CredentialsRefused as error:
                if has_begun:
                    raise
                refused = error
            finally:
                call.cancel()
        assert refused is not None
        raise refused

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """gRPC's errors as ours. It also raises a CancelledError that nobody asked for, in a call whose channel is closed."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._ours(error) from error
        except (grpc.aio.BaseError, grpc.RpcError) as error:
            raise StagerUnavailable(f"stager {self.address}: {type(error).__name__}") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise StagerUnavailable(f"stager {self.address}: the connection was closed") from None

    def _readable(self, message: T | None) -> T:
        """gRPC gives None for a message that its decoder does not understand."""
        if message is None:
            raise StagerUnavailable(f"stager {self.address}: its answer cannot be read")
        return message

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
            return CredentialsRefused(f"stager {self.address}: {error.details()}")
        return StagerUnavailable(f"stager {self.address}: {error.code().name.lower()}")


def _staged(reply: pb.EnsureReply) -> Staged:
    return Staged(reply.digest, reply.staged, reply.origin, reply.lease_seconds, reply.waited_seconds, reply.bytes, reply.model, reply.loaded)


def _progress(message: pb.StageProgress) -> Progress:
    return Progress(message.phase, message.origin, message.done_bytes, message.total_bytes)


def _claimed(lease: Claimed) -> pb.ClaimedLease:
    return pb.ClaimedLease(
        adapter=lease.adapter, digest=lease.digest, loading=pb.Loading.Name(lease.loading.value), model=lease.model, remaining_seconds=lease.remaining_s
    )


def _drained(reply: pb.DrainReply) -> Drained:
    return Drained(reply.draining, reply.empty, reply.leased, reply.requests)


def _event(message: pb.WatchEvent) -> WatchEvent | None:
    match message.WhichOneof("event"):
        case "node":
            node = message.node
            return NodeState(node.ready, node.why, node.instance, node.resumed, node.draining, node.heartbeat_seconds, node.empty)
        case "published":
            return Published(message.published)
        case "refreshed":
            return Refreshed(message.refreshed)
        case "evicted":
            return Evicted(message.evicted)
        case "refused":
            return Refused(message.refused)
        case "demand":
            return Demand(message.demand.adapters, message.demand.cpu_slots)
        case "inventory":
            part = message.inventory
            return Inventory(tuple(part.cold), tuple(part.warm), part.more)
        case "loaded":
            return Loaded(message.loaded)
        case "unloaded":
            return Unloaded(message.unloaded)
        case "woken":
            return Woken(message.woken)
        case "load":
            load = message.load
            numbers = (load.running, load.waiting, load.age_seconds, load.every_seconds)
            if not load.known or not all(0 <= number < math.inf for number in numbers):
                return None
            shown = (load.running, load.waiting, load.kv_usage, load.slots, load.cpu_slots, load.age_seconds)
            return EngineLoad(*shown, load.every_seconds, max(1, load.routers), load.others_held)
        case "space":
            return Space(message.space.used_bytes, message.space.reserved_bytes, message.space.max_bytes)
        case _:
            return None  # a heartbeat, or of a newer stager
