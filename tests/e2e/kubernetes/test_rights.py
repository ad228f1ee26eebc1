"""The rights that deploy/kubernetes/rbac gives: each file is enough for its way to find endpoints, and no right in it can be spared."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.kubernetes.api import Api
from extproc.kubernetes.failures import NotAllowed
from extproc.kubernetes.objects import PODS, Object
from tests.fakes.kube_apiserver import Admin, Cluster
from tests.fakes.wait import until

from .conftest import DiscoveryFactory

RBAC = Path(__file__).parents[3] / "deploy" / "kubernetes" / "rbac"
IP = "10.77.0.1"
WAYS: dict[str, dict[str, Any]] = {
    "inference-pool": {"inference_pool": "llama"},
    "service": {"service": "vllm"},
    "selector": {"selector": "app=vllm", "ports": [8000]},
}


def manifest(way: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RBAC / way / "rights.yaml").read_text()))


def rights() -> list[tuple[str, int, str]]:
    """Each verb of each rule of each file."""
    return [
        (way, number, verb)
        for way in WAYS
        for one in manifest(way)
        if one["kind"] == "Role"
        for number, rule in enumerate(one["rules"])
        for verb in rule["verbs"]
    ]


@pytest.fixture
async def pods(admin: Admin) -> Admin:
    """One pod, which all three ways find."""
    await admin.pool("llama", [8000])
    await admin.pod("a", IP)
    await admin.slice("vllm-1", "vllm", [{"addresses": [IP], "conditions": {"ready": True}}], [{"name": "http", "port": 8000}])
    return admin


async def account(admin: Admin, objects: list[dict[str, Any]]) -> str:
    """The token of the service account, with the rights of the manifest and no others."""
    for one in objects:
        await admin.apply(one)
    return await admin.token("lora-extproc")


@pytest.mark.parametrize("way", WAYS)
async def test_the_account_of_each_file_finds_its_endpoints(pods: Admin, discovering: DiscoveryFactory, way: str, cluster: Cluster) -> None:
    """And follows them; it may write nothing."""
    token = await account(pods, manifest(way))
    async with discovering(token=token, **WAYS[way]) as taken:
        await taken.until(f"{IP}:8000")
        await pods.clear()
        await taken.until()
    async with Api(cluster.server.access(token), 5) as api:
        with pytest.raises(NotAllowed, match="cannot delete resource"):
            await api.delete(PODS, "llm", "a")
        with pytest.raises(NotAllowed, match="cannot get resource"):
            await api.get(PODS, "llm", "a", Object)


@pytest.mark.parametrize(("way", "number", "verb"), rights())
async def test_a_right_that_is_missing_is_told_in_words(
    pods: Admin, discovering: DiscoveryFactory, way: str, number: int, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who may not do what to which kind, where; and nothing is shown that would grow old."""
    objects = manifest(way)
    rules = next(one for one in objects if one["kind"] == "Role")["rules"]
    rules[number]["verbs"].remove(verb)
    resource = rules[number]["resources"][0]
    token = await account(pods, objects)
    async with discovering(token=token, timeout_s=5, **WAYS[way]) as taken:
        await until(lambda: "fails" in caplog.text)
        assert not taken.fleets[-1]["p"]
    assert f'User "system:serviceaccount:llm:lora-extproc" cannot {verb} resource "{resource}"' in caplog.text


async def test_rights_that_are_taken_away_for_a_while_cost_no_endpoint(pods: Admin, discovering: DiscoveryFactory, caplog: pytest.LogCaptureFixture) -> None:
    """The watch that has begun is not cut, but the next one is refused; the last endpoints count until the rights are back."""
    objects = manifest("selector")
    role = next(one for one in objects if one["kind"] == "Role")
    token = await account(pods, objects)
    async with discovering(token=token, watch_s=1.0, **WAYS["selector"]) as taken:
        await taken.until(f"{IP}:8000")
        await pods.apply({**role, "rules": []})
        await until(lambda: "cannot list resource" in caplog.text or "cannot watch resource" in caplog.text)
        await pods.pod("b", "10.77.0.2")
        await pods.apply(role)
        await taken.until(f"{IP}:8000", "10.77.0.2:8000")
    assert not [fleet for fleet in taken.fleets[1:] if not fleet["p"]]


def test_the_files_differ_in_their_rules_alone() -> None:
    """One account and one role, so that a change of the way is one `kubectl apply`."""
    names = {tuple((one["kind"], one["metadata"]["name"], one["metadata"]["namespace"]) for one in manifest(way)) for way in WAYS}
    assert len(names) == 1
    assert {path.parent.name for path in RBAC.glob("*/rights.yaml")} == set(WAYS)
