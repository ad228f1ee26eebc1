"""Every failure this project names, with the HTTP answer it becomes. The tree:

    LoraExtprocError
    ├── RequestError                 what the client sent cannot be served
    │   ├── InvalidRequest           400 invalid_request
    │   ├── Forbidden                403 forbidden
    │   ├── UnknownPath              404 unknown_path
    │   ├── BodyTimeout              408 body_timeout         retryable
    │   ├── BodyTooLarge             413 body_too_large
    │   ├── UnsupportedMedia         415 unsupported_media
    │   └── Overloaded               429 overloaded           retryable
    ├── StageError                   the adapter could not be put in place
    │   ├── ModelNotFound            404 model_not_found
    │   ├── InvalidAdapter           422 invalid_adapter
    │   │   ├── AdapterTooLarge      422 invalid_adapter
    │   │   └── AdapterDamaged       422 invalid_adapter      what arrived is not what its origin states
    │   ├── OriginFailed             502 origin_failed        retryable
    │   │   ├── OriginRefused        502 origin_failed        the origin wants other credentials: repeating is useless
    │   │   ├── OriginDown           502 origin_failed        retryable   this node has stopped asking it for a while
    │   │   ├── OriginSlow           502 origin_failed        retryable   it sends less than the settings ask of a transfer
    │   │   └── OriginChanged        502 origin_failed        retryable   it has something else now than it listed
    │   ├── StageDeadline            503 staging              retryable
    │   ├── NoSpace                  503 no_space             retryable
    │   ├── PrefetchGivenUp          503 prefetch_given_up    retryable   (never a client's request: nobody waits for a prefetch)
    │   └── DiskFailed               503 no_space             retryable
    ├── NoEndpoint                   503 no_endpoint          retryable
    │   ├── AnsweredElsewhere        503 no_endpoint          retryable   by an endpoint that was not named, and need not know the adapter
    │   ├── NodeDraining             503 no_endpoint          retryable   it takes nothing new; another node may
    │   └── StagerUnavailable        503 no_endpoint          retryable
    │       └── CredentialsRefused   503 no_endpoint          retryable   it does not know our token, or not yet
    ├── GatewayProtocolError         500 protocol             the gateway sent what ext_proc does not allow, or a mode we do not speak
    ├── EngineUnreachable            503 engine               retryable   the node's engine cannot load the adapter now
    ├── AdapterInUse                 409 in_use               retryable   (an operator's evict, never a client's request)
    ├── NotPermitted                 403 not_permitted        the caller of a control API showed no valid credentials
    └── StartError                   exit code 2: the process cannot start as asked
        └── ConfigError              exit code 2: a setting is wrong

`reason` is the one word that answers, logs, metrics and Envoy's `details` share.
"""

import json
import math
from typing import ClassVar, Self

MAX_MESSAGE_CHARACTERS = 300  # of what a client is shown; a name of 256 bytes and the sentence around it fit


def shortened(text: str) -> str:
    """At most MAX_MESSAGE_CHARACTERS of `text`, without its middle: it begins with the thing and ends with what is wrong, as an engine's complaints do."""
    if len(text) <= MAX_MESSAGE_CHARACTERS:
        return text
    begin = MAX_MESSAGE_CHARACTERS // 3
    return f"{text[:begin]}…{text[begin + 1 - MAX_MESSAGE_CHARACTERS :]}"


class LoraExtprocError(Exception):
    """Base of the tree. The message names the thing and the limit; it is shown to clients, so it holds no path, address or secret."""

    status: ClassVar[int] = 500
    reason: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False
    param: ClassVar[str | None] = None  # the field of the request that is at fault, as OpenAI's clients show it
    retry_after_s: int | None = None  # seconds, for the header of that name
    shared: ClassVar[bool] = True  # True: another node would fail the same way, so trying one is useless

    @property
    def message(self) -> str:
        return shortened(str(self) or self.reason)

    def bare(self) -> Self:
        """The error without the frames that raised it. Frames hold the request's body, and the frames that keep the error make a cycle with it: of a
        rejected request nothing must be left until the collector's next run.
        """
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    def openai_body(self) -> bytes:
        """The error as the OpenAI API words it, so that client libraries raise their own typed exception."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error" if self.status < 500 else "server_error"
        return json.dumps({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.reason}}).encode()


class RequestError(LoraExtprocError):
    """What the client sent cannot be served."""


class InvalidRequest(RequestError):
    """The body is not JSON, lacks `model`, carries it twice, or names it unusably."""

    status, reason = 400, "invalid_request"


class Forbidden(RequestError):
    """Policy does not permit this."""

    status, reason = 403, "forbidden"


class UnknownPath(RequestError):
    """The path is none of `router.paths`."""

    status, reason = 404, "unknown_path"


class BodyTimeout(RequestError):
    """The body stopped arriving, or arrives too slowly to be waited for."""

    status, reason, retryable = 408, "body_timeout", True


class BodyTooLarge(RequestError):
    """The body is over `router.max_body_bytes`."""

    status, reason = 413, "body_too_large"


class UnsupportedMedia(RequestError):
    """The path takes JSON or a form, and the body says that it is something else: nobody can tell which model it names."""

    status, reason = 415, "unsupported_media"


class Overloaded(RequestError):
    """Too many requests are held already."""

    status, reason, retryable, retry_after_s = 429, "overloaded", True, 1


class StageError(LoraExtprocError):
    """The adapter could not be put in place."""


class ModelNotFound(StageError):
    """No origin has it. Remembered for a short time."""

    status, reason, param = 404, "model_not_found", "model"


class InvalidAdapter(StageError):
    """Fetched, but not servable: pickle, broken safetensors, rank, base model, digest. `what` is the word that metrics count it by.

    `stated` is the SHA-256 that the caller had named for whom it was fetched, where it was refused for its digest.
    """

    status, reason, param = 422, "invalid_adapter", "model"

    def __init__(self, message: str = "", what: str = "other") -> None:
        super().__init__(message)
        self.what = what
        self.stated = ""


class AdapterTooLarge(InvalidAdapter):
    """Larger than the disk budget or the size limit: it never fits, whatever is evicted."""

    def __init__(self, message: str = "", what: str = "size") -> None:
        super().__init__(message, what)


class AdapterDamaged(InvalidAdapter):
    """What arrived has another length or digest than its origin states: the transfer or the origin's listing is wrong, not the adapter."""


class OriginFailed(StageError):
    """An origin answered 5xx, refused the credentials or could not be reached. `reached` False: no connection came about, which says nothing of one object."""

    status, reason, retryable = 502, "origin_failed", True
    retry_after_s: int | None = 5

    def __init__(self, message: str = "", retry_after_s: float | None = None, *, reached: bool = True) -> None:
        super().__init__(message)
        self.reached = reached
        self.asked_to_wait_s = retry_after_s  # what the origin itself said, in its Retry-After
        if not self.retryable:
            self.retry_after_s = None
        elif retry_after_s is not None:
            self.retry_after_s = max(1, math.ceil(retry_after_s))


class OriginRefused(OriginFailed):
    """The origin does not accept our credentials, or the artifact is gated."""

    retryable = False
    retry_after_s = None


class OriginDown(OriginFailed):
    """This node has stopped asking the origin for a while. Another node may reach it, or have what it brought."""

    shared = False


class OriginSlow(OriginFailed):
    """It sends less than `min_bytes_per_s`: a transfer that trickles would hold its place for as long as it likes."""


class OriginChanged(OriginFailed):
    """What was listed is not what is there now: to be resolved anew, not repeated."""


class StageDeadline(StageError):
    """The wait is over, the flight is not: the next request is likely to find the adapter."""

    status, reason, retryable, retry_after_s = 503, "staging", True, 2


class NoSpace(StageError):
    """Everything evictable is gone and the rest is leased, pinned or loaded."""

    status, reason, retryable, retry_after_s, shared = 503, "no_space", True, 10, False


class PrefetchGivenUp(StageError):
    """Nobody has asked for it yet, and what it would take is needed by others."""

    status, reason, retryable, retry_after_s, shared = 503, "prefetch_given_up", True, 60, False


class DiskFailed(StageError):
    """The node's disk cannot be written."""

    status, reason, retryable, retry_after_s, shared = 503, "no_space", True, 10, False


class NoEndpoint(LoraExtprocError):
    """No endpoint of the pool is ready."""

    status, reason, retryable, retry_after_s = 503, "no_endpoint", True, 2


class AnsweredElsewhere(NoEndpoint):
    """The gateway reached none of the endpoints that were named to it, and had another answer, which need not know the adapter.

    The endpoints that it passed over count as unreachable by now, so a request that is repeated at once is sent elsewhere.
    """

    retry_after_s = 1


class NodeDraining(NoEndpoint):
    """The node is being emptied, and would have to take the adapter anew."""

    shared = False


class StagerUnavailable(NoEndpoint):
    """The node's stager does not answer."""

    shared = False


class CredentialsRefused(StagerUnavailable):
    """The node's stager does not accept our token. Another may: while a token is rotated, each process reads it at its own time."""


class GatewayProtocolError(LoraExtprocError):
    """The gateway sent a message out of order, or asks for a processing mode that is not spoken here. Its configuration is wrong, not the client."""

    status, reason = 500, "protocol"


class EngineUnreachable(LoraExtprocError):
    """The engine did not answer, or not as a vLLM does. Nothing may be concluded, so nothing may be deleted, and another node is asked."""

    status, reason, retryable, retry_after_s, shared = 503, "engine", True, 5, False
    is_gone = False  # nobody listens at its address: the process has ended, and its requests with it, or has not begun


class AdapterInUse(LoraExtprocError):
    """An operator asked to evict what is leased, pinned or still loaded."""

    status, reason, retryable = 409, "in_use", True


class NotPermitted(LoraExtprocError):
    """The control API wants credentials that the caller did not show, or that nobody configured."""

    status, reason = 403, "not_permitted"


class StartError(LoraExtprocError):
    """The process cannot start as asked: a busy port, a missing program, an unwritable directory."""

    reason = "start"


class ConfigError(StartError):
    """A setting is wrong. The message lists each with its path: `router.placement.table_size: 100 is not prime`."""

    reason = "config"


def _subclasses(cls: type[LoraExtprocError]) -> list[type[LoraExtprocError]]:
    return [cls, *(below for sub in cls.__subclasses__() for below in _subclasses(sub))]


BY_NAME: dict[str, type[LoraExtprocError]] = {cls.__name__: cls for cls in _subclasses(LoraExtprocError)}  # how an error crosses a process boundary
