"""Origins that can tell all that they have: a directory, and S3 as rclone and a large bucket answer."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.errors import OriginFailed, OriginRefused
from extproc.stager.supply.origins import keys as keys_module
from extproc.stager.supply.origins.base import Listable
from extproc.stager.supply.origins.file import FileOrigin
from extproc.stager.supply.origins.names import Names
from extproc.stager.supply.origins.s3 import S3Origin
from extproc.stager.threads import Threads
from tests.fakes.adapters import CONFIG, WEIGHTS, write_small
from tests.fakes.nodes import s3_origin
from tests.fakes.rclone import ACCESS_KEY, SECRET_KEY

from .test_s3 import serving


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(1, "list")
    yield made
    made.close()


async def listed(origin: Listable, threads: Threads, found: Names | None = None) -> list[str]:
    found = found or Names()
    await origin.list_all(found, threads)
    return list(found.sorted())


def touch(directory: Path) -> None:
    """What a listing sees of an adapter."""
    directory.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (directory / name).touch()


def directory_origin(root: Path) -> FileOrigin:
    return FileOrigin(OriginSettings(type="file", path=str(root)))


# -- a directory


@pytest.mark.parametrize("count", [0, 1, 1001])
async def test_a_directory_tells_all_its_adapters(tmp_path: Path, threads: Threads, count: int) -> None:
    """Each is what `resolve` finds."""
    for number in range(count):
        touch(tmp_path / "team" / f"{number:04}")
    origin = directory_origin(tmp_path)
    names = await listed(origin, threads)
    assert names == [f"team/{number:04}" for number in range(count)]
    for name in names[:3]:
        assert await origin.resolve(adapter_name(name)) is not None


async def test_a_directory_is_looked_into_as_far_as_names_reach(tmp_path: Path, threads: Threads) -> None:
    """Adapters in folders of adapters and archives are told; hidden folders, and what is too deep for a name, are not looked into."""
    for name in ("a", "a/checkpoint-10", "deep/er/b", ".cache/c", "d/.git/e", "/".join(["x" * 100] * 3)):
        touch(tmp_path / name)
    (tmp_path / "packed.tar.gz").touch()
    assert await listed(directory_origin(tmp_path), threads) == ["a", "a/checkpoint-10", "deep/er/b", "packed"]


async def test_links_that_have_no_end_or_lead_out_are_not_followed(tmp_path: Path, threads: Threads) -> None:
    """A link to another folder of the origin is a second name; one to a folder above it, to itself or elsewhere is none."""
    root, outside = tmp_path / "origin", tmp_path / "outside"
    touch(root / "v1")
    touch(outside / "secret")
    for link, target in {"latest": "v1", "v1/up": "..", "self": "self", "out": str(outside), "gone": "nowhere"}.items():
        (root / link).symlink_to(target)
    assert await listed(directory_origin(root), threads) == ["latest", "v1"]
    with_links = FileOrigin(OriginSettings(type="file", path=str(root), links_outside=True))
    assert await listed(with_links, threads) == ["latest", "out/secret", "v1"]


async def test_a_directory_that_is_not_there_fails(tmp_path: Path, threads: Threads) -> None:
    """An unmounted file system must not look like an empty one."""
    with pytest.raises(OriginFailed, match="cannot be listed"):
        await listed(directory_origin(tmp_path / "none"), threads)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_a_folder_that_may_not_be_read_hides_nothing_else(tmp_path: Path, threads: Threads) -> None:
    """Nothing of it could be fetched either."""
    touch(tmp_path / "a")
    touch(tmp_path / "b")
    (tmp_path / "a").chmod(0)
    assert await listed(directory_origin(tmp_path), threads) == ["b"]


async def test_a_walk_ends_when_nobody_waits_for_it(tmp_path: Path, threads: Threads) -> None:
    """Where a listing takes too long."""
    touch(tmp_path / "a")
    found = Names()
    found.stop()
    assert await listed(directory_origin(tmp_path), threads, found) == []


# -- S3


@pytest.mark.parametrize("prefix", ["", "lora"])
async def test_a_bucket_tells_all_its_adapters(tmp_path: Path, threads: Threads, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    """Over several pages, with names that must be quoted; each is what `resolve` finds."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    root = tmp_path / "models" / prefix
    odd = "acme/ä b+c&d%20"
    write_small(root / odd)
    for number in range(510):
        touch(root / "team" / f"{number:04}")
    (root / "packed.zip").touch()
    with serving(tmp_path) as url:
        origin = S3Origin(s3_origin(url, prefix=prefix, anonymous=False, timeout_s=60.0))
        assert await listed(origin, threads) == [odd, "packed", *(f"team/{number:04}" for number in range(510))]
        assert await origin.resolve(adapter_name(odd)) is not None
        await origin.close()


class LargeBucket:
    """`count` adapters of two files, a thousand keys a page; `status` from page `fails_at` on."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pages = 0
        self.fails_at, self.status = -1, 500
        self.url = ""

    async def list(self, request: web.Request) -> web.Response:
        first = int(request.query.get("continuation-token", "0"))
        self.pages += 1
        if self.pages == self.fails_at:
            return web.Response(status=self.status, text="<Error><Code>AccessDenied</Code></Error>" if self.status == 403 else "")
        last = min(first + 500, self.count)
        rest = "<ETag>&quot;0123456789abcdef0123456789abcdef&quot;</ETag><LastModified>2026-11-20T10:00:00.000Z</LastModified><Size>5</Size>"
        keys = (f"<Contents><Key>a/{number:06}/{file}</Key>{rest}</Contents>" for number in range(first, last) for file in (CONFIG, WEIGHTS))
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{last}</NextContinuationToken>" if last < self.count else ""
        text = f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{"".join(keys)}{more}</ListBucketResult>'
        return web.Response(text=text, content_type="application/xml")


@pytest.fixture
async def bucket() -> AsyncIterator[LargeBucket]:
    bucket = LargeBucket(100_000)
    app = web.Application()
    app.router.add_get("/{tail:.*}", bucket.list)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    bucket.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield bucket
    await runner.cleanup()


async def test_pages_of_keys_are_read_off_the_event_loop(bucket: LargeBucket, threads: Threads, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own parser would stop the loop for tens of milliseconds, two hundred times for a hundred thousand adapters."""
    read, where = keys_module.read_page, set[threading.Thread]()

    def noted(text: bytes, prefix: str, found: Names) -> str:
        where.add(threading.current_thread())
        return read(text, prefix, found)

    monkeypatch.setattr(keys_module, "read_page", noted)
    asyncio.get_running_loop().set_debug(False)  # which takes longer than the listing
    origin = S3Origin(s3_origin(bucket.url))
    names = await listed(origin, threads)
    assert (len(names), names[0], names[-1], bucket.pages) == (100_000, "a/000000", "a/099999", 200)
    assert where
    assert threading.main_thread() not in where
    await origin.close()


@pytest.mark.parametrize(("status", "error"), [(500, OriginFailed), (403, OriginRefused)])
async def test_a_page_that_fails_fails_the_listing(bucket: LargeBucket, threads: Threads, status: int, error: type[OriginFailed]) -> None:
    """Half of the names must not look like all of them."""
    bucket.count, bucket.fails_at, bucket.status = 2000, 3, status
    origin = S3Origin(s3_origin(bucket.url))
    with pytest.raises(error):
        await listed(origin, threads)
    await origin.close()


@pytest.mark.parametrize("text", [b"", b"<html><br>", b"<html></html>", b"<Error><Code>InternalError</Code></Error>"])
def test_what_is_no_page_fails_the_listing(text: bytes) -> None:
    """A proxy's own page, or an error that S3 sends with status 200."""
    with pytest.raises(OSError, match="a page of the listing is"):
        keys_module.read_page(text, "", Names())
