"""Sockets that long-running processes listen on, and their log lines."""

import json
import logging
import socket
from pathlib import Path

import pytest

from extproc.errors import StartError
from extproc.process.logs import JsonFormatter
from extproc.process.sockets import listen


def test_accepted_sockets_notice_a_client_that_vanishes() -> None:
    """The options of the listening socket count for what it accepts."""
    with listen("127.0.0.1:0") as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15


def test_a_unix_socket_is_listened_on_by_its_path(tmp_path: Path) -> None:
    """And one that cannot be is named."""
    address = f"unix:{tmp_path / 'api'}"
    with listen(address), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "api"))
        with pytest.raises(StartError, match=f"cannot listen on {address}: Address already in use"):
            listen(address)


@pytest.mark.parametrize(("who", "fields"), [("worker 1", {"process": "worker 1"}), ("", {})])
def test_a_line_of_json_says_which_process_it_is_of(who: str, fields: dict[str, str]) -> None:
    """Where one program has several."""
    record = logging.LogRecord("extproc", logging.INFO, "", 0, "it serves", None, None)
    written = json.loads(JsonFormatter(who).format(record))
    assert {name: value for name, value in written.items() if name != "time"} == {"level": "info", "logger": "extproc", "message": "it serves"} | fields
