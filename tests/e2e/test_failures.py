"""What the failure of each part looks like to a client of the real Envoy."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from extproc.config.origins import OriginSettings
from extproc.up.stack import Stack
from tests.fakes.origin_server import OriginServer
from tests.fakes.wait import PATIENCE_S

from .client import Answer, Client, weights_of
from .conftest import StackFactory

HEAVY = "team/a"
WEIGHTS = f"{HEAVY}/adapter_model.safetensors"


@contextlib.asynccontextmanager
async def _serving(start: StackFactory, root: Path, raw: dict[str, object] | None = None) -> AsyncIterator[tuple[Stack, Client, OriginServer]]:
    async with OriginServer(root) as server, start(raw, origins=(OriginSettings(type="http", url=server.url, allow_private=True),)) as stack:
        client = Client(stack.address)
        try:
            yield stack, client, server
        finally:
            await client.close()


async def _until(stack: Stack, metric: str, value: float) -> None:
    """Wait until the router shows `metric value`."""
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"http://{stack.router_http}/metrics") as response:
                if f"\n{metric} {value}\n" in await response.text():
                    return
            await asyncio.sleep(0.02)


async def test_a_thousand_cold_requests_are_one_fetch(start: StackFactory, origin: Path) -> None:
    """All wait for the same flight, all are answered with the adapter's weights."""
    async with _serving(start, origin) as (stack, client, server):
        server.gate.clear()
        requests = [asyncio.create_task(client.chat(HEAVY)) for _ in range(1000)]
        await _until(stack, "lora_extproc_held_requests", 1000.0)
        server.gate.set()
        answers = await asyncio.gather(*requests)
        assert {(answer.status, answer.weights) for answer in answers} == {(200, weights_of(origin, HEAVY))}
        assert server.gets[WEIGHTS] == 1


async def test_a_client_that_hangs_up_changes_nothing_for_others(start: StackFactory, origin: Path) -> None:
    """The first of two waiters, whose request began the fetch, goes away."""
    async with _serving(start, origin) as (stack, client, server):
        server.gate.clear()
        first = asyncio.create_task(client.chat(HEAVY))
        await _until(stack, "lora_extproc_held_requests", 1.0)
        second = asyncio.create_task(client.chat(HEAVY))
        await _until(stack, "lora_extproc_held_requests", 2.0)
        first.cancel()
        await _until(stack, "lora_extproc_held_requests", 1.0)
        server.gate.set()
        assert (await second).weights == weights_of(origin, HEAVY)
        assert server.gets[WEIGHTS] == 1


async def test_the_deadline_answers_503_and_the_next_request_hits(start: StackFactory, origin: Path) -> None:
    """With Retry-After, while the fetch goes on."""
    async with _serving(start, origin, {"router": {"stage_deadline_s": 0.3}}) as (_, client, server):
        server.gate.clear()
        late = await client.chat(HEAVY)
        assert (late.status, late.code) == (503, "staging")
        assert int(late.headers["retry-after"]) > 0
        server.gate.set()
        while (answer := await client.chat(HEAVY)).status == 503:
            await asyncio.sleep(0.02)
        assert answer.weights == weights_of(origin, HEAVY)
        assert server.gets[WEIGHTS] == 1


async def test_an_origin_that_is_down_is_502_and_its_return_is_noticed(start: StackFactory, origin: Path) -> None:
    """Not 404: nothing is known of the adapter."""
    async with _serving(start, origin) as (_, client, server):
        server.status = 500
        answer = await client.chat(HEAVY)
        assert (answer.status, answer.code) == (502, "origin_failed")
        server.status = 0
        assert (await client.chat(HEAVY)).status == 200


async def test_a_dead_node_costs_its_clients_a_retry_at_most(start: StackFactory, origin: Path) -> None:
    """Stager and engine of the owner are killed; the adapter is served by the other node, with the same weights."""
    async with start() as stack:
        client = Client(stack.address)
        assert (await client.chat(HEAVY)).status == 200
        async with aiohttp.ClientSession() as session, session.get(f"http://{stack.router_http}/v1/owner/{HEAVY}") as response:
            owner = (await response.json())["candidates"][0]["node"]
        for part in ("engine", "stager"):
            stack.process(f"{owner}-{part}").process.send_signal(signal.SIGKILL)
        answers: list[Answer] = []
        while not answers or answers[-1].status != 200:
            answers.append(await client.chat(HEAVY))
        assert {answer.status for answer in answers[:-1]} <= {503}
        assert all("retry-after" in answer.headers or "gateway" in answer.text for answer in answers[:-1])
        assert answers[-1].weights == weights_of(origin, HEAVY)
        await client.close()


async def test_an_engine_that_dies_alone_is_left_out(start: StackFactory, origin: Path) -> None:
    """Its stager tells the router; the other node serves."""
    async with start() as stack:
        client = Client(stack.address)
        stack.process("node-1-engine").process.kill()
        await _until(stack, 'lora_extproc_endpoints{state="down"}', 1.0)
        for name in ("team/a", "team/b", "team/c", "flat"):
            answer = await client.chat(name)
            assert (answer.status, answer.weights) == (200, weights_of(origin, name))
        await client.close()


async def test_without_the_router_nothing_passes_unprocessed(start: StackFactory) -> None:
    """503 in JSON, from Envoy: never an unprocessed request at a random engine."""
    async with start() as stack:
        client = Client(stack.address)
        stack.process("router-1").process.kill()
        await stack.process("router-1").process.wait()
        answer = await client.chat(HEAVY)
        assert (answer.status, answer.code) == (503, "gateway")
        await client.close()


async def test_eviction_never_costs_an_engine_its_life(start: StackFactory, origin: Path) -> None:
    """A disk that holds two of four adapters and leases that end at once: adapters come and go, every answer has its own weights."""
    size = sum(path.stat().st_size for path in (origin / "team/a").iterdir()) + 3 * 4096
    raw = {"stager": {"max_bytes": 2 * size, "lease_s": 0.6}}
    names = ("team/a", "team/b", "team/c", "flat")
    async with start(raw, nodes=1) as stack:
        client = Client(stack.address)
        for turn in range(12):
            name = names[turn % len(names)]
            while (answer := await client.chat(name)).status == 503:
                assert answer.code == "no_space"  # both are leased: it says so and is worth repeating
                await asyncio.sleep(0.05)
            assert (answer.status, answer.weights) == (200, weights_of(origin, name))
        assert stack.process("node-1-engine").process.returncode is None
        await client.close()


async def test_a_refused_connection_goes_to_the_next_of_the_list(start: StackFactory) -> None:
    """Envoy's retry walks our list. The stager is stopped, so that it cannot tell the router that its engine has died."""
    async with start() as stack:
        client = Client(stack.address)
        stager, engine = (stack.process(f"node-1-{part}").process for part in ("stager", "engine"))
        stager.send_signal(signal.SIGSTOP)
        try:
            engine.kill()
            await engine.wait()
            answers = await asyncio.gather(*(client.chat(stack.base_model.served_name) for _ in range(40)))
        finally:
            stager.send_signal(signal.SIGCONT)
            await client.close()
        assert {answer.status for answer in answers} == {200}
        assert any(answer.headers["x-envoy-attempt-count"] == "2" for answer in answers)
