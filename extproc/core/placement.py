"""Which pool a model belongs to and which endpoints may serve a key: the snapshot every decision is made on, replaced whole."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache

from .choice import HOME
from .endpoint import Endpoint
from .maglev import FIRST, MAX_KEY_CHARS, LookupTable
from .standing import Standing

_REMEMBERED_KEYS = 65_536  # orders kept per pool; one costs some 4 us to compute and 300 bytes to keep


@dataclass(frozen=True, slots=True)
class Pool:
    """The endpoints that serve one base model: one Envoy cluster, one lookup table."""

    name: str
    base_models: frozenset[str]
    adapters: tuple[str, ...]  # shell patterns of the adapter names that run on this base
    table: LookupTable
    paths: tuple[str, ...] = ()  # shell patterns of paths whose requests come here although they name no model
    by_weight: bool = False  # a key's order is that of highest random weight alone, without the table
    prefill: str = ""  # the pool that computes prompts for this one's engines, which only decode; "": they do both
    is_prefill: bool = False  # it computes prompts for others, and no request is for it
    _takes_all: bool = field(init=False, repr=False, compare=False)
    _first: Callable[[str, int], tuple[Endpoint, ...]] = field(init=False, repr=False, compare=False)
    _at: Mapping[str, tuple[Endpoint, ...]] = field(init=False, repr=False, compare=False)
    _has_bare: bool = field(init=False, repr=False, compare=False)  # endpoints without a stager

    def __post_init__(self) -> None:
        object.__setattr__(self, "_takes_all", "*" in self.adapters)
        first = (lambda key, count: self.table.by_weight(key)[:count]) if self.by_weight else self.table.first
        object.__setattr__(self, "_first", lru_cache(_REMEMBERED_KEYS)(first))  # the table never changes
        at: dict[str, tuple[Endpoint, ...]] = {}
        for endpoint in self.table.endpoints:
            if endpoint.stager:
                at[endpoint.stager] = (*at.get(endpoint.stager, ()), endpoint)
        object.__setattr__(self, "_at", at)
        object.__setattr__(self, "_has_bare", any(not endpoint.stager for endpoint in self.table.endpoints))

    def serves(self, adapter: str) -> bool:
        """Whether one of the patterns matches."""
        return self._takes_all or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def candidates(self, key: str, count: int = FIRST) -> tuple[Endpoint, ...]:
        """The first `count` endpoints in the key's order, remembered."""
        if len(key) > MAX_KEY_CHARS:
            return self.table.by_weight(key)[:count] if self.by_weight else self.table.first(key, count)
        return self._first(key, count)

    def order(self, key: str) -> tuple[Endpoint, ...]:
        """Every endpoint, in the key's order."""
        return self.table.by_weight(key) if self.by_weight else self.table.order(key)

    def has_another_ready(self, endpoint: Endpoint, standings: Mapping[str, tuple[Standing, str]]) -> bool:
        """Whether some other endpoint than that one is ready, by these standings of those that are not."""
        return any(e != endpoint and e.address not in standings for e in self.table.endpoints)

    def at(self, stager: str) -> tuple[Endpoint, ...]:
        """The endpoints whose directory that stager fills."""
        return self._at.get(stager, ())

    def staged(self, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Those of the pool's `endpoints` that have a stager."""
        return [endpoint for endpoint in endpoints if endpoint.stager] if self._has_bare else endpoints


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Endpoints, tables and standings at one moment. Standings are applied to the walk, not to the table: an endpoint that comes back has
    its keys again, and while it is away each of them has one fixed substitute."""

    pools: tuple[Pool, ...]
    standings: Mapping[str, tuple[Standing, str]] = field(default_factory=dict)  # address -> standing and why, of those that are not ready
    version: int = 0

    def pool(self, name: str) -> Pool | None:
        """The pool of that name."""
        return next((pool for pool in self.pools if pool.name == name), None)

    def base_pool(self, model: str) -> Pool | None:
        """The pool that has `model` as a base model."""
        for pool in self.pools:
            if model in pool.base_models:
                return pool
        return None

    def adapter_pool(self, adapter: str) -> Pool | None:
        """The first pool, in the configured order, one of whose patterns matches `adapter`."""
        for pool in self.pools:
            if pool.serves(adapter):
                return pool
        return None

    def path_pool(self, path: str) -> Pool | None:
        """The first pool, in the configured order, one of whose path patterns matches."""
        for pool in self.pools:
            if any(fnmatchcase(path, pattern) for pattern in pool.paths):
                return pool
        return None

    def standing(self, endpoint: Endpoint) -> Standing:
        """What `endpoint` may be given."""
        known = self.standings.get(endpoint.address)
        return Standing.READY if known is None else known[0]

    def serves(self, endpoint: Endpoint) -> bool:
        """Whether `endpoint` may be sent what it has: it need not be given anything new."""
        return self.standing(endpoint) in (Standing.READY, Standing.DRAINING)

    def candidates(self, pool: Pool, key: str, subset: Sequence[str] | None = None) -> tuple[Endpoint, ...]:
        """The first endpoints in the key's order that are not down, HOME of which may be given something new if there are so many, within the gateway's
        subset hint if it gave one. Only where the key's own first places are away, or the hint leaves few, are all endpoints looked at."""
        if subset is None:
            usable = self.usable(pool.candidates(key))
            if not self.standings or len(self.stageable(usable)) >= min(HOME, len(pool.table.endpoints)):
                return usable
        usable = self.usable(pool.order(key), subset)
        first = usable[:FIRST]
        return (*first, *(endpoint for endpoint in self.stageable(usable)[:HOME] if endpoint not in first))

    def usable(self, order: Iterable[Endpoint], subset: Sequence[str] | None = None) -> tuple[Endpoint, ...]:
        """`order` without the endpoints that are down, and within the gateway's subset hint (`ip:port` or `ip`) if it gave one."""
        up = tuple(e for e in order if self.standing(e) is not Standing.DOWN) if self.standings else tuple(order)
        if subset is None:
            return up
        allowed = frozenset(hint.strip("[]") for hint in subset)
        return tuple(e for e in up if e.address.strip("[]") in allowed or e.address.rpartition(":")[0].strip("[]") in allowed)

    def stageable(self, usable: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
        """Those of `usable` that may be given something new."""
        return tuple(e for e in usable if self.standing(e) is Standing.READY) if self.standings else tuple(usable)
