"""The stager's gRPC service: messages in, Stager calls, messages out. Our errors cross as a status, a text and the name of their class."""

import asyncio
import contextlib
import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import grpc.aio

from ... import chunks
from ...client import ERROR_METADATA, RETRY_AFTER_METADATA, SERVICE, Claimed, Loading
from ...config.stager import PeerSettings
from ...core.artifact import ArtifactId, adapter_name, is_adopted
from ...errors import (
    AdapterInUse,
    InvalidAdapter,
    InvalidRequest,
    LoraExtprocError,
    ModelNotFound,
    NoSpace,
    NotPermitted,
    OriginFailed,
    Overloaded,
    RequestError,
)
from ...pb import stager_pb2 as pb
from ..disk.store import Store
from ..stager import Ensured, Stager
from ..supply.download import opened
from ..supply.pace import Pace
from ..syscalls import disk_errors
from .replies import catalogue_reply, drain_reply, ensure_reply, list_reply, models_reply
from .watch import watch_events

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_CODES: tuple[tuple[type[LoraExtprocError], grpc.StatusCode], ...] = (
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidAdapter, grpc.StatusCode.INVALID_ARGUMENT),
    (OriginFailed, grpc.StatusCode.UNAVAILABLE),
    (NoSpace, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (AdapterInUse, grpc.StatusCode.FAILED_PRECONDITION),
)


LEAST_READ_BYTES, READ_BYTES = 2**12, 2**20  # per message; below gRPC's default limit of 4 MiB on what a client takes
READER_S = 30.0  # a message has at most a MiB; a peer gives up one that sends nothing after a second, and is as quick itself
FIRST_PROGRESS_S = 0.01  # what is here, or refused at the door, is answered alone
PROGRESS_S = 0.5


class StagerService:
    """Registers the methods of `protos/stager.proto` on a server.

    `destructive` False: Pin, Evict, Purge, Verify and Drain are refused, since whoever reaches the port could call them.
    """

    def __init__(self, stager: Stager, peers: PeerSettings | None = None, *, destructive: bool = True) -> None:
        settings = peers or PeerSettings()
        self._stager = stager
        self._destructive = destructive
        self._send_pace = Pace(settings.max_bytes_per_s)
        self._free_reads = settings.max_reads
        # Where the rate is limited, all who read get something many times a second: who gets nothing for a second takes this node for hung.
        self._read_bytes = (
            min(READ_BYTES, max(LEAST_READ_BYTES, settings.max_bytes_per_s // (8 * settings.max_reads))) if settings.max_bytes_per_s else READ_BYTES
        )

    def register(self, server: grpc.aio.Server) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Ensure": unary(self.ensure, pb.EnsureRequest.FromString, pb.EnsureReply.SerializeToString),
            "Stage": stream(self.stage, pb.EnsureRequest.FromString, pb.StageProgress.SerializeToString),
            "Claim": unary(self.claim, pb.ClaimRequest.FromString, pb.ClaimReply.SerializeToString),
            "Release": unary(self.release, pb.ReleaseRequest.FromString, pb.ReleaseReply.SerializeToString),
            "List": unary(self.list, pb.ListRequest.FromString, bytes),
            "Pin": unary(self.pin, pb.PinRequest.FromString, pb.PinReply.SerializeToString),
            "Evict": unary(self.evict, pb.EvictRequest.FromString, pb.EvictReply.SerializeToString),
            "Purge": unary(self.purge, pb.EvictRequest.FromString, pb.EvictReply.SerializeToString),
            "Refresh": unary(self.refresh, pb.RefreshRequest.FromString, pb.RefreshReply.SerializeToString),
            "Verify": stream(self.verify, pb.VerifyRequest.FromString, pb.VerifyResult.SerializeToString),
            "Models": unary(self.models, pb.ModelsRequest.FromString, bytes),
            "Catalogue": unary(self.catalogue, pb.CatalogueRequest.FromString, pb.CatalogueReply.SerializeToString),
            "Resolve": unary(self.resolve, pb.ResolveRequest.FromString, pb.ResolveReply.SerializeToString),
            "Watch": stream(self.watch, pb.WatchRequest.FromString, pb.WatchEvent.SerializeToString),
            "Drain": unary(self.drain, pb.DrainRequest.FromString, pb.DrainReply.SerializeToString),
            "Find": unary(self.find, pb.FindRequest.FromString, pb.FindReply.SerializeToString),
            "Read": stream(self._send, pb.ReadRequest.FromString, chunks.encode),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def ensure(self, request: pb.EnsureRequest, context: Context) -> pb.EnsureReply:
        async with _errors(context):
            held = await self._ensure(request)
        return ensure_reply(held)

    async def stage(self, request: pb.EnsureRequest, context: Context) -> AsyncIterator[pb.StageProgress]:
        async with _errors(context):
            waiting = asyncio.ensure_future(self._ensure(request))
            told = None
            try:
                await asyncio.wait({waiting}, timeout=FIRST_PROGRESS_S)
                while not waiting.done():
                    progress = self._progress(request.adapter)
                    if progress != told:
                        told = progress
                        yield progress
                    await asyncio.wait({waiting}, timeout=PROGRESS_S)
                yield pb.StageProgress(reply=ensure_reply(waiting.result()))
            finally:
                waiting.cancel()

    def _progress(self, adapter: str) -> pb.StageProgress:
        """How far its flight is; where none is left to wait for, the engine's load is."""
        if (job := self._stager.job(adapter)) is not None:
            return pb.StageProgress(phase=job.phase, origin=job.origin, done_bytes=job.done_bytes, total_bytes=job.total_bytes)
        return pb.StageProgress(phase="load" if self._stager.is_loading(adapter) else "")

    async def claim(self, request: pb.ClaimRequest, context: Context) -> pb.ClaimReply:
        async with _errors(context):
            leases = [Claimed(lease.adapter, lease.digest, _loading(lease.loading), lease.model, lease.remaining_seconds) for lease in request.leases]
            return pb.ClaimReply(lease_seconds=await self._stager.claim(request.holder, leases))

    async def release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseReply:
        async with _errors(context):
            return pb.ReleaseReply(released=self._stager.release(request.holder, request.adapter, request.digest))

    async def list(self, _request: pb.ListRequest, _context: Context) -> bytes:
        return await list_reply(self._stager)

    async def pin(self, request: pb.PinRequest, context: Context) -> pb.PinReply:
        async with _errors(context):
            self._check_permitted("Pin")
            if request.pinned:
                return pb.PinReply(digest=await self._stager.pin(request.adapter, stated_sha256(request.sha256)))
            await self._stager.unpin(request.adapter)
            return pb.PinReply()

    async def evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictReply:
        async with _errors(context):
            self._check_permitted("Evict")
            return pb.EvictReply(bytes=await self._stager.evict(request.adapter))

    async def purge(self, request: pb.EvictRequest, context: Context) -> pb.EvictReply:
        async with _errors(context):
            self._check_permitted("Purge")
            return pb.EvictReply(bytes=await self._stager.purge(request.adapter))

    async def refresh(self, request: pb.RefreshRequest, context: Context) -> pb.RefreshReply:
        async with _errors(context):
            changed = await self._stager.refresh(request.adapter)
            named = self._stager.node.holdings.get(adapter_name(request.adapter))
            return pb.RefreshReply(changed=changed, digest=named.digest if named else "", revision=named.revision if named else "")

    async def verify(self, request: pb.VerifyRequest, context: Context) -> AsyncIterator[pb.VerifyResult]:
        async with _errors(context):
            self._check_permitted("Verify")  # what differs is removed, whoever holds it
            async for found in self._stager.verify(request.adapter):
                yield pb.VerifyResult(adapter=found.name, digest=found.digest, ok=not found.why, why=found.why, removed=found.removed, bytes=found.size)

    async def watch(self, request: pb.WatchRequest, _context: Context) -> AsyncIterator[pb.WatchEvent]:
        wants = {"copies": request.copies, "load": request.load, "wakes": request.wakes}
        events = watch_events(self._stager, request.instance, request.after, request.heartbeat_seconds, holder=request.holder, **wants)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    async def drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        async with _errors(context):
            self._check_permitted("Drain")
            return drain_reply(await (self._stager.drain.begin(request.why) if request.drain else self._stager.drain.end()))

    async def models(self, request: pb.ModelsRequest, _context: Context) -> bytes:
        return await models_reply(self._stager, request.after, request.limit)

    async def catalogue(self, request: pb.CatalogueRequest, _context: Context) -> pb.CatalogueReply:
        return await catalogue_reply(self._stager, request.version, request.after, request.limit)

    async def resolve(self, request: pb.ResolveRequest, context: Context) -> pb.ResolveReply:
        async with _errors(context):
            return pb.ResolveReply(origin=await self._stager.resolve(request.adapter))

    async def find(self, request: pb.FindRequest, context: Context) -> pb.FindReply:
        if request.instance == self._stager.instance:
            return pb.FindReply(instance=self._stager.instance)
        async with _errors(context):
            named = self._stager.node.holdings.get(adapter_name(request.adapter))
            manifest = await self._stager.manifest(request.adapter) if named is not None and not is_adopted(named.id) else None
            if named is None or manifest is None or (request.revision and named.revision != request.revision):
                raise ModelNotFound("not on this node")
            files = [pb.File(path=file.path, size=file.size, sha256=file.sha256) for file in manifest.files]
            return pb.FindReply(instance=self._stager.instance, digest=named.digest, revision=named.revision, origin=named.origin, files=files)

    async def read(self, request: pb.ReadRequest, context: Context) -> AsyncIterator[bytes]:
        async with _errors(context):
            if not self._free_reads:
                raise Overloaded("this node sends to others already, as many as stager.peers.max_reads")
            self._free_reads -= 1
            node = self._stager.node
            try:
                with self._stager.reading(request.digest, request.path) as path:
                    async with opened(lambda: _open_published(node.store, request, path), node.disk) as file:
                        while data := await node.disk.run(file.read, self._read_bytes):
                            await self._send_pace.spend(len(data))
                            node.metrics.sent_bytes.inc(len(data))
                            yield data
            finally:
                self._free_reads += 1

    async def _send(self, request: pb.ReadRequest, context: Context) -> None:
        """What `read` gives. A reader that takes nothing is cut off: until then it holds the artifact and one of `max_reads` places."""
        pieces = self.read(request, context)
        assert isinstance(pieces, AsyncGenerator)  # what the type of an override does not say
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                try:
                    async with asyncio.timeout(READER_S):
                        await context.write(piece)
                except TimeoutError:
                    log.info("%s: a reader took nothing of %s for %g s, and is cut off", request.digest[:12], request.path[:80], READER_S)
                    raise asyncio.CancelledError from None  # ends the call: a status would wait behind the message that is not taken

    def _check_permitted(self, method: str) -> None:
        if not self._destructive:
            raise NotPermitted(f"{method} is off: stager.listen is not on loopback, and no rpc.token_env, token_file or ca_file is set")

    async def _ensure(self, request: pb.EnsureRequest) -> Ensured:
        sha256 = stated_sha256(request.sha256)
        loading = _loading(request.loading)
        if request.priority == pb.PREFETCH:
            return await self._stager.prefetch(request.adapter, sha256=sha256, loading=loading, keep_s=_seconds("keep_seconds", request.keep_seconds))
        return await self._stager.ensure(request.adapter, priority=request.priority, holder=request.holder, sha256=sha256, loading=loading)


def _loading(number: int) -> Loading:
    try:
        return Loading(number)
    except ValueError:
        raise InvalidRequest(f"loading: {number} is not known here") from None


def _seconds(field: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise InvalidRequest(f"{field}: {value} is no number of seconds")
    return value


def stated_sha256(text: str) -> str:
    """What a caller says that the weights must have, in lower-case hex; "" if it says nothing. Raises InvalidRequest.

    What can be no digest is refused here: nothing that would be fetched could have it.
    """
    if text and not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise InvalidRequest(f"sha256: {text[:80]!r} is not 64 hexadecimal digits")
    return text.lower()


def _open_published(store: Store, request: pb.ReadRequest, path: Path) -> BinaryIO:
    """The file at its offset, if the manifest of our own artifact lists it: others' directories may lead anywhere. Blocks."""
    files = store.manifest(request.digest).files if not is_adopted(ArtifactId(request.digest)) else ()
    size = next((file.size for file in files if file.path == request.path), None)
    if size is None:
        raise ModelNotFound(f"{request.digest[:64]!r} has no file {request.path[:80]!r} on this node")
    if request.offset > size:
        raise InvalidRequest(f"offset: {request.path} has {size} bytes; {request.offset} is behind its end")
    with disk_errors("read"):
        file = path.open("rb")
        file.seek(request.offset)
        return file


@contextlib.asynccontextmanager
async def _errors(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except LoraExtprocError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.UNAVAILABLE)
        metadata = [(ERROR_METADATA, type(error).__name__)]  # first: whatever becomes of the text, the router must know which error it is
        if error.retry_after_s is not None:
            metadata.append((RETRY_AFTER_METADATA, str(error.retry_after_s)))
        text = error.message.encode(errors="backslashreplace").decode()  # the library raises on half a surrogate pair, as JSON may hold in a tensor's name
        await context.abort(code, text, tuple(metadata))
