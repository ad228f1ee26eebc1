"""One list of models for the whole fleet."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from extproc.client import Evicted, Model, Models, Published, WatchEvent
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.errors import StagerUnavailable
from extproc.pb import ext_proc_pb2 as pb
from extproc.router import models as models_module
from tests.fakes.wait import Turns, VirtualLoop, turns, until

from .fakes import Gateway, Router, get, headers, names, serve


async def listed(router: Router) -> list[dict[str, Any]]:
    gateway = await serve(router, [get("/v1/models")])
    answer = gateway.immediate()
    assert (answer.status.code, answer.details) == (200, "models")
    body = json.loads(answer.body)
    assert body["object"] == "list"
    assert isinstance(body["data"], list)
    return body["data"]


async def ids(router: Router) -> list[str]:
    return [card["id"] for card in await listed(router)]


async def test_base_models_and_adapters_of_all_nodes_are_listed_once() -> None:
    """With root and parent as vLLM gives them, in one order, whichever node has what."""
    router = Router(2, shows_paths=True)
    one, two = router.stagers.values()
    base = Model("base", "/models/base", 4096)
    one.listed = Models((base,), (Model("acme/a", "/node/.store/a"), Model("acme/b", "/node/.store/b")))
    two.listed = Models((base,), (Model("acme/a", "/node/.store/a"), Model("acme/c", "/node/.store/c")))
    cards = await listed(router)
    assert [(card["id"], card["root"], card["parent"], card["max_model_len"]) for card in cards] == [
        ("base", "/models/base", None, 4096),
        ("acme/a", "/node/.store/a", "base", None),
        ("acme/b", "/node/.store/b", "base", None),
        ("acme/c", "/node/.store/c", "base", None),
    ]
    assert all((card["object"], card["owned_by"]) == ("model", "vllm") for card in cards)
    assert router.count("listed") == 1


async def test_a_nodes_paths_are_its_own() -> None:
    """Unless a setting says so, a card's root is the model's name: directories are nobody's business."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.listed = Models((Model("base", "/models/base", 4096),), (Model("acme/a", "/node/.store/a"),))
    assert [(card["id"], card["root"], card["max_model_len"]) for card in await listed(router)] == [("base", "base", 4096), ("acme/a", "acme/a", None)]
    assert b"/node" not in b"".join(await router.models.list())


async def test_a_models_card_is_answered_as_the_list_is() -> None:
    """The same words; what no node has is 404, as an adapter's name of another pool is."""
    router = Router(2, models="staged")
    one, two = router.stagers.values()
    one.listed = Models((Model("base", "/models/base", 4096),), ())
    two.listed = Models((), (Model("acme/a", "/node/.store/a"),))
    cards = {card["id"]: card for card in await listed(router)}
    for path, name in (("/v1/models/base", "base"), ("/v1/models/acme/a", "acme/a"), ("/v1/models/acme%2Fa?x=1", "acme/a")):
        answer = (await serve(router, [get(path)])).immediate()
        assert (answer.status.code, json.loads(answer.body)) == (200, cards[name])
    for path in ("/v1/models/acme/b", "/v1/models/acme", "/v1/models/Base"):
        answer = (await serve(router, [get(path)])).immediate()
        assert (answer.status.code, answer.details) == (404, "model_not_found")
    assert "`acme/b` does not exist, or no node has it yet" in (await serve(router, [get("/v1/models/acme/b")])).immediate().body.decode()


async def test_an_adapter_is_its_pools() -> None:
    """A node of another pool may have its files; nobody would send a request there."""
    first, second = (
        Pool(name, frozenset({f"{name}-base"}), patterns, LookupTable([Endpoint(f"10.0.0.{number}:8000", "", f"10.0.0.{number}:9102")], 251))
        for number, (name, patterns) in enumerate({"first": ("one/*",), "second": ("*",)}.items(), 1)
    )
    router = Router(2, pools=[first, second])
    for stager in router.stagers.values():
        stager.listed = Models((), (Model("one/a", "/a"), Model("two/b", "/b")))
    cards = {card["id"]: card["parent"] for card in await listed(router)}
    assert cards == {"first-base": None, "one/a": "first-base", "second-base": None, "two/b": "second-base"}
    assert (await serve(router, [get("/v1/models/one/a")])).immediate().status.code == 200


async def test_a_stager_is_asked_again_when_something_changed_there() -> None:
    """And not for every list."""
    router = Router(2)
    one, two = router.stagers.values()
    router.membership.start()
    await until(lambda: one.watched and two.watched)
    await listed(router)
    await listed(router)
    assert (one.listings, two.listings) == (1, 1)
    events: tuple[WatchEvent, ...] = (Published("acme/a"), Evicted("acme/a"))
    for count, event in enumerate(events, 2):
        one.events.put_nowait(event)
        await until(one.events.empty)
        await asyncio.sleep(0)
        await listed(router)
        assert (one.listings, two.listings) == (count, 1)
    await router.membership.stop()


async def test_a_node_that_does_not_answer_counts_with_what_it_said_last() -> None:
    """Its adapters are still known; the list is not held up."""
    router = Router(2)
    one, _ = router.stagers.values()
    one.listed = Models((), (Model("acme/a", "/a"),))
    await listed(router)
    one.error = StagerUnavailable("gone")
    router.models.changed(one.address)
    assert [card["id"] for card in await listed(router)] == ["base", "acme/a"]
    one.error = None
    one.listed = Models()
    assert [card["id"] for card in await listed(router)] == ["base"]


async def test_without_any_stager_the_base_models_are_listed() -> None:
    """They are in the settings."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.error = StagerUnavailable("gone")
    assert await listed(router) == [
        {
            "id": "base",
            "object": "model",
            "created": 0,
            "owned_by": "vllm",
            "root": "base",
            "parent": None,
            "max_model_len": None,
            "permission": [],
        }
    ]


async def test_who_hangs_up_ends_its_own_wait() -> None:
    """Another that waits for the same answer gets it."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.gate.clear()
    gone, stays = Gateway(router, [get("/v1/models")]), Gateway(router, [get("/v1/models")])
    await until(lambda: stager.listings)
    gone.processor.abandon()
    stager.gate.set()
    await stays.end()
    assert stays.immediate().status.code == 200
    assert not gone.written


async def test_it_may_be_an_engine_that_answers() -> None:
    """By a setting: with what it was asked for so far."""
    router = Router(lists_models=False)
    for path in ("/v1/models", "/v1/models/base"):
        assert (await serve(router, [get(path)])).destination()
    assert (await serve(Router(), [headers({":method": "HEAD", ":path": "/v1/models"}, end=True, mode=pb.NONE)])).destination()


# ---- it never ends old


async def test_what_changes_while_the_list_is_rendered_is_in_the_next() -> None:
    """The order of events: rendering begins; a node says something new; a request comes; rendering ends. That request gets another rendering."""
    router = Router(1, models="staged")
    (stager,) = router.stagers.values()
    stager.listed = Models((), names(3000))
    await router.models._ask_stale()
    began = asyncio.create_task(router.models.list())
    await turns(3)
    assert not began.done()
    stager.listed = Models((), (*names(3000), Model("acme/new", "/new")))
    router.models.changed(stager.address)
    came = asyncio.create_task(router.models.list())
    assert b'"acme/new"' not in b"".join(await began)
    assert b'"acme/new"' in b"".join(await came)
    assert (await ids(router))[-1] == "acme/new"


async def test_what_changes_while_a_node_is_asked_is_asked_for_again() -> None:
    """The order of events: a node is asked; it evicts; the watch tells so; its answer, from before, arrives."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.gate.clear()
    first = asyncio.create_task(router.models.list())
    await until(lambda: stager.listings)
    router.models.changed(stager.address)
    stager.gate.set()
    await first
    stager.listed = Models((), names(1))
    assert await ids(router) == ["base", "acme/000000"]
    assert stager.listings == 2


async def test_many_who_ask_get_one_rendering() -> None:
    """In the very same pieces."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.listed = Models((), names(2000))
    lists = await asyncio.gather(*(router.models.list() for _ in range(50)))
    assert len({id(pieces) for pieces in lists}) == 1
    assert stager.listings == 2  # pages of a thousand


def test_a_node_that_hangs_holds_the_list_up_for_two_seconds_and_not_each_time() -> None:
    """It counts with what it said last; then lists rest for ten times as long before it is asked again."""

    async def main() -> None:
        router = Router(2)
        one, two = router.stagers.values()
        two.listed = Models((), names(1))
        one.gate.clear()
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert b"acme/000000" in b"".join(await router.models.list())
        assert loop.time() - began == models_module.ASK_S
        one.gate.set()
        await router.stop()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


async def test_lists_that_take_long_are_not_made_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a tenth of a core goes into them: a client that asks again and again is shown what was said before."""
    router = Router(1, models="staged")
    (stager,) = router.stagers.values()
    moment = 1000.0
    monkeypatch.setattr("extproc.router.models.time.monotonic", lambda: moment)
    answered = stager._answer

    async def slow() -> None:
        nonlocal moment
        moment += 0.5
        await answered()

    monkeypatch.setattr(stager, "_answer", slow)
    await router.models.list()
    for seconds, listings in ((0.0, 1), (4.9, 1), (5.1, 2)):
        moment = 1000.5 + seconds
        router.models.changed(stager.address)
        await router.models.list()
        assert stager.listings == listings


# ---- a hundred thousand names


def slices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cards are encoded at a time, from now on."""
    sizes: list[int] = []
    encode = msgspec.json.encode

    def counted(cards: list[Any]) -> bytes:
        sizes.append(len(cards))
        return encode(cards)

    monkeypatch.setattr("extproc.router.models.msgspec.json.encode", counted)
    return sizes


async def test_a_hundred_thousand_names_are_read_in_pages_and_rendered_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between which others have their turn; kept in pieces that are sent as they are."""
    asyncio.get_running_loop().set_debug(False)  # which takes ten times what is done
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.listed = Models((), names(100_000))

    def paged() -> Iterator[tuple[Model, ...]]:
        for first in range(0, 100_000, models_module.PAGE):
            yield stager.listed.adapters[first : first + models_module.PAGE]

    pages = list(paged())
    asked: list[str] = []

    async def models(after: str = "", limit: int = 0) -> Models:
        assert limit == models_module.PAGE
        asked.append(after)
        return Models((), pages[len(asked) - 1], len(asked) < len(pages))

    monkeypatch.setattr(stager, "models", models)
    sizes = slices(monkeypatch)
    with Turns() as turns:
        pieces = await router.models.list()
    assert asked == ["", *(page[-1].id for page in pages[:-1])]
    assert max(sizes) == models_module.SLICE
    assert turns.count >= len(sizes) >= 400
    assert max(map(len, pieces)) <= 2 * models_module.MAX_PIECE_BYTES
    body = json.loads(b"".join(pieces))
    assert [card["id"] for card in body["data"]] == ["base", *(model.id for model in stager.listed.adapters)]
    gateway = await serve(router, [get("/v1/models")])
    assert isinstance(gateway.raw[0], tuple)
    assert [id(piece) for piece in gateway.raw[0][1:]] == [id(piece) for piece in pieces]
    assert gateway.immediate().body == b"".join(pieces)
