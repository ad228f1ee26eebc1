"""The nouns of an exchange: what the gateway shows, what it is told, and the one question in between.

Values: nobody changes one once it is sent. They are not declared frozen, because that triples the cost of making one, and every request makes ten.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..errors import LoraExtprocError
from .content import Content
from .decision import Facts
from .pieces import Buffer, Pieces


class Mode(Enum):
    """Envoy's body send modes, as `protocol_config` of the first message names them."""

    __hash__ = object.__hash__  # members are compared by identity; Enum's own hash is a call of Python code for every look into a table

    NONE = 0
    STREAMED = 1
    BUFFERED = 2
    BUFFERED_PARTIAL = 3
    FULL_DUPLEX_STREAMED = 4
    GRPC = 5


SPOKEN_MODES = (Mode.FULL_DUPLEX_STREAMED, Mode.BUFFERED, Mode.NONE)
REFUSED_MODES = {
    # Seen on 1.36.4 and 1.40.0, with send_body_without_waiting_for_header_response and a buffer of 1 MB: 1.3 to 1.8 of 5 MB were shown, then none.
    Mode.STREAMED: "while its headers are held, Envoy stops showing a body at its buffer limit, and a model behind that is never seen",
    Mode.BUFFERED_PARTIAL: "it shows only the beginning of a large body, which cannot be judged as a whole",
    Mode.GRPC: "it shows gRPC messages, not a body",
}


# ---- what the gateway shows -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class RequestHeaders:
    headers: Mapping[str, str]  # names in lower case; of repeated ones the first
    end_of_stream: bool
    request_mode: Mode = Mode.FULL_DUPLEX_STREAMED
    response_mode: Mode = Mode.NONE
    subset: tuple[str, ...] | None = None


@dataclass(slots=True)
class RequestBody:
    chunk: bytes | tuple[Buffer, ...]  # a large one in the pieces it came in
    end_of_stream: bool


@dataclass(slots=True)
class RequestTrailers:
    pass


@dataclass(slots=True)
class ResponseHeaders:
    end_of_stream: bool
    served: str = ""  # the endpoint that served, where the gateway tells it
    status: int = 0  # of the response; 0: not shown


@dataclass(slots=True)
class ResponseBody:
    chunk: bytes
    end_of_stream: bool


@dataclass(slots=True)
class ResponseTrailers:
    pass


@dataclass(slots=True)
class Unreadable:
    """A message that could not be decoded, or of a kind that does not exist."""

    why: str


Event = RequestHeaders | RequestBody | RequestTrailers | ResponseHeaders | ResponseBody | ResponseTrailers | Unreadable


# ---- replies: what the gateway is told; and the one question to the caller -----------------------------------------------------------------


class Direction(Enum):
    __hash__ = object.__hash__  # as Mode's

    REQUEST = "request"
    RESPONSE = "response"


@dataclass(slots=True)
class Mutation:
    """What changes on the request: headers to set and to remove, dynamic metadata by namespace, and whether the route is chosen anew."""

    set_headers: Mapping[str, str] = field(default_factory=dict)
    remove_headers: tuple[str, ...] = ()
    metadata: Mapping[str, Mapping[str, str | float]] = field(default_factory=dict)
    clear_route_cache: bool = False
    model: str = ""  # what the body's `model` is to be instead; "": as it is
    endpoints: tuple[str, ...] = ()  # the addresses that may answer, best first
    is_base: bool = False  # for a base model, which every endpoint of the pool has
    encoded: bytes = field(default=b"", init=False, repr=False, compare=False)  # the reply that carries it, once the wire has written it


@dataclass(slots=True)
class HeadersReply:
    direction: Direction
    mutation: Mutation | None = None


@dataclass(slots=True)
class BodyReply:
    """Without a chunk: let the body that Envoy holds go on. With one: this is (a part of) the body; if it `replaces`, instead of what Envoy holds."""

    direction: Direction
    chunk: Pieces | None = None
    end_of_stream: bool = False
    mutation: Mutation | None = None
    replaces: bool = False


@dataclass(slots=True)
class TrailersReply:
    direction: Direction


@dataclass(slots=True)
class ImmediateReply:
    error: LoraExtprocError
    notes: Mapping[str, str | float] = field(default_factory=dict)  # for the access log, beside the reason; filled in by who knows them
    headers: Mapping[str, str] = field(default_factory=dict)  # beside the error's own; as the notes


@dataclass(slots=True)
class OwnReply:
    """The request is answered here, and well: status 200, with a JSON body."""

    body: tuple[Buffer, ...]  # in pieces: a list of models has megabytes
    notes: Mapping[str, str | float] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


Reply = HeadersReply | BodyReply | TrailersReply | ImmediateReply | OwnReply


@dataclass(slots=True)
class Judge:
    """What does this body say? The caller answers with `judged` or `failed`. Only asked for bodies that take more than a moment to read."""

    content: Content
    pieces: tuple[Buffer, ...]


@dataclass(slots=True)
class Decide:
    """Where to? The caller answers with `decided` or `failed`, now or later; the body may still be arriving."""

    facts: Facts


Action = Reply | Judge | Decide
