"""What router, stagers and command line show each other: a shared token, mutual TLS, both, or neither."""

import hmac
import ipaddress
import os
import ssl
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from .config import RpcSettings
from .errors import StartError

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


def channel(address: str, settings: RpcSettings, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
    """A channel to one stager. Raises StartError if a file cannot be used."""
    if not settings.ca_file:
        return grpc.aio.insecure_channel(address, options=options)
    _check_files(settings)
    credentials = grpc.ssl_channel_credentials(_read(settings.ca_file), _read(settings.key_file), _read(settings.cert_file))
    named = (*options, ("grpc.ssl_target_name_override", settings.server_name)) if settings.server_name else options
    return grpc.aio.secure_channel(address, credentials, options=named)


def call_metadata(settings: RpcSettings) -> tuple[tuple[str, str], ...]:
    """What every call carries."""
    shared = token(settings)
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

    def __init__(self, expected: str) -> None:
        self._expected = expected

    async def intercept_service(self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails) -> Any:
        shown = next((value for key, value in details.invocation_metadata or () if key == TOKEN_METADATA), None)
        if matches(shown, self._expected):
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
