"""Resolve, reserve, fetch, verify, publish, evict: what a caller gets, and what is on disk after it."""

import asyncio
import contextlib
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from extproc.config.origins import OriginSettings
from extproc.core.artifact import ArtifactId, adapter_name, adopted_id
from extproc.errors import (
    AdapterInUse,
    AdapterTooLarge,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    NoSpace,
    OriginFailed,
    OriginRefused,
    StartError,
)
from extproc.stager.books.changes import Change
from extproc.stager.stager import Stager
from extproc.stager.supply.origins import Origin
from extproc.stager.supply.origins.file import FileOrigin
from extproc.stager.supply.origins.http import HttpOrigin
from extproc.stager.supply.source import ATTEMPTS
from extproc.up.demo import write_adapter
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, Files, read_files, safetensors, sha256, size_of, small_files
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.http import FileServer
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns, until

from .conftest import OpenStager

SIZE = size_of(small_files())


@pytest.fixture
def open_stager(open_stager: OpenStager) -> OpenStager:
    """Hours pass in these tests, and no comparison with an origin may begin by itself."""

    async def open_(*origins: Origin, engine_url: str = "", **settings: Any) -> Stager:
        return await open_stager(*origins, engine_url=engine_url, **{"revalidate_s": 0.0, **settings})

    return open_


def visible(node: Path) -> dict[str, Files]:
    """What an engine finds: adapter name -> its files."""
    links = [path for path in node.rglob("*") if path.is_symlink()]
    return {str(path.relative_to(node)): read_files(path) for path in links}


def stored(node: Path) -> list[str]:
    return sorted(path.name for path in (node / ".store").iterdir())


def clean(node: Path) -> bool:
    """Nothing visible, nothing stored, nothing half done."""
    return [path.name for path in node.iterdir() if not path.name.startswith(".")] == [] and stored(node) == [] and not any((node / ".staging").iterdir())


def balanced(stager: Stager) -> bool:
    """The books say what the disk says, and stay below the limit."""
    index = stager.node.holdings.index
    return (
        stored(stager.node.store.directory) == sorted(entry.id for entry in index.entries())
        and {named.id for name in stager.node.holdings if (named := stager.node.holdings.get(name)) is not None} == {entry.id for entry in index.entries()}
        and index.used_bytes + index.reserved_bytes <= index.max_bytes
    )


@contextlib.contextmanager
def watching(stager: Stager) -> "Iterator[asyncio.Queue[Change | None]]":
    """Every change from now on."""
    with stager.node.changes.since(stager.node.changes.last) as (queue, complete):
        assert complete
        yield queue


def drain(queue: "asyncio.Queue[Change | None]") -> list[tuple[str, str]]:
    """What came and went; the budget is told when the house is kept, once a second."""
    told = [change for _ in range(queue.qsize()) if (change := queue.get_nowait()) is not None]
    return [(change.kind, change.adapter) for change in told if change.kind not in ("space", "demand")]


# -- staging


async def test_cold_then_warm(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """The first call fetches and verifies, the second asks nobody; both hold a lease."""
    files = small_files()
    origin.add("acme/a", files)
    stager = await open_stager(origin)
    cold = await stager.ensure("acme/a")
    warm = await stager.ensure("acme/a")
    assert (cold.staged, warm.staged) == (True, False)
    manifest = await stager.manifest("acme/a")
    assert manifest is not None
    assert cold.digest == warm.digest == manifest.digest
    assert cold.lease_s == warm.lease_s == 300.0
    assert (cold.origin, cold.size, manifest.origin, manifest.size) == ("fake", SIZE, "fake", sum(map(len, files.values())))
    assert visible(node) == {"acme/a": files}
    assert origin.resolved["acme/a"] == 1
    assert set(origin.fetched.values()) == {1}
    assert stager.leased_s(ArtifactId(cold.digest)) == 300.0


async def test_a_thousand_callers_are_one_fetch(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """All of them get the one answer."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin)
    answers = await asyncio.gather(*(stager.ensure("acme/a") for _ in range(1000)))
    assert len({answer.digest for answer in answers}) == 1
    assert origin.resolved["acme/a"] == 1
    assert origin.fetched == {("acme/a", CONFIG): 1, ("acme/a", WEIGHTS): 1}


async def test_two_adapters_are_fetched_side_by_side(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """A slow one holds up only its own callers."""
    for seed, name in enumerate(("acme/slow", "acme/fast")):
        origin.add(name, small_files(seed=seed))
    stall = origin.stall("acme/slow", WEIGHTS)
    stager = await open_stager(origin)
    slow = asyncio.create_task(stager.ensure("acme/slow"))
    await stall.reached.wait()
    assert (await stager.ensure("acme/fast")).staged
    assert not slow.done()
    stall.release()
    assert (await slow).staged


async def test_a_cancelled_waiter_changes_nothing(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """A starts the fetch, B joins, A's client hangs up, B gets the adapter of A's fetch."""
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    stager = await open_stager(origin)
    a = asyncio.create_task(stager.ensure("acme/a"))
    await stall.reached.wait()
    b = asyncio.create_task(stager.ensure("acme/a"))
    await turns()
    a.cancel()
    with pytest.raises(asyncio.CancelledError):
        await a
    stall.release()
    assert (await b).staged
    assert set(origin.fetched.values()) == {1}


async def test_a_fetch_nobody_waits_for_ends_on_disk(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """The next request finds it there."""
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    stager = await open_stager(origin)
    only = asyncio.create_task(stager.ensure("acme/a"))
    await stall.reached.wait()
    only.cancel()
    await asyncio.wait({only})
    stall.release()
    await until(lambda: "acme/a" in set(stager.node.holdings))
    assert not (await stager.ensure("acme/a")).staged


@pytest.mark.parametrize("name", ["", "/abs", "../up", "a//b", "a/./b", ".hidden", "a\nb", "x" * 257])
async def test_an_unusable_name_reaches_no_origin(open_stager: OpenStager, origin: FakeOrigin, name: str) -> None:
    """The stager does not rely on the router for that."""
    stager = await open_stager(origin)
    with pytest.raises(InvalidRequest):
        await stager.ensure(name)
    with pytest.raises(InvalidRequest):
        await stager.evict(name)
    assert not origin.resolved


async def test_a_refused_directory_stops_the_start(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """A second stager on the same directory."""
    await open_stager(origin)
    with pytest.raises(StartError):
        await open_stager(origin)


async def test_close_gives_up_flights_without_a_trace(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """In mid-download; the origins are closed, too."""
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    stager = await open_stager(origin)
    waiting = asyncio.create_task(stager.ensure("acme/a"))
    await stall.reached.wait()
    await stager.close()
    await asyncio.wait({waiting})
    assert clean(node)
    assert origin.closed


# -- what origins say


async def test_not_found_is_remembered_for_a_while(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """No origin is asked again until negative_ttl_s is over; then the adapter may have come."""
    stager = await open_stager(origin)
    for _ in range(3):
        with pytest.raises(ModelNotFound, match="acme/a"):
            await stager.ensure("acme/a")
    assert origin.resolved["acme/a"] == 1
    origin.add("acme/a", small_files())
    clock.now += 9.99
    with pytest.raises(ModelNotFound):
        await stager.ensure("acme/a")
    assert origin.resolved["acme/a"] == 1
    clock.now += 0.02
    assert (await stager.ensure("acme/a")).staged


async def test_not_found_is_not_remembered_with_a_ttl_of_zero(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """0 switches it off."""
    stager = await open_stager(origin, negative_ttl_s=0.0)
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            await stager.ensure("acme/a")
    assert origin.resolved["acme/a"] == 2


async def test_the_memory_of_what_is_missing_is_bounded(open_stager: OpenStager, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks for random names fills no memory: the oldest is forgotten."""
    stager = await open_stager(origin)
    monkeypatch.setattr(stager.node.refusals, "_max_names", 2)
    for name in ("a", "b", "c", "c", "b", "a"):
        with pytest.raises(ModelNotFound):
            await stager.ensure(name)
    assert origin.resolved == {"a": 2, "b": 1, "c": 1}


async def test_origins_are_asked_in_order(open_stager: OpenStager) -> None:
    """The first that has it; the others are not asked."""
    first, second, third = FakeOrigin("first"), FakeOrigin("second"), FakeOrigin("third")
    second.add("acme/a", small_files())
    third.add("acme/a", small_files(seed=1))
    stager = await open_stager(first, second, third)
    assert (await stager.ensure("acme/a")).origin == "second"
    assert (first.resolved["acme/a"], third.resolved["acme/a"]) == (1, 0)


@pytest.mark.parametrize("failure", [OriginFailed("down"), OriginRefused("forbidden")])
async def test_an_origin_that_fails_hands_its_names_to_no_other(open_stager: OpenStager, failure: OriginFailed) -> None:
    """Whoever has registered the name at a public origin would be served in its place."""
    first, second = FakeOrigin("first"), FakeOrigin("second")
    first.down = failure
    second.add("acme/a", small_files())
    stager = await open_stager(first, second)
    with pytest.raises(type(failure), match=str(failure)):
        await stager.ensure("acme/a")
    assert first.resolved["acme/a"] == (ATTEMPTS if failure.retryable else 1)
    assert not second.resolved


async def test_files_of_two_origins_are_never_mixed(open_stager: OpenStager, node: Path) -> None:
    """The first breaks behind its configuration: its weights do not come from the second, which has the adapter, too, with other bytes."""
    first, second = FakeOrigin("first"), FakeOrigin("second")
    other = small_files(seed=1)
    first.add("acme/a", small_files())
    second.add("acme/a", other)
    stall = first.stall("acme/a", CONFIG)
    stager = await open_stager(first, second)
    wait = asyncio.create_task(stager.ensure("acme/a"))
    await stall.reached.wait()
    first.fetch_failures = [OriginFailed("broken")] * ATTEMPTS
    stall.release()
    with pytest.raises(OriginFailed, match="broken"):
        await wait
    assert not second.fetched
    assert clean(node)
    first.stalls = {}
    assert (await stager.ensure("acme/a")).origin == "first"
    assert visible(node)["acme/a"] == small_files()


async def test_an_origin_that_is_down_may_have_it(open_stager: OpenStager, clock: Clock) -> None:
    """The failure is the answer, and it is not remembered: 502, never 404. It is left alone for a while, then asked again."""
    first, second = FakeOrigin("first"), FakeOrigin("second")
    first.down = OriginFailed("first is down", reached=False)
    stager = await open_stager(first, second)
    for _ in range(2):
        with pytest.raises(OriginFailed, match="first is down"):
            await stager.ensure("acme/a")
    assert not second.resolved
    first.down = None
    with pytest.raises(OriginFailed, match="first origin is down; it is asked again in"):
        await stager.ensure("acme/a")
    clock.now += 5
    with pytest.raises(ModelNotFound):
        await stager.ensure("acme/a")


async def test_a_blip_is_survived(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Each step is tried again."""
    origin.add("acme/a", small_files())
    origin.resolve_failures = [OriginFailed("blip")]
    origin.fetch_failures = [OriginFailed("blip"), OriginFailed("blip")]
    stager = await open_stager(origin)
    assert (await stager.ensure("acme/a")).staged


async def test_a_refusal_is_not_repeated(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """The same credentials are refused again."""
    origin.add("acme/a", small_files())
    origin.down = OriginRefused("no")
    stager = await open_stager(origin)
    with pytest.raises(OriginRefused):
        await stager.ensure("acme/a")
    assert origin.resolved["acme/a"] == 1


async def test_a_failed_fetch_leaves_nothing_and_may_be_tried_again(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """The room it had reserved is free again."""
    origin.add("acme/a", small_files())
    origin.fetch_failures = [OriginFailed("broke") for _ in range(ATTEMPTS)]
    stager = await open_stager(origin)
    with pytest.raises(OriginFailed, match="broke"):
        await stager.ensure("acme/a")
    assert clean(node)
    assert stager.node.holdings.index.reserved_bytes == 0
    assert (await stager.ensure("acme/a")).staged


async def test_a_flight_that_takes_too_long_is_given_up(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """All waiters get a retryable failure of the origin; nothing stays, not even the flight."""
    origin.add("acme/a", small_files())
    origin.stall("acme/a", WEIGHTS)
    stager = await open_stager(origin, fetch_timeout_s=0.05)
    results = await asyncio.gather(*(stager.ensure("acme/a") for _ in range(3)), return_exceptions=True)
    for result in results:
        assert isinstance(result, OriginFailed)
        assert result.retryable
    assert clean(node)
    assert stager.node.holdings.index.reserved_bytes == 0
    assert stager._flights.names() == []
    await stager.close()
    origin.stalls.clear()
    patient = await open_stager(origin)
    assert (await patient.ensure("acme/a")).staged


# -- what is refused


def _other_sha256(origin: FakeOrigin, files: Files) -> None:
    origin.state("acme/a", WEIGHTS, size=len(files[WEIGHTS]), sha256=sha256(b"other"))


def _other_size(origin: FakeOrigin, files: Files) -> None:
    origin.state("acme/a", WEIGHTS, size=len(files[WEIGHTS]) + 1)


def _truncated(_: FakeOrigin, files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][:-1]


def _padded(_: FakeOrigin, files: Files) -> None:
    files[WEIGHTS] += b"\0"


def _pickle_named_safetensors(_: FakeOrigin, files: Files) -> None:
    files[WEIGHTS] = b"\x80\x04\x95" + bytes(100)


def _pickle_only(_: FakeOrigin, files: Files) -> None:
    files[PICKLE] = files.pop(WEIGHTS)


def _no_weights(_: FakeOrigin, files: Files) -> None:
    del files[WEIGHTS]


def _change_config(files: Files, **changes: object) -> None:
    files[CONFIG] = json.dumps({**json.loads(files[CONFIG]), **changes}).encode()


def _other_base(_: FakeOrigin, files: Files) -> None:
    _change_config(files, base_model_name_or_path="other/base")


def _other_rank(_: FakeOrigin, files: Files) -> None:
    _change_config(files, r=5)


def _rank_too_high(_: FakeOrigin, files: Files) -> None:
    _change_config(files, r=16)


def _dora(_: FakeOrigin, files: Files) -> None:
    _change_config(files, use_dora=True)


def _not_finite(_: FakeOrigin, files: Files) -> None:
    files[WEIGHTS] = files[WEIGHTS][:-2] + b"\xc0\x7f"  # BF16's NaN


REFUSED = [
    _other_sha256,
    _other_size,
    _truncated,
    _padded,
    _pickle_named_safetensors,
    _pickle_only,
    _no_weights,
    _other_base,
    _other_rank,
    _rank_too_high,
    _dora,
    _not_finite,
]


@pytest.mark.parametrize("spoil", REFUSED)
async def test_what_is_not_servable_is_refused_and_leaves_nothing(open_stager: OpenStager, origin: FakeOrigin, node: Path, clock: Clock, spoil: object) -> None:
    """422, no link for an engine to follow, no room taken; when it is put right, under a new revision, it is served."""
    assert callable(spoil)
    files = small_files()
    origin.add("acme/a", files)
    spoil(origin, files)
    stager = await open_stager(origin)
    with pytest.raises(InvalidAdapter) as raised:
        await stager.ensure("acme/a")
    assert raised.value.status == 422
    assert str(node) not in str(raised.value)
    assert clean(node)
    assert (stager.node.holdings.index.used_bytes, stager.node.holdings.index.reserved_bytes) == (0, 0)
    origin.says.clear()
    origin.add("acme/a", small_files())
    origin.revisions["acme/a"] = "2"
    clock.now += stager.node.settings.negative_ttl_s
    assert (await stager.ensure("acme/a")).staged


@pytest.mark.parametrize("spoil", [_pickle_only, _other_base, _rank_too_high, _dora])
async def test_what_the_configuration_rules_out_is_not_downloaded(open_stager: OpenStager, origin: FakeOrigin, spoil: object) -> None:
    """The weights may have gigabytes."""
    assert callable(spoil)
    files = small_files()
    origin.add("acme/a", files)
    spoil(origin, files)
    stager = await open_stager(origin)
    with pytest.raises(InvalidAdapter):
        await stager.ensure("acme/a")
    assert origin.fetched["acme/a", WEIGHTS] == origin.fetched["acme/a", PICKLE] == 0


async def test_a_configuration_of_gigabytes_is_not_downloaded(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Real ones have kilobytes; it is fetched before room is reserved, and read into memory."""
    origin.add("acme/a", small_files())
    origin.state("acme/a", CONFIG, size=2 * 2**30)
    stager = await open_stager(origin)
    with pytest.raises(AdapterTooLarge, match=CONFIG):
        await stager.ensure("acme/a")
    assert not origin.fetched


async def test_pickle_is_served_only_where_it_is_allowed(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Where the operator has said so; elsewhere the refusal names the file."""
    files = small_files()
    origin.add("acme/a", {CONFIG: files[CONFIG], PICKLE: b"\x80\x04."})
    careful = await open_stager(origin)
    with pytest.raises(InvalidAdapter, match=PICKLE):
        await careful.ensure("acme/a")
    await careful.close()
    stager = await open_stager(origin, allow_pickle=True)
    await stager.ensure("acme/a")
    assert set(visible(node)["acme/a"]) == {CONFIG, PICKLE}


async def test_a_name_that_others_have_leaves_nothing(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """It is refused, at the name and below it, and its content does not stay on disk uncounted."""
    for seed, name in enumerate(("acme", "acme/x")):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin)
    (node / "acme").write_text("theirs")
    for name in ("acme", "acme/x"):
        with pytest.raises(InvalidAdapter, match=name):
            await stager.ensure(name)
    assert (node / "acme").read_text() == "theirs"
    assert stored(node) == []
    assert balanced(stager)
    assert stager.node.holdings.index.reserved_bytes == 0


async def test_a_body_without_a_length_is_cut_off_at_the_limit(open_stager: OpenStager, http_server: FileServer, node: Path) -> None:
    """An origin that states no size gets so much room, and may not fill the disk beyond it."""
    files = small_files()
    http_server.add("acme/a", {CONFIG: files[CONFIG], WEIGHTS: bytes(64 * 2**20)})
    http_server.sizeless.add(f"/acme/a/{WEIGHTS}")
    origin = HttpOrigin(OriginSettings(type="http", url=http_server.url, allow_private=True))
    stager = await open_stager(origin, unknown_size_bytes=2**20)
    with pytest.raises(AdapterTooLarge):
        await stager.ensure("acme/a")
    assert clean(node)
    assert http_server.sent_bytes < 32 * 2**20


# -- room


async def three(origin: FakeOrigin, clock: Clock, stager: Stager) -> None:
    """acme/a, acme/b and acme/c, staged in this order, a second apart."""
    for seed, name in enumerate(("acme/a", "acme/b", "acme/c")):
        origin.add(name, small_files(seed=seed))
        await stager.ensure(name)
        clock.now += 1


async def test_the_least_recently_used_goes_for_room(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """Asked for again counts as used; what went is fetched again when it is asked for."""
    stager = await open_stager(origin, max_bytes=3 * SIZE)
    await three(origin, clock, stager)
    await stager.ensure("acme/a")
    clock.now += 1000
    origin.add("acme/d", small_files(seed=3))
    await stager.ensure("acme/d")
    assert set(visible(node)) == {"acme/a", "acme/c", "acme/d"}
    assert len(stored(node)) == 3
    assert balanced(stager)
    assert (await stager.ensure("acme/b")).staged
    assert set(visible(node)) == {"acme/a", "acme/b", "acme/d"}


async def test_what_is_leased_never_goes(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """Within the lease a router sends requests without asking: no room is the answer, until the oldest lease ends."""
    stager = await open_stager(origin, max_bytes=3 * SIZE)
    await three(origin, clock, stager)
    origin.add("acme/d", small_files(seed=3))
    clock.now = 1000 + 299.9
    with pytest.raises(NoSpace) as raised:
        await stager.ensure("acme/d")
    assert not raised.value.shared
    assert set(visible(node)) == {"acme/a", "acme/b", "acme/c"}
    assert balanced(stager)
    clock.now = 1000 + 300
    await stager.ensure("acme/d")
    assert set(visible(node)) == {"acme/b", "acme/c", "acme/d"}


async def test_what_is_on_its_way_counts(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Room for one: the second of two flights is told so, though nothing is on disk yet."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    stall = origin.stall("acme/a", WEIGHTS)
    stager = await open_stager(origin, max_bytes=SIZE)
    first = asyncio.create_task(stager.ensure("acme/a"))
    await stall.reached.wait()
    with pytest.raises(NoSpace):
        await stager.ensure("acme/b")
    stall.release()
    assert (await first).staged


async def test_what_never_fits_is_too_large(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Nothing is evicted for it; the answer is 422, not "try again"."""
    origin.add("acme/a", small_files())
    origin.add("acme/big", small_files(rank=8, modules=("q_proj", "k_proj", "v_proj", "o_proj")))
    stager = await open_stager(origin, max_bytes=SIZE, lease_s=0.001)
    await stager.ensure("acme/a")
    with pytest.raises(AdapterTooLarge) as raised:
        await stager.ensure("acme/big")
    assert not raised.value.retryable
    assert set(visible(node)) == {"acme/a"}


async def test_an_adapter_over_the_size_limit_is_not_fetched(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """max_adapter_bytes, by what the origin states."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin, max_adapter_bytes=1000)
    with pytest.raises(AdapterTooLarge, match="max_adapter_bytes is 1000"):
        await stager.ensure("acme/a")
    assert not origin.fetched


async def test_a_file_over_the_size_limit_is_not_fetched(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """max_file_bytes, by what the origin states of the weights alone."""
    files = small_files()
    origin.add("acme/a", files)
    stager = await open_stager(origin, max_file_bytes=len(files[WEIGHTS]) - 1)
    with pytest.raises(AdapterTooLarge, match=f"{WEIGHTS} has {len(files[WEIGHTS])} bytes; stager.max_file_bytes is {len(files[WEIGHTS]) - 1}"):
        await stager.ensure("acme/a")
    assert not origin.fetched
    assert clean(node)


async def test_a_full_disk_is_no_space_and_leaves_nothing(open_stager: OpenStager, tmp_path: Path) -> None:
    """A real file system of one megabyte, with a limit in the settings that is not reached: the files of a flight go, others stay."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False)  # noqa: ASYNC221
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        write_adapter(tmp_path / "origin" / "small", seed=0, rank=4, hidden=64, layers=2)
        write_adapter(tmp_path / "origin" / "large", seed=0, rank=8, hidden=4096, layers=8)
        stager = await open_stager(FileOrigin(OriginSettings(type="file", path=str(tmp_path / "origin"))), dir=str(disk))
        await stager.ensure("small")
        with pytest.raises(NoSpace):
            await stager.ensure("large")
        assert set(visible(disk)) == {"small"}
        assert list((disk / ".staging").iterdir()) == []
        assert stored(disk) == sorted(entry.id for entry in stager.node.holdings.index.entries())
        await stager.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # noqa: ASYNC221


# -- one content, several names


async def test_equal_content_is_stored_and_counted_once(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Two names, one directory, one share of the limit."""
    files = small_files()
    origin.add("acme/a", files)
    origin.add("acme/b", files)
    stager = await open_stager(origin, max_bytes=2 * SIZE)
    one, two = await stager.ensure("acme/a"), await stager.ensure("acme/b")
    assert one.digest == two.digest
    assert visible(node) == {"acme/a": files, "acme/b": files}
    assert stored(node) == [one.digest]
    assert stager.node.holdings.index.used_bytes == SIZE


async def test_equal_content_may_arrive_at_the_same_moment(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """Ten flights of ten names publish one content."""
    names = [f"acme/n{n}" for n in range(10)]
    for name in names:
        origin.add(name, small_files())
    stager = await open_stager(origin)
    answers = await asyncio.gather(*(stager.ensure(name) for name in names))
    assert len({answer.digest for answer in answers}) == 1
    assert set(visible(node)) == set(names)
    assert len(stored(node)) == 1
    assert balanced(stager)
    assert stager.node.holdings.index.reserved_bytes == 0


async def test_evicting_one_of_two_names_keeps_the_content(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """It frees nothing; the second eviction does."""
    files = small_files()
    origin.add("acme/a", files)
    origin.add("acme/b", files)
    stager = await open_stager(origin)
    await stager.ensure("acme/a")
    await stager.ensure("acme/b")
    clock.now += 1000
    assert await stager.evict("acme/a") == 0
    assert visible(node) == {"acme/b": files}
    assert not (await stager.ensure("acme/b")).staged
    clock.now += 1000
    assert await stager.evict("acme/b") == SIZE
    assert clean(node)
    assert stager.node.holdings.index.used_bytes == 0


async def test_going_for_room_takes_all_names(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """A name without content would be a broken link."""
    for name in ("acme/a", "acme/b"):
        origin.add(name, small_files())
    for seed, name in ((1, "acme/c"), (2, "acme/d")):
        origin.add(name, small_files(seed=seed))
    stager = await open_stager(origin, max_bytes=2 * SIZE)
    for name in ("acme/a", "acme/b", "acme/c"):
        await stager.ensure(name)
    clock.now += 1000
    with watching(stager) as queue:
        await stager.ensure("acme/d")
        assert set(drain(queue)) == {("evicted", "acme/a"), ("evicted", "acme/b"), ("published", "acme/d")}
    assert set(visible(node)) == set(stager.node.holdings) == {"acme/c", "acme/d"}


# -- asked for


async def test_evict_refuses_what_is_leased_or_unknown(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """409 and 404; after the lease it goes and says how many bytes are free."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin)
    with pytest.raises(ModelNotFound):
        await stager.evict("acme/a")
    await stager.ensure("acme/a")
    clock.now += 100
    with pytest.raises(AdapterInUse, match="200 s more"):
        await stager.evict("acme/a")
    clock.now += 200
    assert await stager.evict("acme/a") == SIZE
    assert clean(node)
    with pytest.raises(ModelNotFound):
        await stager.evict("acme/a")


async def test_new_content_gets_a_new_path(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """An engine's prefix cache is keyed by name and path: the path changes with the content."""
    origin.add("acme/a", small_files(seed=1))
    stager = await open_stager(origin)
    old = (await stager.ensure("acme/a")).digest
    path = (node / "acme/a").resolve()
    clock.now += 1000
    await stager.evict("acme/a")
    origin.add("acme/a", small_files(seed=2))
    assert (await stager.ensure("acme/a")).digest != old
    assert (node / "acme/a").resolve() != path


async def test_a_restart_adopts_what_is_there(open_stager: OpenStager, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """No origin is asked; a new instance is; nothing is leased, so that the limit of the new settings can be met."""
    stager = await open_stager(origin)
    await three(origin, clock, stager)
    await stager.close()
    again = await open_stager(FakeOrigin(), max_bytes=3 * SIZE)
    assert again.instance != stager.instance
    assert again.node.holdings.index.used_bytes == 3 * SIZE
    assert set(again.node.holdings) == {"acme/a", "acme/b", "acme/c"}
    assert all(again.leased_s(entry.id) == 0 for entry in again.node.holdings.index.entries())
    assert not (await again.ensure("acme/a")).staged


async def test_watchers_are_told_what_comes_and_goes(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Each watcher from the moment it begins; a hit is no change."""
    stager = await open_stager(origin, max_bytes=3 * SIZE)
    with watching(stager) as early:
        await three(origin, clock, stager)
        await stager.ensure("acme/a")
        with watching(stager) as late:
            clock.now += 1000
            origin.add("acme/d", small_files(seed=3))
            await stager.ensure("acme/d")
            await stager.evict("acme/c")
            told = [("evicted", "acme/b"), ("published", "acme/d"), ("evicted", "acme/c")]
            assert drain(late) == told
        assert drain(early) == [("published", "acme/a"), ("published", "acme/b"), ("published", "acme/c"), *told]
    await stager.ensure("acme/b")
    assert early.empty()


async def test_metrics_count_what_happened(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """One of each."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin)
    await stager.ensure("acme/a")
    await stager.ensure("acme/a")
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            await stager.ensure("acme/none")
    value = stager.node.metrics.registry.get_sample_value
    assert value("lora_extproc_ensures_total", {"result": "staged"}) == 1
    assert value("lora_extproc_ensures_total", {"result": "hit"}) == 1
    assert value("lora_extproc_ensures_total", {"result": "model_not_found"}) == 2
    assert value("lora_extproc_negative_hits_total") == 1
    assert value("lora_extproc_stages_total", {"origin": "fake", "result": "staged"}) == 1
    assert value("lora_extproc_fetched_bytes_total", {"origin": "fake", "result": "fetched"}) == sum(map(len, small_files().values()))
    assert value("lora_extproc_adapters") == 1
    assert value("lora_extproc_disk_bytes", {"kind": "used"}) == SIZE
    assert value("lora_extproc_flights") == 0


# -- beside an engine


@pytest.fixture
async def engine(node: Path) -> AsyncIterator[RunningEngine]:
    async with running_engine(node, max_loras=1, max_cpu_loras=1) as engine:
        yield engine


@pytest.fixture
async def beside(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock) -> Stager:
    """A stager with acme/a, acme/b and acme/c on disk and no lease, room for three, beside an engine that knows none of them."""
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=3 * SIZE)
    await three(origin, clock, stager)
    origin.add("acme/d", small_files(seed=3))
    clock.now += 1000
    return stager


async def test_an_idle_adapter_is_unloaded_before_its_files_go(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """While the engine is asked, the link is still there; after that, the engine neither knows nor dies."""
    await engine.ask("acme/a")
    there: list[tuple[str, bool]] = []

    async def look(path: str) -> None:
        there.append((path, (node / "acme/a").is_symlink()))

    engine.step = look
    assert await beside.evict("acme/a") == SIZE
    unloaded = there.index(("/v1/unload_lora_adapter", True))
    assert ("/v1/models", True) in there[unloaded:]
    assert there[-1][1] is False
    assert "acme/a" not in engine.adapters.registry
    await engine.ask("acme/b")
    assert engine.deaths == 0


async def test_an_adapter_that_runs_stays(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """Not even unloaded: it could not be loaded again if its files went."""
    await engine.ask("acme/a")
    async with engine.adapters.use("acme/a"):
        with pytest.raises(AdapterInUse, match="engine"):
            await beside.evict("acme/a")
        assert "acme/a" in visible(node)
        assert "acme/a" in engine.adapters.registry
        assert not (await beside.ensure("acme/a")).staged


async def test_room_is_made_by_the_next_one_when_the_oldest_runs(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """A victim the engine will not let go is passed over."""
    await engine.ask("acme/a")
    async with engine.adapters.use("acme/a"):
        await beside.ensure("acme/d")
    assert set(visible(node)) == {"acme/a", "acme/c", "acme/d"}
    assert balanced(beside)


async def test_there_is_no_room_while_the_engine_cannot_be_asked(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """Nothing may be concluded, so nothing is deleted, and nothing is left reserved."""
    await engine.stop()
    with pytest.raises(AdapterInUse):
        await beside.evict("acme/a")
    with pytest.raises(NoSpace):
        await beside.ensure("acme/d")
    assert set(visible(node)) == {"acme/a", "acme/b", "acme/c"}
    assert len(stored(node)) == 3
    assert balanced(beside)
    assert beside.node.holdings.index.reserved_bytes == 0


@pytest.mark.parametrize("path", ["/metrics", "/v1/models", "/v1/unload_lora_adapter"])
@pytest.mark.parametrize("answer", [500, 200])
async def test_there_is_no_room_while_the_engine_answers_something_else(beside: Stager, engine: RunningEngine, node: Path, path: str, answer: int) -> None:
    """A dying engine says 500; something that is no vLLM says 200 to everything."""

    async def refuse(asked: str) -> web.Response | None:
        if asked != path:
            return None
        return (
            web.Response(status=answer) if answer == 500 else web.json_response({"detail": "hello"}, status=200 if path != "/v1/unload_lora_adapter" else 403)
        )

    await engine.ask("acme/a")
    engine.step = refuse
    with pytest.raises(AdapterInUse):
        await beside.evict("acme/a")
    assert "acme/a" in visible(node)


async def test_nonsense_from_the_engine_holds_nothing_for_ever(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """A list of models nobody thought of: the eviction fails, and the adapter is as present as before."""

    async def nonsense(asked: str) -> web.Response | None:
        return web.json_response({"data": ["acme/a"]}) if asked == "/v1/models" else None

    engine.step = nonsense
    await asyncio.gather(beside.evict("acme/a"), return_exceptions=True)
    engine.step = None
    assert not (await beside.ensure("acme/a")).staged
    assert "acme/a" in visible(node)


async def test_an_engine_that_may_not_unload_keeps_what_it_knows(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """Without runtime updating the path is 404, like an unknown adapter: the list of models tells the difference."""

    async def no_such_path(asked: str) -> web.Response | None:
        return web.json_response({"detail": "Not Found"}, status=404) if asked == "/v1/unload_lora_adapter" else None

    await engine.ask("acme/a")
    engine.step = no_such_path
    with pytest.raises(AdapterInUse):
        await beside.evict("acme/a")
    assert await beside.evict("acme/b") == SIZE
    assert set(visible(node)) == {"acme/a", "acme/c"}


async def test_a_request_between_the_looks_keeps_the_adapter(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """Order of events: unloaded; a request of the name comes in and registers it again; the look sees it."""

    async def slip_in(asked: str) -> None:
        if asked == "/v1/models" and "/v1/unload_lora_adapter" in engine.calls:
            engine.step = None
            await engine.ask("acme/a")

    await engine.ask("acme/a")
    engine.calls.clear()
    engine.step = slip_in
    with pytest.raises(AdapterInUse):
        await beside.evict("acme/a")
    await engine.ask("acme/b")
    assert await engine.ask("acme/a") == sha256(small_files(seed=0)[WEIGHTS])
    assert "acme/a" in visible(node)


def _registers_again(engine: RunningEngine, node: Path) -> None:
    """A request of acme/a that resolved the link just before it was taken away."""

    async def slip_in(asked: str) -> None:
        if asked in ("/v1/models", "/metrics") and not (node / "acme/a").is_symlink():
            engine.step = None
            engine.adapters.registry["acme/a"] = str(node / "acme" / "a")

    engine.step = slip_in


async def test_a_request_just_before_the_link_goes_brings_it_back(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """The look after it sees the registration; the link is restored before anybody reads it."""
    _registers_again(engine, node)
    with pytest.raises(AdapterInUse):
        await beside.evict("acme/a")
    assert await engine.ask("acme/a") == sha256(small_files(seed=0)[WEIGHTS])
    assert not (await beside.ensure("acme/a")).staged


@pytest.mark.parametrize("path", ["/v1/models", "/metrics"])
async def test_an_engine_that_falls_silent_after_the_link_is_gone_brings_it_back(beside: Stager, engine: RunningEngine, node: Path, path: str) -> None:
    """The adapter stays, so its name must lead to it again: what ensure calls present, the engine must find."""

    async def fall_silent(asked: str) -> web.Response | None:
        return web.Response(status=500) if asked == path and not (node / "acme/a").is_symlink() else None

    engine.step = fall_silent
    try:
        await beside.evict("acme/a")
    except AdapterInUse:
        assert "acme/a" in visible(node)
    engine.step = None
    await beside.ensure("acme/a")
    assert await engine.ask("acme/a") == sha256(small_files(seed=0)[WEIGHTS])


async def test_an_adapter_the_engine_has_under_another_name_stays(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """`--lora-modules x=/dir/acme/a` or a load by hand: /v1/models tells the directory. Deleting it kills the engine at the next use."""
    await engine.adapters.load("by-hand", str(node / "acme" / "a"), in_place=False)
    with pytest.raises(AdapterInUse):
        await beside.evict("acme/a")
    await engine.ask("acme/b")
    assert await engine.ask("by-hand") == sha256(small_files(seed=0)[WEIGHTS])


@pytest.mark.parametrize("name", ["acme/a,b", 'acme/a"b', "a=b"])
async def test_a_running_adapter_with_an_odd_name_stays(
    open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock, node: Path, name: str
) -> None:
    """The metric's label joins names with commas, and quotes are escaped in it."""
    origin.add(name, small_files())
    stager = await open_stager(origin, engine_url=engine.url)
    await stager.ensure(name)
    clock.now += 1000
    await engine.ask(name)
    async with engine.adapters.use(name):
        with pytest.raises(AdapterInUse):
            await stager.evict(name)
        assert name in visible(node)


async def test_an_adapter_that_waits_for_a_slot_stays(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """Order of events: acme/b holds the only slot; a request of acme/a waits for it, which no label shows; acme/a is evicted; acme/c is loaded
    and takes its place in memory; the slot comes free; the request reads acme/a from disk.
    """
    await engine.ask("acme/b")
    async with engine.adapters.use("acme/b"):
        waiting = asyncio.create_task(engine.ask("acme/a"))
        await until(lambda: "acme/a" in engine.adapters.registry)
        await turns()
        try:
            await beside.evict("acme/a")
        except AdapterInUse:
            assert "acme/a" in visible(node)
        await engine.adapters.resolve("acme/c")
    assert await waiting == sha256(small_files(seed=0)[WEIGHTS])


async def test_what_is_being_removed_is_kept_or_fetched_for_who_asks(beside: Stager, engine: RunningEngine, origin: FakeOrigin, node: Path) -> None:
    """Order of events: acme/a is chosen for room, the engine is asked; a request of acme/a comes; it waits for the end and fetches anew."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold(path: str) -> None:
        asked.set()
        await go_on.wait()

    engine.step = hold
    evicting = asyncio.create_task(beside.evict("acme/a"))
    await asked.wait()
    wanting = asyncio.create_task(beside.ensure("acme/a"))
    await turns()
    assert not wanting.done()
    go_on.set()
    assert await evicting == SIZE
    assert (await wanting).staged
    assert set(visible(node)) == {"acme/a", "acme/b", "acme/c"}
    assert origin.resolved["acme/a"] == 2


async def test_a_removal_outlives_who_asked_for_it(beside: Stager, engine: RunningEngine, node: Path) -> None:
    """Cut short between the unload and the deletion, it would leave a name the engine was told to forget."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold(path: str) -> None:
        asked.set()
        await go_on.wait()

    engine.step = hold
    evicting = asyncio.create_task(beside.evict("acme/a"))
    await asked.wait()
    evicting.cancel()
    await asyncio.wait({evicting})
    go_on.set()
    await until(lambda: "acme/a" not in set(beside.node.holdings))
    await until(lambda: len(stored(node)) == 2)
    assert balanced(beside)


async def test_room_that_is_still_being_made_is_not_used(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin, clock: Clock, node: Path) -> None:
    """A large one leaves for a small one, and there would be room for a second small one: it waits, too, and if the engine keeps the large one,
    both are told so. Otherwise the disk holds more than its limit.
    """
    origin.add("acme/large", small_files(rank=8, modules=("q_proj", "k_proj", "v_proj", "o_proj")))
    for seed, name in enumerate(("acme/x", "acme/y")):
        origin.add(name, small_files(seed=seed))
    assert SIZE < size_of(origin.files["acme/large"]) <= 2 * SIZE
    stager = await open_stager(origin, engine_url=engine.url, max_bytes=2 * SIZE)
    await stager.ensure("acme/large")
    clock.now += 1000
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold(path: str) -> web.Response:
        asked.set()
        await go_on.wait()
        return web.Response(status=500)

    engine.step = hold
    first = asyncio.create_task(stager.ensure("acme/x"))
    await asked.wait()
    second = asyncio.create_task(stager.ensure("acme/y"))
    await until(lambda: (job := stager.job("acme/y")) is not None and job.phase == "reserve")
    await turns(200)
    assert all((job := stager.job(name)) is not None and job.phase == "reserve" for name in ("acme/x", "acme/y"))
    go_on.set()
    for flight in (first, second):
        with pytest.raises(NoSpace):
            await flight
    assert set(visible(node)) == {"acme/large"}
    assert balanced(stager)


async def test_the_node_is_ready_when_its_engine_is(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """It is asked before the stager says anything of itself: a router that heard "not asked yet" would take the node out."""
    stager = await open_stager(origin, engine_url=engine.url)
    assert stager.not_ready is None


async def test_the_node_is_not_ready_without_its_engine(open_stager: OpenStager, engine: RunningEngine, origin: FakeOrigin) -> None:
    """It is still asked; adapters are still staged."""
    await engine.stop()
    origin.add("acme/a", small_files())
    stager = await open_stager(origin, engine_url=engine.url)
    await until(lambda: stager.not_ready == "the engine refused the connection")
    assert (await stager.ensure("acme/a")).staged


async def test_without_an_engine_the_node_is_ready(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Nobody reads the directory but who comes later."""
    assert (await open_stager(origin)).not_ready is None


def _experts_in_one_tensor() -> Files:
    """What PEFT writes for `target_parameters`: rank 4 x 2 experts."""
    shapes = {f"base_model.model.model.layers.0.mlp.experts{half}.lora_{side}.weight": side for half in ("", ".base_layer") for side in "AB"}
    header: dict[str, object] = {}
    for number, (name, side) in enumerate(shapes.items()):
        header[name] = {"dtype": "F16", "shape": [8, 4] if side == "A" else [4, 8], "data_offsets": [64 * number, 64 * number + 64]}
    files = small_files()
    _change_config(files, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    return {**files, WEIGHTS: safetensors(header, bytes(256))}


async def test_what_the_engines_load_call_needs_is_kept_with_the_adapter(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Experts in one tensor are loaded with an option, also after a restart; others without."""
    origin.add("acme/moe", _experts_in_one_tensor())
    origin.add("acme/dense", small_files())
    stager = await open_stager(origin)
    ids = [(await stager.ensure(name)).digest for name in ("acme/moe", "acme/dense")]
    assert [stager.node.store.load_options(ArtifactId(id_)) for id_ in ids] == [{"is_3d_lora_weight": True}, {}]


async def test_the_layout_of_what_others_put_here_is_read_when_it_is_loaded(open_stager: OpenStager, node: Path) -> None:
    """There is no manifest of ours beside it."""
    directory = node / "team" / "moe"
    directory.mkdir(parents=True)
    for path, data in _experts_in_one_tensor().items():
        (directory / path).write_bytes(data)
    stager = await open_stager()
    assert stager.node.store.load_options(adopted_id("0" * 64, adapter_name("team/moe"))) == {"is_3d_lora_weight": True}
