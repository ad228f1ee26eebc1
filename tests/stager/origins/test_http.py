"""A plain HTTP server as an origin."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.config import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.errors import NoSpace, OriginFailed, OriginRefused
from extproc.process import listen
from extproc.stager.origins.http import HttpOrigin
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, sha256, small_files
from tests.fakes.http import FileServer

from .conftest import fetch_all

NAME = adapter_name("acme/sql")


@pytest.fixture
async def origin(http_server: FileServer) -> AsyncIterator[HttpOrigin]:
    http_server.add(NAME, small_files())
    origin = HttpOrigin(OriginSettings(type="http", url=http_server.url + "/"))
    yield origin
    await origin.close()


async def test_it_lists_and_fetches_an_adapter(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """HEAD says what is there and how long it is; the hash is made on the way."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    assert [(file.path, file.size) for file in listing.files] == [(path, len(data)) for path, data in sorted(small_files().items())]
    assert await fetch_all(origin, listing, target) == small_files()
    assert await origin.fetch(listing, listing.files[1], target / "again") == sha256(small_files()[WEIGHTS])
    assert [method for method, path in http_server.requests if PICKLE in path] == []


async def test_what_is_not_there_is_not_found(origin: HttpOrigin, http_server: FileServer) -> None:
    """404 and 410 of the configuration; nothing else is asked then."""
    assert await origin.resolve(adapter_name("acme/other")) is None
    assert http_server.requests == [("HEAD", f"/acme/other/{CONFIG}")]
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
    having = HttpOrigin(OriginSettings(type="http", url=http_server.url, token_env="MY_TOKEN"))
    lacking = HttpOrigin(OriginSettings(type="http", url=http_server.url))
    listing = await having.resolve(NAME)
    assert listing is not None
    with pytest.raises(OriginRefused) as raised:
        await lacking.resolve(NAME)
    assert not raised.value.retryable
    with pytest.raises(OriginRefused):
        await lacking.fetch(listing, listing.files[0], Path("/dev/null"))
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
    origin = HttpOrigin(OriginSettings(type="http", url=f"http://127.0.0.1:{port}"))
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
        await origin.fetch(listing, listing.files[1], target / WEIGHTS)
    http_server.cut_at = None
    assert await fetch_all(origin, listing, target) == small_files()


async def test_a_truncated_body_without_a_length_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """A chunked body that ends without its last chunk."""
    http_server.sizeless.add(f"/{NAME}/{WEIGHTS}")
    listing = await origin.resolve(NAME)
    assert listing is not None
    assert [file.size is None for file in listing.files] == [False, True]
    http_server.cut_at = 100
    with pytest.raises(OriginFailed, match=WEIGHTS):
        await origin.fetch(listing, listing.files[1], target / WEIGHTS)


async def test_a_silent_server_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """A transfer that stops is given up after timeout_s, however long the whole may take."""
    http_server.stall.add(f"/{NAME}/{WEIGHTS}")
    listing = await origin.resolve(NAME)
    assert listing is not None
    impatient = HttpOrigin(OriginSettings(type="http", url=http_server.url, timeout_s=0.05))
    with pytest.raises(OriginFailed, match=WEIGHTS):
        await impatient.fetch(listing, listing.files[1], target / WEIGHTS)
    await impatient.close()


async def test_a_file_that_is_gone_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """Removed between listing and fetching."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    del http_server.files[f"/{NAME}/{WEIGHTS}"]
    with pytest.raises(OriginFailed, match="is gone"):
        await origin.fetch(listing, listing.files[1], target / WEIGHTS)


async def test_a_file_that_was_replaced_after_the_listing_is_a_failure(origin: HttpOrigin, http_server: FileServer, target: Path) -> None:
    """A listing is pinned to one revision: the old configuration and new weights of the same size are no adapter. The ETag tells."""
    listing = await origin.resolve(NAME)
    assert listing is not None
    http_server.add(NAME, {WEIGHTS: small_files(seed=1)[WEIGHTS]})
    with pytest.raises(OriginFailed):
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
