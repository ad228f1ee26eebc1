"""Sources as the settings name them."""

from contextlib import aclosing
from typing import Any

from extproc.config.pools import PoolSettings
from extproc.discovery.sources import build_sources
from extproc.discovery.static import StaticSource

from .scripted import rows

ENDPOINTS = [{"address": "[2001:DB8::1]:8000", "stager": "one:9102", "node": "one"}, {"address": "vllm-1:8000"}]
FOUND: list[dict[str, Any]] = [
    {"type": "etcd", "endpoints": ["http://127.0.0.1:2379"], "prefix": "/a/"},
    {"type": "file", "path": "/etc/fleet.yaml"},
    {"type": "dns", "name": "vllm.local", "port": 8000},
    {"type": "kubernetes", "inference_pool": "llama"},
    {"type": "kubernetes", "selector": "app=vllm", "ports": [8000], "namespace": "llm"},
]

KUBERNETES = ["kubernetes inference_pool llama", "kubernetes selector llm/app=vllm"]


def names(**settings: Any) -> list[str]:
    return [source.name for source in build_sources([PoolSettings.model_validate({"name": "p", **settings})])["p"]]


def test_a_pool_has_its_sources_in_the_order_of_the_settings() -> None:
    """The settings' own endpoints first, so that what is found counts before them."""
    assert names(endpoints=ENDPOINTS, discovery=FOUND) == ["static", "etcd /a/", "file /etc/fleet.yaml", "dns A vllm.local:8000", *KUBERNETES]
    assert names(discovery=FOUND[:1]) == ["etcd /a/"]


def test_a_pool_without_sources_has_those_of_the_settings() -> None:
    """Be it none at all: the pool is known to have no endpoints."""
    assert names(endpoints=ENDPOINTS) == ["static"]
    assert names() == ["static"]


def test_only_the_settings_are_final() -> None:
    """Whatever else shows none may be wrong."""
    [sources] = build_sources([PoolSettings.model_validate({"name": "p", "endpoints": ENDPOINTS, "discovery": FOUND})]).values()
    assert [source.is_final for source in sources] == [True, False, False, False, False, False]


async def test_the_endpoints_of_the_settings_are_shown_as_other_sources_spell_them() -> None:
    """Else one endpoint would be two. A host's name stays as it is: gateways may resolve it."""
    pool = PoolSettings.model_validate({"name": "p", "endpoints": ENDPOINTS})
    async with aclosing(StaticSource(pool.endpoints).sets()) as sets:
        assert rows(await anext(sets)) == [("[2001:db8::1]:8000", "one", "one:9102", "", "", False), ("vllm-1:8000", "", "", "", "", False)]
