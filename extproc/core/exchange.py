"""One HTTP request and response as one ext_proc stream shows it: events in, replies and questions out. No transport, no clock, no waiting.

Rules of the place:
1. What may follow what is in REQUEST_STEPS, and nowhere else. What is not in the table is a violation and is answered as one.
2. `receive`, `judged`, `decided` and `failed` never raise; every one returns what to send next, in order.
3. The mutation rides on the message that Envoy still holds: on the headers answer in FULL_DUPLEX_STREAMED and NONE, on the body answer in
   BUFFERED, where the headers had to be continued before the body came.
4. Nothing is forwarded before the whole body was judged. In FULL_DUPLEX_STREAMED Envoy has given the body away: it goes back in chunks.
5. Only the first end of stream counts: Envoy up to 1.37.5 can send a second, empty one for bodies over 1 MB (envoy #46237).
6. A full-duplex request that ends in trailers, or may yet, is marked and its route chosen anew: with a retry policy on its route, Envoy 1.36.4
   and 1.40.0 send the body twice. envoyconfig.py has a route without retries for the mark.
7. A mutation may name another `model`: the body that goes on then differs from what came by that value alone, and is plain if it came compressed.
8. A body is kept in the pieces it came in and goes back as views of them: it is never copied whole here.
9. A response that comes from an endpoint that the mutation did not name goes on only if that endpoint can have understood the request as a named one
   would have: it says success, and the request was for a base model, or for one version of an adapter under the name of that version. An endpoint that
   lacks the adapter says 404, which no client repeats; under an adapter's plain name an endpoint may have another version. Any other answer from
   there becomes an immediate response, 503 with Retry-After, which Envoy takes instead of response headers that it still holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from typing import ClassVar

from ..errors import AnsweredElsewhere, BodyTooLarge, GatewayProtocolError, InvalidRequest, LoraExtprocError, UnsupportedMedia
from . import conformance, content, paths, pieces, scanner
from .decision import Facts
from .events import (
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
from .pieces import Buffer

NO_RETRY_HEADER = "x-lora-extproc-no-retry"
EARLY_SCAN_BYTES = 16 * 1024  # a body this small is complete before a fetch could have begun: it is only judged
LATE_SCAN_BYTES = 512 * 1024  # nor is anything scanned behind this: escapes cost 30 ns a byte, and such a body is nearly here
JUDGED_HERE_BYTES = 1024 * 1024  # plain JSON up to this size is judged within 4 ms, whatever is in it; the rest is the caller's to put elsewhere
BODY_CHUNK_BYTES = 62_000  # below the 64 KiB that gateways accept in one streamed body message
WITHOUT_MODEL = ("GET", "HEAD", "OPTIONS", "DELETE")  # RFC 9110, 9.3: content of such a request has no meaning


# ---- the states ----------------------------------------------------------------------------------------------------------------------------


class State(Enum):
    __hash__ = object.__hash__  # as Mode's

    START = "nothing seen"
    BODY = "the body is arriving and will be judged"
    JUDGING = "the body has ended and is being judged"
    DECIDING = "all that is needed was seen, the decision is awaited"
    ANSWERED = "the mutation was sent"
    ENDED = "an immediate response was sent, or the response has begun: the request direction is over"


class Kind(Enum):
    __hash__ = object.__hash__  # as Mode's

    HEADERS = "request headers"
    HEADERS_END = "request headers without body"
    BODY = "request body"
    BODY_END = "last request body"
    TRAILERS = "request trailers"


# Members by names of their own: through the class, each look takes Python 3.11 70 ns, and a warm request makes forty
_FULL_DUPLEX, _BUFFERED, _NONE = _D, _B, _N = Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED, Mode.NONE  # single letters: the table's columns
_START, _BODY, _JUDGING, _DECIDING, _ANSWERED = State.START, State.BODY, State.JUDGING, State.DECIDING, State.ANSWERED
_HEADERS, _BODY_PART, _BODY_END = Kind.HEADERS, Kind.BODY, Kind.BODY_END
_REQUEST = Direction.REQUEST
_NAMING_A_MODEL = (paths.Kind.INFERENCE, paths.Kind.MODEL_OPTIONAL)  # paths whose bodies do, or may

Chunk = bytes | tuple[Buffer, ...]
Step = Callable[["Exchange", Chunk, bool], list[Action]]  # what came of the body with the event, and whether that was the last of it


class Exchange:
    """The state of one stream. Feed it every event in order; when it asks `Decide`, answer once, whenever the answer is there."""

    def __init__(
        self,
        *,
        max_body_bytes: int,
        model_header: str,
        allowed: paths.Paths,
        early_scan_bytes: int = EARLY_SCAN_BYTES,
        judged_here_bytes: int = JUDGED_HERE_BYTES,
        with_blocks: bool = False,
        tells_served: bool = False,
    ) -> None:
        self._max_body_bytes = max_body_bytes
        self._model_header = model_header
        self._allowed = allowed
        self._early_scan_bytes = early_scan_bytes
        self._judged_here_bytes = judged_here_bytes
        self._with_blocks = with_blocks  # whether the verdict hashes the prompt
        self._tells_served = tells_served  # whether a conformance test is told who served
        self._scanner: scanner.Scanner | None = None
        self.state = _START
        self.mode = _NONE
        self.response_mode = _NONE
        self._start: RequestHeaders | None = None
        self._path: paths.Path | None = None
        self._content: content.Content | None = None  # None: nothing to judge, the body passes
        self._asked = False  # and not answered: while the body arrives the answer says only that there would be one
        self._reading: content.Reading | None = None  # the verdict on the body
        self._was_decided = False  # once, while the body arrives
        self._mutation_on_body = False  # rule 3
        self._pieces: list[Buffer] = []
        self._held_bytes = 0
        self._sent_bytes = 0  # of a body that was given back and that the gateway may not have read yet
        self._body_ended = False
        self._body_owed = False
        self._trailers_owed = False
        self._named: tuple[str, ...] = ()  # the endpoints that may answer, as the mutation that was sent named them
        self._means_one_thing = False  # whether any endpoint that answers the request well answers it rightly
        self._response_is_refused = False

    def __repr__(self) -> str:
        return f"<Exchange {self.mode.name} [{self.state.name}: {self.state.value}; holds {self._held_bytes} bytes]>"

    @property
    def held_bytes(self) -> int:
        """Bytes of the request body that take memory because of this exchange."""
        return self._held_bytes + self._sent_bytes

    @property
    def is_arriving(self) -> bool:
        """Whether the body that is to be judged has not ended."""
        return self.state is _BODY

    # -- events

    def receive(self, event: Event) -> list[Action]:
        """Take the next event; what to send and to ask, in order."""
        match event:
            case RequestHeaders():
                if self._start is not None:
                    return self._violation(Kind.HEADERS)
                self._start, self.mode, self.response_mode = event, event.request_mode, event.response_mode
                if self.mode in REFUSED_MODES and not event.end_of_stream:
                    spoken = ", ".join(mode.name for mode in SPOKEN_MODES)
                    why = f"request_body_mode {self.mode.name} is not spoken here: {REFUSED_MODES[self.mode]}; use one of {spoken}"
                    return self.failed(GatewayProtocolError(why))
                return self._step(Kind.HEADERS_END if event.end_of_stream else _HEADERS, b"", event.end_of_stream)
            case RequestBody():
                return self._step(_BODY_END if event.end_of_stream else _BODY_PART, event.chunk, event.end_of_stream)
            case RequestTrailers():
                return self._step(Kind.TRAILERS, b"", False)
            case ResponseHeaders():
                if self.state is _ANSWERED and not self._may_answer(event):
                    self._response_is_refused = True
                    why = "no endpoint that has the model could be reached, and another one answered, which may not know the model; ask again"
                    return self.failed(AnsweredElsewhere(why))
                if self.state is not _ANSWERED:  # a response that begins before our answer is the gateway's own: it needs none
                    self._end()
                told = Mutation({conformance.SERVED_HEADER: event.served or conformance.NOT_TOLD}) if self._tells_served else None
                return [HeadersReply(Direction.RESPONSE, told)]
            case ResponseBody() | ResponseTrailers() if self._response_is_refused:
                return []
            case ResponseBody():
                if self.response_mode is _FULL_DUPLEX:
                    parts = _in_chunks((event.chunk,), end_of_stream=event.end_of_stream, direction=Direction.RESPONSE)
                    return list(parts) or [BodyReply(Direction.RESPONSE, b"")]
                return [BodyReply(Direction.RESPONSE)]
            case ResponseTrailers():
                return [TrailersReply(Direction.RESPONSE)]
            case Unreadable():
                return self.failed(GatewayProtocolError(f"unreadable message: {event.why}"))

    def judged(self, reading: content.Reading) -> list[Action]:
        """The answer to Judge. Too late for a request that has ended: nothing."""
        if self.state is not _JUDGING:
            return []
        assert self._path is not None
        if reading.model is None and self._path.kind is paths.Kind.INFERENCE:
            what = "form" if self._content is not None and self._content.kind is content.Kind.FORM else "body"
            return self.failed(InvalidRequest(f"the {what} has no `model`"))
        self._reading = reading
        if reading.plain is not None:
            self._held_bytes += len(reading.plain)
        self.state = _DECIDING
        return [] if self._asked else self._ask(reading.model)

    def decided(self, mutation: Mutation) -> list[Action]:
        """The answer to Decide: where to. Too late for a request that has ended: nothing.

        A decision made before the body has ended is made again at its end, since minutes may lie between: by then the adapter may be at another
        place, or there in another version.
        """
        if self.state is _DECIDING:
            try:
                return self._answer(mutation)
            except LoraExtprocError as error:
                return self.failed(error)
        self._asked = False
        self._was_decided = True
        return []

    def failed(self, error: LoraExtprocError) -> list[Action]:
        """End the request with an immediate response, unless it has ended already."""
        if self.state is State.ENDED:
            return []
        self._end()
        return [ImmediateReply(error.bare())]

    def answered(self, body: tuple[Buffer, ...]) -> list[Action]:
        """End the request with an answer of our own, unless it has ended already."""
        if self.state is State.ENDED:
            return []
        self._end()
        return [OwnReply(body)]

    def _may_answer(self, response: ResponseHeaders) -> bool:
        """Rule 9."""
        if not response.served or not self._named or response.served in self._named:
            return True
        return self._means_one_thing and 200 <= response.status < 400

    # -- steps

    def _step(self, kind: Kind, chunk: Chunk, last: bool) -> list[Action]:
        mode = self.mode if self.mode in SPOKEN_MODES else _NONE
        step = REQUEST_STEPS[self.state].get(kind, {}).get(mode)
        if step is None:
            return self._violation(kind)
        try:
            if self.state is _START and self._start is not None:
                self._look_at_headers(self._start, has_body=kind is _HEADERS)
            return step(self, chunk, last)
        except LoraExtprocError as error:
            return self.failed(error)

    def _look_at_headers(self, start: RequestHeaders, *, has_body: bool) -> None:
        """What the path is, and whether a body is to be judged. Raises what is wrong with either."""
        if ":path" not in start.headers:
            raise GatewayProtocolError("the gateway does not send `:path`, by which requests are told apart")
        self._path = self._allowed.path(start.headers[":path"])
        reads_body = has_body and self.mode is not _NONE and start.headers.get(":method") not in WITHOUT_MODEL
        if not reads_body or self._path.kind not in _NAMING_A_MODEL:
            return
        self._content = content.of_headers(start.headers)
        if self._content is None:
            given = start.headers.get("content-type", "")
            raise UnsupportedMedia(f"content-type: {given[:80]!r} is neither JSON nor multipart/form-data" if given else "content-type is missing")

    def _violation(self, kind: Kind) -> list[Action]:
        return self.failed(GatewayProtocolError(f"{kind.value} may not come while: {self.state.value} ({self.mode.name})"))

    def _drop(self, _chunk: Chunk, _last: bool) -> list[Action]:
        return []

    def _hold_headers(self, _chunk: Chunk, _last: bool) -> list[Action]:
        if self._content is None:
            return self._decide_on_headers(b"", False)
        self.state = _BODY
        return []

    def _continue_headers(self, _chunk: Chunk, _last: bool) -> list[Action]:
        if self._content is None:
            return self._decide_on_headers(b"", False)
        self._mutation_on_body = True
        self.state = _BODY
        return [HeadersReply(_REQUEST)]

    def _decide_on_headers(self, _chunk: Chunk, _last: bool) -> list[Action]:
        assert self._start is not None
        self.state = _DECIDING
        named = self._start.headers.get(self._model_header) if self.mode is _NONE else None
        return self._ask(named or None)

    def _keep(self, chunk: Chunk, last: bool) -> list[Action]:
        if self._body_ended:  # rule 5
            return []
        size = pieces.size_of(chunk)
        self._held_bytes += size
        if self._held_bytes > self._max_body_bytes:
            raise BodyTooLarge(f"the body has over {self._max_body_bytes} bytes")
        if size:  # the last is often empty; one alone need not be joined
            self._pieces.extend(chunk if isinstance(chunk, tuple) else (chunk,))
        self._body_ended = last
        if last or self._asked or self._was_decided or self._held_bytes < self._early_scan_bytes or self.state is not _BODY:
            return []
        if self._content is None or not self._content.can_be_scanned or self._is_all_here():
            return []
        if self._held_bytes - size > LATE_SCAN_BYTES:
            return []
        if self._scanner is None:
            self._scanner = scanner.Scanner()
            return self._scan(self._pieces)
        return [] if self._scanner.done else self._scan(chunk if isinstance(chunk, tuple) else (chunk,))

    def _scan(self, arrived: Sequence[Buffer]) -> list[Action]:
        assert self._scanner is not None
        model = None
        left = LATE_SCAN_BYTES
        for piece in arrived:
            model = self._scanner.feed(bytes(piece))
            left -= len(piece)
            if self._scanner.done or left <= 0:
                break
        return [] if model is None else self._ask(model)

    def _is_all_here(self) -> bool:
        """By what was announced: the body is about to be judged, and need not be scanned before."""
        assert self._start is not None
        return self._start.headers.get("content-length") == str(self._held_bytes)

    def _keep_and_judge(self, chunk: Chunk, _last: bool) -> list[Action]:
        return self._keep(chunk, True) + self._judge()

    def _judge_buffered(self, chunk: Chunk, _last: bool) -> list[Action]:
        self._body_owed = True
        return self._keep_and_judge(chunk, True)

    def _judge_before_trailers(self, _chunk: Chunk, _last: bool) -> list[Action]:
        if self._mutation_on_body and not self._held_bytes:  # rule 3: the headers have gone on, and there is nothing to send the mutation with
            raise InvalidRequest("the body is empty, and trailers follow it; send a body, or no trailers")
        self._trailers_owed = True
        self._body_ended = True
        return self._judge()

    def _judge(self) -> list[Action]:
        self._scanner = None
        assert self._content is not None
        self.state = _JUDGING
        if not self._held_bytes:  # as if there were no body at all
            self._content, self.state = None, _DECIDING
            return self._ask(None)
        if self._held_bytes <= self._judged_here_bytes and self._content.can_be_scanned:
            return self.judged(self._content.read(self._join(), self._max_body_bytes, with_blocks=self._with_blocks))
        return [Judge(self._content, tuple(self._pieces))]

    def _owe_body(self, _chunk: Chunk, _last: bool) -> list[Action]:
        self._body_owed = True
        return []

    def _owe_trailers(self, _chunk: Chunk, _last: bool) -> list[Action]:
        self._body_ended = True
        self._trailers_owed = True
        return []

    def _echo(self, chunk: Chunk, last: bool) -> list[Action]:
        """A body that needs no verdict is given back as it comes."""
        if self._body_ended:  # rule 5
            return []
        self._body_ended = last
        return list(_in_chunks(chunk if isinstance(chunk, tuple) else (chunk,), end_of_stream=last))

    def _continue_body(self, _chunk: Chunk, _last: bool) -> list[Action]:
        return [BodyReply(_REQUEST)]

    def _continue_trailers(self, _chunk: Chunk, _last: bool) -> list[Action]:
        if self._trailers_owed:
            return []
        self._trailers_owed = self._body_ended = True
        return [TrailersReply(_REQUEST)]

    # -- asking and answering

    def _ask(self, model: str | None) -> list[Action]:
        assert self._start is not None
        assert self._path is not None
        self._asked = True
        headers = self._start.headers
        can_rename = self.mode is not _NONE and self._content is not None
        blocks = self._reading.blocks if self._reading is not None else ()
        return [Decide(Facts(headers.get(":method", ""), self._path, headers, model, self._start.subset, can_rename, blocks))]

    def _answer(self, mutation: Mutation) -> list[Action]:
        self.state = _ANSWERED
        assert self._start is not None
        renames = bool(mutation.model) and self._reading is not None
        self._named, self._means_one_thing = mutation.endpoints, mutation.is_base or renames
        if renames:
            mutation = self._rename(mutation)
        ends_otherwise = self._trailers_owed or not (self._body_ended or self._start.end_of_stream)
        if ends_otherwise and self.mode is _FULL_DUPLEX:  # rule 6
            mutation = replace(mutation, set_headers={**mutation.set_headers, NO_RETRY_HEADER: "1"}, clear_route_cache=True)
        actions: list[Action] = []
        if not self._mutation_on_body:
            actions.append(HeadersReply(_REQUEST, mutation))
        elif self._body_owed:
            actions.append(BodyReply(_REQUEST, pieces.one(self._pieces) if renames else None, mutation=mutation, replaces=renames))
            self._body_owed = False
        if self.mode is _FULL_DUPLEX:
            if self._pieces or self._body_ended:
                actions += _in_chunks(self._pieces, end_of_stream=self._body_ended and not self._trailers_owed)
        elif self._body_owed:
            actions.append(BodyReply(_REQUEST))
        if self._trailers_owed:
            actions.append(TrailersReply(_REQUEST))
        self._sent_bytes = self._held_bytes if self._held_bytes > self._judged_here_bytes else 0
        self._forget_body()
        return actions

    def _rename(self, mutation: Mutation) -> Mutation:
        """Change the body that is held; the mutation, with what that means for the headers."""
        assert self._content is not None
        assert self._reading is not None
        if self._reading.plain is not None:
            self._pieces = [self._reading.plain]
            mutation = replace(mutation, remove_headers=(*mutation.remove_headers, "content-encoding"))
        self._pieces = pieces.spliced(self._pieces, self._reading.begin, self._reading.end, self._content.spelled(mutation.model))
        if self.mode is _BUFFERED:  # in full duplex Envoy takes the length away; here it compares
            mutation = replace(mutation, set_headers={**mutation.set_headers, "content-length": str(sum(map(len, self._pieces)))})
        return mutation

    def _join(self) -> Buffer:
        """What is held of the body, as one piece from now on. For small bodies."""
        if len(self._pieces) != 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]

    def _end(self) -> None:
        self.state = State.ENDED
        self._scanner = None
        self._sent_bytes = 0
        self._forget_body()

    def _forget_body(self) -> None:
        self._pieces = []
        self._held_bytes = 0
        self._reading = None

    # ---- the table: state, kind -> per mode the step that handles it. `_drop` is silence; what is missing is a violation.

    STEPS: ClassVar[dict[State, dict[Kind, dict[Mode, Step]]]] = {
        State.START: {
            Kind.HEADERS: {_D: _hold_headers, _B: _continue_headers, _N: _decide_on_headers},
            Kind.HEADERS_END: {_D: _decide_on_headers, _B: _decide_on_headers, _N: _decide_on_headers},
        },
        State.BODY: {
            Kind.BODY: {_D: _keep, _B: _judge_buffered},  # BUFFERED shows the body once and whole; no end of stream if trailers follow
            Kind.BODY_END: {_D: _keep_and_judge, _B: _judge_buffered},
            Kind.TRAILERS: {_D: _judge_before_trailers, _B: _judge_before_trailers},
        },
        State.JUDGING: {
            Kind.BODY: {_D: _keep, _B: _owe_body},
            Kind.BODY_END: {_D: _keep, _B: _owe_body},
            Kind.TRAILERS: {_D: _owe_trailers, _B: _owe_trailers},
        },
        State.DECIDING: {
            Kind.BODY: {_D: _keep, _B: _owe_body},
            Kind.BODY_END: {_D: _keep, _B: _owe_body, _N: _drop},
            Kind.TRAILERS: {_D: _owe_trailers, _B: _owe_trailers, _N: _owe_trailers},
        },
        State.ANSWERED: {
            Kind.BODY: {_D: _echo, _B: _continue_body},
            Kind.BODY_END: {_D: _echo, _B: _continue_body, _N: _drop},
            Kind.TRAILERS: {_D: _continue_trailers, _B: _continue_trailers, _N: _continue_trailers},
        },
        State.ENDED: {
            Kind.BODY: {_D: _drop, _B: _drop, _N: _drop},
            Kind.BODY_END: {_D: _drop, _B: _drop, _N: _drop},
            Kind.TRAILERS: {_D: _drop, _B: _drop, _N: _drop},
        },
    }


REQUEST_STEPS = Exchange.STEPS


def _in_chunks(body: Sequence[Buffer], *, end_of_stream: bool, direction: Direction = _REQUEST) -> Sequence[BodyReply]:
    """The body as messages of at most BODY_CHUNK_BYTES; an empty one only where nothing else carries the end of the stream."""
    replies = [BodyReply(direction, part) for part in pieces.cut(body, BODY_CHUNK_BYTES)]
    if end_of_stream:
        if not replies:
            replies.append(BodyReply(direction, b""))
        replies[-1].end_of_stream = True
    return replies
