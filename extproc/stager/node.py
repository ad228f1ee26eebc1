"""What the parts of one stager share. A part is given the node, and the settings that are its own."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..config.stager import StagerSettings
from ..core.artifact import AdapterName
from ..metrics import StagerMetrics
from .adapter.width import Widths
from .books.changes import Changes
from .books.holdings import Holdings
from .books.readiness import Readiness
from .books.refusals import Refusals
from .disk.store import Store
from .engine.api import Engine
from .engine.names import Loads
from .threads import Threads


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One directory, the engine that reads it, and what is known of both."""

    settings: StagerSettings
    store: Store
    holdings: Holdings  # names, artifacts, leases and the disk's budget
    engine: Engine
    loads: Loads  # what the engine knows by name because of us
    changes: Changes  # what watchers are told
    readiness: Readiness
    refusals: Refusals  # what is not asked for or fetched again
    metrics: StagerMetrics
    disk: Threads  # in which all work on the directory is done
    clock: Callable[[], float]  # seconds; goes forward only
    widths: Widths = field(default_factory=Widths)

    def width(self) -> int:
        """The base model's hidden size, from its own configuration; 0 where that cannot be read. Blocks."""
        roots = [base.root for base in self.engine.bases if base.root.startswith("/")]
        return self.widths.of(self.settings.engine.base_config or (f"{roots[0]}/config.json" if roots else ""))

    def stated(self, name: AdapterName) -> tuple[str, ...]:
        """Every SHA-256 that the weights under `name` must have, by the settings and by its pin."""
        return tuple(filter(None, (self.settings.digests.get(name), self.holdings.pins.get(name))))
