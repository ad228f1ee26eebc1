"""Whole ext_proc conversations, as text: each file in tests/exchanges/ is one, read from top to bottom.

    # the first lines say what the conversation shows
    = max_body_bytes 100                            a setting of the exchange: also model_header, paths, early_scan_bytes, judged_here_bytes
    > headers mode=BUFFERED end=false name: value   what the gateway sends; `:method` is POST, `:path` /v1/chat/completions unless said
    > body '{"model":' '"demo/sql"}' 'x'*1000 end=true      with pieces=true each quoted part comes as a piece of its own
    > trailers                                      also: > response headers | response body | response trailers, > unreadable
    ! decided                                       the answer to `decide`; `! decided model=NAME`: the engine knows the model as NAME; also
                                                    named=A,B: the endpoints that may answer, base=true: the model is a base model
    > response headers end=false served=A :status: 404      the endpoint that served, where the gateway tells it
    ! judged                                        the answer to `judge`: what the body that was shown with it says
    ! listed '{"data":[]}'                          an answer of our own instead
    ! failed NoSpace                                or a failure, by the name of the error
    < headers +mutation                             what must come out next: all of it, in this order
    < judge application/json 300000                 somewhere else, a body of so many bytes
    < decide model=demo/sql
    < body '...' end=true                           over 60 bytes only the number of bytes; `continue` = let what you hold go on
    < immediate 400 invalid_request
    < own '{"data":[]}'

Modes default to FULL_DUPLEX_STREAMED for the request and NONE for the response.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from extproc.core.events import (
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
from extproc.core.exchange import EARLY_SCAN_BYTES, JUDGED_HERE_BYTES, NO_RETRY_HEADER, REQUEST_STEPS, Exchange, Kind, State
from extproc.core.paths import CLIENT_PATHS, Paths
from extproc.core.pieces import Buffer
from extproc.errors import BY_NAME, LoraExtprocError

FILES = sorted((Path(__file__).parent.parent / "exchanges").glob("*.txt"))
MUTATION = Mutation({"x-gateway-destination-endpoint": "10.0.0.1:8000"}, metadata={"envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:8000"}})
SHOWN_BYTES = 60

# ---- lines to events


@dataclass
class Words:
    """What stands after the kind of an event: `name=value`, `name: value` and quoted text."""

    options: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    texts: tuple[bytes, ...] = ()

    @classmethod
    def of_headers(cls, line: str) -> "Words":
        words = cls()
        parts = iter(shlex.split(line))
        for part in parts:
            if part.endswith(":"):
                words.headers[part[:-1]] = next(parts)
            else:
                name, _, value = part.partition("=")
                words.options[name] = value
        return words

    @classmethod
    def of_body(cls, line: str) -> "Words":
        words = cls()
        for quoted, times, option, value in re.findall(r"'([^']*)'(?:\*(\d+))?|(\w+)=(\w+)", line):
            if option:
                words.options[option] = value
            else:
                words.texts += (quoted.encode() * int(times or 1),)
        return words

    @property
    def text(self) -> bytes:
        return b"".join(self.texts)

    @property
    def end(self) -> bool:
        assert self.options["end"] in ("true", "false")
        return self.options["end"] == "true"


def event_of(line: str) -> Event:
    kind, _, rest = line.removeprefix("response ").partition(" ")
    if line.startswith("response "):
        match kind:
            case "headers":
                words = Words.of_headers(rest)
                return ResponseHeaders(words.end, words.options.get("served", ""), int(words.headers.get(":status", "0")))
            case "body":
                words = Words.of_body(rest)
                return ResponseBody(words.text, words.end)
            case "trailers":
                return ResponseTrailers()
    match kind:
        case "headers":
            words = Words.of_headers(rest)
            headers = {":method": "POST", ":path": "/v1/chat/completions", **words.headers}
            return RequestHeaders(headers, words.end, Mode[words.options.get("mode", "FULL_DUPLEX_STREAMED")], Mode[words.options.get("response_mode", "NONE")])
        case "body":
            words = Words.of_body(rest)
            return RequestBody(words.texts if words.options.get("pieces") == "true" else words.text, words.end)
        case "trailers":
            return RequestTrailers()
        case "unreadable":
            return Unreadable(rest)
    raise ValueError(f"no such event: {line}")


# ---- actions to lines


def line_of(action: Action) -> str:
    match action:
        case Judge(content, pieces):
            return f"< judge {content.kind.value} {sum(map(len, pieces))}"
        case Decide(facts):
            return f"< decide model={facts.model}" if facts.model is not None else "< decide without model"
        case HeadersReply(direction, mutation):
            return f"< {_response(direction)}headers{_flags(mutation)}"
        case BodyReply(direction, None, _, mutation):
            return f"< {_response(direction)}body continue{_flags(mutation)}"
        case BodyReply(direction, chunk, _, mutation, True):
            return f"< {_response(direction)}body instead {_shown(chunk)}{_flags(mutation)}"
        case BodyReply(direction, chunk, end_of_stream, mutation):
            return f"< {_response(direction)}body {_shown(chunk)} end={str(end_of_stream).lower()}{_flags(mutation)}"
        case TrailersReply(direction):
            return f"< {_response(direction)}trailers"
        case ImmediateReply(error):
            return f"< immediate {error.status} {error.reason}"
        case OwnReply(pieces):
            return f"< own {_shown(pieces)}"
    raise AssertionError(action)


def whole(chunk: Buffer | tuple[Buffer, ...] | None) -> bytes:
    return b"".join(chunk) if isinstance(chunk, tuple) else bytes(chunk or b"")


def _shown(chunk: Buffer | tuple[Buffer, ...] | None) -> str:
    text = whole(chunk)
    return f"'{text.decode()}'" if len(text) <= SHOWN_BYTES else str(len(text))


def _response(direction: Direction) -> str:
    return "response " if direction is Direction.RESPONSE else ""


def _flags(mutation: Mutation | None) -> str:
    if mutation is None:
        return ""
    assert MUTATION.set_headers.items() <= mutation.set_headers.items()
    assert mutation.metadata == MUTATION.metadata
    flags = [" +mutation"]
    flags += [" +no_retry"] if mutation.set_headers.get(NO_RETRY_HEADER) == "1" else []
    flags += [" +clear_route_cache"] if mutation.clear_route_cache else []
    flags += [f" +length={mutation.set_headers['content-length']}"] if "content-length" in mutation.set_headers else []
    return "".join(flags + [f" -{name}" for name in mutation.remove_headers])


# ---- the runner


@dataclass
class Played:
    """A conversation as it went."""

    lines: list[str] = field(default_factory=list)
    received: bytes = b""
    sent: bytes = b""
    answered: bool = False
    renamed: bool = False
    cells: set[tuple[State, Kind, Mode]] = field(default_factory=set)  # of the table of steps, as far as it came by


def play(lines: list[str]) -> Played:
    """Say the gateway's and the decision's lines to an exchange; the same lines with what it really answered."""
    played = Played()
    settings = {}
    for line in lines:
        if line.startswith("= "):
            name, value = line[2:].split(" ", 1)
            settings[name] = value
            played.lines.append(line)
    exchange = Exchange(
        max_body_bytes=int(settings.pop("max_body_bytes", 10 * 2**20)),
        model_header=settings.pop("model_header", "x-gateway-model-name"),
        allowed=Paths(tuple(settings.pop("paths", " ".join(CLIENT_PATHS)).split())),
        early_scan_bytes=int(settings.pop("early_scan_bytes", EARLY_SCAN_BYTES)),
        judged_here_bytes=int(settings.pop("judged_here_bytes", JUDGED_HERE_BYTES)),
    )
    question: Judge | None = None
    assert not settings
    for line in lines:
        if line.startswith("> "):
            event = event_of(line[2:])
            _note_cell(played, exchange, event)
            if isinstance(event, RequestBody):
                played.received += whole(event.chunk)
            actions = exchange.receive(event)
        elif line.startswith("! decided"):
            said = Words.of_headers(line.removeprefix("! decided")).options
            model, named = said.get("model", ""), tuple(filter(None, said.get("named", "").split(",")))
            played.renamed = played.renamed or bool(model)
            actions = exchange.decided(replace(MUTATION, model=model, endpoints=named, is_base=said.get("base") == "true"))
        elif line == "! judged":
            assert question is not None
            actions = judged(exchange, question)
        elif line.startswith("! listed "):
            actions = exchange.answered(Words.of_body(line).texts)
        elif line.startswith("! failed "):
            actions = exchange.failed(BY_NAME[line.removeprefix("! failed ")]("as the conversation says"))
        else:
            continue
        played.lines.append(line)
        played.lines += [line_of(action) for action in actions]
        for action in actions:
            question = action if isinstance(action, Judge) else question
            if isinstance(action, BodyReply) and action.direction is Direction.REQUEST and action.chunk is not None:
                played.sent += whole(action.chunk)
    played.answered = exchange.mode is Mode.FULL_DUPLEX_STREAMED and exchange.state is State.ANSWERED
    return played


def judged(exchange: Exchange, question: Judge) -> list[Action]:
    """Read the body as its judge would, and tell the exchange."""
    try:
        return exchange.judged(question.content.read(whole(question.pieces), 2**20))
    except LoraExtprocError as error:
        return exchange.failed(error)


def _note_cell(played: Played, exchange: Exchange, event: Event) -> None:
    if isinstance(event, RequestHeaders):
        played.cells.add((exchange.state, Kind.HEADERS_END if event.end_of_stream else Kind.HEADERS, event.request_mode))
    elif isinstance(event, RequestBody):
        played.cells.add((exchange.state, Kind.BODY_END if event.end_of_stream else Kind.BODY, exchange.mode))
    elif isinstance(event, RequestTrailers):
        played.cells.add((exchange.state, Kind.TRAILERS, exchange.mode))


def conversation(path: Path) -> list[str]:
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    assert lines[0].startswith("# "), f"{path.name} does not say what it shows"
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_conversation_goes_as_written(path: Path) -> None:
    """Every reply and every question, in order, and nothing besides; what is given back of the body is what came."""
    lines = conversation(path)
    played = play(lines)
    assert played.lines == lines
    if played.answered and not played.renamed:
        assert played.received.startswith(played.sent)


def table() -> Iterator[tuple[State, Kind, Mode]]:
    for state, kinds in REQUEST_STEPS.items():
        for kind, modes in kinds.items():
            yield from ((state, kind, mode) for mode in modes)


def test_every_step_of_the_table_is_in_some_conversation() -> None:
    """A step that no conversation takes is one that nobody has read in its place."""
    seen = {cell for path in FILES for cell in play(conversation(path)).cells}
    missing = [f"{state.name} {kind.name} {mode.name}" for state, kind, mode in table() if (state, kind, mode) not in seen]
    assert not missing
    assert {mode for _, _, mode in table()} == set(SPOKEN_MODES)
