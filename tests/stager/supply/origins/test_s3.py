"""S3 as an origin: the real protocol spoken by rclone, and a server that breaks off for what rclone does not do."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from extproc.config.origins import OriginSettings
from extproc.core.artifact import AdapterName, adapter_name
from extproc.errors import NoSpace, OriginChanged, OriginFailed, OriginRefused
from extproc.process.sockets import listen
from extproc.stager.supply.download import Download
from extproc.stager.supply.listing import Absent, Listing, RemoteFile
from extproc.stager.supply.origins.s3 import S3Origin
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, sha256, small_files, write_small
from tests.fakes.rclone import ACCESS_KEY, SECRET_KEY, rclone
from tests.fakes.threads import LoopThreads

from .conftest import fetch, fetch_all

NAME = adapter_name("acme/sql")
OpenOrigin = Callable[..., S3Origin]


@contextlib.contextmanager
def serving(directory: Path, *options: str) -> Iterator[str]:
    """An S3 server whose buckets are the folders of `directory`; its address."""
    auth = f"{ACCESS_KEY},{SECRET_KEY}"
    command = [rclone(), "serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", auth, "--config", "", "--dir-cache-time", "0s", *options, str(directory)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = next(filter(None, (re.search(r"Starting s3 server on \[(http://[^/\]]+)", line) for line in process.stderr)), None)
            assert found is not None, "rclone ended before it served"
            yield found[1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address and the directory whose folders are buckets."""
    directory = tmp_path_factory.mktemp("s3")
    with serving(directory) as url:
        yield url, directory


@pytest.fixture
def bucket(server: tuple[str, Path]) -> Iterator[Path]:
    """A bucket with one adapter below a prefix."""
    directory = server[1] / "models"
    write_small(directory / "lora" / NAME)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials as the usual chain finds them, and nothing of this machine's own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def open_origin(server: tuple[str, Path]) -> AsyncIterator[OpenOrigin]:
    opened: list[S3Origin] = []

    def open_(**settings: Any) -> S3Origin:
        given = {"type": "s3", "bucket": "models", "prefix": "lora", "endpoint": server[0], "region": "us-east-1", "timeout_s": 5.0}
        opened.append(S3Origin(OriginSettings(**{**given, **settings})))
        return opened[-1]

    yield open_
    for origin in opened:
        await origin.close()


async def resolved(origin: S3Origin, name: AdapterName = NAME) -> Listing:
    listing = await origin.resolve(name)
    assert isinstance(listing, Listing)
    return listing


@pytest.mark.parametrize("prefix", ["lora", "/lora/"])
async def test_it_lists_and_fetches_an_adapter(open_origin: OpenOrigin, bucket: Path, target: Path, prefix: str) -> None:
    """Sizes are stated; the hash is made on the way."""
    origin = open_origin(prefix=prefix)
    listing = await resolved(origin)
    assert [(file.path, file.size) for file in listing.files] == [(path, len(data)) for path, data in sorted(small_files().items())]
    assert await fetch_all(origin, listing, target) == small_files()
    again = await fetch(origin, listing, listing.files[1], target / "again")
    assert (again.size, again.sha256) == (len(small_files()[WEIGHTS]), sha256(small_files()[WEIGHTS]))


async def test_the_prefix_may_be_empty(open_origin: OpenOrigin, bucket: Path, target: Path) -> None:
    """Adapters lie at the bucket's root."""
    write_small(bucket / "flat")
    origin = open_origin(prefix="")
    assert await fetch_all(origin, await resolved(origin, adapter_name("flat")), target) == small_files()


async def test_what_is_not_there_is_not_found(open_origin: OpenOrigin, bucket: Path) -> None:
    """No key, a key that only begins like it, a folder above or below, weights without configuration."""
    (bucket / "lora" / "weights").mkdir()
    (bucket / "lora" / "weights" / WEIGHTS).write_bytes(b"x")
    origin = open_origin()
    for name in ("nosuch", "acme/sq", "acme/sql/below"):
        assert await origin.resolve(adapter_name(name)) is None
    assert await origin.resolve(adapter_name("acme")) == Absent("only folders there (sql): name an adapter in one of them")
    assert await origin.resolve(adapter_name("weights")) == Absent(f"files there, but no {CONFIG}")


async def test_folders_below_an_adapter_are_not_part_of_it(open_origin: OpenOrigin, bucket: Path) -> None:
    """Checkpoints of a training run stay where they are."""
    write_small(bucket / "lora" / NAME / "checkpoint-1")
    assert [file.path for file in (await resolved(open_origin())).files] == [CONFIG, WEIGHTS]


async def test_pickle_is_listed_only_without_safetensors(open_origin: OpenOrigin, bucket: Path) -> None:
    """Whether it may be used is the stager's to say."""
    (bucket / "lora" / NAME / WEIGHTS).rename(bucket / "lora" / NAME / PICKLE)
    assert [file.path for file in (await resolved(open_origin())).files] == [CONFIG, PICKLE]


@pytest.mark.parametrize("raw", ["a b", "a+b", "a?b=c", "a#b", "a%20b", "a&b;c", "ü/ö", "名/前"])
async def test_names_are_quoted(open_origin: OpenOrigin, bucket: Path, target: Path, raw: str) -> None:
    """What means something in a URL or a signature means nothing in a name."""
    write_small(bucket / "lora" / raw)
    origin = open_origin()
    assert await fetch_all(origin, await resolved(origin, adapter_name(raw)), target) == small_files()


async def test_new_weights_have_a_new_revision(open_origin: OpenOrigin, bucket: Path) -> None:
    """The ETags of all files count."""
    origin = open_origin()
    first = await resolved(origin)
    (bucket / "lora" / NAME / WEIGHTS).write_bytes(b"other")
    assert (await resolved(origin)).revision != first.revision


@pytest.mark.parametrize(("key", "secret"), [("ACCESSKEY00000000", SECRET_KEY), (ACCESS_KEY, "another1234567890")])
async def test_wrong_credentials_are_a_refusal(open_origin: OpenOrigin, bucket: Path, monkeypatch: pytest.MonkeyPatch, key: str, secret: str) -> None:
    """Neither an unknown key nor a wrong secret is worth a second try."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(OriginRefused) as raised:
        await open_origin().resolve(NAME)
    assert not raised.value.retryable


async def test_no_credentials_are_a_refusal(open_origin: OpenOrigin, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain finds none."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(OriginRefused):
        await open_origin().resolve(NAME)


async def test_a_missing_bucket_is_a_failure_not_a_not_found(open_origin: OpenOrigin, bucket: Path) -> None:
    """A misspelled setting must not become a remembered 404."""
    with pytest.raises(OriginFailed, match="NoSuchBucket"):
        await open_origin(bucket="nosuch").resolve(NAME)


async def test_an_object_that_is_gone_is_a_failure(open_origin: OpenOrigin, bucket: Path, target: Path) -> None:
    """Removed between listing and fetching."""
    origin = open_origin()
    listing = await resolved(origin)
    (bucket / "lora" / NAME / WEIGHTS).unlink()
    with pytest.raises(OriginChanged, match="is gone"):
        await fetch_all(origin, listing, target)


async def test_an_object_that_was_replaced_after_the_listing_is_a_failure(open_origin: OpenOrigin, bucket: Path, target: Path) -> None:
    """A listing is pinned to one revision: the old configuration and new weights of the same size are no adapter. The ETag tells."""
    origin = open_origin()
    listing = await resolved(origin)
    write_small(bucket / "lora" / NAME, seed=1)
    with pytest.raises(OriginChanged):
        await fetch_all(origin, listing, target)


async def test_a_closed_port_is_a_failure(open_origin: OpenOrigin) -> None:
    """The message names no address."""
    with listen("127.0.0.1:0") as free:
        port = free.getsockname()[1]
    with pytest.raises(OriginFailed) as raised:
        await open_origin(endpoint=f"http://127.0.0.1:{port}").resolve(NAME)
    assert str(port) not in str(raised.value)


async def test_a_full_disk_is_not_the_origin_s_failure(open_origin: OpenOrigin, bucket: Path, target: Path) -> None:
    """/dev/full answers every write with ENOSPC."""
    origin = open_origin()
    listing = await resolved(origin)
    (target / CONFIG).symlink_to("/dev/full")
    with pytest.raises(NoSpace):
        await fetch_all(origin, listing, target)


class BreakingServer:
    """Answers with a status, or breaks off after 100 of 1000 bytes."""

    def __init__(self) -> None:
        self.status = 200
        self.authorizations: list[str | None] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.authorizations.append(request.headers.get("authorization"))
        if self.status != 200:
            return web.Response(status=self.status)
        response = web.StreamResponse()
        response.content_length = 1000
        await response.prepare(request)
        await response.write(bytes(100))
        if request.transport is not None:
            request.transport.close()
        return response


@pytest.fixture
async def breaking() -> AsyncIterator[tuple[BreakingServer, str]]:
    server = BreakingServer()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", server.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield server, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_anonymous_sends_none_of_the_credentials(open_origin: OpenOrigin, breaking: tuple[BreakingServer, str]) -> None:
    """Also where the chain would find some; a 403 without a body is a refusal, too."""
    breaking[0].status = 403
    with pytest.raises(OriginRefused):
        await open_origin(endpoint=breaking[1], anonymous=True).resolve(NAME)
    assert set(breaking[0].authorizations) == {None}


@pytest.mark.parametrize("status", [500, 503])
async def test_a_server_error_is_a_failure(open_origin: OpenOrigin, breaking: tuple[BreakingServer, str], status: int) -> None:
    """Worth repeating."""
    breaking[0].status = status
    with pytest.raises(OriginFailed) as raised:
        await open_origin(endpoint=breaking[1]).resolve(NAME)
    assert raised.value.retryable


async def test_a_truncated_body_is_a_failure(open_origin: OpenOrigin, breaking: tuple[BreakingServer, str], target: Path) -> None:
    """The connection breaks after some bytes: worth repeating, like every other failure of the network."""
    origin = open_origin(endpoint=breaking[1])
    listing = Listing(NAME, "1", (RemoteFile(WEIGHTS, 1000, key=WEIGHTS),))
    with pytest.raises(OriginFailed):
        await fetch(origin, listing, listing.files[0], target / WEIGHTS)


# -- large objects, and where the bucket stands


async def test_a_large_object_comes_in_parallel_ranges(open_origin: OpenOrigin, bucket: Path, target: Path) -> None:
    """Twenty megabytes in two parts, each asked for alone; what is on disk is the object, and so is its digest."""
    data = os.urandom(20 * 2**20 + 17)
    (bucket / "lora" / NAME / WEIGHTS).write_bytes(data)
    origin = open_origin(parallel_above_bytes=2**20)
    listing = await resolved(origin)
    asked: list[str] = []
    client = await origin._client()
    client.meta.events.register("before-send.s3.GetObject", lambda request, **_: asked.append(request.headers["Range"].decode()))
    got = await fetch(origin, listing, listing.files[1], target / WEIGHTS)
    assert (got.size, got.sha256) == (len(data), sha256(data))
    assert sorted(asked) == ["bytes=0-16777215", f"bytes=16777216-{len(data) - 1}"]


async def test_a_part_of_a_large_object_goes_on_where_it_broke_off(open_origin: OpenOrigin, bucket: Path, target: Path) -> None:
    """Only what is missing is asked for: a gap in the middle, and the end."""
    data = os.urandom(20 * 2**20)
    (bucket / "lora" / NAME / WEIGHTS).write_bytes(data)
    origin = open_origin(parallel_above_bytes=2**20)
    listing = await resolved(origin)
    download = Download(listing.files[1], target / WEIGHTS, disk=LoopThreads())

    async def part(begin: int, end: int) -> AsyncIterator[bytes]:
        yield data[begin:end]

    for begin, end in ((0, 1_000_000), (3_000_000, 9_000_000)):
        await download.write(part(begin, end), begin, end)
    await origin.fetch(listing, listing.files[1], download)
    assert (await download.finish()).sha256 == sha256(data)
    download.close()


@pytest.fixture(scope="module")
def virtual_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """One that finds the bucket in the host's name."""
    directory = tmp_path_factory.mktemp("virtual")
    with serving(directory, "--force-path-style=false") as url:
        yield url, directory


async def test_the_bucket_may_be_in_the_host_s_name(
    open_origin: OpenOrigin, virtual_server: tuple[str, Path], target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As AWS wants it. Names below localhost lead here (RFC 6761, 6.3), which not every resolver knows."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **named: real("127.0.0.1" if host.endswith(".localhost") else host, *args, **named))
    url, directory = virtual_server
    write_small(directory / "models" / "lora" / NAME)
    endpoint = url.replace("127.0.0.1", "localhost")
    origin = open_origin(endpoint=endpoint, addressing="virtual")
    hosts: set[str] = set()
    client = await origin._client()
    client.meta.events.register("before-send.s3", lambda request, **_: hosts.add(urlsplit(request.url).hostname or ""))
    assert await fetch_all(origin, await resolved(origin), target) == small_files()
    assert hosts == {"models.localhost"}
    with pytest.raises(OriginFailed):  # in the path it is no bucket there
        await open_origin(endpoint=endpoint, addressing="path").resolve(NAME)


@pytest.mark.parametrize(("addressing", "url"), [("auto", "/models"), ("path", "/models"), ("virtual", "/")])
async def test_where_the_bucket_stands_is_a_setting(open_origin: OpenOrigin, bucket: Path, addressing: str, url: str) -> None:
    """With an endpoint of one's own it is the path unless it is said otherwise."""
    origin = open_origin(addressing=addressing, endpoint="http://localhost:1")
    paths: list[str] = []
    client = await origin._client()
    client.meta.events.register("before-send.s3", lambda request, **_: paths.append(urlsplit(request.url).path))
    with pytest.raises(OriginFailed):
        await origin.resolve(NAME)
    assert paths == [url]


async def test_credentials_are_refreshed_before_they_end(open_origin: OpenOrigin, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From whatever gave them: here a program of the configuration, which gives some that end in a minute."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    given = tmp_path / "given.json"
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {given}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    def give(secret: str) -> None:
        ends = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
        given.write_text(json.dumps({"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": secret, "Expiration": ends}))

    give(SECRET_KEY)
    origin = open_origin()
    assert await origin.resolve(NAME) is not None
    give("another1234567890")
    with pytest.raises(OriginRefused):
        await origin.resolve(NAME)
    give(SECRET_KEY)
    assert await origin.resolve(NAME) is not None
