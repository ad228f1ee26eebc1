"""Discovery: whole fleets of what all sources show, one at a time, and a start that nothing holds up."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from extproc.config.discovery import DiscoverySettings
from extproc.core.fleet import Fleet
from extproc.discovery import discovery as discovery_module
from extproc.discovery.discovery import Discovery
from extproc.discovery.entries import row
from extproc.discovery.kept import FILE, load
from extproc.discovery.source import Source
from extproc.metrics import RouterMetrics
from tests.fakes.gate import Gate
from tests.fakes.wait import turns

from .scripted import ScriptedSource, Taken, found

QUICK: dict[str, Any] = {"debounce_s": 0, "debounce_max_s": 0, "first_wait_s": 5}


@asynccontextmanager
async def following(sources: Mapping[str, Sequence[Source]], **settings: Any) -> AsyncGenerator[tuple[Taken, Discovery, RouterMetrics, Fleet], None]:
    metrics = RouterMetrics()
    discovery = Discovery(sources, DiscoverySettings(**{**QUICK, **settings}), metrics.discovery)
    taken = Taken()
    try:
        first = await discovery.first()
        discovery.follow(taken.apply)
        yield taken, discovery, metrics, first
    finally:
        await discovery.stop()


def listed(fleet: Fleet) -> dict[str, list[str]]:
    return {pool: [one.endpoint.address for one in several] for pool, several in fleet.items()}


def value(metrics: RouterMetrics, name: str, source: str = "scripted") -> float | None:
    return metrics.registry.get_sample_value(f"lora_extproc_discovery_{name}", {"pool": "p", "source": source})


async def test_the_first_fleet_has_what_every_source_shows() -> None:
    """It waits for all of them."""
    one, two = ScriptedSource("one"), ScriptedSource("two")
    one.show("10.0.0.1:8000")
    asyncio.get_running_loop().call_later(0.05, two.show, "10.0.0.2:8000")
    async with following({"p": [one, two], "q": []}) as (_, _, _, first):
        assert listed(first) == {"p": ["10.0.0.1:8000", "10.0.0.2:8000"], "q": []}


async def test_a_source_that_says_nothing_holds_a_start_no_longer_than_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    """The others' endpoints are served, and its own when it answers."""
    one, slow = ScriptedSource("one"), ScriptedSource("slow")
    one.show("10.0.0.1:8000")
    async with following({"p": [one, slow]}, first_wait_s=0.05) as (taken, _, _, first):
        assert listed(first) == {"p": ["10.0.0.1:8000"]}
        assert "pool p: slow has not answered yet" in caplog.text
        slow.show("10.0.0.2:8000")
        await taken.until("10.0.0.1:8000", "10.0.0.2:8000")


async def test_a_source_that_fails_at_the_start_is_an_answer() -> None:
    """A router does not wait for what is down."""
    source = ScriptedSource()
    source.fail("no route")
    async with following({"p": [source]}, first_wait_s=60) as (_, _, metrics, first):
        assert listed(first) == {"p": []}
        assert value(metrics, "stale") == 1


async def test_a_fleet_like_the_last_one_is_not_handed_on() -> None:
    """Another order, or the same set again, changes nothing."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000", "10.0.0.2:8000")
    async with following({"p": [source]}) as (taken, _, _, _):
        source.show("10.0.0.2:8000", "10.0.0.1:8000")
        source.show("10.0.0.1:8000", "10.0.0.2:8000")
        source.show("10.0.0.3:8000")
        await taken.until("10.0.0.3:8000")
        assert len(taken.fleets) == 1


async def test_a_replaced_instance_and_another_stager_are_news() -> None:
    """Though the address is the same."""
    source = ScriptedSource()
    source.show(found("10.0.0.1:8000", "n", "a:1", "uid-1"))
    async with following({"p": [source]}) as (taken, _, _, first):
        source.show(found("10.0.0.1:8000", "n", "a:1", "uid-2"))
        replaced = (await taken.until("10.0.0.1:8000"))["p"][0]
        assert replaced.endpoint != first["p"][0].endpoint
        taken.fleets.clear()
        source.show(found("10.0.0.1:8000", "n", "b:1", "uid-2"))
        moved = (await taken.until("10.0.0.1:8000"))["p"][0]
        assert (moved.endpoint == replaced.endpoint, row(moved)) == (True, ("10.0.0.1:8000", "n", "b:1", "uid-2", "", False))


async def test_changes_that_follow_each_other_are_one_fleet() -> None:
    """A rollout is not one table per pod."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, debounce_s=0.2, debounce_max_s=10) as (taken, _, _, _):
        for last in range(2, 30):
            source.show(f"10.0.0.{last}:8000")
            await asyncio.sleep(0)
        await taken.until("10.0.0.29:8000")
        assert len(taken.fleets) == 1


async def test_changes_without_end_are_handed_on_all_the_same() -> None:
    """The debounce has an upper bound."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000")

    async def rush() -> None:
        number = 0
        while True:
            number += 1
            source.show(f"10.0.{number // 250}.{number % 250 + 1}:8000")
            await asyncio.sleep(0.01)

    async with following({"p": [source]}, debounce_s=0.1, debounce_max_s=0.3) as (taken, _, _, _):
        rushing = asyncio.create_task(rush())
        async with asyncio.timeout(10):
            while len(taken.fleets) < 2:
                await asyncio.sleep(0.01)
        rushing.cancel()


async def test_fleets_are_taken_over_one_at_a_time_and_only_the_newest() -> None:
    """What changed meanwhile is one fleet, not a queue of them."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    running, most, taken = 0, 0, []
    go, began, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def apply(fleet: Fleet) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        began.set()
        await go.wait()
        taken.append(listed(fleet)["p"])
        running -= 1
        if taken[-1] == ["10.0.0.9:8000"]:
            done.set()

    discovery = Discovery({"p": [source]}, DiscoverySettings(**QUICK), RouterMetrics().discovery)
    await discovery.first()
    discovery.follow(apply)
    source.show("10.0.0.2:8000")
    await began.wait()
    for last in range(3, 10):
        source.show(f"10.0.0.{last}:8000")
    await asyncio.sleep(0.01)
    go.set()
    async with asyncio.timeout(10):
        await done.wait()
    await discovery.stop()
    assert most == 1
    assert taken == [["10.0.0.2:8000"], ["10.0.0.9:8000"]]


async def test_a_fleet_that_cannot_be_taken_over_is_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The newest, though nothing has changed since."""
    monkeypatch.setattr("extproc.discovery.discovery.AGAIN_S", 0.01)
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    discovery = Discovery({"p": [source]}, DiscoverySettings(**QUICK), RouterMetrics().discovery)
    taken = Taken()
    calls = 0

    async def apply(fleet: Fleet) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("not today")
        await taken.apply(fleet)

    await discovery.first()
    discovery.follow(apply)
    source.show("10.0.0.2:8000")
    await taken.until("10.0.0.2:8000")
    await discovery.stop()
    assert "a fleet could not be taken over" in caplog.text


async def test_an_error_in_a_source_takes_nothing_from_the_others(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is followed anew, and its last good set counts meanwhile."""
    monkeypatch.setattr("extproc.discovery.discovery.AGAIN_S", 0.01)
    broken, other = ScriptedSource("broken"), ScriptedSource("other")
    broken.show("10.0.0.1:8000")
    other.show("10.0.0.2:8000")
    async with following({"p": [broken, other]}) as (taken, _, _, _):
        broken.meet(RuntimeError("a bug"))
        other.show("10.0.0.3:8000")
        await taken.until("10.0.0.1:8000", "10.0.0.3:8000")
        broken.show("10.0.0.4:8000")
        await taken.until("10.0.0.3:8000", "10.0.0.4:8000")
    assert "pool p: broken met an error of this program's own" in caplog.text


# ---- what is kept


async def test_the_last_good_set_counts_while_a_source_fails(caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, and shows it in the metrics."""
    caplog.set_level(logging.INFO)
    source, other = ScriptedSource(), ScriptedSource("other")
    source.show("10.0.0.1:8000")
    other.show("10.0.0.2:8000")
    async with following({"p": [source, other]}, keep_failed_s=600) as (taken, _, metrics, _):
        assert (value(metrics, "stale"), value(metrics, "endpoints"), value(metrics, "failures_total")) == (0, 1, 0)
        for _ in range(3):
            source.fail("no route to it")
        other.show("10.0.0.3:8000")
        await taken.until("10.0.0.1:8000", "10.0.0.3:8000")
        assert caplog.text.count("pool p: scripted fails: no route to it; its last 1 endpoints count for at most 600 s") == 1
        assert (value(metrics, "stale"), value(metrics, "endpoints"), value(metrics, "failures_total")) == (1, 1, 1)
        source.show("10.0.0.4:8000")
        await taken.until("10.0.0.3:8000", "10.0.0.4:8000")
        assert value(metrics, "stale") == 0
    assert "pool p: scripted is current again, with 1 endpoints" in caplog.text


async def test_what_is_kept_ends_after_its_time(caplog: pytest.LogCaptureFixture) -> None:
    """Though the source says nothing more."""
    failing, emptied = ScriptedSource("failing"), ScriptedSource("emptied")
    failing.show("10.0.0.1:8000")
    emptied.show("10.0.0.2:8000")
    async with following({"p": [failing, emptied]}, keep_failed_s=0.2, keep_empty_s=0.1) as (taken, _, _, _):
        failing.fail("away")
        emptied.show(note="the name does not exist (NXDOMAIN)")
        await taken.until("10.0.0.1:8000")
        await taken.until()
    assert "pool p: emptied shows no endpoints: the name does not exist (NXDOMAIN); its last 1 endpoints count for at most 0.1 s" in caplog.text
    assert "pool p: emptied has no endpoints" in caplog.text
    assert "pool p: failing fails, for over 0.2 s now; its endpoints count no more" in caplog.text


async def test_what_the_settings_say_is_believed_at_once() -> None:
    """Nobody takes endpoints out of the settings by mistake."""
    source = ScriptedSource(is_final=True)
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, keep_empty_s=600) as (taken, _, _, _):
        source.show()
        await taken.until()


async def test_what_is_left_out_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """With the pool and the source, and not with every set that has it."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}) as (taken, _, metrics, _):
        for last in (2, 3):
            source.show(f"10.0.0.{last}:8000", left_out=("entry 7 has no address",))
        await taken.until("10.0.0.3:8000")
        assert caplog.text.count("pool p: scripted: entry 7 has no address") == 1
        assert value(metrics, "left_out") == 1
        source.show("10.0.0.4:8000")
        await taken.until("10.0.0.4:8000")
        assert value(metrics, "left_out") == 0


async def test_an_endpoint_in_two_pools_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not with every change of something else."""
    one, two = ScriptedSource("one"), ScriptedSource("two")
    one.show("10.0.0.1:8000")
    two.show("10.0.0.1:8000")
    async with following({"p": [one], "q": [two]}) as (taken, _, _, first):
        assert listed(first) == {"p": ["10.0.0.1:8000"], "q": []}
        one.show("10.0.0.1:8000", "10.0.0.2:8000")
        await taken.until("10.0.0.1:8000", "10.0.0.2:8000")
    assert caplog.text.count("pool q: two: 10.0.0.1:8000 is left out: it is in pool p") == 1


# ---- on disk


async def test_a_start_uses_what_is_on_disk_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A router that starts while a source is down has the fleet that it had, with all that was said of each endpoint."""
    before = found("10.0.0.1:8000", "one", "10.0.0.1:9102", "uid-1")
    source = ScriptedSource()
    source.show(before)
    async with following({"p": [source]}, dir=str(tmp_path)):
        pass
    silent = ScriptedSource()
    async with following({"p": [silent]}, dir=str(tmp_path), first_wait_s=60) as (taken, _, metrics, first):
        assert [row(one) for one in first["p"]] == [row(before)]
        assert value(metrics, "stale") == 1
        silent.show("10.0.0.2:8000")
        await taken.until("10.0.0.2:8000")


async def test_a_change_is_on_disk_soon_after(tmp_path: Path) -> None:
    """Not only when the router stops in order."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, dir=str(tmp_path)):
        async with asyncio.timeout(10):
            while not (tmp_path / FILE).exists():
                await asyncio.sleep(0.01)
        assert [one.endpoint.address for one in load(tmp_path)[0].endpoints] == ["10.0.0.1:8000"]


async def test_a_stop_waits_for_the_write_that_is_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of a change is in its thread; the router stops; the last write must not meet the first in one file."""
    gate = Gate(monkeypatch, discovery_module, "save")
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    discovery = Discovery({"p": [source]}, DiscoverySettings(**QUICK, dir=str(tmp_path)), RouterMetrics().discovery)
    await discovery.first()
    discovery.follow(Taken().apply)
    await gate.reached()
    source.show("10.0.0.2:8000")
    await turns()
    stopping = asyncio.create_task(discovery.stop())
    await asyncio.sleep(0.1)
    assert not (tmp_path / FILE).exists()
    gate.open()
    await stopping
    assert [one.endpoint.address for one in load(tmp_path)[0].endpoints] == ["10.0.0.2:8000"]


async def test_a_set_on_disk_that_is_too_old_does_not_count(tmp_path: Path) -> None:
    """A restart does not give a failing source its time anew."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, dir=str(tmp_path)):
        pass
    failing = ScriptedSource()
    failing.fail("away")
    async with following({"p": [failing]}, dir=str(tmp_path), keep_failed_s=0) as (_, _, _, first):
        assert listed(first) == {"p": []}


async def test_the_time_of_a_set_on_disk_goes_on_while_its_source_fails(tmp_path: Path) -> None:
    """It says when the set was good last, not when it was written."""
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, dir=str(tmp_path)):
        pass
    good_at = load(tmp_path)[0].at
    failing = ScriptedSource()
    failing.fail("away")
    async with following({"p": [failing]}, dir=str(tmp_path)):
        pass
    assert load(tmp_path)[0].at == good_at


async def test_what_the_settings_say_is_not_kept_on_disk(tmp_path: Path) -> None:
    """A start has the settings; an endpoint that was taken out of them must not come back."""
    source = ScriptedSource("static", is_final=True)
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, dir=str(tmp_path)):
        pass
    assert load(tmp_path) == ()


async def test_a_damaged_file_is_told_of_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And replaced by a good one."""
    (tmp_path / FILE).write_text('{"version": 1, "sets": [')
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, dir=str(tmp_path)) as (_, _, _, first):
        assert listed(first) == {"p": ["10.0.0.1:8000"]}
    assert f"the endpoints kept in {tmp_path} cannot be used" in caplog.text
    assert len(load(tmp_path)) == 1


async def test_a_directory_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is told of."""
    (tmp_path / "file").write_text("")
    source = ScriptedSource()
    source.show("10.0.0.1:8000")
    async with following({"p": [source]}, dir=str(tmp_path / "file" / "dir")) as (taken, _, _, _):
        source.show("10.0.0.2:8000")
        await taken.until("10.0.0.2:8000")
    assert "discovery.dir: " in caplog.text
