"""deploy/kubernetes/istio and inference-pool against the rules that they repeat: the settings' defaults, our own Envoy's balancer, and each other."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.read import parse
from extproc.config.settings import Settings

from .manifests import KUBERNETES, Manifest, named, read, rendered

POOLS = ("istio", "ai-gateway", "agentgateway", "gke")
ONE_ENDPOINT = POOLS[1:]
OWN_ENVOY = Path(__file__).parents[2] / "envoy" / "full-duplex.yaml"


def settings_of(folder: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((KUBERNETES / folder / "settings.yaml").read_text())
    return settings


def patches(kubectl: str, overlay: str = "istio") -> list[Manifest]:
    """Of the EnvoyFilter."""
    found: list[Manifest] = named(read(rendered(kubectl, overlay)), "EnvoyFilter", "lora-extproc")["spec"]["configPatches"]
    return found


def value(found: list[Manifest], applies_to: str, operation: str, at: int = 0) -> Manifest:
    of_that = [one["patch"]["value"] for one in found if (one["applyTo"], one["patch"]["operation"]) == (applies_to, operation)]
    one: Manifest = of_that[at]
    return one


def test_the_settings_of_a_pool_are_the_bases_but_for_their_source() -> None:
    """Written out three times, since kustomize replaces a file whole."""
    expected = settings_of("base")
    del expected["envoy"]  # there is none of ours
    del expected["pools"][0]["discovery"][0]["service"]
    expected["pools"][0]["discovery"][0]["inference_pool"] = "llama"
    assert settings_of("inference-pool/pool") == expected
    expected["router"] |= {"max_retry_endpoints": 1, "tls": {"mode": "self-signed"}}
    assert settings_of("inference-pool/one-endpoint") == expected


@pytest.mark.parametrize("gateway", POOLS)
def test_every_pool_fails_closed_and_asks_the_router(kubectl: str, gateway: str) -> None:
    """And the route leads to that pool, through the one Gateway of the overlay."""
    found = read(rendered(kubectl, f"inference-pool/{gateway}"))
    picker = named(found, "InferencePool", "llama")["spec"]["endpointPickerRef"]
    assert picker == {"name": "lora-extproc", "port": {"number": 9002}, "failureMode": "FailClose"}
    assert 9002 in [port["port"] for port in named(found, "Service", "lora-extproc")["spec"]["ports"]]
    route = named(found, "HTTPRoute", "vllm")["spec"]
    assert route["rules"][0]["backendRefs"] == [{"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "llama"}]
    assert [parent["name"] for parent in route["parentRefs"]] == [one["metadata"]["name"] for one in found if one["kind"] == "Gateway"]


@pytest.mark.parametrize("gateway", ONE_ENDPOINT)
def test_gateways_that_take_one_address_are_told_one(kubectl: str, gateway: str) -> None:
    """Over TLS."""
    found = read(rendered(kubectl, f"inference-pool/{gateway}"))
    settings = parse(yaml.safe_load(named(found, "ConfigMap", "lora-extproc")["data"]["settings.yaml"]), source=gateway)
    assert (settings.router.max_retry_endpoints, settings.router.tls.mode) == (1, "self-signed")


def test_istios_retries_and_waits_fit_the_settings(kubectl: str) -> None:
    """Every endpoint of the list is tried, and none beside; a held request is not given up before the router gives it up."""
    found = patches(kubectl)
    router = Settings().router
    retries = value(found, "HTTP_ROUTE", "MERGE")["route"]["retry_policy"]
    assert retries["num_retries"] == router.max_retry_endpoints - 1
    assert "5xx" not in retries["retry_on"]
    ext_proc = value(found, "HTTP_FILTER", "INSERT_BEFORE")["typed_config"]
    assert float(ext_proc["message_timeout"].removesuffix("s")) > router.max_stage_deadline_s
    assert ext_proc["failure_mode_allow"] is False
    assert "retry_policy" not in value(found, "HTTP_ROUTE", "INSERT_BEFORE")["route"]


def test_istio_balances_as_our_own_envoy_does(kubectl: str) -> None:
    """The endpoint from metadata alone, and a fallback that refuses."""
    clusters = yaml.safe_load(OWN_ENVOY.read_text())["static_resources"]["clusters"]
    own = next(cluster for cluster in clusters if cluster["name"] == "models")["load_balancing_policy"]
    assert value(patches(kubectl), "CLUSTER", "MERGE")["load_balancing_policy"] == own


def test_istio_asks_another_router_as_our_own_envoy_does(kubectl: str) -> None:
    """A retry goes to one that has not been asked: the dead one is known to be dead only when its health is asked for."""
    connections = yaml.safe_load(OWN_ENVOY.read_text())["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    own = connections["http_filters"][0]["typed_config"]["grpc_service"]["retry_policy"]
    assert "previous_hosts" in own["retry_host_predicate"][0]["name"]
    assert value(patches(kubectl), "HTTP_FILTER", "INSERT_BEFORE")["typed_config"]["grpc_service"]["retry_policy"] == own


def test_the_filter_is_on_where_the_route_has_its_name(kubectl: str) -> None:
    """And nowhere else: in the listener it is disabled. Both overlays name their route so."""
    found = patches(kubectl)
    ext_proc = value(found, "HTTP_FILTER", "INSERT_BEFORE")
    assert ext_proc["disabled"] is True
    routes = [one for one in found if one["applyTo"] == "HTTP_ROUTE"]
    assert all(ext_proc["name"] in one["patch"]["value"]["typed_per_filter_config"] for one in routes)
    [name] = {one["match"]["routeConfiguration"]["vhost"]["route"]["name"] for one in routes}
    assert named(read(rendered(kubectl, "istio")), "HTTPRoute", "vllm")["spec"]["rules"][0]["name"] == name
    assert named(read(rendered(kubectl, "istio/classic")), "VirtualService", "vllm")["spec"]["http"][0]["name"] == name


def test_the_classic_filter_is_where_the_gateways_pods_are(kubectl: str) -> None:
    """By their label, which is the Gateway's selector; nothing else of it differs."""
    found = read(rendered(kubectl, "istio/classic"))
    envoy_filter = named(found, "EnvoyFilter", "lora-extproc")
    assert envoy_filter["metadata"]["namespace"] == "istio-system"
    assert envoy_filter["spec"]["workloadSelector"]["labels"] == named(found, "Gateway", "llm")["spec"]["selector"]
    assert envoy_filter["spec"]["configPatches"] == patches(kubectl)
