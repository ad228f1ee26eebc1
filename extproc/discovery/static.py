"""The endpoints of the settings: always there, until a start with other settings."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from ..config.pools import EndpointSettings
from ..core.endpoint import Endpoint
from ..core.fleet import Found
from .source import Seen, Shown


class StaticSource:
    """`pools[].endpoints`, which the settings have checked."""

    name = "static"
    is_final = True

    def __init__(self, endpoints: Sequence[EndpointSettings]) -> None:
        self._endpoints = tuple(Found(Endpoint(e.address, e.node, e.stager, zone=e.zone)) for e in endpoints)

    async def sets(self) -> AsyncGenerator[Seen, None]:
        """The one set."""
        yield Shown(self._endpoints)
        await asyncio.get_running_loop().create_future()
