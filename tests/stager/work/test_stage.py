"""One flight: whose name it is, what is refused before room is made for it, and what is not fetched twice."""

import asyncio
import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from extproc.client import StagerClient
from extproc.config.origins import OriginSettings
from extproc.core.artifact import adapter_name
from extproc.errors import AdapterDamaged, InvalidAdapter, ModelNotFound, OriginFailed, OriginRefused
from extproc.stager.stager import Stager
from extproc.stager.supply.follower import LEAST_BYTES
from extproc.stager.supply.source import ATTEMPTS, Source
from tests.fakes.adapters import CONFIG, RANK, WEIGHTS, Files, safetensors, sha256, size_of, small_files, split
from tests.fakes.archives import packed
from tests.fakes.faulty import FaultyServer, running
from tests.fakes.nodes import node, nothing_half_done, nothing_there, visible, web_origin
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns

from ..conftest import OpenStager, ServeNode

NAME = adapter_name("acme/a")
GOOD = small_files()


def bad_header(*, padding: int = 0) -> Files:
    """The format is kept, and a tensor has a rank that the configuration does not have. `padding` bytes of another tensor follow."""
    header, data = split(GOOD[WEIGHTS])
    name = next(name for name in header if "lora_A" in name)
    header[name] = {**header[name], "shape": [2, 128]}
    if padding:
        header["zz.lora_B.weight"] = {"dtype": "U8", "shape": [padding, 4], "data_offsets": [len(data), len(data) + 4 * padding]}
    return {CONFIG: GOOD[CONFIG], WEIGHTS: safetensors(header, data + bytes(4 * padding))}


async def refused(stager: Stager, name: str = NAME, sha256: str = "") -> InvalidAdapter:
    with pytest.raises(InvalidAdapter) as raised:
        await stager.ensure(name, sha256=sha256)
    return raised.value


# -- refusals are remembered


async def test_the_first_request_after_a_refusal_costs_no_fetch(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Within negative_ttl_s not even a question; after it one question, as long as the revision is the same."""
    origin.add(NAME, bad_header())
    stager = await open_stager(origin)
    first = await refused(stager)
    fetched = dict(origin.fetched)
    assert fetched == {(NAME, CONFIG): 1, (NAME, WEIGHTS): 1}
    for asked in range(1, 6):
        assert origin.resolved[NAME] == asked
        assert (await refused(stager)).message == first.message
        clock.now += 10.0
        assert (await refused(stager)).message == first.message
    assert origin.fetched == fetched


async def test_a_new_revision_of_what_was_refused_is_fetched(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """It has been put right. So is the same one after a purge, or when the hour is over."""
    origin.add(NAME, bad_header())
    stager = await open_stager(origin)
    for fetches in (1, 2):
        await refused(stager)
        assert origin.fetched[NAME, WEIGHTS] == fetches
        await stager.purge(NAME)
    await refused(stager)
    clock.now += 3600
    await refused(stager)
    assert origin.fetched[NAME, WEIGHTS] == 4
    origin.add(NAME, dict(GOOD))
    origin.revisions[NAME] = "2"
    clock.now += 10
    assert (await stager.ensure(NAME)).staged


async def test_a_refused_new_version_is_fetched_once_not_each_period(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """The old one stays, and what is wrong with the new one goes on being told."""
    origin.add(NAME, dict(GOOD))
    stager = await open_stager(origin)
    await stager.ensure(NAME)
    origin.add(NAME, bad_header())
    origin.revisions[NAME] = "2"
    for _ in range(4):
        clock.now += 300
        with pytest.raises(InvalidAdapter, match="rank"):
            await stager.refresh(NAME)
        assert not (await stager.ensure(NAME)).staged
    assert origin.fetched[NAME, WEIGHTS] == 2


async def test_what_is_wrong_here_is_not_held_against_the_adapter(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock) -> None:
    """A name that cannot be linked, as something else lies there: that is gone the moment somebody removes it."""
    origin.add(NAME, dict(GOOD))
    stager = await open_stager(origin, adopt=False)
    (node / "acme").mkdir()
    (node / NAME).write_text("x")
    await refused(stager)
    (node / NAME).unlink()
    assert (await stager.ensure(NAME)).staged


async def test_another_engine_is_another_question(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """What an engine of rank 8 refuses, the next one on this node may take."""
    origin.add(NAME, small_files(rank=16))
    stager = await open_stager(origin)
    assert (await refused(stager)).what == "rank"
    stager.node.engine.limits = replace(stager.node.engine.limits, max_lora_rank=16)
    clock.now += 10
    assert (await stager.ensure(NAME)).staged


# -- before room is made


async def test_a_stated_digest_is_compared_before_anything_is_fetched(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Where the origin states its own: by a caller, by the settings, by a pin."""
    other = "ab" * 32
    origin.add(NAME, dict(GOOD))
    origin.state(NAME, WEIGHTS, size=len(GOOD[WEIGHTS]), sha256=sha256(GOOD[WEIGHTS]))
    stager = await open_stager(origin, digests={"acme/b": other})
    assert (await refused(stager, sha256=other)).what == "digest"
    origin.add("acme/b", dict(GOOD))
    origin.state("acme/b", WEIGHTS, size=len(GOOD[WEIGHTS]), sha256=sha256(GOOD[WEIGHTS]))
    assert (await refused(stager, "acme/b")).what == "digest"
    stager.node.holdings.pin(NAME, other)
    assert (await refused(stager)).what == "digest"
    assert not origin.fetched
    stager.node.holdings.unpin(NAME)
    assert (await stager.ensure(NAME, sha256=sha256(GOOD[WEIGHTS]))).staged


async def test_a_new_version_with_another_digest_than_the_pin_is_not_fetched(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """The listing tells, in each comparison."""
    origin.add(NAME, dict(GOOD))
    stager = await open_stager(origin)
    await stager.pin(NAME, sha256(GOOD[WEIGHTS]))
    new = small_files(seed=1)
    origin.add(NAME, new)
    origin.revisions[NAME] = "2"
    origin.state(NAME, WEIGHTS, size=len(new[WEIGHTS]), sha256=sha256(new[WEIGHTS]))
    fetched = dict(origin.fetched)
    for _ in range(3):
        with pytest.raises(InvalidAdapter, match="is pinned"):
            await stager.refresh(NAME)
    assert origin.fetched == fetched


async def test_nothing_good_is_evicted_for_a_bad_adapter(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Its header arrives before room is made for the rest."""
    names = [f"good/{number}" for number in range(4)]
    for number, name in enumerate(names):
        origin.add(name, small_files(seed=number))
    origin.add("bad/one", bad_header())
    stager = await open_stager(origin, max_bytes=4 * size_of(GOOD))
    for name in names:
        await stager.ensure(name)
    clock.now += 1000  # no lease holds them
    for _ in range(5):
        await refused(stager, "bad/one")
        clock.now += 11
    assert sorted(stager.node.holdings) == names
    assert nothing_half_done(stager)


async def test_of_a_large_bad_adapter_little_is_fetched(tmp_path: Path) -> None:
    """Its header is at its beginning, and the transfer ends there; a second request costs no byte."""
    bad = bad_header(padding=4 * 2**20)
    async with running(FaultyServer()) as server, node(tmp_path / "node", web_origin(server.url)) as stager:
        server.add(NAME, bad)
        await refused(stager)
        assert server.sent_bytes < len(bad[WEIGHTS]) / 2  # what fits into the sockets' buffers
        sent = server.sent_bytes
        await refused(stager)
        assert server.sent_bytes == sent
        assert len(server.gets(WEIGHTS)) == 1
        assert nothing_there(stager)


async def test_a_header_that_breaks_off_is_judged_when_the_rest_has_come(tmp_path: Path) -> None:
    """In its length, in its text, and behind it: no byte is asked for twice."""
    for at in (3, 8, 100, 4000):
        async with running(FaultyServer()) as server, node(tmp_path / str(at), web_origin(server.url)) as stager:
            server.add(NAME, GOOD)
            server.fault(WEIGHTS, at=at)
            assert (await stager.ensure(NAME)).staged
            assert [asked.begin for asked in server.gets(WEIGHTS)] == [0, at]
            assert visible(tmp_path / str(at)) == {NAME: GOOD}


async def test_a_file_of_fewer_bytes_than_a_header_is_refused(tmp_path: Path) -> None:
    """There is nothing to wait for."""
    async with running(FaultyServer()) as server, node(tmp_path / "node", web_origin(server.url)) as stager:
        server.add(NAME, {**GOOD, WEIGHTS: b"12345"})
        assert "header" in (await refused(stager)).message


# -- whose fault it is


@pytest.mark.parametrize("path", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html><body>log in</body></html>", b"\n  <HTML>" + b" " * 500])
async def test_a_web_page_is_the_origin_s_fault(tmp_path: Path, path: str, page: bytes) -> None:
    """A log-in, or a page with status 200 for whatever is missing: 502, and not the adapter's 422."""
    async with running(FaultyServer()) as server, node(tmp_path / "node", web_origin(server.url)) as stager:
        server.add(NAME, {**GOOD, path: page})
        with pytest.raises(OriginRefused, match="web page"):
            await stager.ensure(NAME)
        assert nothing_there(stager)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar"])
async def test_what_lies_in_the_place_of_an_archive_is_named(tmp_path: Path, suffix: str) -> None:
    """A web page is the origin's fault, as in the place of weights; a pointer of Git LFS is what was put there."""
    async with running(FaultyServer()) as server, node(tmp_path / "node", web_origin(server.url)) as stager:
        server.files[f"/acme/page{suffix}"] = b"<!doctype html><html><body>log in</body></html>"
        server.files[f"/acme/pointer{suffix}"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 6832600\n"
        with pytest.raises(OriginRefused, match="web page"):
            await stager.ensure("acme/page")
        assert "is a Git LFS pointer" in (await refused(stager, "acme/pointer")).message
        assert nothing_there(stager)


@pytest.mark.parametrize("name", ["\U0001f600" * 20_000, "x" * 20_000, "\ud83d" * 100, "a\nb" * 5000])
async def test_a_refusal_arrives_as_one_whatever_its_text(serve_node: ServeNode, origin: FakeOrigin, name: str) -> None:
    """A text that does not fit into the answer would make an adapter's fault the stager's, and the router would take it to the next node."""
    header, data = split(GOOD[WEIGHTS])
    first = next(name for name in header if "lora_A" in name)
    changed = {f"{name}.lora_A.weight" if key == first else key: {**tensor, "shape": [3]} if key == first else tensor for key, tensor in header.items()}
    origin.add(NAME, {CONFIG: GOOD[CONFIG], WEIGHTS: safetensors(json.dumps(changed).encode(), data)})
    client: StagerClient = (await serve_node()).ask()
    with pytest.raises(InvalidAdapter) as raised:
        await client.ensure(NAME)
    assert raised.value.status == 422
    assert len(raised.value.message) <= 300


async def test_a_zip_with_backslashes_is_one_with_folders(tmp_path: Path) -> None:
    """As Windows' own tools write them."""
    files = {f"my-lora\\{path}": data for path, data in GOOD.items()}
    async with running(FaultyServer()) as server, node(tmp_path / "node", web_origin(server.url)) as stager:
        server.files[f"/{NAME}.zip"] = packed(".zip", files)
        assert (await stager.ensure(NAME)).staged
        assert visible(tmp_path / "node") == {NAME: GOOD}
        server.files["/acme/out.zip"] = packed(".zip", {f"..\\{path}": data for path, data in GOOD.items()})
        assert "leaves the directory" in (await refused(stager, "acme/out")).message


# -- origins do not mix


def mirrored(*origins: FakeOrigin, clock: Clock) -> list[Source]:
    """The second is a mirror of the first."""
    first, second = origins
    settings = [OriginSettings(type="http", url="http://x", name=origin.label) for origin in origins]
    return [Source(first, settings[0], clock), Source(second, settings[1].model_copy(update={"mirror_of": first.label}), clock)]


async def test_a_refresh_asks_only_where_the_version_came_from(open_stager: OpenStager) -> None:
    """Neither while that origin is down nor when it has it no more does another's content take its place."""
    private, public = FakeOrigin("private"), FakeOrigin("public")
    private.add(NAME, dict(GOOD))
    public.add(NAME, small_files(seed=1))
    stager = await open_stager(private, public)
    before = await stager.ensure(NAME)
    private.down = OriginFailed("down")
    with pytest.raises(OriginFailed, match="down"):
        await stager.refresh(NAME)
    private.down = None
    del private.files[NAME]
    with pytest.raises(ModelNotFound):
        await stager.refresh(NAME)
    assert (await stager.ensure(NAME)).digest == before.digest
    assert not public.resolved


async def test_a_refresh_does_not_go_over_to_an_earlier_origin(open_stager: OpenStager) -> None:
    """One that did not have the name when it was staged."""
    first, second = FakeOrigin("first"), FakeOrigin("second")
    second.add(NAME, dict(GOOD))
    stager = await open_stager(first, second)
    await stager.ensure(NAME)
    first.add(NAME, small_files(seed=1))
    assert not await stager.refresh(NAME)
    assert first.resolved[NAME] == 1


async def test_a_mirror_is_asked_in_place_of_what_fails(tmp_path: Path, clock: Clock) -> None:
    """Because the settings say that both have the same; an origin that has not got the name is no failure."""
    first, second, third = FakeOrigin("first"), FakeOrigin("second"), FakeOrigin("third")
    second.add(NAME, dict(GOOD))
    third.add(NAME, small_files(seed=1))
    first.down = OriginFailed("down")
    async with node(tmp_path / "node", *mirrored(first, second, clock=clock), third, clock=clock) as stager:
        assert (await stager.ensure(NAME)).origin == "second"
        second.down = OriginFailed("down, too")
        with pytest.raises(OriginFailed, match="down"):
            await stager.ensure("acme/b")
        assert not third.resolved


@pytest.mark.parametrize("states", ["equal", "other", "none"])
async def test_a_transfer_goes_over_to_a_mirror_that_states_the_same_digest(tmp_path: Path, clock: Clock, states: str) -> None:
    """What is listed there must be what was listed here; else the failure is the answer."""
    first, second = FakeOrigin("first"), FakeOrigin("second")
    for origin in (first, second):
        origin.add(NAME, dict(GOOD))
        if states != "none":
            digest = sha256(GOOD[WEIGHTS]) if origin is first or states == "equal" else "ab" * 32
            origin.state(NAME, WEIGHTS, size=len(GOOD[WEIGHTS]), sha256=digest)
    first.fetch_failures = [OriginFailed("broken") for _ in range(ATTEMPTS)]
    async with node(tmp_path / "node", *mirrored(first, second, clock=clock), clock=clock) as stager:
        if states == "equal":
            assert (await stager.ensure(NAME)).origin == "second"
        else:
            with pytest.raises(OriginFailed, match="broken"):
                await stager.ensure(NAME)
            assert not second.fetched


async def test_a_missing_name_says_what_is_there_instead(tmp_path: Path) -> None:
    """A full model, say: whoever reads `no origin has it` alone looks for a wrong name."""
    (tmp_path / "origin" / NAME).mkdir(parents=True)
    (tmp_path / "origin" / NAME / "model.safetensors").write_bytes(b"x")
    async with node(tmp_path / "node", OriginSettings(type="file", path=str(tmp_path / "origin"))) as stager:
        with pytest.raises(ModelNotFound, match="no origin has it; the file origin has a full model there"):
            await stager.ensure(NAME)


async def test_a_damaged_transfer_is_told_apart_from_a_bad_adapter(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """It is looked at again soon, and after longer and longer."""
    origin.add(NAME, dict(GOOD))
    origin.state(NAME, WEIGHTS, size=len(GOOD[WEIGHTS]), sha256="ab" * 32)
    stager = await open_stager(origin)
    for fetches, wait_s in ((1, 10), (2, 10), (2, 10), (3, 10), (3, 10)):
        with pytest.raises(AdapterDamaged, match="the fake origin states"):
            await stager.ensure(NAME)
        assert origin.fetched[NAME, WEIGHTS] == fetches
        clock.now += wait_s
    await turns()


def large(bad_at: int = -1) -> Files:
    """Weights of several steps of the search. From byte `bad_at` of the file on: NaNs."""
    header, data = split(GOOD[WEIGHTS])
    first, size = len(data), 3 * LEAST_BYTES
    for side, shape in (("A", [RANK, size // (2 * RANK)]), ("B", [4, RANK])):
        name = f"base_model.model.model.layers.0.self_attn.k_proj.lora_{side}.weight"
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, first + 2 * prod(shape)]}
        first += 2 * prod(shape)
    weights = bytearray(safetensors(header, data + bytes(first - len(data))))
    if bad_at >= 0:
        weights[bad_at : bad_at + 4] = b"\xff" * 4  # an element at least, wherever the header ends
    return {CONFIG: GOOD[CONFIG], WEIGHTS: bytes(weights)}


@pytest.mark.parametrize("place", ["at the beginning", "in the middle", "at the end"])
async def test_a_nan_is_refused_wherever_the_search_had_come_to(open_stager: OpenStager, origin: FakeOrigin, place: str) -> None:
    """Whether it came while the weights were looked through as they arrived, or is left for the check behind the transfer. Nothing of it is published."""
    size = len(large()[WEIGHTS])
    origin.add(NAME, large({"at the beginning": 64 * 2**10, "in the middle": size // 2, "at the end": size - 4}[place]))
    stager = await open_stager(origin)
    assert "holds an infinity or a NaN" in (await refused(stager)).message
    assert nothing_there(stager)
    assert nothing_half_done(stager)


async def test_weights_that_came_damaged_are_the_transfer_s_fault_though_they_hold_nans(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """The search has found them before the digest is known; what counts is the digest."""
    origin.add(NAME, large(64 * 2**10))
    origin.state(NAME, WEIGHTS, size=len(large()[WEIGHTS]), sha256=sha256(large()[WEIGHTS]))
    stager = await open_stager(origin)
    with pytest.raises(AdapterDamaged, match="the fake origin states"):
        await stager.ensure(NAME)
    assert nothing_there(stager)


async def test_a_transfer_that_breaks_off_is_searched_once(tmp_path: Path) -> None:
    """It goes on where it was, and so does the search: what it publishes is whole, and what is bad in either half is found."""
    for number, (files, is_good) in enumerate([(large(), True), (large(64 * 2**10), False), (large(2 * LEAST_BYTES + 2**16), False)]):
        async with running(FaultyServer()) as server, node(tmp_path / str(number), web_origin(server.url)) as stager:
            server.add(NAME, files)
            server.fault(WEIGHTS, at=len(files[WEIGHTS]) // 2)
            if is_good:
                assert (await stager.ensure(NAME)).staged
                assert visible(tmp_path / str(number)) == {NAME: files}
            else:
                assert "NaN" in (await refused(stager)).message
                assert nothing_there(stager)


async def test_a_flight_that_is_cancelled_leaves_no_search_behind(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """A stager that closes in the middle of a transfer: its staging directory is empty, and no task is left."""
    origin.add(NAME, large())
    stall = origin.stall(NAME, WEIGHTS)
    before = asyncio.all_tasks()
    stager = await open_stager(origin)
    flight = asyncio.create_task(stager.ensure(NAME))
    await stall.reached.wait()
    flight.cancel()
    await asyncio.gather(flight, return_exceptions=True)
    await stager.close()
    await turns()
    assert asyncio.all_tasks() == before
    assert nothing_there(stager)
    assert nothing_half_done(stager)
