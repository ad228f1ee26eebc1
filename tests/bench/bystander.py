"""What others notice: small warm requests at a steady pace, straight to the router and through Envoy, for as long as something else goes on.

Run as a process of its own, before all others where it may, so that it measures the router and not itself. Prints one line per request: the way,
when it was due (CLOCK_MONOTONIC), how long until it was answered, and whether it was answered well.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from .http2_peer import Peer

DIRECT_PAUSE_S = 0.005
ENVOY_PAUSE_S = 0.01
TIMEOUT_S = 60.0


def repeat(way: str, pause_s: float, connect: Callable[[], Callable[[], bool]]) -> None:
    """Ask, wait for the answer, pause; connect anew after a failure."""
    ask: Callable[[], bool] | None = None
    while True:
        due = time.monotonic()
        good = False
        try:
            ask = ask or connect()
            good = ask()
        except OSError:
            ask = None
        os.write(1, f"{way} {due:.6f} {time.monotonic() - due:.6f} {int(good)}\n".encode())  # at once, since two threads write
        time.sleep(pause_s)


def direct(address: str, model: str) -> Callable[[], bool]:
    peer = Peer(address, TIMEOUT_S)
    return lambda: peer.exchange(model, TIMEOUT_S)


def through_envoy(address: str, model: str) -> Callable[[], bool]:
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    body = b'{"messages":[{"role":"user","content":"hi"}],"model":"%s"}' % model.encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    def ask() -> bool:
        connection.sendall(head + body)
        answer = b""
        while not answer.endswith(b"{}"):  # the instant upstream's answer; an error of ours or Envoy's ends otherwise
            more = connection.recv(65536)
            answer += more
            if not more or (b"\r\n\r\n" in answer and not answer.startswith(b"HTTP/1.1 200")):
                raise ConnectionResetError(answer[:12].decode("latin-1"))
        return True

    return ask


def main(router: str, envoy: str, model: str) -> None:
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    threading.Thread(target=repeat, args=("envoy", ENVOY_PAUSE_S, lambda: through_envoy(envoy, model)), daemon=True).start()
    repeat("direct", DIRECT_PAUSE_S, lambda: direct(router, model))


if __name__ == "__main__":
    main(*sys.argv[1:])
