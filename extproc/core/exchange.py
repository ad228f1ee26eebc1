"""One HTTP request and response as one ext_proc stream shows it: events in, replies and questions out. No transport, no clock, no waiting.

Rules of the place:
1. What may follow what is in REQUEST_STEPS, and nowhere else. What is not in the table is a violation and is answered as one.
2. `receive`, `decided` and `failed` never raise; every one returns what to send next, in order.
3. The mutation rides on the message that Envoy still holds: on the headers answer in FULL_DUPLEX_STREAMED and NONE, on the body answer in
   BUFFERED, where the headers had to be continued before the body came.
4. Nothing is forwarded before the whole body was judged. In FULL_DUPLEX_STREAMED Envoy has given the body away: it goes back in chunks.
5. Only the first end of stream counts: Envoy up to 1.37.5 can send a second, empty one for bodies over 1 MB (envoy #46237).
6. A full-duplex request that ends in trailers, or may yet, is marked and its route chosen anew: with a retry policy on its route, Envoy 1.36.4
   and 1.40.0 send the body twice. envoyconfig.py has a route without retries for the mark.
7. A mutation may name another `model`: the body that goes on then differs from what came by that value alone, and is plain if it came compressed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum

from ..errors import BodyTooLarge, GatewayProtocolError, LoraExtprocError
from . import content, scanner
from .decision import Facts, check_path
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

NO_RETRY_HEADER = "x-lora-extproc-no-retry"
EARLY_SCAN_BYTES = 16 * 1024  # a body this small is complete before a fetch could have begun: it is only judged
BODY_CHUNK_BYTES = 62_000  # below the 64 KiB that gateways accept in one streamed body message


# ---- the table -----------------------------------------------------------------------------------------------------------------------------


class State(Enum):
    __hash__ = object.__hash__  # as Mode's

    START = "nothing seen"
    BODY = "the body is arriving and will be judged"
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


_D, _B, _N = Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED, Mode.NONE

# state, kind -> per mode the name of the step that handles it. "drop" is silence; what is missing is a violation.
REQUEST_STEPS: dict[State, dict[Kind, dict[Mode, str]]] = {
    State.START: {
        Kind.HEADERS: {_D: "hold_headers", _B: "continue_headers", _N: "decide_on_headers"},
        Kind.HEADERS_END: {_D: "decide_on_headers", _B: "decide_on_headers", _N: "decide_on_headers"},
    },
    State.BODY: {
        Kind.BODY: {_D: "keep", _B: "judge_buffered"},  # BUFFERED shows the body once and whole; no end of stream if trailers follow
        Kind.BODY_END: {_D: "keep_and_judge", _B: "judge_buffered"},
        Kind.TRAILERS: {_D: "judge_before_trailers", _B: "judge_before_trailers"},
    },
    State.DECIDING: {
        Kind.BODY: {_D: "keep", _B: "owe_body"},
        Kind.BODY_END: {_D: "keep", _B: "owe_body", _N: "drop"},
        Kind.TRAILERS: {_D: "owe_trailers", _B: "owe_trailers", _N: "owe_trailers"},
    },
    State.ANSWERED: {
        Kind.BODY: {_D: "echo", _B: "continue_body"},
        Kind.BODY_END: {_D: "echo", _B: "continue_body", _N: "drop"},
        Kind.TRAILERS: {_D: "continue_trailers", _B: "continue_trailers", _N: "continue_trailers"},
    },
    State.ENDED: {
        Kind.BODY: {_D: "drop", _B: "drop", _N: "drop"},
        Kind.BODY_END: {_D: "drop", _B: "drop", _N: "drop"},
        Kind.TRAILERS: {_D: "drop", _B: "drop", _N: "drop"},
    },
}


class Exchange:
    """The state of one stream. Feed it every event in order; when it asks `Decide`, answer once, whenever the answer is there."""

    def __init__(
        self,
        *,
        max_body_bytes: int,
        model_header: str = "x-gateway-model-name",
        forbidden_paths: tuple[str, ...] = (),
        early_scan_bytes: int = EARLY_SCAN_BYTES,
    ) -> None:
        self._max_body_bytes = max_body_bytes
        self._model_header = model_header
        self._early_scan_bytes = early_scan_bytes
        self._forbidden_paths = forbidden_paths  # refused on the headers: their bodies name no model, and must not be read as if they should
        self._scanner: scanner.Scanner | None = None
        self.state = State.START
        self.mode = Mode.NONE
        self.response_mode = Mode.NONE
        self._start: RequestHeaders | None = None
        self._content: content.Content | None = None  # None: nothing to judge, the body passes
        self._asked = False  # and not answered: while the body arrives the answer says only that there would be one
        self._model = ""  # as the body was judged to name it
        self._was_decided = False  # once, while the body arrives
        self._mutation_on_body = False  # rule 3
        self._chunks: list[bytes] = []
        self._held_bytes = 0
        self._body_ended = False
        self._body_owed = False
        self._trailers_owed = False

    def __repr__(self) -> str:
        return f"<Exchange {self.mode.name} [{self.state.name}: {self.state.value}; holds {self._held_bytes} bytes]>"

    @property
    def held_bytes(self) -> int:
        """Bytes of the request body held here."""
        return self._held_bytes

    def awaits_decision(self) -> bool:
        """Nothing more is needed from the gateway: only the answer to Decide."""
        return self.state is State.DECIDING

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
                return self._step(Kind.HEADERS_END if event.end_of_stream else Kind.HEADERS, b"")
            case RequestBody():
                return self._step(Kind.BODY_END if event.end_of_stream else Kind.BODY, event.chunk)
            case RequestTrailers():
                return self._step(Kind.TRAILERS, b"")
            case ResponseHeaders():
                if self.state is not State.ANSWERED:  # a response that begins before our answer is the gateway's own: it needs none
                    self._end()
                return [HeadersReply(Direction.RESPONSE)]
            case ResponseBody():
                if self.response_mode is Mode.FULL_DUPLEX_STREAMED:
                    return list(_in_chunks(event.chunk, end_of_stream=event.end_of_stream, direction=Direction.RESPONSE)) or [
                        BodyReply(Direction.RESPONSE, b"")
                    ]
                return [BodyReply(Direction.RESPONSE)]
            case ResponseTrailers():
                return [TrailersReply(Direction.RESPONSE)]
            case Unreadable():
                return self.failed(GatewayProtocolError(f"unreadable message: {event.why}"))

    def decided(self, mutation: Mutation) -> list[Action]:
        """The answer to Decide: where to. Too late for a request that has ended: nothing.

        One that comes while the body arrives is not kept, only that the way is prepared: a body may take minutes, and where to may be another place, or
        another version, by then. It is asked for again when the body was judged.
        """
        if self.state is State.DECIDING:
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
        return [ImmediateReply(error)]

    def answered(self, body: bytes) -> list[Action]:
        """End the request with an answer of our own, unless it has ended already."""
        if self.state is State.ENDED:
            return []
        self._end()
        return [OwnReply(body)]

    # -- steps

    def _step(self, kind: Kind, chunk: bytes) -> list[Action]:
        mode = self.mode if self.mode in SPOKEN_MODES else Mode.NONE
        name = REQUEST_STEPS[self.state].get(kind, {}).get(mode)
        if name is None:
            return self._violation(kind)
        step: Callable[[bytes, bool], list[Action]] = getattr(self, f"_{name}")
        try:
            if self.state is State.START and self._start is not None:
                check_path(self._start.headers.get(":path", ""), self._forbidden_paths)
                self._content = content.of_headers(self._start.headers)
            return step(chunk, kind in (Kind.BODY_END, Kind.HEADERS_END))
        except LoraExtprocError as error:
            return self.failed(error)

    def _violation(self, kind: Kind) -> list[Action]:
        return self.failed(GatewayProtocolError(f"{kind.value} may not come while: {self.state.value} ({self.mode.name})"))

    def _drop(self, _chunk: bytes, _last: bool) -> list[Action]:
        return []

    def _hold_headers(self, _chunk: bytes, _last: bool) -> list[Action]:
        if self._content is None:
            return self._decide_on_headers(b"", False)
        self.state = State.BODY
        return []

    def _continue_headers(self, _chunk: bytes, _last: bool) -> list[Action]:
        if self._content is None:
            return self._decide_on_headers(b"", False)
        self._mutation_on_body = True
        self.state = State.BODY
        return [HeadersReply(Direction.REQUEST)]

    def _decide_on_headers(self, _chunk: bytes, _last: bool) -> list[Action]:
        assert self._start is not None
        self.state = State.DECIDING
        named = self._start.headers.get(self._model_header) if self.mode is Mode.NONE else None
        return self._ask(named or None)

    def _keep(self, chunk: bytes, last: bool) -> list[Action]:
        if self._body_ended:  # rule 5
            return []
        self._held_bytes += len(chunk)
        if self._held_bytes > self._max_body_bytes and self._content is not None:
            raise BodyTooLarge(f"the body has over {self._max_body_bytes} bytes")
        if chunk:  # the last is often empty; one alone need not be joined
            self._chunks.append(chunk)
        self._body_ended = last
        if last or self._asked or self._was_decided or self._held_bytes < self._early_scan_bytes or self.state is not State.BODY:
            return []
        if self._content is None or not self._content.can_be_scanned or self._is_all_here():
            return []
        if self._scanner is None:
            self._scanner = scanner.Scanner()
            chunk = b"".join(self._chunks)
        model = self._scanner.feed(chunk)
        return [] if model is None else self._ask(model)

    def _is_all_here(self) -> bool:
        """By what was announced: the body is about to be judged, and need not be scanned before."""
        assert self._start is not None
        return self._start.headers.get("content-length") == str(self._held_bytes)

    def _keep_and_judge(self, chunk: bytes, _last: bool) -> list[Action]:
        return self._keep(chunk, True) + self._judge()

    def _judge_buffered(self, chunk: bytes, _last: bool) -> list[Action]:
        self._body_owed = True
        return self._keep_and_judge(chunk, True)

    def _judge_before_trailers(self, _chunk: bytes, _last: bool) -> list[Action]:
        self._trailers_owed = True
        self._body_ended = True
        return self._judge()

    def _judge(self) -> list[Action]:
        self._scanner = None
        body = self._join()  # in BUFFERED, too, until it is known whether it is to be changed
        assert self._content is not None
        model = self._content.model(body, self._max_body_bytes)
        self._model = model or ""
        self.state = State.DECIDING
        return [] if self._asked else self._ask(model)

    def _owe_body(self, _chunk: bytes, _last: bool) -> list[Action]:
        self._body_owed = True
        return []

    def _owe_trailers(self, _chunk: bytes, _last: bool) -> list[Action]:
        self._body_ended = True
        self._trailers_owed = True
        return []

    def _echo(self, chunk: bytes, last: bool) -> list[Action]:
        """A body that needs no verdict is given back as it comes."""
        if self._body_ended:  # rule 5
            return []
        self._body_ended = last
        return list(_in_chunks(chunk, end_of_stream=last))

    def _continue_body(self, _chunk: bytes, _last: bool) -> list[Action]:
        return [BodyReply(Direction.REQUEST)]

    def _continue_trailers(self, _chunk: bytes, _last: bool) -> list[Action]:
        if self._trailers_owed:
            return []
        self._trailers_owed = self._body_ended = True
        return [TrailersReply(Direction.REQUEST)]

    # -- asking and answering

    def _ask(self, model: str | None) -> list[Action]:
        assert self._start is not None
        self._asked = True
        headers = self._start.headers
        can_rename = self.mode is not Mode.NONE and self._content is not None
        return [Decide(Facts(headers.get(":method", ""), headers.get(":path", ""), headers, model, self._start.subset, can_rename))]

    def _answer(self, mutation: Mutation) -> list[Action]:
        self.state = State.ANSWERED
        assert self._start is not None
        renames = bool(mutation.model) and self._content is not None
        if renames:
            mutation = self._rename(mutation)
        ends_otherwise = self._trailers_owed or not (self._body_ended or self._start.end_of_stream)
        if ends_otherwise and self.mode is Mode.FULL_DUPLEX_STREAMED:  # rule 6
            mutation = replace(mutation, set_headers={**mutation.set_headers, NO_RETRY_HEADER: "1"}, clear_route_cache=True)
        actions: list[Action] = []
        if not self._mutation_on_body:
            actions.append(HeadersReply(Direction.REQUEST, mutation))
        elif self._body_owed:
            actions.append(BodyReply(Direction.REQUEST, self._chunks[0] if renames else None, mutation=mutation, replaces=renames))
            self._body_owed = False
        if self.mode is Mode.FULL_DUPLEX_STREAMED:
            if self._chunks or self._body_ended:
                actions += _in_chunks(self._join(), end_of_stream=self._body_ended and not self._trailers_owed)
        elif self._body_owed:
            actions.append(BodyReply(Direction.REQUEST))
        if self._trailers_owed:
            actions.append(TrailersReply(Direction.REQUEST))
        self._chunks = []
        self._held_bytes = 0
        return actions

    def _rename(self, mutation: Mutation) -> Mutation:
        """Change the body that is held; the mutation, with what that means for the headers."""
        assert self._content is not None
        body = self._content.with_model(self._join(), self._model, mutation.model, self._max_body_bytes)
        self._chunks = [body]
        if self._content.encoding:
            mutation = replace(mutation, remove_headers=(*mutation.remove_headers, "content-encoding"))
        if self.mode is Mode.BUFFERED:  # in full duplex Envoy takes the length away; here it compares
            mutation = replace(mutation, set_headers={**mutation.set_headers, "content-length": str(len(body))})
        return mutation

    def _join(self) -> bytes:
        """What is held of the body, as one piece from now on."""
        if len(self._chunks) != 1:
            self._chunks = [b"".join(self._chunks)]
        return self._chunks[0]

    def _end(self) -> None:
        self.state = State.ENDED
        self._scanner = None
        self._chunks = []
        self._held_bytes = 0


def _in_chunks(body: bytes, *, end_of_stream: bool, direction: Direction = Direction.REQUEST) -> Iterator[BodyReply]:
    """The body as messages of at most BODY_CHUNK_BYTES, views of it; an empty one only where it carries the end of the stream."""
    if len(body) <= BODY_CHUNK_BYTES:
        if body or end_of_stream:
            yield BodyReply(direction, body, end_of_stream)
        return
    view = memoryview(body)
    for start in range(0, len(body), BODY_CHUNK_BYTES):
        yield BodyReply(direction, view[start : start + BODY_CHUNK_BYTES], end_of_stream and start + BODY_CHUNK_BYTES >= len(body))
