"""deploy/kubernetes/envoy-gateway on a real Envoy Gateway: what the overlay makes of a cluster, and requests through the Envoy that Envoy Gateway configures.

One site for all: a kube-apiserver, an Envoy Gateway that follows it, the Envoy of its Gateway, two routers with the settings of the overlay's ConfigMap, and
pods whose engines Envoy reaches through relays, so that an engine can be out of the proxy's reach while its stager finds nothing wrong.
"""

import asyncio
import functools
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from extproc.up import demo
from tests.deploy.manifests import crds as crds_of_kinds
from tests.e2e.client import Client, post_with_trailers, weights_of
from tests.e2e.test_served import MOST_FAILED, asked
from tests.fakes.children import kill
from tests.fakes.envoy_gateway import EnvoyGateway
from tests.fakes.kube_apiserver import Admin, Cluster, crds, running_cluster
from tests.fakes.kubectl import Kubectl
from tests.fakes.wait import PATIENCE_S

from .envoy_gateway_site import MODELS, ONCE, OVERLAY, Gateway
from .gateway import ADMIN, GATEWAY, KUBERNETES, LARGE_BYTES, TOO_LARGE_BYTES, Requests, shipped_settings
from .site import FRONT, NAMES, PROXIES, ROUTERS

sys.path.insert(0, str(OVERLAY.parents[1] / "compose"))

from following import differs, steps  # it is no package

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.usefixtures("network")]

ROOT = KUBERNETES.parents[1]
NOT_HERE = ("helm install", "kubectl create namespace llm")  # there is no way to Envoy Gateway's chart; the site has the namespace
ADDRESS = "$(kubectl -n llm get gateway llm -o jsonpath='{.status.addresses[0].value}')"
POLICIES = "backendtrafficpolicies,clienttrafficpolicies,envoyextensionpolicies,envoypatchpolicies"
KINDS = {
    "gateway.networking.k8s.io": ("GatewayClass", "Gateway", "HTTPRoute", "ReferenceGrant"),
    "gateway.envoyproxy.io": ("BackendTrafficPolicy", "ClientTrafficPolicy", "EnvoyExtensionPolicy", "EnvoyPatchPolicy", "EnvoyProxy"),
}
REQUESTS = 200


@pytest.fixture(scope="module")
def cluster(network: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With the kinds of the overlay, and those that Envoy Gateway looks for besides."""
    directory = tmp_path_factory.mktemp("cluster")
    found = crds_of_kinds(crds("gateway-api", "envoy-gateway"), {(group, kind) for group, kinds in KINDS.items() for kind in kinds})
    (directory / "crds.yaml").write_text(yaml.dump_all(found, Dumper=yaml.CSafeDumper))
    with running_cluster(directory, [directory / "crds.yaml"]) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(cluster: Cluster, origin: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    """Everything, as a cluster has it some seconds after `kubectl apply`."""
    directory = tmp_path_factory.mktemp("site")
    kubeconfig = cluster.server.kubeconfig(directory / "admin")
    kubectl = Kubectl(kubeconfig)
    async with (
        Admin(cluster.server) as admin,
        EnvoyGateway(kubectl, kubeconfig, directory) as envoy_gateway,
        Gateway(kubectl, envoy_gateway, admin, origin, directory) as site,
    ):
        await asyncio.to_thread(kubectl, "apply", "-f", KUBERNETES / "vllm" / "service.yaml", "-n", "llm")
        await site.apply()
        await asyncio.gather(envoy_gateway.deploy("llm", PROXIES[0], ADMIN), site.start_routers(), site.have("a", "b", "c"))
        await site.until_answered_with(200)
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def site(running: Gateway) -> Gateway:
    """With three pods, which Envoy knows, and without a component."""
    await running.have("a", "b", "c")
    await running.until_known("a", "b", "c", cluster=MODELS, envoy_admin=ADMIN)
    return running


@pytest_asyncio.fixture(loop_scope="module")
async def client() -> AsyncIterator[Client]:
    """On connections of the test's own: one that is older than a change goes on with what was before."""
    client = Client(GATEWAY)
    try:
        yield client
    finally:
        await client.close()


async def test_every_policy_is_accepted_and_the_gateway_is_programmed(site: Gateway) -> None:
    """No condition of any object says that something of it is left out; that one policy takes a rule from another is meant."""
    await site.until_accepted(f"gateways,httproutes,{POLICIES}")
    found = await site.conditions(POLICIES)
    assert {name for name, what, _ in found if what.startswith("Accepted ")} == {
        "BackendTrafficPolicy vllm",
        "BackendTrafficPolicy vllm-once",
        "ClientTrafficPolicy llm",
        "EnvoyExtensionPolicy lora-extproc",
    }


class TestEnvoyGateway(Requests):
    """What is asked of every gateway."""


async def test_a_forged_mark_takes_no_request_to_the_rule_without_retries(site: Gateway, client: Client, origin: Path) -> None:
    """A destination, and the mark that takes a request to the rule without retries: each request reaches the pod that its router named first."""
    before, once = await site.served(), await site.asked_total(ONCE)
    for pod in site.pods.values():
        forged = {"x-gateway-destination-endpoint": pod.endpoints[0], "x-lora-extproc-no-retry": "1"}
        assert (await client.chat("team/a", forged)).weights == weights_of(origin, "team/a")
    assert await site.served() - before == {"true": len(site.pods)}
    assert await site.asked_total(ONCE) == once


async def test_a_body_that_ends_in_trailers_arrives_once(site: Gateway, origin: Path) -> None:
    """By the route's rule without retries: with them Envoy would send the body twice."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}], "model": "team/a"}).encode()
    status, answer = await post_with_trailers(GATEWAY, body, {})
    assert (status, json.loads(answer)["system_fingerprint"]) == (200, weights_of(origin, "team/a"))


async def test_pods_come_and_go_under_load_without_a_failed_request(site: Gateway) -> None:
    """One more is found by the router and by Envoy Gateway, each by itself; one that terminates ends in order."""
    async with site.load(GATEWAY) as load:
        await load.more(30)
        await site.add("d")
        await site.until_known(*"abcd", cluster=MODELS, envoy_admin=ADMIN)
        await load.more(100)
        await site.drain("d")
        await site.until_known(*"abc", cluster=MODELS, envoy_admin=ADMIN)
        await load.more(30)
    assert not load.failed()


async def test_policies_change_under_load_without_a_failed_request(site: Gateway) -> None:
    """One that changes the route, one that changes the filter, one that changes the listener, and all of them back."""
    shown = ('"num_retries": 5', '"message_timeout": "331s"', '"per_connection_buffer_limit_bytes": 2097152')
    async with site.load(GATEWAY) as load:
        await load.more(30)
        await site.change("btp", "vllm", "/spec/retry/numRetries", 5)
        await site.change("eep", "lora-extproc", "/spec/extProc/0/messageTimeout", "331s")
        await site.change("ctp", "llm", "/spec/connection/bufferLimit", "2Mi")
        for text in shown:
            await site.until_shown(text)
        await load.more(30)
        await site.apply()
        for text in shown:
            await site.until_shown(text, is_gone=True)
        await load.more(30)
    assert not load.failed()


async def test_envoy_gateway_is_away_and_back_under_load_without_a_failed_request(site: Gateway) -> None:
    """Envoy goes on with what it has; afterwards it is told of what changed meanwhile."""
    async with site.load(GATEWAY) as load:
        await load.more(30)
        await site.envoy_gateway.kill()
        await site.change("btp", "vllm", "/spec/retry/numRetries", 4)
        await load.more(100)
        await site.envoy_gateway.start()
        await site.until_shown('"num_retries": 4')
        await site.apply()
        await site.until_shown('"num_retries": 4', is_gone=True)
        await load.more(30)
    assert not load.failed()


async def test_an_engine_that_only_envoy_cannot_reach_costs_a_few_retries_and_no_404(site: Gateway, client: Client, origin: Path) -> None:
    """Its stager finds nothing wrong. Envoy's retry leaves the list for any pod, and says so by `upstream.address`: no client sees that pod's 404."""
    models = [*NAMES, demo.BASE_MODEL]
    outcomes, _ = await asked(client, models)
    assert outcomes == {("first", 200): len(models)}
    name = await site.owner("team/a")
    port = await site.cut(name)
    try:
        outcomes, answers = await asked(client, list(islice(cycle(models), REQUESTS)))
    finally:
        await site.mend(name, port)
    failed = outcomes["first", 503]
    assert outcomes == Counter({("first", 200): REQUESTS - failed, ("first", 503): failed, ("again", 200): failed})
    assert failed <= MOST_FAILED
    assert all(answer.weights == weights_of(origin, model) for model, answer in answers if model in NAMES)


async def test_a_request_that_no_router_has_seen_is_refused_with_the_patch_policy_alone(site: Gateway, client: Client) -> None:
    """Such a request names no pod: the fallback is any pod, and with the policy none."""
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "eep", "lora-extproc")
    await site.until_shown("extproc/0", is_gone=True)
    assert (await client.chat(demo.BASE_MODEL)).status == 200
    await site.apply("refusing")
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "eep", "lora-extproc")
    async with site.news_of_endpoints():
        await site.until_shown("lora_extproc_nowhere")
    await site.until_shown("extproc/0", is_gone=True)
    await site.until_accepted("envoypatchpolicies")
    assert (await client.chat(demo.BASE_MODEL)).status == 503
    await site.apply()
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "envoypatchpolicy", "vllm-refusing")
    await site.until_answered_with(200)


async def test_buffered_bodies_end_at_envoys_limit(site: Gateway, client: Client, origin: Path) -> None:
    """Up to that they are judged and changed like others."""
    await site.apply("buffered")
    await site.until_shown('"request_body_mode": "BUFFERED"')
    assert (await client.chat("team/a", padding=LARGE_BYTES)).weights == weights_of(origin, "team/a")
    refused = await client.chat("team/a", padding=TOO_LARGE_BYTES)
    assert (refused.status, refused.headers.get("x-lora-extproc-reason")) == (413, None)


async def test_with_headers_only_a_header_names_the_model(site: Gateway, client: Client, origin: Path) -> None:
    """And the engine knows the adapter by the name that the body has."""
    await site.apply("headers-only")
    await site.until_shown('"request_body_mode": "BUFFERED"', is_gone=True)
    answer = await client.chat("team/b", {"x-gateway-model-name": "team/b"})
    assert answer.weights == weights_of(origin, "team/b")
    await site.apply()
    await site.until_shown('"request_body_mode": "FULL_DUPLEX_STREAMED"')


async def test_a_mode_that_shows_part_of_a_body_is_refused_in_words(site: Gateway, client: Client) -> None:
    """Envoy Gateway accepts it; the router says why it cannot be spoken."""
    await site.change("eep", "lora-extproc", "/spec/extProc/0/processingMode/request/body", "Streamed")
    await site.until_shown('"request_body_mode": "STREAMED"')
    answer = await client.chat("team/a")
    assert (answer.status, answer.code) == (500, "protocol")
    await site.apply()
    await site.until_shown('"request_body_mode": "FULL_DUPLEX_STREAMED"')


async def test_for_a_service_without_any_pod_envoy_gateway_answers_itself(site: Gateway, client: Client) -> None:
    """500 without routers, and their policy is not accepted meanwhile; 503 without engines."""
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "endpointslice", "lora-extproc-1")
    await site.until_answered_with(500)
    assert any("no ready endpoints" in what for _, what, is_true in await site.conditions("eep") if not is_true)
    await site.publish_routers()
    await site.until_answered_with(200)
    await asyncio.to_thread(site.kubectl, "-n", "llm", "delete", "endpointslice", "vllm-1")
    await site.until_answered_with(503)
    assert "x-lora-extproc-reason" not in (await client.chat(demo.BASE_MODEL)).headers
    await site.publish_pods()
    await site.until_answered_with(200)


async def test_a_router_that_dies_costs_the_requests_whose_engines_have_not_answered(site: Gateway) -> None:
    """It was to be told who served them. What comes afterwards is asked of the other one: Envoy does not wait until the dead one's health is asked for."""
    before = await site.ejected()
    async with site.load(GATEWAY) as load:
        await load.more(30)
        dead = site.routers.pop()
        await kill(dead)
        died_s = asyncio.get_running_loop().time()
        await load.more(100)
    assert not load.failed(died_s)
    assert load.failed().total() <= len(NAMES)
    assert await site.ejected() > before


async def test_without_a_router_clients_are_told_to_ask_again(site: Gateway, client: Client) -> None:
    """503, where Envoy Gateway's own default is 500."""
    await kill(*site.routers)
    assert (await client.chat("team/a")).status == 503


async def test_with_one_endpoint_a_router_names_one_pod(site: Gateway, client: Client, origin: Path) -> None:
    """By the settings of that component, which differ from the base's by nothing else; the route has no retries."""
    plain = await asyncio.to_thread(shipped_settings, site.kubectl)
    await site.apply("one-endpoint")
    settings = await asyncio.to_thread(shipped_settings, site.kubectl)
    assert settings == {**plain, "router": {**plain["router"], "max_retry_endpoints": 1}}
    await site.until_shown('"num_retries": 2', is_gone=True)
    await site.start_router(settings, ROUTERS[0])
    await site.until_answered_with(200)
    assert (await client.chat("team/a")).weights == weights_of(origin, "team/a")


async def test_the_readmes_commands_do_what_it_says(site: Gateway) -> None:
    """In their order, from the top of the repository, on the site as it is; the last one undoes all, and Envoy Gateway lets its Gateway go."""
    programs = site.directory / "bin"
    programs.mkdir()
    (programs / "kubectl").write_text(f'#!/bin/sh\nexec {shlex.join(site.kubectl.command)} "$@"\n')
    (programs / "kubectl").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    for step in steps((OVERLAY / "README.md").read_text()):
        if step.command.startswith(NOT_HERE):
            continue
        command = step.command.replace(ADDRESS, f"{ADDRESS}:{FRONT}")  # of the pod: nothing here forwards the Service's port to it
        run = functools.partial(subprocess.run, command, shell=True, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)
        done = await asyncio.to_thread(run)
        assert done.returncode == 0, f"{step.command}: {done.stderr}"
        assert not differs(done.stdout, step), step.command
    assert not await asyncio.to_thread(site.kubectl.get, "gateways,gatewayclasses", "-A")
