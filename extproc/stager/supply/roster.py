"""Who the other stagers are: those of `stager.peers.addresses`; else those of the endpoints that the settings name and that their sources find.

Sources of endpoints are followed as a router follows them, so what one found last counts while it fails, over a restart too with `discovery.dir`. Nothing
waits for them: until one answers, adapters come from their origins.

A stager asks within its own pools, since others' adapters are made for other engines. Which pools are its own is known by its address in them. One that
listens on every address of its machine finds itself under any of these; one that is reached by an address of which its machine knows nothing, as behind
NAT or a name, learns it when it asks there and is answered by itself. Until then all pools count.

Of more stagers than are asked for one adapter, those where it belongs are asked first (places.py). Addresses in `stager.peers` are no endpoints: of them
nothing says where an adapter belongs.
"""

import asyncio
import logging
import socket
from collections.abc import Collection, Mapping, Sequence, Set
from ipaddress import IPv4Address, IPv6Address, ip_address

from ...config.settings import Settings
from ...core.endpoint import Endpoint
from ...core.fleet import Fleet
from ...discovery.discovery import Discovery
from ...discovery.sources import build_sources
from ...metrics import DiscoveryMetrics
from .peers import Peers
from .places import Places

log = logging.getLogger(__name__)

_ANY_PORT = 9  # a socket of datagrams is given one to know its route, and sends nothing


class Roster:
    """Keeps `peers` up to date. `open`, then `close`."""

    def __init__(self, settings: Settings, peers: Peers, metrics: DiscoveryMetrics) -> None:
        stager = settings.stager
        named = stager.peers.addresses
        self._peers = peers
        self._listen = stager.listen
        self._table_size, self._by_weight = settings.router.table_size, settings.router.balance == "hrw"
        self._max_asked = stager.peers.max_asked
        self._has_endpoints = stager.peers.mode != "off" and not named
        self._pools: Mapping[str, Sequence[Endpoint]] = {p.name: p.members() for p in settings.pools}
        if named:
            self._pools = {"": [Endpoint(address, stager=address) for address in named]}
        self._leads_here: dict[str, bool] = {}  # of each stager that was shown last
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._discovery: Discovery | None = None
        if self._has_endpoints and any(pool.discovery for pool in settings.pools):
            self._discovery = Discovery(build_sources(settings.pools), settings.discovery, metrics)

    async def open(self) -> None:
        """The stagers that the settings name are known when this returns; what is found follows in the background."""
        await self._follow()
        self._peers.on_self = self._changed.set
        self._tasks.append(asyncio.create_task(self._keep_following(), name="peers"))
        if self._discovery is not None:
            self._tasks.append(asyncio.create_task(self._find(self._discovery), name="peers are found"))

    async def close(self) -> None:
        self._peers.on_self = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._discovery is not None:
            await self._discovery.stop()

    async def _find(self, discovery: Discovery) -> None:
        await self._take(await discovery.first())
        discovery.follow(self._take)

    async def _take(self, fleet: Fleet) -> None:
        self._pools = {pool: [found.endpoint for found in several] for pool, several in fleet.items()}
        self._changed.set()

    async def _keep_following(self) -> None:
        are_some: bool | None = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._follow()
            count = self._peers.count
            if are_some is not bool(count):
                are_some = bool(count)
                log.info("peers: %s", f"{count} found" if are_some else "no other stager is found; adapters come from their origins alone")

    async def _follow(self) -> None:
        """In a thread: to look at an address takes 20 us, and there may be thousands. Each is looked at once. To fill the tables takes longer."""
        pools, seen = tuple(self._pools.values()), self._leads_here
        selves = frozenset(self._peers.selves)

        def look() -> tuple[dict[str, bool], set[str], Places | None]:
            stagers = {e.stager for pool in pools for e in pool if e.stager}
            looked = {stager: seen[stager] if stager in seen else leads_here(stager, self._listen) for stager in stagers}
            here = {stager for stager, leads in looked.items() if leads}
            ours = own_pools(pools, here | selves)
            others = {e.stager for pool in ours for e in pool if e.stager} - here
            if not self._has_endpoints or len(others) <= self._max_asked:
                return looked, others, None
            return looked, others, Places(ours, here | selves, self._table_size, by_weight=self._by_weight)

        self._leads_here, others, places = await asyncio.to_thread(look)
        self._peers.follow(others, places)


def own_pools(pools: Collection[Sequence[Endpoint]], own: Set[str]) -> Collection[Sequence[Endpoint]]:
    """Those that hold one of the `own` addresses of this stager, or all where none does."""
    return [pool for pool in pools if any(e.stager in own for e in pool)] or pools


def leads_here(address: str, listen: str) -> bool:
    """Whether `host:port` is where a process of this machine listens that was told `listen`, as far as both and this machine's addresses tell."""
    (host, port), (listen_host, listen_port) = _split(address), _split(listen)
    if port != listen_port:
        return False
    if host == listen_host:
        return True
    if not isinstance(listen_host, str) and listen_host.is_unspecified:
        return host == socket.gethostname().lower() if isinstance(host, str) else _is_of_this_machine(host)
    return False


def _split(address: str) -> tuple[IPv4Address | IPv6Address | str, int]:
    """An IP address in its shortest form, be it written as IPv6 or not; or a name."""
    host, _, port = address.rpartition(":")
    try:
        ip = ip_address(host.strip("[]"))
    except ValueError:
        return host.lower(), int(port)
    return (isinstance(ip, IPv6Address) and ip.ipv4_mapped) or ip, int(port)


def _is_of_this_machine(ip: IPv4Address | IPv6Address) -> bool:
    """What goes to an address of its own a machine sends from that address."""
    if ip.is_loopback:
        return True
    try:
        with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect((str(ip), _ANY_PORT))
            return ip_address(probe.getsockname()[0].partition("%")[0]) == ip
    except OSError:  # no route leads there
        return False
