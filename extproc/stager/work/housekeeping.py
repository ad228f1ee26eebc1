"""What a node does by itself: the disk's health, room in advance, what others put into the directory, what watchers are told of room and demand.

Each that may wait has a task of its own: a disk that hangs, an engine that lets nothing go and a scan of terabytes hold up nobody else.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ...errors import DiskFailed, NoSpace
from ..disk.adopt import Adopter
from ..node import Node
from ..threads import Threads
from .kept import Kept
from .repair import Repair
from .room import Room

log = logging.getLogger(__name__)

DISK_PATIENCE_S = 10.0  # a disk that has not answered a look by then hangs; one that is only busy takes a second at worst
FIRST_SCAN_S = 10.0  # the start waits that long for what others put here; what takes longer to hash is served when it is hashed
SCAN_SHARE = 0.01  # of a core that looks for what others put here may take: where one takes long, the next is later than `scan_s`
CAUSE = "disk"  # of not being ready


class Housekeeping:
    """`open` begins it, every `every_s` seconds from then on."""

    def __init__(self, node: Node, adopter: Adopter, room: Room, repair: Repair, kept: Kept) -> None:
        self._node = node
        self._adopter = adopter
        self._room = room
        self._repair = repair
        self._kept = kept
        self._looking = Threads(1, "disk check")  # its own, so that a disk whose threads are all busy is not taken for one that hangs
        self._tasks: dict[str, asyncio.Task[None]] = {}  # what is going on -> its task, the last of each
        self._loop: asyncio.Task[None] | None = None
        self._space_told: tuple[int, int] = (-1, -1)
        self._demand_told: tuple[int, int] = (0, 0)
        self._next_scan = 0.0

    async def scan_first(self) -> None:
        """Look for what others put here, and wait for what is found within FIRST_SCAN_S."""
        if self._node.settings.adopt:
            await asyncio.wait({self._start_scan()}, timeout=FIRST_SCAN_S)

    def open(self, every_s: float) -> None:
        self._loop = asyncio.create_task(self._keep(every_s), name="housekeeping")

    async def close(self) -> None:
        for task in (self._loop, *self._tasks.values()):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._looking.close()

    async def _keep(self, every_s: float) -> None:
        while True:
            try:
                self._start("disk", self._check_disk)
                self._room.keep()
                self._start("refused", self._kept.remove_refused)
                if self._node.settings.adopt and self._node.clock() >= self._next_scan:
                    self._start_scan()
                self._tell_space()
                self._tell_demand()
            except Exception:  # whatever one round stumbles over, the next must come
                log.exception("housekeeping")
            await asyncio.sleep(every_s)

    def _start(self, what: str, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Do it in a task of its own, unless the last one is still at it."""

        async def run() -> None:
            try:
                await work()
            except Exception:
                log.exception("%s", what)

        if what not in self._tasks or self._tasks[what].done():
            self._tasks[what] = asyncio.create_task(run(), name=what)
        return self._tasks[what]

    def _start_scan(self) -> asyncio.Task[None]:
        self._next_scan = self._node.clock() + self._node.settings.scan_s
        return self._start("scan", self._scan)

    async def _scan(self) -> None:
        took_s = await self._adopter.scan()
        self._next_scan = max(self._next_scan, self._node.clock() + took_s / SCAN_SHARE)

    # -- the disk

    async def _check_disk(self) -> None:
        """Whether the directory is there, is ours, can be read and, after a failure, written. The node is not ready while it is not, and says why."""
        readiness, store = self._node.readiness, self._node.store
        is_ill = CAUSE in readiness
        checking = asyncio.ensure_future(self._looking.run(store.check, writing=is_ill))
        done, _ = await asyncio.wait({checking}, timeout=DISK_PATIENCE_S)
        if not done:
            readiness.set(CAUSE, f"the node's disk has not answered for {DISK_PATIENCE_S:g} s")
        try:
            if not await checking:
                readiness.set(CAUSE, "the node's directory was removed, or another is in its place")
                await self._repair.reconcile(await self._node.disk.run(store.take_again))
                self._next_scan = 0.0  # what others had put there may be gone as well
                is_ill = True
        except NoSpace:
            pass  # it can be written, when there is room
        except DiskFailed as error:
            readiness.set(CAUSE, error.message)
            return
        if is_ill:
            readiness.set(CAUSE, None)

    # -- what watchers are told

    @property
    def demand(self) -> tuple[int, int]:
        """How many adapters are leased, and how many the engine keeps in memory (0: not known)."""
        node = self._node
        return node.holdings.index.in_demand(node.clock()), node.engine.limits.max_cpu_loras

    def _tell_space(self) -> None:
        index = self._node.holdings.index
        if (index.used_bytes, index.reserved_bytes) != self._space_told:
            self._space_told = (index.used_bytes, index.reserved_bytes)
            self._node.changes.tell("space")

    def _tell_demand(self) -> None:
        if self.demand != self._demand_told:
            self._demand_told = self.demand
            self._node.changes.tell("demand")
