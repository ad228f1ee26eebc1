"""What the engine knows by name because of us. Every version of an adapter has a name of its own there, `acme/sql@sha256:3f2a9c1b7d04`.

Why names of versions: vLLM keys its prefix cache by an adapter's name and path, and a request holds on to what its name meant when it came. So two
versions can be there at once, each request is answered by one of them wholly, and neither can fail because of the other. The router writes the
name into the request's body; where it cannot (mode NONE), the adapter's own name has to do, and versions are exchanged one after the other.

With `mode: api` a name is loaded from the artifact's own directory. With `mode: resolver` it is a link that vLLM's filesystem resolver finds.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...core.artifact import AdapterName, ArtifactId, adopted_id, digest_of, split_version, versioned_name
from ...core.life import State
from ...errors import GatewayProtocolError, InvalidAdapter, LoraExtprocError
from ...flight import SingleFlight
from ...metrics import StagerMetrics
from ..books.holdings import Holdings
from ..disk.store import Store
from ..threads import Threads
from .api import Engine
from .resident import Resident

log = logging.getLogger(__name__)

IN_TRANSIT_S = 0.5  # what was sent to the engine under a name that is about to mean something else has arrived by then
LOOKS = 5  # at a list that changes under the look
MAX_REFUSED = 10_000  # versions that the engine refused
SLICE = 200  # names of an earlier stager between two turns of the event loop: each is looked for in four ways, together some milliseconds
MAX_RELOADED = 64  # after a restart of an engine whose slots are not known


@dataclass(frozen=True, slots=True)
class Load:
    """One name in the engine."""

    adapter: AdapterName
    id: ArtifactId  # of the artifact


class Loads:
    """Names in the engine by what they lead to. Loads are shared by all who wait for one, and refusals remembered for a while."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        holdings: Holdings,
        metrics: StagerMetrics,
        disk: Threads,
        refused_s: float,
        clock: Callable[[], float] = time.monotonic,
        on_refused: Callable[[AdapterName], None] = lambda _: None,
        on_moved: Callable[[AdapterName], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._holdings = holdings
        self._metrics = metrics
        self._disk = disk
        self._refused_s = refused_s
        self._clock = clock
        self._on_refused = on_refused  # told of each version once
        self._on_moved = on_moved  # told of each adapter that may be in the engine's memory now, or may be there no longer
        self._resident = Resident()
        self._known: dict[str, Load] = {}
        self._names: dict[ArtifactId, set[str]] = {}  # the same by artifact
        self._is_compared = False  # with the engine's own list, since the start
        self._unloading: set[str] = set()
        self._changes = 0  # of what is known and of what is being unloaded: a list that was asked for before one of them says nothing
        self._unsettled: dict[ArtifactId, set[str]] = {}  # artifacts that were unloaded and not seen at rest since -> the names that were theirs
        self._refused: dict[Load, tuple[float, InvalidAdapter]] = {}  # -> until when that is the answer; at most MAX_REFUSED
        self._flights: SingleFlight[tuple[str, Load], None] = SingleFlight()

    async def close(self) -> None:
        await self._flights.close()

    def __len__(self) -> int:
        return len(self._known)

    def has(self, adapter: AdapterName, id_: ArtifactId) -> bool:
        """Whether the engine knows this version of the adapter."""
        return any(self._known.get(name) == Load(adapter, id_) for name in (versioned_name(adapter, digest_of(id_)), adapter))

    def in_memory(self, adapter: AdapterName, id_: ArtifactId) -> bool:
        """Whether the engine knows this version, and has it in memory, as far as can be told (resident.py)."""
        load = Load(adapter, id_)
        return any(name in self._resident and self._known.get(name) == load for name in (versioned_name(adapter, digest_of(id_)), adapter))

    def used(self, names: Iterable[str]) -> None:
        """The engine has these names in memory now: it works on requests by them. Names that are not ours say nothing."""
        for name in names:
            if name in self._known:
                self._tell_moved(self._resident.used(name, self.slots))

    def trim(self) -> None:
        """The number of the engine's slots was learned, or may have been."""
        self._tell_moved(self._resident.trim(self.slots))

    @property
    def slots(self) -> int:
        """Adapters in the engine's memory at most; 0: not known. A vLLM that is told nothing else keeps as many as it runs."""
        return self._engine.limits.max_cpu_loras or self._engine.limits.max_loras

    def _tell_moved(self, names: Iterable[str]) -> None:
        for name in names:
            version = split_version(name)
            self._on_moved(AdapterName(version[0] if version else name))

    def still_has(self, adapter: AdapterName, id_: ArtifactId, model: str, *, plain: bool) -> bool:
        """Whether the engine answers to `model` with this version. Before its list was seen what an earlier stager let it know is believed, and kept in mind:
        the first look tells what it has lost.
        """
        if not self._engine.exists:
            return model == adapter
        name, load = adapter if plain else versioned_name(adapter, digest_of(id_)), Load(adapter, id_)
        if not model.endswith(name) or (self._is_compared and self._engine.request_model(name) != model):  # its base's name may not be known yet
            return False
        if not self._engine.loads and plain:
            return True  # its resolver finds the adapter's own link
        if self._engine.loads and not self._is_compared and name not in self._known:
            self._learn(name, load)
        return self._known.get(name) == load

    async def ensure(self, adapter: AdapterName, id_: ArtifactId, *, plain: bool) -> str:
        """Let the engine know the artifact; what a request's `model` must be. The caller sees to it that the artifact stays meanwhile.

        `plain`: under the adapter's own name. Raises InvalidAdapter with what the engine has against it, or EngineUnreachable.
        """
        if not self._engine.exists:
            return adapter
        name, load = adapter if plain else versioned_name(adapter, digest_of(id_)), Load(adapter, id_)
        model = self._engine.request_model(name)
        if plain and model != adapter:
            raise GatewayProtocolError("this node's engine needs the request's `model` rewritten, which processing mode NONE does not allow")
        if self._known.get(name) == load:
            self.used((name,))  # a request by it comes next
            return model
        if not self._engine.loads and plain:
            return model  # its resolver finds the adapter's own link
        self._refuse(load)
        await self._flights.join((name, load), lambda: self._load(name, load))
        return model

    def begin(self, adapter: AdapterName, id_: ArtifactId) -> None:
        """Start to load a version that somebody will ask for in a moment. Whatever comes of it, `ensure` tells."""
        name, load = versioned_name(adapter, digest_of(id_)), Load(adapter, id_)
        if self._engine.loads and name not in self._known:
            with contextlib.suppress(InvalidAdapter):
                self._refuse(load)
                self._flights.start((name, load), lambda: self._load(name, load))

    async def replace(self, adapter: AdapterName, old: ArtifactId, new: ArtifactId) -> None:
        """Where the engine knows the old version, let it know the new one, before anybody is sent there. If it refuses the new one, the old one stays."""
        if self.has(adapter, old):
            await self.ensure(adapter, new, plain=False)

    async def unload(self, name: str, id_: ArtifactId) -> None:
        """Make the engine forget a name of the artifact, which counts as unsettled until it was seen at rest.

        It is forgotten here first: if the engine's answer is lost, nobody is sent to a name that may not be there any more.
        """
        self._unsettled.setdefault(id_, set()).add(name)
        self._unloading.add(name)
        self.forget((name,))
        try:
            await self._engine.unload(name)
            if self._engine.unload_frees:
                self._resident.drop(name)
        finally:
            self._unloading.discard(name)
            self._changes += 1

    def unsettled(self, id_: ArtifactId) -> set[str]:
        """Names under which the artifact was known to the engine, and that may be those of requests which it has still."""
        return self._unsettled.get(id_, set())

    def settled(self, id_: ArtifactId) -> None:
        """The engine was seen without any request of it."""
        self._unsettled.pop(id_, None)

    def names_of(self, id_: ArtifactId, adapters: Collection[AdapterName] | None = None) -> list[str]:
        """Names by which the engine knows the artifact because of us; with `adapters`, only those of these."""
        return [name for name in sorted(self._names.get(id_, ())) if adapters is None or self._known[name].adapter in adapters]

    def knows(self, name: str) -> bool:
        """Whether the engine knows the name because of us."""
        return name in self._known

    @property
    def is_at_work(self) -> bool:
        """Whether a load is in progress, or waits for its turn."""
        return len(self._flights) > 0

    def next_out(self) -> ArtifactId | None:
        """What falls out of the engine's memory when one more adapter is loaded; None where nothing of ours does."""
        name = self._resident.next_out(self.slots)
        load = self._known.get(name) if name is not None else None
        return load.id if load is not None else None

    def is_loading(self, id_: ArtifactId) -> bool:
        """Whether the engine is about to know the artifact, and does not list it yet."""
        return any(load.id == id_ for _, load in self._flights)

    def links(self, id_: ArtifactId, names: Collection[AdapterName] | None = None) -> list[str]:
        """Names of ours that a resolver finds the artifact by, beside the adapters' own."""
        return [] if self._engine.loads else self.names_of(id_, names)

    def forget(self, names: Collection[str]) -> None:
        """The engine does not know them any more. It may have requests that came by them."""
        for name in names:
            self._unlearn(name)
        self._changes += 1

    def take(self, links: Mapping[str, ArtifactId]) -> None:
        """Links that the start found in the directory: name in the engine -> digest."""
        for name, digest in links.items():
            if (version := split_version(name)) is not None:
                self._learn(name, Load(AdapterName(version[0]), digest))

    # -- what the engine says it knows

    async def compare(self) -> set[str]:
        """Look at the engine's own list; the names that it has lost, because it was restarted or somebody else unloaded them.

        Nothing is concluded from a list that was asked for before something was loaded or unloaded.
        """
        if not self._engine.loads:
            return set()
        for _ in range(LOOKS):
            before = self._changes
            listed = (await self._engine.known()).adapters
            found = await self._found(listed)
            if before == self._changes and await self._learn_all(found):
                break
        else:
            return set()
        self._is_compared = True
        self._unsettled = {id_: names for id_, names in self._unsettled.items() if self._holdings.index.is_known(id_)}
        return {name for name in self._known if name not in listed}

    async def _learn_all(self, found: Mapping[str, Load]) -> bool:
        """Whether nothing has changed meanwhile: what is left then may not be so any more. In the order of the list, which has what was loaded last at its end."""
        before = self._changes
        for number, (name, load) in enumerate(found.items()):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
                if before != self._changes:
                    return False
            self._learn(name, load)
        return True

    async def _found(self, listed: Mapping[str, str]) -> dict[str, Load]:
        """What an earlier stager on this directory let the engine know."""
        found: dict[str, Load] = {}
        for number, (name, root) in enumerate(listed.items()):
            if number % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            if name not in self._known and name not in self._unloading and (load := self._made_of(name, root)) is not None:
                found[name] = load
        return found

    async def load_again(self, lost: Collection[str]) -> set[AdapterName]:
        """Of the names that the engine lost, load those that are in demand, as many as it keeps in memory; the adapters that it does not know now."""
        now, index = self._clock(), self._holdings.index
        loads = {name: self._known[name] for name in lost if name in self._known}
        for name in lost:
            self._resident.drop(name)
        self.forget(lost)
        entries = {name: entry for name, load in loads.items() if (entry := index.get(load.id)) is not None and entry.leased_until > now}
        latest_first = sorted(entries, key=lambda name: entries[name].last_used, reverse=True)
        missing = dict(loads)
        for name in latest_first[: self._engine.limits.max_cpu_loras or MAX_RELOADED]:
            load = loads[name]
            if not index.hold(load.id):
                continue
            try:
                await self._flights.join((name, load), partial(self._load, name, load))
                del missing[name]
            except LoraExtprocError as error:  # whatever it was: routers must be told of those that are missing
                log.warning("%s is not loaded again: %s", load.adapter, error.message)
            finally:
                index.let_go(load.id)
        return {load.adapter for load in missing.values()}

    def _made_of(self, name: str, root: str) -> Load | None:
        """What a name that the engine lists leads to here, if it was we who loaded it."""
        version = split_version(name)
        adapter = AdapterName(version[0] if version else name)
        for id_ in (ArtifactId(Path(root).name), adopted_id(Path(root).name, adapter)):
            if root == str(self._store.path(id_)) and self._holdings.index.get(id_) is not None:
                return Load(adapter, id_)
        named = self._holdings.get(adapter)
        if version and named is not None and leads_to(name, named.id) and root == str(self._store.path(named.id)):
            return Load(adapter, named.id)
        return None

    def refuses(self, adapter: AdapterName, id_: ArtifactId) -> bool:
        """Whether the engine has refused this version the last time."""
        return Load(adapter, id_) in self._refused

    def refused_adapters(self) -> set[AdapterName]:
        """Adapters of which the engine has refused some version."""
        return {load.adapter for load in self._refused}

    def pardon(self, id_: ArtifactId) -> None:
        """The files that it refused are not there any more."""
        for load in [load for load in self._refused if load.id == id_]:
            del self._refused[load]

    def _learn(self, name: str, load: Load) -> None:
        """The engine knows `load` as `name`."""
        if self._known.get(name) != load:
            self._unlearn(name)
        self._known[name] = load
        self._names.setdefault(load.id, set()).add(name)
        self._holdings.index.stands(load.id, State.LOADED)
        self._tell_moved({name, *self._resident.used(name, self.slots)})

    def _unlearn(self, name: str) -> None:
        load = self._known.pop(name, None)
        if load is None:
            return
        self._unsettled.setdefault(load.id, set()).add(name)
        self._on_moved(load.adapter)
        names = self._names[load.id]
        names.discard(name)
        if not names:
            del self._names[load.id]
            self._holdings.index.stands(load.id, State.UNLOADED)

    def _refuse(self, load: Load) -> None:
        until, error = self._refused.get(load, (0.0, None))
        if error is not None and self._clock() < until:
            raise InvalidAdapter(error.message, error.what)

    async def _load(self, name: str, load: Load) -> None:
        began = self._clock()
        result = "cancelled"
        try:
            if self._engine.loads:
                await self._load_by_api(name, load)
            else:
                await self._disk.run(self._store.show_version, name, load.id)
            self._learn(name, load)
            self._changes += 1
            self._refused.pop(load, None)
            result = "loaded"
        except InvalidAdapter as error:
            result = error.reason
            if load not in self._refused:
                self._on_refused(load.adapter)
            if len(self._refused) >= MAX_REFUSED:
                del self._refused[next(iter(self._refused))]
            self._refused[load] = (self._clock() + self._refused_s, error)  # kept beyond that time: who lists what can be served leaves it out
            self._metrics.verify_failures.labels(error.what).inc()
            log.warning("%s: %s", load.adapter, error.message)
            raise
        except LoraExtprocError as error:
            result = error.reason
            raise
        finally:
            took = self._clock() - began
            self._metrics.engine_loads.labels(result).inc()
            self._metrics.engine_load_seconds.observe(took)
        log.info("%s: the engine knows it as %s after %.0f ms", load.adapter, name, took * 1000)

    async def _load_by_api(self, name: str, load: Load) -> None:
        if (other := self._known.get(name)) is not None:  # an adapter's own name that leads to another version
            await asyncio.sleep(IN_TRANSIT_S)
            await self.unload(name, other.id)
        options = await self._disk.run(self._store.load_options, load.id)
        await self._engine.load(name, self._store.path(load.id), options)


def leads_to(name: str, id_: ArtifactId) -> bool:
    """Whether `name` is that of this version of some adapter."""
    version = split_version(name)
    return version is not None and digest_of(id_).startswith(version[1])
