"""The state of one stream, under every order of events. Single conversations are in tests/exchanges/, played by test_conversations.py."""

import json
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.decision import Facts
from extproc.core.events import (
    REFUSED_MODES,
    SPOKEN_MODES,
    Action,
    BodyReply,
    Decide,
    Direction,
    Event,
    HeadersReply,
    ImmediateReply,
    Mode,
    Mutation,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    TrailersReply,
    Unreadable,
)
from extproc.core.exchange import BODY_CHUNK_BYTES, EARLY_SCAN_BYTES, NO_RETRY_HEADER, REQUEST_STEPS, Exchange, Kind, State
from extproc.errors import GatewayProtocolError, InvalidRequest, NoSpace

JSON = {":method": "POST", ":path": "/v1/completions", "content-type": "application/json"}
BODY = b'{"model":"demo/sql"}'
TO = Mutation({"x-to": "10.0.0.1:8000"})


def begun(
    mode: Mode = Mode.FULL_DUPLEX_STREAMED,
    *events: Event,
    response_mode: Mode = Mode.NONE,
    max_body_bytes: int = 1000,
    early_scan_bytes: int = EARLY_SCAN_BYTES,
) -> Exchange:
    """An exchange with JSON request headers and these events behind it."""
    exchange = Exchange(max_body_bytes=max_body_bytes, early_scan_bytes=early_scan_bytes)
    exchange.receive(RequestHeaders(JSON, False, mode, response_mode))
    for event in events:
        exchange.receive(event)
    return exchange


# ---- the table


def in_state(state: State, mode: Mode) -> Exchange:
    """An exchange in `state`, on the shortest way there."""
    exchange = Exchange(max_body_bytes=1000)
    if state is State.START:
        exchange.mode = mode
        return exchange
    if state is State.BODY:
        exchange.receive(RequestHeaders(JSON, False, mode))
        return exchange
    exchange.receive(RequestHeaders({}, False, mode))
    if state is State.ANSWERED:
        exchange.decided(TO)
    if state is State.ENDED:
        exchange.failed(NoSpace("full"))
    return exchange


EVENTS: dict[Kind, Event] = {
    Kind.BODY: RequestBody(b"x", False),
    Kind.BODY_END: RequestBody(b"x", True),
    Kind.TRAILERS: RequestTrailers(),
}
REACHED = [(state, mode) for state in State for mode in SPOKEN_MODES if (state, mode) != (State.BODY, Mode.NONE)]


@pytest.mark.parametrize("kind", EVENTS)
@pytest.mark.parametrize(("state", "mode"), REACHED)
def test_what_is_not_in_the_table_is_a_violation(state: State, mode: Mode, kind: Kind) -> None:
    """And what is in it is none, whatever else comes of it."""
    exchange = in_state(state, mode)
    assert exchange.state is state
    actions = exchange.receive(EVENTS[kind])
    violations = [action for action in actions if isinstance(action, ImmediateReply) and isinstance(action.error, GatewayProtocolError)]
    if mode in REQUEST_STEPS[state].get(kind, {}):
        assert not violations
    else:
        assert len(violations) == len(actions) == 1
        assert kind.value in violations[0].error.message
        assert exchange.state is State.ENDED


@pytest.mark.parametrize(("state", "mode"), [(state, mode) for state, mode in REACHED if state not in (State.START, State.ENDED)])
def test_headers_come_once(state: State, mode: Mode) -> None:
    """In every later state."""
    [action] = in_state(state, mode).receive(RequestHeaders(JSON, False, mode))
    assert isinstance(action, ImmediateReply)


def test_nothing_of_the_body_goes_out_after_the_trailers() -> None:
    """A gateway that sends more after the trailers is answered with a violation or not at all; it does not get its bytes back behind them."""
    exchange = Exchange(max_body_bytes=1000)
    exchange.receive(RequestHeaders({"content-type": "text/plain"}, False))
    exchange.decided(TO)
    assert exchange.receive(RequestTrailers()) == [TrailersReply(Direction.REQUEST)]
    after = exchange.receive(RequestBody(b"late", True)) + exchange.receive(RequestTrailers())
    assert not [action for action in after if isinstance(action, BodyReply | TrailersReply)]


def test_each_step_of_the_table_exists() -> None:
    """The table names methods; a name without one would only show when it is called."""
    for kinds in REQUEST_STEPS.values():
        for modes in kinds.values():
            for step in modes.values():
                assert callable(getattr(Exchange, f"_{step}"))


# ---- what is asked


def test_the_question_carries_the_facts() -> None:
    """Method, path, headers, model and the gateway's subset, for `decide`."""
    exchange = Exchange(max_body_bytes=1000)
    assert exchange.receive(RequestHeaders(JSON, False, subset=("10.0.0.1",))) == []
    assert exchange.receive(RequestBody(BODY, True)) == [Decide(Facts("POST", "/v1/completions", JSON, "demo/sql", ("10.0.0.1",), True))]
    assert exchange.awaits_decision()


def test_headers_without_method_and_path_are_borne() -> None:
    """A gateway may be configured to forward only some headers."""
    [action] = Exchange(max_body_bytes=1000).receive(RequestHeaders({}, True))
    assert action == Decide(Facts("", "", {}, None))


def test_more_is_needed_until_the_body_was_judged() -> None:
    """The caller reads on while the decision would not be enough."""
    exchange = begun(early_scan_bytes=0)
    [question] = exchange.receive(RequestBody(b'{"model":"demo/sql",', False))
    assert isinstance(question, Decide)
    assert not exchange.awaits_decision()
    assert exchange.receive(RequestBody(b'"x":1}', True)) == []
    assert exchange.awaits_decision()
    exchange.decided(TO)
    assert not exchange.awaits_decision()


# ---- what is held


@pytest.mark.parametrize("mode", [Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED])
def test_held_bytes_are_those_of_the_body_until_it_is_answered(mode: Mode) -> None:
    """In BUFFERED, too: it may have to be changed."""
    exchange = begun(mode)
    exchange.receive(RequestBody(BODY, True))
    assert exchange.held_bytes == len(BODY)
    exchange.decided(TO)
    assert exchange.held_bytes == 0


def test_held_bytes_are_let_go_with_the_exchange() -> None:
    """By a failure and by a response that came first."""
    failed, overtaken = begun(Mode.FULL_DUPLEX_STREAMED, RequestBody(BODY, False)), begun(Mode.FULL_DUPLEX_STREAMED, RequestBody(BODY, True))
    failed.failed(NoSpace("full"))
    overtaken.receive(ResponseHeaders(False))
    assert failed.held_bytes == overtaken.held_bytes == 0


def test_an_exchange_shows_its_state() -> None:
    """For logs and debuggers; nothing of the body."""
    exchange = begun(Mode.FULL_DUPLEX_STREAMED, RequestBody(b'{"model":"secret"', False))
    assert repr(exchange) == "<Exchange FULL_DUPLEX_STREAMED [BODY: the body is arriving and will be judged; holds 17 bytes]>"


# ---- what is answered


def test_the_mark_against_retries_is_added_to_the_mutation() -> None:
    """What the decision wanted to set and to remove stays, and the caller's mutation is not changed."""
    mutation = Mutation({"x-to": "a"}, ("x-remove",), {"envoy.lb": {"x-to": "a"}})
    exchange = begun(Mode.FULL_DUPLEX_STREAMED, RequestBody(BODY, False), RequestTrailers())
    headers, *_ = exchange.decided(mutation)
    assert headers == HeadersReply(
        Direction.REQUEST, Mutation({"x-to": "a", NO_RETRY_HEADER: "1"}, ("x-remove",), {"envoy.lb": {"x-to": "a"}}, clear_route_cache=True)
    )
    assert mutation.set_headers == {"x-to": "a"}


def test_errors_reach_the_reply_as_they_are() -> None:
    """The reply carries the error itself: status, reason and message are its own."""
    error = NoSpace("9 of 9 bytes are leased")
    assert begun().failed(error) == [ImmediateReply(error)]


@pytest.mark.parametrize("mode", REFUSED_MODES)
def test_a_mode_that_is_not_spoken_is_named(mode: Mode) -> None:
    """An operator reads why, and what to configure instead."""
    [action] = begun_with(mode)
    assert isinstance(action, ImmediateReply)
    expected = f"request_body_mode {mode.name} is not spoken here: {REFUSED_MODES[mode]}; use one of FULL_DUPLEX_STREAMED, BUFFERED, NONE"
    assert action.error.message == expected


def test_every_mode_is_spoken_or_refused() -> None:
    """A mode of neither kind would be neither answered nor explained."""
    assert {*SPOKEN_MODES, *REFUSED_MODES} == set(Mode)
    assert not set(SPOKEN_MODES) & set(REFUSED_MODES)


def begun_with(mode: Mode) -> list[Action]:
    return Exchange(max_body_bytes=1000).receive(RequestHeaders(JSON, False, mode))


def test_what_cannot_be_read_is_named() -> None:
    """The same for a message that is none."""
    [action] = begun().receive(Unreadable("not a ProcessingRequest"))
    assert isinstance(action, ImmediateReply)
    assert action.error.message == "unreadable message: not a ProcessingRequest"


@pytest.mark.parametrize("size", [1, BODY_CHUNK_BYTES - 1, BODY_CHUNK_BYTES, BODY_CHUNK_BYTES + 1, 2 * BODY_CHUNK_BYTES, 150_000])
def test_a_body_goes_back_whole_in_messages_under_the_limit(size: int) -> None:
    """Byte for byte, the end of stream on the last."""
    body = b'{"model":"m","x":"' + bytes(97 + i % 26 for i in range(size)) + b'"}'
    exchange = begun(max_body_bytes=10**6)
    exchange.receive(RequestBody(body, True))
    _, *replies = exchange.decided(TO)
    chunks = [reply for reply in replies if isinstance(reply, BodyReply)]
    assert len(chunks) == len(replies)
    assert b"".join(reply.chunk or b"" for reply in chunks) == body
    assert all(reply.chunk and len(reply.chunk) <= BODY_CHUNK_BYTES for reply in chunks)
    assert [reply.end_of_stream for reply in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_large_response_message_goes_back_in_messages_under_the_limit() -> None:
    """What gateways accept in one streamed body message does not depend on the direction."""
    exchange = begun(response_mode=Mode.FULL_DUPLEX_STREAMED)
    replies = exchange.receive(ResponseBody(b"x" * 150_000, True))
    chunks = [reply.chunk or b"" for reply in replies if isinstance(reply, BodyReply)]
    assert b"".join(chunks) == b"x" * 150_000
    assert max(map(len, chunks)) <= BODY_CHUNK_BYTES


# ---- any order of events


class Decided:
    """In a sequence of events: the answer to Decide, if it was asked and not yet answered."""


class Failed:
    """In a sequence of events: any failure, at any time."""


Turn = Event | Decided | Failed

early = st.sampled_from((0, EARLY_SCAN_BYTES))
modes = st.sampled_from(list(Mode)) | st.sampled_from(SPOKEN_MODES)
contents = st.sampled_from([JSON, JSON, JSON, {}, {"content-type": "text/plain"}, {"content-type": "a+json", "x-gateway-model-name": "demo/sql"}])
pieces = st.sampled_from([b"", BODY, b'{"model":"demo/sql",', b'"x":1}', b"}", b'{"x":"' + b"y" * 70_000 + b'",', b'"model":"a"}', b"\xff", b"{"]) | st.binary(
    max_size=5
)
headers = st.builds(RequestHeaders, contents, st.booleans(), modes, modes)
turns: st.SearchStrategy[Turn] = st.one_of(
    st.builds(RequestBody, pieces, st.booleans()),
    st.builds(RequestBody, pieces, st.booleans()),
    st.builds(RequestBody, pieces, st.booleans()),
    headers,
    st.builds(RequestTrailers),
    st.builds(ResponseHeaders, st.booleans()),
    st.builds(ResponseBody, pieces, st.booleans()),
    st.builds(ResponseTrailers),
    st.builds(Unreadable, st.just("why")),
    st.builds(Decided),
    st.builds(Decided),
    st.builds(Failed),
)
conversations = st.tuples(headers, st.lists(turns, max_size=12)).map(lambda c: [c[0], *c[1]]) | st.lists(turns, max_size=12)


@dataclass
class Heard:
    """What came out of an exchange."""

    actions: list[Action] = field(default_factory=list)
    asked: bool = False

    def take(self, actions: list[Action]) -> None:
        self.actions += actions
        self.asked = self.asked or any(isinstance(action, Decide) for action in actions)

    def of_request(self) -> list[HeadersReply | BodyReply | TrailersReply]:
        replies = [a for a in self.actions if isinstance(a, HeadersReply | BodyReply | TrailersReply)]
        return [reply for reply in replies if reply.direction is Direction.REQUEST]

    def chunks(self) -> list[BodyReply]:
        return [a for a in self.of_request() if isinstance(a, BodyReply) and a.chunk is not None]

    def body(self) -> bytes:
        return b"".join(reply.chunk or b"" for reply in self.chunks())

    def immediate(self) -> list[ImmediateReply]:
        return [a for a in self.actions if isinstance(a, ImmediateReply)]


def held(turns: list[Turn], exchange: Exchange) -> Heard:
    heard = Heard()
    answered = False
    for turn in turns:
        if isinstance(turn, Decided):
            if heard.asked and not answered:
                answered = True
                heard.take(exchange.decided(TO))
        elif isinstance(turn, Failed):
            heard.take(exchange.failed(NoSpace("full")))
        else:
            heard.take(exchange.receive(turn))
    return heard


@given(conversations, early)
@settings(max_examples=600, deadline=None)
def test_any_order_of_events_is_borne(turns: list[Turn], early: int) -> None:
    """Nothing raises; at most one question, one mutation, one immediate reply, one end of stream; nothing of the request after that reply."""
    exchange = Exchange(max_body_bytes=100_000, early_scan_bytes=early)
    heard = held(turns, exchange)
    assert sum(isinstance(action, Decide) for action in heard.actions) <= 1
    assert len(heard.immediate()) <= 1
    if heard.immediate():
        after = heard.actions[heard.actions.index(heard.immediate()[0]) + 1 :]
        assert all(isinstance(action, HeadersReply | BodyReply | TrailersReply) and action.direction is Direction.RESPONSE for action in after)
        assert exchange.state is State.ENDED
    assert sum(getattr(action, "mutation", None) is not None for action in heard.actions) <= 1
    ends = [reply.end_of_stream for reply in heard.chunks()]
    assert sum(ends) <= 1
    assert not any(before for before, _ in pairwise(ends))
    assert all(len(reply.chunk or b"") <= BODY_CHUNK_BYTES for reply in heard.chunks())


@given(conversations)
@settings(max_examples=300, deadline=None)
def test_every_response_message_gets_one_reply_of_its_kind(turns: list[Turn]) -> None:
    """In any state of the request: Envoy waits for it."""
    exchange = Exchange(max_body_bytes=100_000)
    for turn in turns:
        if isinstance(turn, Decided | Failed):
            continue
        actions = exchange.receive(turn)
        expected = {ResponseHeaders: HeadersReply, ResponseBody: BodyReply, ResponseTrailers: TrailersReply}.get(type(turn))
        if expected is not None:
            assert {type(action) for action in actions} == {expected}


# ---- any legal conversation


@dataclass(frozen=True)
class Legal:
    """A request as Envoy shows it, and when the decision is there: so many events after it was asked for."""

    mode: Mode
    is_json: bool
    body: bytes
    chunks: tuple[bytes, ...]
    trailers: bool
    duplicate_end: bool
    patience: int
    early_scan_bytes: int


@st.composite
def legal(draw: st.DrawFn) -> Legal:
    mode = draw(st.sampled_from((Mode.FULL_DUPLEX_STREAMED, Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED)))
    is_json = draw(st.booleans())
    filling = draw(st.sampled_from((0, 1, 100, 62_000, 130_000)))
    rest = [("messages", "x" * filling), ("nested", {"model": ["no"]})]
    rest.insert(draw(st.integers(0, 2)), ("model", "demo/sql"))
    body = json.dumps(dict(rest)).encode() if is_json else draw(st.binary(max_size=10)) * max(filling, 1)
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=5)))
    chunks = tuple(body[start:end] for start, end in pairwise([0, *cuts, len(body)]))
    if mode is Mode.BUFFERED:
        chunks = (body,)
    return Legal(mode, is_json, body, chunks, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 8)), draw(early))


def events_of(request: Legal) -> list[Event]:
    headers = JSON if request.is_json else {"content-type": "application/octet-stream"}
    last = len(request.chunks) - 1
    bodies: list[Event] = [RequestBody(chunk, i == last and not request.trailers) for i, chunk in enumerate(request.chunks)]
    if request.trailers:
        bodies.append(RequestTrailers())
    elif request.duplicate_end and request.mode is Mode.FULL_DUPLEX_STREAMED:
        bodies.append(RequestBody(b"", True))
    return [RequestHeaders(headers, False, request.mode), *bodies]


def served(request: Legal) -> Heard:
    """The decision comes `patience` events after the first question, at the latest when the gateway has nothing more to show; a second one at once."""
    exchange = Exchange(max_body_bytes=10**6, early_scan_bytes=request.early_scan_bytes)
    heard = Heard()
    patience = request.patience
    answered = 0
    for event in [*events_of(request), None]:
        if event is not None:
            heard.take(exchange.receive(event))
        asked = sum(isinstance(action, Decide) for action in heard.actions)
        if asked > answered:
            if patience <= 0 or event is None:
                answered = asked
                heard.take(exchange.decided(TO))
            patience -= 1
    return heard


@given(legal().filter(lambda request: request.mode is Mode.FULL_DUPLEX_STREAMED))
@settings(max_examples=300, deadline=None)
def test_in_full_duplex_what_came_in_goes_out(request: Legal) -> None:
    """Whenever the decision comes: headers with the mutation first, then every byte, then one end of stream or the trailers."""
    heard = served(request)
    assert not heard.immediate()
    first, *rest = heard.of_request()
    assert isinstance(first, HeadersReply)
    assert first.mutation is not None
    assert heard.body() == request.body
    ends = [reply.end_of_stream for reply in heard.chunks()]
    if request.trailers:
        assert not any(ends)
        assert rest[len(ends) :] == [TrailersReply(Direction.REQUEST)]
    else:
        assert ends[-1]
        assert sum(ends) == 1
        assert len(rest) == len(ends)
    asked = next(action for action in heard.actions if isinstance(action, Decide))
    assert asked.facts.model == ("demo/sql" if request.is_json else None)


@given(legal().filter(lambda request: request.mode is Mode.FULL_DUPLEX_STREAMED and request.is_json))
@settings(deadline=None)
def test_in_full_duplex_the_mark_is_set_exactly_with_trailers(request: Legal) -> None:
    """Only they make Envoy send a body twice."""
    first = served(request).of_request()[0]
    assert isinstance(first, HeadersReply)
    assert first.mutation is not None
    assert (NO_RETRY_HEADER in first.mutation.set_headers) == first.mutation.clear_route_cache == request.trailers


@given(legal().filter(lambda request: request.mode is Mode.BUFFERED))
@settings(max_examples=300, deadline=None)
def test_in_buffered_every_message_gets_one_answer(request: Legal) -> None:
    """In their order, with one mutation: on the body of JSON, on the headers of anything else."""
    heard = served(request)
    assert not heard.immediate()
    kinds = [HeadersReply, BodyReply, *([TrailersReply] if request.trailers else [])]
    assert [type(reply) for reply in heard.of_request()] == kinds
    assert [getattr(reply, "mutation", None) is not None for reply in heard.of_request()[:2]] == [not request.is_json, request.is_json]
    assert not heard.chunks()


@given(legal().filter(lambda request: request.is_json), st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_body_is_never_forwarded(request: Legal, data: st.DataObject) -> None:
    """Even where its model was found, asked for and decided before the damage came."""
    damage = data.draw(st.sampled_from([b"x", b',"model":"b"}', b"\x00"]))
    chunks = (*request.chunks[:-1], request.chunks[-1] + damage)
    damaged = replace(request, body=request.body + damage, chunks=chunks, duplicate_end=False)
    heard = served(damaged)
    [reply] = heard.immediate()
    assert isinstance(reply.error, InvalidRequest)
    assert not heard.chunks()
    assert all(getattr(answer, "mutation", None) is None for answer in heard.of_request())
