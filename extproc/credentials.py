"""What router, stagers and command line show each other: a shared token, mutual TLS, both, or neither."""

import hmac
import ipaddress
import logging
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from .config.credentials import RpcSettings
from .errors import StartError

log = logging.getLogger(__name__)

LOOK_S = 1.0  # between two looks at whether a file has changed
TOKEN_METADATA = "authorization"  # noqa: S105  # the header's name


def token(settings: RpcSettings) -> str:
    """The shared token; "" without one. Raises StartError if it cannot be read, is empty, or cannot stand in a header."""
    if settings.token_file:
        where, value = f"rpc.token_file {settings.token_file}", _read(settings.token_file).decode("latin-1").strip()
        if not value:
            raise StartError(f"{where} is empty")
    elif settings.token_env:
        where, value = f"rpc.token_env {settings.token_env}", os.environ.get(settings.token_env, "").strip()
        if not value:
            raise StartError(f"rpc.token_env: the environment has no {settings.token_env}")
    else:
        return ""
    if not (value.isascii() and value.isprintable()):
        raise StartError(f"{where} holds more than one line of printable ASCII")
    return value


def are_configured(settings: RpcSettings) -> bool:
    """Whether a caller has to show anything."""
    return bool(settings.token_env or settings.token_file or settings.ca_file)


def is_loopback(address: str) -> bool:
    """Whether only processes of this machine can reach what listens on `host:port`."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def matches(shown: str | bytes | None, expected: str) -> bool:
    """Whether an `authorization` header carries the token; takes equally long wherever it differs."""
    given = shown.decode("latin-1") if isinstance(shown, bytes) else shown or ""
    return hmac.compare_digest(given.encode(), f"Bearer {expected}".encode())


class Tokens:
    """The shared token as it is now and as it was before, read again when its file changes: every process of a fleet reads it at its own time."""

    def __init__(self, settings: RpcSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._stamp = _stamp(settings.token_file)
        self.current = token(settings)
        self.previous = ""
        self._accept_previous_until = float("-inf")
        self._next_look = clock() + LOOK_S

    def look(self, *, at_once: bool = False) -> None:
        """Read the file if it has changed. One that cannot be used now is being replaced: what it held before goes on."""
        now = self._clock()
        if not self._settings.token_file or (now < self._next_look and not at_once):
            return
        self._next_look = now + LOOK_S
        stamp = _stamp(self._settings.token_file)
        if stamp == self._stamp or stamp is None:
            return
        try:
            fresh = token(self._settings)
        except StartError as error:
            log.debug("%s", error)
            return
        self._stamp = stamp
        if fresh != self.current:
            log.info("rpc.token_file %s holds another token now", self._settings.token_file)
            self.previous, self.current = self.current, fresh
            self._accept_previous_until = now + self._settings.token_grace_s

    def accepts(self, shown: str | bytes | None) -> bool:
        """Whether an `authorization` header carries the token, or until `rpc.token_grace_s` after a change the one before. One that fits neither may be
        newer than what was read.
        """
        self.look()
        if self._fits(shown):
            return True
        self.look(at_once=True)
        return self._fits(shown)

    def to_try(self) -> Iterator[tuple[tuple[str, str], ...]]:
        """What a call carries: the token, then, each time it is turned away, another that may be the right one by now, or still."""
        self.look()
        tried = self.current
        yield _metadata(tried)
        self.look(at_once=True)
        if self.current != tried:
            yield _metadata(self.current)
        if self.previous and self.previous != tried:
            yield _metadata(self.previous)

    def _fits(self, shown: str | bytes | None) -> bool:
        return matches(shown, self.current) or (bool(self.previous) and self._clock() < self._accept_previous_until and matches(shown, self.previous))


@dataclass(frozen=True, slots=True)
class Change:
    """`withdraws`: some certificate that was trusted before is not any more."""

    withdraws: bool


class Identity:
    """The files of mutual TLS as they are in use: certificate, key, and whom to trust. Without `rpc.ca_file` there is none. Raises StartError."""

    def __init__(self, settings: RpcSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._next_look = clock() + LOOK_S
        self._stamps = self._look_at_stamps()
        self._files = self._read()

    def look(self) -> Change | None:
        """What has changed since, if anything has and if it can be used: half a pair, or half a file, is being replaced just now."""
        now = self._clock()
        if not self._settings.ca_file or now < self._next_look:
            return None
        self._next_look = now + LOOK_S
        stamps = self._look_at_stamps()
        if stamps == self._stamps:
            return None
        try:
            files = self._read()
        except StartError as error:
            log.debug("%s", error)
            return None
        self._stamps = stamps
        if files == self._files:
            return None
        old, self._files = self._files, files
        log.info("the files of rpc.cert_file, rpc.key_file and rpc.ca_file have changed: new connections use them")
        return Change(withdraws=not _certificates(old[0]) <= _certificates(files[0]))

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """A channel to one stager that shows and trusts what the files say now."""
        if not self._settings.ca_file:
            return grpc.aio.insecure_channel(address, options=options)
        ca, key, cert = self._files
        named = (*options, ("grpc.ssl_target_name_override", self._settings.server_name)) if self._settings.server_name else options
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert), options=named)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        if not self._settings.ca_file:
            return b"", b"", b""
        _check_files(self._settings)
        return _read(self._settings.ca_file), _read(self._settings.key_file), _read(self._settings.cert_file)

    def _look_at_stamps(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in (self._settings.ca_file, self._settings.key_file, self._settings.cert_file))


def _certificates(pem: bytes) -> set[bytes]:
    return set(re.findall(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pem, re.DOTALL))


def _stamp(path: str) -> tuple[int, ...] | None:
    """What tells one content of a file from a later one; None if there is no file."""
    try:
        stat = os.stat(path)  # noqa: PTH116  # of "", too
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size


def _metadata(shared: str) -> tuple[tuple[str, str], ...]:
    return ((TOKEN_METADATA, f"Bearer {shared}"),) if shared else ()


def server_credentials(settings: RpcSettings) -> grpc.ServerCredentials | None:
    """TLS that wants a certificate of every client; the files are read again for new connections. None: plaintext. Raises StartError."""
    if not settings.ca_file:
        return None

    def load() -> Any:
        _check_files(settings)
        pair = (_read(settings.key_file), _read(settings.cert_file))
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=_read(settings.ca_file))

    def reload() -> Any:
        try:
            return load()
        except StartError:
            return None  # keep what there is: the files are being replaced just now

    return grpc.dynamic_ssl_server_credentials(load(), reload, require_client_authentication=True)


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Turns away every call that does not carry the token."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails) -> Any:
        shown = next((value for key, value in details.invocation_metadata or () if key == TOKEN_METADATA), None)
        if self._tokens.accepts(shown):
            return await continuation(details)
        handler = await continuation(details)
        return _turned_away(handler)


def _turned_away(handler: Any) -> Any:
    async def unary(_request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid token is needed: rpc.token_env or rpc.token_file")

    async def stream(_request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid token is needed: rpc.token_env or rpc.token_file")
        yield

    if handler is None:
        return None
    make = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
    return make(stream if handler.response_streaming else unary, handler.request_deserializer, handler.response_serializer)


def _check_files(settings: RpcSettings) -> None:
    """Whether key and certificate are a pair, and the CA's file holds certificates: gRPC would only say that no connection comes about."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.cert_file, settings.key_file, password="")  # an encrypted key is refused, not asked about
    except OSError as error:
        raise StartError(f"rpc: {settings.cert_file}, {settings.key_file}: {error.strerror or error}") from None
    try:
        context.load_verify_locations(settings.ca_file)
    except OSError as error:
        raise StartError(f"rpc: {settings.ca_file}: {error.strerror or error}") from None


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartError(f"rpc: {path} cannot be read: {error.strerror}") from None
