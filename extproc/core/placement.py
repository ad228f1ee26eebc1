"""Which pool a model belongs to and which endpoints may serve a key: the snapshot every decision is made on, replaced whole."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from .endpoint import Endpoint
from .maglev import LookupTable
from .standing import Standing

_REMEMBERED_KEYS = 65_536  # orders kept per pool; at 100 endpoints one costs 50 us to compute and 1 KB to keep
_REMEMBERED_KEY_CHARS = 512  # an adapter's name has 256 bytes; a header that is hashed may have 60 KB, and a client invents them


@dataclass(frozen=True, slots=True)
class Pool:
    """The endpoints that serve one base model: one Envoy cluster, one lookup table."""

    name: str
    base_models: frozenset[str]
    adapters: tuple[str, ...]  # shell patterns of the adapter names that run on this base
    table: LookupTable
    paths: tuple[str, ...] = ()  # shell patterns of paths whose requests come here although they name no model
    _takes_all: bool = field(init=False, repr=False, compare=False)
    _orders: dict[str, tuple[Endpoint, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_takes_all", "*" in self.adapters)

    def serves(self, adapter: str) -> bool:
        """Whether one of the patterns matches."""
        return self._takes_all or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def candidates(self, key: str) -> tuple[Endpoint, ...]:
        """`LookupTable.candidates`, remembered: the table never changes."""
        order = self._orders.get(key)
        if order is None:
            order = self.table.candidates(key)
            if len(key) <= _REMEMBERED_KEY_CHARS:
                if len(self._orders) >= _REMEMBERED_KEYS:
                    self._orders.clear()
                self._orders[key] = order
        return order


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

    def usable(self, order: Iterable[Endpoint], subset: Sequence[str] | None = None) -> tuple[Endpoint, ...]:
        """`order` without the endpoints that are down, and within the gateway's subset hint (`ip:port` or `ip`) if it gave one."""
        up = tuple(e for e in order if self.standing(e) is not Standing.DOWN) if self.standings else tuple(order)
        if subset is None:
            return up
        allowed = frozenset(hint.strip("[]") for hint in subset)
        return tuple(e for e in up if e.address.strip("[]") in allowed or e.address.rpartition(":")[0].strip("[]") in allowed)

    def stageable(self, usable: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        """Those of `usable` that may be given something new."""
        return tuple(e for e in usable if self.standing(e) is Standing.READY) if self.standings else usable
