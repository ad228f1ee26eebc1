"""Which requests of the simulated engine run and which wait: never kinder than a vLLM."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from extproc.sim.scheduler import KV_TOKENS, Scheduler
from tests.fakes.wait import turns


class Requests:
    """Requests that run until they are ended, in the order in which they were sent."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.runs: list[str] = []

    async def send(self, *requests: str, tokens: int = 1) -> None:
        """Each is `adapter/number`; without an adapter it is the base model's."""
        for request in requests:
            self._ends[request] = asyncio.Event()
            self._tasks[request] = asyncio.create_task(self._run(request, tokens))
            await turns()

    async def _run(self, request: str, tokens: int) -> None:
        async with self._scheduler.turn(request.partition("/")[0], tokens):
            self.runs.append(request)
            await self._ends[request].wait()
        self.runs.remove(request)

    async def end(self, *requests: str) -> None:
        for request in requests:
            self._ends[request].set()
        await turns()

    async def cancel(self, request: str) -> None:
        self._tasks[request].cancel()
        await turns()

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


async def test_no_more_requests_run_than_there_are_places() -> None:
    """The base model's count, too; the first that came is the first to go on."""
    scheduler = Scheduler(max_loras=8, max_num_seqs=2)
    requests = Requests(scheduler)
    await requests.send("a/1", "/1", "b/1", "/2", "a/2")
    assert (requests.runs, scheduler.waiting) == (["a/1", "/1"], 3)
    await requests.end("a/1")
    assert (requests.runs, scheduler.waiting) == (["/1", "b/1"], 2)
    await requests.end("b/1", "/1")
    assert requests.runs == ["/2", "a/2"]
    await requests.close()
    assert (scheduler.running.total(), scheduler.waiting, scheduler.kv_usage) == (0, 0, 0.0)


async def test_a_request_whose_adapter_has_no_slot_keeps_its_place_in_the_queue() -> None:
    """Others are let past it, and it goes before those that came after it once there is a slot."""
    scheduler = Scheduler(max_loras=1, max_num_seqs=3)
    requests = Requests(scheduler)
    await requests.send("a/1", "b/1", "c/1", "a/2", "/1")
    assert (requests.runs, scheduler.waiting) == (["a/1", "a/2", "/1"], 2)
    await requests.end("a/1", "a/2")
    assert (requests.runs, scheduler.waiting) == (["/1", "b/1"], 1)
    await requests.end("b/1")
    assert requests.runs == ["/1", "c/1"]
    await requests.close()


async def test_nothing_starts_that_the_cache_cannot_hold() -> None:
    """And nothing goes past it: vLLM's queue stands still then."""
    scheduler = Scheduler(max_loras=8, max_num_seqs=8)
    requests = Requests(scheduler)
    await requests.send("a/1", tokens=KV_TOKENS // 2)
    assert scheduler.kv_usage == pytest.approx(0.5)
    await requests.send("b/1", tokens=KV_TOKENS)
    await requests.send("c/1")
    assert requests.runs == ["a/1"]
    await requests.end("a/1")
    assert requests.runs == ["b/1"]
    assert scheduler.kv_usage == 1.0
    await requests.end("b/1")
    assert requests.runs == ["c/1"]
    await requests.close()


async def test_who_goes_while_waiting_takes_no_place() -> None:
    """A client that hangs up in the queue leaves it, also in the moment in which its turn comes."""
    scheduler = Scheduler(max_loras=8, max_num_seqs=1)
    requests = Requests(scheduler)
    await requests.send("a/1", "b/1", "c/1", "d/1")
    await requests.cancel("b/1")
    assert scheduler.waiting == 2
    requests._tasks["c/1"].cancel()
    requests._ends["a/1"].set()
    await turns()
    assert requests.runs == ["d/1"]
    await requests.close()
    assert (scheduler.running.total(), scheduler.waiting) == (0, 0)


async def test_the_adapters_that_run_are_named_once_each() -> None:
    """As the labels of the engine's metrics have them, without the base model."""
    scheduler = Scheduler(max_loras=2, max_num_seqs=8)
    async with AsyncExitStack() as stack:
        for name in ("a", "", "b", "a"):
            await stack.enter_async_context(scheduler.turn(name, 1))
        assert (scheduler.adapters, scheduler.running.total()) == (["a", "b"], 4)
