"""Which files make an adapter, as engines name them, and what they may be packed in."""

from collections.abc import Iterable
from typing import NoReturn, Protocol, TypeVar

from ...errors import InvalidAdapter, shortened

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt")  # what vLLM reads where there are no safetensors
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")

# How files begin that are often found in the place of another, and what to say of each. Eight bytes tell them all: more is not read of weights at first.
_FOREIGN = (
    (b"version ", "is a Git LFS pointer, not the file it stands for: run `git lfs pull` where it was copied from"),
    (b"<!doctyp", "is a web page: its origin answered with one, as servers do that ask for a log-in"),
    (b"<html", "is a web page: its origin answered with one, as servers do that ask for a log-in"),
    (b"<?xml", "is an XML document: its origin answered with one, as object stores do for what they do not give"),
    (b"pk\x03\x04", "is a zip archive or a pickle of PyTorch, under a name that it should not have"),
)


def wanted(paths: Iterable[str]) -> list[str]:
    """Of all the files an origin lists, those an engine reads: the configuration and one file of weights, safetensors before pickle."""
    have = set(paths)
    weights = next((path for path in (WEIGHTS_FILE, *PICKLE_FILES) if path in have), WEIGHTS_FILE)
    return [path for path in (CONFIG_FILE, weights) if path in have]


class Described(Protocol):
    """A file as an origin lists it, or as it lies on the disk."""

    @property
    def path(self) -> str: ...
    @property
    def sha256(self) -> str | None: ...


D = TypeVar("D", bound=Described)


def weights_of(files: Iterable[D]) -> D:
    """Of an adapter's two files, the one that is not the configuration; of an archive alone, the archive."""
    return next(file for file in files if file.path != CONFIG_FILE)


def other_digest(weights: Described, stated: Iterable[str]) -> str:
    """The first SHA-256 of those stated that the weights have not; "" if they have all, or nobody knows theirs yet."""
    return next((sha256 for sha256 in stated if weights.sha256 not in (None, sha256)), "")


def archive_suffix(path: str) -> str:
    """The suffix that makes `path` an archive; "" if it is none."""
    return max((suffix for suffix in ARCHIVE_SUFFIXES if path.endswith(suffix)), key=len, default="")


def foreign(first: bytes) -> str:
    """What a file is that begins so, if it is one of the kinds that lie in the place of others; "" if it is not."""
    begin = first[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return next((what for mark, what in _FOREIGN if begin.startswith(mark)), "")


def refuse(file: str, why: str, what: str = "") -> NoReturn:
    """Refuse an adapter for one of its files; `what` is the word that metrics count the refusal by."""
    raise InvalidAdapter(shortened(f"{file} {why}"), what or ("config" if file == CONFIG_FILE else "weights"))
