"""ext_proc messages to events, replies to messages: the only place that touches the generated code of `protos/ext_proc.proto`."""

from collections.abc import Mapping
from functools import lru_cache

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from ..core import varint
from ..core.events import (
    BodyReply,
    Direction,
    Event,
    HeadersReply,
    ImmediateReply,
    Mode,
    Mutation,
    OwnReply,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    TrailersReply,
    Unreadable,
)
from ..core.pieces import Buffer
from ..core.steering import LB_NAMESPACE, OWN_ANSWER, OWN_NAMESPACE
from ..errors import LoraExtprocError
from ..pb import ext_proc_pb2 as pb
from .http2.calls import Message, joined
from .http2.streams import LARGE_BYTES

_REQUEST_BODY, _RESPONSE_BODY, _BODY, _END_OF_STREAM = 0x22, 0x2A, 0x0A, 0x10  # field numbers and wire types
_NO_METADATA = b"\x42\x00"
_ENDS = (b"\x22\x02\x10\x01", b"\x22\x02\x10\x01" + _NO_METADATA)  # a body's end, behind its last byte: in full duplex each body has one
_MODES = {mode.value: mode for mode in Mode}
_UNSPOKEN = Mode.GRPC  # what a mode that is newer than ours is taken for, and answered as
KEPT_IN_PIECES_BYTES = 64 * 1024  # a body up to this size is joined when it is read: one object is handled faster than several

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
SERVED_KEY = "x-gateway-destination-endpoint-served"
ATTRIBUTES, UPSTREAM_ADDRESS = "envoy.filters.http.ext_proc", "upstream.address"  # Envoy's name of the filter, whatever a configuration calls it


def decode(message: Message) -> Event:
    """One ProcessingRequest as an event. What cannot be read is an event too: the exchange answers it."""
    if type(message) is bytes and len(message) < LARGE_BYTES:
        if message in _ENDS:
            return RequestBody(b"", True)
    elif (body := _decode_body(message if isinstance(message, tuple) else (message,))) is not None:
        return body
    try:
        request = pb.ProcessingRequest.FromString(joined(message))
    except DecodeError:
        return Unreadable("not a ProcessingRequest")
    kind = request.WhichOneof("request")
    if kind == "request_headers":
        config = request.protocol_config
        return RequestHeaders(
            headers=_headers(request.request_headers.headers),
            end_of_stream=request.request_headers.end_of_stream,
            request_mode=_MODES.get(config.request_body_mode, _UNSPOKEN),  # Envoy leaves protocol_config out where all of it is NONE
            response_mode=_MODES.get(config.response_body_mode, _UNSPOKEN),
            subset=_subset(request) if request.HasField("metadata_context") else None,
        )
    if kind == "request_body":
        return RequestBody(request.request_body.body, request.request_body.end_of_stream)
    if kind == "request_trailers":
        return RequestTrailers()
    if kind == "response_headers":
        return _response_headers(request)
    if kind == "response_body":
        return ResponseBody(request.response_body.body, request.response_body.end_of_stream)
    if kind == "response_trailers":
        return ResponseTrailers()
    return Unreadable("a ProcessingRequest without a request")


def encode(reply: Reply) -> Message:
    """One reply as a ProcessingResponse. A mutation that was encoded before is not encoded again; a body is not copied."""
    match reply:
        case BodyReply(chunk=chunk, mutation=None, replaces=False) if chunk is not None:
            return _encode_body(reply.direction, chunk, reply.end_of_stream)
        case BodyReply(replaces=True):
            return _encode_replacement(reply)
        case HeadersReply(mutation=Mutation() as mutation):
            if not mutation.encoded:
                mutation.encoded = _encode(reply)
            return mutation.encoded
        case OwnReply():
            return _encode_own(reply)
        case _:
            return _encode(reply)


def _encode(reply: Reply) -> bytes:
    return _response(reply).SerializeToString()


def _response(reply: Reply) -> pb.ProcessingResponse:
    response = pb.ProcessingResponse()
    match reply:
        case HeadersReply(direction, mutation):
            headers = response.request_headers if direction is Direction.REQUEST else response.response_headers
            headers.SetInParent()
            if mutation is not None:
                _mutate(response, headers.response, mutation)
        case BodyReply(direction, _, _, mutation):  # its bytes are written by the caller
            body = response.request_body if direction is Direction.REQUEST else response.response_body
            body.SetInParent()
            if mutation is not None:
                _mutate(response, body.response, mutation)
        case TrailersReply(direction):
            (response.request_trailers if direction is Direction.REQUEST else response.response_trailers).SetInParent()
        case ImmediateReply(error, notes, headers):
            _immediate(response, error, notes, headers)
        case OwnReply(_, notes, headers):
            response.immediate_response.status.code = 200
            _set_headers(response.immediate_response.headers, {"content-type": "application/json", **headers})
            response.immediate_response.details = OWN_ANSWER
            _fill(response.dynamic_metadata.fields[OWN_NAMESPACE].struct_value, notes)
    return response


# Bodies are most of the bytes, so their two messages are read and written by hand: through the generated code each would be copied four times. Of small
# ones the copies cost less than reading by hand does, so those are read by the generated code, too. Anything but the plain form goes the ordinary way, and
# the tests compare both with an independent full set.


def _decode_body(pieces: tuple[Buffer, ...]) -> RequestBody | ResponseBody | None:
    """A ProcessingRequest that is `request_body` (field 4) or `response_body` (5), holding `body` and `end_of_stream` in order, and nothing else but the
    empty `metadata_context` (8) that Envoy 1.40 puts behind it.

    What stands before the body is in the first piece, what comes after it in the last; anything else is not worth a path of its own.
    """
    first, last, size = pieces[0], pieces[-1], sum(map(len, pieces))
    if len(first) < 2 or first[0] not in (_REQUEST_BODY, _RESPONSE_BODY):
        return None
    length, position = varint.decode(first, 1)
    if size - position - length == len(_NO_METADATA) and last[-len(_NO_METADATA) :] == _NO_METADATA:
        last, size = last[: -len(_NO_METADATA)], position + length
    if position + length != size:
        return None
    body_size = 0
    if position < len(first) and first[position] == _BODY:
        body_size, position = varint.decode(first, position + 1)
    after = size - position - body_size  # bytes behind the body
    if after not in (0, 2) or after > len(last) - (position if len(pieces) == 1 else 0):
        return None
    end_of_stream = after == 2
    if end_of_stream and (last[-2] != _END_OF_STREAM or last[-1] != 1):
        return None
    body: bytes | tuple[Buffer, ...]
    if len(pieces) == 1:
        body = bytes(first[position : position + body_size])
    else:
        body = (memoryview(first)[position:], *pieces[1:-1], bytes(last[: len(last) - after]))  # the last is a view that the next read writes over
        if body_size <= KEPT_IN_PIECES_BYTES:
            body = b"".join(body)
    if first[0] == _REQUEST_BODY:
        return RequestBody(body, end_of_stream)
    return ResponseBody(body if isinstance(body, bytes) else b"".join(body), end_of_stream)


def _encode_body(direction: Direction, chunk: Buffer | tuple[Buffer, ...], end_of_stream: bool) -> Message:
    tail = b"\x10\x01" if end_of_stream else b""
    if isinstance(chunk, tuple):
        return (_head(direction, sum(map(len, chunk)), len(tail)), *chunk, tail)
    head = _head(direction, len(chunk), len(tail))
    return (head, chunk, tail) if len(chunk) >= LARGE_BYTES else head + chunk + tail


def _encode_replacement(reply: BodyReply) -> Message:
    """The whole body of a BUFFERED request, and what changes with it. The generated code writes everything but the body, which is put behind it:
    `body` (1) in `body_mutation` (3) at the end of `response` (1) in `request_body` (3). No reader has to merge anything.
    """
    assert reply.chunk is not None
    pieces = reply.chunk if isinstance(reply.chunk, tuple) else (reply.chunk,)
    size = sum(map(len, pieces))
    response = _response(reply)
    common = response.request_body.response.SerializeToString()
    response.ClearField("request_body")
    head = _before(b"\x1a", _before(b"\x0a", b"", size), size)
    return (response.SerializeToString() + _before(b"\x1a", _before(b"\x0a", common + head, size), size), *pieces)


def _encode_own(reply: OwnReply) -> Message:
    """An answer of our own: `body` (3) at the end of `immediate_response` (7), as above."""
    size = sum(map(len, reply.body))
    response = _response(reply)
    immediate = response.immediate_response.SerializeToString()
    response.ClearField("immediate_response")
    return (response.SerializeToString() + _before(b"\x3a", immediate + _before(b"\x1a", b"", size), size), *reply.body)


def _before(tag: bytes, head: bytes, after: int) -> bytes:
    """A field that begins with `head` and goes on for `after` bytes."""
    return tag + varint.encode(len(head) + after) + head


@lru_cache(1024)
def _head(direction: Direction, size: int, after: int) -> bytes:
    """`request_body` (3) or `response_body` (4) . response (1) . body_mutation (3) . streamed_response (3) . {body (1), end_of_stream (2)}."""
    head = b"\x0a" + varint.encode(size) if size else b""
    inner = len(head) + size + after
    for tag in (b"\x1a", b"\x1a", b"\x0a", b"\x1a" if direction is Direction.REQUEST else b"\x22"):
        wrapped = tag + varint.encode(inner)
        head = wrapped + head
        inner += len(wrapped)
    return head


def _headers(message: pb.HeaderMap) -> Mapping[str, str]:
    """Names in lower case, as Envoy sends them; of repeated ones the first. Bytes that are not UTF-8 become surrogates: nothing raises."""
    headers: dict[str, str] = {}
    for header in message.headers:
        raw = header.raw_value
        headers.setdefault(header.key, raw.decode("utf-8", "surrogateescape") if raw else header.value)
    return headers


def _subset(request: pb.ProcessingRequest) -> tuple[str, ...] | None:
    """The Endpoint Picker's subset hint: a list, or a comma string. Present but empty means that nothing is eligible."""
    metadata = request.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in metadata or SUBSET_KEY not in metadata[SUBSET_NAMESPACE].fields:
        return None
    value = metadata[SUBSET_NAMESPACE].fields[SUBSET_KEY]
    if value.HasField("list_value"):
        return tuple(item.string_value.strip() for item in value.list_value.values)
    return tuple(part.strip() for part in value.string_value.split(",") if part.strip())


def _response_headers(request: pb.ProcessingRequest) -> ResponseHeaders:
    """With the status, where it is shown, only if the gateway tells who served: nothing else asks for it."""
    served = _served(request)
    status = next((h.raw_value or h.value for h in request.response_headers.headers.headers if h.key == ":status"), "") if served else ""
    return ResponseHeaders(request.response_headers.end_of_stream, served, int(status) if status.isdigit() else 0)


def _served(request: pb.ProcessingRequest) -> str:
    """The endpoint that served the request. The Endpoint Picker protocol has it in the response phase's metadata; where a gateway sends none, an
    attribute of Envoy's has the address of the connection that the response came on.
    """
    if request.HasField("metadata_context"):
        metadata = request.metadata_context.filter_metadata
        if LB_NAMESPACE in metadata and SERVED_KEY in metadata[LB_NAMESPACE].fields:
            return metadata[LB_NAMESPACE].fields[SERVED_KEY].string_value
    return request.attributes[ATTRIBUTES].fields[UPSTREAM_ADDRESS].string_value if ATTRIBUTES in request.attributes else ""


def _mutate(response: pb.ProcessingResponse, common: pb.CommonResponse, mutation: Mutation) -> None:
    _set_headers(common.header_mutation, mutation.set_headers)
    common.header_mutation.remove_headers.extend(mutation.remove_headers)
    common.clear_route_cache = mutation.clear_route_cache
    for namespace, values in mutation.metadata.items():
        _fill(response.dynamic_metadata.fields[namespace].struct_value, values)


def _set_headers(message: pb.HeaderMutation, headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        option = message.set_headers.add(append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)
        option.header.key, option.header.raw_value = name, value.encode("utf-8", "surrogateescape")


def _fill(struct: Struct, values: Mapping[str, str | float]) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            struct.fields[name].string_value = value.encode("utf-8", "replace").decode()  # a header may hold anything
        else:
            struct.fields[name].number_value = value


def _immediate(response: pb.ProcessingResponse, error: LoraExtprocError, notes: Mapping[str, str | float], others: Mapping[str, str]) -> None:
    """Status, OpenAI-style JSON and the reason word, which Envoy prints as %RESPONSE_CODE_DETAILS%."""
    immediate = response.immediate_response
    immediate.status.code = error.status
    headers = {"content-type": "application/json", "x-lora-extproc-reason": error.reason, **others}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    _set_headers(immediate.headers, headers)
    immediate.body = error.openai_body()
    immediate.details = error.reason
    _fill(response.dynamic_metadata.fields[OWN_NAMESPACE].struct_value, {**notes, "reason": error.reason})
