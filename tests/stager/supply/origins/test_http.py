"""A plain HTTP server as an origin."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.errors import NoSpace, OriginChanged, OriginFailed, OriginRefused
from extproc.process.sockets import listen
from extproc.stager.adapter.files import ARCHIVE_SUFFIXES
from extproc.stager.supply.download import Download
from extproc.stager.supply.job import Job
from extproc.stager.supply.listing import Listing
from extproc.stager.supply.origins.http import HttpOrigin
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, sha256, small_files
from tests.fakes.http import FileServer, file_server
from tests.fakes.threads import LoopThreads

from .conftest import fetch, fetch_all

NAME = adapter_name("acme/sql")


def private(url: str, **settings: Any) -> OriginSettings:
    """An origin on this machine, which has to be allowed."""
    return OriginSettings(type="http", url=url, allow_private=True, **settings)


@pytest.fixture
async def origin(http_server: FileServer) -> AsyncIterator[HttpOrigin]:
    http_server.add(NAME, small_files())
    origin = HttpOrigin(private(http_server.url + "/"))
    yield origin
    await origin.close()


async def test_it_lists_and_fetches_an_adapter(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """HEAD says what is there and how long it is; the hash is made on the way."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    assert [(file.path, file.size) for file in listing.files] == [(path, len(data)) for path, data in sorted(small_files().items())]
    assert await fetch_all(origin, listing, target) == small_files()
    again = await fetch(origin, listing, listing.files[1], target / "again")
    assert (again.size, again.sha256) == (len(small_files()[WEIGHTS]), sha256(small_files()[WEIGHTS]))
    assert [method for method, path in http_server.requests if PICKLE in path] == []


async def test_what_is_not_there_is_not_found(origin: HttpOrigin, http_server: FileServer) -> None:
    """404 and 410 of the configuration and of every archive; nothing else is asked then."""
    assert await origin.resolve(adapter_name("acme/other")) is None
    assert http_server.requests == [("HEAD", f"/acme/other/{CONFIG}"), *(("HEAD", f"/acme/other{suffix}") for suffix in ARCHIVE_SUFFIXES)]
    http_server.status = 410
    assert await origin.resolve(NAME) is None


async def test_a_configuration_alone_is_listed_alone(origin: HttpOrigin, http_server: FileServer) -> None:
    """That weights are missing is the stager's to say."""
    del http_server.files[f"/{NAME}/{WEIGHTS}"]
    listing = await origin.resolve(NAME)
    assert listing is not None
    assert [file.path for file in listing.files] == [CONFIG]


async def test_pickle_is_listed_only_without_safetensors(origin: HttpOrigin, http_server: FileServer) -> None:
    """Three questions are asked then."""
    http_server.files[f"/{NAME}/{PICKLE}"] = http_server.files.pop(f"/{NAME}/{WEIGHTS}")
    listing = await origin.resolve(NAME)
    assert listing is not None
    assert [file.path for file in listing.files] == [CONFIG, PICKLE]


@pytest.mark.parametrize("raw", ["a b", "a+b", "a?b=c", "a#b", "a%20b", "a&b;c", "ü/ö", "a:b@c", "名/前"])
async def test_names_are_quoted(origin: HttpOrigin, http_server: FileServer, target: Path, raw: str) -> None:
    """What means something in a URL means nothing in a name."""
    http_server.add(raw, small_files())
    listing = await origin.resolve(adapter_name(raw))
    assert listing is not None
    assert await fetch_all(origin, listing, target) == small_files()
    assert all("?" not in path and "#" not in path and " " not in path for _, path in http_server.requests)


async def test_the_token_of_the_environment_is_sent(http_server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a bearer token; without it the server refuses, and repeating is useless."""
    http_server.add(NAME, small_files())
    http_server.token = "secret"
    monkeypatch.setenv("MY_TOKEN", "secret")
    having = HttpOrigin(private(http_server.url, token_env="MY_TOKEN"))
    lacking = HttpOrigin(private(http_server.url))
    listing = await having.resolve(NAME)
    assert listing is not None
    with pytest.raises(OriginRefused) as raised:
        await lacking.resolve(NAME)
    assert not raised.value.retryable
    with pytest.raises(OriginRefused):
        await fetch(lacking, listing, listing.files[0], Path("/dev/null"))
    await having.close()
    await lacking.close()


@pytest.mark.parametrize("status", [500, 502, 503, 429, 400])
async def test_other_statuses_are_failures(origin: HttpOrigin, http_server: FileServer, status: int) -> None:
    """Worth repeating, and never "not found"."""
    http_server.status = status
    with pytest.raises(OriginFailed, match=str(status)) as raised:
        await origin.resolve(NAME)
    assert raised.value.retryable


async def test_403_is_a_refusal(origin: HttpOrigin, http_server: FileServer) -> None:
    """Like 401."""
    http_server.status = 403
    with pytest.raises(OriginRefused):
        await origin.resolve(NAME)


async def test_a_closed_port_is_a_failure() -> None:
    """The message names no address."""
    with listen("127.0.0.1:0") as free:
        port = free.getsockname()[1]
    origin = HttpOrigin(private(f"http://127.0.0.1:{port}"))
    with pytest.raises(OriginFailed) as raised:
        await origin.resolve(NAME)
    assert str(port) not in str(raised.value)
    await origin.close()


async def test_a_truncated_body_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """The connection breaks after some bytes; the second try brings the whole."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    http_server.cut_at = 100
    with pytest.raises(OriginFailed, match=WEIGHTS):
        await fetch(origin, listing, listing.files[1], target / WEIGHTS)
    http_server.cut_at = None
    assert await fetch_all(origin, listing, target) == small_files()


LARGE = 12 * 2**20  # of which a client that is cut off at 8 MiB has read something


async def broken(origin: HttpOrigin, http_server: FileServer, target: Path) -> tuple[Listing, Download]:
    """A download whose first attempt broke off in the middle of its weights."""
    http_server.add(NAME, {WEIGHTS: os.urandom(LARGE)})
    listing = await origin.resolve(NAME)
    assert listing is not None
    download = Download(listing.files[1], target / WEIGHTS, disk=LoopThreads())
    http_server.cut_at = 8 * 2**20
    with pytest.raises(OriginFailed, match=WEIGHTS):
        await origin.fetch(listing, listing.files[1], download)
    assert 0 < download.received < LARGE
    http_server.cut_at = None
    return listing, download


async def test_a_transfer_goes_on_where_it_broke_off(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """What is on disk is not asked for again; the hash is that of the whole."""
    listing, download = await broken(origin, http_server, target)
    had = download.received
    await origin.fetch(listing, download.file, download)
    whole = http_server.files[f"/{NAME}/{WEIGHTS}"]
    assert http_server.ranges == [f"bytes={had}-"]
    assert (target / WEIGHTS).read_bytes() == whole
    assert (await download.finish()).sha256 == sha256(whole)
    download.close()


async def test_a_server_that_knows_no_ranges_is_asked_from_the_start(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """It answers 200 with the whole, which must not land behind what is there."""
    listing, download = await broken(origin, http_server, target)
    http_server.knows_ranges = False
    await origin.fetch(listing, download.file, download)
    whole = http_server.files[f"/{NAME}/{WEIGHTS}"]
    assert (target / WEIGHTS).read_bytes() == whole
    assert (await download.finish()).sha256 == sha256(whole)
    download.close()


@pytest.mark.parametrize("length", [LARGE, 100])
async def test_a_file_that_was_replaced_in_mid_transfer_is_started_anew(origin: HttpOrigin, http_server: FileServer, target: Path, length: int) -> None:
    """Half of one and half of the other are no file. A shorter one answers 416. Of the old one nothing is kept."""
    listing, download = await broken(origin, http_server, target)
    http_server.add(NAME, {WEIGHTS: os.urandom(length)})
    with pytest.raises(OriginChanged, match=WEIGHTS):
        await origin.fetch(listing, download.file, download)
    assert download.received == 0
    download.close()


# -- in parts

PART = 2**20


async def in_parts(http_server: FileServer, target: Path, *there: int) -> tuple[HttpOrigin, Listing, Download, Job]:
    """A file of three parts, read in parallel, of which those of the given numbers are on disk."""
    data = os.urandom(3 * PART)
    http_server.add(NAME, {**small_files(), WEIGHTS: data})
    origin = HttpOrigin(private(http_server.url, parallel=2, parallel_above_bytes=PART))
    listing = await origin.resolve(NAME)
    assert listing is not None
    job = Job()
    download = Download(listing.files[1], target / WEIGHTS, job=job, disk=LoopThreads())
    for number in there:
        await download.write(once(data[number * PART : (number + 1) * PART]), number * PART, (number + 1) * PART)
    return origin, listing, download, job


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.parametrize(
    ("there", "ranges"),
    [
        ([], []),
        ([0], [f"bytes={PART}-"]),
        ([2], [f"bytes=0-{2 * PART - 1}"]),
        ([0, 2], [f"bytes={PART}-{2 * PART - 1}"]),
        ([1], [f"bytes=0-{PART - 1}", f"bytes={2 * PART}-{3 * PART - 1}"]),
    ],
)
@pytest.mark.parametrize("knows_ranges", [True, False])
async def test_only_what_is_missing_is_asked_for(http_server: FileServer, target: Path, there: list[int], ranges: list[str], knows_ranges: bool) -> None:
    """What lies behind a gap since an earlier attempt stays, unless the server sends everything anyway. Nothing counts twice."""
    origin, listing, download, job = await in_parts(http_server, target, *there)
    http_server.knows_ranges = knows_ranges
    await origin.fetch(listing, download.file, download)
    whole = http_server.files[f"/{NAME}/{WEIGHTS}"]
    assert http_server.ranges == ranges[: None if knows_ranges else 1]
    assert (target / WEIGHTS).read_bytes() == whole
    assert (await download.finish()).sha256 == sha256(whole)
    assert job.done_bytes == download.on_disk == len(whole)
    download.close()
    await origin.close()


async def test_a_file_that_was_replaced_between_its_parts_leaves_nothing(http_server: FileServer, target: Path) -> None:
    """Of no part, and nothing is shown as done."""
    origin, listing, download, job = await in_parts(http_server, target, 1)
    http_server.add(NAME, {WEIGHTS: os.urandom(3 * PART)})
    with pytest.raises(OriginChanged):
        await origin.fetch(listing, download.file, download)
    assert job.done_bytes == download.on_disk == 0
    download.close()
    await origin.close()


# -- where it may go


PRIVATE = ["127.0.0.1", "localhost", "[::1]", "[::]", "0x7f.0.0.1", "10.1.2.3", "100.64.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]"]
EMBEDDED = ["[::ffff:127.0.0.1]", "[64:ff9b::10.1.2.3]", "[64:ff9b:1::a01:203]", "[2002:a01:203::1]", "[::10.1.2.3]"]  # mapped, NAT64, 6to4, IPv4-compatible


@pytest.mark.parametrize("host", PRIVATE + EMBEDDED)
async def test_a_private_address_is_refused_unless_that_is_allowed(http_server: FileServer, host: str) -> None:
    """Written as a name, a number or an address: what is behind it is asked nothing."""
    http_server.add(NAME, small_files())
    origin = HttpOrigin(OriginSettings(type="http", url=f"http://{host}:{http_server.url.rpartition(':')[2]}"))
    with pytest.raises(OriginRefused, match="allow_private is off"):
        await origin.resolve(NAME)
    assert http_server.requests == []
    await origin.close()


async def test_a_redirect_is_followed_and_keeps_the_credentials_on_its_host(http_server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same host they go along, to another they do not."""
    monkeypatch.setenv("MY_TOKEN", "secret")
    http_server.token = "secret"
    http_server.files = {f"/moved/{path}": data for path, data in small_files().items()}
    origin = HttpOrigin(private(http_server.url, token_env="MY_TOKEN"))
    async with file_server() as other:
        other.add("elsewhere", small_files())
        for start in ("/moved", f"{other.url}/elsewhere"):
            http_server.redirects = {f"/{NAME}/{path}": f"{start}/{path}" for path in small_files()}
            listing = await origin.resolve(NAME)
            assert listing is not None
            assert await fetch_all(origin, listing, target) == small_files()
        assert len(other.requests) == 4
        assert other.authorizations == {None}
    await origin.close()


async def test_a_redirect_to_another_scheme_is_refused(origin: HttpOrigin, http_server: FileServer) -> None:
    """Nor is one followed for ever."""
    http_server.redirects = {f"/{NAME}/{CONFIG}": "https://127.0.0.1/"}
    with pytest.raises(OriginRefused, match="from http to https"):
        await origin.resolve(NAME)
    http_server.redirects = {f"/{NAME}/{CONFIG}": f"/{NAME}/{CONFIG}"}
    with pytest.raises(OriginFailed, match="over 5 redirects"):
        await origin.resolve(NAME)


async def test_a_truncated_body_without_a_length_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """A chunked body that ends without its last chunk."""
    http_server.sizeless.add(f"/{NAME}/{WEIGHTS}")
    listing = await origin.resolve(NAME)
    assert listing is not None
    assert [file.size is None for file in listing.files] == [False, True]
    http_server.cut_at = 100
    with pytest.raises(OriginFailed, match=WEIGHTS):
        await fetch(origin, listing, listing.files[1], target / WEIGHTS)


async def test_a_silent_server_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """A transfer that stops is given up after timeout_s, however long the whole may take."""
    http_server.stall.add(f"/{NAME}/{WEIGHTS}")
    listing = await origin.resolve(NAME)
    assert listing is not None
    impatient = HttpOrigin(private(http_server.url, timeout_s=0.05))
    with pytest.raises(OriginFailed, match=WEIGHTS):
        await fetch(impatient, listing, listing.files[1], target / WEIGHTS)
    await impatient.close()


async def test_a_file_that_is_gone_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """Removed between listing and fetching."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    del http_server.files[f"/{NAME}/{WEIGHTS}"]
    with pytest.raises(OriginChanged, match="is gone"):
        await fetch(origin, listing, listing.files[1], target / WEIGHTS)


async def test_a_file_that_was_replaced_after_the_listing_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """A listing is pinned to one revision: the old configuration and new weights of the same size are no adapter. The ETag tells."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    http_server.add(NAME, {WEIGHTS: small_files(seed=1)[WEIGHTS]})
    with pytest.raises(OriginChanged, match=WEIGHTS):
        await fetch_all(origin, listing, target)


async def test_new_weights_have_a_new_revision(origin: HttpOrigin, http_server: FileServer) -> None:
    """The ETags of all files count, not the configuration's alone."""
    first = await origin.resolve(NAME)
    http_server.add(NAME, {WEIGHTS: small_files(seed=1)[WEIGHTS]})
    second = await origin.resolve(NAME)
    assert first is not None
    assert second is not None
    assert first.revision != second.revision


async def test_a_full_disk_is_not_the_origin_s_failure(origin: HttpOrigin, target: Path) -> None:
    """/dev/full answers every write with ENOSPC."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    (target / CONFIG).symlink_to("/dev/full")
    with pytest.raises(NoSpace):
        await fetch_all(origin, listing, target)
