"""S3 and what speaks its protocol: `<bucket>/<prefix>/<adapter>/<file>`."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiobotocore.session
import aiohttp
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    NoCredentialsError,
)

from ....config.origins import OriginSettings
from ....core.artifact import AdapterName
from ....errors import OriginChanged, OriginFailed, OriginRefused
from ...adapter.files import ARCHIVE_SUFFIXES, CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, archive_suffix, wanted
from ...threads import Threads
from ..download import Download, in_parallel
from ..listing import Absent, Listing, RemoteFile, instead
from ..web import asked_wait_s
from .keys import prepare, tell_keys
from .names import Names

ADAPTER_FILES = "adapter_"  # what the names of all files of an adapter begin with
LOOKED_AT = 100  # objects below a name that is no adapter's, to say what is there
READ_BYTES = 2**18  # at once; the client holds as much back for each of its requests
_FORBIDDEN = {"AccessDenied", "403"}
_REFUSED = {*_FORBIDDEN, "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "401"}
_NOT_FOUND = {"NoSuchKey", "404"}
_CHANGED = {"PreconditionFailed", "412", "InvalidRange", "416"}


class S3Origin:
    """One bucket. Credentials come from the usual chain and are refreshed by it; the revision is the objects' ETags.

    Objects that were uploaded with a SHA-256 checksum are held to it. A name costs one page of a list, however much lies below it: clients choose names.
    """

    def __init__(self, settings: OriginSettings) -> None:
        self.label = settings.label
        self._settings = settings
        self._bucket = settings.bucket
        self._prefix = settings.prefix.strip("/")
        addressing = settings.addressing if settings.addressing != "auto" or not settings.endpoint else "path"
        self._options: dict[str, Any] = {
            "endpoint_url": settings.endpoint or None,
            "region_name": settings.region or None,
            "config": Config(
                connect_timeout=settings.timeout_s,
                read_timeout=settings.timeout_s,
                retries={"total_max_attempts": 1},  # repeating is the stager's, with one policy for all origins
                signature_version=UNSIGNED if settings.anonymous else None,
                s3={"addressing_style": addressing},
                max_pool_connections=max(10, settings.max_fetches * settings.parallel + 1),  # and one that lists
            ),
        }
        self._session = aiobotocore.session.get_session()
        self._stack = contextlib.AsyncExitStack()
        self._opening = asyncio.Lock()
        self._opened: Any = None

    async def open(self) -> None:
        """The description of S3 is megabytes of JSON: read by the first client, that would stop the event loop for a tenth of a second."""
        loader = self._session.get_component("data_loader")
        for kind in ("service-2", "paginators-1", "endpoint-rule-set-1"):
            await asyncio.to_thread(loader.load_service_model, "s3", kind)
        for name in ("partitions", "endpoints", "sdk-default-configuration"):
            await asyncio.to_thread(loader.load_data_with_path, name)
        with self._s3_errors(""):
            await self._client()

    async def resolve(self, name: AdapterName) -> Listing | Absent | None:
        with self._s3_errors(name):
            try:
                objects = await self._list(f"{self._key(name)}/", ADAPTER_FILES)
            except ClientError as error:
                if _code(error) not in _FORBIDDEN:
                    raise
                return await self._resolve_unlisted(name)  # who may read may not be allowed to list
            if CONFIG_FILE in objects:
                return await self._listing(name, objects)
            if self._settings.archives:
                beside = await self._list(self._key(name), ".")
                for path in sorted(beside):
                    if archive_suffix(path) == path:
                        file = await self._file(f"archive{path}", beside[path])
                        return Listing(name, file.version, (file,), archive=True)
            return instead(await self._list(f"{self._key(name)}/", "", LOOKED_AT))

    async def _listing(self, name: AdapterName, objects: dict[str, dict[str, Any]]) -> Listing:
        files = [await self._file(path, objects[path]) for path in wanted(objects)]
        return Listing(name, " ".join(file.version for file in files), tuple(files))

    async def _resolve_unlisted(self, name: AdapterName) -> Listing | None:
        """Object by object. Without the permission to list, S3 says 403 of what is not there: then `missing_is_403` tells whether that is what it means."""
        objects: dict[str, dict[str, Any]] = {}
        for path in (CONFIG_FILE, WEIGHTS_FILE, *PICKLE_FILES):
            head = await self._head(f"{self._key(name)}/{path}")
            if head is not None:
                objects[path] = head
                if path != CONFIG_FILE:
                    break
            elif path == CONFIG_FILE:
                break
        if objects:
            return await self._listing(name, objects)
        for suffix in ARCHIVE_SUFFIXES if self._settings.archives else ():
            head = await self._head(self._key(name) + suffix)
            if head is not None:
                file = await self._file(f"archive{suffix}", head)
                return Listing(name, file.version, (file,), archive=True)
        return None

    async def _head(self, key: str) -> dict[str, Any] | None:
        """An object as a list describes it; None if it is not there."""
        client = await self._client()
        try:
            head = await client.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if _code(error) in _NOT_FOUND or (_code(error) in _FORBIDDEN and self._settings.missing_is_403):
                return None
            raise
        return {"Key": key, "Size": head["ContentLength"], "ETag": head.get("ETag", "")}

    async def fetch(self, listing: Listing, file: RemoteFile, download: Download) -> None:
        try:
            with self._s3_errors(listing.name):
                if self._settings.parallel > 1 and (file.size or 0) > self._settings.parallel_above_bytes:
                    await in_parallel(download, self._settings.parallel, lambda begin, end: self._read(file, download, begin, end))
                else:
                    await self._read(file, download)
        except OriginChanged:
            await download.restart()
            raise

    async def list_all(self, found: Names, threads: Threads) -> None:
        """Over one connection, which the pool has beside those of fetches."""
        with self._s3_errors(""):
            await tell_keys(await self._client(), self._bucket, f"{self._prefix}/" if self._prefix else "", found, threads)

    async def probe(self) -> None:
        """HEAD of the bucket. That it may not be asked for, is not there, or not in this region, is an answer, too."""
        with contextlib.suppress(OriginRefused), self._s3_errors(""):
            client = await self._client()
            try:
                await client.head_bucket(Bucket=self._bucket)
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if status == 429 or not 100 <= status < 500:
                    raise

    async def close(self) -> None:
        await self._stack.aclose()

    async def _list(self, below: str, prefix: str, limit: int = 1000) -> dict[str, dict[str, Any]]:
        """The first page of the objects whose keys go on with `prefix` behind `below`, and of the folders there, by what stands behind `below`."""
        client = await self._client()
        page = await client.list_objects_v2(Bucket=self._bucket, Prefix=below + prefix, Delimiter="/", MaxKeys=limit)
        found = {item["Key"].removeprefix(below): item for item in page.get("Contents", ())}
        return found | {folder["Prefix"].removeprefix(below): folder for folder in page.get("CommonPrefixes", ())}

    async def _file(self, path: str, item: dict[str, Any]) -> RemoteFile:
        sha256 = None
        if "SHA256" in item.get("ChecksumAlgorithm", ()):
            client = await self._client()
            head = await client.head_object(Bucket=self._bucket, Key=item["Key"], ChecksumMode="ENABLED")
            sha256 = _whole_sha256(head)
        return RemoteFile(path, int(item["Size"]), sha256, item.get("ETag", "").strip('"'), item["Key"])

    async def _read(self, file: RemoteFile, download: Download, at: int | None = None, end: int | None = None) -> None:
        """One request, from `at` (default: where the download is) up to `end` (default: all)."""
        client = await self._client()
        begin = download.received if at is None else at
        if file.size == begin:
            return
        asked: dict[str, Any] = {"IfMatch": f'"{file.version}"'} if file.version else {}
        if begin or end is not None:
            asked["Range"] = f"bytes={begin}-{'' if end is None else end - 1}"
        answer = await client.get_object(Bucket=self._bucket, Key=file.key, **asked)
        async with answer["Body"] as body:
            if file.version and answer.get("ETag", file.version).strip('"') != file.version:
                raise OriginChanged(f"{self.label} origin: {file.path} changed after it was listed")
            if "Range" in asked and not str(answer.get("ContentRange", "")).startswith(f"bytes {begin}-"):
                raise OriginChanged(f"{self.label} origin: {file.path}: the server sends no ranges")
            try:
                await download.write(_body(body), begin, end)
            except FlexibleChecksumError:  # the client compares what comes whole with whatever sum S3 keeps, at the end
                if file.sha256 is None:  # else the stager compares it, and says so
                    await download.restart()  # or the next attempt would find that nothing is missing
                    raise

    async def _client(self) -> Any:
        async with self._opening:
            if self._opened is None:
                self._opened = await self._stack.enter_async_context(self._session.create_client("s3", **self._options))
                prepare(self._opened)
            return self._opened

    def _key(self, name: AdapterName) -> str:
        return "/".join(part for part in (self._prefix, name) if part)

    @contextlib.contextmanager
    def _s3_errors(self, name: str) -> Iterator[None]:
        """botocore's errors as ours. What they say of buckets and hosts stays in the log."""
        try:
            yield
        except NoCredentialsError as error:
            raise OriginRefused(f"{self.label} origin: no credentials are configured") from error
        except ClientError as error:
            code = _code(error)
            if code in _REFUSED:
                raise OriginRefused(f"{self.label} origin: {code}") from error
            if code in _NOT_FOUND:
                raise OriginChanged(f"{self.label} origin: an object of {name} is gone") from error
            if code in _CHANGED:
                raise OriginChanged(f"{self.label} origin: an object of {name} changed after it was listed") from error
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            raise OriginFailed(f"{self.label} origin: {code or 'unknown error'}", asked_wait_s(headers)) from error
        except (BotoCoreError, HTTPClientError, aiohttp.ClientError, OSError, TimeoutError) as error:
            reached = not isinstance(error, EndpointConnectionError | ConnectTimeoutError | aiohttp.ClientConnectorError)
            raise OriginFailed(f"{self.label} origin: {type(error).__name__}", reached=reached) from error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _whole_sha256(head: dict[str, Any]) -> str | None:
    """The checksum of the whole object, in hex. That of a multipart upload is over its parts' checksums, and says nothing here."""
    stated = head.get("ChecksumSHA256", "")
    if not stated or "-" in stated or head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    try:
        return base64.b64decode(stated, validate=True).hex()
    except ValueError:
        return None


async def _body(body: Any) -> AsyncIterator[bytes]:
    async for chunk in body.iter_chunks(READ_BYTES):
        yield chunk
