"""A gRPC server with our limits, for what is not on the path of requests."""

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from ..errors import StartError

MAX_MESSAGE_BYTES = 64 * 2**20  # a Claim of 5,000 leases with long names has 3 MiB; gRPC's default ends at 4


def grpc_server(interceptors: Sequence[Any] = ()) -> grpc.aio.Server:
    """A grpc.aio server with our transport limits, not bound yet."""
    return grpc.aio.server(
        interceptors=interceptors,
        options=(
            ("grpc.so_reuseport", 0),  # a second process on a busy port must fail, not share it
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 1_000),  # a client's keepalive comes every two seconds
        ),
    )


def listen_grpc(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> None:
    """Bind `server`, with TLS if there are credentials. Raises StartError, naming the address, if it cannot be had."""
    try:
        port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if port == 0:
        raise StartError(f"cannot listen on {address}: it is in use or not an address of this machine")
