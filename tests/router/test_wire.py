"""ext_proc messages, read and written by an independent full set: envoy-data-plane's."""

from typing import Any

import pytest
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc_filter
from envoy_data_plane.envoy.service.ext_proc import v3 as ext_proc
from envoy_data_plane.google.protobuf import Struct
from hypothesis import given
from hypothesis import strategies as st

from extproc.core.events import (
    BodyReply,
    Direction,
    HeadersReply,
    ImmediateReply,
    Mode,
    Mutation,
    OwnReply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    TrailersReply,
    Unreadable,
)
from extproc.errors import ModelNotFound, NoSpace
from extproc.pb import ext_proc_pb2 as pb
from extproc.router import wire
from extproc.router.http2.calls import Message, joined

BodySendMode = ext_proc_filter.ProcessingModeBodySendMode
MUTATION = Mutation({"x-a": "1", "x-b": "é"}, ("x-c",), {"envoy.lb": {"x-a": "1"}, "lora_extproc": {"waited_ms": 1.5}}, clear_route_cache=True)


def _headers(**values: str) -> core.HeaderMap:
    return core.HeaderMap(headers=[core.HeaderValue(key=k.replace("_", "-"), raw_value=v.encode()) for k, v in values.items()])


def _response(message: Message) -> ext_proc.ProcessingResponse:
    return ext_proc.ProcessingResponse.parse(joined(message))


def _set_headers(mutation: ext_proc.HeaderMutation | None) -> dict[str, bytes]:
    assert mutation is not None
    assert all(option.append_action is core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD for option in mutation.set_headers)
    return {option.header.key: option.header.raw_value for option in mutation.set_headers if option.header}


@pytest.mark.parametrize("mode", list(Mode))
def test_request_headers_carry_modes_and_headers(mode: Mode) -> None:
    """The first message: headers, end of stream, and the modes of protocol_config."""
    message = ext_proc.ProcessingRequest(
        request_headers=ext_proc.HttpHeaders(headers=_headers(content_type="application/json", x_name="ü"), end_of_stream=True),
        protocol_config=ext_proc.ProtocolConfiguration(request_body_mode=BodySendMode(mode.value), response_body_mode=BodySendMode.FULL_DUPLEX_STREAMED),
    )
    event = wire.decode(bytes(message))
    assert event == RequestHeaders({"content-type": "application/json", "x-name": "ü"}, True, mode, Mode.FULL_DUPLEX_STREAMED)


@given(st.data(), st.binary(max_size=400), st.booleans(), st.sampled_from([RequestBody, ResponseBody]), st.binary(max_size=3))
def test_a_message_means_the_same_in_any_pieces(data: st.DataObject, body: bytes, end: bool, kind: type[RequestBody] | type[ResponseBody], more: bytes) -> None:
    """As it came in frames; also one with something behind it that the short way does not know."""
    content = ext_proc.HttpBody(body=body, end_of_stream=end)
    plain = ext_proc.ProcessingRequest(request_body=content) if kind is RequestBody else ext_proc.ProcessingRequest(response_body=content)
    message = bytes(plain) + more
    cuts = sorted(data.draw(st.lists(st.integers(0, len(message)), max_size=6)))
    pieces = tuple(memoryview(message)[begin:to] for begin, to in zip([0, *cuts], [*cuts, len(message)], strict=True))
    assert wire.decode(pieces) == wire.decode(message)
    if not more:
        assert wire.decode(pieces) == kind(body, end)


def test_absent_protocol_config_means_none() -> None:
    """Envoy leaves it out where no direction shows a body."""
    event = wire.decode(bytes(ext_proc.ProcessingRequest(request_headers=ext_proc.HttpHeaders(headers=_headers(a="b")))))
    assert isinstance(event, RequestHeaders)
    assert event.request_mode is Mode.NONE


def _answered(status: str, served: str, attribute: str) -> bytes:
    metadata = core.Metadata(filter_metadata={"envoy.lb": Struct.from_dict({"x-gateway-destination-endpoint-served": served})} if served else {})
    attributes = {"envoy.filters.http.ext_proc": Struct.from_dict({"upstream.address": attribute})} if attribute else {}
    shown = core.HeaderMap(headers=[core.HeaderValue(key=":status", raw_value=status.encode())] if status else [])
    return bytes(ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders(headers=shown), metadata_context=metadata, attributes=attributes))


@pytest.mark.parametrize(
    ("status", "served", "attribute", "expected"),
    [
        ("404", "10.0.0.1:8000", "", ("10.0.0.1:8000", 404)),
        ("200", "", "10.0.0.2:8000", ("10.0.0.2:8000", 200)),
        ("200", "10.0.0.1:8000", "10.0.0.2:8000", ("10.0.0.1:8000", 200)),
        ("", "", "10.0.0.2:8000", ("10.0.0.2:8000", 0)),
        ("x", "10.0.0.1:8000", "", ("10.0.0.1:8000", 0)),
        ("200", "", "", ("", 0)),
    ],
)
def test_who_served_is_told_by_metadata_or_by_an_attribute(status: str, served: str, attribute: str, expected: tuple[str, int]) -> None:
    """The protocol's metadata first; Envoy's own attribute where a gateway can send no other."""
    assert wire.decode(_answered(status, served, attribute)) == ResponseHeaders(False, *expected)


def test_values_that_are_not_utf8_do_not_raise() -> None:
    """Header bytes are the client's; what is not UTF-8 becomes surrogates, which no adapter name may hold."""
    headers = core.HeaderMap(headers=[core.HeaderValue(key="a", raw_value=b"\xff\xfe"), core.HeaderValue(key="b", value="plain")])
    event = wire.decode(bytes(ext_proc.ProcessingRequest(request_headers=ext_proc.HttpHeaders(headers=headers))))
    assert isinstance(event, RequestHeaders)
    assert event.headers == {"a": "\udcff\udcfe", "b": "plain"}


def test_repeated_headers_keep_the_first() -> None:
    """As the engine's framework and Envoy's matchers do."""
    headers = core.HeaderMap(headers=[core.HeaderValue(key="a", raw_value=b"1"), core.HeaderValue(key="a", raw_value=b"2")])
    event = wire.decode(bytes(ext_proc.ProcessingRequest(request_headers=ext_proc.HttpHeaders(headers=headers))))
    assert isinstance(event, RequestHeaders)
    assert event.headers == {"a": "1"}


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (["10.0.0.1:8000", "10.0.0.2:8000"], ("10.0.0.1:8000", "10.0.0.2:8000")),
        ("10.0.0.1:8000, 10.0.0.2", ("10.0.0.1:8000", "10.0.0.2")),
        ([], ()),
        ("", ()),
    ],
)
def test_the_subset_hint_is_a_list_or_a_comma_string(hint: Any, expected: tuple[str, ...]) -> None:
    """Present but empty means that nothing is eligible, which is not the same as absent."""
    struct = Struct.from_dict({"x-gateway-destination-endpoint-subset": hint})
    message = ext_proc.ProcessingRequest(
        request_headers=ext_proc.HttpHeaders(headers=_headers(a="b")),
        metadata_context=core.Metadata(filter_metadata={"envoy.lb.subset_hint": struct, "other": Struct.from_dict({"k": 1})}),
    )
    event = wire.decode(bytes(message))
    assert isinstance(event, RequestHeaders)
    assert event.subset == expected


def test_other_metadata_is_no_hint() -> None:
    """Without the hint's namespace or key every endpoint is eligible."""
    metadata = core.Metadata(filter_metadata={"envoy.lb.subset_hint": Struct.from_dict({"other": "x"})})
    event = wire.decode(bytes(ext_proc.ProcessingRequest(request_headers=ext_proc.HttpHeaders(headers=_headers(a="b")), metadata_context=metadata)))
    assert isinstance(event, RequestHeaders)
    assert event.subset is None


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=b"x", end_of_stream=True)), RequestBody(b"x", True)),
        (ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=b"", end_of_stream=False)), RequestBody(b"", False)),
        (ext_proc.ProcessingRequest(request_trailers=ext_proc.HttpTrailers()), RequestTrailers()),
        (ext_proc.ProcessingRequest(response_headers=ext_proc.HttpHeaders(end_of_stream=True)), ResponseHeaders(True)),
        (ext_proc.ProcessingRequest(response_body=ext_proc.HttpBody(body=b"y")), ResponseBody(b"y", False)),
        (ext_proc.ProcessingRequest(response_trailers=ext_proc.HttpTrailers()), ResponseTrailers()),
    ],
)
def test_every_other_message_becomes_its_event(message: ext_proc.ProcessingRequest, event: object) -> None:
    """One message, one event."""
    assert wire.decode(bytes(message)) == event


@pytest.mark.parametrize("message", [b"", b"\xff\xff\xff", b"\x0a\xff"])
def test_garbage_is_an_event_not_an_exception(message: bytes) -> None:
    """The exchange answers it."""
    assert isinstance(wire.decode(message), Unreadable)


def test_a_headers_reply_carries_mutation_and_metadata() -> None:
    """Header values and metadata values are equal, as the Endpoint Picker protocol demands."""
    response = _response(wire.encode(HeadersReply(Direction.REQUEST, MUTATION)))
    assert response.request_headers is not None
    common = response.request_headers.response
    assert common is not None
    assert common.clear_route_cache
    assert _set_headers(common.header_mutation) == {"x-a": b"1", "x-b": "é".encode()}
    assert common.header_mutation is not None
    assert common.header_mutation.remove_headers == ["x-c"]
    assert response.dynamic_metadata is not None
    assert response.dynamic_metadata.to_dict() == {"envoy.lb": {"x-a": "1"}, "lora_extproc": {"waited_ms": 1.5}}


def test_a_body_reply_with_a_chunk_is_streamed() -> None:
    """An empty last chunk still carries the end of the stream."""
    for chunk, end in ((b"abc", False), (b"", True)):
        response = _response(wire.encode(BodyReply(Direction.REQUEST, chunk, end)))
        assert response.request_body is not None
        assert response.request_body.response is not None
        mutation = response.request_body.response.body_mutation
        assert mutation is not None
        assert mutation.streamed_response is not None
        assert (mutation.streamed_response.body, mutation.streamed_response.end_of_stream) == (chunk, end)


@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 8191, 8192, 16_383, 62_000, 2_100_000])
@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("end", [False, True])
def test_bodies_written_and_read_by_hand_are_what_the_full_set_writes_and_reads(size: int, direction: Direction, end: bool) -> None:
    """Every length of a length, both directions, with and without the end."""
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    name = f"{direction.value}_body"
    streamed = ext_proc.StreamedBodyResponse(body=data, end_of_stream=end)
    common = ext_proc.CommonResponse(body_mutation=ext_proc.BodyMutation(streamed_response=streamed))
    expected = ext_proc.ProcessingResponse()
    setattr(expected, name, ext_proc.BodyResponse(response=common))
    assert joined(wire.encode(BodyReply(direction, memoryview(data), end))) == bytes(expected)
    request = ext_proc.ProcessingRequest()
    setattr(request, name, ext_proc.HttpBody(body=data, end_of_stream=end))
    shown = bytes(request)
    event = (RequestBody if direction is Direction.REQUEST else ResponseBody)(data, end)
    assert wire.decode(shown) == wire.decode(memoryview(shown)) == event


def test_a_body_message_with_more_in_it_is_read_the_ordinary_way() -> None:
    """Metadata beside the body, and fields in another order."""
    body = ext_proc.HttpBody(body=b"x", end_of_stream=True)
    assert wire.decode(bytes(ext_proc.ProcessingRequest(request_body=body, observability_mode=True))) == RequestBody(b"x", True)
    assert wire.decode(b"\x22\x05\x10\x01\x0a\x01x") == RequestBody(b"x", True)
    assert isinstance(wire.decode(b"\x22\x05\x0a\xff\xff\xff\xff"), Unreadable)


def test_a_body_reply_without_a_chunk_lets_envoys_body_go_on() -> None:
    """In BUFFERED the mutation rides on it."""
    response = _response(wire.encode(BodyReply(Direction.REQUEST, mutation=MUTATION)))
    assert response.request_body is not None
    common = response.request_body.response
    assert common is not None
    assert common.body_mutation is None
    assert common.clear_route_cache
    assert "x-a" in _set_headers(common.header_mutation)


@pytest.mark.parametrize(
    ("reply", "field"),
    [
        (HeadersReply(Direction.REQUEST), "request_headers"),
        (HeadersReply(Direction.RESPONSE), "response_headers"),
        (BodyReply(Direction.REQUEST), "request_body"),
        (BodyReply(Direction.RESPONSE, b"x", True), "response_body"),
        (TrailersReply(Direction.REQUEST), "request_trailers"),
        (TrailersReply(Direction.RESPONSE), "response_trailers"),
    ],
)
def test_a_reply_answers_its_own_message(reply: Any, field: str) -> None:
    """Direction and kind choose the one field that is set."""
    response = _response(wire.encode(reply))
    fields = ("request_headers", "response_headers", "request_body", "response_body", "request_trailers", "response_trailers", "immediate_response")
    assert [name for name in fields if getattr(response, name) is not None] == [field]


def test_an_immediate_reply_is_the_error_table() -> None:
    """Status, JSON, Retry-After, the reason as a header, as details and for the access log."""
    response = _response(wire.encode(ImmediateReply(NoSpace("the disk is full"))))
    immediate = response.immediate_response
    assert immediate is not None
    assert immediate.status is not None
    assert immediate.status.code == 503
    assert immediate.details == "no_space"
    assert immediate.body == NoSpace("the disk is full").openai_body()
    headers = _set_headers(immediate.headers)
    assert headers == {"content-type": b"application/json", "x-lora-extproc-reason": b"no_space", "retry-after": b"10"}
    assert response.dynamic_metadata is not None
    assert response.dynamic_metadata.to_dict() == {"lora_extproc": {"reason": "no_space"}}


def test_what_is_not_retryable_has_no_retry_after() -> None:
    """A client must not be told to repeat what cannot succeed."""
    immediate = _response(wire.encode(ImmediateReply(ModelNotFound("no origin has x")))).immediate_response
    assert immediate is not None
    assert "retry-after" not in _set_headers(immediate.headers)


def _both(message: Message) -> tuple[pb.ProcessingResponse, ext_proc.ProcessingResponse]:
    """As protobuf reads it, and as the independent reader does, which is given what protobuf made of it too: both must mean the same."""
    raw = joined(message)
    read = pb.ProcessingResponse.FromString(raw)
    independent = ext_proc.ProcessingResponse.parse(raw)
    assert independent == ext_proc.ProcessingResponse.parse(read.SerializeToString())
    return read, independent


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 100_000, 2_100_000])
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_replaced_body_is_written_behind_what_changes_with_it(size: int, pieces: int) -> None:
    """BUFFERED: one message that holds both, in a form that no reader has to merge; the body is not copied into it."""
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    cut = size // pieces
    chunk = tuple(memoryview(data)[i * cut : (i + 1) * cut if i < pieces - 1 else size] for i in range(pieces))
    message = wire.encode(BodyReply(Direction.REQUEST, chunk if pieces > 1 else data, mutation=MUTATION, replaces=True))
    assert isinstance(message, tuple)
    assert all(any(part is piece for part in message) for piece in (chunk if pieces > 1 else (data,)))
    read, independent = _both(message)
    common = read.request_body.response
    assert common.body_mutation.WhichOneof("mutation") == "body"
    assert common.body_mutation.body == data
    assert common.clear_route_cache
    assert {option.header.key: option.header.raw_value for option in common.header_mutation.set_headers} == {"x-a": b"1", "x-b": "é".encode()}
    assert list(common.header_mutation.remove_headers) == ["x-c"]
    assert read.dynamic_metadata.fields["envoy.lb"].struct_value.fields["x-a"].string_value == "1"
    assert independent.request_body is not None
    assert independent.request_body.response is not None
    assert independent.request_body.response.body_mutation is not None
    assert independent.request_body.response.body_mutation.body == data


@pytest.mark.parametrize("body", [(), (b"",), (b'{"a":1}',), (b"x" * 128, b"y" * 70_000, memoryview(b"z"))])
def test_an_own_answer_is_written_in_its_pieces(body: tuple[bytes, ...]) -> None:
    """Status 200, JSON, the word that the access log shows, and who may read it."""
    message = wire.encode(OwnReply(body, {"outcome": "listed"}, {"access-control-allow-origin": "*"}))
    assert isinstance(message, tuple)
    assert [id(part) for part in message[1:]] == [id(piece) for piece in body]
    read, independent = _both(message)
    immediate = read.immediate_response
    assert (immediate.status.code, immediate.details, immediate.body) == (200, "models", b"".join(body))
    headers = {option.header.key: option.header.raw_value for option in immediate.headers.set_headers}
    assert headers == {"content-type": b"application/json", "access-control-allow-origin": b"*"}
    assert read.dynamic_metadata.fields["lora_extproc"].struct_value.fields["outcome"].string_value == "listed"
    assert independent.immediate_response is not None
    assert independent.immediate_response.body == b"".join(body)


def test_an_immediate_reply_carries_notes_and_the_headers_of_who_knows_them() -> None:
    """Beside its own, which stay."""
    reply = ImmediateReply(ModelNotFound("no origin has x"), {"model": "x", "waited_ms": 1.5}, {"access-control-allow-origin": "*"})
    response = _response(wire.encode(reply))
    assert response.immediate_response is not None
    headers = _set_headers(response.immediate_response.headers)
    assert headers == {"content-type": b"application/json", "x-lora-extproc-reason": b"model_not_found", "access-control-allow-origin": b"*"}
    assert response.dynamic_metadata is not None
    assert response.dynamic_metadata.to_dict() == {"lora_extproc": {"model": "x", "waited_ms": 1.5, "reason": "model_not_found"}}


def test_a_mutation_is_encoded_once() -> None:
    """And another one that is equal has bytes of its own."""
    mutation = Mutation({"x-a": "1"})
    first = wire.encode(HeadersReply(Direction.REQUEST, mutation))
    assert wire.encode(HeadersReply(Direction.REQUEST, mutation)) is first
    assert wire.encode(HeadersReply(Direction.REQUEST, Mutation({"x-a": "1"}))) == first
    assert wire.encode(BodyReply(Direction.REQUEST, mutation=mutation)) != first


def test_a_large_body_stays_in_its_pieces_and_a_small_one_is_joined() -> None:
    """Which is what either is handled fastest as; the last piece is copied, since the next read writes over it."""
    for size, kept in ((wire.KEPT_IN_PIECES_BYTES + 1, True), (wire.KEPT_IN_PIECES_BYTES - 100, False)):
        message = bytes(ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=b"x" * size, end_of_stream=True)))
        half = len(message) // 2
        last = bytearray(message[half:])
        event = wire.decode((message[:half], memoryview(last)))
        last[:] = bytes(len(last))
        assert isinstance(event, RequestBody)
        assert isinstance(event.chunk, tuple) is kept
        assert joined(event.chunk) == b"x" * size
