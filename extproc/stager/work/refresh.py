"""Whether what is here is still what its origin has, and the exchange of one version for the next."""

import logging

from ...core.artifact import AdapterName
from ...core.lru import Hold
from ...errors import EngineUnreachable, LoraExtprocError
from ...flight import SingleFlight, to_the_end
from ..books.holdings import Named
from ..disk.adopt import ORIGIN as ADOPTED
from ..disk.adopt import Adopter
from ..node import Node
from ..supply.job import Job
from .evict import Remover
from .flights import Flights
from .stage import Fetcher

log = logging.getLogger(__name__)

KEEPS_PREFIXES = "the engine cannot clear its prefix cache (VLLM_SERVER_DEV_MODE is off): a new version would be mixed with blocks of the old one"


class Freshness:
    """What is here is served meanwhile, and stays if the comparison fails."""

    def __init__(self, node: Node, fetcher: Fetcher, remover: Remover, adopter: Adopter, flights: Flights) -> None:
        self._node = node
        self._every_s = node.settings.revalidate_s
        self._fetcher = fetcher
        self._remover = remover
        self._adopter = adopter
        self._flights = flights
        self._refreshes: SingleFlight[AdapterName, bool] = SingleFlight()

    async def close(self) -> None:
        await self._refreshes.close()

    def revalidate(self, name: AdapterName) -> None:
        """Start a comparison in the background, if it is time."""
        named, now = self._node.holdings.get(name), self._node.clock()
        if named is None or not self._every_s or named.final or named.origin == ADOPTED or name in self._refreshes:
            return
        if named.checked is None or now - named.checked >= self._every_s:
            named.checked = now  # one attempt per period, whatever comes of it
            self._refreshes.start(name, lambda: self._refresh(name))

    async def refresh(self, name: AdapterName) -> bool:
        """Compare now; True if a new version took the place of what was here. Raises what went wrong."""
        return await self._refreshes.join(name, lambda: self._refresh(name))

    async def _refresh(self, name: AdapterName) -> bool:
        known = self._node.holdings.get(name)
        if known is None:
            return False
        if known.origin == ADOPTED:
            return await self._adopter.look_again(name, known)
        failed_before, index = known.refresh_error, self._node.holdings.index
        is_held = index.hold(known.id, Hold.READ)  # else it could go for the room that its own new version needs
        try:
            if self._node.engine.keeps_prefixes and await self._is_read_by_link(name):
                raise EngineUnreachable(KEEPS_PREFIXES)
            async with self._flights.book(name, Job.REFRESH, "refreshed") as job:
                fresh = await self._fetcher.bring(name, job, known=known)
                known.checked, known.refresh_error = self._node.clock(), ""
                if fresh is None:
                    job.outcome = "unchanged"
                    return False
                try:
                    if fresh.id == known.id:
                        job.outcome = "unchanged"
                        known.origin, known.revision, known.final = fresh.origin, fresh.revision, fresh.final
                        return False
                    return await self._swap(name, known, fresh)
                finally:
                    await self._fetcher.let_go(fresh)
        except LoraExtprocError as error:
            known.refresh_error = f"{error.reason}: {error.message}"
            level = logging.WARNING if known.refresh_error != failed_before else logging.DEBUG  # not once a period, for as long as it lasts
            log.log(level, "%s: stays as it is: the comparison with its origin failed: %s", name, error.message)
            raise
        finally:
            if is_held:
                index.let_go(known.id, Hold.READ)
            await self._remover.drop_unnamed(known.id)  # whose place is taken

    async def _swap(self, name: AdapterName, known: Named, fresh: Named) -> bool:
        """Let the name lead to the new version; False if it was removed meanwhile.

        Where routers rewrite `model`, the engine knows both versions by names of their own, and the old one goes when nobody can be sent to it any more.
        Where an engine has resolved the adapter's own name through the link, name and path stay the same, and so does the key of its prefix cache:
        cached blocks of the old version would be continued with the new weights, an answer of neither. It must be able to forget them.
        """
        by_link = await self._is_read_by_link(name)
        if by_link:
            await self._node.engine.reset_prefix_cache()
        await self._node.loads.replace(name, known.id, fresh.id)
        if self._node.holdings.get(name) is not known or not self._node.holdings.index.hold(known.id):
            return False
        try:
            await to_the_end(self._show_instead(name, known, fresh))
        finally:
            self._node.holdings.index.let_go(known.id)
        if by_link:
            try:
                await self._node.engine.unload(name)
                await self._node.engine.reset_prefix_cache()
            except EngineUnreachable as error:
                log.warning("%s: refreshed, but the engine could not be told: %s", name, error.message)
        return True

    async def _is_read_by_link(self, name: AdapterName) -> bool:
        """Whether the engine knows the adapter's own name, from its resolver."""
        return self._node.engine.exists and (await self._node.engine.known()).adapters.get(name, "").endswith(f"/{name}")

    async def _show_instead(self, name: AdapterName, known: Named, fresh: Named) -> None:
        await self._node.disk.run(self._node.store.link, name, fresh.id)
        self._node.holdings.index.inherit(fresh.id, known.id)
        self._node.holdings.put(name, fresh)
        self._node.changes.tell("refreshed", name)
