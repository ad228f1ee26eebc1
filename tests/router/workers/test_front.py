"""The HTTP side above several workers: who is asked what, and what is said when one does not answer."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from aiohttp import web

from extproc.metrics import RouterMetrics, WorkersMetrics
from extproc.router.workers.front import MAX_BODY_BYTES, Front, WorkerApi

from .test_sums import PASSED, values


class FakeWorker:
    """Answers every path with its own number and what it was asked; or with `status`, or not at all until `gate` is open."""

    def __init__(self, directory: Path, number: int) -> None:
        self.number = number
        self.path = str(directory / str(number))
        self.asked: list[tuple[str, str, bytes]] = []
        self.status = 200
        self.gate = asyncio.Event()
        self.gate.set()
        self.metrics = RouterMetrics()
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_route("*", "/{rest:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0)

    async def _metrics(self, _request: web.Request) -> web.Response:
        await self.gate.wait()
        return web.Response(body=self.metrics.render())

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.method, request.path_qs, await request.read()))
        return web.json_response({"worker": self.number}, status=self.status, headers={"x-made-by": str(self.number)})

    async def start(self) -> None:
        await self._runner.setup()
        await web.UnixSite(self._runner, self.path).start()

    async def stop(self) -> None:
        self.gate.set()
        await self._runner.cleanup()


class Scene:
    """Two workers below a front, and a client before it."""

    def __init__(self, workers: list[FakeWorker]) -> None:
        self.workers = workers
        self.apis = [WorkerApi(worker.path) for worker in workers]
        self.front = Front(WorkersMetrics(), lambda: None, lambda: self.apis)
        for api in self.apis:
            self.front.sums.begin(api.path)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.front.app), base_url="http://router")

    async def passed(self) -> float:
        return values((await self.client.get("/metrics")).content)[PASSED]


@contextlib.asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    workers = [FakeWorker(directory, number) for number in range(2)]
    for worker in workers:
        await worker.start()
    made = Scene(workers)
    try:
        yield made
    finally:
        await made.client.aclose()
        for api in made.apis:
            await api.close()
        for worker in workers:
            await worker.stop()


async def test_a_question_is_passed_to_one_worker(tmp_path: Path) -> None:
    """With its query; status and headers come back."""
    async with scene(tmp_path) as made:
        made.workers[0].status = 404
        answer = await made.client.get("/v1/owner/acme/sql", params={"header": "a: b"})
        assert (answer.status_code, answer.json(), answer.headers["x-made-by"]) == (404, {"worker": 0}, "0")
        assert [worker.asked for worker in made.workers] == [[("GET", "/v1/owner/acme/sql?header=a%3A+b", b"")], []]


async def test_the_next_worker_is_asked_where_one_is_gone(tmp_path: Path) -> None:
    """And when nobody is left, that is said."""
    async with scene(tmp_path) as made:
        await made.workers[0].stop()
        assert (await made.client.get("/v1/endpoints")).json() == {"worker": 1}
        await made.workers[1].stop()
        answer = await made.client.get("/v1/endpoints")
        assert (answer.status_code, answer.json()["error"]) == (503, "no_worker")


async def test_a_change_is_made_in_every_worker(tmp_path: Path) -> None:
    """With its body; one that could not be made somewhere is no success."""
    async with scene(tmp_path) as made:
        answer = await made.client.post("/v1/nodes/a/drain", content=b'{"why":"new kernel"}')
        assert (answer.status_code, answer.json()) == (200, {"worker": 0})
        assert all(worker.asked == [("POST", "/v1/nodes/a/drain", b'{"why":"new kernel"}')] for worker in made.workers)
        made.workers[1].status = 409
        answer = await made.client.delete("/v1/nodes/a/drain")
        assert (answer.status_code, answer.json()) == (409, {"worker": 1})
        await made.workers[0].stop()
        answer = await made.client.delete("/v1/nodes/a/drain")
        assert (answer.status_code, answer.json()["error"]) == (503, "no_worker")


async def test_a_change_is_bounded(tmp_path: Path) -> None:
    """Its body is held while it is passed on."""
    async with scene(tmp_path) as made:
        answer = await made.client.post("/v1/anything", content=bytes(MAX_BODY_BYTES + 1))
        assert (answer.status_code, answer.json()["error"]) == (413, "body_too_large")
        assert [worker.asked for worker in made.workers] == [[], []]


async def test_a_worker_that_hangs_is_scraped_as_it_was(tmp_path: Path) -> None:
    """The scrape ends, and the sum does not fall."""
    async with scene(tmp_path) as made:
        for worker in made.workers:
            worker.metrics.answered("pass", "")
        assert await made.passed() == 2
        made.workers[0].gate.clear()
        made.workers[1].metrics.answered("pass", "")
        assert await made.passed() == 3


async def test_what_a_dead_worker_counted_stays(tmp_path: Path) -> None:
    """As it was read last, though nobody scraped: it is read every few seconds."""
    async with scene(tmp_path) as made:
        for worker in made.workers:
            worker.metrics.answered("pass", "")
        await made.front._read_all()
        await made.workers[0].stop()
        dead = made.apis.pop(0)
        made.front.sums.end(dead.path)
        await dead.close()
        assert await made.passed() == 2
        made.workers[1].metrics.answered("pass", "")
        assert await made.passed() == 3
