"""A node that is to be emptied: it goes on with what it serves, takes nothing new, and says when nobody needs it any longer.

| asked of a node that drains | answer |
| --- | --- |
| an adapter that somebody leases, or that the engine has in memory | leased, for LEASE_S at most |
| any other adapter | NodeDraining: routers ask the next candidate |
| a claim, a release, a peer's Find and Read | as ever: successors copy from here |

A router that knows of the drain renews until a successor is warm, then gives its lease back; one that does not renews as long as it has requests, and only
the end of the drain's time parts it from the node. Leases are short, so that the node is empty soon after the last of either; those from before the drain are
given back, or run out. The node is empty when nothing is leased, and the engine had no request QUIET_S after the last lease has ended: what was sent under
a lease has arrived by then.

An operator's drain is written down and outlives the stager; the node is ready meanwhile, for what it serves. The drain of a stager that was told to stop ends
with it: the next one serves.
"""

import asyncio
import logging

from ...client import Drained
from ...core.artifact import AdapterName
from ...errors import DiskFailed, NodeDraining, NoSpace
from ..engine.meter import Meter
from ..engine.names import IN_TRANSIT_S
from ..node import Node

log = logging.getLogger(__name__)

DRAIN_FILE = ".drain.json"  # {"why": ...}, or null: not drained
CAUSE = "stopping"  # of not being ready
STOPPING = "the stager is stopping"
LEASE_S = 15.0  # routers renew after half of it, so a busy one asks every 7 s for each adapter, and the node is empty 15 s after the last answer
LOOK_S = 0.25  # between two looks at what is leased and at work
QUIET_S = IN_TRANSIT_S
FIRST_LOOK_S = 1.0  # that an answer waits for the first of them
MAX_WHY = 200  # characters of an operator's reason, which routers log


class Drain:
    """One node's. `open` takes up what an earlier process was told."""

    def __init__(self, node: Node, meter: Meter) -> None:
        self._node = node
        self._meter = meter
        self._asked: str | None = None  # the operator's reason; None: it was not asked for
        self._stops = False  # the process ends
        self._told = ""  # the sentence that watchers were told last
        self._looked = asyncio.Event()  # since it began
        self._emptied = asyncio.Event()
        self._writing = asyncio.Lock()  # else of two wishes at once the older may be written last
        self._following: asyncio.Task[None] | None = None

    @property
    def is_on(self) -> bool:
        """Whether the node takes nothing new."""
        return self._stops or self._asked is not None

    @property
    def is_empty(self) -> bool:
        """Whether it drains, and nobody needs it any longer."""
        return self.is_on and self._emptied.is_set()

    @property
    def why(self) -> str:
        """A sentence for routers and people; "": it does not drain."""
        if self._stops:
            return STOPPING
        return "" if self._asked is None else f"the node is drained{f': {self._asked}' if self._asked else ''}"

    @property
    def state(self) -> Drained:
        """How far it is. Requests that the engine does not tell count as none, and do not make the node empty."""
        now = self._node.clock()
        work = self._meter.reading.work if self._meter.reading is not None else None
        leased = self._node.holdings.index.in_demand(now)
        return Drained(self.is_on, self.is_empty, leased, work.requests if work is not None else 0.0)

    async def open(self) -> None:
        """Drain on, where an operator has asked an earlier process to."""
        try:
            written = await self._node.disk.run(self._node.store.read_json, DRAIN_FILE)
        except (ValueError, RecursionError, OSError) as error:
            log.error("%s cannot be read (%s): if this node was drained, say so again", DRAIN_FILE, error)
            return
        if isinstance(written, dict):
            self._asked = _shown(str(written.get("why", "")))
            self._changed()

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    async def begin(self, why: str) -> Drained:
        """Take nothing new, until `end` or an operator's next word. Counts at once, whether or not it can be written down."""
        if self._asked is None:
            log.warning("the node is drained: %s", _shown(why) or "no reason was given")
        self._asked = _shown(why)
        self._changed()
        await self._write()
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._looked.wait()
        except TimeoutError:
            pass
        return self.state

    async def end(self) -> Drained:
        """Take what comes again, unless the stager is stopping."""
        if self._asked is not None:
            log.info("the node is not drained any more")
        self._asked = None
        self._changed()
        await self._write()
        return self.state

    def stop(self) -> None:
        """Tell routers that this node will be gone soon."""
        self._stops = True
        self._changed()

    async def until_empty(self, timeout_s: float) -> None:
        """Wait until nobody needs the node, or its engine is gone, at most so long."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + timeout_s
        while not (self.is_empty or self._has_no_engine_left()) and (left_s := ends - loop.time()) > 0:
            try:
                async with asyncio.timeout(min(LOOK_S, left_s)):
                    await self._emptied.wait()
            except TimeoutError:
                continue
        state = self.state
        if not state.empty and timeout_s:
            log.warning("the node is not empty: %d adapters are leased, and the engine works on %g requests", state.leased, state.requests)

    def _has_no_engine_left(self) -> bool:
        """Whether there was an engine, and it is gone: whoever leases something here has no use of it."""
        return self._node.engine.exists and self._meter.reading is not None and self._meter.reading.is_gone

    def check(self, name: AdapterName) -> None:
        """Raises NodeDraining for an adapter that the node would have to take anew."""
        if self.is_on and not self._serves(name):
            raise NodeDraining(f"{name}: this node drains, and takes no adapter that it does not serve already")

    @property
    def lease_s(self) -> float:
        """How long whoever asks now may rely on the answer."""
        return min(self._node.settings.lease_s, LEASE_S) if self.is_on else self._node.settings.lease_s

    def _serves(self, name: AdapterName) -> bool:
        """Whether it is leased or warm. Where no engine of ours reads the directory, whatever is in it may be served."""
        node, named = self._node, self._node.holdings.get(name)
        if named is None:
            return False
        is_warm = not node.engine.exists or node.loads.in_memory(name, named.id)
        return is_warm or node.holdings.index.is_leased(named.id, node.clock())

    def _changed(self) -> None:
        """What was asked for has changed: say so, and look at what is left, or look no more."""
        readiness = self._node.readiness
        before = readiness.not_ready
        readiness.set(CAUSE, STOPPING if self._stops else None)
        if self.why != self._told and readiness.not_ready == before:
            self._node.changes.tell("node")
        self._told = self.why
        if self.is_on and self._following is None:
            self._emptied.clear()
            self._looked.clear()
            self._following = asyncio.create_task(self._follow(), name="drain")
        elif not self.is_on and self._following is not None:
            self._following.cancel()
            self._following = None

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        index = self._node.holdings.index
        free_at: float | None = None  # when the last lease was seen to have ended; None: there are some
        with self._meter.wanted():
            while True:
                try:
                    is_leased = index.in_demand(self._node.clock()) > 0
                    free_at = None if is_leased else free_at if free_at is not None else loop.time()
                    self._say(is_empty=free_at is not None and self._is_at_rest(free_at + QUIET_S))
                    if self._meter.reading is not None:
                        self._looked.set()
                except Exception:  # whatever one look stumbles over, the next must come
                    log.exception("drain")
                await asyncio.sleep(LOOK_S)

    def _is_at_rest(self, since: float) -> bool:
        """Whether the engine had no request at `since` or later: it is gone, or says so. One that hangs may have any number."""
        reading = self._meter.reading
        return reading is not None and reading.at >= since and (reading.is_gone or (reading.work is not None and not reading.work.requests))

    def _say(self, *, is_empty: bool) -> None:
        if is_empty == self._emptied.is_set():
            return
        if is_empty:
            log.info("the node is empty: nothing is leased, and its engine has no request")
            self._emptied.set()
        else:
            self._emptied.clear()
        self._node.changes.tell("node")

    async def _write(self) -> None:
        async with self._writing:
            try:
                await self._node.disk.run(self._node.store.write_json, DRAIN_FILE, None if self._asked is None else {"why": self._asked})
            except (NoSpace, DiskFailed) as error:
                kept = "drained" if self._asked is not None else "not drained"
                log.warning("after a restart of the stager it may not be known that this node is %s: %s", kept, error.message)


def _shown(why: str) -> str:
    """One line of an operator's reason."""
    return "".join(c for c in " ".join(why.split()) if c.isprintable())[:MAX_WHY]
