"""A stager that finds its peers through the API server: with the rights of deploy/kubernetes/rbac, and without them."""

from pathlib import Path

import pytest

from extproc.client import StagerClient
from extproc.config.read import parse
from extproc.stager.server import Server
from extproc.up.demo import BASE_MODEL
from extproc.up.processes import free_ports
from tests.fakes.adapters import write_small
from tests.fakes.kube_apiserver import Admin, Cluster
from tests.fakes.wait import until

from .test_rights import account, manifest

IP = "10.77.0.1"


async def test_without_rights_a_stager_serves_and_says_so_once(admin: Admin, cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its adapters come from their origin; when the role is there, it finds its peers without a restart."""
    await admin.pod("a", IP)
    objects = manifest("selector")
    account_only = [one for one in objects if one["kind"] == "ServiceAccount"]
    kubeconfig = cluster.server.kubeconfig(tmp_path / "kubeconfig", token=await account(admin, account_only))
    source = {"type": "kubernetes", "kubeconfig": kubeconfig, "selector": "app=vllm", "ports": [8000], "stager_port": 9102}
    write_small(tmp_path / "origin/acme/a")
    address = f"127.0.0.1:{free_ports(1)[0]}"
    engine = {"url": "", "base_model": BASE_MODEL, "max_lora_rank": 8}
    own = {"listen": address, "http_listen": "", "dir": str(tmp_path / "node"), "drain_s": 0, "engine": engine}
    own["origins"] = [{"type": "file", "path": str(tmp_path / "origin")}]
    server = Server(parse({"pools": [{"name": "p", "discovery": [source]}], "stager": own}, source="test"))
    try:
        await server.start()
        refusal = 'User "system:serviceaccount:llm:lora-extproc" cannot list resource "pods"'
        await until(lambda: refusal in caplog.text)
        async with StagerClient(address) as client:
            assert (await client.ensure("acme/a")).staged
        assert server.stager.not_ready is None
        assert caplog.text.count(refusal) == 1
        await account(admin, objects)
        peers = server.stager._fetcher._peers
        await until(lambda: list(peers._peers) == [f"{IP}:9102"])
        assert caplog.text.count(refusal) == 1
    finally:
        await server.stop()
        await admin.clear()
