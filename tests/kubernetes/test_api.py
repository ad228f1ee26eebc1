"""The verbs, and how a refusal is told."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from extproc.kubernetes import api as api_module
from extproc.kubernetes.access import Access
from extproc.kubernetes.api import Api
from extproc.kubernetes.failures import Conflict, Gone, KubernetesFailed, NotAllowed, NotFound
from extproc.kubernetes.objects import INFERENCE_POOLS, LEASES, PODS, Object
from tests.fakes.certificates import Authority
from tests.fakes.kubernetes import access, api_server
from tests.fakes.relay import Relay
from tests.fakes.wait import turns

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}}


async def test_objects_are_made_read_replaced_and_deleted() -> None:
    """Each by its own path and verb."""
    async with api_server() as server, Api(access(server), 5) as api:
        made = await api.create(PODS, "llm", POD, Object)
        assert made.key == "llm/one"
        version = {"name": "one", "resourceVersion": made.metadata.resource_version}
        replaced = await api.replace(PODS, "llm", "one", {**POD, "metadata": version}, Object)
        assert (await api.get(PODS, "llm", "one", Object)).metadata.resource_version == replaced.metadata.resource_version != made.metadata.resource_version
        with pytest.raises(Conflict, match="already exists"):
            await api.create(PODS, "llm", POD, Object)
        with pytest.raises(Conflict, match="has been modified"):
            await api.replace(PODS, "llm", "one", {**POD, "metadata": version}, Object)
        await api.delete(PODS, "llm", "one")
        with pytest.raises(NotFound, match="one not found"):
            await api.get(PODS, "llm", "one", Object)


async def test_an_apply_names_its_manager_and_whether_it_forces() -> None:
    """Of the object or of its status, as the content type that means server-side apply."""
    async with api_server() as server, Api(access(server), 5) as api:
        await api.apply(PODS, "llm", "one", POD, "controller", Object)
        await api.apply(PODS, "llm", "one", POD, "controller-status", Object, subresource="status", force=False)
        (_, path, query), (_, status_path, status_query) = server.requests
        assert (path, query) == ("/api/v1/namespaces/llm/pods/one", {"fieldManager": "controller", "force": "true"})
        assert (status_path, status_query) == ("/api/v1/namespaces/llm/pods/one/status", {"fieldManager": "controller-status", "force": "false"})
        assert {headers["Content-Type"] for headers in server.headers} == {"application/apply-patch+yaml"}


def test_kinds_have_the_paths_and_names_of_their_groups() -> None:
    """The core API has no group."""
    assert PODS.path("llm") == "/api/v1/namespaces/llm/pods"
    assert PODS.path() == "/api/v1/pods"
    assert LEASES.path("llm", "a", "status") == "/apis/coordination.k8s.io/v1/namespaces/llm/leases/a/status"
    assert (PODS.label, INFERENCE_POOLS.label) == ("pods", "inferencepools.inference.networking.k8s.io")


@pytest.mark.parametrize(
    ("code", "kind"), [(401, NotAllowed), (403, NotAllowed), (404, NotFound), (409, Conflict), (410, Gone), (500, KubernetesFailed), (307, KubernetesFailed)]
)
async def test_a_refusal_is_told_in_the_api_servers_words(code: int, kind: type[KubernetesFailed]) -> None:
    """By the class that callers tell apart. A redirect is refused, too: the token would follow it."""
    async with api_server() as server, Api(access(server), 5) as api:
        server.refused = {"GET": (code, "not today")}
        with pytest.raises(KubernetesFailed, match=f"the API server answers {code}: not today") as failed:
            await api.get(PODS, "llm", "one", Object)
        assert type(failed.value) is kind


@pytest.mark.parametrize(("stated", "waited_s"), [("", 0), ("3", 3), ("86400", 30), ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("-1", 0)])
async def test_retry_after_is_taken_up_to_a_limit(stated: str, waited_s: float) -> None:
    """In seconds, as the API server states it."""
    async with api_server() as server, Api(access(server), 5) as api:
        server.refused, server.retry_after = {"GET": (429, "busy")}, stated
        with pytest.raises(KubernetesFailed) as failed:
            await api.get(PODS, "llm", "one", Object)
        assert failed.value.retry_after_s == waited_s


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, b"<html>", "sends an answer that cannot be read"),
        (200, b'{"metadata": 7}', "sends an answer that cannot be read"),
        (502, b"<html>", "answers 502: no reason given"),
        (200, b" " * 2000, "more than 1000 bytes at once"),
        (500, b" " * 2000, "more than 1000 bytes at once"),
    ],
)
async def test_a_server_that_is_none_is_said(status: int, body: bytes, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers."""
    monkeypatch.setattr(api_module, "MAX_ANSWER_BYTES", 1000)

    async def answer(self: object, request: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    monkeypatch.setattr("tests.fakes.kubernetes.ApiServer.answer", answer)
    async with api_server() as server, Api(access(server), 5) as api:
        with pytest.raises(KubernetesFailed, match=words):
            await api.get(PODS, "llm", "one", Object)


async def test_a_server_that_is_away_is_named() -> None:
    """With what the system says."""
    async with api_server() as server:
        pass
    async with Api(access(server), 5) as api:
        with pytest.raises(KubernetesFailed, match=f"{server.url}: .*"):
            await api.get(PODS, "llm", "one", Object)


async def test_a_token_that_is_replaced_is_used_at_once(tmp_path: Any) -> None:
    """The kubelet replaces it about every hour. One that is gone is said."""
    token = tmp_path / "token"
    token.write_text("first\n")
    async with api_server() as server, Api(access(server, token_file=str(token)), 5) as api:
        await api.create(PODS, "llm", POD, Object)
        token.write_text("second\n")
        await api.get(PODS, "llm", "one", Object)
        assert [headers["Authorization"] for headers in server.headers] == ["Bearer first", "Bearer second"]
        token.unlink()
        with pytest.raises(KubernetesFailed, match=r"the token .* cannot be read: No such file"):
            await api.get(PODS, "llm", "one", Object)


async def test_a_certificate_authority_that_is_replaced_is_read_after_the_next_failure(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is told; the requests after it succeed, over one session for all."""
    made: list[aiohttp.ClientSession] = []
    inner = aiohttp.ClientSession

    def session(**arguments: Any) -> aiohttp.ClientSession:
        made.append(inner(**arguments))
        return made[-1]

    monkeypatch.setattr(aiohttp, "ClientSession", session)
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    trusted = tmp_path / "ca.crt"
    trusted.write_bytes(old.ca_file.read_bytes())

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"metadata": {"name": "one"}})

    async with tls_server(new, answer) as port, Api(Access(f"https://127.0.0.1:{port}", ca_file=str(trusted)), 5) as api:
        with pytest.raises(KubernetesFailed, match="certificate verify failed"):
            await api.get(PODS, "llm", "one", Object)
        trusted.write_bytes(new.ca_file.read_bytes())
        both = await asyncio.gather(*(api.get(PODS, "llm", "one", Object) for _ in range(2)))
        assert [one.metadata.name for one in both] == ["one", "one"]
        assert len(made) == 2


async def test_a_watch_that_is_left_does_not_wait_for_the_other_side(tmp_path: Any) -> None:
    """An API server that has gone deaf never agrees that a TLS connection ends."""
    authority = Authority(tmp_path)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await asyncio.Event().wait()
        return response

    async with (
        tls_server(authority, answer) as port,
        Relay(port) as relay,
        Api(Access(f"https://{relay.address}", ca_file=str(authority.ca_file)), 5) as api,
    ):
        async with api.watch(PODS, "llm", {}, 60):
            [protocol] = api._session.connector._acquired  # type: ignore[union-attr]
            socket = protocol.transport.get_extra_info("socket")  # type: ignore[union-attr]
            relay.freeze()
        await turns()
        assert socket.fileno() == -1


@asynccontextmanager
async def tls_server(authority: Authority, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[int]:
    """Where it listens, with a certificate of this authority."""
    pair = authority.pair("server", "127.0.0.1")
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pair.cert, pair.key)
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
