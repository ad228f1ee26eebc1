"""An API server in memory that fails on cue: lists in pages, watches with a history that can be forgotten, and the verbs on single objects.

It does what the reflector and the leader need of a real one, and has the failures that a real one cannot be told to have.
"""

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from extproc.kubernetes.access import Access

from .wait import until

Object = dict[str, Any]


class ApiServer:
    """Every object of every kind by its path, `/api/v1/namespaces/llm/pods/one`. Each write has a version of its own."""

    def __init__(self) -> None:
        self.url = ""
        self.version = 1
        self.objects: dict[str, Object] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, query
        self.headers: list[dict[str, str]] = []
        self.refused: dict[str, tuple[int, str]] = {}  # by "list", "watch", a method or a path: what is answered instead
        self.retry_after = ""
        self.hanging: set[str] = set()
        self.expired_pages = 0  # so many requests for a further page are answered 410
        self.gone_within = False  # 410 comes as an event of the watch, not as its answer
        self.watches = 0  # open now
        self._history: list[tuple[int, str, str, Object]] = []  # version, type, path of the collection, object
        self._oldest = 0
        self._changed = asyncio.Condition()
        self._lines: list[bytes] = []  # said to all watches that are open, whatever they asked for
        self._said: list[int] = []  # of each watch, how many lines it had when it was written to last
        self._turn = 0  # of `_changed`, so that a watch that was writing meanwhile misses none
        self._cuts = 0

    # -- what a test does

    async def put(self, path: str, **fields: Any) -> None:
        """Make an object, or replace it."""
        known = path in self.objects
        self._put(path, fields)
        await self._record("MODIFIED" if known else "ADDED", path, self.objects[path])

    async def delete(self, path: str) -> None:
        gone = self.objects.pop(path)
        self.version += 1
        gone["metadata"]["resourceVersion"] = str(self.version)
        await self._record("DELETED", path, gone)

    async def bookmark(self) -> None:
        """Tell all watches the version now, and nothing else."""
        await self._say({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(self.version)}}})

    async def error(self, code: int, message: str) -> None:
        await self._say({"type": "ERROR", "object": {"kind": "Status", "code": code, "message": message}})

    async def say(self, line: bytes) -> None:
        """Any bytes at all, to all watches."""
        async with self._changed:
            self._lines.append(line)
            self._turn += 1
            self._changed.notify_all()
        await until(lambda: self._said.count(len(self._lines)) == self.watches)

    def compact(self) -> None:
        """Forget all that was before now."""
        self._history.clear()
        self._oldest = self.version

    async def cut(self) -> None:
        """Break all watches, after what was said."""
        async with self._changed:
            self._cuts += 1
            self._turn += 1
            self._changed.notify_all()
        await until(lambda: not self.watches)

    async def until_watched(self, times: int) -> None:
        """Until so many watches have been asked for."""
        await self.until_asked("watch", times)
        await until(lambda: self.watches)

    async def until_asked(self, verb: str, times: int) -> None:
        await until(lambda: len(self.asked(verb)) >= times)

    def asked(self, verb: str) -> list[dict[str, str]]:
        """The queries of all lists, or of all watches."""
        return [query for method, path, query in self.requests if _verb(method, path, query) == verb]

    # -- what it answers

    async def answer(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        self.requests.append((request.method, request.path, query))
        self.headers.append(dict(request.headers))
        verb = _verb(request.method, request.path, query)
        if verb in self.hanging:
            await asyncio.Event().wait()
        for what in (verb, request.path):
            if what in self.refused:
                return self._refuse(*self.refused[what])
        match verb:
            case "list":
                return self._list(request.path, query)
            case "watch":
                return await self._watch(request, query)
            case "POST":
                body = await request.json()
                path = f"{request.path}/{body['metadata']['name']}"
                return self._refuse(409, f"{path} already exists") if path in self.objects else self._written(path, body)
        path = request.path
        if request.method == "PATCH":
            return self._written(path.removesuffix("/status"), json.loads(await request.text()))
        if path not in self.objects:
            return self._refuse(404, f"{path} not found")
        if request.method == "PUT":
            body = await request.json()
            if body["metadata"].get("resourceVersion") != self.objects[path]["metadata"]["resourceVersion"]:
                return self._refuse(409, "the object has been modified; please apply your changes to the latest version and try again")
            return self._written(path, body)
        if request.method == "DELETE":
            await self.delete(path)
            return web.json_response({"kind": "Status", "status": "Success"})
        return web.json_response(self.objects[path])

    def _list(self, collection: str, query: dict[str, str]) -> web.Response:
        limit, begin = int(query["limit"]), int(query.get("continue", "0"))
        if begin and self.expired_pages:
            self.expired_pages -= 1
            return self._refuse(410, "The provided continue parameter is too old")
        items = [one for path, one in sorted(self.objects.items()) if path.rpartition("/")[0] == collection]
        more = str(begin + limit) if begin + limit < len(items) else ""
        return web.json_response({"metadata": {"resourceVersion": str(self.version), "continue": more}, "items": items[begin : begin + limit]})

    async def _watch(self, request: web.Request, query: dict[str, str]) -> web.StreamResponse:
        after, said, cuts = int(query["resourceVersion"]), len(self._lines), self._cuts
        message = f"too old resource version: {after} ({self._oldest})"
        if after < self._oldest and not self.gone_within:
            return self._refuse(410, message)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if after < self._oldest:
            await response.write(_line({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired", "message": message}}))
            return response
        watch, self.watches = len(self._said), self.watches + 1
        self._said.append(said)
        try:
            async with asyncio.timeout(int(query["timeoutSeconds"])):
                while True:
                    turn = self._turn
                    for version, type_, collection, one in list(self._history):
                        if version > after and collection == request.path:
                            await response.write(_line({"type": type_, "object": one}))
                            after = version
                    for line in self._lines[said:]:
                        await response.write(line)
                    self._said[watch] = said = len(self._lines)
                    if self._cuts != cuts:
                        break
                    async with self._changed:
                        await self._changed.wait_for(lambda: self._turn != turn)  # noqa: B023
            assert request.transport is not None
            request.transport.close()
        except TimeoutError:
            pass
        finally:
            self._said[watch] = -1
            self.watches -= 1
        return response

    def _refuse(self, code: int, message: str) -> web.Response:
        headers = {"Retry-After": self.retry_after} if self.retry_after else {}
        return web.json_response({"kind": "Status", "code": code, "message": message}, status=code, headers=headers)

    def _written(self, path: str, body: Object) -> web.Response:
        self._put(path, {key: value for key, value in body.items() if key != "metadata"})
        return web.json_response(self.objects[path])

    def _put(self, path: str, fields: Object) -> None:
        self.version += 1
        metadata = {"resourceVersion": str(self.version), "uid": f"uid-{self.version}", **_names(path), **fields.pop("metadata", {})}
        self.objects[path] = {"metadata": metadata, **fields}

    async def _record(self, type_: str, path: str, one: Object) -> None:
        async with self._changed:
            self._history.append((self.version, type_, path.rpartition("/")[0], copy.deepcopy(one)))
            self._turn += 1
            self._changed.notify_all()

    async def _say(self, event: Object) -> None:
        await self.say(_line(event))


@asynccontextmanager
async def api_server() -> AsyncIterator[ApiServer]:
    server = ApiServer()
    app = web.Application()

    async def answer(request: web.Request) -> web.StreamResponse:
        return await server.answer(request)  # looked up now: a test may have put another in its place

    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await server.cut()
        await runner.cleanup()


def access(server: ApiServer, **more: Any) -> Access:
    return Access(server.url, "llm", **more)


def _verb(method: str, path: str, query: dict[str, str]) -> str:
    if method != "GET":
        return method
    if query.get("watch") == "true":
        return "watch"
    return "list" if "limit" in query else method


def _names(path: str) -> dict[str, str]:
    parts = path.split("/")
    return {"name": parts[-1], "namespace": parts[parts.index("namespaces") + 1]}


def _line(event: Object) -> bytes:
    return json.dumps(event).encode() + b"\n"
