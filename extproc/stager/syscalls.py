"""The operating system below the stager: hashes of files, and its complaints about the disk in our words. All block."""

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..core.artifact import File
from ..errors import DiskFailed, NoSpace

HASH_CHUNK_BYTES = 2**20


def hash_file(path: Path, relative: str) -> File:
    """Size and SHA-256 of a file on disk."""
    with path.open("rb") as file:
        return hash_open(file, relative)


def hash_open(file: BinaryIO, relative: str) -> File:
    """The same of a file that is open, from where it stands."""
    digest = hashlib.sha256()
    size = 0
    while chunk := file.read(HASH_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return File(relative, size, digest.hexdigest())


@contextlib.contextmanager
def disk_errors(what: str = "written") -> Iterator[None]:
    """The operating system's complaints about the disk, as ours. `what` it cannot be: "written" or "read"."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("the node's disk is full, though its limit is not reached") from error
        raise DiskFailed(f"the node's disk cannot be {what}: {error.strerror}") from error
