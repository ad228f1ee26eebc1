"""Sockets that long-running processes listen on."""

import socket

from extproc.process.sockets import listen


def test_accepted_sockets_notice_a_client_that_vanishes() -> None:
    """The options of the listening socket count for what it accepts."""
    with listen("127.0.0.1:0") as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
