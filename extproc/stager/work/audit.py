"""Reading published artifacts back from the disk, and what happens to those that are not what they were."""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ...core.artifact import AdapterName, adapter_name, is_adopted
from ...errors import LoraExtprocError, ModelNotFound
from ..books.holdings import Named
from ..disk.adopt import Adopter
from ..node import Node
from .evict import Remover

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verified:
    """What reading one artifact back from the disk gave."""

    name: AdapterName
    digest: str
    size: int
    why: str  # "": it is what it was
    removed: bool = False


class Auditor:
    """Re-hashes. It deletes nothing by itself: what is damaged goes to the remover."""

    def __init__(self, node: Node, remover: Remover, adopter: Adopter) -> None:
        self._node = node
        self._remover = remover
        self._adopter = adopter

    async def verify(self, raw_name: str = "") -> AsyncIterator[Verified]:
        """Read artifacts back from the disk and compare them with their digests. What differs is removed, unless the engine may read it.

        What others put here is only reported: its owner may be writing a new version.
        """
        if raw_name and self._node.holdings.get(adapter_name(raw_name)) is None:
            raise ModelNotFound(f"{raw_name} is not on this node")
        for name in [adapter_name(raw_name)] if raw_name else sorted(self._node.holdings):
            named = self._node.holdings.get(name)
            entry = self._node.holdings.index.get(named.id) if named is not None else None
            if named is None or entry is None:
                continue
            names, removed = self._node.holdings.names_of(named.id), False
            why = await self.differs(name, named)
            if why:
                self._node.metrics.verify_failures.labels("disk").inc()
                log.error("%s: %s", name, why)
                # With all its names: while one is left, the content is, and whoever stages another would be shown it as there already.
                if not is_adopted(named.id) and self._node.holdings.index.leave(named.id, self._node.clock(), force=True):
                    removed = await self._remover.remove(named.id, "damaged") is None
                removed = removed or not (is_adopted(named.id) or self._node.holdings.index.is_known(named.id))  # a look has found it at the same time
            for each in names if removed else (name,):
                yield Verified(each, named.digest, entry.size, why, removed)

    async def differs(self, name: AdapterName, named: Named) -> str:
        """Why what is on disk is not what was published, read from end to end; "" if it is."""
        return await self._node.disk.run(self._differs, name, named)

    def _differs(self, name: AdapterName, named: Named) -> str:
        try:
            return self._adopter.differs(name, named) if is_adopted(named.id) else self._node.store.differs(named.id)
        except (OSError, LoraExtprocError) as error:
            return f"it cannot be read: {getattr(error, 'strerror', None) or error}"
