"""A gateway whose fallback is any pod, as Istio's for an InferencePool: a real Envoy leaves the router's list when an engine cannot be reached."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from extproc.config.origins import OriginSettings
from extproc.config.read import parse
from extproc.config.settings import Settings
from extproc.up.processes import free_ports
from extproc.up.stack import Node, Plan, Stack
from tests.conftest import OLDEST
from tests.fakes.relay import Relay

from .client import Answer, Client, weights_of
from .conftest import NAMES

REQUESTS, AT_ONCE = 400, 4
MOST_FAILED = 5
ANY_POD = {
    "policies": [
        {
            "typed_extension_config": {
                "name": "envoy.load_balancing_policies.round_robin",
                "typed_config": {"@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"},
            }
        }
    ]
}
RETRIES = {
    "retry_on": "connect-failure,refused-stream,reset-before-request",
    "num_retries": 2,
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {"@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"},
        }
    ],
    "host_selection_retry_max_attempts": 5,
}
SERVED = {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint-served"}]}
TOLD_BY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what the filter and what the balancer are configured with
    # as Envoy Gateway can be told to: response headers alone
    "attribute": ({"response_attributes": ["upstream.address"]}, {}),
    # as Istio does for an InferencePool: the response in full duplex, too
    "metadata": ({"processing_mode": {"response_body_mode": "FULL_DUPLEX_STREAMED", "response_trailer_mode": "SEND"}}, {"selected_host_key": SERVED}),
}


class Relayed(Stack):
    """Envoy reaches each engine through a relay; its stager reaches it directly, and finds nothing wrong when the relay is gone."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.ports = dict(zip((f"node-{n + 1}" for n in range(plan.nodes)), free_ports(plan.nodes), strict=True))
        self.relays: dict[str, Relay] = {}

    def _engine_command(self, node: Node) -> list[str]:
        return super()._engine_command(self._directly(node))

    def _node_settings(self, settings: Settings, node: Node) -> Settings:
        return super()._node_settings(settings, self._directly(node))

    def _directly(self, node: Node) -> Node:
        return replace(node, engine=f"127.0.0.1:{self.ports[node.name]}")

    async def _wait_until_ready(self) -> None:
        for node in self.nodes:
            await self.mend(node.name)
        await super()._wait_until_ready()

    async def _stop(self) -> None:
        await super()._stop()
        for name in list(self.relays):
            await self.cut(name)

    async def mend(self, name: str) -> None:
        node = next(node for node in self.nodes if node.name == name)
        self.relays[name] = await Relay(self.ports[name], listen=int(node.engine.rpartition(":")[2])).__aenter__()

    async def cut(self, name: str) -> None:
        """Envoy's connections to that engine are refused."""
        await self.relays.pop(name).__aexit__(None, None, None)

    async def restart_envoy(self, change: Callable[[str], str]) -> None:
        """With another configuration."""
        child = self.process("envoy")
        child.process.terminate()
        await child.process.wait()
        file = Path(child.command[child.command.index("-c") + 1])
        file.write_text(await asyncio.to_thread(change, file.read_text()))
        await self.restart("envoy")
        await super()._wait_until_ready()


def as_gateways_do(bootstrap: str, told_by: str) -> str:
    """The fallback is any pod, each retry another, and the router is told who served."""
    config = yaml.safe_load(bootstrap)
    filters, balancer = TOLD_BY[told_by]
    [cluster] = [cluster for cluster in config["static_resources"]["clusters"] if cluster["name"] == "models"]
    [policy] = cluster["load_balancing_policy"]["policies"]
    policy["typed_extension_config"]["typed_config"] |= {"fallback_policy": ANY_POD, **balancer}
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    ext_proc = next(f["typed_config"] for f in manager["http_filters"] if "ext_proc" in f["name"])
    ext_proc["processing_mode"] |= {"response_header_mode": "SEND"} | filters.get("processing_mode", {})
    ext_proc["metadata_options"]["forwarding_namespaces"] = {"untyped": ["envoy.lb"]}
    del ext_proc["forward_rules"]
    ext_proc |= {name: value for name, value in filters.items() if name != "processing_mode"}
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        route["route"]["retry_policy"] = RETRIES
    return str(yaml.safe_dump(config))


async def asked(client: Client, models: Sequence[str]) -> tuple[Counter[tuple[str, int]], list[tuple[str, Answer]]]:
    """Ask for each, AT_ONCE at a time. What failed is asked for once more, at once. The outcomes, first and second, and the answers that count."""
    outcomes: Counter[tuple[str, int]] = Counter()
    answers: list[tuple[str, Answer]] = []
    left = iter(models)

    async def one_after_the_other() -> None:
        for model in left:
            answer = await client.chat(model)
            outcomes["first", answer.status] += 1
            if answer.status == 503:
                assert int(answer.headers["retry-after"]) > 0
                answer = await client.chat(model)
                outcomes["again", answer.status] += 1
            answers.append((model, answer))

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return outcomes, answers


@pytest.mark.parametrize("told_by", TOLD_BY)
async def test_an_engine_that_only_the_proxy_cannot_reach_costs_a_few_retries_and_no_404(
    told_by: str, envoy: Path, envoy_version: str, tmp_path: Path, origin: Path
) -> None:
    """Adapters that are warm on that engine alone: the proxy's retry asks a pod that does not know them. No client sees what that pod says."""
    if told_by == "metadata" and envoy_version == OLDEST:
        pytest.skip(f"Envoy {OLDEST} has no override_host.selected_host_key")
    settings = parse({"envoy": {"endpoints": "static"}}, source="test")
    plan = Plan(tmp_path, free_ports(1)[0], 3, (OriginSettings(type="file", path=str(origin)),), settings=settings, envoy=envoy)
    stack = Relayed(plan)
    async with stack:
        await stack.restart_envoy(lambda bootstrap: as_gateways_do(bootstrap, told_by))
        client = Client(stack.address)
        try:
            models = [*NAMES, stack.base_model.served_name]
            outcomes, _ = await asked(client, models)
            assert outcomes == {("first", 200): len(models)}
            async with aiohttp.ClientSession() as session, session.get(f"http://{stack.router_http}/v1/owner/{NAMES[0]}") as response:
                await stack.cut((await response.json())["candidates"][0]["node"])
            outcomes, answers = await asked(client, list(islice(cycle(models), REQUESTS)))
            failed = outcomes["first", 503]
            assert outcomes == Counter({("first", 200): REQUESTS - failed, ("first", 503): failed, ("again", 200): failed})
            assert 1 <= failed <= MOST_FAILED
            assert all(answer.weights == weights_of(origin, model) for model, answer in answers if model in NAMES)
        finally:
            await client.close()
