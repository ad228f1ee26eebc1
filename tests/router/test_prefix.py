"""Requests of one conversation, and of one session, go where their beginning was computed, among copies that could serve them all."""

import json

import pytest

from extproc.core.endpoint import Endpoint
from extproc.core.load import FORGOTTEN_S, Engine
from extproc.core.standing import Stager
from extproc.pb import ext_proc_pb2 as pb

from .fakes import Router, body, headers, serve

WORDS = "lorem ipsum dolor sit amet " * 60  # three blocks
ADAPTER, BASE = "demo/sql", "base"


def turn(model: str, *contents: str, session: str = "") -> list[pb.ProcessingRequest]:
    """A request whose prompt is these messages."""
    messages = [{"role": "user", "content": content} for content in contents]
    return [headers({"x-session-id": session} if session else {}), body(json.dumps({"messages": messages, "model": model}).encode())]


async def warm(router: Router) -> Router:
    """Every endpoint has the adapter, for longer than a test takes."""
    for endpoint in router.pool.table.endpoints:
        router.stager_of(endpoint).lease_s = 3600
        await router.residency.ensure(endpoint, ADAPTER)
    return router


async def ask(router: Router, messages: list[pb.ProcessingRequest]) -> str:
    """Where the request went; by the next one its engine has answered."""
    destination = (await serve(router, messages)).first_destination()
    router.now += FORGOTTEN_S
    router.membership.loads["models"].sweep(router.now)
    return destination


def busy(router: Router, address: str, running: float = 50) -> None:
    router.membership.loads["models"].say(address, Engine(running=running), router.now)


@pytest.mark.parametrize("model", [ADAPTER, BASE])
async def test_the_turns_of_a_conversation_go_to_one_copy(model: str) -> None:
    """Whichever the first went to, and whatever others send meanwhile; conversations spread over the copies."""
    router = await warm(Router(4))
    places: dict[int, list[str]] = {number: [] for number in range(12)}
    for count in range(1, 4):
        for number, went in places.items():
            went.append(await ask(router, turn(model, *(f"{number} {WORDS}" for _ in range(count)))))
    assert all(len(set(went)) == 1 for went in places.values())
    assert len({went[0] for went in places.values()}) == 4


@pytest.mark.parametrize("model", [ADAPTER, BASE])
async def test_a_copy_that_carries_too_much_is_left_by_its_conversations(model: str) -> None:
    """The next turn is computed anew elsewhere, and goes on there."""
    router = await warm(Router(4))
    first = await ask(router, turn(model, WORDS))
    busy(router, first)
    second = (await serve(router, turn(model, WORDS, WORDS))).first_destination()
    assert second != first
    router.now += FORGOTTEN_S
    router.membership.loads["models"].sweep(router.now)
    assert await ask(router, turn(model, WORDS, WORDS, WORDS)) == second


@pytest.mark.parametrize("model", [ADAPTER, BASE])
async def test_a_session_goes_to_one_copy_whatever_it_asks(model: str) -> None:
    """Also what is too short for blocks; sessions spread over the copies, and other routers send them to the same ones."""
    router, other = await warm(Router(4, prefix_blocks=0)), await warm(Router(4))
    places = {session: await ask(router, turn(model, "hello", session=session)) for session in map(str, range(20))}
    for session, place in places.items():
        assert await ask(other, turn(model, session + WORDS, session=session)) == place
    assert len(set(places.values())) == 4


async def test_a_session_means_nothing_where_its_header_has_no_name() -> None:
    """Then the load decides, as for everybody else."""
    router = await warm(Router(4, session_header="", prefix_blocks=0))
    assert len({(await serve(router, turn(ADAPTER, "hello", session="s"))).first_destination() for _ in range(4)}) == 4


async def test_the_session_header_is_a_setting() -> None:
    """In any spelling of its name."""
    router = await warm(Router(4, session_header="X-Chat"))
    request = [headers({"x-chat": "7"}), body(b'{"model": "demo/sql", "messages": []}')]
    assert len({await ask(router, request) for _ in range(5)}) == 1


async def test_nothing_is_remembered_where_it_is_off() -> None:
    """Nor hashed: no request carries blocks."""
    router = await warm(Router(4, prefix_blocks=0))
    places = {(await serve(router, turn(ADAPTER, WORDS))).first_destination() for _ in range(4)}
    assert len(places) == 4
    assert len(router.prefixes) == 0


async def test_a_request_that_waited_for_its_adapter_is_remembered() -> None:
    """The copy that was made for it has its prompt."""
    router = Router(4)
    owner = router.owner(ADAPTER)
    assert await ask(router, turn(ADAPTER, WORDS)) == owner.address
    assert len(router.prefixes) == 3
    await warm(router)
    assert await ask(router, turn(ADAPTER, WORDS, WORDS)) == owner.address


@pytest.mark.parametrize("model", [ADAPTER, BASE])
async def test_the_metrics_say_what_share_of_prompts_engines_may_have(model: str) -> None:
    """Three blocks that are new, then the same three and three more; a prompt without blocks counts for nothing."""
    router = await warm(Router(4))
    for request in (turn(model, WORDS), turn(model, WORDS, WORDS), turn(model, "hello")):
        await ask(router, request)
    seen = {word: router.value("lora_extproc_prompt_blocks_total", seen=word) for word in ("known", "new")}
    assert seen == {"known": 3, "new": 6}


async def test_what_an_engine_had_is_forgotten_when_it_starts_anew() -> None:
    """As its adapters are."""
    router = await warm(Router(4))
    first = await ask(router, turn(BASE, WORDS))
    assert len(router.prefixes) == 3
    endpoint = next(e for e in router.pool.table.endpoints if e.address == first)
    router.membership.engine_is_new(endpoint)
    assert len(router.prefixes) == 0


async def test_a_conversation_goes_on_elsewhere_when_its_endpoint_is_down() -> None:
    """And stays there."""
    router = await warm(Router(4))
    first = await ask(router, turn(BASE, WORDS))
    endpoint = next(e for e in router.pool.table.endpoints if e.address == first)
    router.membership.observe(endpoint, stager=Stager.NOT_READY, why="ill")
    second = await ask(router, turn(BASE, WORDS, WORDS))
    assert second != first
    assert await ask(router, turn(BASE, WORDS, WORDS, WORDS)) == second


async def test_in_a_large_pool_a_prompt_has_a_few_places() -> None:
    """A look at each of a thousand endpoints would take longer than the decision may; the same few are looked at for every turn."""
    router = Router(60)
    first = await ask(router, turn(BASE, WORDS))
    assert {await ask(router, turn(BASE, *(WORDS for _ in range(count)))) for count in range(2, 6)} == {first}
    places = {await ask(router, turn(BASE, "hello", session=session)) for session in map(str, range(60))}
    assert len(places) > 20
    for session in map(str, range(10)):
        assert await ask(router, turn(BASE, "a", session=session)) == await ask(router, turn(BASE, "b", session=session))


async def test_the_gateways_subset_is_kept() -> None:
    """What was sent outside of it counts for nothing."""
    router = await warm(Router(4))
    first = await ask(router, turn(BASE, WORDS))
    others = [e.address for e in router.pool.table.endpoints if e.address != first]
    request = turn(BASE, WORDS, WORDS)
    request[0].metadata_context.filter_metadata["envoy.lb.subset_hint"].fields["x-gateway-destination-endpoint-subset"].string_value = ",".join(others)
    assert await ask(router, request) in others


def test_an_endpoint_is_told_by_its_address_and_its_instance() -> None:
    """What the router keeps of its prompts, too."""
    router = Router(2)
    router.prefixes.record(Endpoint("10.0.0.1:8000", instance="old"), (1, 2, 3))
    assert router.prefixes.longest(router.pool.table.endpoints[0], (1, 2, 3)) == 0
