"""Archives of a few files, good and hostile."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping

from extproc.stager.adapter.files import ARCHIVE_SUFFIXES

TARS = (".tar", ".tar.gz", ".tgz")


def packed(suffix: str, files: Mapping[str, bytes]) -> bytes:
    """The files under their names, as the archive that `suffix` says."""
    assert suffix in ARCHIVE_SUFFIXES
    if suffix == ".zip":
        return zip_of(list(files.items()))
    return tar_of([(tarfile.TarInfo(path), data) for path, data in files.items()], suffix)


def tar_of(members: Iterable[tuple[tarfile.TarInfo, bytes]], suffix: str = ".tar", format_: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of exactly these headers; each file's size is that of its data."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format_) as tar:
        for info, data in members:
            if data:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue() if suffix == ".tar" else gzip.compress(out.getvalue(), 1)


def zip_of(members: Iterable[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of exactly these members; a name may come twice."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members:
            info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo(name)
            info.compress_type = compression
            archive.writestr(info, data)
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "", **fields: object) -> tarfile.TarInfo:
    """A tar member that is not a plain file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    for field, value in fields.items():
        setattr(info, field, value)
    return info
