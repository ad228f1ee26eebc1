"""What the origins could give, in the list of models and as one model's card."""

import asyncio
import json
from typing import Any

import pytest

from extproc.client import Model, Models, Refused
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.errors import InvalidRequest, LoraExtprocError, OriginDown, OriginFailed, StagerUnavailable
from extproc.router import servable as servable_module
from extproc.router.servable import Servable
from tests.fakes.wait import Turns, VirtualLoop, turns, until

from .fakes import Router, ScriptedStager, get, serve


async def listed(router: Router) -> list[str]:
    return [card["id"] for card in json.loads(b"".join(await router.models.list()))["data"]]


async def asked(router: Router, name: str) -> tuple[int, dict[str, Any]]:
    """What `GET /v1/models/{name}` is answered."""
    answer = (await serve(router, [get(f"/v1/models/{name}")])).immediate()
    return answer.status.code, json.loads(answer.body)


# -- the list


async def test_what_an_origin_has_is_listed_with_what_nodes_have() -> None:
    """Once, in one order, with its parent; a node's directory is told of what it has, and only where the setting says so."""
    router = Router(2, shows_paths=True)
    for stager in router.stagers.values():
        stager.origins = ["acme/a", "acme/b", "acme/c"]
    router.stagers["10.0.0.2:9102"].listed = Models((), (Model("acme/b", "/node/b"), Model("acme/local", "/node/local")))
    cards = json.loads(b"".join(await router.models.list()))["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("base", "base", None),
        ("acme/a", "acme/a", "base"),
        ("acme/b", "/node/b", "base"),
        ("acme/c", "acme/c", "base"),
        ("acme/local", "/node/local", "base"),
    ]


async def test_only_what_nodes_have_is_listed_where_a_setting_says_so() -> None:
    """No stager is asked for more."""
    router = Router(1, models="staged")
    (stager,) = router.stagers.values()
    stager.origins = ["acme/a"]
    assert await listed(router) == ["base"]
    assert (await asked(router, "acme/a"))[0] == 404
    assert (stager.catalogues, stager.resolved) == ([], [])


async def test_one_stager_of_a_pool_is_asked() -> None:
    """The first in the settings' order that answers, so that an origin is listed by one node; one that failed is asked last for a while."""
    router = Router(3)
    one, two, three = router.stagers.values()
    two.origins = ["acme/a"]
    one.error = StagerUnavailable("gone")
    assert await listed(router) == ["base", "acme/a"]
    assert (len(one.catalogues), len(two.catalogues), three.catalogues) == (1, 1, [])
    router.now += 2.0
    await listed(router)
    assert (len(one.catalogues), len(two.catalogues)) == (1, 2)
    one.error = None
    router.now += servable_module.PASSED_OVER_S
    await listed(router)
    assert (len(one.catalogues), len(two.catalogues)) == (2, 2)


async def test_names_are_read_in_pages_and_not_again_while_they_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stager is asked at most once a second whether they are."""
    monkeypatch.setattr(servable_module, "PAGE", 2)
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.origins = ["a", "b", "c"]
    assert await listed(router) == ["base", "a", "b", "c"]
    version = router.models._servable._names["models"].version  # type: ignore[union-attr]
    assert stager.catalogues == [("", ""), ("", "b")]
    await listed(router)
    router.now += 2.0
    rendered = await router.models.list()
    assert stager.catalogues[2:] == [(version, "")]
    assert await router.models.list() is rendered
    stager.origins = ["b"]
    router.now += 2.0
    assert await listed(router) == ["base", "b"]


async def test_names_that_change_between_two_pages_are_read_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next list: half of one list and half of another are none."""
    monkeypatch.setattr(servable_module, "PAGE", 2)
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.origins = ["a", "b", "c"]
    answered, pages = stager._answer, 0

    async def changing() -> None:
        nonlocal pages
        pages += 1
        if len(stager.catalogues) == 2:
            stager.origins = ["x", "y", "z"]
        await answered()

    monkeypatch.setattr(stager, "_answer", changing)
    assert await listed(router) == ["base"]
    router.now += 2.0
    assert await listed(router) == ["base", "x", "y", "z"]


async def test_a_stager_that_listed_nothing_yet_takes_no_names_away() -> None:
    """It was restarted, and its origin is down."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.origins = ["a"]
    await listed(router)
    stager.has_listed = False
    router.now += 2.0
    assert await listed(router) == ["base", "a"]


async def test_what_nobody_would_be_served_is_not_listed() -> None:
    """Names of no pool, of another pool, of a base model, and those that a node found invalid, unless another node serves them."""
    first, second = (
        Pool(name, frozenset({f"{name}-base"}), patterns, LookupTable([Endpoint(f"10.0.0.{number}:8000", "", f"10.0.0.{number}:9102")], 251))
        for number, (name, patterns) in enumerate({"first": ("one/*",), "second": ("two/*",)}.items(), 1)
    )
    router = Router(2, pools=[first, second])
    for stager in router.stagers.values():
        stager.origins = ["first-base", "one/a", "one/bad", "three/c", "two/b"]
    router.stagers["10.0.0.1:9102"].listed = Models(refused=("one/bad", "two/b"))
    assert await listed(router) == ["first-base", "one/a", "second-base", "two/b"]
    router.stagers["10.0.0.1:9102"].listed = Models((), (Model("one/bad", "/one/bad"),), refused=("one/bad",))
    router.models.changed("10.0.0.1:9102")
    assert await listed(router) == ["first-base", "one/a", "one/bad", "second-base", "two/b"]


async def test_a_refusal_is_heard_of_and_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch tells of it; its end is nobody's news, so a stager with refusals is asked again after a while."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.origins = ["a"]
    router.membership.start()
    await until(lambda: stager.watched)
    assert await listed(router) == ["base", "a"]
    stager.listed = Models(refused=("a",))
    stager.events.put_nowait(Refused("a"))
    await until(stager.events.empty)
    await turns()
    assert await listed(router) == ["base"]
    stager.listed = Models()
    assert await listed(router) == ["base"]
    monkeypatch.setattr("extproc.router.models.REFUSED_S", 0.0)
    assert await listed(router) == ["base", "a"]
    await router.stop()


async def test_names_are_asked_for_when_a_stager_is_heard_of() -> None:
    """So that an origin is listed before the first client asks."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.origins = ["a"]
    router.membership.start()
    await until(lambda: stager.catalogues)
    await router.stop()


def test_a_stager_that_hangs_is_not_waited_for() -> None:
    """The list has what is known after two seconds, and after five the next stager is asked for the names."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        router = Router(2, clock=loop.time)
        one, two = router.stagers.values()
        two.origins = ["a"]
        one.gate.clear()
        began = loop.time()
        assert await listed(router) == ["base"]
        assert loop.time() - began == 2.0
        servable = router.models._servable
        assert servable is not None
        await servable.ask(60.0)
        assert list(servable.names(router.pool)) == ["a"]
        assert loop.time() - began == servable_module.ANSWER_S
        one.gate.set()
        await router.stop()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


# -- one model


async def test_the_card_of_what_an_origin_has_is_as_in_the_list() -> None:
    """Also where the origin cannot be listed: it is asked for that name once, by the node that a request would go to."""
    router = Router(3)
    for stager in router.stagers.values():
        stager.origins, stager.unlisted = ["acme/a"], {"hub/b"}
    cards = {card["id"]: card for card in json.loads(b"".join(await router.models.list()))["data"]}
    assert await asked(router, "acme/a") == (200, cards["acme/a"])
    for _ in range(3):
        assert await asked(router, "hub/b") == (200, {**cards["acme/a"], "id": "hub/b", "root": "hub/b"})
    assert [stager.resolved for stager in router.stagers.values() if stager is not router.stager_of(router.owner("hub/b"))] == [[], []]
    assert router.stager_of(router.owner("hub/b")).resolved == ["hub/b"]


async def test_what_no_origin_has_is_not_found_and_remembered() -> None:
    """For ten seconds."""
    router = Router(1)
    (stager,) = router.stagers.values()
    for _ in range(3):
        status, body = await asked(router, "acme/none")
        assert (status, body["error"]["code"]) == (404, "model_not_found")
        assert "no origin has it" in body["error"]["message"]
    assert stager.resolved == ["acme/none"]
    stager.unlisted = {"acme/none"}
    router.now += servable_module.HAS_IT_NOT_S
    assert (await asked(router, "acme/none"))[0] == 200


async def test_a_name_that_no_adapter_can_have_is_not_found() -> None:
    """A request for it would be 400; of a card that is not there 404 is what clients expect."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.error = InvalidRequest("model: '.x' has a part that starts with a dot")
    status, body = await asked(router, ".x")
    assert (status, body["error"]["message"]) == (404, "The model `.x` does not exist: model: '.x' has a part that starts with a dot")


async def test_a_refused_name_is_asked_for_though_it_is_listed() -> None:
    """Its origin may have another version now; if not, the answer is 404 with the reason."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.origins, stager.listed = ["a"], Models(refused=("a",))
    assert await listed(router) == ["base"]
    assert (await asked(router, "a"))[0] == 200
    assert stager.resolved == ["a"]


@pytest.mark.parametrize(
    ("error", "status", "stagers"), [(OriginFailed("s3: 500"), 502, 1), (OriginDown("s3: down"), 502, 3), (StagerUnavailable("gone"), 503, 3)]
)
async def test_an_origin_that_fails_is_answered_as_a_request_would_be(error: LoraExtprocError, status: int, stagers: int) -> None:
    """Other nodes are asked where they may reach what this one does not; nothing of it is remembered."""
    router = Router(4)
    for stager in router.stagers.values():
        stager.error = error
    for count in (1, 2):
        assert (await asked(router, "hub/a"))[0] == status
        assert sum(len(stager.resolved) for stager in router.stagers.values()) == stagers * count


def servable_of(stager: ScriptedStager) -> tuple[Servable, Pool]:
    pool = Pool("models", frozenset(), ("*",), LookupTable([Endpoint("10.0.0.1:8000", "", stager.address)], 251))
    return Servable([pool], {stager.address: stager}, lambda: 0.0), pool


async def test_names_that_are_looked_for_and_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may invent as many as it likes; another that asks for the same waits for the same."""
    monkeypatch.setattr(servable_module, "MAX_RESOLVING", 3)
    monkeypatch.setattr(servable_module, "MAX_ANSWERS", 2)
    stager = ScriptedStager("10.0.0.1:9102")
    stager.gate.clear()
    servable, pool = servable_of(stager)
    asking = [asyncio.create_task(servable.check(pool, name)) for name in ("a", "b", "c", "d", "a")]
    await turns()
    stager.gate.set()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    assert [getattr(answer, "reason", "") for answer in answers] == [*["model_not_found"] * 3, "overloaded", "model_not_found"]
    assert stager.resolved == ["a", "b", "c"]
    assert list(servable._answers) == ["b", "c"]
    await servable.close()


def test_an_origin_that_says_nothing_of_a_name_ends_the_wait() -> None:
    """After ten seconds, with an answer that says so; the question goes on, and its answer is remembered."""

    async def main() -> None:
        stager = ScriptedStager("10.0.0.1:9102")
        stager.unlisted = {"a"}
        stager.gate.clear()
        servable, pool = servable_of(stager)
        with pytest.raises(LoraExtprocError, match="ask again") as late:
            await servable.check(pool, "a")
        assert late.value.status == 503
        stager.gate.set()
        await turns()
        await servable.check(pool, "a")
        assert stager.resolved == ["a"]
        await servable.close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


# -- a hundred thousand names


async def test_a_hundred_thousand_names_are_listed_while_others_have_their_turn() -> None:
    """In pages of names and slices of cards."""
    asyncio.get_running_loop().set_debug(False)  # which takes ten times what is done
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.origins = [f"acme/{number:06}" for number in range(100_000)]
    with Turns() as turns:
        body = json.loads(b"".join(await router.models.list()))
    assert [card["id"] for card in body["data"]] == ["base", *stager.origins]
    assert len(stager.catalogues) == 100_000 / servable_module.PAGE
    assert turns.count >= 400
