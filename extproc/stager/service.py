"""The stager's gRPC service: messages in, Stager calls, messages out. Our errors cross as a status, a text and the name of their class."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from ..client import ERROR_METADATA, SERVICE
from ..errors import (
    AdapterInUse,
    InvalidAdapter,
    LoraExtprocError,
    ModelNotFound,
    NoSpace,
    OriginFailed,
    RequestError,
)
from ..pb import stager_pb2 as pb
from .stager import Stager

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

_CODES: tuple[tuple[type[LoraExtprocError], grpc.StatusCode], ...] = (
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidAdapter, grpc.StatusCode.INVALID_ARGUMENT),
    (OriginFailed, grpc.StatusCode.UNAVAILABLE),
    (NoSpace, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (AdapterInUse, grpc.StatusCode.FAILED_PRECONDITION),
)


class StagerService:
    """Registers the four methods of `protos/stager.proto` on a server."""

    def __init__(self, stager: Stager) -> None:
        self._stager = stager

    def register(self, server: grpc.aio.Server) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        methods = {
            "Ensure": unary(self.ensure, pb.EnsureRequest.FromString, pb.EnsureReply.SerializeToString),
            "List": unary(self.list, pb.ListRequest.FromString, pb.ListReply.SerializeToString),
            "Evict": unary(self.evict, pb.EvictRequest.FromString, pb.EvictReply.SerializeToString),
            "Watch": stream(self.watch, pb.WatchRequest.FromString, pb.WatchEvent.SerializeToString),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    async def ensure(self, request: pb.EnsureRequest, context: Context) -> pb.EnsureReply:
        async with _errors(context):
            held = await self._stager.ensure(request.adapter)
        return pb.EnsureReply(
            digest=held.digest,
            staged=held.staged,
            origin=held.manifest.origin,
            lease_seconds=held.lease_s,
            waited_seconds=held.waited_s,
            bytes=held.manifest.size,
        )

    async def list(self, _request: pb.ListRequest, _context: Context) -> pb.ListReply:
        return list_reply(self._stager)

    async def evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictReply:
        async with _errors(context):
            return pb.EvictReply(bytes=await self._stager.evict(request.adapter))

    async def watch(self, _request: pb.WatchRequest, _context: Context) -> AsyncIterator[pb.WatchEvent]:
        with self._stager.changes() as queue:  # before the first answer: nothing between the two is missed
            yield self._node()
            while True:
                change = await queue.get()
                if change.kind == "published":
                    yield pb.WatchEvent(published=change.adapter)
                elif change.kind == "evicted":
                    yield pb.WatchEvent(evicted=change.adapter)
                else:
                    yield self._node()

    def _node(self) -> pb.WatchEvent:
        why = self._stager.not_ready
        return pb.WatchEvent(node=pb.NodeState(ready=why is None, why=why or "", instance=self._stager.instance))


def list_reply(stager: Stager) -> pb.ListReply:
    """What is on disk, least recently used first."""
    by_digest: dict[str, list[str]] = {}
    for name, digest in stager.names.items():
        by_digest.setdefault(digest, []).append(name)
    adapters = [
        pb.Adapter(
            name=name,
            digest=entry.id,
            bytes=entry.size,
            origin=stager.manifests[entry.id].origin,
            revision=stager.manifests[entry.id].revision,
            idle_seconds=stager.idle_s(entry.id),
            leased_seconds=stager.leased_s(entry.id),
        )
        for entry in stager.index.entries()
        for name in sorted(by_digest.get(entry.id, ()))
    ]
    index = stager.index
    return pb.ListReply(adapters=adapters, used_bytes=index.used_bytes, reserved_bytes=index.reserved_bytes, max_bytes=index.max_bytes)


@contextlib.asynccontextmanager
async def _errors(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except LoraExtprocError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.UNAVAILABLE)
        await context.abort(code, error.message, ((ERROR_METADATA, type(error).__name__),))
