"""The Hugging Face hub, by its own client: `org/name` is the repository, what follows is a folder in it."""

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the client is imported; it would call home from every node

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...config import OriginSettings
from ...core.artifact import AdapterName
from ...errors import OriginFailed, OriginRefused
from ..verify import CONFIG_FILE
from .base import Listing, RemoteFile, wanted


class HuggingFaceOrigin:
    """Pins the branch to a commit when it resolves, so that no two files come from different ones. Files larger than a pointer carry their SHA-256."""

    label = "huggingface"

    def __init__(self, settings: OriginSettings) -> None:
        token = os.environ.get(settings.token_env or "HF_TOKEN") or False  # False: not whatever the machine is logged in with
        self._endpoint = settings.url.rstrip("/") or None
        self._token = token
        self._timeout_s = settings.timeout_s
        self._api = HfApi(endpoint=self._endpoint, token=token, library_name="lora-extproc")

    async def resolve(self, name: AdapterName) -> Listing | None:
        return await asyncio.to_thread(self._resolve, name)

    async def fetch(self, listing: Listing, file: RemoteFile, target: Path) -> str | None:
        abandoned = threading.Event()
        try:
            await asyncio.to_thread(self._fetch, listing, file, target, abandoned)
        finally:
            abandoned.set()
        return None

    async def close(self) -> None:
        pass

    def _resolve(self, name: AdapterName) -> Listing | None:
        repo, folder = _split(name)
        try:
            with _hub_errors(name):
                info = self._api.model_info(repo, files_metadata=True, timeout=self._timeout_s)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            return None
        siblings = {s.rfilename.removeprefix(folder): s for s in info.siblings or () if s.rfilename.startswith(folder)}
        if CONFIG_FILE not in siblings or info.sha is None:
            return None
        files = tuple(RemoteFile(path, siblings[path].size, lfs.sha256 if (lfs := siblings[path].lfs) is not None else None) for path in wanted(siblings))
        return Listing(name, info.sha, files)

    def _fetch(self, listing: Listing, file: RemoteFile, target: Path, abandoned: threading.Event) -> None:
        repo, folder = _split(listing.name)
        work = target.parent / f".hub-{target.name}"  # the client keeps its locks and partial files beside what it downloads
        try:
            with _hub_errors(listing.name):
                got = hf_hub_download(repo, folder + file.path, revision=listing.revision, local_dir=work, endpoint=self._endpoint, token=self._token)
            Path(got).replace(target)
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise OriginFailed(f"huggingface origin: {file.path} of {listing.name} is gone") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
            if abandoned.is_set():  # the client makes folders anew: the staging directory was cleared under it
                shutil.rmtree(target.parent, ignore_errors=True)


def _split(name: str) -> tuple[str, str]:
    """`org/name/sub/dir` -> (`org/name`, `sub/dir/`)."""
    parts = name.split("/")
    return "/".join(parts[:2]), "".join(f"{part}/" for part in parts[2:])


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """The client's errors as ours, but for "not there", which the caller understands."""
    try:
        yield
    except GatedRepoError as error:  # a kind of RepositoryNotFoundError
        raise OriginRefused(f"huggingface origin: {name} is gated; the token has no access") from error
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError: the hub could not be reached
        raise OriginFailed(f"huggingface origin: the hub could not be reached for {name}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError):
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        kind = OriginRefused if status in (401, 403) else OriginFailed
        raise kind(f"huggingface origin: status {status} for {name}") from error
    except Exception as error:  # the client lets its HTTP library's errors through, and which library that is changes between versions
        raise OriginFailed(f"huggingface origin: {type(error).__name__} for {name}") from error
