"""What an origin says it has under a name: the files an engine reads, one archive that holds them, or something that is no adapter."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...core.artifact import AdapterName
from ..adapter.files import CONFIG_FILE, weights_of

_MODEL = re.compile(r"(model|pytorch_model|consolidated)([-.].*)?\.(safetensors|bin|pth)(\.index\.json)?")
SHOWN = 3  # names in a message; of forty characters each at most


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file as the origin describes it. `size` in bytes and `sha256` in hex where the origin states them."""

    path: str  # in the artifact
    size: int | None = None
    sha256: str | None = None
    version: str = ""  # what tells this content from a later one of the same size
    key: str = ""  # where the origin has it, in the origin's own terms
    limit: int | None = None  # the most bytes it may have, where the origin does not state its size
    md5: str | None = None  # in hex, where the origin states it: shows a damaged transfer, and proves nothing


@dataclass(frozen=True, slots=True)
class Listing:
    """What an origin has under a name, pinned to one revision of it. With `archive` it is one file that must be unpacked."""

    name: AdapterName
    revision: str
    files: tuple[RemoteFile, ...]
    archive: bool = False
    final: bool = False  # the revision can never mean anything else: there is nothing to revalidate

    @property
    def weights(self) -> RemoteFile:
        """What is not the configuration; of an archive, the archive."""
        return weights_of(self.files)


@dataclass(frozen=True, slots=True)
class Absent:
    """No adapter is there; `instead` says what is, for whoever asks why."""

    instead: str


def instead(paths: Iterable[str]) -> Absent | None:
    """What is there, from the paths of its files and folders (which end in `/`), where no configuration of an adapter is; None for nothing."""
    paths = sorted(paths)
    files, folders = {path for path in paths if "/" not in path}, sorted({path.partition("/")[0] for path in paths if "/" in path})
    named = [folder for folder in folders if f"{folder}/{CONFIG_FILE}" in paths]
    checkpoints = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder)]
    if any(path.lower().endswith(".gguf") for path in files):
        return Absent("GGUF files there, no PEFT adapter")
    if checkpoints:
        return Absent(f"only checkpoints there ({_shown(checkpoints)}): name one of them")
    if named:
        return Absent(f"adapters one folder deeper ({_shown(named)}): name one of them")
    if any(_MODEL.fullmatch(path) for path in files):
        return Absent("a full model there, no adapter")
    if folders and not files:
        return Absent(f"only folders there ({_shown(folders)}): name an adapter in one of them")
    return Absent(f"files there, but no {CONFIG_FILE}") if paths else None


def _shown(names: list[str]) -> str:
    return ", ".join(name[:40] for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
