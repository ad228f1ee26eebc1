"""One list of models for the whole fleet."""

import asyncio
import json
from typing import Any

from extproc.client import Evicted, Model, Models, Published, WatchEvent
from extproc.errors import StagerUnavailable
from extproc.pb import ext_proc_pb2 as pb
from tests.fakes.wait import until

from .fakes import Gateway, Router, headers


def listing(*, mode: "pb.BodySendMode" = pb.FULL_DUPLEX_STREAMED) -> pb.ProcessingRequest:
    return headers({":method": "GET", ":path": "/v1/models"}, end=True, mode=mode)


async def listed(router: Router) -> list[dict[str, Any]]:
    gateway = Gateway(router, [listing()])
    await gateway.end()
    answer = gateway.immediate()
    assert (answer.status.code, answer.details) == (200, "models")
    body = json.loads(answer.body)
    assert body["object"] == "list"
    assert isinstance(body["data"], list)
    return body["data"]


async def test_base_models_and_adapters_of_all_nodes_are_listed_once() -> None:
    """With root and parent as vLLM gives them, in one order, whichever node has what."""
    router = Router(2)
    one, two = router.stagers.values()
    base = Model("base", "/models/base", 4096)
    one.listed = Models((base,), (Model("acme/b", "/node/.store/b"), Model("acme/a", "/node/.store/a")))
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


async def test_a_stager_is_asked_again_when_something_changed_there() -> None:
    """And not for every list."""
    router = Router(2)
    one, two = router.stagers.values()
    router.membership.start(router.stagers)
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
    router.catalog.changed(one.address)
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
    gone, stays = Gateway(router, [listing()]), Gateway(router, [listing()])
    await until(lambda: stager.listings)
    gone.conversation.abandon()
    stager.gate.set()
    await stays.end()
    assert stays.immediate().status.code == 200
    assert not gone.written
