"""What an origin says it has under a name: the files an engine reads, or one archive that holds them."""

from dataclasses import dataclass

from ...core.artifact import AdapterName


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the origin describes it. `size` in bytes and `sha256` in hex where the origin states them."""

    path: str  # in the artifact
    size: int | None = None
    sha256: str | None = None
    version: str = ""  # what tells this content from a later one of the same size
    key: str = ""  # where the origin has it, in the origin's own terms
    limit: int | None = None  # the most bytes it may have, where the origin does not state its size


@dataclass(frozen=True, slots=True)
class Listing:
    """What an origin has under a name, pinned to one revision of it. With `archive` it is one file that must be unpacked."""

    name: AdapterName
    revision: str
    files: tuple[RemoteFile, ...]
    archive: bool = False
    final: bool = False  # the revision can never mean anything else: there is nothing to revalidate
