"""The name by which an engine knows a version: written into the body, asked for anew after a refresh, the same for every endpoint of a list."""

import asyncio
import json

from extproc.client import Loading, Refreshed
from extproc.core.endpoint import Endpoint
from extproc.pb import ext_proc_pb2 as pb
from extproc.router import residency as residency_module
from tests.fakes.wait import VirtualLoop, until

from .fakes import Gateway, Router, chat, headers

MODEL = "a@sha256:dddddddddddd"


def sent_model(gateway: Gateway) -> str:
    return str(json.loads(gateway.body())["model"])


async def served(router: Router, model: str = "a") -> Gateway:
    gateway = Gateway(router, chat(model))
    await gateway.end()
    return gateway


async def test_the_engines_name_is_written_into_the_body() -> None:
    """Cold and warm."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.renames = True
    for _ in range(2):
        gateway = await served(router)
        assert sent_model(gateway) == MODEL
        note = gateway.written[0].dynamic_metadata.fields["lora_extproc"].struct_value.fields
        assert (note["model"].string_value, note["engine_model"].string_value) == ("a", MODEL)
    assert stager.loadings == [Loading.VERSIONED]


async def test_where_the_body_is_not_shown_the_adapters_own_name_is_asked_for() -> None:
    """Mode NONE; a lease on a version says nothing of it."""
    router = Router(1)
    (stager,) = router.stagers.values()
    stager.renames = True
    await served(router)
    gateway = Gateway(router, [headers({"x-gateway-model-name": "a"}, mode=pb.NONE)])
    await gateway.end()
    assert gateway.destination()
    assert stager.loadings == [Loading.VERSIONED, Loading.PLAIN]


async def test_a_retry_goes_only_where_the_same_name_means_the_same() -> None:
    """The second attempt sends the same body: an engine with another version would answer 404."""
    router = Router(3)
    first, second, third = (router.stager_of(endpoint) for endpoint in router.pool.candidates("a"))
    for stager in (first, second, third):
        stager.renames = True
    third.digest = "e" * 64
    third.known.add("a")
    for endpoint in router.pool.candidates("a"):
        await router.residency.ensure(endpoint, "a")
    destination = (await served(router)).destination()
    assert destination == ",".join(endpoint.address for endpoint in router.pool.candidates("a")[:2])


def test_a_refreshed_adapter_is_asked_for_and_the_old_lease_given_back_later() -> None:
    """What was sent to the old version has arrived by then."""

    async def main() -> None:
        router = Router(1)
        (stager,) = router.stagers.values()
        stager.renames = True
        router.membership.start()
        await served(router)
        stager.digest = "e" * 64
        stager.events.put_nowait(Refreshed("a"))
        await until(stager.events.empty)
        await asyncio.sleep(0.1)
        assert sent_model(await served(router)) == "a@sha256:eeeeeeeeeeee"
        assert stager.released == []
        await asyncio.sleep(residency_module.IN_TRANSIT_S)
        assert stager.released == ["a"]
        await router.membership.stop()
        await router.residency.close()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())


# -- slots


def full(router: Router, endpoint: Endpoint, *, adapters: int = 4) -> None:
    router.membership.in_demand(endpoint.stager, adapters, 4)


async def test_a_node_whose_slots_are_taken_is_spared_while_another_has_room() -> None:
    """And what was put elsewhere meanwhile is served from there without asking."""
    router = Router(3)
    owner, second, _ = router.pool.candidates("a")
    full(router, owner)
    for _ in range(2):
        assert (await served(router)).first_destination() == second.address
    assert router.stager_of(owner).asked == []
    assert router.stager_of(second).asked == ["a"]


async def test_what_a_full_node_has_it_serves() -> None:
    """It is one of those that fill it."""
    router = Router(3)
    owner = router.owner("a")
    await served(router)
    full(router, owner)
    assert (await served(router)).first_destination() == owner.address


async def test_where_all_are_full_the_owner_serves() -> None:
    """Its engine loads in turn, as it would without us."""
    router = Router(3)
    for endpoint in router.pool.table.endpoints:
        full(router, endpoint)
    assert (await served(router)).first_destination() == router.owner("a").address


async def test_unknown_slots_are_no_limit() -> None:
    """A node that does not say how many adapters its engine keeps is given any number."""
    router = Router(2)
    owner = router.owner("a")
    router.membership.in_demand(owner.stager, 1000, 0)
    assert (await served(router)).first_destination() == owner.address
