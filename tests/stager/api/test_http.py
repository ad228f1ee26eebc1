"""The HTTP control API on a real port: every verb, errors as the OpenAI API words them, the token, the page that lists it all, and events."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from extproc.config.credentials import RpcSettings
from extproc.config.settings import Settings
from extproc.config.stager import EngineSettings, StagerSettings
from extproc.credentials import matches
from extproc.errors import NoSpace, OriginFailed
from extproc.process.http import HttpServer
from extproc.stager.api import replies as replies_module
from extproc.stager.api.http import stager_app
from extproc.stager.server import Server
from extproc.stager.stager import Stager
from extproc.up.processes import free_ports
from tests.fakes.adapters import WEIGHTS, sha256, size_of, small_files
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

from ..conftest import OpenStager

SIZE = size_of(small_files())
TOKEN = "a-token-of-this-test"
VERBS = {
    ("GET", "/v1/adapters"),
    ("POST", "/v1/stage"),
    ("POST", "/v1/release"),
    ("POST", "/v1/refresh"),
    ("POST", "/v1/pin"),
    ("POST", "/v1/unpin"),
    ("POST", "/v1/evict"),
    ("POST", "/v1/purge"),
    ("POST", "/v1/drain"),
    ("POST", "/v1/undrain"),
    ("POST", "/v1/verify"),
    ("GET", "/v1/watch"),
}
DESTRUCTIVE = ("/v1/pin", "/v1/unpin", "/v1/evict", "/v1/purge", "/v1/verify", "/v1/drain", "/v1/undrain")


@dataclass
class Api:
    """A stager and a client of its API."""

    stager: Stager
    http: httpx.AsyncClient

    async def post(self, verb: str, **body: Any) -> httpx.Response:
        return await self.http.post(f"/v1/{verb}", json=body)

    async def done(self, verb: str, **body: Any) -> Any:
        """The answer of a verb that must succeed."""
        answer = await self.post(verb, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def refused(self, verb: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error of one that must not."""
        return error_of(await self.post(verb, **body))


def error_of(answer: httpx.Response) -> tuple[int, dict[str, Any]]:
    """The status and the error, which must have what the OpenAI API gives every error."""
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return answer.status_code, error


Serve = Callable[..., Awaitable[Api]]


@pytest.fixture
async def serve(open_stager: OpenStager, origin: FakeOrigin) -> AsyncIterator[Serve]:
    """Starts a stager and its API; keyword arguments are the stager's settings."""
    opened: list[tuple[HttpServer, httpx.AsyncClient]] = []

    async def start(token: str = "", *, destructive: bool = True, **settings: Any) -> Api:
        stager = await open_stager(origin, **settings)
        server = HttpServer(stager_app(stager, (lambda shown: matches(shown, token)) if token else None, destructive=destructive), "127.0.0.1:0")
        server.start()
        url = f"http://127.0.0.1:{server._socket.getsockname()[1]}"
        opened.append((server, httpx.AsyncClient(base_url=url, timeout=30, trust_env=False)))
        return Api(stager, opened[-1][1])

    yield start
    for server, http in opened:
        await http.aclose()
        await server.stop()


# -- the verbs


async def test_stage_and_list_speak_as_the_service_does(serve: Serve, origin: FakeOrigin, clock: Clock) -> None:
    """The same fields, with numbers as numbers."""
    files = small_files()
    origin.add("acme/a", files)
    api = await serve(max_bytes=10**9)
    staged = await api.done("stage", adapter="acme/a", sha256=sha256(files[WEIGHTS]))
    assert {key: staged[key] for key in ("staged", "origin", "lease_seconds", "bytes")} == {
        "staged": True,
        "origin": "fake",
        "lease_seconds": 300.0,
        "bytes": SIZE,
    }
    again = await api.done("stage", adapter="acme/a", prefetch=True)
    assert (again["staged"], again["digest"]) == (False, staged["digest"])
    clock.now += 100
    shown = (await api.http.get("/v1/adapters")).json()
    (adapter,) = shown.pop("adapters")
    assert shown == {"used_bytes": SIZE, "reserved_bytes": 0, "max_bytes": 10**9}
    assert adapter == {
        "name": "acme/a",
        "digest": staged["digest"],
        "bytes": SIZE,
        "origin": "fake",
        "revision": "1",
        "idle_seconds": 100.0,
        "leased_seconds": 200.0,
        "pinned": False,
        "checked_seconds": 100.0,
        "refresh_error": "",
        "adopted": False,
        "loaded": False,
    }


@pytest.mark.parametrize("count", [0, 1, 10, 11, 35])
async def test_a_long_list_comes_in_pieces_that_are_one(serve: Serve, origin: FakeOrigin, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Also where there is nothing, and where the last piece is full."""
    monkeypatch.setattr(replies_module, "LIST_SLICE", 10)
    api = await serve()
    for number in range(count):
        origin.add(f"acme/{number}", small_files(seed=number))
        await api.done("stage", adapter=f"acme/{number}")
    shown = (await api.http.get("/v1/adapters")).json()
    assert [adapter["name"] for adapter in shown["adapters"]] == [f"acme/{number}" for number in range(count)]
    assert shown["used_bytes"] == count * SIZE


async def test_a_lease_is_its_holder_s_to_give_back(serve: Serve, origin: FakeOrigin) -> None:
    """One, or all of one holder."""
    for seed, name in enumerate(("acme/a", "acme/b", "acme/c")):
        origin.add(name, small_files(seed=seed))
    api = await serve()
    for name in ("acme/a", "acme/b", "acme/c"):
        await api.done("stage", adapter=name, holder="someone")
    assert await api.done("release", holder="nobody") == {"released": 0}
    assert await api.done("release", holder="someone", adapter="acme/a") == {"released": 1}
    assert await api.done("release", holder="someone") == {"released": 2}
    assert await api.done("evict", adapter="acme/a") == {"bytes": SIZE}


async def test_pin_evict_purge(serve: Serve, origin: FakeOrigin, clock: Clock) -> None:
    """What is pinned is not evicted, unless it is purged."""
    origin.add("acme/a", small_files())
    api = await serve()
    pinned = await api.done("pin", adapter="acme/a")
    assert pinned == {"digest": (await api.done("stage", adapter="acme/a"))["digest"]}
    clock.now += 10**6
    assert (await api.refused("evict", adapter="acme/a"))[0] == 409
    assert await api.done("unpin", adapter="acme/a") == {}
    assert await api.done("evict", adapter="acme/a") == {"bytes": SIZE}
    await api.done("pin", adapter="acme/a")
    assert await api.done("purge", adapter="acme/a") == {"bytes": SIZE}
    assert await api.done("purge", adapter="acme/a") == {"bytes": 0}
    assert not api.stager.node.holdings.pins


async def test_refresh_says_whether_there_is_something_new(serve: Serve, origin: FakeOrigin) -> None:
    """And what is here now."""
    origin.add("acme/a", small_files())
    api = await serve()
    staged = await api.done("stage", adapter="acme/a")
    assert await api.done("refresh", adapter="acme/a") == {"changed": False, "digest": staged["digest"], "revision": "1"}


async def test_verify_gives_a_line_per_adapter(serve: Serve, origin: FakeOrigin, node: Path) -> None:
    """As they are read; without a body, of everything."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    api = await serve()
    for name in ("acme/a", "acme/b"):
        await api.done("stage", adapter=name)
    (node / "acme/b" / WEIGHTS).write_bytes(b"damaged")
    answer = await api.http.post("/v1/verify")
    assert answer.headers["content-type"] == "application/x-ndjson"
    good, bad = map(json.loads, answer.text.splitlines())
    assert {key: good[key] for key in ("adapter", "ok", "why", "removed", "bytes")} == {
        "adapter": "acme/a",
        "ok": True,
        "why": "",
        "removed": False,
        "bytes": SIZE,
    }
    assert (bad["adapter"], bad["ok"], bad["removed"]) == ("acme/b", False, True)
    only = await api.post("verify", adapter="acme/a")
    assert [json.loads(line)["adapter"] for line in only.text.splitlines()] == ["acme/a"]


async def test_verify_of_nothing_is_nothing(serve: Serve) -> None:
    """An empty node has no damage; an adapter that is not there is an error, not an answer that breaks off."""
    api = await serve()
    answer = await api.http.post("/v1/verify")
    assert (answer.status_code, answer.text) == (200, "")
    assert (await api.refused("verify", adapter="acme/a"))[0] == 404


async def test_drain_says_how_far_it_is_and_undrain_ends_it(serve: Serve, origin: FakeOrigin) -> None:
    """With the reason that whoever asks is shown; without a body it has none."""
    origin.add("acme/a", small_files())
    api = await serve()
    await api.done("stage", adapter="acme/a", holder="router")
    assert await api.done("drain", why="its disk is replaced") == {"draining": True, "empty": False, "leased": 1, "requests": 0.0}
    assert (await api.http.get("/readyz")).status_code == 200, "it serves what it has"
    status, error = await api.refused("stage", adapter="acme/b")
    assert (status, error["code"]) == (503, "no_endpoint")
    assert api.stager.drain.why == "the node is drained: its disk is replaced"
    assert (await api.http.post("/v1/drain")).json()["draining"]
    assert api.stager.drain.why == "the node is drained"
    assert (await api.done("undrain"))["draining"] is False
    assert not api.stager.drain.is_on


async def test_watch_tells_copies_and_load_where_they_are_wanted(serve: Serve, origin: FakeOrigin) -> None:
    """The load is no change: its event has no id, so nobody goes on from there."""
    origin.add("acme/a", small_files())
    api = await serve()
    await api.done("stage", adapter="acme/a")
    async with api.http.stream("GET", "/v1/watch", params={"copies": "true", "load": "true"}) as answer:
        seen: dict[str, str] = {}
        lines = answer.aiter_lines()
        event_id = ""
        async for line in lines:
            event_id = line.removeprefix("id: ") if line.startswith("id: ") else event_id if line else ""
            if line.startswith("data: "):
                ((kind, value),) = json.loads(line.removeprefix("data: ")).items()
                seen[kind] = event_id
                if kind == "inventory":
                    assert value == {"cold": ["acme/a"], "warm": [], "more": False}
                if kind == "load":
                    assert value["known"] is False
                    break
    assert seen["node"] == seen["load"] == ""
    assert seen["inventory"].startswith(f"{api.stager.instance}.")


# -- errors


async def test_errors_have_the_status_and_the_form_of_the_router_s(serve: Serve, origin: FakeOrigin) -> None:
    """With Retry-After where waiting helps, and none where it does not."""
    origin.add("acme/a", small_files())
    api = await serve()
    status, error = await api.refused("stage", adapter="acme/none")
    assert (status, error["code"], error["type"], error["param"]) == (404, "model_not_found", "invalid_request_error", "model")
    status, error = await api.refused("stage", adapter="acme/a", sha256="0" * 64)
    assert (status, error["code"]) == (422, "invalid_adapter")
    origin.resolve_failures = [OriginFailed("down", 7.0) for _ in range(3)]
    answer = await api.post("stage", adapter="acme/a")
    assert (error_of(answer)[0], error_of(answer)[1]["code"], answer.headers["retry-after"]) == (502, "origin_failed", "7")
    origin.fetch_failures = [NoSpace("full")]
    answer = await api.post("stage", adapter="acme/a")
    assert (error_of(answer)[0], error_of(answer)[1]["code"], answer.headers["retry-after"]) == (503, "no_space", "10")
    await api.done("stage", adapter="acme/a")
    answer = await api.post("evict", adapter="acme/a")
    assert error_of(answer) == (409, {"message": "acme/a is leased for 300 s more", "type": "invalid_request_error", "param": None, "code": "in_use"})
    assert "retry-after" not in answer.headers
    for verb in ("evict", "refresh", "verify"):
        assert (await api.refused(verb, adapter="acme/none"))[0] == 404


async def test_a_name_that_leads_elsewhere_is_refused(serve: Serve, origin: FakeOrigin) -> None:
    """By every verb that takes one."""
    api = await serve()
    for verb in ("stage", "pin", "unpin", "evict", "purge", "refresh", "verify", "release"):
        more = {"holder": "someone"} if verb == "release" else {}
        for name in ("../up", "/etc/passwd", "a/../b", ".store", "a\0b", "\ud800"):
            answer = await api.http.post(f"/v1/{verb}", content=json.dumps({"adapter": name, **more}), headers={"content-type": "application/json"})
            assert (error_of(answer)[0], error_of(answer)[1]["code"]) == (400, "invalid_request"), (verb, name)
    assert not origin.resolved


NOT_UNDERSTOOD = [
    (b"{", "the body is not JSON: "),
    (b"", "the body: "),
    (b"null", "the body: "),
    (b"[]", "the body: "),
    (b'"acme/a"', "the body: "),
    (b"{}", "adapter: "),
    (b'{"adapter": 7}', "adapter: "),
    (b'{"adapter": null}', "adapter: "),
    (b'{"adapter": "acme/a", "sha": "00"}', "sha: "),
    (b'{"adapter": "acme/a", "prefetch": "perhaps"}', "prefetch: "),
    (b'{"adapter": "acme/a", "sha256": "xyz"}', "sha256: 'xyz' is not 64 hexadecimal digits"),
    (b'{"adapter": "acme/a"', "the body is not JSON: "),
    (b"\xff\xfe", "the body is not JSON: "),
    (b"[" * 100_000, "There was an error parsing the body"),
]


async def test_a_body_that_is_not_understood_says_what_is_wrong(serve: Serve, origin: FakeOrigin) -> None:
    """In one sentence that names the field, and nothing is done."""
    origin.add("acme/a", small_files())
    api = await serve()
    for body, message in NOT_UNDERSTOOD:
        answer = await api.http.post("/v1/stage", content=body, headers={"content-type": "application/json"})
        status, error = error_of(answer)
        assert (status, error["code"], error["type"]) == (400, "invalid_request", "invalid_request_error"), body[:30]
        assert error["message"].startswith(message)
        assert "\n" not in error["message"]
    assert not origin.fetched


async def test_a_body_of_another_type_is_not_taken_for_json(serve: Serve, origin: FakeOrigin) -> None:
    """A page in somebody's browser can send text to any port of that machine, but no JSON without asking first."""
    origin.add("acme/a", small_files())
    api = await serve()
    await api.done("stage", adapter="acme/a")
    for headers in ({"content-type": "text/plain"}, {}):
        answer = await api.http.post("/v1/purge", content=b'{"adapter": "acme/a"}', headers=headers)
        assert error_of(answer)[0] == 400
    assert len(api.stager.node.holdings) == 1


async def test_what_is_no_verb_is_not_found(serve: Serve) -> None:
    """Nor is a verb asked for with another method."""
    api = await serve()
    assert error_of(await api.http.get("/v1/nothing"))[0] == 404
    assert error_of(await api.http.get("/v1/purge"))[0] == 405


# -- the token, and ports that others reach


async def test_with_a_token_every_verb_wants_it(serve: Serve) -> None:
    """Health, readiness and metrics do not: probes and collectors have none."""
    api = await serve(TOKEN)
    for wrong in ({}, {"authorization": TOKEN}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer"}, {"authorization": f"Basic {TOKEN}"}):
        for method, path in VERBS:
            answer = await api.http.request(method, path, headers=wrong, json={"adapter": "acme/a", "holder": "x"} if method == "POST" else None)
            assert error_of(answer)[0] == 403
            assert error_of(answer)[1]["code"] == "not_permitted"
            assert TOKEN not in answer.text
    assert not api.stager.node.metrics.registry.get_sample_value("lora_extproc_ensures_total", {"result": "model_not_found"})
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert (await api.http.get(path)).status_code == 200


async def test_with_the_token_every_verb_is_had(serve: Serve, origin: FakeOrigin) -> None:
    """As `Authorization: Bearer`."""
    origin.add("acme/a", small_files())
    api = await serve(TOKEN)
    api.http.headers["authorization"] = f"Bearer {TOKEN}"
    await api.done("pin", adapter="acme/a")
    await api.done("unpin", adapter="acme/a")
    assert await api.done("purge", adapter="acme/a") == {"bytes": SIZE}
    assert (await api.http.get("/v1/adapters")).json()["adapters"] == []


@pytest.mark.parametrize(
    ("http_listen", "with_token", "permitted"),
    [("127.0.0.1", False, True), ("0.0.0.0", False, False), ("0.0.0.0", True, True)],
)
async def test_beyond_loopback_nothing_is_removed_without_a_token(tmp_path: Path, http_listen: str, with_token: bool, permitted: bool) -> None:
    """Whoever reaches the port could ask for it. Staging and looking are allowed, as over gRPC."""
    (tmp_path / "token").write_text(TOKEN)
    grpc_port, http_port = free_ports(2)
    stager = StagerSettings(
        listen=f"127.0.0.1:{grpc_port}", http_listen=f"{http_listen}:{http_port}", dir=str(tmp_path / "node"), engine=EngineSettings(url=""), drain_s=0
    )
    rpc = RpcSettings(token_file=str(tmp_path / "token") if with_token else "")
    server = Server(Settings(stager=stager, rpc=rpc))
    await server.start()
    headers = {"authorization": f"Bearer {TOKEN}"} if with_token else {}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", headers=headers, trust_env=False) as http:
        for path in DESTRUCTIVE:
            answer = await http.post(path, json={} if path.endswith("drain") else {"adapter": "acme/a"})
            if permitted:
                assert answer.status_code in (200, 404)
            else:
                assert error_of(answer)[0] == 403
                assert "stager.http_listen is not on loopback" in error_of(answer)[1]["message"]
        assert (await http.get("/v1/adapters")).status_code == 200
        assert error_of(await http.post("/v1/stage", json={"adapter": "acme/a"}))[0] == 404
    await server.stop()


# -- the page


async def test_the_openapi_page_has_every_verb_with_a_sentence(serve: Serve) -> None:
    """And the fields of each body with theirs. `/docs` shows it."""
    api = await serve()
    page = (await api.http.get("/openapi.json")).json()
    listed = {(method.upper(), path): verb for path, methods in page["paths"].items() for method, verb in methods.items()}
    assert {place for place in listed if place[1].startswith("/v1/")} == VERBS
    for place, verb in listed.items():
        assert verb["summary"].endswith("."), place
    for name in ("Adapter", "Stage", "Release", "Verify"):
        for field, schema in page["components"]["schemas"][name]["properties"].items():
            assert schema["description"].endswith("."), (name, field)
    assert "lora-extproc stager" in (await api.http.get("/docs")).text


# -- events


async def events_of(answer: httpx.Response) -> AsyncIterator[tuple[str, Any]]:
    """Server-sent events as (id, data); without the budget's and the demand's, which come by themselves."""
    event_id = ""
    async for line in answer.aiter_lines():
        field, _, value = line.partition(": ")
        if field == "id":
            event_id = value
        elif field == "data" and not {"space", "demand"} & json.loads(value).keys():
            yield event_id, json.loads(value)


async def test_watch_tells_every_change_as_an_event(serve: Serve, origin: FakeOrigin) -> None:
    """The node's state first; then what the gRPC stream tells, too."""
    origin.add("acme/a", small_files())
    api = await serve()
    async with api.http.stream("GET", "/v1/watch") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer)
        _, state = await anext(events)
        instance = api.stager.instance
        ready = {"ready": True, "why": "", "instance": instance, "resumed": False, "draining": False, "heartbeat_seconds": 0.0, "empty": False}
        assert state == {"node": ready}
        await api.done("stage", adapter="acme/a")
        await api.done("purge", adapter="acme/a")
        (first_id, first), (second_id, second) = [await anext(events) for _ in range(2)]
        assert (first, second) == ({"published": "acme/a"}, {"evicted": "acme/a"})
        assert first_id.startswith(f"{instance}.")
        assert int(second_id.rpartition(".")[2]) > int(first_id.rpartition(".")[2])
        api.stager.drain.stop()
        leaving = ready | {"ready": False, "why": "the stager is stopping", "resumed": True, "draining": True}
        assert (await anext(events))[1]["node"] == leaving


async def test_watch_tells_the_budget_in_bytes(serve: Serve, origin: FakeOrigin) -> None:
    """Within a second of a change."""
    origin.add("acme/a", small_files())
    api = await serve(max_bytes=10**9)
    async with api.http.stream("GET", "/v1/watch") as answer:
        lines = (line async for line in answer.aiter_lines() if line.startswith("data: "))
        await anext(lines)
        await api.done("stage", adapter="acme/a")
        async for line in lines:
            shown = json.loads(line.removeprefix("data: "))
            if "space" in shown and shown["space"]["used_bytes"]:
                assert shown == {"space": {"used_bytes": SIZE, "reserved_bytes": 0, "max_bytes": 10**9}}
                break


async def test_watch_goes_on_where_the_last_event_was(serve: Serve) -> None:
    """As a browser's EventSource asks it to. An id of another instance, or none at all, begins anew."""
    api = await serve()
    for number in range(3):
        api.stager.node.changes.tell("evicted", f"acme/{number}")
    last = f"{api.stager.instance}.{api.stager.node.changes.last - 2}"

    async def first_two(last_event_id: str) -> list[Any]:
        async with api.http.stream("GET", "/v1/watch", headers={"last-event-id": last_event_id}) as answer:
            events = events_of(answer)
            first = (await anext(events))[1]
            return [first] if "node" in first else [first, (await anext(events))[1]]

    assert await first_two(last) == [{"evicted": "acme/1"}, {"evicted": "acme/2"}]
    for other in ("", "0", f"{'0' * 16}.1", f"{api.stager.instance}.", f"{api.stager.instance}.x", f"{api.stager.instance}.{10**18}", "9" * 5000):
        (state,) = await first_two(other)
        assert not state["node"]["resumed"], other


async def test_a_watcher_that_leaves_is_forgotten(serve: Serve) -> None:
    """Its queue would grow for ever."""
    api = await serve()
    async with api.http.stream("GET", "/v1/watch") as answer:
        await anext(events_of(answer))
        assert len(api.stager.node.changes._watchers) == 1
    await asyncio.wait_for(until(lambda: not api.stager.node.changes._watchers), 10)
