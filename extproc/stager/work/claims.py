"""What routers rely on at a stager that was started anew. Leases are kept in memory, so an instance knows none of those that an earlier one gave.

The order of events this guards against: a router holds a lease of an instance that dies; the next instance finds the adapter on its disk, held by
nobody, and evicts it for somebody else's; the router still sends requests to it. So for a while after the start nothing that was there before goes, and
each router says in that time what it counts on.
"""

import asyncio
import logging
import math
from collections.abc import Sequence

from ...client import Claimed, Loading
from ...core.artifact import AdapterName, ArtifactId, adapter_name, is_adopted
from ...errors import InvalidRequest
from ..node import Node

log = logging.getLogger(__name__)

SLICE = 200  # claims between two turns of the event loop: a few milliseconds


class Claims:
    """Claims become leases. `open` begins the time in which what was on disk before stays."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._wait_s = node.settings.claim_wait_s
        self._lease_s = node.settings.lease_s

    def open(self) -> None:
        """What is on disk now stays until routers have had the time to say what they rely on."""
        if self._wait_s:
            self._node.holdings.index.guard(self._node.clock() + self._wait_s)

    async def honour(self, holder: str, leases: Sequence[Claimed]) -> list[float]:
        """Lease anew what is still here, and known to the engine where that was asked for; seconds for each, 0 where it is not.

        An engine that was not asked since the start is believed to know what it knew: what it has lost is loaded again, or told as evicted, before the
        node counts as ready.
        """
        granted = []
        for number, claimed in enumerate(leases):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            granted.append(self._honour(holder, claimed))
        if leases:
            log.info("%s relied on %d adapters: %d are leased to it again", holder or "a router", len(leases), sum(bool(seconds) for seconds in granted))
        return granted

    def _honour(self, holder: str, claimed: Claimed) -> float:
        if not (math.isfinite(claimed.remaining_s) and claimed.remaining_s > 0):
            return 0.0
        try:
            name = adapter_name(claimed.adapter)
        except InvalidRequest:
            return 0.0
        id_ = self._id_of(name, claimed.digest)
        if id_ is None or (
            claimed.loading is not Loading.NONE and not self._node.loads.still_has(name, id_, claimed.model, plain=claimed.loading is Loading.PLAIN)
        ):
            return 0.0
        now, seconds = self._node.clock(), min(claimed.remaining_s, self._lease_s)
        return seconds if self._node.holdings.index.lease(id_, now + seconds, now, holder) else 0.0

    def _id_of(self, name: AdapterName, digest: str) -> ArtifactId | None:
        """The artifact under that digest: where the name leads now, or an older version that is still here."""
        named = self._node.holdings.get(name)
        if named is not None and named.digest == digest:
            return None if named.refused else named.id
        id_ = ArtifactId(digest)
        return id_ if not is_adopted(id_) and id_ in self._node.holdings.index else None
