"""What pods, EndpointSlices and InferencePools say of endpoints."""

from typing import Any

import msgspec
import pytest

from extproc.core.fleet import Found
from extproc.discovery.entries import row
from extproc.discovery.kubernetes_objects import EndpointSlice, Entry, InferencePool, Pod, PodReader, SliceReader, of_pods, of_slices

READER = PodReader((8000,), 9102)


def pod(name: str = "vllm-0", ip: str = "10.0.0.1", **more: Any) -> Pod:
    """A pod that serves; the keywords say otherwise."""
    metadata = {"name": name, "namespace": "llm", "uid": f"uid-{name}", "creationTimestamp": "2026-11-29T12:00:00Z", **more.pop("metadata", {})}
    status = {"phase": "Running", "podIP": ip, "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}], **more}
    return msgspec.convert({"metadata": metadata, "spec": {"nodeName": "n"}, "status": status}, Pod)


def slice_(*endpoints: dict[str, Any], name: str = "vllm-a", family: str = "IPv4", ports: Any = ({"name": "http", "port": 8000},)) -> EndpointSlice:
    raw = {"metadata": {"name": name, "namespace": "llm"}, "addressType": family, "endpoints": list(endpoints), "ports": ports}
    return msgspec.convert(msgspec.json.decode(msgspec.json.encode(raw)), EndpointSlice)


def endpoint(address: str = "10.0.0.1", pod: str = "vllm-0", **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions, "targetRef": {"kind": "Pod", "name": pod, "uid": f"uid-{pod}"}, "nodeName": "n", "zone": "z"}


def rows(entries: Any) -> list[Any]:
    return [row(entry) if isinstance(entry, Found) else f"{where} {entry}" for where, entry in entries]


# ---- pods


def test_a_ready_pod_is_an_endpoint() -> None:
    """Of its address and UID; its node is the pod, which has a stager and a directory of its own."""
    assert rows(READER.read(pod())) == [("10.0.0.1:8000", "vllm-0", "10.0.0.1:9102", "uid-vllm-0", "", False)]
    assert rows(READER.read(pod(ip="fd00::1"))) == [("[fd00::1]:8000", "vllm-0", "[fd00::1]:9102", "uid-vllm-0", "", False)]


def test_the_zone_of_a_pod_is_its_label() -> None:
    """Which Kubernetes copies from its node."""
    labelled = pod(metadata={"labels": {"topology.kubernetes.io/zone": "eu-1a"}})
    assert [zone for *_, zone, _ in rows(READER.read(labelled))] == ["eu-1a"]


@pytest.mark.parametrize(
    "status",
    [
        {"phase": "Pending"},
        {"phase": "Succeeded"},
        {"phase": "Failed"},
        {"podIP": ""},
        {"conditions": []},
        {"conditions": [{"type": "Ready", "status": "False"}]},
    ],
)
def test_a_pod_that_does_not_serve_is_none(status: dict[str, Any]) -> None:
    """Not yet, not now, or no more."""
    assert READER.read(pod(**status)) == ()


def test_a_pod_that_terminates_is_leaving_while_it_is_ready() -> None:
    """Then it is gone."""
    deleted = {"deletionTimestamp": "2026-11-29T12:01:00Z"}
    assert rows(READER.read(pod(metadata=deleted))) == [("10.0.0.1:8000", "vllm-0", "10.0.0.1:9102", "uid-vllm-0", "", True)]
    assert READER.read(pod(metadata=deleted, conditions=[{"type": "Ready", "status": "False"}])) == ()


def test_each_port_is_an_endpoint_with_a_stager_of_its_own() -> None:
    """Data-parallel ranks are engines of their own, in one pod: an adapter that one of them knows the next one does not."""
    assert [(address, node, stager) for address, node, stager, *_ in rows(PodReader((8000, 8001), 9102).read(pod()))] == [
        ("10.0.0.1:8000", "vllm-0", "10.0.0.1:9102"),
        ("10.0.0.1:8001", "vllm-0", "10.0.0.1:9103"),
    ]


def test_a_port_without_a_stager_is_told_of() -> None:
    """Ports end."""
    annotated = pod(metadata={"annotations": {"lora-extproc/stager-port": "65535"}})
    first, second = rows(PodReader((8000, 8001), 9102).read(annotated))
    assert first[2] == "10.0.0.1:65535"
    assert second == "pod llm/vllm-0 has no stager for port 8001: each port has one, on the port after the last one's, and there is no 65536"


@pytest.mark.parametrize(("annotation", "stager"), [("9200", "10.0.0.1:9200"), ("0", ""), (None, "10.0.0.1:9102")])
def test_a_pods_annotation_says_its_stagers_port(annotation: str | None, stager: str) -> None:
    """Before the settings do; 0 is none."""
    metadata = {"annotations": {"lora-extproc/stager-port": annotation}} if annotation is not None else {}
    [(_, _, found, *_)] = rows(READER.read(pod(metadata=metadata)))
    assert found == stager


@pytest.mark.parametrize("name", ["llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports"])
def test_a_pod_may_say_which_of_the_ports_serve(name: str) -> None:
    """As the Inference Extension's endpoint pickers read it: a port that the pool has not does not count."""
    reader = PodReader((8000, 8001, 8002), 9102)
    assert [(address, stager) for address, _, stager, *_ in rows(reader.read(pod(metadata={"annotations": {name: "8002, 8000,9999"}})))] == [
        ("10.0.0.1:8000", "10.0.0.1:9102"),
        ("10.0.0.1:8002", "10.0.0.1:9104"),
    ]
    assert rows(reader.read(pod(metadata={"annotations": {name: ""}}))) == []


@pytest.mark.parametrize(
    ("annotations", "complaint"),
    [
        ({"lora-extproc/stager-port": "x"}, "pod llm/vllm-0 has the annotation lora-extproc/stager-port with 'x', which is no port from 0 to 65535"),
        ({"lora-extproc/stager-port": "65536"}, "pod llm/vllm-0 has the annotation lora-extproc/stager-port with '65536', which is no port from 0 to 65535"),
        ({"llm-d.ai/active-ports": "8000,0"}, "pod llm/vllm-0 has the annotation llm-d.ai/active-ports with '0', which is no port from 1 to 65535"),
    ],
)
def test_an_annotation_that_is_wrong_is_told_of(annotations: dict[str, str], complaint: str) -> None:
    """The pod is left out rather than used in a way that it did not ask for."""
    assert rows(READER.read(pod(metadata={"annotations": annotations}))) == [complaint]


def test_of_two_pods_with_one_address_the_younger_counts() -> None:
    """It stands later, whatever the order in which they were shown."""
    old, new = pod("z-old", metadata={"creationTimestamp": "2026-11-29T12:00:00Z"}), pod("a-new", metadata={"creationTimestamp": "2026-11-29T12:00:01Z"})
    for order in ([old, new], [new, old]):
        assert [node for _, node, *_ in rows(of_pods((one, READER.read(one)) for one in order))] == ["z-old", "a-new"]


def test_of_two_pods_with_one_address_one_that_is_leaving_does_not_count() -> None:
    """Though it seems to be the younger one: API servers' clocks differ, and a time is of whole seconds."""
    leaving = pod("z-old", metadata={"creationTimestamp": "2026-11-29T12:00:01Z", "deletionTimestamp": "2026-11-29T12:01:00Z"})
    assert [node for _, node, *_ in rows(of_pods((one, READER.read(one)) for one in (pod("a-new"), leaving)))] == ["z-old", "a-new"]


def test_an_inference_pool_says_its_pods_and_ports() -> None:
    """All labels count, in an order that does not change."""
    raw = {"spec": {"selector": {"matchLabels": {"b": "2", "a": "1"}}, "targetPorts": [{"number": 8000}, {"number": 8001}], "appProtocol": "kubernetes.io/h2c"}}
    pool = msgspec.convert(raw, InferencePool)
    assert (pool.selector, pool.ports) == ("a=1,b=2", (8000, 8001))


# ---- slices


def read(*slices: EndpointSlice, names: tuple[str, ...] = (), stager_port: int = 9102) -> list[Any]:
    reader = SliceReader(names, stager_port)
    return rows(of_slices((one, reader.read(one)) for one in slices))


def test_a_ready_endpoint_of_a_slice_is_one() -> None:
    """With the pod that it names. One without conditions is ready, and one without a pod has no instance."""
    assert read(slice_(endpoint(ready=True, serving=True, terminating=False))) == [("10.0.0.1:8000", "vllm-0", "10.0.0.1:9102", "uid-vllm-0", "z", False)]
    assert read(slice_({"addresses": ["10.0.0.1"]}), stager_port=0) == [("10.0.0.1:8000", "", "", "", "", False)]


@pytest.mark.parametrize(
    ("conditions", "is_leaving"),
    [
        ({"ready": False, "serving": False, "terminating": False}, None),
        ({"ready": False, "serving": True, "terminating": True}, True),
        ({"ready": False, "serving": False, "terminating": True}, None),
        ({"ready": False, "terminating": True}, None),
        ({"ready": True, "terminating": True}, True),
        ({}, False),
    ],
)
def test_an_endpoint_that_terminates_is_leaving_while_it_serves(conditions: dict[str, Any], is_leaving: bool | None) -> None:
    """Then it is gone, as one that is not ready."""
    assert [leaving for *_, leaving in read(slice_(endpoint(**conditions)))] == ([] if is_leaving is None else [is_leaving])


def test_the_ports_of_a_slice_are_chosen_by_name() -> None:
    """A Service with more than one must say which lead to model servers. Each has a stager of its own, in the order of the settings."""
    ports = [{"name": "http", "port": 8000}, {"name": "metrics", "port": 9090}, {"name": "rank-1", "port": 8001}]
    found = read(slice_(endpoint(), ports=ports), names=("none", "http", "rank-1"))
    assert [(address, stager) for address, _, stager, *_ in found] == [("10.0.0.1:8000", "10.0.0.1:9103"), ("10.0.0.1:8001", "10.0.0.1:9104")]
    assert read(slice_(endpoint(), ports=ports)) == [
        "EndpointSlice llm/vllm-a has the ports http, metrics, rank-1; port_names says which of them lead to model servers"
    ]


@pytest.mark.parametrize("slice_of_none", [slice_(endpoint(), ports=None), slice_(endpoint(), ports=[{"name": "http"}]), slice_(), slice_({"addresses": []})])
def test_a_slice_without_ports_or_addresses_has_no_endpoints(slice_of_none: EndpointSlice) -> None:
    """As the API server may give it, with null for a list, too."""
    assert read(slice_of_none) == []
    assert msgspec.json.decode(b'{"addressType": "IPv4", "endpoints": null, "ports": null}', type=EndpointSlice).endpoints is None


def test_names_are_no_addresses() -> None:
    """Envoy takes endpoints by IP address."""
    assert read(slice_(endpoint("a.example"), family="FQDN")) == ["EndpointSlice llm/vllm-a has addresses of type FQDN; a source of type dns resolves names"]


def test_of_two_families_the_ipv4_addresses_count() -> None:
    """Both list the same pods. A Service of IPv6 alone has those, though an empty slice of the other family may be there."""
    six = slice_(endpoint("fd00::1"), name="vllm-b", family="IPv6")
    assert [address for address, *_ in read(six, slice_(endpoint()))] == ["10.0.0.1:8000"]
    assert [address for address, *_ in read(six, slice_())] == ["[fd00::1]:8000"]


def test_an_endpoint_in_two_slices_is_not_leaving_where_one_says_so() -> None:
    """It is being moved from one to the other: the entry that is not leaving stands later, where it counts."""
    leaving = slice_(endpoint(ready=False, serving=True, terminating=True), name="vllm-z")
    assert [one[-1] for one in read(leaving, slice_(endpoint()))] == [True, False]


def test_an_address_that_cannot_be_one_is_told_of() -> None:
    """By the object that has it."""
    entries: tuple[Entry, ...] = READER.read(pod(ip="0.0.0.0"))
    assert rows(entries) == ["pod llm/vllm-0 '0.0.0.0:8000' is no machine's address"]
