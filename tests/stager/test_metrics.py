"""What the metrics and the log say of a node's life: each thing that happened counted once, under its own words."""

import asyncio
import logging
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from extproc.core.artifact import AdapterName
from extproc.errors import AdapterInUse, InvalidAdapter, LoraExtprocError, ModelNotFound, NoSpace, OriginFailed
from extproc.stager.stager import Stager
from extproc.stager.supply.listing import Listing
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS, Files, sha256, size_of, small_files
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

from .conftest import OpenStager

SIZE = size_of(small_files())
Samples = dict[tuple[str, ...], float]


class MovingOrigin(FakeOrigin):
    """One whose revisions follow the content."""

    async def resolve(self, name: AdapterName) -> Listing | None:
        listing = await super().resolve(name)
        return listing and Listing(name, sha256(b"".join(self.files[name].values()))[:8], listing.files)


@pytest.fixture
def origin() -> FakeOrigin:
    return MovingOrigin()


def rendered(stager: Stager, name: str) -> Samples:
    """The samples of one metric as a collector reads them: label values, in the order of their names -> value; without those at zero."""
    found: Samples = {}
    for family in text_string_to_metric_families(stager.node.metrics.render().decode()):
        for sample in family.samples:
            if sample.name == f"lora_extproc_{name}" and sample.value:
                found[tuple(value for _, value in sorted(sample.labels.items()))] = sample.value
    return found


def length(files: Files) -> int:
    return sum(map(len, files.values()))


async def test_a_node_s_life_in_numbers(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Hit, staged, not found twice, refused; evicted for room, because asked, by purge; refreshed, and nothing new."""
    files = {name: small_files(seed=seed) for seed, name in enumerate("abcd")}
    for name, content in files.items():
        origin.add(name, content)
    origin.add("pickled", {CONFIG: files["a"][CONFIG], PICKLE: b"pickle"})
    stager = await open_stager(origin, max_bytes=3 * SIZE, high_watermark=1.0, negative_ttl_s=10.0, revalidate_s=0.0)
    for name in ("a", "a", "b", "c"):
        await stager.ensure(name)
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            await stager.ensure("nobody")
    with pytest.raises(InvalidAdapter):
        await stager.ensure("pickled")
    clock.now += 301  # leases end
    await stager.ensure("d")
    await stager.evict("b")
    await stager.pin("c")
    await stager.purge("c")
    assert not await stager.refresh("d")
    origin.add("d", small_files(seed=9))
    assert await stager.refresh("d")

    assert rendered(stager, "ensures_total") == {("hit",): 2, ("staged",): 4, ("model_not_found",): 2, ("invalid_adapter",): 1}
    assert rendered(stager, "negative_hits_total") == {(): 1}
    flights = {("fake", "staged"): 4, ("none", "model_not_found"): 1, ("fake", "invalid_adapter"): 1, ("none", "unchanged"): 1, ("fake", "refreshed"): 1}
    assert rendered(stager, "stages_total") == flights
    assert rendered(stager, "stage_total_seconds_count") == flights
    assert rendered(stager, "evictions_total") == {
        ("room", "removed"): 1,
        ("asked", "removed"): 1,
        ("purge", "removed"): 1,
        ("refreshed", "removed"): 1,
    }
    assert rendered(stager, "verify_failures_total") == {("pickle",): 1}
    assert rendered(stager, "fetched_bytes_total") == {("fake", "fetched"): sum(map(length, files.values())) + length(small_files(seed=9))}
    assert rendered(stager, "fetch_seconds_count") == {("fake", "fetched"): 10}
    # what was refused by its listing was resolved only; what had not changed, too; what nobody has, as well
    assert rendered(stager, "stage_seconds_count") == {
        ("resolve",): 8,
        ("check",): 5,
        ("reserve",): 5,
        ("fetch",): 5,
        ("verify",): 5,
        ("publish",): 5,
    }
    await until(lambda: rendered(stager, "disk_bytes") == {("limit",): 3 * SIZE, ("used",): SIZE})
    assert rendered(stager, "adapters") == {(): 1}
    assert rendered(stager, "pinned") == {}
    assert rendered(stager, "flights") == {}
    assert rendered(stager, "breaker") == {}


async def test_room_made_in_advance_is_counted_as_such(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Above the high watermark, down to the low one."""
    for seed in range(6):
        origin.add(f"acme/{seed}", small_files(seed=seed))
    stager = await open_stager(origin, max_bytes=10 * SIZE, high_watermark=0.5, low_watermark=0.3)
    for seed in range(6):
        await stager.ensure(f"acme/{seed}")
    clock.now += 301
    await until(lambda: rendered(stager, "evictions_total") == {("watermark", "removed"): 3})
    await until(lambda: rendered(stager, "disk_bytes") == {("limit",): 10 * SIZE, ("used",): 3 * SIZE})


async def test_what_had_to_stay_is_counted_too(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """An engine that cannot be asked lets nothing go."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin, engine_url="http://127.0.0.1:1")
    await stager.ensure("acme/a")
    clock.now += 301
    with pytest.raises(AdapterInUse):
        await stager.evict("acme/a")
    assert rendered(stager, "evictions_total") == {("asked", "kept"): 1}


async def test_damage_is_counted_where_it_is_found(open_stager: OpenStager, origin: FakeOrigin, node: Path) -> None:
    """On the way by what was wrong, on the disk as such."""
    files = small_files()
    origin.add("acme/a", files)
    origin.add("acme/wrong", small_files(seed=1))
    origin.state("acme/wrong", WEIGHTS, size=len(files[WEIGHTS]), sha256="0" * 64)
    stager = await open_stager(origin)
    with pytest.raises(InvalidAdapter):
        await stager.ensure("acme/wrong")
    await stager.ensure("acme/a")
    (node / "acme/a" / WEIGHTS).write_bytes(b"damaged")
    _ = [found async for found in stager.verify()]
    assert rendered(stager, "verify_failures_total") == {("digest",): 1, ("disk",): 1}
    assert rendered(stager, "evictions_total") == {("damaged", "removed"): 1}
    assert rendered(stager, "fetch_seconds_count") == {("fake", "fetched"): 3, ("fake", "failed"): 1}


async def test_a_breaker_shows_its_state(open_stager: OpenStager, origin: FakeOrigin, clock: Clock) -> None:
    """Open after failures in a row, closed when the origin answers again."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin)
    origin.down = OriginFailed("down", reached=False)
    for _ in range(2):
        with pytest.raises(OriginFailed):
            await stager.ensure("acme/a")
    await until(lambda: rendered(stager, "breaker") == {("fake",): 2})
    assert rendered(stager, "ensures_total") == {("origin_failed",): 2}
    origin.down = None
    clock.now += 60
    assert (await stager.ensure("acme/a")).staged
    await until(lambda: rendered(stager, "breaker") == {})


async def test_who_waits_and_what_flies_is_shown_while_it_lasts(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """Three callers of one flight, and the room that is set aside for it."""
    files = small_files()
    origin.add("acme/a", files)
    stall = origin.stall("acme/a", WEIGHTS)
    stager = await open_stager(origin)
    waiting = [asyncio.create_task(stager.ensure("acme/a")) for _ in range(3)]
    await stall.reached.wait()
    await until(lambda: rendered(stager, "waiters") == {(): 3})
    assert rendered(stager, "flights") == {(): 1}
    assert rendered(stager, "disk_bytes")[("reserved",)] == SIZE
    stall.release()
    await asyncio.gather(*waiting)
    assert rendered(stager, "flights") == {}
    assert rendered(stager, "stages_total") == {("fake", "staged"): 1}
    assert rendered(stager, "ensures_total") == {("staged",): 3}
    await until(lambda: rendered(stager, "waiters") == {} and ("reserved",) not in rendered(stager, "disk_bytes"))


async def test_labels_are_never_a_client_s(open_stager: OpenStager, origin: FakeOrigin) -> None:
    """A hundred names make no more series than one."""
    stager = await open_stager(origin, negative_ttl_s=0.0)
    with pytest.raises(ModelNotFound):
        await stager.ensure("acme/first")
    before = stager.node.metrics.render().count(b"\n")
    for number in range(100):
        with pytest.raises(ModelNotFound):
            await stager.ensure(f"acme/{number}", holder=f"holder {number}")
    assert stager.node.metrics.render().count(b"\n") == before


# -- the log


def lines(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    """What the log of the flights says of one adapter, at info and above."""
    return [record.getMessage() for record in caplog.records if record.name == "extproc.stager.work.flights" and record.getMessage().startswith(f"{name}: ")]


async def test_one_line_per_stage_has_the_time_of_each_phase(open_stager: OpenStager, origin: FakeOrigin, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever waited for it, however many; a hit is no line."""
    caplog.set_level(logging.INFO)
    files = small_files()
    origin.add("acme/a", files)
    stager = await open_stager(origin)
    await asyncio.gather(*(stager.ensure("acme/a") for _ in range(5)))
    await stager.ensure("acme/a")
    (line,) = lines(caplog, "acme/a")
    phases = ", ".join(rf"{phase} \d+" for phase in ("resolve", "check", "fetch", "reserve", "verify", "publish"))
    assert re.fullmatch(rf"acme/a: staged from fake in \d+ ms, {length(files)} bytes \({phases}\)", line)


async def test_one_line_per_refresh_and_none_where_nothing_is_new(open_stager: OpenStager, origin: FakeOrigin, caplog: pytest.LogCaptureFixture) -> None:
    """A comparison is a poll; a new version is a change."""
    origin.add("acme/a", small_files())
    stager = await open_stager(origin)
    await stager.ensure("acme/a")
    caplog.set_level(logging.INFO)
    await stager.refresh("acme/a")
    assert lines(caplog, "acme/a") == []
    origin.add("acme/a", small_files(seed=1))
    await stager.refresh("acme/a")
    (line,) = lines(caplog, "acme/a")
    assert line.startswith("acme/a: refreshed from fake in ")


@pytest.mark.parametrize("error", [ModelNotFound("no origin has acme/a"), OriginFailed("it is down"), NoSpace("it is full")])
async def test_one_line_per_failed_stage_names_the_reason(
    open_stager: OpenStager, origin: FakeOrigin, caplog: pytest.LogCaptureFixture, error: LoraExtprocError
) -> None:
    """In the word of the metrics' labels, and the sentence that callers get."""
    caplog.set_level(logging.INFO)
    origin.resolve_failures = [error] * 3
    stager = await open_stager(origin)
    with pytest.raises(type(error)):
        await stager.ensure("acme/a")
    assert lines(caplog, "acme/a") == [f"acme/a: {error.reason}: {error.message} (resolve 0)"]
    assert rendered(stager, "stages_total") == {("none", error.reason): 1}
