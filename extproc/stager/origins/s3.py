"""S3 and what speaks its protocol: `<bucket>/<prefix>/<adapter>/<file>`."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiobotocore.session
import aiohttp
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError

from ...config import OriginSettings
from ...core.artifact import AdapterName
from ...errors import OriginFailed, OriginRefused
from ..verify import CONFIG_FILE
from .base import WRITE_BYTES, Listing, RemoteFile, wanted, write_stream

_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403", "401"}
_NOT_FOUND = {"NoSuchKey", "404"}


class S3Origin:
    """One bucket. Credentials come from the usual chain and are refreshed by it; the revision is the objects' ETags."""

    label = "s3"

    def __init__(self, settings: OriginSettings) -> None:
        self._bucket = settings.bucket
        self._prefix = settings.prefix.strip("/")
        self._options: dict[str, Any] = {
            "endpoint_url": settings.endpoint or None,
            "region_name": settings.region or None,
            "config": Config(
                connect_timeout=settings.timeout_s,
                read_timeout=settings.timeout_s,
                retries={"max_attempts": 1},  # repeating is the stager's, with one policy for all origins
                signature_version=UNSIGNED if settings.anonymous else None,
                s3={"addressing_style": "path"} if settings.endpoint else {},
            ),
        }
        self._stack = contextlib.AsyncExitStack()
        self._opened: Any = None

    async def resolve(self, name: AdapterName) -> Listing | None:
        prefix = self._key(name, "")
        objects: dict[str, dict[str, Any]] = {}
        with _s3_errors(name):
            client = await self._client()
            async for page in client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
                objects.update({item["Key"].removeprefix(prefix): item for item in page.get("Contents", ())})
        if CONFIG_FILE not in objects:
            return None
        files = wanted(objects)
        revision = " ".join(objects[path].get("ETag", "").strip('"') for path in files)
        return Listing(name, revision, tuple(RemoteFile(path, int(objects[path]["Size"]), version=objects[path].get("ETag", "").strip('"')) for path in files))

    async def fetch(self, listing: Listing, file: RemoteFile, target: Path) -> str | None:
        with _s3_errors(listing.name):
            client = await self._client()
            answer = await client.get_object(Bucket=self._bucket, Key=self._key(listing.name, file.path))
            async with answer["Body"] as body:
                if file.version and answer.get("ETag", file.version).strip('"') != file.version:
                    raise OriginFailed(f"s3 origin: {file.path} changed after it was listed")
                return await write_stream(_body(body), target, file.size)

    async def close(self) -> None:
        await self._stack.aclose()

    async def _client(self) -> Any:
        if self._opened is None:
            session = aiobotocore.session.get_session()
            self._opened = await self._stack.enter_async_context(session.create_client("s3", **self._options))
        return self._opened

    def _key(self, name: AdapterName, path: str) -> str:
        return "/".join(part for part in (self._prefix, name) if part) + "/" + path


async def _body(body: Any) -> AsyncIterator[bytes]:
    async for chunk in body.iter_chunks(WRITE_BYTES):
        yield chunk


@contextlib.contextmanager
def _s3_errors(name: str) -> Any:
    """botocore's errors as ours. What they say of buckets and hosts stays in the log."""
    try:
        yield
    except NoCredentialsError as error:
        raise OriginRefused("s3 origin: no credentials are configured") from error
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code in _REFUSED:
            raise OriginRefused(f"s3 origin: {code}") from error
        if code in _NOT_FOUND:
            raise OriginFailed(f"s3 origin: an object of {name} is gone") from error
        raise OriginFailed(f"s3 origin: {code or 'unknown error'}") from error
    except (BotoCoreError, HTTPClientError, aiohttp.ClientError, OSError, TimeoutError) as error:
        raise OriginFailed(f"s3 origin: {type(error).__name__}") from error
