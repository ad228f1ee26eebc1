"""The order of use survives a restart: the manifest's time of change is when its artifact was last used, and a start puts them in that order.

Written at the stager's end, and hourly in case it has none: the order of the last hour is lost then, which costs some needless fetches and no request.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ...core.artifact import is_adopted
from ..disk.layout import MANIFEST_FILE
from ..node import Node

WRITE_S = 3600.0
SLICE = 2000  # artifacts between two turns of the event loop: about a millisecond


class Usage:
    """What was used since the last time is written; one small change of an inode each."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._written_at = node.clock()

    async def write_when_due(self) -> None:
        if self._node.clock() - self._written_at >= WRITE_S:
            await self.write()

    async def write(self) -> None:
        """Of what others put here nothing is written: their files are theirs."""
        since, self._written_at = self._written_at, self._node.clock()
        ahead = time.time() - self._written_at  # of the node's clock
        entries = self._node.holdings.index.entries()
        for first in range(0, len(entries), SLICE):
            some = entries[first : first + SLICE]
            used = [(self._node.store.path(entry.id), entry.last_used + ahead) for entry in some if entry.last_used > since and not is_adopted(entry.id)]
            if used:
                await self._node.disk.run(_write, used)
            else:
                await asyncio.sleep(0)


def _write(used: Sequence[tuple[Path, float]]) -> None:
    for directory, when in used:
        with contextlib.suppress(OSError):  # evicted meanwhile, or on a disk that says so elsewhere
            os.utime(directory / MANIFEST_FILE, (when, when))
