"""The process above a router's workers: it has the ports, gives connections away, replaces workers, and starts and stops the whole."""

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ...config.credentials import TlsSettings
from ...config.settings import Settings
from ...errors import StartError
from ...metrics import WorkersMetrics
from ...process.http import HttpServer
from ...process.sockets import listen
from ..board import Board, State
from ..health import Health
from ..tls import Certificate, self_signed
from ..transport import Listener
from .front import Front, WorkerApi
from .orders import Order
from .slot import STOP_S, Slot

log = logging.getLogger(__name__)

LOOK_S = 0.1  # how often each worker is looked at; a look costs some microseconds, and a start, which takes seconds, is seen as late
ACCEPTS_PER_TURN = 64  # then others have their turn
ABSENT_S = 15.0  # a place that is empty for so long makes the whole not ready: a worker is back within three seconds if it can be
MAX_PROBE_BYTES = 2**20  # of a message to the port for probes: a question has a few
UNEVEN_S = 2.0  # for so long, before one connection is moved: workers count theirs once a second, each at its own time


class Workers:
    """One router of `count` workers. `start` returns when all of them serve; `stop` drains."""

    def __init__(self, settings: Settings, count: int) -> None:
        self._settings = settings
        self.metrics = WorkersMetrics()
        self._board = Board.of(count)
        self._files = contextlib.ExitStack()
        self._files.callback(self._board.close)
        self._settings_file, inherited = self._for_workers(count)
        self._directory = self._place_for_apis() if settings.router.http_listen else None
        self.slots = [Slot(number, self._board, inherited, self) for number in range(count)]
        self._apis: dict[int, WorkerApi] = {}  # by slot
        self._closing: set[asyncio.Task[None]] = set()  # of APIs whose worker has ended
        self.front = Front(self.metrics, self._why_not_ready, self._answering)
        self._health = Health()
        self._has_started = False
        self._is_ready = False
        self._states: list[State | None] = []  # by slot, at the last look
        self._draining = False
        self._listening: socket.socket | None = None
        self._is_accepting = False
        self._probes: Listener | None = None
        self._http: HttpServer | None = None
        self._looking: asyncio.Task[None] | None = None
        self._uneven_since: float | None = None

    @property
    def address(self) -> str:
        """host:port of ext_proc, as it was bound."""
        assert self._listening is not None, "only what listens has an address"
        host, port, *_ = self._listening.getsockname()
        return f"{host}:{port}"

    # -- what workers are started with

    def _for_workers(self, count: int) -> tuple[int, tuple[int, ...]]:
        """The file of the settings, as they were read once, and all files that each worker inherits: that, the board, and both halves of a certificate that
        is made here. Raises StartError for a certificate that cannot be used.
        """
        router = self._settings.router
        tls = router.tls
        made: tuple[int, ...] = ()
        if tls.mode == "files":
            Certificate(tls)  # raises now what would keep each worker from starting
        elif tls.mode == "self-signed":
            made = tuple(self._file_of(text) for text in self_signed())
            tls = TlsSettings(mode="files", cert_file=f"/proc/self/fd/{made[0]}", key_file=f"/proc/self/fd/{made[1]}")
        own = router.model_copy(update={"tls": tls, "judges": max(1, router.judges // count)})
        settings = self._file_of(self._settings.model_copy(update={"router": own}).model_dump_json().encode())
        return settings, (settings, self._board.file, *made)

    def _file_of(self, content: bytes) -> int:
        file = os.memfd_create("worker")
        self._files.callback(os.close, file)
        os.write(file, content)
        return file

    def _place_for_apis(self) -> Path:
        """A directory for the sockets of the workers' control APIs, which is this user's alone."""
        try:
            return Path(self._files.enter_context(tempfile.TemporaryDirectory(prefix="lora-extproc-", ignore_cleanup_errors=True)))
        except OSError as error:
            raise StartError(f"router.workers: no directory can be made for the workers' control APIs: {error.strerror}; TMPDIR says where") from None

    # -- for its slots

    def begin(self, slot: Slot, orders: int) -> Sequence[str]:
        """Make a place for the new worker's control API. It has a path of its own for each life: what an earlier one said is never taken for its word."""
        path = ""
        if self._directory is not None:
            path = str(self._directory / f"{slot.number}.{slot.lives}")
            self._apis[slot.number] = WorkerApi(path)
            self.front.sums.begin(path)
        return ("router-worker", *map(str, (slot.number, os.getpid(), orders, self._board.file, self._settings_file)), path)

    def ended(self, slot: Slot, why: str) -> None:
        """Remember what the worker had counted, and give to others what it had not taken."""
        if why:
            self.metrics.ended.labels(why).inc()
        api = self._apis.pop(slot.number, None)
        if api is not None:
            self.front.sums.end(api.path)
            Path(api.path).unlink(missing_ok=True)
            closing = asyncio.create_task(api.close(), name="closing")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        for connection in slot.take_back():
            self._give(connection)

    # -- the life of the whole

    async def start(self) -> None:
        """Bind everything, start all workers, and accept when all of them serve. Raises StartError for an address that cannot be had, and if one does not."""
        router = self._settings.router
        if router.http_listen:
            self._http = HttpServer(self.front.app, router.http_listen)
        self._listening = listen(router.listen)
        self._listening.setblocking(False)
        if router.health_listen:
            self._probes = Listener(router.health_listen, self._health.methods(), router.max_streams, max_message_bytes=MAX_PROBE_BYTES)
            await self._probes.start()
        if self._http is not None:
            self._http.start()
            self.front.start()
        for slot in self.slots:
            slot.start()
        self._looking = asyncio.create_task(self._look_on(), name="workers")
        while not all(slot.state is State.SERVING for slot in self.slots):
            await asyncio.sleep(LOOK_S)
            for slot in self.slots:
                if slot.short_lives:
                    raise StartError(f"worker {slot.number} of the router {slot.end} before it served; the lines above say why")
        self._has_started = True
        log.info("router serves ext_proc on %s with %d workers", router.listen, len(self.slots))

    async def stop(self) -> None:
        """As one process does it: all workers say NOT_SERVING, take what still comes for `lameduck_s`, and let exchanges finish for `drain_s`."""
        router = self._settings.router
        self._draining = True
        self._tell_readiness()
        for slot in self.slots:
            slot.drain()
        if self._has_started:
            await asyncio.sleep(router.lameduck_s)
        self._accept_if(False)
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        self._health.drain()
        probes = [self._probes.stop(router.drain_s)] if self._probes is not None else []
        await asyncio.gather(*(slot.stop(router.drain_s + STOP_S) for slot in self.slots), *probes)
        if self._looking is not None:
            self._looking.cancel()
        await self.front.stop()
        if self._http is not None:
            await self._http.stop()
        await asyncio.gather(*self._closing)
        self._files.close()

    async def _look_on(self) -> None:
        before = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            try:
                for slot in self.slots:
                    slot.look(now - before)
                self._accept_if(self._has_started and any(slot.can_take for slot in self.slots))
                self._tell_readiness()
                self._move_one(now)
            except Exception:
                log.exception("the workers could not be looked at")
            before = now

    # -- readiness

    def _why_not_ready(self) -> str | None:
        if self._draining:
            return "draining"
        if not self._has_started:
            return "not all workers have started"
        if not any(slot.can_take for slot in self.slots):
            return "no worker serves"
        return next((why for slot in self.slots if (why := slot.why_absent(ABSENT_S)) is not None), None)

    def _tell_readiness(self) -> None:
        why = self._why_not_ready()
        states = [slot.state for slot in self.slots]
        if states != self._states:
            self._states = states
            for state in (*State, None):
                self.metrics.workers.labels("absent" if state is None else state.name.lower()).set(states.count(state))
        ready = why is None
        if ready != self._is_ready:
            self._is_ready = ready
            self._health.set_serving(ready)
            if not self._draining:
                log.info("the router is ready") if ready else log.error("the router is not ready: %s", why)
        if not self._draining:
            for slot in self.slots:
                slot.follow(ready)

    # -- connections

    def _accept_if(self, somebody_takes: bool) -> None:
        """Accept as long as there is somebody who takes; else connections wait in the port's queue, and none is lost."""
        if somebody_takes == self._is_accepting or self._listening is None:
            return
        loop = asyncio.get_running_loop()
        self._is_accepting = somebody_takes
        if somebody_takes:
            loop.add_reader(self._listening, self._accept)
        else:
            loop.remove_reader(self._listening)

    def _accept(self) -> None:
        assert self._listening is not None
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, _ = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor is left, as a rule: after the next look there may be
                log.error("a connection could not be accepted: %s", error.strerror)
                self._accept_if(False)
                return
            self._give(connection)

    def _give(self, connection: socket.socket) -> None:
        """To the worker with the fewest busy connections, and among those the one with the fewest connections."""
        for slot in sorted((slot for slot in self.slots if slot.can_take), key=lambda slot: slot.load):
            if slot.give(connection):
                self.metrics.given.inc()
                return
        connection.close()  # its client makes another

    def _move_one(self, now: float) -> None:
        """Where one worker has had two busy connections more than another for UNEVEN_S, one of them is to go there."""
        serving = [slot for slot in self.slots if slot.can_take]
        most, least = (choose(serving, key=lambda slot: slot.load, default=None) for choose in (max, min))
        if self._draining or most is None or least is None or most.row.busy - least.load[0] < 2:
            self._uneven_since = None
        elif self._uneven_since is None:
            self._uneven_since = now
        elif now - self._uneven_since >= UNEVEN_S and most.tell(Order.GIVE_ONE_AWAY):
            self._uneven_since = None
            self.metrics.moved.inc()

    def _answering(self) -> list[WorkerApi]:
        """The longest-lived first: one that has only just begun has not heard of all stagers yet."""
        return [self._apis[slot.number] for slot in sorted(self.slots, key=lambda slot: slot.began) if slot.answers and slot.number in self._apis]


async def serve(settings: Settings, count: int, stop: asyncio.Event) -> None:
    """Run a router of `count` workers until `stop` is set, which may be before all have started."""
    workers = Workers(settings, count)
    starting = asyncio.create_task(workers.start(), name="start")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await stopping
    finally:
        for task in (starting, stopping):
            task.cancel()
        await workers.stop()
