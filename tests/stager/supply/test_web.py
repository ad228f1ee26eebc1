"""HTTP as origins use it: what servers say beside the bytes, what they must not be told, and where no request may go."""

import base64
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from huggingface_hub import close_session

from extproc.errors import AdapterDamaged, InvalidAdapter, ModelNotFound, OriginFailed, OriginRefused
from extproc.stager.supply.download import Download
from extproc.stager.supply.listing import RemoteFile
from extproc.stager.supply.source import ATTEMPTS
from extproc.stager.supply.web import Web, _is_public, asked_wait_s, stated_digests
from tests.fakes.adapters import CONFIG, WEIGHTS, small_files
from tests.fakes.archives import packed
from tests.fakes.faulty import FaultyS3, FaultyServer, running
from tests.fakes.nodes import hub_origin, node, nothing_there, s3_origin, visible, web_origin
from tests.fakes.threads import LoopThreads

NAME = "acme/sql"
FILES = small_files()
SIGNATURE = "sv=2026-01-01&sig=a%2Bb%3D%3D"


class SignedServer(FaultyServer):
    """Gives only what is asked for with the signature of its container."""

    def __init__(self) -> None:
        super().__init__()
        self.unsigned = 0

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.rel_url.raw_query_string != SIGNATURE:
            self.unsigned += 1
            return web.Response(status=403)
        return await super()._handle(request)


class HidingS3(FaultyS3):
    """A bucket whose objects may be read and not listed: what is missing is forbidden, too."""

    def _list(self, request: web.Request) -> web.Response:
        return self._refusal(403, request, {})

    async def _answer(self, request: web.Request, fault: object) -> web.StreamResponse:
        if request.path not in self.files and request.path not in ("/models", "/models/"):
            return self._refusal(403, request, {})
        return await super()._answer(request, fault)  # type: ignore[arg-type]  # passed on


@pytest.fixture
async def server() -> AsyncIterator[FaultyServer]:
    async with running(FaultyServer()) as server:
        server.add(NAME, FILES)
        yield server


async def test_a_signed_address_signs_every_request(tmp_path: Path) -> None:
    """Azure's shared access signatures stand in the query. No message and no path on disk has it."""
    async with running(SignedServer()) as server:
        server.add(f"container/{NAME}", FILES)
        async with node(tmp_path / "node", web_origin(f"{server.url}/container/?{SIGNATURE}")) as stager:
            assert (await stager.ensure(NAME)).staged
            assert visible(tmp_path / "node") == {NAME: FILES}
            assert not server.unsigned
            server.fault(CONFIG, times=ATTEMPTS, method="HEAD", status=500)
            with pytest.raises(OriginFailed) as raised:
                await stager.ensure("acme/other")
            assert "sig" not in raised.value.message


async def test_no_cookie_is_sent_back(tmp_path: Path, server: FaultyServer) -> None:
    """One that is set for one tenant's token would come along with the next one's."""
    for method in ("HEAD", "GET"):
        server.fault("", times=99, method=method, headers={"set-cookie": "session=of-a; Path=/"})
    server.add("other/one", FILES)
    async with node(tmp_path / "node", web_origin(server.url)) as stager:
        for name in (NAME, "other/one"):
            await stager.ensure(name)
    assert not any("Cookie" in asked.headers for asked in server.asked)


@pytest.mark.parametrize("hidden", [False, True])
async def test_a_store_may_hide_what_is_missing(tmp_path: Path, server: FaultyServer, hidden: bool) -> None:
    """CloudFront says 403 of it. Then an unknown name is 404 and archives are looked for; by default 403 is a refusal."""
    server.files["/acme/packed.zip"] = packed(".zip", FILES)
    for path in (f"unknown/{CONFIG}", f"packed/{CONFIG}", ".tar", ".tar.gz", ".tgz", "unknown.zip"):
        server.fault(path, times=99, method="HEAD", status=403)
    async with node(tmp_path / "node", web_origin(server.url, missing_is_403=hidden)) as stager:
        with pytest.raises(ModelNotFound if hidden else OriginRefused):
            await stager.ensure("acme/unknown")
        if hidden:
            assert (await stager.ensure("acme/packed")).staged


@pytest.mark.parametrize("hidden", [False, True])
async def test_a_bucket_that_may_not_be_listed_is_asked_object_by_object(tmp_path: Path, hidden: bool) -> None:
    """Without ListBucket S3 says 403 of what is missing, and gives what is there."""
    async with running(HidingS3()) as server, node(tmp_path / "node", s3_origin(server.url, missing_is_403=hidden)) as stager:
        server.add(NAME, FILES)
        server.files["/models/acme/packed.zip"] = packed(".zip", FILES)
        assert (await stager.ensure(NAME)).staged
        with pytest.raises(ModelNotFound if hidden else OriginRefused):
            await stager.ensure("acme/unknown")
        if hidden:
            assert (await stager.ensure("acme/packed")).staged


async def test_a_folder_that_a_client_chose_costs_one_page(tmp_path: Path) -> None:
    """Whatever lies below it: of a folder of logs no second page is asked for."""
    async with running(FaultyS3()) as server, node(tmp_path / "node", s3_origin(server.url)) as stager:
        server.keys = [f"logs/{number}.txt" for number in range(3000)]
        with pytest.raises(ModelNotFound, match="files there, but no adapter_config"):
            await stager.ensure("logs")
        assert len(server.asked) == 3  # an adapter, an archive, what is there instead


async def test_a_weak_etag_is_the_strong_one(tmp_path: Path, server: FaultyServer) -> None:
    """Strong on HEAD and weak on GET, as behind a proxy that would compress."""
    etag = f'"{hashlib.md5(FILES[WEIGHTS]).hexdigest()}"'
    server.fault(WEIGHTS, times=99, headers={"etag": f"W/{etag}"})
    async with node(tmp_path / "node", web_origin(server.url)) as stager:
        assert (await stager.ensure(NAME)).staged


async def test_a_head_with_a_length_of_zero_says_nothing(tmp_path: Path, server: FaultyServer) -> None:
    """Some servers state it of every HEAD; the file has what it has."""
    server.fault("", times=99, method="HEAD", states=0)
    async with node(tmp_path / "node", web_origin(server.url)) as stager:
        assert (await stager.ensure(NAME)).staged
        assert visible(tmp_path / "node") == {NAME: FILES}


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("header", ["repr-digest", "content-md5"])
async def test_a_stated_digest_is_held_to(tmp_path: Path, server: FaultyServer, header: str, right: bool) -> None:
    """RFC 9530's, and the older MD5, which proves nothing but shows damage."""
    data = FILES[WEIGHTS] if right else FILES[WEIGHTS] + b"x"
    digest = hashlib.sha256(data).digest() if header == "repr-digest" else hashlib.md5(data).digest()
    text = base64.b64encode(digest).decode()
    server.fault(WEIGHTS, times=99, method="HEAD", headers={header: f"sha-256=:{text}:" if header == "repr-digest" else text})
    async with node(tmp_path / "node", web_origin(server.url)) as stager:
        if right:
            assert (await stager.ensure(NAME)).staged
        else:
            with pytest.raises(AdapterDamaged, match="SHA-256" if header == "repr-digest" else "MD5"):
                await stager.ensure(NAME)
            assert nothing_there(stager)


async def test_a_digest_in_the_headers_is_compared_with_the_pin_before_the_fetch(tmp_path: Path, server: FaultyServer) -> None:
    """HEAD tells enough."""
    text = base64.b64encode(hashlib.sha256(FILES[WEIGHTS]).digest()).decode()
    server.fault(WEIGHTS, times=99, method="HEAD", headers={"repr-digest": f"sha-512=:AAAA:, sha-256=:{text}:"})
    async with node(tmp_path / "node", web_origin(server.url), digests={NAME: "ab" * 32}) as stager:
        with pytest.raises(InvalidAdapter, match="is pinned"):
            await stager.ensure(NAME)
    assert not server.gets()


async def test_the_hub_s_own_rate_limit_is_obeyed(tmp_path: Path, server: FaultyServer) -> None:
    """It says when in `ratelimit`, without Retry-After: nobody asks again before, and clients are told."""
    server.fault("", times=99, status=429, headers={"ratelimit": '"api";r=0;t=55'})
    async with node(tmp_path / "node", hub_origin(server.url)) as stager:
        with pytest.raises(OriginFailed) as raised:
            await stager.ensure(NAME)
        assert raised.value.retry_after_s == 55
        assert len(server.gets()) == 1
    close_session()


async def test_the_beginning_of_a_file_can_be_had_alone(tmp_path: Path, server: FaultyServer) -> None:
    """As often as the judge needs more of it: a transfer by the hub's own client cannot be held back."""
    size = len(FILES[WEIGHTS])
    client, seen = Web("web", 5.0, allow_private=True), list[int]()

    async def judge(head: bytes) -> int:
        assert head == FILES[WEIGHTS][: len(head)]
        seen.append(len(head))
        return {20: 1000, 1000: 0}[len(head)]

    file = RemoteFile(WEIGHTS, 20)
    download = Download(file, tmp_path / "file", disk=LoopThreads())
    download.hold_for(judge, 8)
    await client.show_beginning(f"{server.url}/{NAME}/{WEIGHTS}", file, download)
    assert seen == [20, 1000]
    assert download.is_judged
    assert server.sent_bytes == 1020 < size
    download.hold_for(judge, 8)
    with pytest.raises(OriginFailed, match="not the length"):
        await client.show_beginning(f"{server.url}/{NAME}/{WEIGHTS}", RemoteFile(WEIGHTS, 2 * size), download)
    await client.close()


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"ratelimit": '"api";r=0;t=55'}, 55.0),
        ({"ratelimit": '"api";r=3;t=55'}, None),
        ({"ratelimit": '"api";r=3;t=55, "pages";r=0;t=7'}, 7.0),
        ({"ratelimit": '"api";r=0;t=55', "retry-after": "3"}, 3.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "Wed, 21 Oct 2015 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Fri, 21 Oct 2095 07:28:30 GMT", "date": "Fri, 21 Oct 2095 07:28:00 GMT"}, 30.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "now"}, 0.0),
        ({"retry-after": "Fri, 21 Oct 2095 07:28:30 GMT"}, 86_400.0),
        ({"ratelimit": '"api";r=0;t=99999999999999999999'}, 86_400.0),
        ({"ratelimit": "r=0" * 100_000}, None),
    ],
)
def test_when_a_server_wants_to_be_asked_again(headers: dict[str, str], wait_s: float | None) -> None:
    """Retry-After goes before, by the server's own clock where it says that it is another; a limit of which something is left asks for nothing."""
    assert asked_wait_s(headers) == wait_s


@pytest.mark.parametrize("value", ["", "sha-256=abc", "sha-256=:!:", "sha-256=:YWJj:", "sha-512=:" + "A" * 86 + "==:"])
def test_a_digest_that_is_none_is_not_stated(value: str) -> None:
    """Another algorithm, another length, no base64."""
    assert stated_digests({"repr-digest": value, "content-md5": value}) == (None, None)


@pytest.mark.parametrize(
    "address",
    [
        "::ffff:0:127.0.0.1",
        "::ffff:0:10.0.0.1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "::127.0.0.1",
        "fec0::1",
        "feff::1",
        "192.0.0.8",
        "192.0.0.9",
        "192.88.99.1",
    ],
)
def test_an_address_that_leads_inside_is_not_public(address: str) -> None:
    """IPv4 in IPv6 in each of its forms, and networks that are given to no host."""
    assert not _is_public(address)


HOSTS_INSIDE = ["127.0.0.1", "2130706433", "0x7f000001", "0x7f.1", "127.1", "017700000001", "127.0.0.1.", "0", "0.0.0.0", "localhost"]
HOSTS_INSIDE += ["[::]", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1%25lo]", "127\u30020\u30020\u30021", "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460"]


@pytest.mark.parametrize("host", HOSTS_INSIDE)
async def test_a_server_inside_is_reached_by_no_spelling(server: FaultyServer, host: str) -> None:
    """Decimal, octal, hexadecimal, short, full-width: what the HTTP client and the system's resolver would make of it counts."""
    port = server.url.rpartition(":")[2]
    client = Web("web", 5.0, allow_private=False)
    with pytest.raises(OriginFailed):
        await client.head(f"http://{host}:{port}/{NAME}/{CONFIG}")
    await client.close()
    assert not server.asked


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    """Also behind NAT64."""
    assert _is_public(address)
