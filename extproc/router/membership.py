"""Who is there, and what may be sent to whom: the snapshot that decisions are made on.

Sources of endpoints give whole fleets; `apply` finds what has changed, has the lookup tables filled in a thread, and replaces the snapshot by one
assignment. Each stager that an endpoint names is connected to and watched for as long as one does. `core/standing.py` says how an endpoint stands by
what is observed of it.

An endpoint that the fleet shows no longer is down at once, and keeps its place in the tables, its leases and its copies for `hold_down_s`: one that is
back by then, as the same instance, goes on as if nothing had been.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..client import StagerClient
from ..core.endpoint import Endpoint, is_ip
from ..core.fleet import Fleet
from ..core.load import Engine, Loads
from ..core.maglev import DEFAULT_TABLE_SIZE, MAX_TABLE_SIZE, LookupTable
from ..core.placement import Pool, Snapshot
from ..core.popularity import Popularity
from ..core.prefix import Prefixes
from ..core.standing import MISSED, Observed, Standing
from ..errors import LoraExtprocError
from ..metrics import RouterMetrics
from .models import Models
from .moving import Moves
from .probe import Probe
from .residency import Residency
from .watch import Watch

log = logging.getLogger(__name__)

WATCHES_PER_S = 400.0  # heartbeats of all stagers together that this router listens to: a few percent of a core
MISSED_S = 5.0  # an endpoint that the proxy could not reach is tried again after so long
TIMER_S = 0.001  # the shortest time that event loops tell apart
TICK_S = 0.25  # what is too old to count as load is dropped so often: some 0.3 ms of 1,000 endpoints
_SIZES = (DEFAULT_TABLE_SIZE, 655_373, MAX_TABLE_SIZE)  # a table that the fleet has outgrown is replaced by the next, on every router alike
CONNECT_TICKS = 20  # after so many of those, stagers that could not be connected to are tried again
WINDOW_TICKS = 120  # and a window of popularity ends


@dataclass(slots=True)
class _Stager:
    """One that is connected to."""

    client: StagerClient
    watch: asyncio.Task[None]


class Membership:
    """Endpoints count as ready until their stager is heard of; then they stand as it says and as their engines answer."""

    def __init__(
        self,
        pools: Sequence[Pool],
        residency: Residency,
        models: Models,
        metrics: RouterMetrics,
        probe: Probe,
        moves: Moves,
        popularity: Popularity,
        prefixes: Prefixes,
        *,
        clients: dict[str, StagerClient],
        connect: Callable[[str], StagerClient],
        heartbeat_s: float,
        hold_down_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.snapshot = Snapshot(tuple(pools))
        self.loads = {pool.name: Loads(endpoint.address for endpoint in pool.table.endpoints) for pool in pools}
        self.prefixes = prefixes
        self._residency = residency
        self._models = models
        self._metrics = metrics
        self._probe = probe
        self._moves = moves
        self._popularity = popularity
        self._clients = clients
        self._connect = connect
        self._clock = clock
        self._heartbeat_s = heartbeat_s
        self._hold_down_s = hold_down_s
        self._observed: dict[str, Observed] = {}  # by endpoint address
        self._since: dict[str, float] = {}  # by endpoint address, when it began to stand as it does
        self._pool_of: dict[str, str] = {}  # by endpoint address
        self._at: dict[str, tuple[Endpoint, ...]] = {}  # by stager
        self._gone: dict[str, float] = {}  # by address: when an endpoint that the fleet shows no longer loses its place
        self._fleet: Fleet | None = None  # as it was applied last
        self._stagers: dict[str, _Stager] = {}
        self._turn = 0
        self._changed = asyncio.Event()  # replaced at each change
        self._applying = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_started = False
        self.on_change: list[Callable[[Snapshot], None]] = []
        self.on_woken: list[Callable[[str, str], None]] = []  # told of stager and adapter; to be set before the start
        self._index()
        self._shares({pool.name: pool.table.slots_per_endpoint() for pool in pools}, ())
        self._count()

    def turn(self) -> int:
        """A number that is another each time."""
        self._turn += 1
        return self._turn

    async def changed(self, timeout_s: float) -> None:
        """Wait for the next snapshot, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    # -- what is sent, and who served

    def send(self, pool: str, endpoint: Endpoint) -> None:
        """A request goes to that endpoint."""
        self.loads[pool].send(endpoint.address, self._clock())

    def served(self, named: Sequence[Endpoint], served: str) -> None:
        """The proxy says who served a request that it was to send to one of `named`, best first. Those before the one that served were passed over.

        Passed over twice in a row, an endpoint counts as unreachable. Where none of `named` served, all do at once: the proxy has tried each, and a
        request that its client repeats must not be sent there again. An endpoint that is named by its host's name may be the one that served, since the
        proxy tells addresses.
        """
        for endpoint in named:
            if not is_ip(endpoint.address.rpartition(":")[0]):
                continue
            if endpoint.address == served:
                if self._missed(endpoint):
                    self.observe(endpoint, missed=0)
                return
            if any(other.address == served for other in named):
                self._miss(endpoint, self._missed(endpoint) + 1)
            else:
                self._miss(endpoint, MISSED)

    def _missed(self, endpoint: Endpoint) -> int:
        observed = self._observed.get(endpoint.address)
        return 0 if observed is None else observed.missed

    def _miss(self, endpoint: Endpoint, missed: int) -> None:
        if self._missed(endpoint) < MISSED:
            self.observe(endpoint, missed=missed)
            if missed == MISSED:
                self._later(MISSED_S, lambda: self._try_again(endpoint))

    def _try_again(self, endpoint: Endpoint) -> None:
        """Let the proxy send it one: it is down again with the next miss."""
        if endpoint.address in self._observed:
            self.observe(endpoint, missed=MISSED - 1)

    # -- how endpoints stand

    def at(self, stager: str) -> Sequence[Endpoint]:
        """The endpoints whose directory that stager fills, now."""
        return self._at.get(stager, ())

    def engine_says(self, stager: str, engine: Engine, age_s: float) -> None:
        """What the engine worked on so long ago."""
        for endpoint in self.at(stager):
            self.loads[self._pool_of[endpoint.address]].say(endpoint.address, engine, self._clock() - age_s)

    def in_demand(self, stager: str, adapters: int, slots: int) -> None:
        """How many adapters compete for the engine's slots."""
        for endpoint in self.at(stager):
            self.loads[self._pool_of[endpoint.address]].demand(endpoint.address, adapters, slots)

    def engine_is_new(self, endpoint: Endpoint) -> None:
        """Its engine knows nothing when it comes back: it is given what it will own before it is sent anything, if others can serve meanwhile."""
        self.prefixes.forget(endpoint)
        self.observe(endpoint, is_prepared=False)

    @property
    def follows_wakes(self) -> bool:
        """Whether somebody is told of wake-ups."""
        return bool(self.on_woken)

    def woken(self, stager: str, adapter: str) -> None:
        """A request has asked that node for what nobody leased there."""
        for tell in self.on_woken:
            tell(stager, adapter)

    def observe(self, endpoint: Endpoint, **seen: object) -> None:
        """Something new was seen of `endpoint`: fields of `Observed`. Replaces the snapshot and logs if the endpoint stands otherwise because of it."""
        self._observe([(endpoint, seen)])

    def _observe(self, seen: Sequence[tuple[Endpoint, Mapping[str, object]]]) -> None:
        """The same for many, with one snapshot."""
        standings = dict(self.snapshot.standings)
        others: list[tuple[Endpoint, Standing, str]] = []
        is_other = False
        for endpoint, fields in seen:
            if endpoint.address not in self._pool_of:
                continue  # it has lost its place meanwhile
            known = self._observed.get(endpoint.address, Observed())
            observed = self._observed[endpoint.address] = replace(known, **fields)  # type: ignore[arg-type]  # as the callers name them
            standing, why = observed.standing()
            if standing is Standing.JOINING and self._moves.is_known(endpoint) and not self._others_are_ready(endpoint, standings):
                observed = self._observed[endpoint.address] = replace(observed, is_prepared=True)
                standing, why = observed.standing()
            before, before_why = standings.pop(endpoint.address, (Standing.READY, ""))
            if standing is not Standing.READY:
                standings[endpoint.address] = (standing, why)
            moves = standing is not before or (standing is Standing.DRAINING and observed.is_emptied and not known.is_emptied)
            is_other = is_other or moves or why != before_why
            if moves:
                others.append((endpoint, standing, why))
        if not is_other:
            return
        self._publish(Snapshot(self.snapshot.pools, standings, self.snapshot.version + 1))
        for endpoint, standing, why in others:
            self.loads[self._pool_of[endpoint.address]].stand_one(endpoint.address, ready=standing is Standing.READY)
            self._tell(endpoint, standing, why)
            self._move(endpoint, standing)
        for name in {self._pool_of[endpoint.address] for endpoint, standing, _ in others if standing is not Standing.READY}:
            self._hasten(name)

    def _hasten(self, name: str) -> None:
        """Where nobody of a pool is ready any more, who joins it is given nothing more before: it is all that could serve."""
        pool, standings = self.snapshot.pool(name), self.snapshot.standings
        if pool is None or any(endpoint.address not in standings for endpoint in pool.table.endpoints):
            return
        for endpoint in pool.table.endpoints:
            if standings[endpoint.address][0] is Standing.JOINING:
                self._move(endpoint, Standing.JOINING)

    def _others_are_ready(self, endpoint: Endpoint, standings: Mapping[str, tuple[Standing, str]]) -> bool:
        pool = self.snapshot.pool(self._pool_of[endpoint.address])
        return pool is not None and pool.has_another_ready(endpoint, standings)

    def _move(self, endpoint: Endpoint, standing: Standing) -> None:
        """Have what the new standing asks for done in the background; it ends when the standing does."""
        pool, observed = self._pool_of[endpoint.address], self._observed[endpoint.address]
        if standing is Standing.JOINING:
            self._moves.join(self, pool, endpoint, lambda: self.observe(endpoint, is_prepared=True))
        elif standing is Standing.DRAINING and observed.is_emptied:
            self._moves.leave(self, pool, endpoint)
        else:
            self._moves.stay(endpoint)

    def _publish(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._count()
        for tell in self.on_change:
            tell(snapshot)

    def _tell(self, endpoint: Endpoint, standing: Standing, why: str) -> None:
        now = self._clock()
        since = self._since.get(endpoint.address, now)
        self._since[endpoint.address] = now
        who = f"endpoint {endpoint.address} ({endpoint.node})"
        if standing is Standing.READY:
            log.info("%s is ready after %.1f s", who, now - since)
        elif standing is Standing.JOINING:
            log.info("%s joins: %s", who, why)
        elif standing is Standing.DRAINING:
            log.warning("%s is draining: %s; what is leased there and base models go on being sent there", who, why)
        else:
            log.warning("%s is down: %s; its keys go to the next candidates", who, why)

    def _count(self) -> None:
        everyone = sum(len(pool.table.endpoints) for pool in self.snapshot.pools)
        counts = dict.fromkeys(Standing, 0)
        for standing, _ in self.snapshot.standings.values():
            counts[standing] += 1
        counts[Standing.READY] = everyone - sum(counts.values())
        for standing, count in counts.items():
            self._metrics.endpoints.labels(standing.name.lower()).set(count)

    # -- the fleet

    async def apply(self, fleet: Fleet) -> None:
        """These are the endpoints of every pool now. Pools that are not named keep theirs."""
        async with self._applying:
            self._fleet = fleet
            await self._follow_fleet()

    async def _follow_fleet(self) -> None:
        assert self._fleet is not None
        now = self._clock()
        shown: dict[str, str] = {}  # the pool of each address: the first that has it
        places: dict[str, list[Endpoint]] = {}
        for pool in self.snapshot.pools:
            named = [found.endpoint for found in self._fleet[pool.name]] if pool.name in self._fleet else pool.table.endpoints
            places[pool.name] = list({e.address: e for e in named if shown.setdefault(e.address, pool.name) == pool.name}.values())
        for address in shown.keys() & self._gone.keys():
            del self._gone[address]
        for pool in self.snapshot.pools:
            places[pool.name] += self._held(pool, shown, now)
        others = [pool for pool in self.snapshot.pools if _differ(pool.table.endpoints, places[pool.name])]
        tables = await asyncio.to_thread(_tables, [(pool, places[pool.name]) for pool in others])
        old = {e.address for pool in others for e in pool.table.endpoints}
        self._replace(tables)
        await asyncio.to_thread(self._shares, {name: slots for name, (_, slots) in tables.items()}, old)
        seen = []
        leaving = {f.endpoint.address for shown in self._fleet.values() for f in shown if f.is_leaving}
        for pool in self.snapshot.pools:
            for endpoint in pool.table.endpoints:
                known = self._observed.get(endpoint.address, Observed())
                fields = {"is_gone": endpoint.address in self._gone, "is_leaving": endpoint.address in leaving}
                if (known.is_gone, known.is_leaving) != tuple(fields.values()):
                    seen.append((endpoint, fields))
        self._observe(seen)
        for pool in self.snapshot.pools:
            self._hasten(pool.name)

    def _held(self, pool: Pool, shown: Collection[str], now: float) -> Iterable[Endpoint]:
        """The endpoints of the pool that the fleet shows no longer, in whatever pool, and that keep their places yet."""
        for endpoint in pool.table.endpoints:
            if endpoint.address in shown:
                continue
            until = self._gone.get(endpoint.address)
            if until is None:
                until = self._gone[endpoint.address] = now + self._hold_down_s
                self._do(self._let_go(until), "hold down")
            if until > now:
                yield endpoint

    async def _let_go(self, until: float) -> None:
        """Follow the fleet again when some endpoint's time is over by our clock, which a timer may be ahead of: uvloop's count whole milliseconds."""
        while (left_s := until - self._clock()) > 0:  # noqa: ASYNC110  # a clock sets no event
            await asyncio.sleep(max(left_s, TIMER_S))
        async with self._applying:
            await self._follow_fleet()

    def _replace(self, tables: Mapping[str, tuple[LookupTable, Mapping[str, int]]]) -> None:
        """Make the snapshot with these tables the one that counts, and follow its endpoints."""
        if not tables:
            return
        old, was_of = {e.address: e for pool in self.snapshot.pools for e in pool.table.endpoints}, self._pool_of
        pools = tuple(replace(pool, table=tables[pool.name][0]) if pool.name in tables else pool for pool in self.snapshot.pools)
        new, is_of = {e.address: e for pool in pools for e in pool.table.endpoints}, _pool_of(pools)
        stay = {address for address, endpoint in new.items() if old.get(address) == endpoint and was_of[address] == is_of[address]}
        left = [endpoint for address, endpoint in old.items() if address not in stay]
        came = [endpoint for address, endpoint in new.items() if address not in stay]
        for endpoint in left:
            self._moves.stay(endpoint)
            self.prefixes.forget(endpoint)
            self._gone.pop(endpoint.address, None)
            self._observed.pop(endpoint.address, None)
            self._since.pop(endpoint.address, None)
        standings = {address: known for address, known in self.snapshot.standings.items() if address in new and address in self._observed}
        stagers_before = set(self._at)
        is_first = not old
        self.snapshot = Snapshot(pools, standings, self.snapshot.version + 1)
        self._index()
        for name in tables:
            pool = self.snapshot.pool(name)
            assert pool is not None
            self.loads[name].follow(e.address for e in pool.table.endpoints)
            self.loads[name].stand(e.address for e in pool.table.endpoints if e.address not in standings)
        instances = {endpoint.stager for endpoint in came if endpoint.address in old}  # a new instance, under an address that others had
        for stager in (stagers_before - set(self._at)) | (instances & stagers_before):
            self._disconnect(stager)
        self._models.follow(pools)
        self._publish(self.snapshot)
        if left or came:
            log.info("the fleet has %d endpoints: %d came, %d left", len(new), len(came), len(left))
        if self._is_started:
            self._connect_those_left()
        if self._is_started or not is_first:
            moved = [new[address] for address in stay if old[address].stager != new[address].stager]
            others = stay.difference(endpoint.address for endpoint in moved)
            seen = [(endpoint, {"is_prepared": False, **self._said_of(endpoint, others)}) for endpoint in came]
            self._observe([*seen, *((endpoint, self._said_of(endpoint, others)) for endpoint in moved)])

    def _said_of(self, endpoint: Endpoint, others: Collection[str]) -> Mapping[str, object]:
        """What its stager has said, which was heard of those of the `others` that it fills, too; of one that was not heard of, as at first."""
        heard = (self._observed.get(other.address) for other in self.at(endpoint.stager) if other.address in others)
        known = next((observed for observed in heard if observed is not None), Observed())
        return {"stager": known.stager, "why": known.why, "is_silent": known.is_silent, "engine_answers": None}

    def _index(self) -> None:
        self._pool_of = _pool_of(self.snapshot.pools)
        at: dict[str, tuple[Endpoint, ...]] = {}
        for pool in self.snapshot.pools:
            for endpoint in pool.table.endpoints:
                if endpoint.stager:
                    at[endpoint.stager] = (*at.get(endpoint.stager, ()), endpoint)
        self._at = at

    def _shares(self, shares: Mapping[str, Mapping[str, int]], old: Collection[str]) -> None:
        """For a thread: show who owns how much. `old`: who had a share before."""
        for address in set(old).difference(*shares.values()):
            with contextlib.suppress(KeyError):
                self._metrics.share.remove(address)
        for slots in shares.values():
            size = sum(slots.values())
            for address, count in slots.items():
                self._metrics.share.labels(address).set(count / size)

    # -- stagers

    def start(self) -> None:
        """Connect to every stager and watch it until `stop`."""
        self._is_started = True
        self._connect_all()
        self._do(self._tick(), "loads")

    def _connect_all(self) -> None:
        """Raises what a stager's credentials are wrong by."""
        for stager in self._at.keys() - self._stagers.keys():
            client = self._clients.get(stager)
            if client is None:
                client = self._clients[stager] = self._connect(stager)
            watch = Watch(client, self, self._residency, self._models, self._probe, self._beat_s)
            self._stagers[stager] = _Stager(client, asyncio.create_task(watch.run(), name=f"watch {stager}"))

    def _connect_those_left(self) -> None:
        """The same while requests are served. A file of credentials that cannot be read now may be there in a moment, so it is tried again."""
        try:
            self._connect_all()
        except LoraExtprocError as error:
            log.warning("%d stagers are not connected to: %s", len(self._at.keys() - self._stagers.keys()), error.message)

    def _beat_s(self) -> float:
        return max(self._heartbeat_s, len(self._stagers) / WATCHES_PER_S)

    def _disconnect(self, address: str) -> None:
        stager = self._stagers.pop(address, None)
        client = self._clients.pop(address, None)
        self._residency.forget_stager(address)
        if stager is not None:
            stager.watch.cancel()
        if client is not None:
            self._do(_close(client, stager), f"close {address}")

    async def _tick(self) -> None:
        for tick in itertools.count(1):
            await asyncio.sleep(TICK_S)
            for loads in self.loads.values():
                loads.sweep(self._clock())
            if tick % CONNECT_TICKS == 0:
                self._connect_those_left()
            if tick % WINDOW_TICKS == 0:
                await asyncio.to_thread(self._popularity.roll)

    async def stop(self) -> None:
        """End what is done by itself; the clients stay open for who has to say good-bye."""
        await self._moves.close()
        tasks = [*self._tasks, *(stager.watch for stager in self._stagers.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._probe.close()

    # -- tasks

    def _later(self, seconds: float, then: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            then()

        self._do(wait(), "later")

    def _do(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _differ(old: Sequence[Endpoint], new: Sequence[Endpoint]) -> bool:
    return {(e, e.node, e.stager, e.zone) for e in old} != {(e, e.node, e.stager, e.zone) for e in new}


def _pool_of(pools: Iterable[Pool]) -> dict[str, str]:
    return {e.address: pool.name for pool in pools for e in pool.table.endpoints}


def _tables(pools: Collection[tuple[Pool, Sequence[Endpoint]]]) -> dict[str, tuple[LookupTable, Mapping[str, int]]]:
    """For a thread: the lookup table of each pool, and how many slots its endpoints have."""
    tables: dict[str, tuple[LookupTable, Mapping[str, int]]] = {}
    for pool, endpoints in pools:
        table = LookupTable(endpoints, next(size for size in (pool.table.size, *_SIZES) if size >= len(endpoints)))
        tables[pool.name] = (table, table.slots_per_endpoint())
    return tables


async def _close(client: StagerClient, stager: _Stager | None) -> None:
    if stager is not None:
        await asyncio.gather(stager.watch, return_exceptions=True)
    await client.close()
