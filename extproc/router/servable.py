"""What the origins of a pool could give, as one of its stagers tells: their names for the list of models, and of one name whether an origin has it.

One stager per pool is asked for names, the first in the settings' order that answers, so that an origin is listed by one node and all routers hear the
same. Of one name the stager is asked that a request for it would go to, which stages nothing for the question.
"""

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ..client import StagerClient
from ..core.placement import Pool
from ..errors import InvalidRequest, LoraExtprocError, ModelNotFound, Overloaded, StageDeadline
from ..flight import SingleFlight

PAGE = 2_000  # names that are read in one turn of the event loop: a quarter of a millisecond
MAX_NAMES = 100_000  # of one pool: as many as a stager lists
ASK_EVERY_S = 1.0  # a stager says whether its names have changed
ANSWER_S = 5.0  # a page has not come by then: the next stager is asked
PASSED_OVER_S = 30.0  # after that, and after a failure, it is asked last
MAX_ASKED = 3  # stagers for one name; those of a pool have the same origins
MAX_RESOLVING = 64  # names in flight at once: a client may invent as many as it likes
RESOLVE_S = 10.0  # an origin that takes longer for one name is asked again by the next request
HAS_IT_S, HAS_IT_NOT_S = 60.0, 10.0  # how long an answer is believed; the second is a stager's `negative_ttl_s`
MAX_ANSWERS = 10_000  # that are remembered


@dataclass(frozen=True, slots=True)
class _Names:
    """As one stager told them, by code points."""

    version: str = ""
    names: Sequence[str] = ()


class Servable:
    """By pool. `changes` counts how often any names changed."""

    def __init__(self, pools: Sequence[Pool], clients: Mapping[str, StagerClient], clock: Callable[[], float] = time.monotonic) -> None:
        self.changes = 0
        self._pools = {pool.name: pool for pool in pools}
        self._clients = clients
        self._clock = clock
        self._names: dict[str, _Names] = {}  # by pool
        self._asked_again: dict[str, float] = {}  # by pool, not before that moment
        self._passed_over: dict[str, float] = {}  # by stager, until then
        self._asking: SingleFlight[str, None] = SingleFlight()  # by pool
        self._resolving: SingleFlight[str, None] = SingleFlight()  # by name
        self._answers: dict[str, tuple[float, str]] = {}  # by name: until when, and why no origin has it, "" where one has

    def follow(self, pools: Sequence[Pool]) -> None:
        """These are the pools now, with their endpoints."""
        self._pools = {pool.name: pool for pool in pools}
        self._passed_over = {stager: until for stager, until in self._passed_over.items() if stager in self._clients}

    async def close(self) -> None:
        await self._asking.close()
        await self._resolving.close()

    # -- all names

    def names(self, pool: Pool) -> Sequence[str]:
        """What could be served, as far as it was told, in the order of the names."""
        return self._names.get(pool.name, _Names()).names

    def prepare(self, stager: str) -> None:
        """It is there, perhaps just now: ask for its pools' names in the background, so that the first list need not wait for a listing."""
        for pool in self._pools.values():
            if pool.name not in self._names and any(endpoint.stager == stager for endpoint in pool.table.endpoints):
                self._asking.start(pool.name, partial(self._ask, pool))

    async def ask(self, timeout_s: float) -> None:
        """Let the names be as new as the stagers have them. What is not there in time is there for the next."""
        due = [pool for pool in self._pools.values() if pool.name in self._asking or self._asked_again.get(pool.name, 0.0) <= self._clock()]
        asking = {asyncio.ensure_future(self._asking.join(pool.name, partial(self._ask, pool))) for pool in due}
        if asking:
            await asyncio.wait(asking, timeout=timeout_s)
            for task in asking:
                task.cancel()

    async def _ask(self, pool: Pool) -> None:
        try:
            stagers = dict.fromkeys(endpoint.stager for endpoint in pool.table.endpoints if endpoint.stager)
            for stager in sorted(stagers, key=lambda stager: self._passed_over.get(stager, 0.0) > self._clock()):
                client = self._clients.get(stager)
                if client is None:
                    continue  # it has left
                try:
                    await self._read(pool, client)
                    self._passed_over.pop(stager, None)
                    return
                except (LoraExtprocError, TimeoutError):
                    self._passed_over[stager] = self._clock() + PASSED_OVER_S
        finally:
            self._asked_again[pool.name] = self._clock() + ASK_EVERY_S

    async def _read(self, pool: Pool, client: StagerClient) -> None:
        """Take a stager's names if they are others. One that has not listed anything yet changes nothing."""
        known = self._names.get(pool.name, _Names())
        page = await asyncio.wait_for(client.catalogue(known.version, limit=PAGE), ANSWER_S)
        version = page.version
        if version in ("", known.version):
            return
        names = list(page.names)
        while page.more and page.names and len(names) < MAX_NAMES:
            page = await asyncio.wait_for(client.catalogue("", names[-1], PAGE), ANSWER_S)
            if page.version != version:  # listed anew in between: the next list reads it from the beginning
                return
            names += page.names
        self._names[pool.name] = _Names(version, names)
        self.changes += 1

    # -- one name

    def has(self, pool: Pool, name: str) -> bool:
        """Whether it is among the names."""
        names = self.names(pool)
        place = bisect_left(names, name)
        return place < len(names) and names[place] == name

    async def check(self, pool: Pool, name: str, refusing: Sequence[str] = ()) -> None:
        """Return if an origin has `name`. The stagers that refused it are asked first: they know whether it is still what they refused. Raises ModelNotFound if none has, or what a request for it would be answered while the origin fails."""
        until, why = self._answers.get(name, (0.0, ""))
        if self._clock() >= until:
            if name not in self._resolving and len(self._resolving) >= MAX_RESOLVING:
                raise Overloaded(f"{MAX_RESOLVING} names are being looked for at the origins already; ask again")
            try:
                async with asyncio.timeout(RESOLVE_S):
                    await self._resolving.join(name, partial(self._resolve, pool, name, refusing))
            except TimeoutError:
                raise StageDeadline(f"the origins have not said within {RESOLVE_S:g} s whether they have {name}; ask again") from None
            except LoraExtprocError as error:
                raise error.bare() from None
        elif why:
            raise ModelNotFound(why)

    async def _resolve(self, pool: Pool, name: str, refusing: Sequence[str]) -> None:
        at_home = (endpoint.stager for endpoint in pool.candidates(name) if endpoint.stager)
        stagers = dict.fromkeys((*(stager for stager in refusing if pool.at(stager)), *at_home))
        nobody = f"The model `{name}` does not exist: no node has it, and pool {pool.name} has no stager that could stage it"
        failure: LoraExtprocError = ModelNotFound(nobody)
        for client in [client for stager in stagers if (client := self._clients.get(stager)) is not None][:MAX_ASKED]:
            try:
                await client.resolve(name)
            except (ModelNotFound, InvalidRequest) as error:
                missing = error.message if isinstance(error, ModelNotFound) else f"The model `{name}` does not exist: {error.message}"
                self._remember(name, HAS_IT_NOT_S, missing)
                raise ModelNotFound(missing) from error
            except LoraExtprocError as error:
                failure = error
                if error.shared:
                    break
            else:
                self._remember(name, HAS_IT_S)
                return
        raise failure

    def _remember(self, name: str, for_s: float, why_not: str = "") -> None:
        self._answers.pop(name, None)
        if len(self._answers) >= MAX_ANSWERS:
            del self._answers[next(iter(self._answers))]
        self._answers[name] = (self._clock() + for_s, why_not)
