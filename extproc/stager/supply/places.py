"""Which other stagers most probably have an adapter: those where routers put it, by the same lookup table that routers fill of the same endpoints.

| table of | names first | has it when |
| --- | --- | --- |
| all endpoints but this stager's own | who owned the key before this node came | this node has just come |
| all endpoints | the owner of the key, and those that are next | another copy is made, since one is too busy or leaves |

A stager fills them of the endpoints that its own sources show and of its own `router.table_size` and `router.balance`; the adapter's name is the key. What
routers see may differ: for seconds, while a change is on its way or a router waits for an endpoint that may come back; or always, where routers are given
other settings, or hash something else than the model. Then the stagers that are named have it as probably as any other, and nothing else is lost.
"""

from collections.abc import Collection, Sequence, Set
from itertools import chain, zip_longest

from ...core.endpoint import Endpoint
from ...core.maglev import FIRST, LookupTable


class Places:
    """Tables of the pools in which this stager looks. To fill one blocks for a tenth of a second, and one has half a megabyte."""

    def __init__(self, pools: Collection[Sequence[Endpoint]], own: Set[str], table_size: int, *, by_weight: bool = False) -> None:
        """`own`: this stager's addresses. A pool of more endpoints than a table has slots gives nothing: routers fill a larger one."""
        self._by_weight = by_weight
        sets = chain.from_iterable(dict.fromkeys((tuple(e for e in pool if e.stager not in own), tuple(pool))) for pool in pools)
        self._tables = [LookupTable(endpoints, table_size) for endpoints in sets if 0 < len(endpoints) <= table_size]

    def of(self, name: str) -> list[str]:
        """Addresses of stagers, the most probable first: at most FIRST of each table."""
        orders = [table.by_weight(name)[:FIRST] if self._by_weight else table.first(name, FIRST) for table in self._tables]
        return list(dict.fromkeys(e.stager for place in zip_longest(*orders) for e in place if e is not None and e.stager))
