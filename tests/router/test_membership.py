"""How endpoints stand, as the Watch streams tell it and as their engines answer."""

import asyncio
import logging

import pytest

from extproc.client import Evicted, NodeState, Published, Refreshed, Space
from extproc.core.endpoint import Endpoint
from extproc.core.standing import Stager, Standing
from extproc.errors import LoraExtprocError, NoSpace, StagerUnavailable
from extproc.heartbeat import Heard, Silent
from extproc.router.membership import WATCHES_PER_S
from tests.fakes.wait import in_virtual_time, turns, until

from .fakes import Router, ScriptedStager, chat, serve

READY, DRAINING, DOWN = Standing.READY, Standing.DRAINING, Standing.DOWN


async def watched(router: Router) -> tuple[Endpoint, ScriptedStager]:
    """Start, and wait until every stager has said how it is; the owner of `a` and its stager."""
    router.membership.start()
    await until(lambda: all(stager.watched for stager in router.stagers.values()))
    await turns()
    owner = router.owner("a")
    return owner, router.stager_of(owner)


def standing(router: Router, endpoint: Endpoint) -> tuple[Standing, str]:
    return router.membership.snapshot.standings.get(endpoint.address, (READY, ""))


# ---- what a stager says


async def test_an_endpoint_whose_engine_is_ill_loses_its_keys_and_gets_them_back(caplog: pytest.LogCaptureFixture) -> None:
    """Its keys go to their own next candidate meanwhile, and nobody else's move. The log says both, once."""
    caplog.set_level(logging.INFO)
    router = Router()
    owner, stager = await watched(router)
    order = router.pool.candidates("a")
    for _ in range(2):
        stager.events.put_nowait(NodeState(False, "the engine is not healthy", "first", resumed=True))
    await until(lambda: router.membership.snapshot.standings)
    assert router.membership.snapshot.standings == {owner.address: (DOWN, "the engine is not healthy")}
    assert router.membership.snapshot.usable(order) == order[1:]
    assert [router.value("lora_extproc_endpoints", state=state) for state in ("ready", "draining", "down")] == [2, 0, 1]
    stager.events.put_nowait(NodeState(True, "", "first", resumed=True))
    await until(lambda: not router.membership.snapshot.standings)
    lines = [record.getMessage() for record in caplog.records if record.name == "extproc.router.membership"]
    assert lines[0] == f"endpoint {owner.address} ({owner.node}) is down: the engine is not healthy; its keys go to the next candidates"
    assert lines[1].startswith(f"endpoint {owner.address} ({owner.node}) is ready after ")
    assert len(lines) == 2
    await router.stop()


async def test_a_stager_that_stops_leaves_its_node_draining() -> None:
    """What is leased there is served there, and base models where nobody else is; nothing is staged."""
    router = Router(2)
    owner, stager = await watched(router)
    await router.residency.ensure(owner, "a")
    stager.events.put_nowait(NodeState(False, "the stager is stopping", "first", resumed=True, draining=True))
    await until(lambda: standing(router, owner) == (DRAINING, "the stager is stopping"))
    (other,) = (e for e in router.pool.table.endpoints if e is not owner)
    assert (await serve(router, chat("a"))).first_destination() == owner.address
    cold = next(name for name in (f"cold{i}" for i in range(50)) if router.owner(name) is owner)
    assert (await serve(router, chat(cold))).first_destination() == other.address
    assert cold not in stager.asked
    assert {(await serve(router, chat("base"))).first_destination() for _ in range(4)} == {other.address}
    router.stager_of(other).events.put_nowait(NodeState(False, "the stager is stopping", "first", resumed=True, draining=True))
    await until(lambda: standing(router, other)[0] is DRAINING)
    assert {(await serve(router, chat("base"))).first_destination() for _ in range(12)} == {owner.address, other.address}
    await router.stop()


async def test_an_evicted_adapter_is_forgotten_a_published_one_is_not_believed() -> None:
    """Only an answer to Ensure is a lease. A new version has another name in the engine: it is asked for."""
    router = Router(1)
    owner, stager = await watched(router)
    await router.residency.ensure(owner, "a")
    await router.residency.ensure(owner, "r")
    for event in (Published("b"), Refreshed("r"), Space(1, 2, 3), Evicted("a")):
        assert router.residency.lease(owner, "a")
        stager.events.put_nowait(event)
    await until(lambda: not router.residency.lease(owner, "a"))
    assert not router.residency.lease(owner, "b")
    assert not router.residency.lease(owner, "r")
    await router.stop()


async def test_another_state_of_the_same_stream_changes_no_lease() -> None:
    """An engine that is ill for a moment has its files still."""
    router = Router(1)
    owner, stager = await watched(router)
    await router.residency.ensure(owner, "a")
    for ready in (False, True):
        stager.events.put_nowait(NodeState(ready, "", "first", resumed=True))
        await until(lambda: (standing(router, owner)[0] is READY) == ready)  # noqa: B023
        assert router.residency.lease(owner, "a")
    assert stager.claims == []
    await router.stop()


async def test_watches_ask_for_heartbeats_and_for_fewer_of_them_where_there_are_many_stagers() -> None:
    """Listening to them takes no more than a few percent of a core."""
    router = Router(2)
    await watched(router)
    assert {beat for stager in router.stagers.values() for beat in stager.heartbeats} == {0.5}
    await router.stop()
    router = Router(250)
    await watched(router)
    assert {beat for stager in router.stagers.values() for beat in stager.heartbeats[-1:]} == {250 / WATCHES_PER_S}
    await router.stop()


# ---- another instance


@pytest.mark.parametrize(
    ("state", "claims"),
    [
        (NodeState(True, "", "first", resumed=True), 0),
        (NodeState(True, "", "first", resumed=False), 1),  # more went by than it remembers
        (NodeState(True, "", "second", resumed=False), 1),
        (NodeState(True, "", "second", resumed=True), 1),
        (NodeState(False, "the engine is not healthy", "second"), 1),
    ],
)
async def test_an_instance_that_cannot_know_the_leases_is_told_of_them(state: NodeState, claims: int) -> None:
    """It honours what is there; the rest is asked for anew."""
    router = Router(1)
    owner, stager = await watched(router)
    await router.residency.ensure(owner, "a")
    await router.residency.ensure(owner, "b")
    stager.honours = lambda claim: 50.0 if claim.adapter == "a" else 0.0
    stager.events.put_nowait(state)
    await until(stager.events.empty)
    await turns()
    assert len(stager.claims) == claims
    assert [bool(router.residency.lease(owner, name)) for name in "ab"] == [True, claims == 0]
    assert (standing(router, owner)[0] is READY) == state.ready
    await router.stop()


# ---- silence


def test_a_silent_stager_whose_engine_answers_changes_nothing() -> None:
    """Its event loop stands still, or the network between them does; requests go on to where the files are."""

    async def main() -> None:
        router = Router(3)
        owner, stager = await watched(router)
        stager.events.put_nowait(Silent(1.05))
        await asyncio.sleep(10)
        assert router.probe.asked[0] == owner.address
        assert set(router.probe.asked) == {owner.address}
        assert 9 <= len(router.probe.asked) <= 11
        assert standing(router, owner) == (READY, "")
        stager.events.put_nowait(Heard())
        await turns()
        asked = len(router.probe.asked)
        await asyncio.sleep(10)
        assert len(router.probe.asked) == asked
        await router.stop()

    in_virtual_time(main)


def test_a_silent_stager_whose_engine_does_not_answer_is_a_node_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    """As soon as the engine was asked, until something is heard of either."""

    async def main() -> None:
        router = Router(3)
        owner, stager = await watched(router)
        router.probe.takes_s = 0.35
        router.probe.dead.add(owner.address)
        stager.events.put_nowait(Silent(1.05))
        await asyncio.sleep(0.3)
        assert standing(router, owner)[0] is READY
        await asyncio.sleep(0.1)
        assert standing(router, owner) == (DOWN, "its stager is silent; its engine does not answer either")
        router.probe.dead.clear()
        await asyncio.sleep(2)
        assert standing(router, owner)[0] is READY
        router.probe.dead.add(owner.address)
        await asyncio.sleep(2)
        assert standing(router, owner)[0] is DOWN
        stager.events.put_nowait(Heard())
        await turns()
        assert standing(router, owner)[0] is READY
        await router.stop()

    in_virtual_time(main)
    assert "has been silent for 1.1 s; its engine is asked directly" in caplog.text


# ---- a lost stager


@pytest.mark.parametrize("is_seen", [True, False])
def test_an_engine_that_was_started_anew_while_its_stager_is_lost_is_sent_nothing_that_was_leased(is_seen: bool) -> None:
    """It answers well, and knows no adapter: a request would be answered 404. Seen by a question while it was away, or by the connection that it closed."""

    async def main() -> None:
        router = Router(3)
        owner, stager = await watched(router)
        await router.residency.ensure(owner, "a")
        stager.first_state = None
        stager.events.put_nowait(StagerUnavailable("gone"))
        await asyncio.sleep(2)
        assert router.residency.lease(owner, "a")
        router.probe.dead.add(owner.address)
        if not is_seen:
            router.probe.hang_up.set()
        await asyncio.sleep(1.5 if is_seen else 0.1)
        assert standing(router, owner)[0] is DOWN
        router.probe.dead.clear()
        await asyncio.sleep(2)
        assert standing(router, owner)[0] is DRAINING
        assert router.residency.lease(owner, "a") is None
        await router.stop()

    in_virtual_time(main)


def test_an_engine_that_closes_idle_connections_keeps_its_leases() -> None:
    """It answers when it is asked, which it is no more than every second."""

    async def main() -> None:
        router = Router(3)
        router.probe.hang_up.set()
        owner, stager = await watched(router)
        await router.residency.ensure(owner, "a")
        stager.first_state = None
        stager.events.put_nowait(StagerUnavailable("gone"))
        await asyncio.sleep(10)
        assert router.residency.lease(owner, "a")
        assert len(router.probe.asked) <= 21
        await router.stop()

    in_virtual_time(main)


def test_a_stopping_stagers_engine_is_asked_directly() -> None:
    """A node that is told to stop may lose its engine first."""

    async def main() -> None:
        router = Router(3)
        owner, stager = await watched(router)
        await router.residency.ensure(owner, "a")
        stager.events.put_nowait(NodeState(False, "the stager is stopping", "first", resumed=True, draining=True))
        await asyncio.sleep(2)
        assert standing(router, owner)[0] is DRAINING
        router.probe.dead.add(owner.address)
        await asyncio.sleep(1.5)
        assert standing(router, owner)[0] is DOWN
        assert router.residency.lease(owner, "a") is None
        await router.stop()

    in_virtual_time(main)


@pytest.mark.parametrize("end", [StagerUnavailable("gone"), NoSpace("of another kind"), RuntimeError("a fault of ours"), None])
def test_a_lost_stagers_leases_go_on_counting_when_its_engine_answers(end: LoraExtprocError | None) -> None:
    """It deletes nothing. Nothing is staged there, and it is tried again until it is back."""

    async def main() -> None:
        router = Router(3)
        owner, stager = await watched(router)
        await router.residency.ensure(owner, "a")
        stager.first_state = None
        stager.events.put_nowait(end)
        await asyncio.sleep(10)
        assert standing(router, owner)[0] is DRAINING
        assert "is lost" in standing(router, owner)[1]
        assert stager.watched == 2  # it is asked, and says nothing yet
        assert (await serve(router, chat("a"))).first_destination() == owner.address
        assert (await serve(router, chat("base"))).first_destination() != owner.address
        stager.events.put_nowait(NodeState(True, "", "first", resumed=True))
        await asyncio.sleep(1)
        assert standing(router, owner) == (READY, "")
        assert router.residency.lease(owner, "a")
        asked = len(router.probe.asked)
        await asyncio.sleep(10)
        assert len(router.probe.asked) == asked
        await router.stop()

    in_virtual_time(main)


def test_a_lost_stagers_node_is_down_when_its_engine_does_not_answer() -> None:
    """A cable, a power supply. Its keys go on; when either is heard again they come back."""

    async def main() -> None:
        router = Router(3)
        owner, stager = await watched(router)
        await router.residency.ensure(owner, "a")
        router.probe.dead.add(owner.address)
        router.probe.takes_s = 0.35
        stager.first_state = None
        stager.events.put_nowait(StagerUnavailable(f"stager {stager.address}: silent for 3.0 s"))
        await asyncio.sleep(0.5)
        why = f"stager {stager.address} is lost: silent for 3.0 s; its engine does not answer either"
        assert standing(router, owner) == (DOWN, why)
        assert (await serve(router, chat("a"))).first_destination() == router.pool.candidates("a")[1].address
        router.probe.dead.clear()
        await asyncio.sleep(2)
        assert standing(router, owner)[0] is DRAINING
        await router.stop()

    in_virtual_time(main)


def test_an_engine_that_hangs_is_found_out_though_its_stager_refuses_every_new_stream() -> None:
    """The question takes two seconds, a refused stream half of one: the question must outlive it."""

    async def main() -> None:
        router = Router(3)
        owner, stager = await watched(router)
        router.probe.dead.add(owner.address)
        router.probe.takes_s = 2.35
        stager.first_state = None
        for _ in range(20):
            stager.events.put_nowait(StagerUnavailable("refused"))
        await asyncio.sleep(2.5)
        assert stager.watched >= 4
        assert router.probe.given_up == 0
        assert standing(router, owner)[0] is DOWN
        await router.stop()

    in_virtual_time(main)


def test_what_a_router_stops_while_a_stager_is_lost_it_stops_whole() -> None:
    """No question to an engine is left behind."""

    async def main() -> None:
        router = Router(1)
        _, stager = await watched(router)
        router.probe.takes_s = 1.0
        stager.first_state = None
        stager.events.put_nowait(StagerUnavailable("gone"))
        await asyncio.sleep(0.2)
        await router.stop()
        assert router.probe.given_up == 1
        assert {task.get_name() for task in asyncio.all_tasks()} == {asyncio.current_task().get_name()}  # type: ignore[union-attr]

    in_virtual_time(main)


def test_what_went_while_the_stream_was_broken_is_forgotten() -> None:
    """It is told before the node's state is, so that nothing is staged by an old belief in between."""

    async def main() -> None:
        router = Router(1)
        owner, stager = await watched(router)
        for name in "ab":
            await router.residency.ensure(owner, name)
        stager.first_state = None
        stager.events.put_nowait(StagerUnavailable("gone"))
        stager.events.put_nowait(Evicted("a"))
        await asyncio.sleep(10)
        assert standing(router, owner)[0] is DRAINING
        assert [bool(router.residency.lease(owner, name)) for name in "ab"] == [False, True]
        stager.events.put_nowait(NodeState(True, "", "first", resumed=True))
        await asyncio.sleep(1)
        assert standing(router, owner) == (READY, "")
        assert [bool(router.residency.lease(owner, name)) for name in "ab"] == [False, True]
        await router.stop()

    in_virtual_time(main)


def test_an_unexpected_error_in_a_watch_does_not_end_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with its traceback, and the stream begins anew."""

    async def main() -> None:
        router = Router(1)
        owner, stager = await watched(router)
        forget = router.residency.forget
        monkeypatch.setattr(router.residency, "forget", None)
        stager.events.put_nowait(Evicted("a"))
        await asyncio.sleep(0.1)
        assert standing(router, owner)[0] is DRAINING
        monkeypatch.setattr(router.residency, "forget", forget)
        await router.residency.ensure(owner, "b")
        stager.events.put_nowait(Evicted("b"))
        await asyncio.sleep(1)
        assert (stager.watched, standing(router, owner)) == (2, (READY, ""))
        assert not router.residency.lease(owner, "b")
        await router.stop()

    in_virtual_time(main)
    assert "met an error of the router's own" in caplog.text
    assert "TypeError" in caplog.text


# ---- who waits for a change


async def test_a_change_wakes_all_who_wait_for_one() -> None:
    """What changes nothing wakes nobody."""
    router = Router()
    [endpoint, *_] = router.pool.table.endpoints
    waiting = [asyncio.create_task(router.membership.changed(60.0)) for _ in range(3)]
    await turns()
    router.membership.observe(endpoint, engine_answers=True)
    await turns()
    assert not any(wait.done() for wait in waiting)
    version = router.membership.snapshot.version
    router.membership.observe(endpoint, stager=Stager.STOPPING, why="why")
    await asyncio.gather(*waiting)
    assert router.membership.snapshot.version == version + 1


def test_a_wait_for_a_change_ends_by_itself() -> None:
    """Nobody may be waiting for a change that comes through another door."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await Router().membership.changed(0.5)
        assert loop.time() - began == 0.5

    in_virtual_time(main)


async def test_equal_choices_take_turns() -> None:
    """Requests for a base model spread over all, and each names the others for a retry."""
    router = Router()
    endpoints = router.pool.table.endpoints
    orders = [(await serve(router, chat("base"))).destination().split(",") for _ in range(6)]
    assert sorted(order[0] for order in orders) == sorted(2 * [e.address for e in endpoints])
    assert all(set(order) == {e.address for e in endpoints} for order in orders)
