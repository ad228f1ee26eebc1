"""List, then watch, against an API server that fails on cue."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from extproc.kubernetes import api as api_module
from extproc.kubernetes import reflector as reflector_module
from extproc.kubernetes.api import Api
from extproc.kubernetes.objects import PODS, Object
from extproc.kubernetes.reflector import Changes, Interrupted, Query, Reflector
from tests.fakes.kubernetes import ApiServer, access, api_server
from tests.fakes.wait import PATIENCE_S

HERE = "/api/v1/namespaces/llm/pods/"
QUERY = Query(PODS, "llm", labels="app=vllm", fields="spec.nodeName=n")


class Follower:
    """Applies what a reflector yields, as its users do, and keeps it."""

    def __init__(self, reflector: Reflector[Object]) -> None:
        self.reflector = reflector
        self.objects: dict[str, str] = {}  # key -> version
        self.said: list[Changes[Object] | Interrupted] = []
        self._news = asyncio.Event()

    async def follow(self) -> None:
        async with aclosing(self.reflector.changes()) as changes:
            async for news in changes:
                if isinstance(news, Changes):
                    for key in news.gone:
                        del self.objects[key]
                    self.objects.update((one.key, one.metadata.resource_version) for one in news.put)
                self.said.append(news)
                self._news.set()

    async def until(self, *names: str) -> None:
        """Until exactly these objects are there, and nothing is interrupted."""
        wanted = {f"llm/{name}" for name in names}
        await self._until(lambda: bool(self.said) and isinstance(self.said[-1], Changes) and self.objects.keys() == wanted)

    async def until_interrupted(self, words: str) -> None:
        await self._until(lambda: bool(self.said) and isinstance(self.said[-1], Interrupted) and words in self.said[-1].why)

    @property
    def interruptions(self) -> list[str]:
        return [news.why for news in self.said if isinstance(news, Interrupted)]

    async def _until(self, condition: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def following(server: ApiServer, watch_s: float = 60.0, timeout_s: float = 5.0) -> AsyncIterator[Follower]:
    async with Api(access(server), timeout_s) as api:
        follower = Follower(Reflector(api, QUERY, Object, watch_s))
        task = asyncio.create_task(follower.follow())
        try:
            yield follower
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiServer]:
    monkeypatch.setattr(reflector_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(reflector_module, "MAX_PAUSE_S", 0.05)
    async with api_server() as server:
        yield server


async def test_objects_that_come_change_and_go_are_followed(server: ApiServer) -> None:
    """With the selectors of the query, in one list and one watch."""
    await server.put(HERE + "a")
    async with following(server) as follower:
        await follower.until("a")
        await server.put(HERE + "b")
        await follower.until("a", "b")
        before = follower.objects["llm/a"]
        await server.put(HERE + "a")
        await server.delete(HERE + "b")
        await follower.until("a")
        assert follower.objects["llm/a"] != before
        assert not follower.interruptions
    [listed], [watched] = server.asked("list"), server.asked("watch")
    for query in (listed, watched):
        assert query["labelSelector"] == "app=vllm"
        assert query["fieldSelector"] == "spec.nodeName=n"
    assert watched["allowWatchBookmarks"] == "true"


async def test_an_empty_list_is_said(server: ApiServer) -> None:
    """Else nobody would know it from one that has not come."""
    async with following(server) as follower:
        await follower.until()
        assert follower.said == [Changes()]


async def test_a_list_comes_in_pages(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages are one list."""
    monkeypatch.setattr(reflector_module, "PAGE_OBJECTS", 3)
    for name in "abcdefgh":
        await server.put(HERE + name)
    async with following(server) as follower:
        await follower.until(*"abcdefgh")
        assert len(follower.said) == 1
    assert [query.get("continue") for query in server.asked("list")] == [None, "3", "6"]


async def test_a_list_whose_pages_grow_too_old_is_begun_again(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow reader's next page is of a version that was compacted; that is no interruption."""
    monkeypatch.setattr(reflector_module, "PAGE_OBJECTS", 3)
    for name in "abcd":
        await server.put(HERE + name)
    server.expired_pages = 2
    async with following(server) as follower:
        await follower.until(*"abcd")
        assert not follower.interruptions
    assert [query.get("continue") for query in server.asked("list")] == [None, "3", None, "3", None, "3"]


async def test_more_objects_than_are_bearable_are_refused(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a list, and as a watch adds them."""
    monkeypatch.setattr(reflector_module, "MAX_OBJECTS", 2)
    await server.put(HERE + "a")
    await server.put(HERE + "b")
    async with following(server) as follower:
        await follower.until("a", "b")
        await server.put(HERE + "c")
        await follower.until_interrupted("there are more than 2 pods")
        await server.delete(HERE + "c")
        await follower.until("a", "b")


# ---- watches that end


async def test_a_watch_that_is_cut_is_resumed_where_it_was(server: ApiServer) -> None:
    """After the last version that it has shown, without a new list; what happened meanwhile is shown."""
    async with following(server) as follower:
        await follower.until()
        await server.put(HERE + "a")
        await follower.until("a")
        shown = follower.objects["llm/a"]
        await server.cut()
        await server.put(HERE + "b")
        await server.delete(HERE + "a")
        await follower.until("b")
        assert not follower.interruptions
    assert len(server.asked("list")) == 1
    assert server.asked("watch")[1]["resourceVersion"] == shown


async def test_a_bookmark_moves_the_place_where_a_watch_is_resumed(server: ApiServer) -> None:
    """Others write and the history is compacted: a watch of a quiet kind would be told 410 for nothing."""
    async with following(server) as follower:
        await follower.until()
        await server.put("/api/v1/namespaces/other/pods/x")
        server.compact()
        await server.bookmark()
        await server.put(HERE + "a")
        await follower.until("a")
        await server.cut()
        await server.until_watched(2)
    assert len(server.asked("list")) == 1


async def test_a_bookmark_alone_is_enough(server: ApiServer) -> None:
    """No object has changed since the list, which is of a version that is forgotten by now."""
    async with following(server) as follower:
        await follower.until()
        await server.put("/api/v1/namespaces/other/pods/x")
        await server.bookmark()
        await server.say(b"\n")
        server.compact()
        await server.cut()
        await server.until_watched(2)
        await server.put(HERE + "a")
        await follower.until("a")
    assert len(server.asked("list")) == 1


async def test_a_watch_that_ends_as_agreed_is_resumed_at_once(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `timeoutSeconds` the API server ends it. However short that is, nothing went wrong, and there is no pause in which changes would be missed."""
    monkeypatch.setattr(reflector_module, "FIRST_PAUSE_S", 1000.0)
    async with following(server, watch_s=1.0) as follower:
        await follower.until()
        await server.until_watched(2)
        assert not follower.interruptions
    assert len(server.asked("list")) == 1


async def test_a_watch_that_has_gone_deaf_is_left(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its packets are dropped: it neither says anything nor ends when it should."""
    inner = ApiServer.answer

    async def deaf(server: ApiServer, request: Any) -> Any:
        if request.query.get("watch") == "true" and not server.asked("watch"):
            query = {**request.query, "timeoutSeconds": "3600"}
            server.requests.append((request.method, request.path, query))
            return await server._watch(request, query)
        return await inner(server, request)

    monkeypatch.setattr(ApiServer, "answer", deaf)
    async with following(server, watch_s=0.4) as follower:
        await follower.until()
        await server.until_watched(2)
        await server.put(HERE + "a")
        await follower.until("a")
        assert not follower.interruptions


@pytest.mark.parametrize("gone_within", [False, True], ids=["as the answer", "within the watch"])
async def test_after_410_the_list_shows_what_was_deleted(server: ApiServer, gone_within: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In either form. Deletions are found by difference, and what did not change is not shown again."""
    caplog.set_level(logging.INFO)
    server.gone_within = gone_within
    for name in "abc":
        await server.put(HERE + name)
    async with following(server) as follower:
        await follower.until("a", "b", "c")
        await server.cut()
        await server.delete(HERE + "a")
        await server.put(HERE + "b")
        await server.put(HERE + "d")
        server.compact()
        await follower.until("b", "c", "d")
        assert not follower.interruptions
        news = follower.said[-1]
        assert isinstance(news, Changes)
        assert news.gone == ("llm/a",)
        assert [one.key for one in news.put] == ["llm/b", "llm/d"]
    assert "the objects are listed anew" in caplog.text


async def test_another_error_within_a_watch_leads_to_a_new_list(server: ApiServer) -> None:
    """And is said, in the API server's words."""
    await server.put(HERE + "a")
    async with following(server) as follower:
        await follower.until("a")
        await server.error(500, "etcdserver: no leader")
        await follower.until_interrupted("no leader")
        await follower.until("a")
        assert follower.interruptions == ["the API server answers 500: etcdserver: no leader"]
    assert len(server.asked("list")) == 2


@pytest.mark.parametrize("line", [b"<html>\n", b'{"type": "ADDED", "object": 7}\n', b'{"type": "ADDED"}\n', b'{"type": "ERROR", "object": []}\n'])
async def test_an_event_that_cannot_be_read_is_said(server: ApiServer, line: bytes) -> None:
    """Whatever stands between does not end what follows it."""
    async with following(server) as follower:
        await follower.until()
        await server.say(line)
        await follower.until_interrupted("sends an event that cannot be read")
        await follower.until()


async def test_an_event_without_an_end_is_not_kept(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line has a limit."""
    monkeypatch.setattr(api_module, "MAX_LINE_BYTES", 1000)
    async with following(server) as follower:
        await follower.until()
        await server.say(b" " * 2000)
        await follower.until_interrupted("an event of more than 1000 bytes")


async def test_events_that_arrive_together_are_one_change(server: ApiServer) -> None:
    """Of several events of one object the last one counts."""
    async with following(server) as follower:
        await follower.until()
        line = b'{"type": "%s", "object": {"metadata": {"namespace": "llm", "name": "%s", "resourceVersion": "%d"}}}\n'
        await server.say(line % (b"ADDED", b"a", 10) + line % (b"ADDED", b"b", 11) + line % (b"DELETED", b"a", 12) + line % (b"MODIFIED", b"b", 13))
        await follower.until("b")
        news = follower.said[-1]
        assert isinstance(news, Changes)
        assert ([one.metadata.resource_version for one in news.put], news.gone) == (["13"], ())


# ---- servers that fail


async def test_a_server_that_is_away_is_said_and_listed_anew_when_it_is_back(server: ApiServer) -> None:
    """A watch that cannot be begun is not resumed: the server may be another one, with other data. What is said last is that all is well, however
    little has changed."""
    await server.put(HERE + "a")
    await server.put(HERE + "b")
    async with following(server) as follower:
        await follower.until("a", "b")
        server.refused = {"watch": (503, "apiserver not ready"), "list": (503, "apiserver not ready")}
        await server.cut()
        await follower.until_interrupted("the API server answers 503: apiserver not ready")
        await server.delete(HERE + "a")
        server.refused = {}
        await follower.until("b")
    assert len(server.asked("list")) > 1


async def test_a_list_without_its_watch_shows_nothing(server: ApiServer) -> None:
    """A role that may list and not watch would show a fleet that grows old; the refusal is what is said, and all that is said."""
    await server.put(HERE + "a")
    server.refused = {"watch": (403, 'pods is forbidden: User "router" cannot watch resource "pods"')}
    async with following(server) as follower:
        await follower.until_interrupted("cannot watch resource")
        await server.until_asked("list", 3)
        assert not follower.objects
        assert not [news for news in follower.said if isinstance(news, Changes)]


async def test_a_kind_that_is_not_there_is_named(server: ApiServer) -> None:
    """The API server itself does not say which."""
    server.refused = {"list": (404, "the server could not find the requested resource")}
    async with following(server) as follower:
        await follower.until_interrupted("the API server has no pods of version v1: their CRD is missing")
        server.refused = {}
        await follower.until()


async def test_a_list_that_hangs_is_left(server: ApiServer) -> None:
    """After the time that an answer may take."""
    server.hanging = {"list"}
    async with following(server, timeout_s=0.1) as follower:
        await follower.until_interrupted("did not answer GET /api/v1/namespaces/llm/pods within 0.1 s")
        server.hanging = set()
        await follower.until()


async def test_a_list_that_hangs_within_a_page_is_left(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status and the first bytes of the second page have come. Nothing of the first page is shown; the next list is whole."""
    monkeypatch.setattr(reflector_module, "PAGE_OBJECTS", 1)
    await server.put(HERE + "a")
    await server.put(HERE + "b")
    inner, is_over = ApiServer.answer, asyncio.Event()

    async def hanging(server: ApiServer, request: web.Request) -> web.StreamResponse:
        if "continue" not in request.query or is_over.is_set():
            return await inner(server, request)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'{"metadata": {"resourceVersion": "7"}, "items": [{"meta')
        await is_over.wait()
        return response

    monkeypatch.setattr(ApiServer, "answer", hanging)
    async with following(server, timeout_s=0.2) as follower:
        await follower.until_interrupted("did not answer GET /api/v1/namespaces/llm/pods within 0.2 s")
        assert not follower.objects
        is_over.set()
        await follower.until("a", "b")


async def test_an_event_that_comes_in_pieces_is_one(server: ApiServer) -> None:
    """A slow connection gives it byte by byte."""
    line = b'{"type": "ADDED", "object": {"metadata": {"name": "a", "namespace": "llm", "resourceVersion": "9"}}}\n'
    async with following(server) as follower:
        await follower.until()
        for at in range(len(line)):
            await server.say(line[at : at + 1])
        await follower.until("a")
        assert not follower.interruptions


async def test_a_watch_that_hangs_is_left(server: ApiServer) -> None:
    """It has not begun before its headers have come."""
    server.hanging = {"watch"}
    async with following(server, timeout_s=0.1) as follower:
        await follower.until_interrupted("did not answer watch /api/v1/namespaces/llm/pods within 0.1 s")
        server.hanging = set()
        await follower.until()


async def test_pauses_grow_and_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to MAX_PAUSE_S; after a good watch they begin anew."""
    pause = reflector_module._Pause()
    waited = [pause.next() for _ in range(10)]
    for least, seconds in zip([0.25, 0.5, 1, 2, 4, 8, 15, 15, 15, 15], waited, strict=True):
        assert least <= seconds <= 2 * least
    pause.reset()
    assert pause.next() <= reflector_module.FIRST_PAUSE_S


async def test_a_server_that_wants_to_be_left_alone_is(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Retry-After` of a 429 counts where it is longer than our own pause."""
    slept: list[float] = []
    inner = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await inner(0)

    server.refused = {"list": (429, "too many requests")}
    server.retry_after = "7"
    monkeypatch.setattr(asyncio, "sleep", sleep)
    async with following(server) as follower:
        await follower.until_interrupted("answers 429")
        await server.until_asked("list", 2)
    assert {seconds for seconds in slept if seconds} == {7.0}
