"""The Endpoint Picker's part of every conformance test of the Gateway API Inference Extension (v1.6): a real Envoy, configured as Istio 1.31 configures one
for an InferencePool, asks a real router. The pods are echo servers, which the same Envoy is, too.

The filter, the route and the clusters are those of tests/golden/istio_inference_pool.yaml, which tests/e2e/kubernetes/test_istio.py takes from a real Istio.
"""

import asyncio
import io
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import yaml

from extproc.core.conformance import ECHO_HEADER, SERVED_HEADER
from extproc.up.processes import Child, free_ports, python, spawn, stop
from tests.conftest import OLDEST
from tests.fakes.children import until_answered
from tests.fakes.wait import PATIENCE_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOLDEN = Path(__file__).parents[1] / "golden" / "istio_inference_pool.yaml"
PODS = ("127.0.0.21", "127.0.0.22", "127.0.0.23")
REQUESTS, AT_ONCE = 100, 10  # as the suite sends them
BODY = json.dumps({"model": "conformance-fake-model", "prompt": "Write as if you were a critic: San Francisco"}).encode()
OPTIONS = "typed_extension_protocol_options"
SUBSET = {"metadata_namespace": "envoy.lb.subset_hint", "key": "x-gateway-destination-endpoint-subset"}


class Suite:
    """Two pools, `primary` with three ranks in each pod, and `h2c`, each with its picker; routes that fail open lead to the first as well."""

    def __init__(self, directory: Path, envoy: Path) -> None:
        self._directory, self._envoy = directory, envoy
        self.front, admin, *ports = free_ports(10)
        self.ranks, self.h2c_port, pickers = ports[:3], ports[3], ports[4:]
        self.admin = f"127.0.0.1:{admin}"
        self._pickers = {"primary": pickers[:2], "h2c": pickers[2:4]}  # their ports, ext_proc and HTTP
        self._children: dict[str, Child] = {}

    def endpoints(self, pool: str) -> list[str]:
        return [f"{pod}:{port}" for pod in PODS for port in (self.ranks if pool == "primary" else [self.h2c_port])]

    async def start_picker(self, pool: str) -> None:
        listen, http = (f"127.0.0.1:{port}" for port in self._pickers[pool])
        router = {"listen": listen, "http_listen": http, "health_listen": "", "lameduck_s": 0, "conformance": True}
        pools = [{"name": pool, "endpoints": [{"address": address} for address in self.endpoints(pool)]}]
        file = self._directory / f"{pool}.yaml"
        file.write_text(yaml.safe_dump({"router": router, "pools": pools}))
        self._children[pool] = await spawn(pool, python("router", "--config", str(file)), self._directory)
        await until_answered(f"http://{http}/readyz", child=self._children[pool])

    async def show_picker(self, pool: str, *, is_there: bool) -> None:
        """Whether its Service has an endpoint, until the gateway knows."""
        address = f"127.0.0.1:{self._pickers[pool][0]}"
        new = self._directory / "new"
        kind = {"@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"}
        new.write_text(json.dumps({"resources": [kind | _assignment(f"{pool}-picker", [address] if is_there else [])]}))
        new.rename(self._endpoints_of(pool))  # what Envoy looks for is a file that is moved there
        async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
            while "envoy" in self._children:
                async with session.get(f"http://{self.admin}/clusters") as response:
                    if (f"{pool}-picker::{address}::" in await response.text()) is is_there:
                        return
                await asyncio.sleep(0.05)

    def _endpoints_of(self, pool: str) -> Path:
        return self._directory / f"{pool}-picker.json"

    def said(self, pool: str) -> str:
        """The log of that pool's picker."""
        return self._children[pool].log.read_text()

    async def start(self) -> None:
        await asyncio.gather(*(self.start_picker(pool) for pool in self._pickers))
        for pool in self._pickers:
            await self.show_picker(pool, is_there=True)
        bootstrap = self._directory / "envoy.yaml"
        bootstrap.write_text(yaml.safe_dump(self._bootstrap()))
        command = [
            str(self._envoy),
            "-c",
            str(bootstrap),
            "--concurrency",
            "1",
            "-l",
            "warning",
            "--use-dynamic-base-id",
            "--service-node",
            "gateway",
            "--service-cluster",
            "gateway",
        ]
        self._children["envoy"] = await spawn("envoy", command, self._directory)
        await until_answered(f"http://{self.admin}/ready", child=self._children["envoy"])

    async def stop(self) -> None:
        await stop(list(self._children.values()), 5.0)

    def _bootstrap(self) -> dict[str, Any]:
        istio = yaml.safe_load(GOLDEN.read_text())
        hosts = [
            {"name": name, "domains": [name], "routes": [_route(istio["route"], pool, fails_open=name == "open")]}
            for name, pool in (("primary", "primary"), ("h2c", "h2c"), ("open", "primary"))
        ]
        rules = [{"header": "x-test-subset", "on_header_present": SUBSET}]  # Istio gives no hint; other gateways may
        hints = {"name": "hint", "typed_config": {"@type": _type("filters.http.header_to_metadata.v3.Config"), "request_rules": rules}}
        asks = deepcopy(istio["http_filter"])
        asks["typed_config"]["metadata_options"]["forwarding_namespaces"]["untyped"].append(SUBSET["metadata_namespace"])
        listeners = [_listener("front", "127.0.0.1", self.front, hosts, [hints, asks])]
        listeners += [_echo(pod, port, "HTTP1") for pod in PODS for port in self.ranks]
        listeners += [_echo(pod, self.h2c_port, "HTTP2") for pod in PODS]
        to_pool, to_picker = istio["clusters"]["pool"], istio["clusters"]["picker"]
        with_h2c = {**to_pool, OPTIONS: to_picker[OPTIONS]}
        clusters = []
        for pool, cluster in (("primary", to_pool), ("h2c", with_h2c)):
            clusters.append({**cluster, "name": pool, "type": "STATIC", "load_assignment": _assignment(pool, self.endpoints(pool))})
            told = {"eds_config": {"path_config_source": {"path": str(self._endpoints_of(pool))}}}
            clusters.append({**to_picker, "name": f"{pool}-picker", "type": "EDS", "eds_cluster_config": told})
        address, _, port = self.admin.rpartition(":")
        return {
            "admin": {"address": {"socket_address": {"address": address, "port_value": int(port)}}},
            "static_resources": {"listeners": listeners, "clusters": clusters},
        }


def _type(name: str) -> str:
    return f"type.googleapis.com/envoy.extensions.{name}"


def _listener(name: str, address: str, port: int, hosts: list[dict[str, Any]], filters: list[dict[str, Any]], codec: str = "AUTO") -> dict[str, Any]:
    router = {"name": "envoy.filters.http.router", "typed_config": {"@type": _type("filters.http.router.v3.Router")}}
    manager = {
        "@type": _type("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": name,
        "codec_type": codec,
        "http_filters": [*filters, router],
        "route_config": {"name": name, "virtual_hosts": hosts},
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    return {"name": name, "address": {"socket_address": {"address": address, "port_value": port}}, "filter_chains": [chain]}


def _echo(pod: str, port: int, codec: str) -> dict[str, Any]:
    """As the suite's: says who it is, and answers with the header that the request asks for."""
    answer = {"status": 200, "body": {"inline_string": json.dumps({"endpoint": f"{pod}:{port}", "protocol": codec})}}
    echoed = {"header": {"key": "x-echoed", "value": f"%REQ({ECHO_HEADER})%"}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
    route = {"match": {"prefix": "/"}, "direct_response": answer, "response_headers_to_add": [echoed]}
    return _listener(f"{pod}:{port}", pod, port, [{"name": "all", "domains": ["*"], "routes": [route]}], [], codec)


def _route(as_istio_has_it: dict[str, Any], pool: str, *, fails_open: bool) -> dict[str, Any]:
    route = deepcopy(as_istio_has_it)
    route["route"]["cluster"] = pool
    overrides = route["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["overrides"]
    overrides["grpc_service"]["envoy_grpc"]["cluster_name"] = f"{pool}-picker"
    overrides["failure_mode_allow"] = fails_open
    return route


def _assignment(name: str, addresses: list[str]) -> dict[str, Any]:
    split = [address.rpartition(":") for address in addresses]
    endpoints = [{"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}} for host, _, port in split]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def suite(envoy: Path, envoy_version: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Suite]:
    """Everything runs."""
    if envoy_version == OLDEST:
        pytest.skip(f"Envoy {OLDEST} has no override_host.selected_host_key, by which Istio tells who served")
    suite = Suite(tmp_path_factory.mktemp("suite"), envoy)
    try:
        await suite.start()
        yield suite
    finally:
        await suite.stop()


class Asker:
    """Sends the suite's request to one host."""

    def __init__(self, session: aiohttp.ClientSession, suite: Suite) -> None:
        self._session, self._url = session, f"http://127.0.0.1:{suite.front}/primary-gateway-test"

    async def ask(self, host: str, **headers: str) -> tuple[int, str]:
        """The status, and who served; that the picker chose it and that the test was told so is checked on the way."""
        sent = {"host": host, "content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(self._url, data=BODY, headers=sent) as response:
            if response.status != 200 or SERVED_HEADER not in response.headers:
                return response.status, ""
            served = str((await response.json(content_type=None))["endpoint"])
            assert response.headers[SERVED_HEADER] == served
            assert response.headers["x-echoed"] == f"{SERVED_HEADER}:{served}"
            return response.status, served

    async def ask_often(self, host: str, selection: str) -> Counter[tuple[int, str]]:
        left = iter(range(REQUESTS))
        answers: Counter[tuple[int, str]] = Counter()

        async def one_after_the_other() -> None:
            for _ in left:
                answers[await self.ask(host, test_epp_endpoint_selection=selection)] += 1

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
        return answers


@asynccontextmanager
async def asking(suite: Suite) -> AsyncIterator[Asker]:
    async with aiohttp.ClientSession() as session:
        yield Asker(session, suite)


async def test_the_gateway_follows_the_picker(suite: Suite) -> None:
    """GatewayFollowingEPPRouting, and with data-parallel ranks: one pod, two, all; of some a rank or two alone. All that may serve do, and nobody else."""
    one, two, three = PODS
    first, second, third = suite.ranks
    everybody = {f"{pod}:{port}" for pod in PODS for port in suite.ranks}
    async with asking(suite) as asker:
        for selection, may_serve in (
            (two, {f"{two}:{port}" for port in suite.ranks}),
            (f"{one},{three}:{second}", {f"{one}:{port}" for port in suite.ranks} | {f"{three}:{second}"}),
            (f"{one},{two}:{first},{two}:{third},{three}", everybody - {f"{two}:{second}"}),
            (f"{one},{two},{three}", everybody),
            ("", everybody),
        ):
            answers = await asker.ask_often("primary", selection)
            assert {status for status, _ in answers} == {200}
            assert {served for _, served in answers} <= may_serve
            assert len({served for _, served in answers}) > 1


async def test_the_gateways_hint_limits_the_picker(suite: Suite) -> None:
    """The Endpoint Picker protocol's subset: nobody else is chosen, the test's own header counts before it, and 503 says that nobody is left."""
    one, two, _ = PODS
    async with asking(suite) as asker:
        rank = f"{one}:{suite.ranks[1]}"
        assert {await asker.ask("primary", x_test_subset=rank) for _ in range(10)} == {(200, rank)}
        other = f"{two}:{suite.ranks[0]}"
        assert await asker.ask("primary", x_test_subset=rank, test_epp_endpoint_selection=other) == (200, other)
        assert await asker.ask("primary", x_test_subset="10.9.9.9") == (503, "")


async def test_nobody_but_the_pools_endpoints_is_ever_chosen(suite: Suite) -> None:
    """Not even by a test: a picker is no way to other addresses. Whoever reads its log is told that clients choose among its own."""
    assert "clients say who serves, and no model is known" in suite.said("primary")
    async with asking(suite) as asker:
        assert await asker.ask("primary", test_epp_endpoint_selection=suite.admin) == (503, "")
        status, served = await asker.ask("primary", x_gateway_destination_endpoint=suite.admin)
        assert (status, served in suite.endpoints("primary")) == (200, True)


async def test_a_pool_of_plain_http_2_is_served(suite: Suite) -> None:
    """InferencePoolAppProtocol, kubernetes.io/h2c: the gateway sees to it; the picker names the port that speaks it."""
    async with asking(suite) as asker:
        for endpoint in suite.endpoints("h2c"):
            assert await asker.ask("h2c", test_epp_endpoint_selection=endpoint) == (200, endpoint)


async def test_who_served_is_told_without_a_selection(suite: Suite) -> None:
    """GatewayDestinationEndpointServed, with whoever's turn it is: a body is not read, whatever it is, and there may be none."""
    async with aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{suite.front}/destination-endpoint-served-test"
        for data in (None, b"", b"no JSON", b"{" * 3_000_000):
            body = None if data is None else io.BytesIO(data)
            async with session.request("GET" if data is None else "POST", url, data=body, headers={"host": "primary"}) as response:
                assert response.headers[SERVED_HEADER] == (await response.json(content_type=None))["endpoint"]


async def test_a_picker_without_endpoints_fails_open_or_closed_as_the_pool_says(suite: Suite) -> None:
    """EppUnAvailableFailOpen: any pod serves while the picker's Service has no endpoint; a pool that fails closed has an error; both are well afterwards."""
    chosen = f"{PODS[0]}:{suite.ranks[0]}"
    async with asking(suite) as asker:
        for host in ("open", "primary"):
            assert await asker.ask(host, test_epp_endpoint_selection=chosen) == (200, chosen)
        await suite.show_picker("primary", is_there=False)
        assert (await asker.ask("open", test_epp_endpoint_selection=chosen))[0] == 200
        assert await asker.ask("primary", test_epp_endpoint_selection=chosen) == (500, "")
        await suite.show_picker("primary", is_there=True)
        for host in ("open", "primary"):
            assert await asker.ask(host, test_epp_endpoint_selection=chosen) == (200, chosen)
