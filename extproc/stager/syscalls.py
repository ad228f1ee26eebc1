"""The operating system below the stager: hashes of files, and its complaints about the disk in our words. All block."""

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..core.artifact import File, Stamp
from ..errors import DiskFailed, NoSpace

HASH_CHUNK_BYTES = 2**20

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of renameat2(2), which Python does not offer
_renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


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


def stamp_of(found: os.stat_result) -> Stamp:
    """What tells this state of a file from a later one."""
    return found.st_ctime_ns, found.st_ino


@contextlib.contextmanager
def disk_errors(what: str = "written") -> Iterator[None]:
    """The operating system's complaints about the disk, as ours. `what` it cannot be: "written" or "read"."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("the node's disk is full, though its limit is not reached") from error
        raise DiskFailed(f"the node's disk cannot be {what}: {error.strerror}") from error


def fsync(path: Path) -> None:
    """Make a file, or the entries of a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one file system change places in one step; False where the file system cannot do that, as NFS."""
    if not _renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))
