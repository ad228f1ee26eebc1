"""Unpack `.tar`, `.tar.gz` and `.zip`: out of a whole archive, the two files that an engine reads.

Nothing in an archive is believed: a member that would leave the directory, or is a link or a device, refuses the whole; names, counts and sizes
are limited while reading, not by what the archive says of itself. All functions block.
"""

import contextlib
import errno
import gzip
import io
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...errors import AdapterTooLarge, InvalidAdapter, LoraExtprocError
from ..syscalls import disk_errors
from .files import CONFIG_FILE, WEIGHTS_FILE, archive_suffix, foreign, wanted

MAX_MEMBERS = 10_000  # an adapter has a handful
MAX_DESCRIPTION_BYTES = 2**20  # of one long name or extended header
MAX_DESCRIPTIONS_BYTES = 16 * 2**20  # of all of them: the library keeps what they say
MAX_DIRECTORY_BYTES = 4 * 2**20  # of a zip: MAX_MEMBERS with names of some hundred bytes
MAX_TAIL_BYTES = 16 * 2**20  # of zeros behind the end of a tar, which are read for the sake of the checksum behind them
MAX_HEAD_BYTES = 4 * 2**20  # of an archive that is still arriving: a configuration and the header of weights of some thousand tensors
MAX_HEAD_MEMBERS = 100  # in those bytes: a library reads each header in some 30 us
COPY_BYTES = 2**20
BEGINNING_BYTES = 64  # what `foreign` looks at
_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, 2.3.1
_ZIP_MAGIC = b"PK\x03\x04"  # APPNOTE 4.3.7

_DESCRIBING = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive that is to be unpacked."""

    path: str  # in the artifact
    inside: str  # in the archive
    size: int


def members(archive: Path, *, max_bytes: int) -> list[Member]:
    """The files an engine reads, of the folder above all others that have a configuration; [] without a configuration. Raises InvalidAdapter.

    A gzipped tar is read from end to end for it: nothing else tells what is in it.
    """
    sizes: dict[str, int] = {}
    total = 0
    with _opened(archive) as entries:
        for count, (name, size, kind) in enumerate(entries.all()):
            if count >= MAX_MEMBERS:
                _refuse(archive, f"has over {MAX_MEMBERS} members")
            path = posixpath.normpath(name)
            if name.startswith("/") or path == ".." or path.startswith("../") or "\0" in name:
                _refuse(archive, f"has a member that leaves the directory: {name!r}")
            if "\\" in name:
                _refuse(archive, f"has a member with a backslash in its name: {name!r}")
            if kind not in ("file", "directory") or size < 0:
                _refuse(archive, f"has a member that is neither a file nor a directory, or cannot be read: {name!r}")
            if kind == "file":
                if path == ".":
                    _refuse(archive, "has a file without a name")
                if path in sizes:
                    _refuse(archive, f"has {name!r} twice")
                sizes[path] = size
                total += size
            if total > max_bytes:
                raise AdapterTooLarge(f"{archive.name} unpacks to over {max_bytes} bytes")
        entries.check_end()
    folders = sorted({posixpath.dirname(path) for path in sizes if posixpath.basename(path) == CONFIG_FILE}, key=len)
    if not folders:
        return []
    top = folders[0]  # a run's own adapter; what lies below it are its checkpoints
    if beside := [folder for folder in folders[1:] if top and not folder.startswith(f"{top}/")]:
        _refuse(archive, f"has {CONFIG_FILE} in {1 + len(beside)} folders beside each other")
    inside = {posixpath.basename(path): path for path in sizes if posixpath.dirname(path) == top}
    return [Member(path, inside[path], sizes[inside[path]]) for path in wanted(inside)]


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is known of the adapter in an archive of which not all is here."""

    config: bytes
    weights: bytes  # as far as they are here
    weights_size: int


def beginning(head: bytes) -> Beginning | None:
    """What the first bytes of a tar, gzipped or not, tell of the adapter in it; None where they do not tell.

    They do not where the weights come before the configuration, or where a folder above may have another: the adapter is the one at the top, or in the
    folder that is the first member and that all others lie in. Nor does a zip, whose directory is at its end: what comes before it may be out of date.
    """
    if head.startswith(_GZIP_MAGIC):
        try:
            head = zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(head, MAX_HEAD_BYTES)
        except zlib.error:
            return None
    top, config = None, None
    with contextlib.suppress(Exception), _TarFile.open(fileobj=io.BytesIO(head), mode="r:") as tar:  # it ends in the middle; `members` tells what is wrong
        for member, _ in zip(tar, range(MAX_HEAD_MEMBERS), strict=False):
            path = posixpath.normpath(member.name)
            folder, name = ("" if path == "." else path, "") if member.isdir() else posixpath.split(path)
            if top is None and (not folder or member.isdir()):
                top = folder
            if top is None or "/" in top or (top and f"{folder}/".split("/", 1)[0] != top):
                return None
            begin = member.offset_data
            if folder != top or not member.isreg() or member.issparse():
                continue
            if name == CONFIG_FILE and begin + member.size <= len(head):
                config = head[begin : begin + member.size]
            elif name == WEIGHTS_FILE:
                return Beginning(config, head[begin : begin + member.size], member.size) if config is not None else None
    return None


@contextlib.contextmanager
def opened_member(archive: Path, member: Member) -> Iterator[IO[bytes]]:
    """One member of a whole archive, to be read from its beginning."""
    with _opened(archive) as entries:
        for name, _, kind in entries.all():
            if kind == "file" and posixpath.normpath(name) == member.inside:
                with entries.open() as file:
                    yield file
                return
    _refuse(archive, f"has no {member.inside!r}")


def first_bytes(archive: Path) -> bytes:
    """Enough of it to tell what it is, if it is something else."""
    with disk_errors("read"), archive.open("rb") as file:
        return file.read(BEGINNING_BYTES)


def unpack(archive: Path, chosen: list[Member], directory: Path) -> None:
    """Write the chosen members into `directory`. Raises InvalidAdapter where one is not as long as it said."""
    by_name = {member.inside: member for member in chosen}
    with _opened(archive) as entries:
        for name, _, kind in entries.all():
            member = by_name.get(posixpath.normpath(name))
            if member is None or kind != "file":
                continue
            with entries.open() as source, disk_errors(), (directory / member.path).open("wb") as target:
                _copy(archive, source, target, member)


def _copy(archive: Path, source: IO[bytes], target: IO[bytes], member: Member) -> None:
    left = member.size
    while chunk := _read(archive, source):
        left -= len(chunk)
        if left < 0:
            break
        target.write(chunk)
    if left:
        _refuse(archive, f"has {member.inside!r} with another length than it says")


def _read(archive: Path, source: IO[bytes]) -> bytes:
    with _damage(archive):
        return source.read(COPY_BYTES)


class _TarInfo(tarfile.TarInfo):
    def _proc_member(self, archive: "_TarFile") -> tarfile.TarInfo:
        """The library reads a member that only describes the next one into memory, however long it is, and the map of a sparse one likewise."""
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.HeaderError("a sparse file")
        if self.type in _DESCRIBING:
            archive.described_bytes += self.size
            if not 0 <= self.size <= MAX_DESCRIPTION_BYTES or archive.described_bytes > MAX_DESCRIPTIONS_BYTES:
                raise tarfile.HeaderError("a description that is too long")
        return super()._proc_member(archive)  # type: ignore[misc, no-any-return]  # the library's own hook for subclasses, which its stubs leave out

    def _proc_gnusparse_10(self, *_: object) -> None:
        raise tarfile.HeaderError("a sparse file")


class _TarFile(tarfile.TarFile):
    tarinfo = _TarInfo
    described_bytes = 0


class _Tar:
    def __init__(self, path: Path) -> None:
        self._at: tarfile.TarInfo | None = None
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            is_gzip = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            # The library's own reader of gzipped streams looks at no checksum, and its choice by content takes xz, which asks for any memory.
            self._source = stack.enter_context(gzip.GzipFile(fileobj=raw)) if is_gzip else raw
            self._file = stack.enter_context(_TarFile.open(fileobj=self._source, mode="r|", bufsize=COPY_BYTES))  # a stream: one pass
            self._stack = stack.pop_all()

    def all(self) -> Iterator[tuple[str, int, str]]:
        for member in self._file:
            self._at = member
            kind = "file" if member.isreg() else "directory" if member.isdir() else "other"
            if member.issparse():
                kind = "other"  # its length says nothing of what it takes
            yield member.name, member.size, kind

    def open(self) -> IO[bytes]:
        assert self._at is not None
        opened = self._file.extractfile(self._at)
        assert opened is not None
        return opened

    def check_end(self) -> None:
        """What is behind the last member: nothing that counts, and then gzip's checksum."""
        tail = 0
        while read := len(self._source.read(COPY_BYTES)):
            tail += read
            if tail > MAX_TAIL_BYTES:
                raise tarfile.ReadError("it goes on behind its end")

    def close(self) -> None:
        self._stack.close()


class _ZipSource(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        """The library reads the directory in one piece, however long it is, and makes an object of each entry."""
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("a directory that is too long")
        return super().read(size)


class _Zip:
    def __init__(self, path: Path) -> None:
        self._at: zipfile.ZipInfo | None = None
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(_ZipSource(io.FileIO(path)))
            self._file = stack.enter_context(zipfile.ZipFile(source))
            self._stack = stack.pop_all()

    def all(self) -> Iterator[tuple[str, int, str]]:
        for member in self._file.infolist():
            self._at = member
            mode = member.external_attr >> 16
            special = mode and stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
            unread = member.flag_bits & 0x1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # encrypted, or lzma's memory
            # Windows' own tools write backslashes, against the format's rules (APPNOTE 4.4.17); what looks like a path there is one.
            name = member.filename.replace("\\", "/")
            yield name, member.file_size, "other" if special or unread else "directory" if name.endswith("/") else "file"

    def open(self) -> IO[bytes]:
        assert self._at is not None
        return self._file.open(self._at)

    def check_end(self) -> None:
        """Its checksums are those of the members."""

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[_Tar | _Zip]:
    with _damage(archive), contextlib.closing(_Zip(archive) if archive_suffix(archive.name) == ".zip" else _Tar(archive)) as entries:
        yield entries


@contextlib.contextmanager
def _damage(archive: Path) -> Iterator[None]:
    """What the libraries say of a broken archive, as ours: on bytes that somebody made up they raise nearly anything, IndexError included."""
    try:
        yield
    except LoraExtprocError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # of the disk, not of what is on it
            with disk_errors():
                raise
        first = first_bytes(archive)
        what = "" if first.startswith(_ZIP_MAGIC) and archive_suffix(archive.name) == ".zip" else foreign(first)
        raise InvalidAdapter(f"{archive.name} {what or f'cannot be unpacked: {type(error).__name__}'}", "archive") from error


def _refuse(archive: Path, why: str) -> None:
    raise InvalidAdapter(f"{archive.name} {why}", "archive")
