"""One artifact on its way out: what goes, how far that has come, and why it stays if it has to."""

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from ...core.artifact import AdapterName, ArtifactId
from ...errors import AdapterInUse, DiskFailed


class Stays(Enum):
    """Why an artifact that was chosen is still there."""

    READ = "read"  # the engine reads it
    QUEUED = "queued"  # the engine's queue was not empty
    LISTED = "listed"  # the engine was told to forget it, and lists a name of it all the same
    UNKNOWN = "unknown"  # the engine could not be asked or told
    DISK = "disk"  # the disk would not let it go
    PREPARED = "prepared"  # it was only made ready to go


@dataclass(slots=True, eq=False)
class Removal:
    """One artifact on its way out. With `names`, only these of its names go; the content stays while another name leads to it."""

    id: ArtifactId
    cause: str
    names: tuple[AdapterName, ...]
    only: tuple[AdapterName, ...] | None
    deletes: bool = True  # False: it is only made ready
    links: tuple[str, ...] = ()
    is_settled: bool = False  # it was seen at rest
    is_gone: bool = False
    stays: Stays | None = None
    error: AdapterInUse | DiskFailed | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def title(self) -> str:
        return ", ".join(self.names) or self.id

    def keep(self, why: Stays, error: AdapterInUse | DiskFailed | None = None) -> None:
        self.stays = why
        self.error = error or AdapterInUse(f"{self.title} may still be read by the engine")
