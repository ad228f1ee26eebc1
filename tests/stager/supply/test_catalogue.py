"""What a node's origins could give, listed when a router asks."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from extproc.config.origins import OriginSettings
from extproc.config.stager import StagerSettings
from extproc.errors import OriginFailed, OriginRefused
from extproc.stager.supply import catalogue as catalogue_module
from extproc.stager.supply.catalogue import Catalogue, Listed
from extproc.stager.supply.origins import names as names_module
from extproc.stager.supply.source import Source
from tests.fakes.origin import FakeOrigin, ListableOrigin
from tests.fakes.wait import Clock, VirtualLoop, until

OpenCatalogue = Callable[..., Catalogue]


@pytest.fixture
async def open_catalogue(clock: Clock) -> AsyncIterator[OpenCatalogue]:
    opened: list[Catalogue] = []

    def open_(*origins: FakeOrigin, **settings: float) -> Catalogue:
        chosen = StagerSettings.model_validate({"list_s": 60.0, **settings})
        opened.append(Catalogue([Source(origin, clock=clock) for origin in origins], chosen, clock))
        return opened[-1]

    yield open_
    for catalogue in opened:
        await catalogue.close()


@pytest.mark.parametrize("count", [0, 1, 1001, 100_000])
async def test_all_names_are_listed_in_order(open_catalogue: OpenCatalogue, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order in which the origin tells them; a page begins after any name."""
    asyncio.get_running_loop().set_debug(False)
    monkeypatch.setattr(catalogue_module, "WAIT_S", 60.0)
    names = [f"acme/{number:06}" for number in range(count)]
    listed = await open_catalogue(ListableOrigin(names=names[::-1])).current()
    assert list(listed.names) == names
    assert listed.version
    assert list(listed.after("", 2)) == names[:2]
    assert list(listed.after("acme/000000", 1000)) == names[1:1001]
    assert list(listed.after("b", 10)) == []


async def test_names_of_several_origins_are_one_list(open_catalogue: OpenCatalogue) -> None:
    """Each once, and with one version for the same names, whichever node or origin they are of."""
    both = await open_catalogue(ListableOrigin("one", ["a", "c"]), FakeOrigin("hub"), ListableOrigin("two", ["b", "c"])).current()
    assert list(both.names) == ["a", "b", "c"]
    alone, other = ListableOrigin(names=["c", "b", "a"]), ListableOrigin(names=["a", "b"])
    assert (await open_catalogue(alone).current()).version == both.version != (await open_catalogue(other).current()).version


async def test_the_whole_list_is_bounded(open_catalogue: OpenCatalogue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """That of one origin, which is told once, and that of all."""
    for module in (names_module, catalogue_module):
        monkeypatch.setattr(module, "MAX_NAMES", 3)
    catalogue = open_catalogue(ListableOrigin("one", ["a", "b", "c", "d"]), ListableOrigin("two", ["e"]), list_s=1e-9)
    for _ in range(3):
        assert list((await catalogue.current()).names) == ["a", "b", "c"]
    assert [record.getMessage() for record in caplog.records] == ["the one origin has over 3 adapters or 2000000 files; the rest is served, but not listed"]


async def test_origins_are_listed_no_more_often_than_the_setting_says(open_catalogue: OpenCatalogue, clock: Clock) -> None:
    """However many ask, and never by itself."""
    origin = ListableOrigin(names=["a"])
    catalogue = open_catalogue(origin)
    await asyncio.gather(*(catalogue.current() for _ in range(9)))
    origin.names.append("b")
    clock.now += 47.0
    assert (list((await catalogue.current()).names), origin.listings) == (["a"], 1)
    clock.now += 26.0
    assert (list((await catalogue.current()).names), origin.listings) == (["a", "b"], 2)


async def test_listings_can_be_switched_off(open_catalogue: OpenCatalogue, clock: Clock) -> None:
    """All of them, or those of one origin; what is known then is that there are no names."""
    origin = ListableOrigin(names=["a"])
    off = await open_catalogue(origin, list_s=0.0).current()
    private = OriginSettings(type="file", path="/private", listed=False)
    catalogue = Catalogue([Source(origin, private, clock)], StagerSettings(), clock)
    assert off == await catalogue.current() == await open_catalogue(FakeOrigin("hub")).current() == catalogue_module._merged([])
    assert (off.names, origin.listings) == ([], 0)
    await catalogue.close()


async def test_an_origin_that_fails_keeps_its_names(open_catalogue: OpenCatalogue, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """It says so once, is tried again sooner, and says when it can be listed again. The others' names are new."""
    caplog.set_level(logging.INFO, "extproc.stager.supply.catalogue")
    fails, works = ListableOrigin("fails", ["a"]), ListableOrigin("works", ["b"])
    catalogue = open_catalogue(fails, works)
    await catalogue.current()
    fails.failure = OriginRefused("fails origin: AccessDenied")
    works.names.append("c")
    clock.now += 100.0
    for _ in range(3):
        assert list((await catalogue.current()).names) == ["a", "b", "c"]
        clock.now += catalogue_module.RETRY_S * 1.2
    fails.failure, fails.names = None, ["d"]
    assert list((await catalogue.current()).names) == ["b", "c", "d"]
    assert [record.getMessage() for record in caplog.records] == [
        "the fails origin cannot be listed, its last names stay listed: fails origin: AccessDenied",
        "the fails origin can be listed again",
    ]


async def test_an_origin_that_was_never_listed_gives_no_version(open_catalogue: OpenCatalogue) -> None:
    """A router that knows the names from before this node's restart keeps them."""
    origin = ListableOrigin(names=["a"])
    origin.failure = OriginFailed("down")
    assert await open_catalogue(origin).current() == Listed()


async def test_an_error_of_ours_ends_no_listings(open_catalogue: OpenCatalogue, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next listing comes."""
    origin = ListableOrigin(names=["a"])
    origin.failure = ZeroDivisionError()
    catalogue = open_catalogue(origin)
    assert (await catalogue.current()).names == ()
    assert "ZeroDivisionError" in caplog.text
    origin.failure = None
    clock.now += 100.0
    assert list((await catalogue.current()).names) == ["a"]


async def test_an_origin_that_is_left_alone_is_not_listed(clock: Clock) -> None:
    """And no listing says whether it is up: fetches alone do."""
    origin = ListableOrigin(names=["a"])
    origin.failure = OriginFailed("no", reached=False)
    source = Source(origin, clock=clock)
    catalogue = Catalogue([source], StagerSettings(list_s=1e-9), clock)
    for _ in range(20):
        await catalogue.current()
    assert source.breaker.state == "closed"
    origin.failure = None
    source.breaker.open_for(clock(), 60.0)
    listings = origin.listings
    await catalogue.current()
    assert origin.listings == listings
    await catalogue.close()


def test_who_asks_waits_for_a_slow_listing_for_a_moment() -> None:
    """And is told what was listed last, or of the other origins; the listing goes on, and one that never ends is not begun again beside itself."""

    async def main() -> None:
        slow, quick = ListableOrigin("slow", ["a"]), ListableOrigin("quick", ["b"])
        loop = asyncio.get_running_loop()
        catalogue = Catalogue([Source(slow), Source(quick)], StagerSettings(list_s=1.0), loop.time)
        slow.gate.clear()
        began = loop.time()
        asking = asyncio.create_task(catalogue.current())
        await until(lambda: catalogue.listed.names)  # a thread merges them, for which virtual time does not wait
        assert list((await asking).names) == ["b"]
        assert loop.time() - began <= catalogue_module.WAIT_S
        await asyncio.sleep(2 * catalogue_module.LONGEST_S)
        for _ in range(3):
            await catalogue.current()
            await asyncio.sleep(20.0)
        assert slow.listings == 1
        slow.gate.set()
        while list((await catalogue.current()).names) != ["a", "b"]:
            await asyncio.sleep(20.0)
        assert slow.listings > 1
        await catalogue.close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_closing_ends_a_listing(open_catalogue: OpenCatalogue) -> None:
    """Nobody waits for an origin that hangs."""
    origin = ListableOrigin()
    origin.gate.clear()
    catalogue = open_catalogue(origin)
    asking = asyncio.create_task(catalogue.current())
    await until(lambda: origin.listings)
    await catalogue.close()
    assert await asking == Listed()
