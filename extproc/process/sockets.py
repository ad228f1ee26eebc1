"""Listening sockets, and how long their connections may be silent."""

import socket

from ..errors import StartError

LISTEN_BACKLOG = 1024
UNIX = "unix:"
# Accepted sockets inherit these. A client's machine that vanishes says nothing: a connection without traffic is asked for after 15 s, and one whose bytes
# are not acknowledged, or not taken, for 20 s is given up.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000),
)


def listen(address: str) -> socket.socket:
    """A listening TCP socket for `host:port`, or a Unix one for `unix:/path`. Raises StartError, naming the address, if it cannot be had."""
    if address.startswith(UNIX):
        return _listen_unix(address)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        listening = socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise StartError(f"cannot listen on {address}: {error.strerror}") from None
    for level, option, value in _KEEPALIVE:
        listening.setsockopt(level, option, value)
    return listening


def _listen_unix(address: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(address.removeprefix(UNIX))
        listening.listen(LISTEN_BACKLOG)
    except OSError as error:
        listening.close()
        raise StartError(f"cannot listen on {address}: {error.strerror or error}") from None
    return listening
