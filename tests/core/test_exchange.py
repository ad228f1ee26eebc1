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
    Judge,
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
from extproc.core.exchange import BODY_CHUNK_BYTES, EARLY_SCAN_BYTES, JUDGED_HERE_BYTES, NO_RETRY_HEADER, REQUEST_STEPS, Exchange, Kind, State
from extproc.core.paths import Kind as PathKind
from extproc.core.paths import Path, Paths
from extproc.core.pieces import Buffer
from extproc.core.reading import Reading
from extproc.errors import GatewayProtocolError, InvalidRequest, LoraExtprocError, NoSpace

PATHS = Paths()
JSON = {":method": "POST", ":path": "/v1/completions", "content-type": "application/json"}
OTHER = {":method": "POST", ":path": "/v1/responses/resp_1/cancel", "content-type": "application/octet-stream"}  # its body is nobody's to read
BODY = b'{"model":"demo/sql"}'
TO = Mutation({"x-to": "10.0.0.1:8000"})


def fresh(max_body_bytes: int = 1000, *, early_scan_bytes: int = EARLY_SCAN_BYTES, judged_here_bytes: int = JUDGED_HERE_BYTES) -> Exchange:
    """An exchange that has seen nothing."""
    return Exchange(
        max_body_bytes=max_body_bytes,
        model_header="x-gateway-model-name",
        allowed=PATHS,
        early_scan_bytes=early_scan_bytes,
        judged_here_bytes=judged_here_bytes,
    )


def whole(chunk: Buffer | tuple[Buffer, ...] | None) -> bytes:
    return b"".join(chunk) if isinstance(chunk, tuple) else bytes(chunk or b"")


def judged(exchange: Exchange, question: Judge) -> list[Action]:
    """Tell the exchange what the body says that it asked about."""
    try:
        return exchange.judged(question.content.read(whole(question.pieces), 10**6))
    except LoraExtprocError as error:
        return exchange.failed(error)


def begun(
    mode: Mode = Mode.FULL_DUPLEX_STREAMED,
    *events: Event,
    response_mode: Mode = Mode.NONE,
    max_body_bytes: int = 1000,
    early_scan_bytes: int = EARLY_SCAN_BYTES,
) -> Exchange:
    """An exchange with JSON request headers and these events behind it."""
    exchange = fresh(max_body_bytes, early_scan_bytes=early_scan_bytes)
    exchange.receive(RequestHeaders(JSON, False, mode, response_mode))
    for event in events:
        exchange.receive(event)
    return exchange


# ---- the table


def in_state(state: State, mode: Mode) -> Exchange:
    """An exchange in `state`, on the shortest way there."""
    exchange = fresh(judged_here_bytes=0)
    if state is State.START:
        exchange.mode = mode
        return exchange
    if state in (State.BODY, State.JUDGING):
        exchange.receive(RequestHeaders(JSON, False, mode))
        if state is State.JUDGING:
            exchange.receive(RequestBody(BODY, True))
        return exchange
    exchange.receive(RequestHeaders(OTHER, False, mode))
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
REACHED = [(state, mode) for state in State for mode in SPOKEN_MODES if mode is not Mode.NONE or state not in (State.BODY, State.JUDGING)]


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
    exchange = fresh()
    exchange.receive(RequestHeaders(OTHER, False))
    exchange.decided(TO)
    assert exchange.receive(RequestTrailers()) == [TrailersReply(Direction.REQUEST)]
    after = exchange.receive(RequestBody(b"late", True)) + exchange.receive(RequestTrailers())
    assert not [action for action in after if isinstance(action, BodyReply | TrailersReply)]


# ---- what is asked


def test_the_question_carries_the_facts() -> None:
    """Method, path, headers, model and the gateway's subset, for `decide`."""
    exchange = fresh()
    assert exchange.receive(RequestHeaders(JSON, False, subset=("10.0.0.1",))) == []
    path = Path(PathKind.INFERENCE, "/v1/completions")
    assert exchange.receive(RequestBody(BODY, True)) == [Decide(Facts("POST", path, JSON, "demo/sql", ("10.0.0.1",), True))]


def test_the_question_at_the_end_of_a_body_carries_the_blocks_of_its_prompt() -> None:
    """The one that is asked while the body arrives cannot; where nobody wants them they are not made."""
    body = json.dumps({"model": "demo/sql", "prompt": "lorem ipsum " * 200}).encode()
    for with_blocks, count in ((True, 4), (False, 0)):
        exchange = Exchange(max_body_bytes=10**6, model_header="x-model", allowed=PATHS, early_scan_bytes=0, with_blocks=with_blocks)
        exchange.receive(RequestHeaders(JSON, False))
        [early] = exchange.receive(RequestBody(body[:100], False))
        assert isinstance(early, Decide)
        assert early.facts.blocks == ()
        exchange.decided(TO)
        [last] = exchange.receive(RequestBody(body[100:], True))
        assert isinstance(last, Decide)
        assert len(last.facts.blocks) == count


def test_a_gateway_that_sends_no_path_is_told_so() -> None:
    """It may be configured to forward only some headers; without this one administration could not be told from inference."""
    [action] = fresh().receive(RequestHeaders({":method": "POST"}, True))
    assert isinstance(action, ImmediateReply)
    assert action.error.message == "the gateway does not send `:path`, by which requests are told apart"


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
def test_a_method_whose_content_means_nothing_needs_no_model(method: str) -> None:
    """Whatever its content calls itself."""
    [question] = fresh().receive(RequestHeaders({**JSON, ":method": method, "content-type": "text/plain"}, False))
    assert isinstance(question, Decide)
    assert (question.facts.model, question.facts.can_rename) == (None, False)


@pytest.mark.parametrize(
    ("given", "message"), [("", "content-type is missing"), ("text/plain", "content-type: 'text/plain' is neither JSON nor multipart/form-data")]
)
def test_a_body_of_another_kind_is_named(given: str, message: str) -> None:
    """A client that forgot the header reads so."""
    [action] = fresh().receive(RequestHeaders({**JSON, "content-type": given}, False))
    assert isinstance(action, ImmediateReply)
    assert (action.error.status, action.error.message) == (415, message)


@pytest.mark.parametrize(("content", "what"), [(JSON, "body"), ({**JSON, "content-type": "multipart/form-data; boundary=x"}, "form")])
def test_a_reading_without_a_model_is_refused_where_one_is_wanted(content: dict[str, str], what: str) -> None:
    """The OpenAI API wants a name; where engines take the base model for a body that names none, the router passes it on."""
    for path, is_refused in (("/v1/completions", True), ("/v1/audio/transcriptions", True), ("/tokenize", False), ("/pooling", False)):
        exchange = fresh(judged_here_bytes=0)
        exchange.receive(RequestHeaders({**content, ":path": path}, False))
        exchange.receive(RequestBody(b"{}", True))
        [action] = exchange.judged(Reading(None))
        if is_refused:
            assert isinstance(action, ImmediateReply)
            assert action.error.message == f"the {what} has no `model`"
        else:
            assert isinstance(action, Decide)
            assert action.facts.model is None


def test_only_the_end_of_a_body_that_is_judged_is_waited_for() -> None:
    """Whoever counts how long bodies take to arrive looks at no other."""
    judged, other = begun(), fresh()
    other.receive(RequestHeaders(OTHER, False))
    assert (judged.is_arriving, other.is_arriving) == (True, False)
    judged.receive(RequestBody(BODY, True))
    assert not judged.is_arriving


# ---- what is judged elsewhere


ENCODED = {**JSON, "content-encoding": "gzip"}
FORM = {":method": "POST", ":path": "/v1/audio/transcriptions", "content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(("content", "size"), [(JSON, 1001), (ENCODED, 1), (FORM, 1)])
def test_what_may_take_long_to_read_is_judged_elsewhere(content: dict[str, str], size: int) -> None:
    """Large bodies, and forms and encoded bodies of any size, in the pieces they came in."""
    exchange = fresh(10**6, judged_here_bytes=1000)
    exchange.receive(RequestHeaders(content, False))
    first = b"x" * (size // 2)
    exchange.receive(RequestBody(first, False))
    [question] = exchange.receive(RequestBody(b"x" * (size - len(first)), True))
    assert isinstance(question, Judge)
    assert sum(map(len, question.pieces)) == size
    assert exchange.state is State.JUDGING


def test_a_plain_small_body_is_judged_at_once() -> None:
    """Up to the limit, which is a body's that is read within two milliseconds."""
    exchange = fresh(judged_here_bytes=len(BODY))
    exchange.receive(RequestHeaders(JSON, False))
    [question] = exchange.receive(RequestBody(BODY, True))
    assert isinstance(question, Decide)


def test_a_decoded_body_is_held_beside_the_encoded_one_and_goes_plain_only_if_it_is_changed() -> None:
    """Its encoding is taken away with it."""
    for model in ("", "b"):
        exchange = fresh()
        exchange.receive(RequestHeaders(ENCODED, False))
        exchange.receive(RequestBody(b"zipped", True))
        exchange.judged(Reading("demo/sql", 9, 19, plain=memoryview(BODY)))
        assert exchange.held_bytes == len(b"zipped") + len(BODY)
        headers, *replies = exchange.decided(replace(TO, model=model))
        assert isinstance(headers, HeadersReply)
        assert headers.mutation is not None
        body = b"".join(whole(reply.chunk) for reply in replies if isinstance(reply, BodyReply))
        expected = (b'{"model":"b"}', ("content-encoding",)) if model else (b"zipped", ())
        assert (body, headers.mutation.remove_headers) == expected
        assert exchange.held_bytes == 0


@given(st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=6), st.data())
def test_a_new_name_replaces_exactly_the_old_one_in_any_pieces(pieces: list[bytes], data: st.DataObject) -> None:
    """Wherever the cuts are: in it, before it, behind it, or around all of it."""
    body = b"".join(pieces)
    begin = data.draw(st.integers(0, len(body) - 1))
    end = data.draw(st.integers(begin + 1, len(body)))
    exchange = fresh(judged_here_bytes=0)
    exchange.receive(RequestHeaders(JSON, False))
    exchange.receive(RequestBody(tuple(pieces), True))
    exchange.judged(Reading("old", begin, end))
    replies = exchange.decided(replace(TO, model="new"))
    assert b"".join(whole(reply.chunk) for reply in replies if isinstance(reply, BodyReply)) == body[:begin] + b'"new"' + body[end:]


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


def test_a_large_body_counts_until_the_gateway_has_read_it() -> None:
    """It has been given back, and may lie here for as long as the gateway reads slowly: the exchange's end is its end."""
    exchange = fresh(10**6, judged_here_bytes=1000)
    exchange.receive(RequestHeaders(JSON, False))
    exchange.receive(RequestBody(b"x" * 2000, True))
    exchange.judged(Reading("demo/sql", 0, 1))
    exchange.decided(TO)
    assert exchange.held_bytes == 2000
    exchange.receive(RequestHeaders(JSON, False))
    assert exchange.held_bytes == 0


def test_an_answer_of_our_own_ends_the_exchange() -> None:
    """With its pieces as they are."""
    exchange = fresh()
    exchange.receive(RequestHeaders({":method": "GET", ":path": "/v1/models"}, True))
    pieces = (b'{"object":"list",', b'"data":[]}')
    assert exchange.answered(pieces) == [OwnReply(pieces)]
    assert exchange.answered(pieces) == exchange.decided(TO) == exchange.failed(NoSpace("full")) == []


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


def test_an_error_is_kept_without_the_frames_that_raised_it() -> None:
    """They hold the body."""
    try:
        raise NoSpace("full") from ValueError("x")
    except NoSpace as error:
        [action] = begun().failed(error)
    assert isinstance(action, ImmediateReply)
    assert (action.error.__traceback__, action.error.__cause__, action.error.__context__) == (None, None, None)


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
    return fresh().receive(RequestHeaders(JSON, False, mode))


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
    assert b"".join(whole(reply.chunk) for reply in chunks) == body
    assert all(0 < len(whole(reply.chunk)) <= BODY_CHUNK_BYTES for reply in chunks)
    assert [reply.end_of_stream for reply in chunks] == [False] * (len(chunks) - 1) + [True]


def test_a_large_response_message_goes_back_in_messages_under_the_limit() -> None:
    """What gateways accept in one streamed body message does not depend on the direction."""
    exchange = begun(response_mode=Mode.FULL_DUPLEX_STREAMED)
    replies = exchange.receive(ResponseBody(b"x" * 150_000, True))
    chunks = [whole(reply.chunk) for reply in replies if isinstance(reply, BodyReply)]
    assert b"".join(chunks) == b"x" * 150_000
    assert max(map(len, chunks)) <= BODY_CHUNK_BYTES


# ---- any order of events


class Decided:
    """In a sequence of events: the answer to Decide, if it was asked and not yet answered."""


class Judged:
    """In a sequence of events: the answer to Judge, if it was asked and not yet answered."""


class Failed:
    """In a sequence of events: any failure, at any time."""


Turn = Event | Decided | Judged | Failed

early = st.sampled_from((0, EARLY_SCAN_BYTES))
here = st.sampled_from((0, JUDGED_HERE_BYTES))
modes = st.sampled_from(list(Mode)) | st.sampled_from(SPOKEN_MODES)
contents = st.sampled_from(
    [JSON, JSON, JSON, {}, OTHER, FORM, ENCODED, {**JSON, "content-type": "text/plain"}, {**JSON, "content-type": "a+json", "x-gateway-model-name": "demo/sql"}]
)
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
    st.builds(Judged),
    st.builds(Failed),
)
conversations = st.tuples(headers, st.lists(turns, max_size=12)).map(lambda c: [c[0], *c[1]]) | st.lists(turns, max_size=12)


@dataclass
class Heard:
    """What came out of an exchange."""

    actions: list[Action] = field(default_factory=list)

    def take(self, actions: list[Action]) -> None:
        self.actions += actions

    def of_request(self) -> list[HeadersReply | BodyReply | TrailersReply]:
        replies = [a for a in self.actions if isinstance(a, HeadersReply | BodyReply | TrailersReply)]
        return [reply for reply in replies if reply.direction is Direction.REQUEST]

    def chunks(self) -> list[BodyReply]:
        return [a for a in self.of_request() if isinstance(a, BodyReply) and a.chunk is not None]

    def body(self) -> bytes:
        return b"".join(whole(reply.chunk) for reply in self.chunks())

    def immediate(self) -> list[ImmediateReply]:
        return [a for a in self.actions if isinstance(a, ImmediateReply)]

    def asked_for(self, kind: type[Judge] | type[Decide]) -> int:
        return sum(isinstance(action, kind) for action in self.actions)


def held(turns: list[Turn], exchange: Exchange) -> Heard:
    heard = Heard()
    decided = 0
    has_judged = False
    for turn in turns:
        if isinstance(turn, Decided):
            if heard.asked_for(Decide) > decided:
                decided += 1
                heard.take(exchange.decided(TO))
        elif isinstance(turn, Judged):
            question = next((action for action in heard.actions if isinstance(action, Judge)), None)
            if question is not None and not has_judged:
                has_judged = True
                heard.take(judged(exchange, question))
        elif isinstance(turn, Failed):
            heard.take(exchange.failed(NoSpace("full")))
        else:
            heard.take(exchange.receive(turn))
    return heard


@given(conversations, early, here)
@settings(max_examples=300, deadline=None)
def test_any_order_of_events_is_borne(turns: list[Turn], early: int, here: int) -> None:
    """Nothing raises; at most one body to judge, two questions (one early), one mutation, one immediate reply, one end of stream; nothing of the
    request after that reply."""
    exchange = fresh(100_000, early_scan_bytes=early, judged_here_bytes=here)
    heard = held(turns, exchange)
    assert heard.asked_for(Judge) <= 1
    assert heard.asked_for(Decide) <= 2
    assert len(heard.immediate()) <= 1
    if heard.immediate():
        after = heard.actions[heard.actions.index(heard.immediate()[0]) + 1 :]
        assert all(isinstance(action, HeadersReply | BodyReply | TrailersReply) and action.direction is Direction.RESPONSE for action in after)
        assert exchange.state is State.ENDED
    assert sum(getattr(action, "mutation", None) is not None for action in heard.actions) <= 1
    ends = [reply.end_of_stream for reply in heard.chunks()]
    assert sum(ends) <= 1
    assert not any(before for before, _ in pairwise(ends))
    assert all(len(whole(reply.chunk)) <= BODY_CHUNK_BYTES for reply in heard.chunks())


@given(conversations)
@settings(max_examples=100, deadline=None)
def test_every_response_message_gets_one_reply_of_its_kind(turns: list[Turn]) -> None:
    """In any state of the request: Envoy waits for it."""
    exchange = fresh(100_000)
    for turn in turns:
        if isinstance(turn, Decided | Judged | Failed):
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
    judged_here_bytes: int


@st.composite
def legal(draw: st.DrawFn) -> Legal:
    mode = draw(st.sampled_from((Mode.FULL_DUPLEX_STREAMED, Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED)))
    is_json = draw(st.booleans())
    filling = draw(st.sampled_from((0, 1, 100, 62_000, 130_000)))
    rest = [("messages", "x" * filling), ("nested", {"model": ["no"]})]
    rest.insert(draw(st.integers(0, 2)), ("model", "demo/sql"))
    body = json.dumps(dict(rest)).encode() if is_json else (draw(st.binary(max_size=10)) * max(filling, 1))[:150_000]
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=5)))
    chunks = tuple(body[start:end] for start, end in pairwise([0, *cuts, len(body)]))
    if mode is Mode.BUFFERED:
        chunks = (body,)
    return Legal(mode, is_json, body, chunks, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 8)), draw(early), draw(here))


def events_of(request: Legal) -> list[Event]:
    headers = JSON if request.is_json else OTHER
    last = len(request.chunks) - 1
    bodies: list[Event] = [RequestBody(chunk, i == last and not request.trailers) for i, chunk in enumerate(request.chunks)]
    if request.trailers:
        bodies.append(RequestTrailers())
    elif request.duplicate_end and request.mode is Mode.FULL_DUPLEX_STREAMED:
        bodies.append(RequestBody(b"", True))
    return [RequestHeaders(headers, False, request.mode), *bodies]


def served(request: Legal) -> Heard:
    """The decision comes `patience` events after the first question, at the latest when the gateway has nothing more to show; a second one at once.
    A body that is to be judged elsewhere is judged when the gateway has shown everything."""
    exchange = fresh(10**6, early_scan_bytes=request.early_scan_bytes, judged_here_bytes=request.judged_here_bytes)
    heard = Heard()
    patience = request.patience
    answered = 0
    for event in [*events_of(request), None, None]:
        if event is not None:
            heard.take(exchange.receive(event))
        elif exchange.state is State.JUDGING:
            heard.take(judged(exchange, next(action for action in heard.actions if isinstance(action, Judge))))
        asked = sum(isinstance(action, Decide) for action in heard.actions)
        if asked > answered:
            if patience <= 0 or event is None:
                answered = asked
                heard.take(exchange.decided(TO))
            patience -= 1
    return heard


@given(legal().filter(lambda request: request.mode is Mode.FULL_DUPLEX_STREAMED))
@settings(max_examples=120, deadline=None)
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
@settings(max_examples=120, deadline=None)
def test_in_buffered_every_message_gets_one_answer(request: Legal) -> None:
    """In their order, with one mutation: on the body of JSON, on the headers of anything else."""
    heard = served(request)
    assert not heard.immediate()
    kinds = [HeadersReply, BodyReply, *([TrailersReply] if request.trailers else [])]
    assert [type(reply) for reply in heard.of_request()] == kinds
    assert [getattr(reply, "mutation", None) is not None for reply in heard.of_request()[:2]] == [not request.is_json, request.is_json]
    assert not heard.chunks()


@given(legal().filter(lambda request: request.is_json), st.data())
@settings(max_examples=120, deadline=None)
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
