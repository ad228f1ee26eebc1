"""A router started as charts start an Endpoint Picker: by flags alone, with the pods of an InferencePool that a real kube-apiserver has."""

import asyncio
from pathlib import Path

import aiohttp
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.up.processes import free_ports, python, spawn, stop
from tests.fakes.kube_apiserver import Admin, Cluster
from tests.fakes.wait import PATIENCE_S

POD = "127.0.0.9"  # nobody listens there; the router may try


async def until_found(http: str, address: str) -> None:
    """Wait until the router's own API shows the endpoint."""
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"http://{http}/v1/endpoints") as response:
                    if [endpoint["address"] for endpoint in await response.json()] == [address]:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def test_a_router_of_flags_alone_finds_its_pool_and_answers_probes(cluster: Cluster, admin: Admin, tmp_path: Path) -> None:
    """The health service has the name that manifests of the inference extension probe."""
    await admin.pool("llama", [8000])
    await admin.pod("a", POD)
    grpc_port, health_port, http_port = free_ports(3)
    flags = ["--pool-name", "llama", "--pool-namespace", "llm", "--kubeconfig", cluster.server.kubeconfig(tmp_path / "kubeconfig")]
    flags += ["--grpc-port", str(grpc_port), "--grpc-health-port", str(health_port), f"--metrics-port={http_port}", "--secure-serving=false"]
    child = await spawn("router", python("router", *flags), tmp_path)
    try:
        await until_found(f"127.0.0.1:{http_port}", f"{POD}:8000")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{health_port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service="inference-extension"))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await stop([child], 2.0)
