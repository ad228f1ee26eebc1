"""Room in advance, so that a flight need not wait for the engine: what was replaced goes, the disk is kept below its mark, and what is next to go is ready.

| used and reserved | what is done |
| --- | --- |
| above `high_watermark` of the limit | what was least recently used goes, down to `low_watermark` |
| above `low_watermark` | the next READY to go are unloaded and seen at rest, and stay until somebody needs their room or asks for them |
| less | nothing |
"""

import asyncio
import logging

from ..engine.keeper import CAUSE
from ..node import Node
from .evict import Remover
from .removal import Stays
from .usage import Usage

log = logging.getLogger(__name__)

PAUSE_S = 60.0  # after the engine kept something that was to go in advance, for a reason that does not pass by itself
READY = 16  # artifacts: as many as flights that two origins' slots let through at once


class Room:
    """One round at a time, in a task of its own: an engine may take its time to let something go."""

    def __init__(self, node: Node, remover: Remover) -> None:
        self._node = node
        self._remover = remover
        self._usage = Usage(node)
        self._round: asyncio.Task[None] | None = None
        self._next_round = 0.0

    async def close(self) -> None:
        if self._round is not None:
            self._round.cancel()
            await asyncio.gather(self._round, return_exceptions=True)
        await self._usage.write()

    def keep(self) -> None:
        """Begin a round, unless one is in progress."""
        if self._round is None or self._round.done():
            self._round = asyncio.create_task(self._keep(), name="room")

    async def _keep(self) -> None:
        try:
            await self._remover.measure()
            await self._remover.remove_retired()
            await self._make_room()
            await self._usage.write_when_due()
        except Exception:  # whatever one round stumbles over, the next must come
            log.exception("room in advance")

    async def _make_room(self) -> None:
        """Not while the engine cannot be asked or the disk fails: each attempt would be in vain."""
        index, settings = self._node.holdings.index, self._node.settings
        if CAUSE in self._node.readiness or "disk" in self._node.readiness or self._node.clock() < self._next_round:
            return
        await self._remover.notice_empty_queue()
        taken, low = index.used_bytes + index.reserved_bytes, int(settings.low_watermark * index.limit)
        stayed: Stays | None = None
        if settings.high_watermark < 1 and taken > settings.high_watermark * index.limit:
            stayed = await self._remover.trim(low)
        elif self._node.engine.exists and taken > low:
            stayed = await self._remover.prepare(READY)
        if stayed not in (None, Stays.QUEUED):  # a queue may be empty in the next second
            self._next_round = self._node.clock() + PAUSE_S
