"""Two real vLLMs under our stagers behind a real Envoy: many adapters on a small disk, refreshes under load, an engine that dies, broken adapters.

Every answer is compared with that of a fresh engine that has the adapter from its origin.
"""

import asyncio
import itertools
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from extproc.client import StagerClient
from extproc.core.artifact import split_version
from tests.fakes.fleet import Fleet, Layout

from .conftest import ADAPTER_BYTES, MANY, PROMPT, ROOM, TOKENS, Engines, Said, ask, spoil, started

pytestmark = pytest.mark.asyncio(loop_scope="module")

SOAK_S = float(os.environ.get("LORA_EXTPROC_SOAK_S", "60"))
WORKERS = 6  # what two tiny engines on two cores bear beside everything else
REFRESHES = 20
PATIENCE_S = 120.0
CLIENT_PAUSE_S = 0.5  # before the openai client repeats a failed request


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def engines(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engines]:
    async with started(vllm_python, tmp_path_factory.mktemp("vllm"), MANY) as engines:
        yield engines


async def metric(engines: Engines, name: str) -> float:
    """A metric's sum over both stagers and all labels."""
    total = 0.0
    for node in engines.stack.nodes:
        async with engines.session.get(f"http://{node.stager_http}/metrics") as response:
            lines = (await response.text()).splitlines()
        total += sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
    return total


async def test_many_adapters_on_a_small_disk_never_get_the_wrong_weights(engines: Engines) -> None:
    """60 adapters, 2 engines of 4 slots, room for 20 on each disk; Zipf. No engine dies, nothing is lost, every answer is the adapter's own."""
    expected = {name: await engines.own_answer(name, seed) for seed, name in enumerate(MANY)}
    assert len(set(expected.values())) > 55  # they can be told apart
    source = random.Random(1)
    weights = [1 / rank for rank in range(1, len(MANY) + 1)]
    answers: Counter[str] = Counter()
    wrong: list[tuple[str, int, str]] = []
    ends = asyncio.get_running_loop().time() + SOAK_S

    async def work() -> None:
        while asyncio.get_running_loop().time() < ends:
            name = source.choices(MANY, weights)[0]
            said = await engines.ask(name)
            answers[name] += 1
            if said.status != 200 or said.text != expected[name]:
                wrong.append((name, said.status, said.error or said.text))

    evicted = await metric(engines, "lora_extproc_evictions_total")
    await asyncio.gather(*(work() for _ in range(WORKERS)))
    evicted = await metric(engines, "lora_extproc_evictions_total{cause=") - evicted
    print(f"\n{answers.total()} requests of {len(answers)} adapters in {SOAK_S:g} s, {evicted:.0f} evictions tried, {len(wrong)} wrong")
    assert wrong == []
    assert engines.engines_alive()
    assert evicted > 0
    assert len(answers) > ROOM
    assert await metric(engines, 'lora_extproc_disk_bytes{kind="used"}') <= 2 * ROOM * ADAPTER_BYTES


async def test_a_refresh_has_no_seam(engines: Engines) -> None:
    """20 new versions under constant requests, some streaming: each answer is of one version wholly, none fails; after the last there is only the new."""
    name = "live/one"
    versions = [1000 + number for number in range(REFRESHES + 1)]
    texts = {await engines.own_answer(name, seed): seed for seed in versions}
    assert len(texts) == len(versions)
    engines.add(name, seed=versions[0])
    assert texts[(await engines.ask(name)).text] == versions[0]
    seen: list[int] = []
    done = asyncio.Event()

    async def work(number: int) -> None:
        while not done.is_set():
            said = await engines.ask(name, stream=number % 2 == 1)
            assert (said.status, said.error) == (200, "")
            assert len(said.models) == 1
            assert said.text in texts, f"an answer of no version: {said}"
            seen.append(texts[said.text])

    workers = [asyncio.create_task(work(number)) for number in range(4)]
    digests: list[str] = []
    for seed in versions[1:]:
        engines.add(name, seed=seed)
        held: set[str] = set()
        for node in engines.stack.nodes:
            async with StagerClient(node.stager) as client:
                if name in {adapter.name for adapter in (await client.list()).adapters}:
                    held.add((await client.refresh(name))[1])  # or it has just been staged in this version
        assert len(held) == 1
        digests += held
        answered = len(seen)
        async with asyncio.timeout(PATIENCE_S):
            while len(seen) < answered + 20:  # requests of this version
                await asyncio.sleep(0.01)
                assert not any(worker.done() for worker in workers), [worker.exception() for worker in workers if worker.done()]
    done.set()
    await asyncio.gather(*workers)
    assert len(set(digests)) == REFRESHES
    assert texts[(await engines.ask(name)).text] == versions[-1]
    assert len(set(seen)) > REFRESHES / 2
    for node in engines.stack.nodes:  # the old ones go when what was sent to them has arrived
        async with asyncio.timeout(PATIENCE_S):
            while len([known for known in await known_by(engines, node.engine) if known[0] == name]) > 1:
                await asyncio.sleep(0.5)


async def known_by(engines: Engines, engine: str) -> list[tuple[str, str]]:
    """The versions that an engine lists."""
    async with engines.session.get(f"http://{engine}/v1/models") as response:
        data = (await response.json())["data"]
    return [version for model in data if (version := split_version(model["id"])) is not None]


async def test_the_list_of_models_is_the_same_wherever_it_is_asked(engines: Engines) -> None:
    """Base model, adapters of both nodes and of their origin, as vLLM words them."""
    async with engines.session.get(f"http://{engines.stack.address}/v1/models") as response:
        listed = (await response.json())["data"]
    base, *adapters = listed
    assert (base["id"], base["root"], base["parent"], base["max_model_len"]) == ("tiny", "tiny", None, 256)  # where it lies on the node is not shown
    on_disk = set()
    for node in engines.stack.nodes:
        async with StagerClient(node.stager) as client:
            on_disk |= {adapter.name for adapter in (await client.list()).adapters}
    names = [model["id"] for model in adapters]
    there = {str(config.parent.relative_to(engines.origin)) for config in engines.origin.rglob("adapter_config.json")}
    assert names == sorted(names)
    assert {*on_disk, "demo/sql"} <= set(names) <= {*on_disk, *there}  # what came to the origin in the last minute may be missing
    assert all((model["parent"], model["root"]) == ("tiny", model["id"]) for model in adapters)


BROKEN = {
    "corrupt": "is no safetensors file, or cut short",
    "truncated": "cut short",
    "noweights": "no weights",
    "badjson": "adapter_config.json is not JSON",
    "wrongbase": "is for base model 'some/other-model'",
    "bigrank": "has rank 64; this node's engine takes up to 8",
    "badmodule": "zz_proj",
    "badshape": "is 32 wide; the base model has 64",
}


def make_broken(engines: Engines, kind: str) -> None:
    name = f"broken/{kind}"
    how = {"wrongbase": {"base_model": "some/other-model"}, "bigrank": {"rank": 64}, "badmodule": {"modules": ("zz_proj",)}, "badshape": {"width": 32}}
    directory = engines.add(name, seed=5, **how.get(kind, {}))  # type: ignore[arg-type]
    spoil(directory, kind)


@pytest.mark.parametrize("kind", list(BROKEN))
async def test_a_broken_adapter_is_a_422_with_a_reason(engines: Engines, kind: str) -> None:
    """What our own checks can catch the engine never sees; what only it can tell comes back in its words."""
    make_broken(engines, kind)
    before = await metric(engines, "lora_extproc_engine_loads_total")
    said = await engines.ask(f"broken/{kind}")
    error = json.loads(said.error)["error"]
    assert (said.status, error["code"]) == (422, "invalid_adapter")
    assert BROKEN[kind] in error["message"], error["message"]
    asked = await metric(engines, "lora_extproc_engine_loads_total") - before
    assert 1 <= asked <= 2 if kind == "badmodule" else asked == 0  # an engine that takes seconds to refuse has the other asked beside it
    assert engines.engines_alive()
    assert (await engines.ask("tiny")).status == 200


async def test_an_engine_that_is_killed_and_comes_back_costs_no_request(engines: Engines) -> None:
    """Its adapters go to the other node meanwhile; afterwards it is used again. What it was answering when it died is the client's to repeat."""
    names = [f"lasting/{number}" for number in range(4)]
    expected = {}
    for number, name in enumerate(names):
        engines.add(name, seed=2000 + number)
        expected[name] = await engines.own_answer(name, 2000 + number)
        assert (await engines.ask(name)).text == expected[name]
    owner = engines.stack.nodes[0]
    done = asyncio.Event()
    failed: list[str] = []
    answered = 0

    async def work(number: int) -> None:
        nonlocal answered
        while not done.is_set():
            name = names[number % len(names)]
            try:
                said = await engines.ask(name)
            except aiohttp.ClientError as error:
                failed.append(type(error).__name__)
                await asyncio.sleep(CLIENT_PAUSE_S)
                continue
            if said.status == 200:
                assert said.text == expected[name]
                answered += 1
            else:
                failed.append(said.error)
                await asyncio.sleep(CLIENT_PAUSE_S)

    async def count(more: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            wanted = answered + more
            while answered < wanted:
                await asyncio.sleep(0.1)

    workers = [asyncio.create_task(work(number)) for number in range(4)]
    await count(50)
    engine = engines.stack.process(f"{owner.name}-engine").process
    engine.send_signal(signal.SIGKILL)
    await engine.wait()
    await count(100)
    await engines.stack.restart(f"{owner.name}-engine")
    async with asyncio.timeout(PATIENCE_S), StagerClient(owner.stager) as client:
        async for event in client.watch():
            if getattr(event, "ready", False):
                break
    await count(100)
    done.set()
    await asyncio.gather(*workers)
    assert len(failed) <= 4, failed  # those that were in the engine when it died, one per worker
    async with asyncio.timeout(PATIENCE_S):
        while not await known_by(engines, owner.engine):
            await engines.ask(random.choice(names))
    assert engines.engines_alive()


async def test_a_pair_follows_a_join_and_a_drain_without_a_failed_request(engines: Engines, tmp_path: Path) -> None:
    """A router that follows a file, and an Envoy that follows the router: the second engine appears in the file, the first is drained until it is empty, and
    both serve again. Every answer is the adapter's own."""
    first, second = engines.stack.nodes
    names = [f"moving/{number}" for number in range(6)]
    expected = {}
    for number, name in enumerate(names):
        engines.add(name, seed=3000 + number)
        expected[name] = await engines.own_answer(name, 3000 + number)
    failed: list[Said] = []
    answered = 0
    layout = Layout(1, routers=1, base_model="tiny", settings={"router": {"stage_deadline_s": PATIENCE_S, "join_s": PATIENCE_S}})
    async with Fleet(layout, tmp_path, (first, second)) as fleet:

        async def work(number: int) -> None:
            nonlocal answered
            for turn in itertools.count(number):
                name = names[turn % len(names)]
                said = await ask(engines.session, f"http://{fleet.address}", name, PROMPT, tokens=TOKENS)
                if said.status != 200 or said.text != expected[name]:
                    failed.append(said)
                answered += 1

        async def more(count: int) -> None:
            wanted = answered + count
            async with asyncio.timeout(PATIENCE_S):
                while answered < wanted:
                    await asyncio.sleep(0.05)

        workers = [asyncio.create_task(work(number)) for number in range(4)]
        try:
            await more(3 * len(names))
            fleet.show((first, second))
            await fleet.until_standing("ready", second)
            await more(3 * len(names))
            drained = await fleet.run("drain", first.stager, "--wait", "--timeout", f"{PATIENCE_S:g}")
            assert drained.splitlines()[-1] == f"{first.stager}: empty"
            await more(3 * len(names))
            assert {name for name, _ in await known_by(engines, second.engine)} >= set(names)
            await fleet.run("undrain", first.stager)
            await fleet.until_standing("ready", first, second)
            await more(3 * len(names))
        finally:
            await fleet.run("undrain", first.stager)
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    assert failed == []
    assert engines.engines_alive()
