"""Pools whose engines only decode: a request goes on when both of its engines have the adapter, and names the one that computes the prompt."""

import asyncio
import json
from typing import Any

import pytest

from extproc.client import Evicted
from extproc.core.endpoint import Endpoint
from extproc.core.maglev import LookupTable
from extproc.core.placement import Pool
from extproc.core.standing import Stager, Standing
from extproc.errors import NoSpace, OriginFailed
from extproc.pb import ext_proc_pb2 as pb
from tests.fakes.wait import in_virtual_time, turns, until

from .fakes import SLOWLY, Gateway, Router, body, chat, get, headers, serve
from .test_fleet import now

HEADERS = ("x-llm-d-prefiller-host-port", "x-prefiller-host-port")
WORDS = "lorem ipsum dolor sit amet " * 60


def split(**settings: Any) -> Router:
    """Two engines that decode, two that compute prompts, one stager each."""
    endpoints = [Endpoint(f"10.0.0.{i}:8000", f"node-{i}", f"10.0.0.{i}:9102") for i in (1, 2, 3, 4)]
    decode = Pool("decode", frozenset({"base"}), ("*",), LookupTable(endpoints[:2], 251), prefill="prefill")
    prefill = Pool("prefill", frozenset(), (), LookupTable(endpoints[2:], 251), is_prefill=True)
    return Router(4, pools=(decode, prefill), **settings)


def told(stream: Gateway) -> tuple[str, str]:
    """Who decodes, and who computes the prompt ("": who decodes), by both headers, or by both being taken from what the client sent."""
    mutation = stream.written[0].request_headers.response.header_mutation
    values = {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}
    [prefiller] = {values.get(name, "") for name in HEADERS}
    assert {name for name in HEADERS if name in mutation.remove_headers} == (set() if prefiller else set(HEADERS))
    return stream.first_destination(), prefiller


def owner(router: Router, pool: int, adapter: str) -> Endpoint:
    return router.pools[pool].candidates(adapter)[0]


async def test_both_engines_have_the_adapter_before_the_request_goes_on() -> None:
    """The one in the decoding pool, where Envoy sends it, and the one that the sidecar there asks first."""
    router = split()
    first, second = owner(router, 0, "demo/sql"), owner(router, 1, "demo/sql")
    router.stager_of(second).gate.clear()
    stream = Gateway(router, chat("demo/sql"))
    await until(lambda: router.stager_of(first).asked and router.stager_of(second).asked)
    await turns()
    assert stream.written == []
    router.stager_of(second).gate.set()
    await stream.end()
    assert told(stream) == (first.address, second.address)
    assert told(await serve(router, chat("demo/sql"))) == (first.address, second.address)
    assert sum(len(stager.asked) for stager in router.stagers.values()) == 2


async def test_a_request_counts_once_on_each_side_whether_it_waited_or_not() -> None:
    """Also one whose body was arriving while both were waited for."""
    router = split()
    owners = owner(router, 0, "demo/sql"), owner(router, 1, "demo/sql")
    stream = Gateway(router, [headers(), body(b'{"model":"demo/sql","messages":["' + b"x" * 20_000, end=False)])
    await until(lambda: all(router.residency.known(endpoint, "demo/sql") for endpoint in owners))
    await turns()
    stream.show(body(b'"]}'))
    await stream.end()
    assert counted(router) == [1, 1]
    for requests, adapter in ((2, "demo/sql"), (3, "demo/legal")):
        await serve(router, chat(adapter))
        assert counted(router) == [requests, requests]


def counted(router: Router) -> list[float]:
    """Requests in flight in the decoding pool, and in the other."""
    return [sum(router.membership.loads[pool.name][endpoint.address].known for endpoint in pool.table.endpoints) for pool in router.pools]


@pytest.mark.parametrize("error", [NoSpace("full"), OriginFailed("down")])
async def test_where_no_prompt_can_be_computed_elsewhere_the_decoding_engine_does_it(error: Exception) -> None:
    """Slower, but an answer. Nobody else tells its sidecar where to connect."""
    router = split()
    for number in (3, 4):
        router.stagers[f"10.0.0.{number}:9102"].error = error  # type: ignore[assignment]
    assert told(await serve(router, chat("demo/sql", {HEADERS[1]: "10.9.9.9:80"}))) == (owner(router, 0, "demo/sql").address, "")


async def test_without_an_engine_that_computes_prompts_nothing_is_waited_for() -> None:
    """All of its pool are down: adapters and base models are served by the decoding pool alone."""
    router = split()
    for endpoint in router.pools[1].table.endpoints:
        router.membership.observe(endpoint, stager=Stager.NOT_READY, why="ill")
    for model in ("demo/sql", "base"):
        assert told(await serve(router, chat(model)))[1] == ""
    assert not router.stagers["10.0.0.3:9102"].asked + router.stagers["10.0.0.4:9102"].asked


async def test_an_engine_that_knows_another_version_computes_no_prompt() -> None:
    """The sidecar sends both the same body: under the one name the other would answer 404."""
    router = split()
    for number in (1, 2, 3, 4):
        stager = router.stagers[f"10.0.0.{number}:9102"]
        stager.renames, stager.digest = True, ("a" if number < 3 else "b") * 64
    stream = await serve(router, chat("demo/sql"))
    assert told(stream) == (owner(router, 0, "demo/sql").address, "")


async def test_a_failure_of_the_decoding_side_is_the_answer() -> None:
    """And the wait for the other side ends with it."""
    router = split()
    for number in (1, 2):
        router.stagers[f"10.0.0.{number}:9102"].error = OriginFailed("down")
    router.stager_of(owner(router, 1, "demo/sql")).gate.clear()
    assert (await serve(router, chat("demo/sql"))).immediate().details == "origin_failed"
    assert router.residency.waiting(owner(router, 1, "demo/sql"), "demo/sql") == 0


async def test_both_sides_are_waited_for_while_the_body_arrives() -> None:
    """The choice is made again at its end, and both are there by then."""
    router = split()
    stream = Gateway(router, [headers(), body(b'{"model":"demo/sql","messages":["' + b"x" * 20_000, end=False)])
    first, second = owner(router, 0, "demo/sql"), owner(router, 1, "demo/sql")
    await until(lambda: all(router.residency.known(endpoint, "demo/sql") for endpoint in (first, second)))
    await turns()
    stream.show(body(b'"]}'))
    await stream.end()
    assert told(stream) == (first.address, second.address)


async def test_a_client_that_hangs_up_waits_for_neither_side() -> None:
    """The fetches go on without it."""
    router = split()
    sides = [owner(router, pool, "demo/sql") for pool in (0, 1)]
    for endpoint in sides:
        router.stager_of(endpoint).gate.clear()
    stream = Gateway(router, chat("demo/sql"))
    await until(lambda: all(router.residency.waiting(endpoint, "demo/sql") for endpoint in sides))
    stream.processor.abandon()
    await until(lambda: not any(router.residency.waiting(endpoint, "demo/sql") for endpoint in sides))
    assert all(router.stager_of(endpoint).cancelled == 0 for endpoint in sides)
    for endpoint in sides:
        router.stager_of(endpoint).gate.set()
    await router.stop()


async def test_a_base_models_prompt_is_computed_elsewhere_too() -> None:
    """By an engine of that pool; a request that names no model has no prompt."""
    router = split()
    decoding, prefilling = told(await serve(router, chat("base")))
    assert decoding in ("10.0.0.1:8000", "10.0.0.2:8000")
    assert prefilling in ("10.0.0.3:8000", "10.0.0.4:8000")
    assert told(await serve(router, [get("/version")]))[1] == ""


@pytest.mark.parametrize("model", ["demo/sql", "base"])
async def test_the_turns_of_a_conversation_keep_both_of_their_engines(model: str) -> None:
    """Each side has a KV cache of its own, and remembers."""
    router = split()
    for endpoint in (endpoint for pool in router.pools for endpoint in pool.table.endpoints):
        router.stager_of(endpoint).lease_s = 3600
        await router.residency.ensure(endpoint, "demo/sql")
    places = set()
    for count in range(1, 6):
        messages = [{"role": "user", "content": WORDS} for _ in range(count)]
        request: list[pb.ProcessingRequest] = [headers(), body(json.dumps({"messages": messages, "model": model}).encode())]
        places.add(told(await serve(router, request)))
        router.now += 5
        for loads in router.membership.loads.values():
            loads.sweep(router.now)
    assert len(places) == 1


async def test_what_computes_prompts_counts_as_busy_with_them() -> None:
    """Two prompts at once go to two engines."""
    router = split(prefix_blocks=0)
    for endpoint in router.pools[1].table.endpoints:
        await router.residency.ensure(endpoint, "demo/sql")
    prefillers = {told(await serve(router, chat("demo/sql")))[1] for _ in range(2)}
    assert prefillers == {"10.0.0.3:8000", "10.0.0.4:8000"}


async def test_an_engine_that_joins_is_given_what_it_will_compute_prompts_for() -> None:
    """Its pool has no adapters of its own: they are those of the decoding pool."""
    router = split()
    names = [f"a{number}" for number in range(8)]
    for name in names:
        await serve(router, chat(name))
    joining = router.pools[1].table.endpoints[0]
    stager = router.stager_of(joining)
    before = len(stager.asked)
    router.membership.engine_is_new(joining)
    assert router.membership.snapshot.standing(joining) is Standing.JOINING
    await until(lambda: router.membership.snapshot.standing(joining) is Standing.READY)
    assert set(stager.asked[before:]) == {name for name in names if owner(router, 1, name) == joining} != set()


async def test_no_request_is_for_a_pool_that_computes_prompts() -> None:
    """Not even one that names the pool."""
    router = split()
    stream = await serve(router, [headers({":method": "GET", ":path": "/version", "x-lora-extproc-pool": "prefill"}, end=True)])
    assert stream.immediate().details == "no_endpoint"


# ---- while one side is waited for


def watched(router: Router, adapter: str) -> tuple[Endpoint, Endpoint]:
    """The adapter's owner on each side. All stagers are watched, and slow where their gates are shut."""
    router.membership.start()
    for stager in router.stagers.values():
        stager.progress = SLOWLY
    return owner(router, 0, adapter), owner(router, 1, adapter)


@pytest.mark.parametrize("how", ["evicted", "its lease ends", "down"])
def test_a_decoding_side_that_is_ready_no_more_is_made_ready_again(how: str) -> None:
    """It was so first, and the other side took its time."""

    async def main() -> None:
        router = split(clock=now, deadline_s=120.0)
        decode, prefill = watched(router, "a")
        router.stager_of(decode).lease_s = 30.0
        await turns()
        router.stager_of(prefill).gate.clear()
        stream = Gateway(router, chat("a"))
        await asyncio.sleep(5)
        assert router.residency.known(decode, "a")
        if how == "evicted":
            router.stager_of(decode).known.discard("a")
            router.stager_of(decode).events.put_nowait(Evicted("a"))
        elif how == "down":
            router.membership.observe(decode, stager=Stager.NOT_READY, why="its engine fails")
        await asyncio.sleep(60)
        router.stager_of(prefill).gate.set()
        await stream.end()
        decodes, prefills = told(stream)
        chosen = next(endpoint for endpoint in router.pools[0].table.endpoints if endpoint.address == decodes)
        assert (chosen == decode) is (how != "down")
        assert router.residency.known(chosen, "a")
        assert prefills == prefill.address
        await router.stop()

    in_virtual_time(main)


def test_one_that_computes_prompts_and_is_down_by_then_is_not_named() -> None:
    """The other of its pool is."""

    async def main() -> None:
        router = split(clock=now, deadline_s=120.0)
        decode, prefill = watched(router, "a")
        await turns()
        router.stager_of(decode).gate.clear()
        stream = Gateway(router, chat("a"))
        await asyncio.sleep(5)
        router.membership.observe(prefill, stager=Stager.NOT_READY, why="its engine fails")
        router.stager_of(decode).gate.set()
        await stream.end()
        assert told(stream)[1] == next(e.address for e in router.pools[1].table.endpoints if e != prefill)
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("how", ["fetched for too long", "full"])
def test_a_decoding_side_that_is_ready_goes_alone_where_the_other_is_not(how: str) -> None:
    """At the deadline, or at once where that pool has no room."""

    async def main() -> None:
        router = split(clock=now, deadline_s=20.0)
        decode, _ = watched(router, "a")
        await turns()
        await router.residency.ensure(decode, "a")
        for endpoint in router.pools[1].table.endpoints:
            if how == "full":
                router.stager_of(endpoint).error = NoSpace("full")
            else:
                router.stager_of(endpoint).gate.clear()
        began = now()
        assert told(await serve(router, chat("a"))) == (decode.address, "")
        assert now() - began == (0 if how == "full" else 20)
        await router.stop()

    in_virtual_time(main)
