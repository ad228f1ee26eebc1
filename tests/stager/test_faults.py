"""Origins that break off, stall, lie, refuse and change their minds: each ends in the right bytes or in the right error, never in a visible wrong file."""

import contextlib
import email.utils
import gzip
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.loaders
import pytest
from huggingface_hub import close_session

from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.errors import (
    AdapterDamaged,
    AdapterTooLarge,
    InvalidAdapter,
    LoraExtprocError,
    ModelNotFound,
    OriginChanged,
    OriginDown,
    OriginFailed,
    OriginRefused,
    StageError,
)
from extproc.stager.stager import Stager
from extproc.stager.supply import web
from extproc.up.demo import write_adapter
from tests.fakes.adapters import CONFIG, WEIGHTS, Files, read_files, sha256
from tests.fakes.archives import packed
from tests.fakes.faulty import Asked, FaultyS3, FaultyServer, running
from tests.fakes.hub import Hub
from tests.fakes.nodes import hub_origin, node, nothing_half_done, nothing_there, s3_origin, source_of, visible, web_origin
from tests.fakes.wait import Clock

NAME = adapter_name("acme/sql")
KINDS = ("http", "s3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    """Adapters by seed and size; the same bytes each time."""
    known: dict[tuple[int, int], Files] = {}

    def make(seed: int = 0, layers: int = 4) -> Files:
        if (seed, layers) not in known:
            directory = tmp_path_factory.mktemp("made")
            write_adapter(directory, seed=seed, rank=8, hidden=1024, layers=layers)
            known[seed, layers] = read_files(directory)
        return known[seed, layers]

    return make


@pytest.fixture(scope="module", autouse=True)
def s3_is_described_once() -> Iterator[None]:
    """Each client would read megabytes of JSON."""
    with pytest.MonkeyPatch.context() as patch:
        loader = botocore.loaders.create_loader()
        patch.setattr("botocore.session.create_loader", lambda *_: loader)
        yield


@pytest.fixture
def files(made: Callable[..., Files]) -> Files:
    """A quarter of a megabyte."""
    return made()


@pytest.fixture
def other(made: Callable[..., Files]) -> Files:
    """Other weights of the same length, and the same configuration."""
    return made(seed=1)


@contextlib.asynccontextmanager
async def serving(kind: str, files: Files, **settings: Any) -> AsyncIterator[tuple[Any, OriginSettings]]:
    """A server of that kind which has the adapter, and the origin that asks it."""
    if kind == "s3":
        async with running(FaultyS3()) as s3:
            s3.add(NAME, files)
            yield s3, s3_origin(s3.url, **settings)
    else:
        async with running(FaultyServer()) as server:
            server.add(NAME, files)
            yield server, web_origin(server.url, **settings)


@contextlib.asynccontextmanager
async def hub_with(files: Files, **settings: Any) -> AsyncIterator[tuple[Hub, OriginSettings]]:
    async with Hub() as hub:
        hub.add(NAME, files)
        yield hub, hub_origin(hub.url, **settings)
        close_session()


def begins(asked: list[Asked]) -> list[int]:
    """From which byte on it was asked, each time."""
    return [one.begin for one in asked]


async def ends_right(stager: Stager, files: Files) -> None:
    """The bytes are the right ones, and nothing else is left of how they came."""
    held = await stager.ensure(NAME)
    assert visible(stager.node.store.directory) == {NAME: files}
    assert nothing_half_done(stager)
    assert stager.node.holdings.index.used_bytes == held.size


async def ends_wrong(stager: Stager, kind: type[LoraExtprocError], match: str | None = None) -> LoraExtprocError:
    """That error and none of its children; nothing is to be seen."""
    with pytest.raises(kind, match=match) as raised:
        await stager.ensure(NAME)
    assert type(raised.value) is kind
    assert nothing_there(stager)
    return raised.value


# -- broken off


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["close", "reset", "stall"])
async def test_a_transfer_goes_on_where_it_broke_off(tmp_path: Path, files: Files, kind: str, end: str) -> None:
    """After none, one, some and all but one of the bytes: the next request asks for what is missing, and no byte is sent twice."""
    size = len(files[WEIGHTS])
    offsets = (0, 1, 1000, 65_536, 200_001, size - 1) if end != "stall" else (0, 100_000)
    for at in offsets:
        async with serving(kind, files, timeout_s=5.0 if end != "stall" else 0.2) as (server, origin), node(tmp_path / f"{at}", origin) as stager:
            server.fault(WEIGHTS, at=at, end=end)
            await ends_right(stager, files)
            first, second = begins(server.gets(WEIGHTS))
            assert first == 0
            assert second == at if at <= 65_536 else 65_536 <= second <= at  # what has come while the header is judged is lost with its connection
            assert server.sent_bytes == sum(map(len, files.values())) + at - second


@pytest.mark.parametrize("kind", KINDS)
async def test_a_transfer_may_break_off_more_often_than_a_failure_is_repeated(tmp_path: Path, files: Files, kind: str) -> None:
    """As long as each attempt brings it further, the origin is up: its breaker stays closed."""
    async with serving(kind, files) as (server, origin):
        source = source_of(origin, Clock())
        async with node(tmp_path / "node", source) as stager:
            server.fault(WEIGHTS, times=99, at=20_000)
            await ends_right(stager, files)
            assert begins(server.gets(WEIGHTS)) == [*range(0, len(files[WEIGHTS]), 20_000)]
            assert source.breaker.state == "closed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_transfer_that_brings_nothing_is_given_up(tmp_path: Path, files: Files, kind: str, path: str, end: str) -> None:
    """After as many attempts as any failure is worth."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(path, times=99, at=0, end=end)
        error = await ends_wrong(stager, OriginFailed)
        assert error.retryable
        assert begins(server.gets(path)) == [0, 0, 0]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_transfer_that_stops_for_good_is_given_up_where_it_stopped(tmp_path: Path, files: Files, kind: str) -> None:
    """It came further once, and never again."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, at=100_000)
        server.fault(WEIGHTS, times=99, at=0)
        await ends_wrong(stager, OriginFailed)
        assert begins(server.gets(WEIGHTS)) == [0, *[100_000] * 5]


@pytest.mark.parametrize("times", [1, 9])
async def test_a_hub_s_transfer_goes_on(tmp_path: Path, made: Callable[..., Files], times: int) -> None:
    """Where the hub sends us, ranges are known."""
    files = made(layers=32)
    async with hub_with(files) as (hub, origin), node(tmp_path / "node", origin) as stager:
        hub.fault("truncate", f"/cdn/*{WEIGHTS}", times=times, at=200_000)
        await ends_right(stager, files)
        statuses = [status for method, path, status in hub.requests if method == "GET" and path.startswith("/cdn/")]
        assert statuses == [200] + [206] * times


@pytest.mark.parametrize("kind", ["stall", "drop"])
async def test_a_silent_hub_is_given_up(tmp_path: Path, files: Files, kind: Any) -> None:
    """Whether its list, the place of a file or the file itself does not come."""
    for pattern in ("/api/models/*", f"*/resolve/*{WEIGHTS}", f"/cdn/*{WEIGHTS}"):
        async with hub_with(files, timeout_s=0.1) as (hub, origin), node(tmp_path / "node", origin) as stager:
            hub.fault(kind, pattern, times=99, at=0, method="GET" if "cdn" in pattern or "api" in pattern else "HEAD")
            await ends_wrong(stager, OriginFailed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["close", "stall"])
async def test_an_origin_that_does_not_say_what_it_has_is_given_up(tmp_path: Path, files: Files, kind: str, end: str) -> None:
    """Its list, or its first HEAD."""
    async with serving(kind, files, timeout_s=0.1) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.is_silent = end == "stall"
        server.fault("", times=99, method="HEAD", status=500)
        server.fault("", times=99, status=500)
        await ends_wrong(stager, OriginFailed)
        assert 1 <= len(server.asked) <= 3  # a slow machine gives one up before it was heard


# -- lengths that are not true


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("delta", [-1, 1, 1_000_000])
async def test_a_length_that_is_not_true_ends_in_an_error(tmp_path: Path, files: Files, kind: str, path: str, delta: int) -> None:
    """Longer or shorter than what comes, however often it is asked."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        said = len(files[path]) + delta
        if kind == "s3":
            server.sizes[f"/models/{NAME}/{path}"] = said
        else:
            server.fault(path, times=99, method="HEAD", states=said)
        with pytest.raises((OriginFailed, InvalidAdapter)):  # a header that does not fit to the length is seen first
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("kind", KINDS)
async def test_more_bytes_than_were_stated_are_not_cut_off_to_fit(tmp_path: Path, files: Files, kind: str) -> None:
    """Also where a piece ends exactly at the stated length."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        said = 2 * 65_536
        server.fault(WEIGHTS, times=99, method="HEAD", states=said)
        if kind == "s3":
            server.sizes[f"/models/{NAME}/{WEIGHTS}"] = said
        with pytest.raises((OriginFailed, InvalidAdapter)):
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", [-1000, 1000])
async def test_a_length_that_is_not_true_once_is_survived(tmp_path: Path, files: Files, kind: str, delta: int) -> None:
    """One answer whose Content-Length does not fit: what came of it is kept, the rest is asked for."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, states=len(files[WEIGHTS]) + delta)
        await ends_right(stager, files)
        if delta < 0:
            assert begins(server.gets(WEIGHTS)) == [0, len(files[WEIGHTS]) + delta]


async def test_a_negative_length_wins_no_room(tmp_path: Path, files: Files) -> None:
    """What it would be given back is others'."""
    async with serving("s3", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.sizes[f"/models/{NAME}/{WEIGHTS}"] = -(2**40)
        await ends_wrong(stager, OriginFailed, "states a length of")


@pytest.mark.parametrize("delta", [-1, 1])
async def test_a_hub_that_lies_about_a_length_ends_in_an_error(tmp_path: Path, files: Files, delta: int) -> None:
    """In its list."""
    for path in (CONFIG, WEIGHTS):
        async with hub_with(files) as (hub, origin), node(tmp_path / "node", origin) as stager:
            hub.fault("wrong_length", "/api/models/*", times=99, delta=delta, file=path)
            with pytest.raises((OriginFailed, InvalidAdapter)):
                await stager.ensure(NAME)
            assert nothing_there(stager)


@pytest.mark.parametrize("limit", [1_000_000, 100_000])
async def test_an_origin_that_states_no_length_is_read_up_to_the_limit(tmp_path: Path, files: Files, limit: int) -> None:
    """Chunked; so much room is set aside, and no more is taken."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin, unknown_size_bytes=limit) as stager:
        server.states_length = False
        if limit > len(files[WEIGHTS]):
            await ends_right(stager, files)
        else:
            await ends_wrong(stager, AdapterTooLarge, "did not say so")


@pytest.mark.parametrize("at", [0, 1, 100_000])
async def test_a_transfer_without_a_length_goes_on_as_well(tmp_path: Path, files: Files, at: int) -> None:
    """The last chunk was missing, so it was not the end."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.states_length = False
        server.fault(WEIGHTS, at=at)
        await ends_right(stager, files)
        assert begins(server.gets(WEIGHTS)) == [0, at]


async def test_a_body_without_a_length_that_lacks_only_its_end_is_asked_for_anew(tmp_path: Path, files: Files) -> None:
    """All bytes came, but not the last chunk: the server has nothing behind them (416), and whether they were all only a new transfer tells."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.states_length = False
        server.fault(WEIGHTS, at=len(files[WEIGHTS]))
        await ends_right(stager, files)


CONFIG_ENTRY = {"rfilename": CONFIG, "size": 10}
WEIGHTS_ENTRY: dict[str, Any] = {"rfilename": WEIGHTS, "size": 10, "lfs": {"sha256": "0" * 64, "size": 10, "pointerSize": 1}}


def each(*values: Any) -> tuple[Any, ...]:
    return values


ODD_ANSWERS: list[Any] = [
    *each(b"not json", b"\xff", b"", b"[]", b"null", b"5", b"{}", b"[" * 100_000),
    *({"siblings": siblings} for siblings in each(5, ["x"], [5], {}, None)),
    *({"sha": sha} for sha in each(5, [], "../../x", "")),
    *({"siblings": [{**CONFIG_ENTRY, "size": size}, WEIGHTS_ENTRY]} for size in each("12", 1.5, [], True, -1, -(2**70), 2**70)),
    *({"siblings": [CONFIG_ENTRY, {**WEIGHTS_ENTRY, "size": size}]} for size in each("12", -1, -(2**40), 2**70)),
    *({"siblings": [{**CONFIG_ENTRY, "rfilename": path}, WEIGHTS_ENTRY]} for path in each(5, None, [], "../" + CONFIG)),
    *({"siblings": [CONFIG_ENTRY, {**WEIGHTS_ENTRY, "lfs": lfs}]} for lfs in each(5, {}, {"sha256": 5, "size": 10, "pointerSize": 1}, {"sha256": "zz"})),
]


@pytest.mark.parametrize("number", range(len(ODD_ANSWERS)))
async def test_a_hub_may_answer_anything(tmp_path: Path, number: int) -> None:
    """It ends in one of our errors, and nothing is to be seen: neither on disk nor in the books, which a negative length would put right for others."""
    odd = ODD_ANSWERS[number]
    whole = {"id": NAME, "sha": "a" * 40, "siblings": [CONFIG_ENTRY, WEIGHTS_ENTRY]}
    async with running(FaultyServer()) as server, node(tmp_path / "node", hub_origin(server.url)) as stager:
        server.files[f"/api/models/{NAME}"] = odd if isinstance(odd, bytes) else json.dumps({**whole, **odd}).encode()
        for path in (CONFIG, WEIGHTS):
            server.files[f"/{NAME}/resolve/{'a' * 40}/{path}"] = b"x" * 10
        with pytest.raises(StageError):
            await stager.ensure(NAME)
        assert nothing_there(stager)
    close_session()


# -- digests that are not true


async def test_s3_s_checksum_is_held_to(tmp_path: Path, files: Files, other: Files) -> None:
    """The right one passes, another one refuses; the ETag fits in both cases."""
    async with serving("s3", files) as (server, origin):
        server.state_sha256(f"{NAME}/{WEIGHTS}", files[WEIGHTS])
        async with node(tmp_path / "right", origin) as stager:
            await ends_right(stager, files)
        server.state_sha256(f"{NAME}/{WEIGHTS}", other[WEIGHTS])
        async with node(tmp_path / "wrong", origin) as stager:
            with pytest.raises((InvalidAdapter, OriginFailed)):
                await stager.ensure(NAME)
            assert nothing_there(stager)


async def test_s3_s_checksum_is_held_to_after_a_break_as_well(tmp_path: Path, files: Files, other: Files) -> None:
    """Ranges carry no checksum of their own: the sum of the whole counts."""
    async with serving("s3", files) as (server, origin):
        server.state_sha256(f"{NAME}/{WEIGHTS}", files[WEIGHTS])
        async with node(tmp_path / "wrong", origin) as stager:
            server.fault(WEIGHTS, at=100_000)
            server.fault(WEIGHTS, times=99, body=other[WEIGHTS])  # under the ETag of the right ones
            await ends_wrong(stager, AdapterDamaged, "SHA-256")
        server.faults = []
        async with node(tmp_path / "right", origin) as stager:
            server.fault(WEIGHTS, at=100_000)
            await ends_right(stager, files)


@pytest.mark.parametrize("path", [CONFIG, WEIGHTS])
async def test_s3_s_other_checksum_is_held_to(tmp_path: Path, files: Files, path: str) -> None:
    """Objects carry a CRC-32 unless somebody asked for more; the client compares it. A second attempt must not take what the first refused."""
    async with serving("s3", files) as (server, origin):
        server.state_crc32(f"{NAME}/{path}", zlib.crc32(files[path]))
        async with node(tmp_path / "right", origin) as stager:
            await ends_right(stager, files)
        server.state_crc32(f"{NAME}/{path}", zlib.crc32(files[path]) ^ 1)
        async with node(tmp_path / "wrong", origin) as stager:
            await ends_wrong(stager, OriginFailed)
        server.faults = []
        server.state_crc32(f"{NAME}/{path}", zlib.crc32(files[path]))
        async with node(tmp_path / "once", origin) as stager:
            server.fault(path, body=files[path][:-100] + bytes(100))
            await ends_right(stager, files)


async def test_a_checksum_of_parts_says_nothing_of_the_whole(tmp_path: Path, files: Files) -> None:
    """What a multipart upload states ends in the number of its parts."""
    async with serving("s3", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.sha256[f"/models/{NAME}/{WEIGHTS}"] = "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=-2"
        await ends_right(stager, files)


async def test_a_hub_s_digest_is_held_to(tmp_path: Path, files: Files) -> None:
    """That of the LFS pointer. Bytes that are wrong from the first on are no header."""
    async with hub_with(files) as (hub, origin), node(tmp_path / "node", origin) as stager:
        hub.fault("wrong_bytes", f"/cdn/*{WEIGHTS}", times=99)
        await ends_wrong(stager, InvalidAdapter)


@pytest.mark.parametrize("kind", [*KINDS, "huggingface"])
async def test_a_pinned_digest_is_held_to(tmp_path: Path, files: Files, other: Files, kind: str) -> None:
    """Whatever the origin states or does not state."""
    async with hub_with(files) if kind == "huggingface" else serving(kind, files) as (_, origin):
        async with node(tmp_path / "wrong", origin, digests={NAME: sha256(other[WEIGHTS])}) as stager:
            await ends_wrong(stager, InvalidAdapter, "is pinned")
        async with node(tmp_path / "right", origin, digests={NAME: sha256(files[WEIGHTS])}) as stager:
            await ends_right(stager, files)


async def test_keys_that_would_leave_the_directory_are_no_part_of_an_adapter(tmp_path: Path, files: Files) -> None:
    """S3's keys are any text: of all that is listed, two names count."""
    async with serving("s3", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.keys = [f"{NAME}/../../evil", f"{NAME}/..", f"{NAME}//etc/evil", f"{NAME}/../{WEIGHTS}", f"{NAME}/x\\..\\evil", f"{NAME}/{WEIGHTS}/.."]
        await ends_right(stager, files)
        assert {asked.path for asked in server.gets(WEIGHTS)} == {f"/models/{NAME}/{WEIGHTS}"}


# -- busy and down


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("what", "after"), [("resolve", None), ("fetch", "0"), ("fetch", "10"), ("resolve", "soon"), ("fetch", "9" * 400), ("fetch", "²")])
async def test_an_origin_that_is_busy_for_a_moment_is_asked_again(tmp_path: Path, files: Files, kind: str, what: str, after: str | None) -> None:
    """Whatever it says of how long, if it is no more than ten seconds or makes no sense."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        method, path = ("GET", WEIGHTS) if what == "fetch" else ("GET", "/models") if kind == "s3" else ("HEAD", CONFIG)
        server.fault(path, method=method, times=2, status=503, headers={} if after is None else {"retry-after": after})
        if after == "9" * 400:
            assert (await ends_wrong(stager, OriginFailed)).retry_after_s == 86_400
        else:
            await ends_right(stager, files)
            assert len([asked for asked in server.asked if asked.method == method and asked.path.rstrip("/").endswith(path)]) == 3


@pytest.mark.parametrize("what", ["resolve", "fetch"])
@pytest.mark.parametrize(("kind", "form"), [("http", "seconds"), ("http", "date"), ("s3", "seconds")])
async def test_an_origin_that_wants_to_be_left_alone_is(tmp_path: Path, files: Files, kind: str, what: str, form: str) -> None:
    """The caller is told at once what the origin said; nobody asks it until then, no probe either; then one does, and all is well."""
    clock = Clock()
    async with serving(kind, files) as (server, origin):
        source = source_of(origin, clock)
        async with node(tmp_path / "node", source, clock=clock) as stager:
            method, path = ("GET", WEIGHTS) if what == "fetch" else ("GET", "/models") if kind == "s3" else ("HEAD", CONFIG)
            after = "120" if form == "seconds" else email.utils.formatdate(time.time() + 120, usegmt=True)
            server.fault(path, method=method, status=503, headers={"retry-after": after})
            error = await ends_wrong(stager, OriginFailed)
            assert error.retry_after_s is not None
            assert 115 <= error.retry_after_s <= 120
            assert source.breaker.state == "open"
            asked = len(server.asked)
            for waited, left in ((0, 120), (109, 11)):
                clock.now += waited
                error = await ends_wrong(stager, OriginDown, "is down")
                assert error.retry_after_s is not None
                assert left - 5 <= error.retry_after_s <= left
            assert len(server.asked) == asked
            clock.now += 11
            await ends_right(stager, files)
            assert source.breaker.state == "closed"


@pytest.mark.parametrize("what", ["/api/models/*", f"*/resolve/*{CONFIG}", f"*/resolve/*{WEIGHTS}", f"/cdn/*{WEIGHTS}"])
@pytest.mark.parametrize("status", [429, 503])
async def test_a_hub_that_limits_us_is_obeyed(tmp_path: Path, files: Files, what: str, status: int) -> None:
    """A short wait is waited for, a long one is passed on."""
    clock = Clock()
    async with hub_with(files) as (hub, origin):
        async with node(tmp_path / "short", origin) as stager:
            hub.fault("status", what, times=2, status=status, retry_after=1)
            await ends_right(stager, files)
        async with node(tmp_path / "long", source := source_of(origin, clock), clock=clock) as stager:
            hub.fault("status", what, status=status, retry_after=300)
            error = await ends_wrong(stager, OriginFailed)
            assert error.retry_after_s == 300
            assert source.breaker.state == "open"
            clock.now += 300
            await ends_right(stager, files)


@pytest.mark.parametrize("kind", [*KINDS, "huggingface"])
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refusal_is_not_repeated(tmp_path: Path, files: Files, kind: str, status: int) -> None:
    """Other credentials may help, another attempt does not."""
    if kind == "huggingface":
        async with hub_with(files) as (hub, origin), node(tmp_path / "node", origin) as stager:
            hub.fault("status", "/api/models/*", times=99, status=status)
            await ends_wrong(stager, OriginRefused)
            assert len(hub.requests) == 1
    else:
        async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
            server.fault(WEIGHTS, times=99, status=status)
            await ends_wrong(stager, OriginRefused)
            assert len(server.gets(WEIGHTS)) == 1


# -- changed while it is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", ["the same", "shorter", "longer"])
async def test_content_that_changes_in_mid_download_ends_in_the_new(tmp_path: Path, made: Callable[..., Files], files: Files, kind: str, length: str) -> None:
    """Half of the old one was on disk: ETags and If-Match tell, the adapter is looked for anew, and nothing of the old is kept."""
    new = made(seed=1, layers={"the same": 4, "shorter": 1, "longer": 8}[length])
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, at=200_000, then=lambda: server.add(NAME, new))
        await ends_right(stager, new)


@pytest.mark.parametrize("kind", KINDS)
async def test_content_that_changes_between_two_files_ends_in_the_new(tmp_path: Path, files: Files, made: Callable[..., Files], kind: str) -> None:
    """The old configuration and the new weights are no adapter."""
    new = made(seed=1, layers=8)
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(CONFIG, then=lambda: server.add(NAME, {**new, CONFIG: new[CONFIG] + b"\n"}))
        await ends_right(stager, {**new, CONFIG: new[CONFIG] + b"\n"})


@pytest.mark.parametrize("kind", KINDS)
async def test_content_that_never_rests_ends_in_an_error(tmp_path: Path, made: Callable[..., Files], files: Files, kind: str) -> None:
    """It changes each time it is read."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        versions = [made(seed=seed) for seed in range(1, 9)]
        server.fault(WEIGHTS, times=99, at=100_000, then=lambda: server.add(NAME, versions.pop()))
        error = await ends_wrong(stager, OriginChanged, "changed after it was listed")
        assert error.retryable


@pytest.mark.parametrize("kind", KINDS)
async def test_content_that_goes_away_in_mid_download_is_not_found(tmp_path: Path, files: Files, kind: str) -> None:
    """It is looked for anew, and there is nothing."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, at=100_000, then=server.files.clear)
        await ends_wrong(stager, ModelNotFound)


@pytest.mark.parametrize("at", [1000, 200_000])
async def test_halves_of_two_versions_are_never_joined_where_nothing_tells_them_apart(tmp_path: Path, files: Files, other: Files, at: int) -> None:
    """A server that states neither ETag nor date: after a break it is asked for the whole."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.states_version = False
        server.fault(WEIGHTS, at=at, then=lambda: server.add(NAME, other))
        await ends_right(stager, other)
        assert begins(server.gets(WEIGHTS)) == [0, 0]


async def test_dates_tell_versions_apart_as_well(tmp_path: Path, files: Files, other: Files) -> None:
    """Where there is no ETag."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.states_version = False
        dated = {"last-modified": "Fri, 20 Nov 2026 10:00:00 GMT"}
        for method in ("HEAD", "GET"):
            server.fault(CONFIG, times=1, method=method, headers=dated)
        server.fault(WEIGHTS, method="HEAD", headers=dated)
        server.fault(WEIGHTS, headers=dated, at=100_000, then=lambda: server.add(NAME, other))
        newer = {"last-modified": "Fri, 20 Nov 2026 10:00:01 GMT"}
        for method in ("HEAD", "GET"):
            server.fault("", times=99, method=method, headers=newer)
        await ends_right(stager, other)
        assert begins(server.gets(WEIGHTS)) == [0, 100_000, 0]


async def test_a_hub_s_push_in_mid_download_changes_nothing(tmp_path: Path, files: Files, other: Files) -> None:
    """Every request names the commit; the next comparison finds the new one."""
    async with hub_with(files) as (hub, origin), node(tmp_path / "node", origin) as stager:
        hub.fault("change_mid_download", f"*{CONFIG}", files=other)
        await ends_right(stager, files)
        assert await stager.refresh(NAME)
        await ends_right(stager, other)


# -- what HTTP servers do


@pytest.mark.parametrize("path", [CONFIG, WEIGHTS])
async def test_a_body_that_comes_compressed_is_refused(tmp_path: Path, files: Files, path: str) -> None:
    """It was not asked for, and what it is the compression of is nobody's guess."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(path, times=99, method="HEAD", headers={"content-encoding": "gzip"})
        server.fault(path, times=99, headers={"content-encoding": "gzip"}, body=gzip.compress(files[path]))
        await ends_wrong(stager, OriginFailed, "compressed")


async def test_a_gzipped_archive_may_be_called_compressed(tmp_path: Path, files: Files) -> None:
    """As some servers do with what ends in .gz: it is stored as it is sent."""
    async with running(FaultyServer()) as server, node(tmp_path / "node", web_origin(server.url)) as stager:
        server.files[f"/{NAME}.tar.gz"] = packed(".tar.gz", files)
        for method in ("HEAD", "GET"):
            server.fault(".tar.gz", times=99, method=method, headers={"content-encoding": "gzip"})
        await ends_right(stager, files)


async def test_the_client_asks_for_no_compression(tmp_path: Path, files: Files) -> None:
    """Lengths and ranges are the file's."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        await ends_right(stager, files)
        assert {asked.headers.get("Accept-Encoding") for asked in server.asked} == {"identity"}


async def test_a_server_that_ignores_a_range_is_read_from_the_start(tmp_path: Path, files: Files) -> None:
    """200 where 206 was asked for: the whole must not land behind the half."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.knows_ranges = False
        server.fault(WEIGHTS, at=100_000)
        await ends_right(stager, files)
        assert begins(server.gets(WEIGHTS)) == [0, 100_000]


async def test_a_server_that_ignores_ranges_and_breaks_is_given_up(tmp_path: Path, files: Files) -> None:
    """It comes no further than the first time."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.knows_ranges = False
        server.fault(WEIGHTS, times=99, at=100_000)
        await ends_wrong(stager, OriginFailed)
        assert len(server.gets(WEIGHTS)) < 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("times", [1, 99])
async def test_another_part_than_was_asked_for_is_not_taken(tmp_path: Path, files: Files, kind: str, times: int) -> None:
    """A proxy that answers with another's range."""
    async with serving(kind, files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, at=100_000)
        server.fault(WEIGHTS, times=times, headers={"content-range": f"bytes 0-99/{len(files[WEIGHTS])}"})
        if times == 1 or kind == "s3":  # which then is asked for the whole
            await ends_right(stager, files)
        else:
            with pytest.raises(OriginFailed):
                await stager.ensure(NAME)
            assert nothing_there(stager)


async def test_a_range_that_cannot_be_satisfied_starts_anew(tmp_path: Path, files: Files) -> None:
    """416, although the file is as it was."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, at=100_000)
        server.fault(WEIGHTS, status=416)
        await ends_right(stager, files)
        assert begins(server.gets(WEIGHTS)) == [0, 100_000, 0]


async def test_a_server_that_knows_no_head_is_asked_otherwise(tmp_path: Path, files: Files) -> None:
    """GET says the same, and its body is left alone."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault("", times=99, method="HEAD", status=405)
        await ends_right(stager, files)


# -- where it is sent


async def test_a_redirect_to_another_host_gets_no_token(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when it says what it has nor when it sends it, and not after a break."""
    monkeypatch.setenv("MY_TOKEN", "secret")
    async with serving("http", files, token_env="MY_TOKEN") as (server, origin), serving("http", files) as (elsewhere, _):
        server.redirects = {path: f"{elsewhere.url}{path}" for path in server.files}
        elsewhere.fault(WEIGHTS, at=100_000)
        async with node(tmp_path / "node", origin) as stager:
            await ends_right(stager, files)
        assert {asked.authorization for asked in server.asked} == {"Bearer secret"}
        assert {asked.authorization for asked in elsewhere.asked} == {""}
        assert begins(elsewhere.gets(WEIGHTS)) == [0, 100_000]


async def test_a_redirect_of_the_hub_gets_no_token(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our hub answers 400 where one comes along."""
    monkeypatch.setenv("HF_TOKEN", "hf_in")
    async with Hub() as hub, node(tmp_path / "node", hub_origin(hub.url)) as stager:
        hub.add(NAME, files, private_token="hf_in")
        await ends_right(stager, files)
        close_session()


async def test_redirects_in_a_circle_end(tmp_path: Path, files: Files) -> None:
    """After six requests an attempt."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.redirects = {f"/{NAME}/{CONFIG}": f"/{NAME}/{WEIGHTS}", f"/{NAME}/{WEIGHTS}": f"/{NAME}/{CONFIG}"}
        await ends_wrong(stager, OriginFailed, "over 5 redirects")
        assert len(server.asked) == 3 * 6


@pytest.mark.parametrize("location", ["https://127.0.0.1/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "gopher://x/"])
@pytest.mark.parametrize("path", [CONFIG, WEIGHTS])
async def test_a_redirect_to_another_scheme_is_refused(tmp_path: Path, files: Files, location: str, path: str) -> None:
    """Neither up nor down, and never to a file."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.redirects = {f"/{NAME}/{path}": location}
        await ends_wrong(stager, OriginRefused)


@pytest.mark.parametrize("location", ["http://[", "http://:x/", "//", "http://"])
async def test_a_redirect_to_nowhere_is_a_failure(tmp_path: Path, files: Files, location: str) -> None:
    """Of the origin, and not ours."""
    async with serving("http", files) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.redirects = {f"/{NAME}/{CONFIG}": location}
        with pytest.raises(OriginFailed):
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f000001", "127.1", "0.0.0.0"])
async def test_a_redirect_to_a_private_address_is_refused(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """However it is written. The origin itself counts as public here, which no address of a test machine is."""
    real = web._is_public
    monkeypatch.setattr(web, "_is_public", lambda address: address == "127.0.0.2" or real(address))
    async with running(FaultyServer("127.0.0.2")) as server, serving("http", files) as (inside, _):
        server.add(NAME, files)
        server.redirects = {f"/{NAME}/{WEIGHTS}": f"http://{host}:{inside.url.rpartition(':')[2]}/{NAME}/{WEIGHTS}"}
        async with node(tmp_path / "node", web_origin(server.url, allow_private=False)) as stager:
            with pytest.raises(OriginFailed):  # refused, or no address to begin with
                await stager.ensure(NAME)
            assert nothing_there(stager)
        assert inside.asked == []
        server.redirects = {}
        async with node(tmp_path / "public", web_origin(server.url, allow_private=False)) as stager:
            await ends_right(stager, files)


# -- in parallel


@pytest.fixture
def large(made: Callable[..., Files]) -> Files:
    """Three parts, the last of them short."""
    return made(layers=LAYERS)


LAYERS = 520  # 34 megabytes
PARTS = [0, 16 * 2**20, 32 * 2**20]


@contextlib.asynccontextmanager
async def parallel(kind: str, large: Files, count: int = 3) -> AsyncIterator[tuple[Any, OriginSettings]]:
    async with serving(kind, large, parallel_above_bytes=2**20, parallel=count) as (server, origin):
        yield server, origin


@pytest.mark.parametrize("kind", KINDS)
async def test_large_files_come_in_parallel_ranges(tmp_path: Path, large: Files, kind: str) -> None:
    """Each part once, from begin to end."""
    async with parallel(kind, large) as (server, origin), node(tmp_path / "node", origin) as stager:
        await ends_right(stager, large)
        assert sorted(begins(server.gets(WEIGHTS))) == PARTS
        assert server.sent_bytes == sum(map(len, large.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["close", "reset"])
async def test_parts_that_break_off_go_on_where_they_broke(tmp_path: Path, large: Files, kind: str, end: str) -> None:
    """In the middle of the first, of the second and of the last; what is on disk is not asked for again."""
    async with parallel(kind, large) as (server, origin), node(tmp_path / "node", origin) as stager:
        for at in (3_000_000, 5_000_000, 1_000_000):
            server.fault(WEIGHTS, at=at, end=end)
        await ends_right(stager, large)
        assert server.sent_bytes < 1.5 * len(large[WEIGHTS])  # of a part that is given up for another's failure, what is on its way is lost


@pytest.mark.parametrize("kind", KINDS)
async def test_a_part_that_never_comes_ends_it(tmp_path: Path, large: Files, kind: str) -> None:
    """Nothing of the others is left."""
    async with parallel(kind, large) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, skip=1, times=99, at=0)
        await ends_wrong(stager, OriginFailed)


@pytest.mark.parametrize("kind", KINDS)
async def test_content_that_changes_between_parts_ends_in_the_new(tmp_path: Path, made: Callable[..., Files], large: Files, kind: str) -> None:
    """The first part is the old one's, the others would be the new one's."""
    new = made(seed=1, layers=LAYERS)
    async with parallel(kind, large, 2) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, then=lambda: server.add(NAME, new))
        await ends_right(stager, new)


async def test_a_server_without_ranges_sends_a_large_file_once(tmp_path: Path, large: Files) -> None:
    """The first answer shows it."""
    async with parallel("http", large) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.knows_ranges = False
        await ends_right(stager, large)
        assert len(server.gets(WEIGHTS)) == 1


async def test_a_large_file_without_a_version_comes_in_one_piece(tmp_path: Path, large: Files) -> None:
    """Its parts might be of two versions, and nothing would tell."""
    async with parallel("http", large) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.states_version = False
        await ends_right(stager, large)
        assert [asked.range for asked in server.gets(WEIGHTS)] == [""]


async def test_a_server_that_forgets_ranges_on_the_way_ends_in_the_right_bytes(tmp_path: Path, large: Files) -> None:
    """Behind one address there may be two kinds."""
    async with parallel("http", large) as (server, origin), node(tmp_path / "node", origin) as stager:
        server.fault(WEIGHTS, skip=1, whole=True)
        await ends_right(stager, large)


async def test_a_hub_s_large_files_come_in_parallel_ranges(tmp_path: Path, large: Files) -> None:
    """From where it redirects to; one of them breaks off."""
    async with hub_with(large, parallel_above_bytes=2**20, parallel=3) as (hub, origin), node(tmp_path / "node", origin) as stager:
        hub.fault("truncate", f"/cdn/*{WEIGHTS}", at=2_000_000)
        await ends_right(stager, large)
        assert [status for method, path, status in hub.requests if method == "GET" and path.startswith("/cdn/")] == [206] * 3
