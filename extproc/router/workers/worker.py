"""A worker's process: a router without a port, which takes connections and orders from its parent over one socket."""

import asyncio
import ctypes
import logging
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ...config.settings import Settings
from ...process.sockets import UNIX
from ..board import Board, Row, State
from ..server import Server
from .orders import Order

log = logging.getLogger(__name__)

BEAT_S = 0.25  # how often a worker shows that its event loop runs
COUNT_BEATS = 4  # after so many it counts its connections: once a second
_PR_SET_PDEATHSIG = 1  # prctl(2): "Set the parent-death signal of the calling process"


@dataclass(frozen=True)
class Inherited:
    """What a worker is started with."""

    settings: Settings
    row: Row
    orders: socket.socket


def inherited(number: int, parent: int, orders: int, board: int, settings: int, api: str) -> Inherited:
    """From the arguments that `Slot` starts the process with: which worker it is, its parent's process, three files by number, and where its control API
    is to be. Empty: none.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        _die()
    chosen = Settings.model_validate_json(os.pread(settings, os.fstat(settings).st_size, 0))
    own = chosen.router.model_copy(update={"health_listen": "", "http_listen": f"{UNIX}{api}" if api else ""})
    commands = socket.socket(fileno=orders)
    commands.setblocking(False)
    return Inherited(chosen.model_copy(update={"router": own}), Board(board).row(number), commands)


async def work(worker: Inherited, stop: asyncio.Event, clusters: Mapping[str, bytes] | None = None) -> None:
    """Serve until `stop` is set or the parent says so, then drain. `clusters` as a Server takes them."""
    row, loop = worker.row, asyncio.get_running_loop()
    server = Server(worker.settings, clusters, row)
    beating = asyncio.create_task(_beat(server, row), name="beat")
    try:
        await server.start()
        row.become(State.SERVING)
        loop.add_reader(worker.orders, _obey, worker.orders, server, row, stop)
        await stop.wait()
        row.become(State.LEAVING)
    finally:
        await server.stop()
        beating.cancel()
        loop.remove_reader(worker.orders)


async def _beat(server: Server, row: Row) -> None:
    while True:
        row.count(*server.count_connections())
        for _ in range(COUNT_BEATS):
            row.beat()
            await asyncio.sleep(BEAT_S)


def _obey(orders: socket.socket, server: Server, row: Row, stop: asyncio.Event) -> None:
    """Carry out the next order."""
    try:
        said, files, _, _ = socket.recv_fds(orders, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return
    if not said:  # the parent is gone
        _die()
    match Order(said):
        case Order.TAKE:
            row.take()
            if files:
                server.take(socket.socket(fileno=files[0]))
            else:
                log.error("a connection is closed: this process has no file descriptor left for it")
        case Order.GIVE_ONE_AWAY:
            server.give_one_away()
        case Order.READY:
            server.follow_readiness(ready=True)
        case Order.NOT_READY:
            server.follow_readiness(ready=False)
        case Order.DRAIN:
            stop.set()


def _die() -> None:
    """As the kernel ends a worker whose parent has died: whoever starts the router anew finds nothing of the old one."""
    os.kill(os.getpid(), signal.SIGKILL)
