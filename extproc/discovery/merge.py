"""One fleet of what all sources show. Pure.

The sources of a pool are added up by address. Where several show one address, each field is what the last source says that says anything of it, and
the endpoint is leaving if any of them says so: DNS may find an endpoint whose stager the settings name. An address belongs to one pool, the first
of the settings that shows it; Envoy could not tell two apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.endpoint import Endpoint
from ..core.fleet import Fleet, Found
from .entries import MAX_COMPLAINTS, row

Sets = Mapping[str, Sequence[tuple[str, Sequence[Found]]]]  # by pool, in the settings' order: each source's name and set


@dataclass(frozen=True, slots=True)
class Merged:
    """The fleet, each pool's endpoints in the order of their addresses, and what had to be left out of it."""

    fleet: Fleet
    complaints: tuple[str, ...]


def merge(sets: Sets) -> Merged:
    """The same sets give the same fleet on every router, in whatever order they arrived."""
    fleet: dict[str, tuple[Found, ...]] = {}
    pool_of: dict[str, str] = {}
    complaints: list[str] = []
    for pool, sources in sets.items():
        found: dict[str, Found] = {}
        for name, endpoints in sources:
            for one in endpoints:
                address = one.endpoint.address
                other = pool_of.setdefault(address, pool)
                if other != pool:
                    if len(complaints) < MAX_COMPLAINTS:
                        complaints.append(f"pool {pool}: {name}: {address} is left out: it is in pool {other}, and an endpoint serves one pool")
                    continue
                known = found.get(address)
                found[address] = one if known is None else _both(known, one)
        fleet[pool] = tuple(_named(found[address]) for address in sorted(found))
    return Merged(fleet, tuple(complaints))


def is_same(one: Fleet, other: Fleet) -> bool:
    """Whether both say the same of every endpoint."""
    return one.keys() == other.keys() and all(is_same_set(one[pool], other[pool]) for pool in one)


def is_same_set(one: Sequence[Found], other: Sequence[Found]) -> bool:
    """Whether both list the same, in the same order."""
    return len(one) == len(other) and all(a is b or row(a) == row(b) for a, b in zip(one, other, strict=True))


def _both(earlier: Found, later: Found) -> Found:
    a, b = earlier.endpoint, later.endpoint
    endpoint = Endpoint(a.address, b.node or a.node, b.stager or a.stager, b.instance or a.instance, b.zone or a.zone)
    return Found(endpoint, earlier.is_leaving or later.is_leaving)


def _named(found: Found) -> Found:
    """An endpoint of which no source says the node is its own node."""
    e = found.endpoint
    return found if e.node else Found(replace(e, node=e.address), found.is_leaving)
