"""Whether what is here is still what its origin has, and the exchange of one version for the next."""

import asyncio
import logging
import time
from collections.abc import Callable

from ..core.artifact import AdapterName
from ..errors import EngineUnreachable, LoraExtprocError
from ..flight import SingleFlight, to_the_end
from .adopter import ORIGIN as ADOPTED
from .adopter import Adopter
from .changes import Changes
from .engine import Engine
from .fetcher import Fetcher
from .flights import Flights
from .holdings import Holdings, Named
from .loads import Loads
from .remover import Remover
from .store import Store
from .transfer import Job

log = logging.getLogger(__name__)

KEEPS_PREFIXES = "the engine cannot clear its prefix cache (VLLM_SERVER_DEV_MODE is off): a new version would be mixed with blocks of the old one"

BEING_REFRESHED = "refresh"  # a holder, beside routers


class Freshness:
    """What is here is served meanwhile, and stays if the comparison fails."""

    def __init__(
        self,
        every_s: float,
        store: Store,
        holdings: Holdings,
        engine: Engine,
        loads: Loads,
        fetcher: Fetcher,
        remover: Remover,
        adopter: Adopter,
        flights: Flights,
        changes: Changes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._every_s = every_s
        self._store = store
        self._holdings = holdings
        self._engine = engine
        self._loads = loads
        self._fetcher = fetcher
        self._remover = remover
        self._adopter = adopter
        self._flights = flights
        self._changes = changes
        self._clock = clock
        self._refreshes: SingleFlight[AdapterName, bool] = SingleFlight()

    async def close(self) -> None:
        await self._refreshes.close()

    def revalidate(self, name: AdapterName) -> None:
        """Start a comparison in the background, if it is time."""
        named, now = self._holdings.get(name), self._clock()
        if named is None or not self._every_s or named.final or named.origin == ADOPTED or name in self._refreshes:
            return
        if named.checked is None or now - named.checked >= self._every_s:
            named.checked = now  # one attempt per period, whatever comes of it
            self._refreshes.start(name, lambda: self._refresh(name))

    async def refresh(self, name: AdapterName) -> bool:
        """Compare now; True if a new version took the place of what was here. Raises what went wrong."""
        return await self._refreshes.join(name, lambda: self._refresh(name))

    async def _refresh(self, name: AdapterName) -> bool:
        known = self._holdings.get(name)
        if known is None:
            return False
        if known.origin == ADOPTED:
            return await self._adopter.look_again(name, known)
        failed_before, index = known.refresh_error, self._holdings.index
        index.lease(known.id, float("inf"), self._clock(), BEING_REFRESHED)  # else it could go for the room that its own new version needs
        try:
            if self._engine.keeps_prefixes and await self._is_read_by_link(name):
                raise EngineUnreachable(KEEPS_PREFIXES)
            async with self._flights.book(name, Job.REFRESH, "refreshed") as job:
                fresh = await self._fetcher.bring(name, job, known=known)
                known.checked, known.refresh_error = self._clock(), ""
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
            index.release(BEING_REFRESHED, known.id)
            await self._remover.drop_unnamed(known.id)  # whose place is taken

    async def _swap(self, name: AdapterName, known: Named, fresh: Named) -> bool:
        """Let the name lead to the new version; False if it was removed meanwhile.

        Where routers rewrite `model`, the engine knows both versions by names of their own, and the old one goes when nobody can be sent to it any more.
        Where an engine has resolved the adapter's own name through the link, name and path stay the same, and so does the key of its prefix cache:
        cached blocks of the old version would be continued with the new weights, an answer of neither. It must be able to forget them.
        """
        by_link = await self._is_read_by_link(name)
        if by_link:
            await self._engine.reset_prefix_cache()
        await self._loads.replace(name, known.id, fresh.id)
        if self._holdings.get(name) is not known or not self._holdings.index.hold(known.id):
            return False
        try:
            await to_the_end(self._show_instead(name, known, fresh))
        finally:
            self._holdings.index.let_go(known.id)
        if by_link:
            try:
                await self._engine.unload(name)
                await self._engine.reset_prefix_cache()
            except EngineUnreachable as error:
                log.warning("%s: refreshed, but the engine could not be told: %s", name, error.message)
        return True

    async def _is_read_by_link(self, name: AdapterName) -> bool:
        """Whether the engine knows the adapter's own name, from its resolver."""
        return self._engine.exists and (await self._engine.known()).adapters.get(name, "").endswith(f"/{name}")

    async def _show_instead(self, name: AdapterName, known: Named, fresh: Named) -> None:
        await asyncio.to_thread(self._store.link, name, fresh.id)
        self._holdings.index.inherit(fresh.id, known.id)
        self._holdings.put(name, fresh)
        self._changes.tell("refreshed", name)
