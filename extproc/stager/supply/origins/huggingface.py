"""The Hugging Face hub, by its own client: `org/name` is the repository, what follows is a folder in it."""

import contextlib
import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from yarl import URL

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the client is imported; it would call home from every node

from huggingface_hub import HfApi, ModelInfo, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import HfFileMetadata

from ....config.origins import OriginSettings
from ....core.artifact import AdapterName
from ....errors import LoraExtprocError, OriginChanged, OriginFailed, OriginRefused
from ....flight import to_the_end
from ...adapter.files import CONFIG_FILE, archive_suffix, wanted
from ...syscalls import disk_errors
from ...threads import Threads
from ..download import Download
from ..listing import Absent, Listing, RemoteFile, instead
from ..web import Web, asked_wait_s, is_same_origin
from .base import token_for

CALL_THREADS = 8  # short calls of the hub's API, each ended by `timeout_s`
_NOT_REACHED = ("ConnectError", "ConnectTimeout", "ConnectionError")  # as the HTTP libraries call it
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HuggingFaceOrigin:
    """Pins the branch to a commit when it resolves, so that no two files come from different ones. Files larger than a pointer carry their SHA-256.

    What the hub keeps in Xet storage is brought by the hub's client, which fetches in deduplicated chunks. Everything else is plain HTTP from
    where the hub sends us, and that we can go on with where it broke off.

    The client blocks, and a transfer that was given up keeps its thread until it ends: calls and transfers have threads of their own, so that neither
    the disk's work nor a short call waits behind a transfer.
    """

    def __init__(self, settings: OriginSettings) -> None:
        self.label = settings.label
        self._settings = settings
        self._endpoint = settings.url.rstrip("/") or None
        self._timeout_s = settings.timeout_s
        self._api = HfApi(endpoint=self._endpoint, token=False, library_name="lora-extproc")
        self._calls = Threads(CALL_THREADS, f"{self.label} call")
        self._transfers = Threads(settings.max_fetches, f"{self.label} transfer")
        self._web = Web(settings.label, settings.timeout_s, allow_private=True)  # the operator names the hub; a mirror may well be private

    async def open(self) -> None:
        pass

    async def resolve(self, name: AdapterName) -> Listing | Absent | None:
        return await self._calls.run(self._resolve, name)

    async def fetch(self, listing: Listing, file: RemoteFile, download: Download) -> None:
        repo, _, _ = _split(listing.name)
        url = hf_hub_url(repo, file.key, revision=listing.revision, endpoint=self._endpoint)
        metadata = await self._calls.run(self._metadata, listing.name, file, url)
        token = self._token(listing.name)
        is_own = is_same_origin(URL(metadata.location), URL(url))  # not in clear text either
        headers = {"authorization": f"Bearer {token}"} if token and is_own else {}
        if metadata.xet_file_data is not None:
            await self._web.show_beginning(metadata.location, file, download, headers)
            await self._fetch_xet(listing, file, download)
            return
        parallel = self._settings.parallel if (file.size or 0) > self._settings.parallel_above_bytes else 1
        await self._web.read(metadata.location, file, download, headers, parallel=parallel)

    async def probe(self) -> None:
        """A short answer of the hub's API, be it that nobody is logged in."""
        await self._web.probe(f"{self._endpoint or constants.ENDPOINT}/api/whoami-v2")

    async def close(self) -> None:
        await self._web.close()
        self._calls.close()
        self._transfers.close()

    def _token(self, name: str) -> str | bool:
        return token_for(self._settings, name, "HF_TOKEN") or False  # False: not whatever the machine is logged in with

    def _resolve(self, name: AdapterName) -> Listing | Absent | None:
        repo, revision, folder = _split(name)
        try:
            with self._hub_errors(name):
                info = self._api.model_info(repo, revision=revision, files_metadata=True, timeout=self._timeout_s, token=self._token(name))
                return self._listing(name, info, folder, final=revision is not None and _COMMIT.fullmatch(revision) is not None)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            return None

    def _listing(self, name: AdapterName, info: ModelInfo, folder: str, *, final: bool) -> Listing | Absent | None:
        """What the hub's list says. The client passes on whatever JSON it was sent: TypeError where that is not what it should be."""
        if info.sha is None:
            return None
        if not isinstance(info.sha, str):
            raise TypeError("sha")
        siblings = {s.rfilename.removeprefix(folder): s for s in info.siblings or () if s.rfilename.startswith(folder)}
        paths, archives = wanted(siblings), [path for path in siblings if "/" not in path and archive_suffix(path)]
        is_archive = CONFIG_FILE not in siblings
        if is_archive:
            if len(archives) != 1 or not self._settings.archives:
                return instead(siblings)
            paths = archives
        files = tuple(
            RemoteFile(
                f"archive{archive_suffix(path)}" if is_archive else path,
                _size(siblings[path].size),
                lfs.sha256 if (lfs := siblings[path].lfs) is not None else None,
                key=siblings[path].rfilename,
            )
            for path in paths
        )
        return Listing(name, info.sha, files, archive=is_archive, final=final)

    def _metadata(self, name: str, file: RemoteFile, url: str) -> HfFileMetadata:
        try:
            with self._hub_errors(name):
                return get_hf_file_metadata(url, token=self._token(name), timeout=self._timeout_s, library_name="lora-extproc", endpoint=self._endpoint)
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise OriginChanged(f"{self.label} origin: {file.path} of {name} is gone") from error

    async def _fetch_xet(self, listing: Listing, file: RemoteFile, download: Download) -> None:
        abandoned = threading.Event()
        work = download.target.parent / f".hub-{download.target.name}"  # the client keeps its locks and partial files beside what it downloads
        try:
            await download.take(await self._transfers.run(self._download_xet, listing, file, work, abandoned))
        finally:
            abandoned.set()
            await to_the_end(self._calls.run(shutil.rmtree, work, ignore_errors=True))

    def _download_xet(self, listing: Listing, file: RemoteFile, work: Path, abandoned: threading.Event) -> Path:
        repo, _, _ = _split(listing.name)
        try:
            with self._hub_errors(listing.name):
                got = hf_hub_download(
                    repo,
                    file.key,
                    revision=listing.revision,
                    local_dir=work,
                    endpoint=self._endpoint,
                    token=self._token(listing.name),
                    etag_timeout=self._timeout_s,
                )
            return Path(got)
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise OriginChanged(f"{self.label} origin: {file.path} of {listing.name} is gone") from error
        finally:
            if abandoned.is_set():  # the client makes folders anew: the staging directory was cleared under it
                shutil.rmtree(work.parent, ignore_errors=True)

    @contextlib.contextmanager
    def _hub_errors(self, name: str) -> Iterator[None]:
        """The client's errors as ours, but for "not there", which the caller understands."""
        try:
            yield
        except LoraExtprocError:  # of the token
            raise
        except GatedRepoError as error:  # a kind of RepositoryNotFoundError
            raise OriginRefused(f"{self.label} origin: {name} is gated; the token has no access") from error
        except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError: the hub could not be reached
            raise OriginFailed(f"{self.label} origin: the hub could not be reached for {name}", reached=False) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError):
            raise
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise OriginRefused(f"{self.label} origin: status {status} for {name}") from error
            asked = asked_wait_s(error.response.headers) if error.response is not None else None
            raise OriginFailed(f"{self.label} origin: status {status} for {name}", asked) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                with disk_errors():
                    raise
            reached = type(error).__name__ not in _NOT_REACHED  # the errors of one of its HTTP libraries are of this kind
            raise OriginFailed(f"{self.label} origin: {type(error).__name__} for {name}", reached=reached) from error
        except Exception as error:  # the client lets its HTTP library's errors through, and which library that is changes between versions
            reached = type(error).__name__ not in _NOT_REACHED
            raise OriginFailed(f"{self.label} origin: {type(error).__name__} for {name}", reached=reached) from error


def _size(stated: object) -> int | None:
    if stated is None or (isinstance(stated, int) and not isinstance(stated, bool)):
        return stated
    raise TypeError("size")


def _split(name: str) -> tuple[str, str | None, str]:
    """`org/name@revision/sub/dir` -> (`org/name`, `revision`, `sub/dir/`). A revision is a branch, tag or commit without a slash."""
    parts = name.split("/")
    repo, _, revision = "/".join(parts[:2]).partition("@")
    return repo, revision or None, "".join(f"{part}/" for part in parts[2:])
