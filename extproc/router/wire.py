"""ext_proc messages to events, replies to messages: the only place that touches the generated code of `protos/ext_proc.proto`."""

from collections.abc import Mapping

from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct

from ..core.exchange import (
    BodyReply,
    Direction,
    Event,
    HeadersReply,
    ImmediateReply,
    Mode,
    Mutation,
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
from ..core.steering import LB_NAMESPACE, OWN_NAMESPACE, REMEMBERED
from ..errors import LoraExtprocError
from ..pb import ext_proc_pb2 as pb

_encoded: dict[int, tuple[Mutation, bytes]] = {}

SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
SERVED_KEY = "x-gateway-destination-endpoint-served"


def decode(message: bytes) -> Event:
    """One ProcessingRequest as an event. What cannot be read is an event too: the exchange answers it."""
    try:
        request = pb.ProcessingRequest.FromString(message)
    except DecodeError:
        return Unreadable("not a ProcessingRequest")
    kind = request.WhichOneof("request")
    if kind == "request_headers":
        config = request.protocol_config
        return RequestHeaders(
            headers=_headers(request.request_headers.headers),
            end_of_stream=request.request_headers.end_of_stream,
            request_mode=_mode(config.request_body_mode),  # Envoy leaves protocol_config out where all of it is NONE
            response_mode=_mode(config.response_body_mode),
            subset=_subset(request) if request.HasField("metadata_context") else None,
        )
    if kind == "request_body":
        return RequestBody(request.request_body.body, request.request_body.end_of_stream)
    if kind == "request_trailers":
        return RequestTrailers()
    if kind == "response_headers":
        return ResponseHeaders(request.response_headers.end_of_stream, _served(request) if request.HasField("metadata_context") else "")
    if kind == "response_body":
        return ResponseBody(request.response_body.body, request.response_body.end_of_stream)
    if kind == "response_trailers":
        return ResponseTrailers()
    return Unreadable("a ProcessingRequest without a request")


def encode(reply: Reply) -> bytes:
    """One reply as a ProcessingResponse. A headers reply with a mutation that was encoded before is not encoded again."""
    if isinstance(reply, HeadersReply) and reply.direction is Direction.REQUEST and reply.mutation is not None:
        known = _encoded.get(id(reply.mutation))
        if known is not None:
            return known[1]
        if len(_encoded) >= REMEMBERED:
            _encoded.clear()
        message = _encode(reply)
        _encoded[id(reply.mutation)] = (reply.mutation, message)  # holding the object keeps its id from being another's
        return message
    return _encode(reply)


def _encode(reply: Reply) -> bytes:
    response = pb.ProcessingResponse()
    match reply:
        case HeadersReply(direction, mutation):
            headers = response.request_headers if direction is Direction.REQUEST else response.response_headers
            headers.SetInParent()
            if mutation is not None:
                _mutate(response, headers.response, mutation)
        case BodyReply(direction, chunk, end_of_stream, mutation):
            body = response.request_body if direction is Direction.REQUEST else response.response_body
            body.SetInParent()
            if chunk is not None:
                streamed = body.response.body_mutation.streamed_response
                streamed.body, streamed.end_of_stream = chunk, end_of_stream
            if mutation is not None:
                _mutate(response, body.response, mutation)
        case TrailersReply(direction):
            (response.request_trailers if direction is Direction.REQUEST else response.response_trailers).SetInParent()
        case ImmediateReply(error):
            _immediate(response, error)
    return response.SerializeToString()


def _headers(message: pb.HeaderMap) -> Mapping[str, str]:
    """Names in lower case, as Envoy sends them; of repeated ones the first. Bytes that are not UTF-8 become surrogates: nothing raises."""
    headers: dict[str, str] = {}
    for header in message.headers:
        raw = header.raw_value
        headers.setdefault(header.key, raw.decode("utf-8", "surrogateescape") if raw else header.value)
    return headers


def _mode(value: int) -> Mode:
    try:
        return Mode(value)
    except ValueError:
        return Mode.GRPC  # a mode newer than ours: not spoken, and answered so


def _subset(request: pb.ProcessingRequest) -> tuple[str, ...] | None:
    """The Endpoint Picker's subset hint: a list, or a comma string. Present but empty means that nothing is eligible."""
    metadata = request.metadata_context.filter_metadata
    if SUBSET_NAMESPACE not in metadata or SUBSET_KEY not in metadata[SUBSET_NAMESPACE].fields:
        return None
    value = metadata[SUBSET_NAMESPACE].fields[SUBSET_KEY]
    if value.HasField("list_value"):
        return tuple(item.string_value.strip() for item in value.list_value.values)
    return tuple(part.strip() for part in value.string_value.split(",") if part.strip())


def _served(request: pb.ProcessingRequest) -> str:
    """ "the endpoint that served the request", which the data plane tells in the response phase."""
    metadata = request.metadata_context.filter_metadata
    return metadata[LB_NAMESPACE].fields[SERVED_KEY].string_value if LB_NAMESPACE in metadata else ""


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


def _immediate(response: pb.ProcessingResponse, error: LoraExtprocError) -> None:
    """Status, OpenAI-style JSON and the reason word, which Envoy prints as %RESPONSE_CODE_DETAILS%."""
    immediate = response.immediate_response
    immediate.status.code = error.status
    headers = {"content-type": "application/json", "x-lora-extproc-reason": error.reason}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    _set_headers(immediate.headers, headers)
    immediate.body = error.openai_body()
    immediate.details = error.reason
    _fill(response.dynamic_metadata.fields[OWN_NAMESPACE].struct_value, {"reason": error.reason})
