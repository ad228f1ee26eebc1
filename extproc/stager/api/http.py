"""The stager's HTTP control API: the verbs of the gRPC service as JSON, health and metrics. Its OpenAPI page is at /docs.

Adapters are read by peers alone, over gRPC.
"""

import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ...core.artifact import adapter_name
from ...errors import InvalidRequest, LoraExtprocError, NotPermitted
from ...process.http import control_app
from ..stager import Stager
from ..work.audit import Verified
from .grpc import stated_sha256
from .replies import drain_reply, ensure_reply, list_parts
from .watch import watch_events


class Asked(BaseModel):
    """What is not known here is an error: a misspelt `sha256` would be no check at all."""

    model_config = ConfigDict(extra="forbid")


class Adapter(Asked):
    """Which adapter."""

    adapter: str = Field(description="Its name, as clients put it into `model`.")


class Stage(Adapter):
    """What to put on disk."""

    sha256: str = Field("", description="What the weights file must have, in hex. Empty: whatever the origin has.")
    prefetch: bool = Field(False, description="Nobody waits for it yet: it is not leased, takes only room that nobody needs, and every request goes first.")
    keep_seconds: float = Field(0.0, ge=0, allow_inf_nan=False, description="Of a prefetch: how long its room is not given to another one.")
    holder: str = Field("", description="Whose lease it is.")


class Release(Asked):
    """What to give back."""

    holder: str = Field(description="Who leased it.")
    adapter: str = Field("", description="Empty: all that the holder leased.")


class Drain(Asked):
    """Why the node is emptied."""

    why: str = Field("", description="For logs and for who asks.")


class Verify(Asked):
    """What to read back."""

    adapter: str = Field("", description="Empty: everything.")


def stager_app(stager: Stager, accepts: Callable[[str | None], bool] | None = None, *, destructive: bool = True) -> FastAPI:
    """The application behind `stager.http_listen`. `accepts` says whether an `authorization` header opens a verb; None: nobody has to show one.

    Not `destructive`: what removes or pins is refused.
    """
    app = control_app("lora-extproc stager", stager.node.metrics, lambda: stager.not_ready)

    async def authorized(authorization: Annotated[str | None, Header()] = None) -> None:
        if accepts is not None and not accepts(authorization):
            raise NotPermitted("a valid token is needed: rpc.token_env or rpc.token_file")

    async def permitted(_: Annotated[None, Depends(authorized)]) -> None:
        if not destructive:
            raise NotPermitted("this is off: stager.http_listen is not on loopback, and no rpc.token_env or token_file is set")

    may_ask, may_change = [Depends(authorized)], [Depends(permitted)]

    @app.exception_handler(LoraExtprocError)
    async def failed(_: Request, error: LoraExtprocError) -> JSONResponse:
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def not_understood(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(InvalidRequest("; ".join(_complaint(e) for e in error.errors())))

    @app.exception_handler(HTTPException)
    async def no_such_verb(_: Request, error: HTTPException) -> JSONResponse:
        return _refusal(InvalidRequest(error.detail), error.status_code)

    @app.get("/v1/adapters", summary="What is on disk, least recently used first, and the disk's budget in bytes.", dependencies=may_ask)
    async def adapters() -> StreamingResponse:
        return StreamingResponse(_list_text(stager), media_type="application/json")

    @app.post("/v1/stage", summary="Put an adapter on disk, lease it unless it is a prefetch, and answer when it is there.", dependencies=may_ask)
    async def stage(asked: Stage) -> dict[str, Any]:
        sha256 = stated_sha256(asked.sha256)
        if asked.prefetch:
            return _plain(ensure_reply(await stager.prefetch(asked.adapter, sha256=sha256, keep_s=asked.keep_seconds)))
        return _plain(ensure_reply(await stager.ensure(asked.adapter, holder=asked.holder, sha256=sha256)))

    @app.post("/v1/release", summary="Give back leases.", dependencies=may_ask)
    async def release(asked: Release) -> dict[str, Any]:
        return {"released": stager.release(asked.holder, asked.adapter)}

    @app.post("/v1/refresh", summary="Compare an adapter with its origin now; a new version replaces it.", dependencies=may_ask)
    async def refresh(asked: Adapter) -> dict[str, Any]:
        changed = await stager.refresh(asked.adapter)
        named = stager.node.holdings.get(adapter_name(asked.adapter))
        return {"changed": changed, "digest": named.digest if named else "", "revision": named.revision if named else ""}

    @app.post("/v1/pin", summary="Put an adapter on disk and hold it there without an end.", dependencies=may_change)
    async def pin(asked: Stage) -> dict[str, Any]:
        return {"digest": await stager.pin(asked.adapter, stated_sha256(asked.sha256))}

    @app.post("/v1/unpin", summary="Let it be evicted again when its time comes.", dependencies=may_change)
    async def unpin(asked: Adapter) -> dict[str, Any]:
        await stager.unpin(asked.adapter)
        return {}

    @app.post("/v1/evict", summary="Remove an adapter, unless somebody holds it.", dependencies=may_change)
    async def evict(asked: Adapter) -> dict[str, Any]:
        return {"bytes": await stager.evict(asked.adapter)}

    @app.post("/v1/purge", summary="Remove an adapter whoever holds it, but for the engine; forget that it was not found.", dependencies=may_change)
    async def purge(asked: Adapter) -> dict[str, Any]:
        return {"bytes": await stager.purge(asked.adapter)}

    @app.post(
        "/v1/drain", summary="Take nothing new, and say how far it is; survives a restart. Asked again, it says how far it is then.", dependencies=may_change
    )
    async def drain(asked: Drain | None = None) -> dict[str, Any]:
        return _plain(drain_reply(await stager.drain.begin(asked.why if asked is not None else "")))

    @app.post("/v1/undrain", summary="Take what comes again.", dependencies=may_change)
    async def undrain() -> dict[str, Any]:
        return _plain(drain_reply(await stager.drain.end()))

    @app.post("/v1/verify", summary="Read artifacts back from the disk, one JSON object per line; what differs is removed.", dependencies=may_change)
    async def verify(asked: Verify | None = None) -> StreamingResponse:
        results = stager.verify(asked.adapter if asked is not None else "")
        first = await anext(results, None)  # what cannot be verified at all is an error, not the end of a stream that had begun well

        async def lines() -> AsyncIterator[str]:
            if first is not None:
                yield _line(first)
            async for found in results:
                yield _line(found)

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.get("/v1/watch", summary="What was missed since Last-Event-ID, the node's state, then every change, as server-sent events.", dependencies=may_ask)
    async def watch(
        last_event_id: Annotated[str, Header(description="`<instance>.<sequence>`, as events have it.")] = "",
        copies: Annotated[bool, Query(description="Also what the node has, on disk and in its engine's memory.")] = False,
        load: Annotated[bool, Query(description="Also what its engine works on.")] = False,
    ) -> StreamingResponse:
        seen = re.fullmatch(r"([0-9a-f]+)\.(\d{1,19})", last_event_id, re.ASCII)
        instance, after = (seen[1], int(seen[2])) if seen else ("", 0)

        async def events() -> AsyncIterator[str]:
            async with contextlib.aclosing(watch_events(stager, instance, after, copies=copies, load=load)) as changes:
                async for event in changes:
                    kind = event.WhichOneof("event") or ""
                    value = getattr(event, kind)
                    shown = {kind: value if isinstance(value, str) else _plain(value)}
                    position = f"id: {stager.instance}.{event.sequence}\n" if event.sequence else ""  # what is no change is no place to go on from
                    yield f"{position}data: {json.dumps(shown)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def _refusal(error: LoraExtprocError, status: int = 0) -> JSONResponse:
    headers = {"retry-after": str(error.retry_after_s)} if error.retry_after_s is not None else {}
    return JSONResponse(json.loads(error.openai_body()), status or error.status, headers)


def _line(found: Verified) -> str:
    shown = {"adapter": found.name, "digest": found.digest, "ok": not found.why, "why": found.why, "removed": found.removed, "bytes": found.size}
    return json.dumps(shown) + "\n"


async def _list_text(stager: Stager) -> AsyncIterator[str]:
    """The list as JSON, slice by slice."""
    yield '{"adapters": ['
    rest: dict[str, Any] = {}
    comma = ""
    async for part in list_parts(stager):
        rest = _plain(part)
        if adapters := rest.pop("adapters"):
            yield comma + json.dumps(adapters)[1:-1]
            comma = ", "
    yield f"], {json.dumps(rest)[1:]}"


def _plain(message: Message) -> dict[str, Any]:
    """A message with all its fields. Numbers stay numbers: protobuf's own JSON makes text of those with 64 bits."""

    def plain(value: Any) -> Any:
        return _plain(value) if isinstance(value, Message) else value

    return {
        field.name: [plain(item) for item in getattr(message, field.name)] if field.is_repeated else plain(getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
    }


def _complaint(error: Any) -> str:
    """One of FastAPI's, as ours: which field, and what is wrong with it."""
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error['ctx']['error']}"
    where = ".".join(str(part) for part in error["loc"][1:])
    return f"{where or 'the body'}: {error['msg'][:1].lower()}{error['msg'][1:]}"
