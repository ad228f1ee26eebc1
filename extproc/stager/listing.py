"""What an origin says it has under a name: the files an engine reads, or one archive that holds them."""

from collections.abc import Iterable
from dataclasses import dataclass

from ..core.artifact import AdapterName
from .verify import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")


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


def wanted(paths: Iterable[str]) -> list[str]:
    """Of all the files an origin lists, those an engine reads: the configuration and one file of weights, safetensors before pickle."""
    have = set(paths)
    weights = next((path for path in (WEIGHTS_FILE, *PICKLE_FILES) if path in have), WEIGHTS_FILE)
    return [path for path in (CONFIG_FILE, weights) if path in have]


def archive_suffix(path: str) -> str:
    """The suffix that makes `path` an archive; "" if it is none."""
    return max((suffix for suffix in ARCHIVE_SUFFIXES if path.endswith(suffix)), key=len, default="")
