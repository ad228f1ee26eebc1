"""What a case's script works with: the fleet under load, and the marks it sets."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .load import Load
from .network import Network
from .origin import Origin
from .record import Record
from .topology import Fleet


@dataclass
class Scene:
    """`victim` owns most of the warm adapters: what befalls it is felt."""

    fleet: Fleet
    load: Load
    origin: Origin
    network: Network | None
    record: Record
    directory: Path
    scale: float = 1.0
    victim: str = ""

    async def run(self, seconds: float, *, at_least: float = 0.0) -> None:
        """Let the load run. `--seconds-scale` counts here, but not below `at_least`."""
        await asyncio.sleep(max(at_least, seconds * self.scale))

    def fault(self) -> None:
        """It begins. The first counts."""
        self.record.fault_at = self.record.fault_at or time.monotonic()

    def mended(self) -> None:
        """It is over. The last counts."""
        self.record.mended_at = time.monotonic()

    def note(self, name: str, value: float) -> None:
        self.record.figures[name] = float(value)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note the seconds that the block takes, without the machine's own stops."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.note(name, ended - began - self.record.bystander.stopped_s(began, ended))

    async def find_victim(self) -> None:
        owners = Counter([await self.fleet.owner(name) for name in self.load.warm])
        self.victim = owners.most_common(1)[0][0]

    @property
    def others(self) -> list[str]:
        """The nodes that run from the start, without the victim."""
        return [node.name for node in self.fleet.nodes[: self.fleet.layout.nodes] if node.name != self.victim]
