"""Who reaches what by the network policies of deploy/kubernetes, as a network that obeys them has it. They lie in several folders and meet by labels alone."""

from collections.abc import Callable

import pytest

from .manifests import Manifest, pods, read, rendered

Labels = dict[str, str]
NAMESPACE = "kubernetes.io/metadata.name"  # the label that every namespace has
FOLDERS = ("base", "vllm", "plain")

STRANGER: Labels = {"app": "else"}
ISTIOS_GATEWAY = {"gateway.networking.k8s.io/gateway-name": "llm"}


def selects(selector: Manifest, labels: Labels) -> bool:
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def lets_in(policy: Manifest, namespace: str, labels: Labels, port: int) -> bool:
    """Whether one of its rules does, for a pod with these labels in that namespace. `policy` is in llm."""

    def is_from(peer: Manifest) -> bool:
        is_there = selects(peer["namespaceSelector"], {NAMESPACE: namespace}) if "namespaceSelector" in peer else namespace == "llm"
        return is_there and selects(peer.get("podSelector", {}), labels)

    return any(
        any(one["port"] == port for one in rule["ports"]) and ("from" not in rule or any(map(is_from, rule["from"]))) for rule in policy["spec"]["ingress"]
    )


@pytest.fixture
def reaches(kubectl: str) -> Callable[..., bool]:
    """`reaches(pod, port, labels, namespace)`: may a pod with these labels there connect to that port of `vllm`, `lora-extproc` or `envoy`? With `monitoring`: also
    by the policies of that folder."""

    def judge(target: str, port: int, labels: Labels, namespace: str = "llm", *, monitoring: bool = False) -> bool:
        found = [one for folder in (*FOLDERS, *(["monitoring"] if monitoring else [])) for one in read(rendered(kubectl, folder))]
        theirs = next(pod.labels for pod in pods(found) if pod.owner["metadata"]["name"] == target)
        policies = [one for one in found if one["kind"] == "NetworkPolicy" and selects(one["spec"]["podSelector"], theirs)]
        return not policies or any(lets_in(policy, namespace, labels, port) for policy in policies)

    return judge


@pytest.fixture
def labels_of(kubectl: str) -> Callable[[str], Labels]:
    """Of the pods of that Deployment."""
    found = [pod for folder in FOLDERS for pod in pods(read(rendered(kubectl, folder)))]
    return lambda name: next(pod.labels for pod in found if pod.owner["metadata"]["name"] == name)


def test_routers_and_gateways_alone_reach_an_engine(reaches: Callable[..., bool], labels_of: Callable[[str], Labels]) -> None:
    """Who reaches its port may load and unload adapters; who reaches its stager may have it fetch some, which routers must. Stagers copy from each
    other."""
    router, envoy = labels_of("lora-extproc"), labels_of("envoy")
    for port, who in ((8000, True), (9102, True), (9190, False)):
        assert reaches("vllm", port, router) == who
    for labels, namespace in ((envoy, "llm"), (ISTIOS_GATEWAY, "llm"), ({}, "envoy-gateway-system"), ({"istio": "ingressgateway"}, "istio-system")):
        assert reaches("vllm", 8000, labels, namespace)
        assert not reaches("vllm", 9102, labels, namespace)
    for labels, namespace in (
        (STRANGER, "llm"),
        (router, "default"),
        (envoy, "default"),
        (ISTIOS_GATEWAY, "default"),
        ({}, "istio-system"),
    ):
        assert not any(reaches("vllm", port, labels, namespace) for port in (8000, 9102, 9190))


def test_a_router_is_reached_by_gateways_of_any_namespace(reaches: Callable[..., bool]) -> None:
    """For requests and health; its control API by nobody."""
    for namespace in ("llm", "istio-system", "envoy-gateway-system"):
        assert reaches("lora-extproc", 9002, STRANGER, namespace)
        assert reaches("lora-extproc", 9003, STRANGER, namespace)
        assert not reaches("lora-extproc", 9090, STRANGER, namespace)


def test_clients_reach_the_plain_envoy(reaches: Callable[..., bool]) -> None:
    """No policy of ours says who they are."""
    assert reaches("envoy", 10000, STRANGER, "default")


def test_prometheus_reaches_what_it_scrapes_and_nothing_else(reaches: Callable[..., bool]) -> None:
    """With the folder `monitoring`, from the namespace of that name."""
    for target, port in (("lora-extproc", 9090), ("vllm", 9190), ("vllm", 8000)):
        assert not reaches(target, port, {}, "monitoring")
        assert reaches(target, port, {}, "monitoring", monitoring=True)
        assert not reaches(target, port, {}, "default", monitoring=True)
    assert not reaches("vllm", 9102, {}, "monitoring", monitoring=True)
