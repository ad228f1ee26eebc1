"""What every origin is: say what is under a name, bring one file of it."""

import fnmatch
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

from ....config.origins import OriginSettings
from ....core.artifact import AdapterName
from ....errors import OriginRefused
from ...threads import Threads
from ..download import Download
from ..listing import Absent, Listing, RemoteFile
from .names import Names


class Fetches(Protocol):
    """Gives files of a listing. Raises OriginFailed (worth repeating) or OriginRefused (not), nothing else; running out of disk is the disk's error."""

    label: str  # what logs and metrics call it

    async def open(self) -> None:
        """Load what takes long to load, before anybody waits. Asks nobody."""

    async def fetch(self, listing: Listing, file: RemoteFile, download: Download, /) -> None:
        """Bring what `download` still lacks of one file of the listing."""

    async def close(self) -> None:
        """Give connections back."""


class Origin(Fetches, Protocol):
    """Says besides what there is, and raises the same."""

    async def resolve(self, name: AdapterName) -> Listing | Absent | None:
        """What the origin has under `name`; Absent if that is no adapter, None if there is nothing."""


@runtime_checkable
class Probed(Protocol):
    """An origin that has a cheap way to tell whether it is up at all, whatever is wrong with one object."""

    async def probe(self) -> None:
        """Return if it answers, be it with a refusal; raise OriginFailed if not."""


@runtime_checkable
class Listable(Protocol):
    """An origin that can tell all that it has."""

    async def list_all(self, found: Names, threads: Threads, /) -> None:
        """Feed `found` with the path of every file, until it is full. What blocks is done in `threads`. Raises OriginFailed."""


def token_for(settings: OriginSettings, name: str, default_env: str = "") -> str:
    """The token that `name` is asked with: its own, else the file's, else the environment's; "" for none. Raises OriginRefused."""
    own = next((variable for pattern, variable in settings.adapter_token_env.items() if fnmatch.fnmatchcase(name, pattern)), None)
    if own is not None:
        return os.environ.get(own, "")
    if settings.token_file:
        try:
            return Path(settings.token_file).read_text().strip()
        except OSError as error:
            raise OriginRefused(f"{settings.label} origin: its token file cannot be read: {error.strerror}") from error
    variable = settings.token_env or default_env
    return os.environ.get(variable, "") if variable else ""
