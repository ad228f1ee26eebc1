"""The mutation in the words of the Endpoint Picker protocol."""

import pytest

from extproc.core.endpoint import Endpoint
from extproc.core.steering import PREFILLER_HEADERS, SIDECAR_HEADERS, Steering

ENDPOINTS = [Endpoint(f"10.0.0.{i}:8000") for i in (3, 1, 2, 4)]
HEADER = "x-gateway-destination-endpoint"


def test_header_and_metadata_name_the_same_endpoints() -> None:
    """The protocol says that both must be set; best first, because retries walk the list."""
    mutation = Steering().mutation("llama", ENDPOINTS[:2], {})
    assert mutation.set_headers == {HEADER: "10.0.0.3:8000,10.0.0.1:8000"}
    assert mutation.metadata["envoy.lb"] == {HEADER: "10.0.0.3:8000,10.0.0.1:8000"}


def test_the_list_ends_at_the_limit() -> None:
    """Three by default."""
    assert Steering().mutation("llama", ENDPOINTS, {}).set_headers[HEADER] == "10.0.0.3:8000,10.0.0.1:8000,10.0.0.2:8000"
    assert Steering(max_endpoints=1).mutation("llama", ENDPOINTS, {}).set_headers[HEADER] == "10.0.0.3:8000"


def test_by_endpoint_the_route_stays() -> None:
    """Only the destination is told."""
    mutation = Steering().mutation("llama", ENDPOINTS, {})
    assert set(mutation.set_headers) == {HEADER}
    assert not mutation.clear_route_cache
    assert mutation.remove_headers == ()


def test_by_cluster_the_pool_is_named_and_the_route_chosen_anew() -> None:
    """Envoy's `cluster_header` route reads the header only when it chooses again."""
    mutation = Steering("x-cluster", 2).mutation("llama", ENDPOINTS, {})
    assert mutation.set_headers == {HEADER: "10.0.0.3:8000,10.0.0.1:8000", "x-cluster": "llama"}
    assert mutation.clear_route_cache


def test_notes_are_for_the_access_log() -> None:
    """In a namespace of our own, as they are."""
    assert Steering().mutation("llama", ENDPOINTS, {"outcome": "staged", "waited_ms": 1.5}).metadata["lora_extproc"] == {"outcome": "staged", "waited_ms": 1.5}


def test_the_engines_name_of_the_adapter_is_part_of_the_mutation() -> None:
    """The exchange writes it into the body; without one the body stays."""
    assert Steering().mutation("llama", ENDPOINTS, {}).model == ""
    assert Steering().mutation("llama", ENDPOINTS, {}, "a@sha256:0").model == "a@sha256:0"


def test_the_mutation_names_who_may_answer() -> None:
    """Those that are told, and no others; and whether any other could answer as well."""
    mutation = Steering(max_endpoints=2).mutation("llama", ENDPOINTS, {})
    assert (mutation.endpoints, mutation.is_base) == (("10.0.0.3:8000", "10.0.0.1:8000"), False)
    assert Steering().mutation("llama", ENDPOINTS, {}, is_base=True).is_base


def test_a_decoding_engines_sidecar_is_told_the_prefiller_in_both_spellings() -> None:
    """llm-d has renamed the header; sidecars of before and after the change read the same address, and only one, as Dynamo's wants it."""
    mutation = Steering().mutation("llama", ENDPOINTS[:2], {}, prefiller="10.0.1.9:8000")
    assert mutation.set_headers == {
        HEADER: "10.0.0.3:8000,10.0.0.1:8000",
        "x-llm-d-prefiller-host-port": "10.0.1.9:8000",
        "x-prefiller-host-port": "10.0.1.9:8000",
    }
    assert not set(mutation.set_headers) & set(mutation.remove_headers)


@pytest.mark.parametrize("prefiller", ["", "10.0.1.9:8000"])
def test_no_client_tells_a_sidecar_where_to_connect(prefiller: str) -> None:
    """Every header that the sidecar obeys is set or taken away, with a prefiller and without."""
    mutation = Steering().mutation("llama", ENDPOINTS, {}, prefiller=prefiller)
    obeyed = {*PREFILLER_HEADERS, *SIDECAR_HEADERS}
    assert obeyed <= {*mutation.set_headers, *mutation.remove_headers}
    assert {"x-prefiller-host-port", "x-encoder-hosts-ports", "x-data-parallel-host-port", "x-kv-cache-source-host-port"} < obeyed
