"""One version of an adapter on all nodes. A node gets a new version when it compares what it has with the origin, each node in its own time, so that the
copies of one adapter would answer with two versions in turn for up to `stager.revalidate_s`. When the first node has a new version, the others are asked to
compare theirs now.

| a copy elsewhere | a request |
| --- | --- |
| is being compared | goes there only where every other copy is above the bound |
| was compared | goes there as before; to the new version, if there is one |
| could not be compared, or not in time | goes there as before, to the old version |
"""

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial

from ..client import StagerClient
from ..core.copies import Copies
from ..errors import LoraExtprocError
from ..flight import SingleFlight

log = logging.getLogger(__name__)

COMPARE_S = 60.0  # several times what the fetch of a large adapter takes; then the old version counts again, and the fetch goes on
PAUSE_S = 1.0  # between two comparisons of a copy: it probably has the new version by the first, and each node that gets it asks for one of all others
AT_ONCE = 256  # comparisons by one router; what is beyond is compared in its node's own time
SWEEP_ABOVE = 1024  # comparisons that count no longer are forgotten when the table has doubled since the last sweep, and not below this

At = tuple[str, str]  # stager, adapter


class Comparisons:
    """By one router. Several routers ask a stager for one comparison, which they share while it lasts. `on_change`: a new version is at that stager."""

    def __init__(self, clients: Mapping[str, StagerClient], copies: Copies, on_change: Callable[[str, str], None], clock: Callable[[], float]) -> None:
        self._clients = clients
        self._copies = copies
        self._on_change = on_change
        self._clock = clock
        self._flights: SingleFlight[At, None] = SingleFlight()
        self._of: dict[str, set[str]] = {}  # by adapter: the stagers in flight. Each warm request looks
        self._again: set[At] = set()  # of those in flight, what is to be compared once more
        self._begun: dict[At, float] = {}  # when a copy was last asked for, or a new version came by itself
        self._sweep_at = SWEEP_ABOVE

    def of(self, adapter: str) -> Collection[str]:
        """The stagers whose copy of it is being compared."""
        return self._of.get(adapter, ())

    def changed(self, stager: str, adapter: str) -> None:
        """A new version is there: have the adapter's other copies compared, those that are being compared once more, since the origin may have changed since."""
        now = self._clock()
        self._note((stager, adapter), now)
        for node, _ in self._copies.of(adapter):
            at, client = (node, adapter), self._clients.get(node)
            if at in self._flights and node != stager:
                self._again.add(at)
            elif client is not None and node != stager and len(self._flights) < AT_ONCE:
                pause_s = max(0.0, self._begun.get(at, -math.inf) + PAUSE_S - now)
                self._flights.start(at, partial(self._compare, at, client, pause_s))

    async def close(self) -> None:
        await self._flights.close()

    async def _compare(self, at: At, client: StagerClient, pause_s: float) -> None:
        stager, adapter = at
        if pause_s:
            await asyncio.sleep(pause_s)
        self._of.setdefault(adapter, set()).add(stager)
        try:
            has_to = True
            while has_to:
                self._again.discard(at)
                await self._compare_once(at, client)
                has_to = at in self._again
        finally:
            self._again.discard(at)
            self._of[adapter].discard(stager)
            if not self._of[adapter]:
                del self._of[adapter]

    async def _compare_once(self, at: At, client: StagerClient) -> None:
        stager, adapter = at
        begun = self._clock()
        self._note(at, begun)
        try:
            async with asyncio.timeout(COMPARE_S):
                has_changed, _, _ = await client.refresh(adapter)
        except (LoraExtprocError, TimeoutError) as error:
            log.info("%s on %s: its old version stays, since it was not compared: %s", adapter, stager, str(error) or f"no answer for {COMPARE_S:g} s")
            return
        if has_changed and self._begun.get(at) == begun:  # else its watch was quicker to say so
            self._on_change(stager, adapter)

    def _note(self, at: At, now: float) -> None:
        if len(self._begun) >= self._sweep_at:
            self._begun = {at: begun for at, begun in self._begun.items() if now - begun < PAUSE_S}
            self._sweep_at = max(SWEEP_ABOVE, 2 * len(self._begun))
        self._begun[at] = now
