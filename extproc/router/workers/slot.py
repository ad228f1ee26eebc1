"""One worker's place: the process that is in it now, what the process says of itself, and when the next one is started.

    absent ──started──► starting ──says so──► serving ──SIGTERM──► leaving
      ▲                    │                     │                    │
      │◄─ START_S, exit ───┘◄── HUNG_S of ───────┴── exit ────────────┘
      └── a pause, if its lives are short        silence: SIGKILL

A worker proves by a beat every 0.25 s that its event loop runs. Its silence counts only as far as this process was awake itself.
"""

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from ..board import Board, State
from .orders import Order

log = logging.getLogger(__name__)

START_S = 60.0  # imports, on a disk that has to be read first
SILENT_S = 1.0  # after which a worker is given no connection
HUNG_S = 5.0  # after which it is killed. Envoy gives up the connections of a router that answers no ping for 3 s, so nothing is lost then
OVERSLEPT_S = 0.25  # a look that comes so late says that this process was stopped, and what a worker said meanwhile was not heard
STEADY_S = 30.0  # a worker that has served for so long is replaced at once, and its end says nothing of the next one's
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0  # between starts that come to nothing: twice as long each time
STOP_S = 10.0  # beside what a drain may take: for leases to be given back


class Owner(Protocol):
    """Whose slots they are."""

    def begin(self, slot: "Slot", orders: int) -> Sequence[str]:
        """A worker is about to be started, with `orders` as its file of orders; the arguments of its command line."""

    def ended(self, slot: "Slot", why: str) -> None:
        """It has ended. `why` is a word for the metrics, or empty if it was asked to."""


class Slot:
    """Keeps a worker in its place from `start` to `stop`. Each process inherits `files`."""

    def __init__(self, number: int, board: Board, files: Sequence[int], owner: Owner) -> None:
        self.number = number
        self.row = board.row(number)
        self.lives = 0  # processes that were started here
        self.began = 0.0  # when the one that is here now was started, on the monotonic clock
        self.given = 0  # connections, to the one that is here now
        self._board = board
        self._files = files
        self._owner = owner
        self._process: asyncio.subprocess.Process | None = None
        self._orders: socket.socket | None = None
        self._untaken: deque[socket.socket] = deque()  # copies of what was given, as many as the socket of orders holds, some hundred
        self._keeping: asyncio.Task[None] | None = None
        self._draining = False
        self._absent_since: float | None = time.monotonic()
        self.short_lives = 0  # in a row
        self.end = "was not started"  # how the one before ended, in words
        self._follows = True  # what it says of the whole: a new one, that it is ready
        self._killed_for = ""
        self._beats = 0
        self._silent_s = 0.0

    # -- how it is

    @property
    def state(self) -> State | None:
        """None: absent."""
        return None if self._process is None else self.row.state

    @property
    def answers(self) -> bool:
        """Whether its control API may be asked."""
        return self.state in {State.SERVING, State.LEAVING} and self._silent_s < SILENT_S

    @property
    def can_take(self) -> bool:
        """Whether it may be given a connection. Where the whole drains it takes what still comes; where it leaves alone, another does."""
        return self.answers and (self.state is State.SERVING or self._draining)

    @property
    def load(self) -> tuple[int, int, int]:
        """What a new connection is given by: busy connections and all connections, those included that were not counted yet, and those given so far."""
        new = self.given - self.row.counted
        return self.row.busy + new, self.row.connections + new, self.given

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def why_absent(self, after_s: float) -> str | None:
        """In words, if nothing has served here for so long."""
        if self._absent_since is None or time.monotonic() - self._absent_since < after_s:
            return None
        return f"worker {self.number} has not served for {time.monotonic() - self._absent_since:.0f} s: it {self.end}"

    # -- the process

    def start(self) -> None:
        self._keeping = asyncio.create_task(self._keep(), name=f"worker {self.number}")

    async def _keep(self) -> None:
        while True:
            self.began = time.monotonic()
            try:
                served = await self._live()
            except Exception:  # whatever one start stumbles over, the next must come
                log.exception("worker %d", self.number)
                served, self.end = False, "could not be started"
            if self._draining:
                return
            lived_s = time.monotonic() - self.began
            self.short_lives = 0 if served and lived_s >= STEADY_S else self.short_lives + 1
            wait_s = pause_s(self.short_lives)
            log.error("worker %d %s after %.1f s; another is started %s", self.number, self.end, lived_s, f"in {wait_s:g} s" if wait_s else "at once")
            await asyncio.sleep(wait_s)

    async def _live(self) -> bool:
        """One process from its start to its end; whether it ever served."""
        self._killed_for, self._beats, self._silent_s, self.given, self._follows = "", 0, 0.0, 0, True
        self.lives += 1
        try:
            self._orders, theirs = socket.socketpair()
            self._orders.setblocking(False)
            with theirs:
                command = [sys.executable, "-m", "extproc", *self._owner.begin(self, theirs.fileno())]
                process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(), *self._files))
        except OSError as error:
            self.end = f"could not be started: {error.strerror}"
            if self._orders is not None:
                self._orders.close()
            self._owner.ended(self, "died")
            return False
        self._process = process
        code = await process.wait()
        served = self.row.state is not State.STARTING
        self._absent_since = self._absent_since or time.monotonic()
        self.end = self._killed_for or (f"was ended by signal {-code}" if code < 0 else f"ended with code {code}")
        self._let_go()
        self._process = None
        self._board.clear(self.number)
        self._orders.close()
        why = "late" if self._killed_for and not served else "hung" if self._killed_for else "died"
        self._owner.ended(self, "" if self._draining else why)
        return served

    def look(self, passed_s: float) -> None:
        """Time has passed: let go of what was taken, and kill a process that hangs or does not come to serve."""
        self._let_go()
        if self._process is None:
            return
        beats = self.row.beats
        if beats != self._beats or passed_s > OVERSLEPT_S:
            self._silent_s = 0.0
        else:
            self._silent_s += passed_s
        self._beats = beats
        if self.row.state is State.STARTING:
            if time.monotonic() - self.began > START_S:
                self._kill(f"did not serve within {START_S:g} s and was killed")
            return
        self._absent_since = None
        if self._silent_s > HUNG_S:
            self._kill(f"was silent for {HUNG_S:g} s and was killed")

    def _kill(self, why: str = "") -> None:
        self._killed_for = self._killed_for or why
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    # -- orders

    def tell(self, order: Order) -> bool:
        """False if it cannot be told: it is absent, or reads no orders."""
        return self._send(order, [])

    def follow(self, ready: bool) -> None:
        """Have the worker say on the ext_proc port whether the whole is ready, unless it says so already. A new one says that it is."""
        if self.state is State.SERVING and ready != self._follows and self.tell(Order.READY if ready else Order.NOT_READY):
            self._follows = ready

    def give(self, connection: socket.socket) -> bool:
        """Hand a connection over, and keep a copy until it is taken. False if it cannot be."""
        if not self._send(Order.TAKE, [connection.fileno()]):
            return False
        self.given += 1
        self._untaken.append(connection)
        self._let_go()
        return True

    def take_back(self) -> list[socket.socket]:
        """What the worker that ended here had not taken."""
        left, self._untaken = list(self._untaken), deque()
        return left

    def _send(self, order: Order, files: list[int]) -> bool:
        if self._orders is None or self._process is None:
            return False
        try:
            socket.send_fds(self._orders, [order.value], files)
        except OSError:
            return False
        return True

    def _let_go(self) -> None:
        while self._untaken and len(self._untaken) > self.given - self.row.taken:
            self._untaken.popleft().close()

    # -- the end

    def drain(self) -> None:
        """Have the worker drain, and start no other."""
        self._draining = True
        if self._process is None and self._keeping is not None:
            self._keeping.cancel()
        elif self.row.state is State.STARTING or not self.tell(Order.DRAIN):
            self._kill()

    async def stop(self, within_s: float) -> None:
        """Wait for the end of what was told to drain, and kill what takes longer."""
        if self._keeping is None:
            return
        await asyncio.wait({self._keeping}, timeout=within_s)
        if not self._keeping.done():
            log.warning("worker %d did not end within %.0f s and is killed", self.number, within_s)
            self._kill()
        await asyncio.gather(self._keeping, return_exceptions=True)


def pause_s(short_lives: int) -> float:
    """How long to wait after so many short lives in a row, in seconds."""
    return min(FIRST_PAUSE_S * 2.0 ** min(short_lives - 1, 10), LAST_PAUSE_S) if short_lives else 0.0
