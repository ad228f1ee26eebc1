"""Replacing router replicas under load."""

import asyncio
import signal

import aiohttp

from .client import Client
from .conftest import StackFactory

REQUESTS_PER_S = 200


async def test_rolling_two_routers_loses_no_request(start: StackFactory) -> None:
    """Each is told to stop and started again in turn, while adapters and the base model are asked for."""
    async with start({"envoy": {"router_health_interval_s": 0.5}, "router": {"lameduck_s": 2.0}}, routers=2) as stack:
        client = Client(stack.address)
        loop = asyncio.get_running_loop()
        rolled = asyncio.Event()
        requests: list[asyncio.Task[int]] = []

        async def ask(number: int) -> int:
            return (await client.chat(("team/a", "team/b", "flat", stack.base_model.served_name)[number % 4])).status

        async def load() -> None:
            began = loop.time()
            while not rolled.is_set():
                requests.append(asyncio.create_task(ask(len(requests))))
                await asyncio.sleep(max(0.0, began + len(requests) / REQUESTS_PER_S - loop.time()))

        loading = asyncio.create_task(load())
        for name in ("router-1", "router-2"):
            process = stack.process(name).process
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            await stack.restart(name)
            await _until_envoy_sees(stack.admin, [router.listen for router in stack.routers])
        rolled.set()
        await loading
        statuses = await asyncio.gather(*requests)
        await client.close()
    assert len(statuses) > 500
    assert set(statuses) == {200}


async def _until_envoy_sees(admin: str, routers: list[str]) -> None:
    """Wait until Envoy's health check has found every replica well: only then may the next one go."""
    wanted = [f"lora_extproc_router::{address}::health_flags::healthy" for address in routers]
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"http://{admin}/clusters") as response:
                if set(wanted) <= set((await response.text()).splitlines()):
                    return
            await asyncio.sleep(0.05)
