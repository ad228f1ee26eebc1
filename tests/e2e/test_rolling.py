"""Replacing router replicas, and a router's workers, under load."""

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp

from extproc.up.stack import Stack
from tests.fakes.wait import PATIENCE_S

from .client import Client
from .conftest import StackFactory

REQUESTS_PER_S = 200


async def test_rolling_two_routers_loses_no_request(start: StackFactory) -> None:
    """Each is told to stop and started again in turn, while adapters and the base model are asked for."""
    async with start({"envoy": {"router_health_interval_s": 0.5}, "router": {"lameduck_s": 2.0}}, routers=2) as stack, _load(stack) as answers:
        for name in ("router-1", "router-2"):
            process = stack.process(name).process
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            await stack.restart(name)
            await until_envoy_sees(stack.admin, [router.listen for router in stack.routers])
    assert len(answers) > 500
    assert Counter(answers).keys() == {(200, "")}


async def test_a_killed_router_costs_at_most_what_it_was_answering(start: StackFactory) -> None:
    """What the dead one had not begun to answer is asked of the other, before a health check has missed it: Envoy's retry of the ext_proc stream."""
    async with start({"envoy": {"router_health_interval_s": 5}}, routers=2) as stack, _load(stack) as answers:
        await _until(lambda: len(answers) > 100)
        stack.process("router-1").process.kill()
        await _until(lambda: len(answers) > 500)
    failed = [answer for answer in answers if answer[0] != 200]
    assert len(failed) <= 5, Counter(failed)  # some 200 requests would meet the dead one


async def test_a_killed_worker_costs_at_most_what_it_was_answering(start: StackFactory) -> None:
    """Envoy makes a new connection and repeats there what the dead one had not begun to answer. Each in turn, since Envoy's one thread asks one of them."""
    async with start({"router": {"workers": 2}}) as stack, _load(stack) as answers, aiohttp.ClientSession(f"http://{stack.router_http}") as session:
        router = stack.process("router-1").process.pid
        first = _children(router)
        for worker in first:
            os.kill(worker, signal.SIGKILL)
            await _until_more(answers, 300)
            while 'lora_extproc_workers{state="serving"} 2.0' not in await (await session.get("/metrics")).text():
                await asyncio.sleep(0.05)
        assert not set(first) & set(_children(router))
    failed = [answer for answer in answers if answer[0] != 200]
    assert len(failed) <= 10, Counter(failed)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextlib.asynccontextmanager
async def _load(stack: Stack) -> AsyncIterator[list[tuple[int, str]]]:
    """REQUESTS_PER_S while the block runs; the status of each answer, and the reason where it is an error."""
    client = Client(stack.address)
    loop = asyncio.get_running_loop()
    answers: list[tuple[int, str]] = []
    requests: list[asyncio.Task[None]] = []

    async def ask(number: int) -> None:
        answer = await client.chat(("team/a", "team/b", "flat", stack.base_model.served_name)[number % 4])
        answers.append((answer.status, "" if answer.status == 200 else answer.text))

    async def load() -> None:
        began = loop.time()
        while True:
            requests.append(asyncio.create_task(ask(len(requests))))
            await asyncio.sleep(max(0.0, began + len(requests) / REQUESTS_PER_S - loop.time()))

    loading = asyncio.create_task(load())
    try:
        yield answers
    finally:
        loading.cancel()
        await asyncio.gather(*requests)
        await client.close()


async def until_envoy_sees(admin: str, routers: list[str]) -> None:
    """Wait until Envoy's health check has found every replica well: only then may the next one go."""
    wanted = [f"lora_extproc_router::{address}::health_flags::healthy" for address in routers]
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"http://{admin}/clusters") as response:
                if set(wanted) <= set((await response.text()).splitlines()):
                    return
            await asyncio.sleep(0.05)


async def _until_more(answers: list[tuple[int, str]], count: int) -> None:
    enough = len(answers) + count
    await _until(lambda: len(answers) >= enough)


async def _until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not happened():
            await asyncio.sleep(0.05)
