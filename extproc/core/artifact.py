"""What the client names and what it resolves to: adapter names through one gate, and the manifest whose digest names a directory."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any, NewType

import msgspec

from ..errors import InvalidRequest
from .blocks import artifact_bytes

AdapterName = NewType("AdapterName", str)

# Which content on a node: the digest of what is published; for a directory that others put there `digest@name`, since it lies below that name. No
# class of its own: of a hundred thousand, each would take 50 bytes more than a plain string.
ArtifactId = NewType("ArtifactId", str)

VERSION_MARK = "@sha256:"  # as container registries write it
VERSION_DIGITS = 12

MAX_NAME_BYTES = 256  # longer than any org/name of a hub, short enough for logs
MAX_PART_BYTES = 235  # NAME_MAX of every Linux file system, 255, less what the name of a version adds: one part becomes one directory entry

_REMEMBERED = 16_384  # names that have passed the gate; one takes 170 bytes to keep, and to find it a tenth of what the checks take


@lru_cache(_REMEMBERED)
def adapter_name(raw: str) -> AdapterName:
    """The one gate from text to a name that may reach a file system, a URL or a label.

    A name is parts joined by `/`; what is refused would leave the directory (`..`, absolute), name one directory twice (empty part, `.`,
    a backslash), hide among our own files (leading dot), or break a log line (anything not printable). Raises InvalidRequest.
    """
    if not raw:
        raise InvalidRequest("model: the name is empty")
    try:
        size = len(raw.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("model: the name holds an unpaired surrogate") from None
    if size > MAX_NAME_BYTES:
        raise InvalidRequest(f"model: the name has {size} bytes; the limit is {MAX_NAME_BYTES}")
    if VERSION_MARK in raw:
        raise InvalidRequest(f"model: {raw!r} names one version of an adapter; leave out what begins with {VERSION_MARK!r}")
    if not raw.isprintable():
        raise InvalidRequest(f"model: {raw!a} holds a control or non-printable character")
    if raw.startswith("/"):
        raise InvalidRequest(f"model: {raw!r} is absolute")
    if "\\" in raw:
        raise InvalidRequest(f"model: {raw!r} holds a backslash")
    for part in raw.split("/"):
        if not part:
            raise InvalidRequest(f"model: {raw!r} has an empty part")
        if part.startswith("."):
            raise InvalidRequest(f"model: {raw!r} has a part that starts with a dot")
        if part != part.strip():
            raise InvalidRequest(f"model: {raw!r} has a part that starts or ends with a space")
        if len(part.encode()) > MAX_PART_BYTES:
            raise InvalidRequest(f"model: {raw[:40]!r}… has a part over {MAX_PART_BYTES} bytes")
    return AdapterName(raw)


def adopted_id(digest: str, name: AdapterName) -> ArtifactId:
    """Of what others put under `name`."""
    return ArtifactId(f"{digest}@{name}")


def is_adopted(id_: ArtifactId) -> bool:
    """Whether others put it there."""
    return "@" in id_


def digest_of(id_: ArtifactId) -> str:
    """SHA-256 of the content, in hex."""
    return id_.partition("@")[0]


def place_of(id_: ArtifactId) -> str:
    """The name below which others put it; "" for what is published."""
    return id_.partition("@")[2]


def versioned_name(adapter: AdapterName, digest: str) -> str:
    """What an engine knows one version of an adapter by."""
    return f"{adapter}{VERSION_MARK}{digest[:VERSION_DIGITS]}"


def split_version(name: str) -> tuple[str, str] | None:
    """The adapter's name and the digest's first digits, if `name` is that of a version."""
    adapter, mark, digits = name.rpartition(VERSION_MARK)
    return (adapter, digits) if mark and len(digits) == VERSION_DIGITS else None


@dataclass(frozen=True, slots=True, order=True)
class File:
    """One file of an artifact. `path` is relative to the artifact's directory; `size` in bytes; `sha256` in hex."""

    path: str
    size: int
    sha256: str


# The kernel's own time of a file's last change, in nanoseconds, and its inode. Whoever writes to a file, or puts another in its place, changes them, and
# nobody can put them back, as the time of modification can be. A hard link or another owner changes them too: then only reading tells whether the content is the same.
Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What lies in an artifact's directory, and where it came from. Only the files count for the digest."""

    files: tuple[File, ...]
    name: str
    origin: str
    revision: str
    in_place: bool = False  # the files are links to where the origin has them
    final: bool = False  # the revision can never mean anything else
    options: dict[str, bool] = field(default_factory=dict)  # of the engine's load call, such as is_3d_lora_weight
    stamps: dict[str, Stamp] = field(default_factory=dict)  # by path, of the files as they were when they were hashed; {}: an earlier version wrote none

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def disk_bytes(self) -> int:
        """What the artifact takes of this node's budget: nothing, where its files are links to the origin's."""
        return 0 if self.in_place else artifact_bytes(file.size for file in self.files)

    @property
    def digest(self) -> ArtifactId:
        """SHA-256, in hex, over the files' paths, sizes and hashes: equal content has one digest, wherever it came from."""
        return ArtifactId(content_digest(self.files))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Read what `to_json` wrote. Raises ValueError for anything else."""
        try:
            raw: dict[str, Any] = msgspec.json.decode(text)  # a start reads a hundred thousand: 6 us less for each than the standard library takes
            files = tuple(File(str(f["path"]), int(f["size"]), str(f["sha256"])) for f in raw["files"])
            flags = raw.get("in_place") is True, raw.get("final") is True
            options = {str(key): value is True for key, value in raw.get("options", {}).items()}  # an earlier version wrote none
            stamps = {str(path): (int(changed_ns), int(inode)) for path, (changed_ns, inode) in raw.get("stamps", {}).items()}
            return cls(files, str(raw["name"]), str(raw["origin"]), str(raw["revision"]), *flags, options, stamps)
        except (KeyError, TypeError, AttributeError, OverflowError, RecursionError, msgspec.DecodeError) as error:
            raise ValueError(f"not a manifest: {error}") from error


def content_digest(files: Iterable[File]) -> str:
    """The digest that names the directory of exactly these files."""
    text = "".join(f"{file.path}\0{file.size}\0{file.sha256}\n" for file in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()
