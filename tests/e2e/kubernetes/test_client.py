"""What only a real kube-apiserver shows of the client: how it says that a version is gone, what server-side apply does, and who holds a Lease."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from extproc.kubernetes.api import Api, read_event
from extproc.kubernetes.failures import Conflict, Gone, KubernetesFailed, NotAllowed
from extproc.kubernetes.leader import Leader
from extproc.kubernetes.objects import LEASES, PODS, Kind, Object
from extproc.kubernetes.reflector import Changes, Query, Reflector
from tests.fakes.kube_apiserver import Admin, Cluster
from tests.fakes.wait import until

CONFIG_MAPS = Kind("", "v1", "configmaps")


class ConfigMap(Object):
    data: dict[str, str] = msgspec.field(default_factory=dict)


def config_map(**data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "llm"}, "data": data}


async def test_a_version_that_is_gone_is_told_in_one_of_the_two_forms(cluster: Cluster, admin: Admin) -> None:
    """Either leads to `Gone`: as the answer to the watch, or as its first event."""
    await asyncio.to_thread(cluster.compact)
    other = cluster.another()
    try:
        await asyncio.to_thread(other.start)
        async with Api(other.access(), 10) as api:

            async def first_event() -> Object:
                async with api.watch(PODS, "llm", {"resourceVersion": "1", "timeoutSeconds": "5"}, 10) as watch:
                    return read_event((await anext(watch))[0], msgspec.json.Decoder(Object))

            with pytest.raises(Gone, match="too old resource version"):
                await first_event()
    finally:
        other.stop()


async def test_a_long_list_is_of_one_version(cluster: Cluster, admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pages it takes, and whatever is written between two of them."""
    monkeypatch.setattr("extproc.kubernetes.reflector.PAGE_OBJECTS", 3)
    for n in range(7):
        await admin.pod(f"p-{n}", f"10.77.0.{n + 1}")
    inner, pages = Api.page, 0

    async def page(api: Api, *arguments: Any) -> Any:
        nonlocal pages
        got = await inner(api, *arguments)
        pages += 1
        if pages == 1:
            await admin.remove("p-6")
            await admin.pod("p-0", "10.77.0.99")
        return got

    monkeypatch.setattr(Api, "page", page)
    async with Api(cluster.server.access(), 10) as api:
        changes = Reflector(api, Query(PODS, "llm", labels="app=vllm"), Object, 60).changes()
        first, second = await anext(changes), await anext(changes)
        seen: dict[str, str] = {}
        for news in (first, second):
            assert isinstance(news, Changes)
            seen.update((one.metadata.name, one.metadata.resource_version) for one in news.put)
            for key in news.gone:
                del seen[key.removeprefix("llm/")]
        assert isinstance(first, Changes)
        assert len(first.put) == 7
        while "p-6" in seen:
            more = await anext(changes)
            assert isinstance(more, Changes)
            for key in more.gone:
                del seen[key.removeprefix("llm/")]
        await changes.aclose()
    assert pages == 3


async def test_an_apply_removes_what_its_manager_no_longer_names(cluster: Cluster, admin: Admin) -> None:
    """And takes nothing from another manager without force."""
    async with Api(cluster.server.access(), 10) as api:

        async def apply(manager: str, *, force: bool = True, **data: str) -> ConfigMap:
            return await api.apply(CONFIG_MAPS, "llm", "c", config_map(**data), manager, ConfigMap, force=force)

        await apply("one", a="1", b="1")
        await apply("two", c="2")
        assert (await apply("one", a="1")).data == {"a": "1", "c": "2"}
        with pytest.raises(Conflict, match='conflict with "two"'):
            await apply("one", force=False, c="1")
        assert (await apply("one", c="1")).data == {"c": "1"}
        await api.delete(CONFIG_MAPS, "llm", "c")


async def test_who_is_not_known_is_told(cluster: Cluster) -> None:
    """The token has ended, or is of another cluster."""
    async with Api(cluster.server.access("wrong"), 10) as api:
        with pytest.raises(NotAllowed, match="answers 401: Unauthorized"):
            await api.get(PODS, "llm", "a", Object)


async def test_a_selector_that_is_none_is_told_in_the_api_servers_words(cluster: Cluster) -> None:
    """It knows the language of selectors."""
    async with Api(cluster.server.access(), 10) as api:
        with pytest.raises(KubernetesFailed, match="answers 400: unable to parse requirement"):
            await api.page(PODS, "llm", {"labelSelector": "app in", "limit": "1"}, Object)


async def test_one_of_two_leads_and_the_next_follows(cluster: Cluster, admin: Admin) -> None:
    """On a Lease as `kubectl get lease` shows it."""
    running: set[str] = set()

    async def lead(stack: AsyncExitStack, identity: str) -> "asyncio.Task[None]":
        async def work() -> None:
            running.add(identity)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                running.discard(identity)

        api = await stack.enter_async_context(Api(cluster.server.access(), 10))
        return asyncio.create_task(Leader(api, "llm", "controller", identity).lead(work))

    async with AsyncExitStack() as stack:
        one = await lead(stack, "one")
        await until(lambda: running == {"one"})
        two = await lead(stack, "two")
        one.cancel()
        await asyncio.gather(one, return_exceptions=True)
        await until(lambda: running == {"two"})
        two.cancel()
        await asyncio.gather(two, return_exceptions=True)
        await admin.api.delete(LEASES, "llm", "controller")
